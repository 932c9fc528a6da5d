"""Clients that vanish: what they ran is cancelled, rolled back, reset; their server serves on."""

import socket
from collections.abc import Callable
from contextlib import closing
from itertools import product
from typing import Any, Final

import psycopg
import pytest

from gpooler.stats.registry import RouteWord
from tests.harness import Backend, Gpooler, Postgres, RawClient, eventually, free_port, stopped
from tests.harness.client import (
    COPY_DONE,
    SYNC,
    TERMINATE,
    ServerError,
    bind,
    copy_data,
    execute,
    message,
    parse,
    query,
    startup,
)

Factory = Callable[..., Gpooler]

TRANSPORTS = ["tcp", "unix"]
WAYS = ["fin", "rst"]
# Long enough that a test which waited for it would fail.
LONG = "SELECT pg_sleep(60)"
# However long a part of it takes: a server that is not reset in time is closed.
RULE: Final[dict[str, Any]] = {"pool_size": 1, "pool_reset_timeout_ms": 60_000}
# Of a client that has said FIN or Terminate a query is cancelled when half of this is over.
BRIEF = {"pool_reset_timeout_ms": 3000}


@pytest.fixture(params=TRANSPORTS)
def pool(
    request: pytest.FixtureRequest, postgres: Postgres, gpooler_factory: Factory
) -> tuple[Gpooler, Callable[[], RawClient]]:
    """A transaction pool of one server, and how to connect to it."""
    port = free_port()
    listen = [{"host": "127.0.0.1", "port": port}]
    gpooler: Gpooler
    if request.param == "tcp":
        gpooler = gpooler_factory(postgres, rule=RULE, config={"listen": listen}, port=port)
        return gpooler, lambda: gpooler.raw().login()
    directory = str(postgres.directory)
    unix_port = free_port()
    gpooler = gpooler_factory(
        postgres,
        rule=RULE,
        config={
            "listen": [*listen, {"port": unix_port}],
            "service": {"unix_socket_dir": directory, "unix_socket_mode": "0777"},
        },
        port=port,
    )
    return gpooler, lambda: RawClient(unix_port, directory).login()


Pool = tuple[Gpooler, Callable[[], RawClient]]


def leave(client: RawClient, way: str) -> None:
    """Without Terminate; a Unix socket knows no reset."""
    if way == "rst" and client.socket.family != socket.AF_UNIX:
        client.reset()
    else:
        client.close()


def pid_of(client: RawClient) -> int:
    return int(client.query("SELECT pg_backend_pid()")[0][0] or 0)


def states(postgres: Postgres) -> list[str | None]:
    return [row.state for row in postgres.activity()]


def only(postgres: Postgres) -> Backend:
    (row,) = postgres.activity()
    return row


def runs(postgres: Postgres, text: str) -> Callable[[], bool]:
    return lambda: [(row.state, row.query) for row in postgres.activity()] == [("active", text)]


def test_a_query_whose_client_is_gone_is_cancelled(postgres: Postgres, pool: Pool) -> None:
    gpooler, connect = pool
    gpooler.reload(rule=BRIEF)
    for way in WAYS:
        client = connect()
        pid = pid_of(client)
        client.send(query(LONG))
        eventually(runs(postgres, LONG))
        leave(client, way)
        eventually(lambda: states(postgres) == ["idle"])
        with connect() as other:
            assert pid_of(other) == pid
        assert "canceling statement due to user request" in postgres.log()


def test_a_client_whose_end_came_with_its_query_keeps_no_place_in_the_queue(
    postgres: Postgres, pool: Pool
) -> None:
    gpooler, connect = pool
    for way in WAYS:
        with connect() as other:
            other.query("BEGIN")
            client = connect()
            (worker,) = gpooler.worker_pids()
            with stopped(worker):  # both are there before the relay looks
                client.send(query("SELECT 1"))
                leave(client, way)
            eventually(lambda: gpooler.route_count(RouteWord.CLIENTS) == 1, within=5)
            other.query("ROLLBACK")


