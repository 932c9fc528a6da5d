"""Transaction pooling: many clients on few servers, each with its own answers."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from gpooler.stats.registry import RouteWord
from tests.harness import Gpooler, Postgres, RawClient, eventually
from tests.harness.client import SYNC, ServerError, bind, execute, parse, query

Factory = Callable[..., Gpooler]


def pid_of(client: RawClient) -> int:
    return int(client.query("SELECT pg_backend_pid()")[0][0] or 0)


def together(jobs: Sequence[Callable[[], None]]) -> None:
    """Run all at once, each in a thread of its own; the first failure is raised."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_more_clients_than_servers_get_their_own_answers(
    postgres: Postgres, gpooler_factory: Factory, workers: int
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 3}, config={"performance": {"workers": workers}})
    most = 0
    is_over = threading.Event()

    def watch() -> None:
        nonlocal most
        with postgres.connect() as connection:
            while not is_over.is_set():
                row = connection.execute(
                    "SELECT count(*) FROM pg_stat_activity WHERE usename = 'trust_user'"
                ).fetchone()
                most = max(most, row[0] if row else 0)

    def client(number: int) -> None:
        with gpooler.raw() as raw:
            raw.login()
            for turn in range(60):
                value = f"{number}-{turn}"
                match turn % 4:
                    case 0:
                        assert raw.query(f"SELECT '{value}'") == [[value]]
                    case 1:
                        raw.send(parse("SELECT $1::text"), bind(values=(value.encode(),)), execute(), SYNC)
                        assert raw.rows() == [[value]]
                    case 2:
                        raw.query("BEGIN")
                        pid = pid_of(raw)
                        assert raw.query(f"SELECT '{value}', pg_backend_pid()") == [[value, str(pid)]]
                        raw.query("COMMIT")
                    case 3:
                        rows = raw.query(f"SELECT '{value}', n FROM generate_series(1, 50) n")
                        assert rows == [[value, str(n)] for n in range(1, 51)]
            raw.terminate()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        together([lambda number=number: client(number) for number in range(24)])  # type: ignore[misc]
    finally:
        is_over.set()
        watcher.join()
    assert 1 <= most <= 3


def test_a_client_gets_the_server_it_had_last(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 4})
    with ExitStack() as stack:
        clients = [stack.enter_context(gpooler.raw()).login() for _ in range(4)]
        for client in clients:
            client.query("BEGIN")
        pids = [pid_of(client) for client in clients]
        assert len(set(pids)) == 4
        for client in clients:
            client.query("COMMIT")
        for _ in range(3):
            for client, pid in zip(reversed(clients), reversed(pids), strict=True):
                assert pid_of(client) == pid


def test_an_idle_client_holds_no_server(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    with gpooler.raw() as first, gpooler.raw() as second:
        first.login()
        second.login()
        assert pid_of(first) == pid_of(second) == pid_of(first)
        assert [row.pid for row in postgres.activity()] == [pid_of(first)]


def test_a_transaction_keeps_its_server_and_others_wait(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    with gpooler.raw() as first, gpooler.raw() as second, gpooler.raw() as third:
        for client in (first, second, third):
            client.login()
        first.query("BEGIN")
        pid = pid_of(first)
        second.send(query("SELECT 2"))
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
        third.send(query("SELECT 3"))
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 2)
        assert first.query("SELECT pg_backend_pid()") == [[str(pid)]]
        first.query("COMMIT")
        assert second.rows() == [["2"]]
        assert third.rows() == [["3"]]
        assert pid_of(third) == pid


def test_a_failed_transaction_keeps_its_server_until_its_end(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    with gpooler.raw() as client, gpooler.raw() as other:
        client.login()
        other.login()
        client.query("BEGIN")
        with pytest.raises(ServerError, match="division by zero"):
            client.query("SELECT 1/0")
        other.send(query("SELECT 2"))
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
        with pytest.raises(ServerError, match="current transaction is aborted"):
            client.query("SELECT 1")
        client.query("ROLLBACK")
        assert other.rows() == [["2"]]
        assert client.query("SELECT 1") == [["1"]]


def test_several_databases_and_users_have_pools_of_their_own(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(
        postgres, rule={"pool_size": 1, "storage_db": None, "storage_user": None, "password": "s3cret"}
    )
    with gpooler.raw() as one, gpooler.raw() as two, gpooler.raw() as three:
        one.login("trust_user", "app")
        two.login("trust_user", "postgres")
        three.login("postgres", "app")
        for client in (one, two, three):
            client.query("BEGIN")
        sql = "SELECT current_user, current_database()"
        assert one.query(sql) == [["trust_user", "app"]]
        assert two.query(sql) == [["trust_user", "postgres"]]
        assert three.query(sql) == [["postgres", "app"]]


def test_the_servers_error_reaches_its_client_alone(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 2})

    def client(number: int) -> None:
        with gpooler.raw() as raw:
            raw.login()
            for turn in range(30):
                if turn % 2:
                    with pytest.raises(ServerError, match=f'"no{number}_{turn}" does not exist'):
                        raw.query(f"SELECT * FROM no{number}_{turn}")
                else:
                    assert raw.query(f"SELECT {number * 1000 + turn}") == [[str(number * 1000 + turn)]]

    together([lambda number=number: client(number) for number in range(8)])  # type: ignore[misc]


def test_notices_come_with_their_query(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    with gpooler.raw() as client:
        client.login()
        for turn in range(3):
            client.send(query(f"DO $$ BEGIN RAISE NOTICE 'note {turn}'; END $$"))
            messages = client.read_until()
            assert [message.kind for message in messages] == [b"N", b"C", b"Z"]
            assert messages[0].fields()["M"] == f"note {turn}"


def test_a_hand_over_between_workers_keeps_the_answers_right(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    """One server for two workers: it travels, with its parameters."""
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1}, config={"performance": {"workers": 2}})

    def client(number: int) -> None:
        zone = ("UTC", "Europe/Berlin", "Asia/Tokyo")[number % 3]
        with gpooler.raw() as raw:
            raw.login(TimeZone=zone, application_name=f"client {number}")
            for turn in range(30):
                sql = f"SELECT {turn}, current_setting('TimeZone'), current_setting('application_name')"
                assert raw.query(sql) == [[str(turn), zone, f"client {number}"]]

    together([lambda number=number: client(number) for number in range(8)])  # type: ignore[misc]
    assert len(postgres.activity()) <= 1
