"""The columns of tables whose names PgBouncer and Odyssey have, as facts, and rows made of facts."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from gpooler.broker.messages import CODEC, Ask, Rows
from gpooler.config.effective import HIDDEN
from gpooler.config.load import load_text
from gpooler.config.model import Config
from gpooler.console.asker import PART_MOST, answer
from gpooler.console.facts import (
    AVERAGED,
    NOTHING,
    BanFact,
    HostFact,
    MemoryFact,
    QuantileFact,
    RouteFact,
    RouteView,
    SocketFact,
    View,
    of_cells,
    to_cells,
)
from gpooler.console.settings import Settings
from gpooler.console.table import Cell
from gpooler.console.tables import HELP_TEXT, NAMES, TABLES
from gpooler.reasons import Reason
from gpooler.stats.history import History
from gpooler.stats.registry import ERROR_BASE, ProcessWord, RouteWord

ROOT: Final = Path(__file__).parents[2]

# Letters as in PgBouncer's sources: s text, i int4, q int8, N numeric, T a time as text, b bytea.
OIDS: Final = {"s": 25, "i": 23, "q": 20, "N": 1700, "T": 25, "b": 17, "f": 701, "B": 16}
SOCKET: Final = (
    "type:s user:s database:s replication:s state:s addr:s port:i local_addr:s local_port:i connect_time:T "
    "request_time:T wait:i wait_us:i close_needed:i ptr:s link:s remote_pid:i tls:s application_name:s "
    "prepared_statements:i id:i"
)
PGBOUNCER: Final = {
    "stats": "database:s total_server_assignment_count:N total_xact_count:N total_query_count:N "
    "total_received:N total_sent:N total_xact_time:N total_query_time:N total_wait_time:N "
    "total_client_parse_count:N total_server_parse_count:N total_bind_count:N total_client_login_count:N "
    "avg_server_assignment_count:N avg_xact_count:N avg_query_count:N avg_recv:N avg_sent:N avg_xact_time:N "
    "avg_query_time:N avg_wait_time:N avg_client_parse_count:N avg_server_parse_count:N avg_bind_count:N "
    "avg_client_login_count:N",
    "stats_totals": "database:s server_assignment_count:N xact_count:N query_count:N bytes_received:N "
    "bytes_sent:N xact_time:N query_time:N wait_time:N client_parse_count:N server_parse_count:N "
    "bind_count:N "
    "client_login_count:N",
    "stats_averages": "database:s server_assignment_count:N xact_count:N query_count:N bytes_received:N "
    "bytes_sent:N xact_time:N query_time:N wait_time:N avg_client_parse_count:N avg_server_parse_count:N "
    "avg_bind_count:N avg_client_login_count:N",
    "totals": "name:s value:N",
    "clients": SOCKET,
    "servers": SOCKET,
    "sockets": f"{SOCKET} recv_pos:i pkt_pos:i pkt_remain:i send_pos:i send_remain:i pkt_avail:i "
    "send_avail:i",
    "active_sockets": f"{SOCKET} recv_pos:i pkt_pos:i pkt_remain:i send_pos:i send_remain:i pkt_avail:i "
    "send_avail:i",
    "pools": "database:s user:s cl_active:i cl_waiting:i cl_active_cancel_req:i cl_waiting_cancel_req:i "
    "sv_active:i sv_active_cancel:i sv_being_canceled:i sv_idle:i sv_used:i sv_tested:i sv_login:i maxwait:i "
    "maxwait_us:i pool_mode:s load_balance_hosts:s",
    "peer_pools": "peer_id:i cl_active_cancel_req:i cl_waiting_cancel_req:i sv_active_cancel:i sv_login:i",
    "peers": "peer_id:i host:s port:i pool_size:i",
    "databases": "name:s host:s port:i database:s force_user:s pool_size:i min_pool_size:i "
    "reserve_pool_size:i server_lifetime:i pool_mode:s load_balance_hosts:s max_connections:i "
    "current_connections:i max_client_connections:i current_client_connections:i paused:i disabled:i",
    "users": "name:s pool_size:s reserve_pool_size:s pool_mode:s max_user_connections:i "
    "current_connections:i max_user_client_connections:i current_client_connections:i",
    "lists": "list:s items:i",
    "config": "key:s value:s default:s changeable:s",
    "mem": "name:s size:i used:i free:i memtotal:i",
    "state": "key:s value:s",
    "dns_hosts": "hostname:s ttl:q addrs:s",
    "dns_zones": "zonename:s serial:q count:i",
    "fds": "fd:i task:s user:s database:s addr:s port:i cancel:q link:i client_encoding:s std_strings:s "
    "datestyle:s timezone:s password:s scram_client_key:b scram_server_key:b",
    "version": "version:s",
}
# Odyssey's, beginning with these columns; behind them may stand ours.
ODYSSEY: Final = {
    "pools_extended": "database user cl_active cl_waiting sv_active sv_idle sv_used sv_tested sv_login "
    "maxwait maxwait_us pool_mode bytes_received bytes_sent tcp_conn_count",
    "errors": "error_type count",
    "errors_per_route": "error_type user database count",
    "version_extended": "version build_type compiler compiler_version arch",
    "listen": "host port tls tls_cert_file tls_key_file tls_ca_file tls_protocols",
    "storages": "type host port tls tls_cert_file tls_key_file tls_ca_file tls_protocols",
    "rules": "database user address connection_type obsolete",
    "is_paused": "is_paused",
    "host_utilization": "cpu mem",
    "global_prepared_statements": "name definition refcount",
    "server_prep_stmts": "type user database sid name definition refcount",
}

CONFIG: Final = """
[logging]
log_format = "%m"
[limits]
client_max = 500
[[listen]]
host = "127.0.0.1"
[storage.db]
type = "remote"
host = "db.example"
[storage.console]
type = "local"
[database.orders.user.default]
authentication = "md5"
password = "hidden-one"
storage = "db"
storage_db = "orders_main"
pool = "transaction"
pool_size = 7
[database.orders.user.batch]
authentication = "none"
storage = "db"
storage_password = "hidden-two"
pool = "session"
pool_size = 3
[database.pgbouncer.user.admin]
authentication = "none"
storage = "console"
pool = "session"
role = "admin"
"""


@pytest.fixture(scope="module")
def config() -> Config:
    return load_text(CONFIG).config


def block(**words: int) -> list[int]:
    found = list(NOTHING)
    for name, value in words.items():
        found[RouteWord[name]] = value
    return found


def view(config: Config, **others: Any) -> View:
    values: dict[str, Any] = {
        "version": "1.2",
        "now_us": 100_000_000,
        "wall_s": 1_000_000_000.0,
        "process": list(NOTHING),
        "consoles": 1,
    }
    return View(config=config, **{**values, **others})


def route(
    config: Config, rule: str, user: str, older: Iterable[int] = (), at_us: int = 0, **words: int
) -> RouteView:
    (found,) = (each for each in config.rules if each.name == rule)
    fact = RouteFact(1, rule, "orders_main", user, 0, at_us, tuple(older) or (0,) * len(AVERAGED))
    return RouteView(fact, found, "orders", user, block(**words))


def rows(table: str, of: View) -> list[dict[str, Cell]]:
    spec = TABLES[table]
    names = [column.name for column in spec.shape(of.config, of.has_legacy_columns)]
    return [dict(zip(names, row, strict=True)) for row in spec.rows(of)]


SOCKET_FACT: Final = SocketFact(
    worker=2, kind="C", number=5, id="c00", user="u", database="orders", replication="none", state="waiting",
    address="10.0.0.1", port=1234, local_address="10.0.0.2", local_port=6432, born_us=40_000_000,
    request_us=90_000_000, since_us=98_500_000, is_waiting=1, closes=0, link="", remote_pid=0, tls="",
    name="app", prepared=3, left=1, held=2, queued=4, fd=9, pins="", transaction="", transaction_us=0,
    query_us=0, link_pid=0, storage="", uses=0, expires_us=0, cancelling=0,
)  # fmt: skip


# -- columns


@pytest.mark.parametrize("table", PGBOUNCER)
def test_columns_are_those_of_pgbouncer(table: str) -> None:
    wanted = [name.split(":") for name in PGBOUNCER[table].split()]
    found = [(column.name, column.type.oid) for column in TABLES[table].columns]
    assert found == [(name, OIDS[letter]) for name, letter in wanted]


@pytest.mark.parametrize("table", ODYSSEY)
def test_columns_begin_with_those_of_odyssey(table: str) -> None:
    wanted = ODYSSEY[table].split()
    assert [column.name for column in TABLES[table].columns][: len(wanted)] == wanted


def test_every_table_is_in_the_help_and_in_the_documentation(config: Config) -> None:
    text = (ROOT / "docs" / "console.md").read_text()
    for name in NAMES:
        assert f" {name.upper()}" in HELP_TEXT[0]
        assert name.upper() in text
    for spec in TABLES.values():
        for column in spec.shape(config, True):
            assert f"`{column.name}`" in text, column.name


@pytest.mark.parametrize("table", TABLES)
def test_every_table_has_rows_of_its_shape_and_types(table: str, config: Config) -> None:
    of = view(
        config,
        routes=(route(config, "orders.default", "u", CLIENTS=2, CLIENTS_WAITING=1),),
        sockets=(SOCKET_FACT, SOCKET_FACT._replace(kind="S", state="active")),
        memory=(MemoryFact("client", 400, 2, 254),),
        bans=(BanFact("10.0.0.1", None, 5, 101_000_000),),
        hosts=(HostFact("db.example", 105_000_000, "10.0.0.9"),),
        utilization=(12.345, 50.0),
    )
    kinds: dict[str, type | tuple[type, ...]] = {
        "text": str, "bytea": str, "integer": int, "bigint": int, "numeric": int, "boolean": bool,
        "double precision": float,
    }  # fmt: skip
    for is_legacy in (False, True):
        spec, seen = TABLES[table], replace(of, has_legacy_columns=is_legacy)
        shape = spec.shape(seen.config, is_legacy)
        for row in spec.rows(seen):
            assert len(row) == len(shape)
            for cell, column in zip(row, shape, strict=True):
                assert cell is None or isinstance(cell, kinds[column.type.name]), column
                if column.type.name == "integer" and cell is not None:
                    assert -(2**31) <= int(cell) < 2**31


# -- rows


def test_rates_are_of_the_time_since_the_older_counters(config: Config) -> None:
    older = [0] * len(AVERAGED)
    older[AVERAGED.index(RouteWord.QUERIES)] = 100
    older[AVERAGED.index(RouteWord.QUERY_US)] = 50_000
    one = route(config, "orders.default", "u", older, 90_000_000, QUERIES=600, QUERY_US=1_050_000)
    other = route(config, "orders.batch", "batch", (), 0, QUERIES=40)
    (_, found) = rows("stats", view(config, routes=(one, other)))
    assert found["database"] == "orders"
    assert found["total_query_count"] == 640
    assert found["avg_query_count"] == 50  # a second, over ten
    assert found["avg_query_time"] == 2000  # of one
    assert found["avg_xact_time"] == 0
    totals = {row["name"]: row["value"] for row in rows("totals", view(config, routes=(one, other)))}
    assert (totals["total_query_count"], totals["avg_query_count"]) == (640, 50)


def test_routes_of_one_name_are_one_pool(config: Config) -> None:
    one = route(config, "orders.default", "u", CLIENTS=5, CLIENTS_WAITING=2, OLDEST_WAIT_US=97_600_000)
    other = route(config, "orders.default", "u", CLIENTS=1, SERVERS_ACTIVE=3, SERVERS_RESETTING=1)
    console, pool = rows("pools", view(config, routes=(one, other)))
    assert (console["database"], console["cl_active"]) == ("pgbouncer", 1)
    assert (pool["cl_active"], pool["cl_waiting"], pool["sv_active"], pool["sv_tested"]) == (4, 2, 2, 1)
    assert (pool["maxwait"], pool["maxwait_us"]) == (2, 400_000)
    *_, aggregated = rows("pools_extended", view(config, routes=(one, other)))
    assert (aggregated["database"], aggregated["clients"]) == ("aggregated", 6)


def test_pools_extended_has_a_column_for_each_quantile_of_any_rule() -> None:
    config = load_text(
        CONFIG.replace("pool_size = 7", "pool_size = 7\nquantiles = [0.99, 1]").replace(
            "pool_size = 3", "pool_size = 3\nquantiles = [0.5]"
        )
    ).config
    names = [column.name for column in TABLES["pools_extended"].shape(config, False)]
    wanted = ["query_0.5", "transaction_0.5", "query_0.99", "transaction_0.99", "query_1", "transaction_1"]
    assert names[len(ODYSSEY["pools_extended"].split()) :][: len(wanted) + 1] == [*wanted, "rule"]
    of = view(
        config,
        routes=(route(config, "orders.default", "u"), route(config, "orders.batch", "batch")),
        quantiles=(
            QuantileFact("orders", "u", "query", "0.99", 1234),
            QuantileFact("orders", "u", "transaction", "1", 2**40),
            QuantileFact(None, None, "query", "0.99", 999),
        ),
    )
    one, other, aggregated = rows("pools_extended", of)
    assert [one[name] for name in wanted] == [0, 0, 1234, 0, 0, 2**31 - 1]
    assert [other[name] for name in wanted] == [0] * 6
    assert [aggregated[name] for name in wanted] == [0, 0, 999, 0, 0, 0]
    assert (one["rule"], other["rule"]) == ("orders.default", "orders.batch")


def test_databases_and_users_tell_limits_and_use(config: Config) -> None:
    of = view(
        config, routes=(route(config, "orders.default", "u", CLIENTS=4, SERVERS_IDLE=2, SERVERS_LOGIN=1),)
    )
    orders, console = rows("databases", of)
    assert (orders["name"], orders["host"], orders["port"]) == ("orders", "db.example", 5432)
    assert (orders["database"], orders["pool_size"]) == ("orders_main", 7)
    assert (orders["current_connections"], orders["current_client_connections"]) == (3, 4)
    assert (console["name"], console["pool_mode"]) == ("pgbouncer", "statement")
    users = {row["name"]: row for row in rows("users", of)}
    assert users["batch"]["pool_size"] == "3"
    assert users["u"]["current_connections"] == 3


def test_a_client_that_waits_says_for_how_long(config: Config) -> None:
    of = view(config, sockets=(SOCKET_FACT,))
    (client,) = rows("clients", of)
    assert (client["wait"], client["wait_us"]) == (1, 500_000)
    assert client["connect_time"] == "2001-09-09 01:45:40 UTC"
    (extended,) = rows("clients_extended", of)
    assert (extended["wait_us"], extended["worker"]) == (1_500_000, 2)
    (socket,) = rows("sockets", of)
    assert (socket["pkt_remain"], socket["pkt_avail"], socket["send_avail"]) == (1, 2, 4)


def test_servers_that_close_are_in_the_extended_table_only(config: Config) -> None:
    of = view(config, sockets=(SOCKET_FACT._replace(kind="S", state="closing"),))
    assert rows("servers", of) == rows("sockets", of) == []
    (server,) = rows("servers_extended", of)
    assert server["state"] == "closing"


def test_errors_are_counted_by_their_reason(config: Config) -> None:
    one = route(config, "orders.default", "u")
    one.block[ERROR_BASE + Reason.CLIENT_GONE] = 3
    one.block[ERROR_BASE + Reason.CLIENT_TERMINATED] = 9  # no error
    process = list(NOTHING)
    process[ProcessWord.LOGIN_ERRORS] = 4
    of = view(config, routes=(one,), process=process)
    errors = {row["error_type"]: row["count"] for row in rows("errors", of)}
    assert (errors["client_gone"], errors["login_refused"]) == (3, 4)
    assert "client_terminated" not in errors
    assert rows("errors_per_route", of) == [
        {"error_type": "client_gone", "user": "u", "database": "orders", "count": 3}
    ]


def test_memory_is_added_up_over_the_workers(config: Config) -> None:
    facts = (MemoryFact("client", 400, 2, 254), MemoryFact("client", 400, 3, 253))
    assert rows("mem", view(config, memory=facts)) == [
        {"name": "client", "size": 400, "used": 5, "free": 507, "memtotal": 400 * 512}
    ]


def test_the_configuration_is_shown_without_secrets(config: Config) -> None:
    found = {row["key"]: row for row in rows("config", view(config))}
    assert found["limits.client_max"]["value"] == "500"
    assert found["max_client_conn"]["value"] == "500"
    assert found["database.orders.user.default.password"]["value"] == HIDDEN
    assert found["database.orders.user.batch.storage_password"]["value"] == HIDDEN
    assert "hidden-" not in str(found)
    assert found["performance.workers"]["changeable"] == "no"
    assert (found["logging.stats_interval"]["value"], found["logging.stats_interval"]["default"]) == (
        "3",
        "3",
    )


# -- on their way


def test_facts_survive_the_way_between_processes() -> None:
    sent: list[Rows] = []
    many = [SOCKET_FACT._replace(number=number, name="x" * 64) for number in range(1000)]
    slices = [many[at : at + 64] for at in range(0, 1000, 64)]
    answer(Ask(7, "sockets"), lambda what: iter(slices), sent.append)
    datagrams = [CODEC.encode(message) for message in sent]
    assert max(map(len, datagrams)) < 2 * PART_MOST
    received = [CODEC.decode(datagram) for datagram in datagrams]
    cells = [row for message in received if isinstance(message, Rows) for row in message.rows]
    assert of_cells(SocketFact, cells) == many
    assert [message.is_last for message in sent] == [False] * (len(sent) - 1) + [True]


def test_a_route_keeps_what_is_laid_out_flat() -> None:
    fact = RouteFact(1, "r", "d", "u", 0, 5, tuple(range(12)))
    assert of_cells(RouteFact, [to_cells(fact)]) == [fact]


def test_history_measures_against_one_to_two_intervals() -> None:
    history = History()
    assert history.before(1, (0, 0)) == (0, (0, 0))
    history.add(10, {1: (1, 2)})
    assert history.before(1, (0, 0)) == (10, (1, 2))
    history.add(20, {1: (3, 4)})
    assert history.before(1, (0, 0)) == (10, (1, 2))
    history.add(30, {})
    assert history.before(1, (0, 0)) == (20, (3, 4))
    assert history.before(2, (0, 0)) == (20, (0, 0))


def test_what_is_reported_stays_and_the_rest_is_the_clients() -> None:
    settings = Settings(
        "1.2", True, "admin", {"application_name": "x", "DateStyle": "German", "Work_Mem": "1"}
    )
    assert settings.reported["DateStyle"] == settings.get("datestyle") == "ISO, MDY"
    assert settings.reported["application_name"] == "x"
    assert settings.get("work_mem") == "1"
    settings.set("work_mem", "2")
    settings.set("work_mem", None)
    assert settings.get("WORK_MEM") == "1"
    settings.set("mine", "1")
    settings.set("mine", None)
    assert settings.get("mine") is None
    for number in range(1000):
        settings.set(f"n{number}", "x")
    assert settings.get("n999") is None