LINES = "COPY lines_gone FROM STDIN"
BEGUN = parse(LINES) + bind() + execute() + SYNC
AGAIN = parse(LINES, "a") + bind("a") + execute() + SYNC


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(BEGUN + copy_data(b"x\n") + AGAIN + COPY_DONE, id="fails"),
        pytest.param(
            BEGUN + copy_data(b"x\n") * 2 + SYNC * 2 + AGAIN + copy_data(b"1\n") + COPY_DONE, id="fails late"
        ),
        pytest.param(BEGUN + COPY_DONE + AGAIN + COPY_DONE + SYNC * 2, id="runs twice"),
    ],
)
def test_a_client_that_leaves_a_copy_in_doubt_does_not_keep_its_server(
    postgres: Postgres, pool: Pool, stream: bytes
) -> None:
    """Its COPYs have swallowed Syncs, or not: how many answers are due cannot be known."""
    _gpooler, connect = pool
    postgres.query("CREATE TABLE IF NOT EXISTS lines_gone (n int); GRANT ALL ON lines_gone TO PUBLIC", "app")
    with connect() as client:
        client.send(stream)
        client.half_close()
        client.read_to_end(within=5)
    with connect() as other:
        assert other.query("SELECT 1") == [["1"]]


def test_a_client_gone_in_a_transaction_is_rolled_back(postgres: Postgres, pool: Pool) -> None:
    _gpooler, connect = pool
    postgres.query("CREATE TABLE IF NOT EXISTS t_gone (n int); GRANT ALL ON t_gone TO PUBLIC", "app")
    for way in WAYS:
        postgres.query("TRUNCATE t_gone", "app")
        client = connect()
        client.query("BEGIN")
        client.query("INSERT INTO t_gone VALUES (1)")
        client.query("LOCK t_gone")
        pid = pid_of(client)
        leave(client, way)
        with connect() as other:
            assert pid_of(other) == pid
            assert other.query("SELECT count(*) FROM t_gone") == [["0"]]
            assert other.query("SELECT count(*) FROM pg_locks WHERE relation = 't_gone'::regclass") == [["0"]]


