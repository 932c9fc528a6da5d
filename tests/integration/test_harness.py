"""The harness itself: what other tests stand on."""

import re
import socket
import threading
from collections.abc import Callable

import psutil
import psycopg
import pytest

from gpooler.stats.registry import ProcessWord, RouteWord
from tests.harness import PASSWORD, FaultProxy, Gpooler, Postgres, RawClient, eventually, free_port
from tests.harness.client import SYNC, ServerError, parse


def test_eventually_returns_the_first_true_value() -> None:
    values = iter([0, None, 7])
    assert eventually(lambda: next(values)) == 7


def test_eventually_tells_the_last_failure() -> None:
    def check() -> bool:
        assert 1 > 2, "one is small"
        return True

    with pytest.raises(AssertionError, match="one is small"):
        eventually(check, within=0.01)


def test_free_ports_can_be_bound() -> None:
    with socket.create_server(("127.0.0.1", free_port())):
        pass


def test_a_port_that_another_run_was_given_is_not_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = free_port()
    drawn = iter([taken, taken + 1, taken + 2, taken + 3])
    monkeypatch.setattr("tests.harness.tools._random.randint", lambda lowest, highest: next(drawn))
    assert free_port() > taken


def test_postgres_answers_over_every_transport(any_postgres: Postgres) -> None:
    for host in ("127.0.0.1", "::1", str(any_postgres.socket_dir)):
        with psycopg.connect(any_postgres.dsn(host=host)) as connection:
            version = connection.info.server_version // 10000
            assert version == any_postgres.version


@pytest.mark.parametrize("user", ["trust_user", "password_user", "md5_user", "scram_user"])
def test_postgres_knows_a_user_of_each_method(any_postgres: Postgres, user: str) -> None:
    with psycopg.connect(any_postgres.dsn(user)) as connection:
        assert connection.execute("SELECT current_user").fetchone() == (user,)
    if user != "trust_user":
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(any_postgres.dsn(user, password="wrong"))


def test_activity_shows_clients_but_not_the_harness(postgres: Postgres) -> None:
    assert postgres.activity() == []
    with psycopg.connect(postgres.dsn("trust_user", application_name="seen")) as connection:
        (row,) = postgres.activity()
        assert (row.pid, row.usename, row.application_name) == (
            connection.info.backend_pid,
            "trust_user",
            "seen",
        )


def test_a_killed_backend_takes_all_down_and_postgres_recovers(postgres: Postgres) -> None:
    with RawClient(postgres.port) as client:
        client.login()
        postgres.kill(client.pid)
        client.read_to_end()
    assert postgres.query("SELECT 1") == [(1,)]


def test_a_terminated_backend_tells_its_client(postgres: Postgres) -> None:
    with RawClient(postgres.port) as client:
        client.login()
        postgres.terminate(client.pid)
        (last,) = client.read_to_end()
        assert last.fields()["C"] == "57P01"


def test_postgres_comes_back_on_the_same_port(postgres18: Postgres) -> None:
    port = postgres18.port
    postgres18.restart()
    assert postgres18.port == port
    assert postgres18.query("SELECT 1") == [(1,)]


@pytest.mark.parametrize("user", ["trust_user", "password_user", "md5_user"])
def test_raw_client_logs_in_and_queries(any_postgres: Postgres, user: str) -> None:
    with RawClient(any_postgres.port) as client:
        client.login(user, password=PASSWORD, application_name="raw")
        assert client.parameters["application_name"] == "raw"
        assert client.pid
        assert client.key
        assert client.query("SELECT 1, NULL, 'x'") == [["1", None, "x"]]
        with pytest.raises(ServerError) as caught:
            client.query("SELECT 1/0")
        assert caught.value.sqlstate == "22012"


def test_proxy_passes_bytes_and_half_closes(
    postgres: Postgres, fault_proxy: Callable[[int], FaultProxy]
) -> None:
    proxy = fault_proxy(postgres.port)
    with RawClient(proxy.port) as client:
        client.login()
        assert client.query("SELECT repeat('x', 100000)")[0][0] == "x" * 100_000
        assert proxy.passed("down") > 100_000
        client.half_close()
        assert client.read_to_end() == []
    eventually(lambda: proxy.connections() == 0)


def test_proxy_stalls_and_resumes(postgres: Postgres, fault_proxy: Callable[[int], FaultProxy]) -> None:
    proxy = fault_proxy(postgres.port)
    with RawClient(proxy.port) as client:
        client.login()
        proxy.stall("down")
        answers: list[object] = []
        reader = threading.Thread(target=lambda: answers.append(client.query("SELECT 1")))
        reader.start()
        eventually(lambda: [row.state for row in postgres.activity() if "SELECT 1" in row.query] == ["idle"])
        assert answers == []
        proxy.resume("down")
        reader.join()
        assert answers == [[["1"]]]


def test_proxy_cuts_after_so_many_bytes(postgres: Postgres, fault_proxy: Callable[[int], FaultProxy]) -> None:
    proxy = fault_proxy(postgres.port)
    with RawClient(proxy.port) as client:
        client.login()
        before = proxy.passed("down")
        proxy.cut_after(3, "down")
        with pytest.raises(EOFError, match="closed after 3 of 5 bytes"):
            client.query("SELECT 1")
        assert proxy.passed("down") == before + 3


