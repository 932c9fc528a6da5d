"""What the console says of all workers at once, also when one of them, or the broker, says nothing."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from gpooler.console.tables import TABLES
from gpooler.stats.registry import ProcessWord
from tests.harness import Gpooler, Postgres, eventually
from tests.harness.client import SYNC, bind, execute, parse
from tests.harness.console import CONSOLE, Console, Row, console, spread


@pytest.fixture(scope="module")
def cluster(_postgres15: Postgres) -> Postgres:
    """It has servers as long as ``shared`` lives."""
    return _postgres15


@pytest.fixture(scope="module")
def _shared(cluster: Postgres) -> Iterator[Gpooler]:
    with Gpooler(cluster, rule={"pool_size": 4}, config=CONSOLE) as pool:
        yield pool
        assert not pool.leaks()


@pytest.fixture
def shared(_shared: Gpooler) -> Gpooler:
    """For tests that leave it as it is. Nobody is shown who was a client of another test."""
    eventually(lambda: _shared.process_count(ProcessWord.CLIENTS, ProcessWord.CONSOLES) == 0)
    return _shared


def test_clients_and_servers_of_all_workers_are_shown(shared: Gpooler, cluster: Postgres) -> None:
    pool = shared
    with ExitStack() as stack, console(pool) as control:
        clients = spread(pool, stack, 6)
        for client in clients[:4]:  # as many as there may be servers: none is opened meanwhile
            client.query("BEGIN")
            client.query("CREATE TEMP TABLE t (a int)")
        backends = {backend.pid for backend in cluster.activity()}
        ports = {client.socket.getsockname()[1] for client in clients}
        shown = control.show("CLIENTS WHERE database = 'app'")
        assert {row["port"] for row in shown} == ports
        assert len({row["id"] for row in shown}) == len(clients)
        assert all(row["local_port"] == pool.port and row["addr"] == "127.0.0.1" for row in shown)
        assert sorted(row["state"] for row in shown) == ["active"] * 4 + ["idle"] * (len(clients) - 4)
        servers = control.show("SERVERS")
        assert {row["remote_pid"] for row in servers} == backends
        links = {row["ptr"]: row["link"] for row in servers if row["state"] == "active"}
        assert {row["link"]: row["ptr"] for row in shown if row["link"]} == links
        extended = control.show("CLIENTS_EXTENDED WHERE state = 'active'")
        assert {row["server_pid"] for row in extended} <= backends
        assert [(row["transaction"], row["pins"]) for row in extended] == [("open", "temporary object")] * 4
        assert {row["worker"] for row in control.show("CLIENTS_EXTENDED")} == {1, 2}
        assert {row["fd"] > 0 for row in control.show("FDS WHERE database = 'app'")} == {True}
        pool_row = control.pool()
        assert (pool_row["cl_active"], pool_row["sv_active"]) == (len(clients), 4)
        assert pool_row["sv_active"] + pool_row["sv_idle"] == len(backends)
        for client in clients[:4]:
            client.query("ROLLBACK")


def test_what_is_counted_is_what_was_done(shared: Gpooler) -> None:
    pool = shared
    with ExitStack() as stack, console(pool) as control:
        clients = spread(pool, stack, 6)
        before = control.one("STATS_TOTALS WHERE database = 'app'")
        for client in clients:
            client.query("SELECT 1")
            client.query("BEGIN")
            client.query("SELECT 2")
            client.query("COMMIT")
            client.send(parse("SELECT 3", "s"), bind("s"), execute(), bind("s"), execute(), SYNC)
            client.read_until()
        count = len(clients)
        wanted = {
            "query_count": 6 * count,
            "xact_count": 3 * count,
            "server_assignment_count": 3 * count,
            "client_parse_count": count,
            "bind_count": 2 * count,
        }

        def as_wanted() -> Row:
            """The ends of transactions are counted when they are out."""
            now = control.one("STATS_TOTALS WHERE database = 'app'")
            assert {name: now[name] - before[name] for name in wanted} == wanted
            return now

        now = eventually(as_wanted)
        grown = {name: now[name] - before[name] for name in now if name != "database"}
        assert 1 <= grown["server_parse_count"] <= 4 + count
        assert now["client_login_count"] >= count
        assert grown["bytes_received"] > 100 * count
        assert grown["bytes_sent"] > 100 * count
        assert grown["xact_time"] >= grown["query_time"] / 6 > 0
        stats = control.one("STATS WHERE database = 'app'")
        assert stats["total_query_count"] == now["query_count"]
        eventually(lambda: control.one("STATS WHERE database = 'app'")["avg_query_count"] > 0)
        statements = control.show("PREPARED_STATEMENTS")
        (statement,) = (row for row in statements if row["definition"] == "SELECT 3")
        assert statement["name"].startswith("gp_")
        assert statement["refcount"] >= count
        copies = control.show(f"SERVER_PREP_STMTS WHERE name = '{statement['name']}'")
        assert 1 <= len(copies) <= 4
        assert {row["sid"] for row in copies} <= {row["ptr"] for row in control.show("SERVERS")}
        assert {row["definition"] for row in copies} == {"SELECT 3"}
        shown = control.show("CLIENTS WHERE database = 'app'")
        assert {row["prepared_statements"] for row in shown} == {1}


def test_a_worker_that_is_stuck_is_named_and_the_others_rows_are_there(shared: Gpooler) -> None:
    pool = shared
    with ExitStack() as stack, console(pool) as control:
        spread(pool, stack, 6)
        own = control.one(f"CLIENTS_EXTENDED WHERE port = {control.port}")["worker"]
        others = [pid for number, pid in enumerate(pool.worker_pids(), 1) if number != own]
        all_of_them = len(control.show("CLIENTS WHERE database = 'app'"))
        os.kill(others[0], signal.SIGSTOP)
        try:
            shown = control.show("CLIENTS WHERE database = 'app'", is_whole=False)
            assert 0 < len(shown) < all_of_them
            assert control.notices == [f"worker {3 - own} did not answer: its rows are missing"]
            assert control.show("POOLS")  # needs no other worker
        finally:
            os.kill(others[0], signal.SIGCONT)
        assert len(control.show("CLIENTS WHERE database = 'app'")) == all_of_them


def test_pools_are_there_without_the_broker_and_averages_are_not(shared: Gpooler) -> None:
    pool = shared
    with ExitStack() as stack, console(pool) as control:
        for client in spread(pool, stack, 6):
            client.query("SELECT 1")
        broker = pool.broker_pid()
        os.kill(broker, signal.SIGSTOP)
        try:
            (before,) = control.show("STATS WHERE database = 'app'", is_whole=False)
            assert control.notices == ["the broker did not answer: averages are 0"]
            assert before["total_query_count"] >= 6
        finally:
            os.kill(broker, signal.SIGCONT)
        os.kill(broker, signal.SIGKILL)
        assert control.one("STATS WHERE database = 'app'")["total_query_count"] == before["total_query_count"]


def test_lists_and_memory_count_records(shared: Gpooler) -> None:
    pool = shared
    with ExitStack() as stack, console(pool) as control:
        clients = spread(pool, stack, 4)
        lists = {row["list"]: row["items"] for row in control.show("LISTS")}
        assert lists["used_clients"] >= len(clients) + 1  # and the console's
        memory = {row["name"]: row for row in control.show("MEM")}
        assert memory["client"]["used"] >= len(clients)
        assert memory["client"]["memtotal"] == memory["client"]["size"] * 512
        with pool.raw() as guest:
            guest.send(b"\0")
            eventually(lambda: control.one("LISTS WHERE list = 'login_clients'")["items"] == 1)


def test_every_table_is_shown_to_a_client(shared: Gpooler) -> None:
    pool = shared
    with pool.connect() as client, console(pool) as control:
        client.execute("SELECT 1")
        for table in TABLES:
            found = control.connection.execute(f"SHOW {table}")  # type: ignore[call-overload]
            assert [column.name for column in found.description] == [
                column.name for column in (*TABLES[table].columns, *TABLES[table].behind)
            ]


def test_several_may_ask_at_the_same_time(shared: Gpooler) -> None:
    pool = shared
    with ExitStack() as stack:
        clients = spread(pool, stack, 6)
        controls = [stack.enter_context(console(pool)) for _ in range(6)]

        def ask(control: Console) -> list[int]:
            shown = [control.show("CLIENTS WHERE database = 'app'") for _ in range(5)]
            return [len(rows) for rows in shown]

        with ThreadPoolExecutor() as threads:
            assert list(threads.map(ask, controls)) == [[len(clients)] * 5] * 6
