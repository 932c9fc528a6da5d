"""Cancel requests: the right query, once, from any worker, and never the next client's."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from gpooler.stats.registry import RouteWord
from tests.harness import FaultProxy, Gpooler, Postgres, RawClient, eventually
from tests.harness.client import SYNC, ServerError, bind, cancel_request, execute, parse, query

Factory = Callable[..., Gpooler]

LONG = "SELECT pg_sleep(60)"
HELD = "SELECT pg_advisory_xact_lock(1), 'whole'"


def cancel(gpooler: Gpooler, pid: int, key: bytes) -> None:
    """Ask, and wait until the request is over."""
    with gpooler.raw() as canceller:
        canceller.send(cancel_request(pid, key))
        assert canceller.read_to_end() == []


def is_running(postgres: Postgres, count: int = 1) -> Callable[[], bool]:
    return lambda: [row.state for row in postgres.activity()].count("active") == count


@contextmanager
def held(postgres: Postgres, client: RawClient) -> Iterator[None]:
    """Meanwhile the client's query HELD runs: it waits for a lock."""
    with postgres.locked():
        client.send(query(HELD))
        eventually(is_running(postgres))
        yield


def sqlstate_of(client: RawClient) -> str:
    with pytest.raises(ServerError) as caught:
        client.rows()
    return caught.value.sqlstate


def test_a_cancel_reaches_its_query_from_every_worker(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 2}, config={"performance": {"workers": 2}})
    with gpooler.raw() as client, gpooler.raw() as bystander:
        client.login()
        bystander.login()
        bystander.send(query("SELECT pg_sleep(2), 'undisturbed'"))
        for turn in range(10):  # whichever worker takes the request
            client.send(query(LONG) if turn % 2 else parse(LONG) + bind() + execute() + SYNC)
            eventually(lambda: [row.query for row in postgres.activity()].count(LONG) == 1)
            eventually(lambda: LONG in [row.query for row in postgres.activity() if row.state == "active"])
            cancel(gpooler, client.pid, client.key)
            assert sqlstate_of(client) == "57014"
            assert client.query(f"SELECT {turn}") == [[str(turn)]]
        assert bystander.rows() == [["", "undisturbed"]]


def test_keys_are_unlike_and_hide_the_server(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    with gpooler.raw() as one, gpooler.raw() as two:
        one.login()
        two.login()
        assert one.pid >= 1 << 30
        assert one.pid != two.pid
        assert one.key != two.key
        assert len(one.key) == 4


def test_a_wrong_key_does_nothing(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1}, config={"performance": {"workers": 2}})
    with gpooler.raw() as gone:
        stale = gone.login().pid, gone.key
        gone.terminate()
    with gpooler.raw() as client:
        client.login()
        wrong = bytes([client.key[0] ^ 1]) + client.key[1:]
        with held(postgres, client):
            (row,) = postgres.activity()
            for pid, key in (
                (client.pid, wrong),
                (client.pid, client.key[:3]),
                (client.pid, client.key + b"\0"),
                (client.pid ^ 1, client.key),
                (client.pid ^ (1 << 22), client.key),
                (row.pid, client.key),
                (-1, client.key),
                (0, b"\0\0\0\0"),
                stale,
            ):
                try:
                    cancel(gpooler, pid, key)
                except AssertionError:
                    pass  # a refusal in words is as good
        assert client.rows() == [["", "whole"]]


def test_the_key_of_an_idle_client_does_nothing(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    with gpooler.raw() as idle, gpooler.raw() as busy:
        idle.login()
        busy.login()
        assert idle.query("SELECT 1") == [["1"]]
        with held(postgres, busy):
            cancel(gpooler, idle.pid, idle.key)
        assert busy.rows() == [["", "whole"]]
        idle.query("BEGIN")
        cancel(gpooler, idle.pid, idle.key)
        assert idle.query("SELECT 2") == [["2"]]


def test_a_waiting_client_leaves_the_queue(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    with gpooler.raw() as holder, gpooler.raw() as waiter:
        holder.login()
        waiter.login()
        holder.query("BEGIN")
        for request in (query("SELECT 2"), parse("SELECT 2") + bind() + execute() + SYNC):
            waiter.send(request)
            eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
            cancel(gpooler, waiter.pid, waiter.key)
            assert sqlstate_of(waiter) == "57014"
            assert gpooler.route_count(RouteWord.CLIENTS_WAITING) == 0
        assert holder.query("SELECT 1") == [["1"]]
        waiter.send(query("SELECT 3"))
        holder.query("COMMIT")
        assert waiter.rows() == [["3"]]


def test_a_cancelled_wait_refuses_its_request_alone(postgres: Postgres, gpooler_factory: Factory) -> None:
    """What stands behind it in the pipeline is still done."""
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    with gpooler.raw() as holder, gpooler.raw() as waiter:
        holder.login()
        waiter.login()
        holder.query("BEGIN")
        waiter.send(query("SELECT 2"), query("SELECT 3"))
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
        cancel(gpooler, waiter.pid, waiter.key)
        assert sqlstate_of(waiter) == "57014"
        holder.query("COMMIT")
        assert waiter.rows() == [["3"]]


def test_the_wait_after_a_cancelled_one_starts_anew(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1, "pool_timeout": 3000})
    with gpooler.raw() as holder, gpooler.raw() as waiter:
        holder.login()
        waiter.login()
        holder.query("BEGIN")
        waiter.send(query("SELECT 2"))
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
        cancel(gpooler, waiter.pid, waiter.key)
        assert sqlstate_of(waiter) == "57014"
        time.sleep(3.5)
        waiter.send(query("SELECT 3"))
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
        holder.query("COMMIT")
        assert waiter.rows() == [["3"]]


def test_a_cancelled_transaction_is_aborted_and_goes_on(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    with gpooler.raw() as client:
        client.login()
        client.query("BEGIN")
        client.send(query(LONG))
        eventually(is_running(postgres))
        cancel(gpooler, client.pid, client.key)
        assert sqlstate_of(client) == "57014"
        with pytest.raises(ServerError, match="current transaction is aborted"):
            client.query("SELECT 1")
        client.query("ROLLBACK")
        assert client.query("SELECT 1") == [["1"]]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cancel_never_meets_the_next_client(
    postgres: Postgres, gpooler_factory: Factory, workers: int
) -> None:
    """One client is cancelled again and again as its query ends; the other shares its server."""
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1}, config={"performance": {"workers": workers}})
    is_over = threading.Event()
    failures: list[str] = []
    done = 0

    def victim() -> None:
        nonlocal done
        with gpooler.raw() as client:
            client.login()
            while not is_over.is_set():
                try:
                    client.query(f"SELECT {done}, pg_sleep(0.001)")
                    done += 1
                except ServerError as error:
                    failures.append(error.text)

    with gpooler.raw() as client:
        client.login()
        thread = threading.Thread(target=victim)
        thread.start()
        try:
            codes = []
            for turn in range(150):
                client.send(query("SELECT pg_sleep(0.002)"))
                cancel(gpooler, client.pid, client.key)
                try:
                    client.rows()
                except ServerError as error:
                    codes.append(error.sqlstate)
                assert client.query(f"SELECT {turn}") == [[str(turn)]]
        finally:
            is_over.set()
            thread.join()
    assert failures == []
    assert set(codes) == {"57014"}
    assert done > 0


