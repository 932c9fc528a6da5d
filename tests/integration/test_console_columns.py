"""Numeric columns of the console move with what they measure, over two workers, as counted here."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
import pytest

from gpooler.stats.registry import ProcessWord
from tests.harness import Gpooler, Postgres, RawClient, eventually
from tests.harness.client import SYNC, bind, cancel_request, execute, parse, query, startup
from tests.harness.console import CONSOLE, Console, Row, console, spread

Factory = Callable[..., Gpooler]
Make = Callable[..., Gpooler]

SIZE = 4
PATIENCE = 20.0
BIG = "SELECT repeat('x', 16000000)"  # more than sockets hold


@pytest.fixture
def make(postgres: Postgres, gpooler_factory: Factory) -> Make:
    def start(rule: Row | None = None, **config: Any) -> Gpooler:
        return gpooler_factory(
            postgres,
            rule={"pool_size": SIZE, **(rule or {})},
            config={**CONSOLE, "logging": {"stats_interval": 1}, **config},
        )

    return start


def work(clients: list[RawClient]) -> dict[str, int]:
    """Each client does the same; returns what STATS_TOTALS must have grown by."""
    sent = received = 0
    for number, client in enumerate(clients):
        extended = parse("SELECT 1"), bind(), execute(), bind(), execute(), SYNC
        for request in (query(f"SELECT repeat('x', {number * 50})"), query("SELECT 2"), b"".join(extended)):
            client.send(request)
            sent += len(request)
            received += sum(5 + len(answer.body) for answer in client.read_until())
    count = len(clients)
    return {
        "server_assignment_count": 3 * count,
        "xact_count": 3 * count,
        "query_count": 4 * count,
        "bytes_received": sent,
        "bytes_sent": received,
        "client_parse_count": count,
        "server_parse_count": count,
        "bind_count": 2 * count,
        "client_login_count": 0,
    }


def grown(before: Row, after: Row) -> dict[str, int]:
    return {name: int(after[name] - before[name]) for name in after if name != "database"}


STATS = "STATS_TOTALS WHERE database = 'app'"
# of STATS, by the names of STATS_TOTALS, where it is not total_NAME
STATS_NAMES = {"bytes_received": "received", "bytes_sent": "sent"}
AVERAGE_NAMES = {"bytes_received": "recv", "bytes_sent": "sent"}
TOTALS_NAMES = {
    "bytes_received": "client_bytes",
    "bytes_sent": "server_bytes",
    "client_parse_count": "ps_client_parse_count",
    "server_parse_count": "ps_server_parse_count",
    "bind_count": "ps_bind_count",
}


def test_totals_are_what_was_done_in_all_tables_of_them(make: Make) -> None:
    pool = make()
    with ExitStack() as stack, console(pool) as control:
        clients = spread(pool, stack, 4)
        eventually(lambda: control.one(STATS)["client_login_count"] == len(clients))
        before = control.one(STATS)
        began = time.monotonic()
        wanted = work(clients)
        elapsed_us = (time.monotonic() - began) * 1e6

        # bytes and the ends of transactions are counted when they are out
        def agrees() -> bool:
            found = grown(before, control.one(STATS))
            assert {name: found[name] for name in wanted} == wanted
            return True

        eventually(agrees, within=PATIENCE)
        now = control.one(STATS)
        found = grown(before, now)
        assert 0 < found["query_time"] <= elapsed_us
        assert 0 < found["xact_time"] <= elapsed_us
        stats = control.one("STATS WHERE database = 'app'")
        totals = {row["name"]: row["value"] for row in control.show("TOTALS")}
        for name in found:
            assert stats[f"total_{STATS_NAMES.get(name, name)}"] == now[name], name
            assert totals[f"total_{TOTALS_NAMES.get(name, name)}"] == now[name], name
        extended = control.one("POOLS_EXTENDED WHERE database = 'app'")
        assert (extended["bytes_received"], extended["bytes_sent"]) == (
            now["bytes_received"],
            now["bytes_sent"],
        )


def test_averages_are_of_the_last_seconds_and_pass(make: Make) -> None:
    pool = make()
    with ExitStack() as stack, console(pool) as control:
        clients = spread(pool, stack, 4)

        def averages() -> Row:
            return control.one("STATS_AVERAGES WHERE database = 'app'")

        def are_seen() -> bool:
            for _ in range(10):
                work(clients)
                with pool.raw() as passer:
                    passer.login()
            row = averages()
            stats = control.one("STATS WHERE database = 'app'")
            shown = [stats[name] for name in stats if name.startswith("avg_") and name != "avg_wait_time"]
            return all([*shown, *(row[name] for name in row if name not in ("database", "wait_time"))])

        def are_of_sleeps() -> bool:
            """In the end the window has nothing else."""
            nonlocal longest_us
            began = time.monotonic()
            for client in clients:
                client.query("BEGIN")
                client.query("SELECT pg_sleep(0.05)")
                client.query("COMMIT")
            longest_us = max(longest_us, (time.monotonic() - began) * 1e6)
            row = averages()
            return 50_000 <= row["xact_time"] <= longest_us and 16_000 <= row["query_time"] < row["xact_time"]

        eventually(are_seen, within=PATIENCE)
        longest_us = 0.0
        eventually(are_of_sleeps, within=PATIENCE)

        def are_over() -> bool:
            row = averages()
            shown = control.one("STATS WHERE database = 'app'")
            totals = control.show("TOTALS WHERE name LIKE 'avg_%'")
            values = [row[name] for name in row if name != "database"]
            values += [shown[name] for name in shown if name.startswith("avg_")]
            return not any([*values, *(row["value"] for row in totals)])

        eventually(are_over, within=PATIENCE)


def test_waiting_counts_as_long_as_it_lasts(make: Make) -> None:
    pool = make({"pool_size": 1})
    with ExitStack() as stack, console(pool) as control:
        holder, *others = spread(pool, stack, 4)
        before = control.one(STATS)
        holder.query("BEGIN")
        began = time.monotonic()
        for client in others:
            client.send(query("SELECT 1"))
        eventually(lambda: control.pool()["cl_waiting"] == len(others))
        least = time.monotonic()
        eventually(lambda: time.monotonic() - least > 0.2)
        assert control.pool()["maxwait"] + control.pool()["maxwait_us"] / 1e6 <= time.monotonic() - began
        waited = (time.monotonic() - least) * 1e6
        assert control.one("POOLS_EXTENDED WHERE database = 'app'")["cl_waiting"] == len(others)
        holder.query("COMMIT")
        for client in others:
            client.rows()
        most = (time.monotonic() - began) * 1e6
        found = grown(before, control.one(STATS))
        assert waited * len(others) <= found["wait_time"] <= most * len(others)
        seen = control.one("STATS_AVERAGES WHERE database = 'app'")["wait_time"]
        assert 0 <= seen <= most


def test_servers_opened_reset_bound_and_closed_are_counted(make: Make, postgres: Postgres) -> None:
    pool = make({"pool_size": 2})
    with ExitStack() as stack, console(pool) as control:

        def row() -> Row:
            return control.one("POOLS_EXTENDED WHERE database = 'app'")

        def sees(**wanted: int) -> bool:
            found = row()
            assert wanted.items() <= found.items(), found
            return True

        clients = spread(pool, stack, 4)
        for client in clients[:2]:
            client.query("BEGIN")
        pids = {backend.pid for backend in postgres.activity()}
        opened = len(pids)
        assert opened == 2
        eventually(lambda: sees(clients=len(clients), cl_active=2, sv_active=2, sv_idle=0, pool_size=2))
        clients[0].send(query("SELECT pg_sleep(60)"))
        eventually(lambda: "active" in [backend.state for backend in postgres.activity()])
        with pool.raw() as canceller:
            canceller.send(cancel_request(clients[0].pid, clients[0].key))
            clients[0].read_until()
        eventually(lambda: sees(cancels=1))
        for client in clients[:2]:
            client.query("ROLLBACK")
        before = row()
        bound = clients[2]
        bound.query("CREATE TEMP TABLE t (a int)")
        eventually(lambda: sees(pins=before["pins"] + 1, resets=before["resets"]))
        bound.terminate()
        eventually(lambda: sees(resets=before["resets"] + 1, cl_active=0, sv_active=0, sv_idle=2))
        with pool.raw() as foreign:
            foreign.login(TimeZone="Asia/Tokyo")
            assert foreign.query("SHOW TimeZone") == [["Asia/Tokyo"]]
            eventually(lambda: row()["deploys"] > before["deploys"])
        (first, *_) = (backend.pid for backend in postgres.activity())
        postgres.freeze(first)
        try:
            control.connection.execute("RECONNECT app")
            eventually(lambda: sees(sv_closing=1))
            states = [found["state"] for found in control.show("SERVERS_EXTENDED")]
            assert states.count("closing") == 1
            assert row()["tcp_conn_count"] == opened
        finally:
            postgres.thaw(first)
        eventually(lambda: sees(sv_closing=0, sv_idle=0))
        for client in clients[:2]:
            client.query("BEGIN")
        new = {backend.pid for backend in postgres.activity()}
        assert not new & pids
        eventually(lambda: sees(tcp_conn_count=opened + len(new), sv_active=2))
        for client in clients[:2]:
            client.query("ROLLBACK")
        rows = {found["database"]: found for found in control.show("POOLS_EXTENDED")}
        total, alone = rows["aggregated"], rows["app"]
        names = [name for name in total if isinstance(total[name], int) and name != "pool_size"]
        assert {name: total[name] for name in names} == {name: alone[name] for name in names}


def test_databases_users_lists_and_workers_count_who_is_there(make: Make, postgres: Postgres) -> None:
    pool = make({"pool_size": 2, "client_max": 900})
    with ExitStack() as stack, console(pool) as control, console(pool):
        # the rule is of any database and user: the pool has the names of the server
        clients = spread(pool, stack, 4)
        for client in clients[:2]:
            client.query("BEGIN")
        servers = 2  # no fewer than the pool has room for
        assert len(postgres.activity()) == servers
        count = len(clients)

        def databases() -> bool:
            (database,) = control.show("DATABASES WHERE name = 'app'")
            return (database["current_connections"], database["current_client_connections"]) == (
                servers,
                count,
            )

        eventually(databases)
        (database,) = control.show("DATABASES WHERE name = 'app'")
        assert (database["pool_size"], database["max_client_connections"]) == (2, 900)
        assert (database["max_connections"], database["reserve_pool_size"]) == (0, 0)
        assert (database["paused"], database["disabled"]) == (0, 0)
        own = "DATABASES WHERE name = 'pgbouncer'"
        eventually(lambda: control.one(own)["current_client_connections"] == 2)  # that of spread is gone
        user = control.one("USERS WHERE name = 'trust_user'")
        assert (user["current_connections"], user["current_client_connections"]) == (servers, count)
        assert user["max_user_connections"] == 0
        lists = {row["list"]: row["items"] for row in control.show("LISTS")}
        assert lists["databases"] == len(control.show("DATABASES"))
        assert lists["users"] == len(control.show("USERS"))
        assert lists["pools"] == len(control.show("POOLS"))
        assert lists["used_servers"] == servers
        assert lists["used_clients"] == count + 2
        zeros = ("peers", "peer_pools", "dns_zones", "dns_queries", "dns_pending")
        assert [lists[name] for name in zeros] == [0] * len(zeros)
        memory = {row["name"]: row for row in control.show("MEM")}
        assert (memory["client"]["used"], memory["server"]["used"]) == (count, servers)
        assert lists["free_clients"] == memory["client"]["free"]
        assert lists["free_servers"] == memory["server"]["free"]
        workers = control.show("WORKERS")
        assert [row["pid"] for row in workers] == pool.worker_pids()
        assert sum(row["console_clients"] for row in workers) == 2
        eventually(lambda: sum(row["clients"] for row in control.show("WORKERS")) == count)
        for row in workers:
            assert row["rss_bytes"] == pytest.approx(psutil.Process(row["pid"]).memory_info().rss, rel=0.2)
            assert row["accepting"] == 1
            assert row["log_lines_lost"] == 0
        told = sum(row["broker_messages_sent"] for row in control.show("WORKERS"))
        assert 0 < told <= pool.process_count(ProcessWord.BROKER_SENT)
        assert sum(row["broker_messages_received"] for row in workers) > 0
        with pool.raw() as guest:
            guest.send(b"\0")
            eventually(lambda: sum(row["login_clients"] for row in control.show("WORKERS")) == 1)
        for client in clients[:2]:
            client.query("ROLLBACK")
    with console(pool) as control:
        eventually(lambda: control.one("USERS WHERE name = 'trust_user'")["current_client_connections"] == 0)
        eventually(lambda: sum(row["clients"] for row in control.show("WORKERS")) == 0)


def of_client(control: Console, table: str, client: RawClient) -> Row:
    return control.one(f"{table} WHERE port = {client.socket.getsockname()[1]}")


def test_bytes_that_are_under_way_are_shown(make: Make) -> None:
    pool = make()
    with ExitStack() as stack, console(pool) as control:
        clients = spread(pool, stack, 4)
        reader, *writers = clients
        # a short message waits until it is whole, a long one is passed on as it comes
        for writer, size, passed in zip(writers, (300, 100_000), (100, 60_000), strict=False):
            request = query(f"SELECT '{'x' * size}'")
            writer.send(request[:passed])
            column, bytes_of_it = (
                ("pkt_avail", passed) if size == 300 else ("pkt_remain", len(request) - passed)
            )

            def is_partial(
                writer: RawClient = writer, column: str = column, count: int = bytes_of_it
            ) -> bool:
                return bool(of_client(control, "SOCKETS", writer)[column] == count)

            eventually(is_partial, within=PATIENCE)
            shown = of_client(control, "ACTIVE_SOCKETS", writer)
            assert shown["id"] == of_client(control, "SOCKETS", writer)["id"]
            if column == "pkt_avail":
                assert of_client(control, "CLIENTS_EXTENDED", writer)["bytes_held"] == passed
            writer.send(request[passed:])
            assert writer.rows() == [["x" * size]]
        reader.send(query(BIG))
        eventually(lambda: of_client(control, "SOCKETS", reader)["send_avail"] > 0, within=PATIENCE)
        extended = of_client(control, "CLIENTS_EXTENDED", reader)
        limits = {
            row["key"]: int(row["value"]) for row in control.show("CONFIG WHERE key LIKE '%_bytes_%_max'")
        }
        assert 0 < extended["bytes_queued"] <= limits["client_bytes_queued_max"]
        assert extended["query_us"] > 0
        # the rest of the one row is still with PostgreSQL
        assert control.one("SOCKETS WHERE type = 'S' AND state = 'active'")["pkt_remain"] > 0
        assert len(reader.rows()[0][0] or "") == 16_000_000

        def is_still() -> bool:
            rows = control.show("SOCKETS WHERE database = 'app'")
            names = ("pkt_remain", "pkt_avail", "send_avail")
            return all(row[name] == 0 for row in rows for name in names)

        eventually(is_still)
        zeros = ("recv_pos", "pkt_pos", "send_pos", "send_remain")
        assert {row[name] for row in control.show("SOCKETS") for name in zeros} == {0}


def test_memory_is_counted_by_kind(make: Make) -> None:
    pool = make()
    with ExitStack() as stack, console(pool) as control:
        clients = spread(pool, stack, 4)

        def used() -> dict[str, int]:
            return {row["name"]: row["used"] for row in control.show("MEM")}

        for _ in range(8):  # what comes with the startup packet waits in a chunk, too
            early = stack.enter_context(pool.raw())
            early.send(startup("trust_user", "app") + query("SELECT 'early'"))
            early.read_until()
            assert early.rows() == [["early"]]
        before = used()
        half = query("SELECT 'half'")
        for number, client in enumerate(clients):
            client.query(f"SET application_name = 'mem {number}'")
            client.send(parse(f"SELECT {number}", name="s"), SYNC, half[:-4])
            client.read_until()
        wanted = {
            "client": 0,
            "chunk": len(clients),
            "parameter": len(clients),
            "statement": len(clients),
        }

        def agrees() -> bool:
            now = used()
            assert {name: now[name] - before[name] for name in wanted} == wanted
            assert now["parameter_set"] >= before["parameter_set"] + len(clients)
            return True

        eventually(agrees, within=PATIENCE)
        for row in control.show("MEM"):
            assert row["memtotal"] == row["size"] * (row["used"] + row["free"])
            assert (row["size"] > 0) == (row["name"] in ("client", "server", "chunk"))
        assert control.one("MEM WHERE name = 'server'")["used"] == len(control.show("SERVERS"))
        free = control.one("MEM WHERE name = 'chunk'")["free"]
        for client in clients:
            client.send(half[-4:])
            assert client.rows() == [["half"]]
        eventually(lambda: used()["chunk"] == before["chunk"], within=PATIENCE)
        assert control.one("MEM WHERE name = 'chunk'")["free"] >= free + len(clients)


def test_utilization_is_that_of_the_host(make: Make) -> None:
    pool = make()
    with ExitStack() as stack, console(pool) as control:
        busy_one = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        stack.callback(busy_one.wait)
        stack.callback(busy_one.kill)

        def agrees() -> bool:
            """With what is counted from just before to just after, in ticks of 10 ms."""
            before = psutil.cpu_times()
            row = control.one("HOST_UTILIZATION")
            gone = [after - then for after, then in zip(psutil.cpu_times()[:8], before[:8], strict=True)]
            busy = 100 * (1 - (gone[3] + gone[4]) / sum(gone))  # all but idle and iowait
            assert 100 / 2 / (os.cpu_count() or 1) < row["cpu"] <= 100
            assert row["cpu"] == pytest.approx(busy, abs=20)
            assert row["mem"] == pytest.approx(psutil.virtual_memory().percent, abs=5)
            return True

        eventually(agrees, within=PATIENCE)


def test_times_and_ages_are_those_of_the_clock(make: Make, postgres: Postgres) -> None:
    pool = make({"pool_size": 1, "server_lifetime": 1000})
    before = datetime.now(UTC) - timedelta(seconds=2)  # whole seconds are shown, by another clock
    with ExitStack() as stack, console(pool) as control:
        began = time.monotonic()
        client = spread(pool, stack, 4)[0]
        client.query("BEGIN")
        in_transaction = time.monotonic()
        client.send(query("SELECT pg_sleep(60)"))
        asked = time.monotonic()
        eventually(lambda: "active" in [backend.state for backend in postgres.activity()])
        eventually(lambda: time.monotonic() - asked > 0.1)
        least_us = (time.monotonic() - asked) * 1e6
        row = of_client(control, "CLIENTS_EXTENDED", client)
        server = control.one("SERVERS_EXTENDED")
        since = time.monotonic()
        for found in (row, server):
            assert least_us / 2 <= found["query_us"] <= (since - in_transaction) * 1e6
            assert least_us <= found["transaction_us"] <= (since - began) * 1e6
            assert 0 < found["state_us"] <= (since - began) * 1e6
            assert found["transaction"] == "open"
        assert row["wait_us"] == 0
        assert server["uses"] >= 1
        # old servers are closed at somewhat different times
        assert 0 < server["expires_in_s"] <= 1000
        assert (server["close_needed"], server["cancel_requests"]) == (0, 0)
        after = datetime.now(UTC) + timedelta(seconds=2)
        for shown in (*control.show("CLIENTS WHERE database = 'app'"), *control.show("SERVERS")):
            for name in ("connect_time", "request_time"):
                moment = datetime.strptime(shown[name], "%Y-%m-%d %H:%M:%S UTC").replace(tzinfo=UTC)
                assert before <= moment <= after
        control.connection.execute("RECONNECT app")
        eventually(lambda: control.one("SERVERS_EXTENDED")["close_needed"] == 1)
        assert control.one("SERVERS")["close_needed"] == 1
        with pool.raw() as canceller:
            canceller.send(cancel_request(client.pid, client.key))
            client.read_until()
        client.query("ROLLBACK")
        eventually(lambda: not control.show("SERVERS"))
        assert of_client(control, "CLIENTS_EXTENDED", client)["transaction_us"] is None


def test_logins_refused_and_lines_lost_are_counted(make: Make) -> None:
    pool = make(logging={"log_queue_depth": 1, "log_query": True})
    with ExitStack() as stack, console(pool) as control:
        clients = spread(pool, stack, 4)
        count = 6
        for _ in range(count):
            with pool.raw() as stranger:
                stranger.send(b"\0\0\0\x08\0\x09\0\0")  # a protocol that there is not
                stranger.read_to_end()
        refused = "ERRORS WHERE error_type = 'login_refused'"
        eventually(lambda: control.one(refused)["count"] == count)
        long = parse(f"SELECT '{'x' * 8000}'")
        for client in clients:
            client.send(*[long] * 300, SYNC)
            client.read_until()
            client.query("SELECT 1")  # who has parsed and not bound keeps its server
        eventually(lambda: all(row["log_lines_lost"] > 0 for row in control.show("WORKERS")))
        lost = sum(row["log_lines_lost"] for row in control.show("WORKERS"))
        assert lost <= pool.process_count(ProcessWord.LOG_LINES_LOST)


def test_what_cannot_be_moved_is_always_zero_or_null(make: Make) -> None:
    """And docs/console.md says so of each, with the reason."""
    pool = make()
    with ExitStack() as stack, console(pool) as control:
        for client in spread(pool, stack, 4):
            client.query("SELECT 1")
        assert {row["sv_used"] for row in control.show("POOLS")} == {0}
        assert {row["sv_used"] for row in control.show("POOLS_EXTENDED")} == {0}
        assert {row["load_balance_hosts"] for row in control.show("POOLS")} == {None}
        for row in control.show("DATABASES"):
            assert (row["reserve_pool_size"], row["max_connections"], row["load_balance_hosts"]) == (
                0,
                0,
                None,
            )
        for row in control.show("USERS"):
            assert (row["reserve_pool_size"], row["max_user_connections"]) == (None, 0)
        assert {row["link"] for row in control.show("FDS")} == {0}
        for table in ("PEERS", "PEER_POOLS", "DNS_ZONES"):
            assert control.show(table) == []