def test_a_query_in_a_transaction_is_cancelled_and_rolled_back(postgres: Postgres, pool: Pool) -> None:
    gpooler, connect = pool
    gpooler.reload(rule=BRIEF)
    for way in WAYS:
        client = connect()
        client.query("BEGIN")
        client.query("SELECT pg_advisory_xact_lock(99)")
        pid = pid_of(client)
        client.send(query(LONG))
        eventually(runs(postgres, LONG))
        leave(client, way)
        with connect() as other:
            assert pid_of(other) == pid
            assert other.query("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == [["0"]]


def test_a_failed_transaction_of_a_gone_client_is_rolled_back(postgres: Postgres, pool: Pool) -> None:
    _gpooler, connect = pool
    client = connect()
    client.query("BEGIN")
    pid = pid_of(client)
    with pytest.raises(ServerError):
        client.query("SELECT 1/0")
    client.close()
    with connect() as other:
        assert other.query("SELECT pg_backend_pid(), now() = statement_timestamp()") == [[str(pid), "t"]]


def test_a_client_gone_in_copy_in_leaves_nothing(postgres: Postgres, pool: Pool) -> None:
    _gpooler, connect = pool
    postgres.query("CREATE TABLE IF NOT EXISTS t_copy (n int); GRANT ALL ON t_copy TO PUBLIC", "app")
    for way in WAYS:
        postgres.query("TRUNCATE t_copy", "app")
        client = connect()
        client.send(query("COPY t_copy FROM STDIN"))
        client.read_until(b"G")
        client.send(copy_data(b"1\n2\n"))
        leave(client, way)
        with connect() as other:
            assert other.query("SELECT count(*) FROM t_copy") == [["0"]]
            assert len(postgres.activity()) == 1


def test_a_client_gone_in_copy_out_frees_the_slot(postgres: Postgres, pool: Pool) -> None:
    _gpooler, connect = pool
    for way in WAYS:
        client = connect()
        client.send(query("COPY (SELECT repeat('x', 1000) FROM generate_series(1, 1000000)) TO STDOUT"))
        client.read_until(b"d")
        leave(client, way)
        with connect() as other:
            assert other.query("SELECT 1") == [["1"]]
        assert len(postgres.activity()) == 1


def test_a_client_gone_in_a_large_result_frees_the_slot(postgres: Postgres, pool: Pool) -> None:
    _gpooler, connect = pool
    for way in WAYS:
        client = connect()
        client.send(query("SELECT repeat('x', 1000) FROM generate_series(1, 1000000)"))
        client.read_until(b"D")
        leave(client, way)
        with connect() as other:
            assert other.query("SELECT 1") == [["1"]]
        assert len(postgres.activity()) == 1


def test_a_client_gone_inside_a_message_frees_the_slot(postgres: Postgres, pool: Pool) -> None:
    _gpooler, connect = pool
    for way, cut in product(WAYS, [1, 4, 5, 30]):
        client = connect()
        client.query("BEGIN")
        client.send(query("SELECT 'a text that is longer than thirty bytes'")[:cut])
        leave(client, way)
        with connect() as other:
            assert other.query("SELECT now() = statement_timestamp()") == [["t"]]
        assert len(postgres.activity()) == 1


def test_a_client_gone_behind_extended_messages_without_sync_is_rolled_back(
    postgres: Postgres, pool: Pool
) -> None:
    _gpooler, connect = pool
    postgres.query("CREATE TABLE IF NOT EXISTS t_open (n int); GRANT ALL ON t_open TO PUBLIC", "app")
    for way in WAYS:
        postgres.query("TRUNCATE t_open", "app")
        client = connect()
        client.send(parse("INSERT INTO t_open VALUES (1)"), bind(), execute(), message(b"H"))
        assert [answer.kind for answer in client.read_until(b"C")] == [b"1", b"2", b"C"]
        leave(client, way)
        with connect() as other:
            assert other.query("SELECT count(*) FROM t_open") == [["0"]]
            assert other.query("SELECT now() = statement_timestamp()") == [["t"]]


def test_terminate_behind_extended_messages_without_sync_ends_them(postgres: Postgres, pool: Pool) -> None:
    _gpooler, connect = pool
    postgres.query("CREATE TABLE IF NOT EXISTS t_open2 (n int); GRANT ALL ON t_open2 TO PUBLIC", "app")
    postgres.query("TRUNCATE t_open2", "app")
    client = connect()
    client.send(query("INSERT INTO t_open2 VALUES (1)"))
    client.send(parse("INSERT INTO t_open2 VALUES (2)"), bind(), execute(), TERMINATE)
    client.close()
    with connect() as other:
        assert other.query("SELECT n FROM t_open2") == [["1"]]


def test_a_waiting_client_that_goes_leaves_the_queue(postgres: Postgres, pool: Pool) -> None:
    gpooler, connect = pool
    for way in WAYS:
        with connect() as first:
            first.query("BEGIN")
            second = connect()
            second.send(query("SELECT 2"))
            eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
            leave(second, way)
            eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 0)
            first.query("COMMIT")
            assert first.query("SELECT 1") == [["1"]]


def test_a_client_that_goes_while_it_waits_at_login_leaves_the_queue(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={**RULE, "pool": "session"})
    for way in WAYS:
        with gpooler.raw() as first:
            first.login()
            second = gpooler.raw()
            second.send(startup("trust_user", "app"))
            second.read_until(b"R")  # what is unread would make a FIN an RST
            eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
            leave(second, way)
            eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 0)
            pid = first.pid
            first.terminate()
        with gpooler.raw() as third:
            assert third.login().pid == pid


def test_a_half_closed_client_gets_its_whole_answer(postgres: Postgres, pool: Pool) -> None:
    _gpooler, connect = pool
    with connect() as client:
        client.send(query("SELECT pg_sleep(0.3)::text || repeat('x', 1000) FROM generate_series(1, 3)"))
        client.half_close()
        answers = [answer for answer in client.read_to_end() if answer.kind != b"S"]
        assert b"".join(answer.kind for answer in answers) == b"TDDDCZ"
        assert {answer.values()[0] for answer in answers if answer.kind == b"D"} == {"x" * 1000}


def test_a_half_closed_client_gets_a_large_answer(postgres: Postgres, pool: Pool) -> None:
    _gpooler, connect = pool
    with connect() as client:
        client.send(query("SELECT n, repeat('x', 1000) FROM generate_series(1, 20000) n"))
        client.half_close()
        answers = [answer for answer in client.read_to_end() if answer.kind != b"S"]
        assert [answer.values()[0] for answer in answers if answer.kind == b"D"] == [
            str(n) for n in range(1, 20001)
        ]
        assert answers[-1].kind == b"Z"