def test_a_cancel_hits_one_query_of_a_pipeline(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    with gpooler.raw() as client:
        client.login()
        client.send(query(LONG), query("SELECT 2"), query("SELECT 3"))
        eventually(is_running(postgres))
        cancel(gpooler, client.pid, client.key)
        assert sqlstate_of(client) == "57014"
        assert client.rows() == [["2"]]
        assert client.rows() == [["3"]]


def test_a_cancel_during_the_deploy_hits_the_query_behind_it(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    with gpooler.raw() as client, gpooler.raw().login() as other, postgres.connect("app") as blocker:
        blocker.execute("CREATE TEXT SEARCH CONFIGURATION mine (COPY = simple)")
        client.login(default_text_search_config="public.mine")
        server = other.query("SELECT pg_backend_pid()")  # it has the other's parameters now
        # PostgreSQL must look the name up anew, which the lock prevents
        blocker.execute("ALTER TEXT SEARCH CONFIGURATION mine RENAME TO yours")
        blocker.execute("ALTER TEXT SEARCH CONFIGURATION yours RENAME TO mine")
        blocker.execute("BEGIN")
        blocker.execute("LOCK TABLE pg_ts_config IN ACCESS EXCLUSIVE MODE")
        client.send(query(LONG))
        eventually(lambda: postgres.query("SELECT 1 FROM pg_locks WHERE NOT granted"))
        cancel(gpooler, client.pid, client.key)
        blocker.execute("ROLLBACK")
        assert sqlstate_of(client) == "57014"
        assert client.query("SHOW default_text_search_config") == [["public.mine"]]
        assert client.query("SELECT pg_backend_pid()") == server
        blocker.execute("DROP TEXT SEARCH CONFIGURATION mine")


def test_cancels_while_postgres_takes_no_connection_harm_nobody(
    postgres: Postgres, gpooler_factory: Factory, fault_proxy: Callable[[int], FaultProxy]
) -> None:
    """The cancel cannot be delivered: the query ends by itself, and the server serves on."""
    proxy = fault_proxy(postgres.port)
    gpooler = gpooler_factory(
        postgres,
        rule={"pool_size": 1},
        config={
            "storage": {"postgres": {"port": proxy.port}},
            "limits": {"cancel_timeout_ms": 300},
        },
    )
    with gpooler.raw() as client:
        client.login()
        with held(postgres, client):
            proxy.refuse()
            cancel(gpooler, client.pid, client.key)
        assert client.rows() == [["", "whole"]]
        assert client.query("SELECT 2") == [["2"]]
        client.terminate()


def test_what_a_lost_client_left_running_is_cancelled_once_more(
    postgres: Postgres, gpooler_factory: Factory, fault_proxy: Callable[[int], FaultProxy]
) -> None:
    """PostgreSQL forgets a cancel that comes before it has begun; here the first does not arrive at all."""
    proxy = fault_proxy(postgres.port)
    gpooler = gpooler_factory(
        postgres,
        rule={"pool_size": 1, "pool_reset_timeout_ms": 60_000},
        config={
            "storage": {"postgres": {"port": proxy.port}},
            "logging": {"log_debug": True},
        },
    )
    with gpooler.raw() as client:
        client.login()
        server = client.query("SELECT pg_backend_pid()")
        client.send(query(LONG))
        eventually(is_running(postgres))
        proxy.refuse(1)
        client.reset()
    with gpooler.raw() as client:
        assert client.login().query("SELECT pg_backend_pid()") == server
    eventually(lambda: gpooler.log().count("cancel request delivered") == 2)  # as far as can be seen
