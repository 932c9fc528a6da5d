"""Commands of the console that change something, over two workers."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import psycopg
import pytest

from gpooler.stats.registry import RouteWord
from tests.harness import Gpooler, Postgres, RawClient, eventually
from tests.harness.client import query, startup
from tests.harness.console import CONSOLE, Console, console, spread

Factory = Callable[..., Gpooler]


@pytest.fixture
def pool(postgres: Postgres, gpooler_factory: Factory) -> Gpooler:
    return gpooler_factory(postgres, config=CONSOLE, rule={"pool_size": 4})


@contextmanager
def in_background(pool: Gpooler, command: str) -> Iterator[threading.Event]:
    """Run a command that waits; the event says that it was answered."""
    done = threading.Event()

    def run() -> None:
        with console(pool) as control:
            control.connection.execute(command)
        done.set()

    thread = threading.Thread(target=run)
    thread.start()
    yield done
    thread.join(20)
    assert done.is_set()


def refusal(control: Console, command: str) -> tuple[str | None, str]:
    with pytest.raises(psycopg.Error) as told:
        control.connection.execute(command)
    return told.value.sqlstate, (told.value.diag.message_primary or "").partition(": ")[2].partition(": ")[2]


def last_words(client: RawClient) -> str:
    return client.read_to_end()[-1].fields()["C"]


def test_pause_waits_until_servers_are_gone_and_clients_wait_until_resume(
    postgres: Postgres, pool: Gpooler
) -> None:
    with ExitStack() as stack:
        clients = spread(pool, stack, 2)
        for client in clients:
            client.query("SELECT 1")
        clients[0].query("BEGIN")
        with in_background(pool, "PAUSE app") as paused, console(pool) as control:
            assert eventually(lambda: 'database "app" is paused' in pool.log())  # in all workers
            assert control.show("DATABASES WHERE name = 'app' AND paused = 1")
            clients[1].send(query("SELECT 2"))
            eventually(lambda: pool.route_count(RouteWord.CLIENTS_WAITING) == 1)
            assert not paused.is_set()
            clients[0].query("COMMIT")
        assert postgres.activity() == []
        with console(pool) as control:
            (row,) = control.show("DATABASES WHERE name = 'app'")
            assert row["paused"] == 1
            clients[0].send(query("SELECT 3"))
            eventually(lambda: pool.route_count(RouteWord.CLIENTS_WAITING) == 2)
            control.connection.execute("RESUME app")
            assert clients[1].rows() == [["2"]]
            assert clients[0].rows() == [["3"]]
            assert refusal(control, "RESUME app") == ("55000", 'database "app" is not paused')


def test_a_pause_that_waits_ends_with_resume(postgres: Postgres, pool: Gpooler) -> None:
    with pool.connect() as client, ThreadPoolExecutor(1) as threads, console(pool) as control:
        client.execute("BEGIN")
        with console(pool) as pausing:
            answer = threads.submit(pausing.connection.execute, "PAUSE app")
            eventually(lambda: control.show("DATABASES WHERE name = 'app' AND paused = 1"))
            control.connection.execute("RESUME app")
            with pytest.raises(psycopg.Error, match="resumed before its servers were gone"):
                answer.result(20)
        client.execute("COMMIT")
        assert client.execute("SELECT 1").fetchone() == (1,)


def test_postgresql_is_restarted_under_pause_and_no_client_sees_it(postgres: Postgres, pool: Gpooler) -> None:
    stop = threading.Event()
    faults: list[BaseException] = []
    counts = [0, 0, 0, 0]

    def work(number: int) -> None:
        try:
            with pool.connect() as connection:
                while not stop.is_set():
                    with connection.transaction():
                        connection.execute("SELECT 1")
                    counts[number] += 1
        except BaseException as error:  # noqa: BLE001
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(counts))]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: min(counts) > 5)
        with console(pool) as control:
            control.connection.execute("PAUSE")
            postgres.restart()
            control.connection.execute("RESUME")
        before = list(counts)
        eventually(lambda: all(now > then + 5 for now, then in zip(counts, before, strict=True)), within=20)
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    assert not faults


def test_a_pause_holds_for_workers_and_brokers_that_come_later(postgres: Postgres, pool: Gpooler) -> None:
    with console(pool) as control:
        control.connection.execute("PAUSE app")
        control.connection.execute("DISABLE app")
    for pid in (*pool.worker_pids(), pool.broker_pid()):
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: len(pool.worker_pids()) == 2, within=20)

    def disabled() -> bool:
        with pytest.raises(psycopg.OperationalError) as told:
            pool.connect()
        return "not currently accepting connections" in str(told.value)

    eventually(disabled, within=20)
    with console(pool) as control:
        control.connection.execute("ENABLE app")
        with pool.raw() as client:
            client.send(startup("trust_user", "app"))
            eventually(lambda: pool.route_count(RouteWord.CLIENTS_WAITING) == 1)
            assert postgres.activity() == []
            control.connection.execute("RESUME app")
            client.read_until(b"Z")


def test_suspend_keeps_the_servers(postgres: Postgres, pool: Gpooler) -> None:
    with pool.raw() as client, console(pool) as control:
        client.login()
        before = client.query("SELECT pg_backend_pid()")
        control.connection.execute("SUSPEND")
        state = {row["key"]: row["value"] for row in control.show("STATE")}
        assert state == {"active": "no", "paused": "no", "suspended": "yes"}
        client.send(query("SELECT pg_backend_pid()"))
        eventually(lambda: pool.route_count(RouteWord.CLIENTS_WAITING) == 1)
        control.connection.execute("RESUME")
        assert client.rows() == before


def test_kill_ends_clients_and_servers_until_resume(postgres: Postgres, pool: Gpooler) -> None:
    with ExitStack() as stack:
        clients = spread(pool, stack, 2)
        clients[0].query("SELECT 1")
        clients[1].send(query("SELECT pg_sleep(60)"))
        eventually(lambda: any("pg_sleep" in row.query for row in postgres.activity()))
        with console(pool) as control:
            control.connection.execute("KILL app")
            for client in clients:
                assert last_words(client) == "57P01"
            eventually(lambda: not postgres.activity())
            control.connection.execute("RESUME app")
    with pool.connect() as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_one_client_is_killed_whichever_worker_has_it(postgres: Postgres, pool: Gpooler) -> None:
    with ExitStack() as stack, console(pool) as control:
        clients = spread(pool, stack, 1)
        for client in clients:
            client.query("SELECT 1")
        for row in control.show("CLIENTS WHERE database = 'app'"):
            control.connection.execute(f"KILL_CLIENT {row['ptr']}")
        for client in clients:
            assert last_words(client) == "57P01"
        code, text = refusal(control, "KILL_CLIENT c000000000000")
        assert (code, text) == ("55000", 'there is no client "c000000000000"')


def test_reconnect_replaces_every_server_and_wait_close_waits_for_it(
    postgres: Postgres, pool: Gpooler
) -> None:
    with pool.connect() as busy, pool.connect() as idle, console(pool) as control:
        busy.execute("BEGIN")
        busy.execute("SELECT 1")
        idle.execute("SELECT 1")
        before = {row.pid for row in postgres.activity()}
        control.connection.execute("RECONNECT app")
        eventually(lambda: len(before & {row.pid for row in postgres.activity()}) == 1)
        with in_background(pool, "WAIT_CLOSE app") as closed:
            assert idle.execute("SELECT 1").fetchone() == (1,)
            assert not closed.is_set()
            busy.execute("COMMIT")
        assert not before & {row.pid for row in postgres.activity()}


def test_reload_says_what_changed(pool: Gpooler) -> None:
    with console(pool) as control:
        control.connection.execute("RELOAD")
        assert control.notices == ["nothing has changed"]
        text = pool.config_file.read_text()
        pool.config_file.write_text(text.replace("pool_size = 4", "pool_size = 2"))
        control.connection.execute("RELOAD")
        assert "pool_size: 4 → 2" in control.notices[-1]
        pool.config_file.write_text(text.replace("pool_size = 4", "pool_sise = 2"))
        code, said = refusal(control, "RELOAD")
        assert code == "55000"
        assert "pool_sise" in said
        pool.config_file.write_text(text)


@pytest.mark.parametrize(("how", "drops"), [("WAIT_FOR_SERVERS", True), ("WAIT_FOR_CLIENTS", False)])
def test_shutdown(pool: Gpooler, how: str, drops: bool) -> None:
    with pool.raw() as client:
        client.login()
        client.query("SELECT 1")
        with console(pool) as control:
            control.connection.execute(f"SHUTDOWN {how}")
        if drops:
            assert last_words(client) == "57P01"
        else:
            eventually(lambda: "draining" in pool.log() or "a shutdown was asked for" in pool.log())
            assert client.query("SELECT 1") == [["1"]]
            client.terminate()
    eventually(lambda: not pool.is_running, within=10)


def test_shutdown_now(pool: Gpooler) -> None:
    with pool.raw() as client:
        client.login()
        with console(pool) as control, suppress(psycopg.OperationalError):
            control.connection.execute("SHUTDOWN")
        assert client.read_to_end() == []
    eventually(lambda: not pool.is_running)