def test_a_half_closed_client_that_waits_is_served(postgres: Postgres, pool: Pool) -> None:
    gpooler, connect = pool
    with connect() as first, connect() as second:
        first.query("BEGIN")
        second.send(query("SELECT 2"))
        second.half_close()
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
        first.query("COMMIT")
        answers = [answer for answer in second.read_to_end() if answer.kind != b"S"]
        assert b"".join(answer.kind for answer in answers) == b"TDCZ"


def test_terminate_right_behind_a_query_commits_it(postgres: Postgres, pool: Pool) -> None:
    gpooler, connect = pool
    postgres.query("CREATE TABLE IF NOT EXISTS t_last (n int); GRANT ALL ON t_last TO PUBLIC", "app")
    postgres.query("TRUNCATE t_last", "app")
    for number in range(20):
        client = connect()
        if number % 2:
            client.send(query(f"INSERT INTO t_last SELECT {number} FROM pg_sleep(0.02)"), TERMINATE)
        else:
            client.send(
                parse(f"INSERT INTO t_last SELECT {number} FROM pg_sleep(0.02)"), bind(), execute(), SYNC
            )
            client.send(TERMINATE)
        client.close()
        # one that waits for a server and is gone is not served
        eventually(
            lambda: postgres.query("SELECT count(*) FROM t_last", "app") == [(number + 1,)]  # noqa: B023
        )
        eventually(lambda: gpooler.route_count(RouteWord.SERVERS_IDLE) == 1)


@pytest.mark.parametrize("has_sync", [True, False])
def test_terminate_behind_a_long_query_does_not_keep_the_server_for_ever(
    postgres: Postgres, pool: Pool, has_sync: bool
) -> None:
    gpooler, connect = pool
    gpooler.reload(rule={"pool_reset_timeout_ms": 1000})
    for request in (query(LONG), parse(LONG) + bind() + execute() + SYNC * has_sync):
        client = connect()
        client.send(request)
        eventually(runs(postgres, LONG))
        client.terminate()
        eventually(lambda: "active" not in states(postgres), within=10)
        with connect() as other:
            assert other.query("SELECT 1") == [["1"]]


def test_terminate_in_a_transaction_rolls_it_back(postgres: Postgres, pool: Pool) -> None:
    _gpooler, connect = pool
    postgres.query("CREATE TABLE IF NOT EXISTS t_term (n int); GRANT ALL ON t_term TO PUBLIC", "app")
    postgres.query("TRUNCATE t_term", "app")
    client = connect()
    client.query("BEGIN")
    pid = pid_of(client)
    client.send(query("INSERT INTO t_term VALUES (1)"), TERMINATE)
    client.close()
    with connect() as other:
        assert pid_of(other) == pid
        assert other.query("SELECT count(*) FROM t_term") == [["0"]]


def test_a_message_left_unfinished_on_a_server_is_given_up(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    """Half a query sent, and then silence: after client_login_timeout the client is closed."""
    port = free_port()
    gpooler = gpooler_factory(
        postgres,
        rule={"pool_size": 1},
        config={"listen": [{"host": "127.0.0.1", "port": port, "client_login_timeout": 3000}]},
        port=port,
    )
    with gpooler.raw() as staller, gpooler.raw() as other:
        staller.login()
        other.login()
        staller.send(query("SELECT 'first half, " + "x" * 100_000 + "'")[:50_000])
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_ACTIVE) == 1)
        assert other.query("SELECT 1") == [["1"]]
        assert staller.read_to_end() == []


def test_many_clients_vanish_at_once_and_the_pool_is_whole(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 3}, config={"performance": {"workers": 2}})
    for turn in range(3):
        clients = [gpooler.raw().login() for _ in range(20)]
        for number, client in enumerate(clients):
            client.send(query(LONG) if number % 3 else query("BEGIN; SELECT 1"))
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) > 5)
        assert len(postgres.activity()) <= 3
        for number, client in enumerate(clients):
            leave(client, WAYS[(number + turn) % 2])
        eventually(lambda: set(states(postgres)) <= {"idle"}, within=10)
    with closing(psycopg.connect(gpooler.dsn(), autocommit=True)) as connection:
        for number in range(100):
            assert connection.execute("SELECT %s::int", (number,)).fetchone() == (number,)