def test_proxy_resets_both_sides(postgres: Postgres, fault_proxy: Callable[[int], FaultProxy]) -> None:
    proxy = fault_proxy(postgres.port)
    with RawClient(proxy.port) as client:
        client.login()
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            client.receive(1)
    eventually(lambda: not postgres.activity())


def test_proxy_refuses_new_connections(postgres: Postgres, fault_proxy: Callable[[int], FaultProxy]) -> None:
    proxy = fault_proxy(postgres.port)
    proxy.refuse(1)
    with RawClient(proxy.port) as client:
        assert client.read_to_end() == []
    with RawClient(proxy.port) as client:
        assert client.login().query("SELECT 1") == [["1"]]
    proxy.refuse()
    for _ in range(2):
        with RawClient(proxy.port) as client:
            assert client.read_to_end() == []


def test_gpooler_shows_its_processes_and_leaves_none(
    postgres: Postgres, gpooler_factory: Callable[..., Gpooler]
) -> None:
    gpooler = gpooler_factory(postgres, config={"performance": {"workers": 2}})
    family = [gpooler.pid, gpooler.broker_pid(), *eventually(lambda: two(gpooler.worker_pids()))]
    assert sorted(family) == sorted(process.pid for process in gpooler.processes())
    assert gpooler.stop() == 0
    assert not any(psutil.pid_exists(pid) for pid in family)


def two(values: list[int]) -> list[int] | None:
    return values if len(values) == 2 else None


def test_gpooler_counts_are_read_from_its_shared_memory(
    postgres: Postgres, gpooler_factory: Callable[..., Gpooler]
) -> None:
    gpooler = gpooler_factory(postgres)
    with gpooler.raw() as client:
        client.login()
        assert client.query("SELECT 1") == [["1"]]
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS) == 1)
        eventually(lambda: gpooler.process_count(ProcessWord.LOGINS) == 1)
        eventually(lambda: gpooler.route_count(RouteWord.TRANSACTIONS) == 1)


def test_gpooler_with_an_open_client_counts_as_leaking(
    postgres: Postgres, gpooler_factory: Callable[..., Gpooler]
) -> None:
    gpooler = gpooler_factory(postgres)
    with gpooler.raw() as client:
        client.login()
        assert gpooler.leaks(within=0.1) == ["1 client connections are still open"]


@pytest.mark.parametrize(
    ("sql", "found"),
    [
        ("SELECT pg_advisory_lock(7)", r"server \d+ is idle; its locks: advisory ExclusiveLock"),
        ("LISTEN ear", r"server \d+ was left with channels: ear"),
        ("CREATE TEMP TABLE here (n int)", r"server \d+ was left with temporary objects: here, .*"),
        ("DECLARE c CURSOR WITH HOLD FOR SELECT 1", r"server \d+ was left with cursors: c"),
        ("DO $$BEGIN SET work_mem = '5MB'; END$$", r"server \d+ was left with settings: work_mem"),
        ("DO $$BEGIN SET ROLE pg_read_all_stats; END$$", r"server \d+ was left with .*role.*"),
        ("DO $$BEGIN EXECUTE 'PREPARE p AS SELECT 1'; END$$", r"server \d+ was .* prepared statements: p"),
    ],
)
@pytest.mark.parametrize("pool", ["transaction", "session"])
def test_what_stays_on_a_server_counts_as_dirt(
    postgres: Postgres, gpooler_factory: Callable[..., Gpooler], pool: str, sql: str, found: str
) -> None:
    rule = {"pool": pool, "session_state": "allow", "session_state_check": "off", "pool_discard": False}
    gpooler = gpooler_factory(postgres, rule=rule)
    with gpooler.raw() as client, gpooler.raw() as other:
        client.login().query(sql)
        other.login().query("SELECT 1")
        client.terminate()
        other.terminate()
    eventually(lambda: gpooler.client_connections() == 0)
    (problem,) = gpooler.dirt(within=0.1)
    assert re.fullmatch(found, problem)
    gpooler.may_be_dirty = "it was found"
    assert gpooler.dirt() == []


def test_a_clean_server_has_no_dirt(postgres: Postgres, gpooler_factory: Callable[..., Gpooler]) -> None:
    gpooler = gpooler_factory(postgres, rule={"options": {"work_mem": "5MB"}})
    with gpooler.raw() as client:
        client.login(TimeZone="Asia/Tokyo")
        client.query("SET statement_timeout = '1h'")
        client.query("SELECT pg_advisory_lock(7)")
        client.send(parse("SELECT 1", "named"), SYNC)
        client.read_until()
        client.terminate()
    assert gpooler.dirt() == []


def test_gpooler_that_does_not_start_says_why(postgres: Postgres) -> None:
    with (
        pytest.raises(RuntimeError, match="no_such_option"),
        Gpooler(postgres, config={"service": {"no_such_option": 1}}),
    ):
        pass
