"""How many servers there are: pool_size, pool_timeout, min_pool_size, shared_pool."""

import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from gpooler.stats.registry import RouteWord
from tests.harness import Gpooler, Postgres, RawClient, eventually
from tests.harness.client import ServerError, query
from tests.harness.load import ServerWatch
from tests.harness.steering import clients_on

Factory = Callable[..., Gpooler]

USERS = ("trust_user", "postgres", "md5_user")


def rule(**options: Any) -> dict[str, Any]:
    return {
        "authentication": "none",
        "storage": "postgres",
        "storage_db": "app",
        "storage_user": "trust_user",
        "pool": "transaction",
        **options,
    }


def workers(count: int) -> dict[str, Any]:
    return {"performance": {"workers": count}}


def pid_of(client: RawClient) -> int:
    return int(client.query("SELECT pg_backend_pid()")[0][0] or 0)


def begin(client: RawClient) -> int:
    """Open a transaction, which holds a server; returns its process id."""
    client.query("BEGIN")
    return pid_of(client)


def servers(postgres: Postgres) -> dict[str | None, int]:
    """How many there are of each user."""
    return dict(Counter(row.usename for row in postgres.activity()))


def pids(postgres: Postgres) -> set[int]:
    return {row.pid for row in postgres.activity()}


# --- pool_size --------------------------------------------------------------------------------


def test_pool_size_is_never_exceeded_while_servers_and_clients_come_and_go(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    """Four workers, more clients than servers, short lives of both, servers that are terminated."""
    gpooler = gpooler_factory(
        postgres, rule={"pool_size": 5, "server_lifetime": 1, "pool_ttl": 1}, config=workers(4)
    )
    stop = threading.Event()

    def work() -> int:
        answers = 0
        while not stop.is_set():
            with gpooler.raw() as client:
                client.login()
                for _ in range(20):
                    try:
                        client.query("SELECT pg_sleep(0.001)")
                        answers += 1
                    except EOFError:  # its server was terminated
                        break
        return answers

    with ServerWatch(postgres) as watch, ThreadPoolExecutor(12) as pool:
        jobs = [pool.submit(work) for _ in range(12)]
        try:
            for _ in range(5):
                # (of one that ends in its login the clients that log in are told)
                doomed = [row.pid for row in postgres.activity() if row.state is not None][:2]
                for pid in doomed:
                    postgres.terminate(pid)
                eventually(lambda doomed=doomed: not set(doomed) & pids(postgres))  # type: ignore[misc]
            before = pids(postgres)
            eventually(lambda: not before & pids(postgres), within=20)  # recycled, all of them
        finally:
            stop.set()
        assert all(job.result() for job in jobs)
    assert watch.most == 5


def test_the_whole_pool_can_be_used_at_once_from_several_workers(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 6}, config=workers(3))
    with ExitStack() as stack, ServerWatch(postgres) as watch:
        clients = clients_on(gpooler, {1: 3, 2: 3, 3: 3}, stack)
        holders = [client for number in (1, 2, 3) for client in clients[number][:2]]
        assert len({begin(client) for client in holders}) == 6
        rest = [clients[number][2] for number in (1, 2, 3)]
        for client in rest:
            client.send(query("SELECT 7"))
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 3)
        assert len(postgres.activity()) == 6
        for client in holders:
            client.query("COMMIT")
        for client in rest:
            assert client.rows() == [["7"]]
    assert watch.most == 6


# --- pool_timeout -----------------------------------------------------------------------------


def test_a_wait_that_is_too_long_says_pool_size_and_the_queue_of_all_workers(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 2, "pool_timeout": 4000}, config=workers(2))
    with ExitStack() as stack:
        clients = clients_on(gpooler, {1: 3, 2: 3}, stack)
        holders = [clients[number][0] for number in (1, 2)]
        for client in holders:
            begin(client)
        waiting = [client for number in (1, 2) for client in clients[number][1:]]
        waiting[0].send(query("SELECT 1"))
        holders[0].query("SELECT pg_sleep(2)")
        for client in waiting[1:]:  # they still wait when the first one gives up
            client.send(query("SELECT 1"))
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 4)
        text = "no server was free within 4000 ms: pool size 2, queue length "
        for client in waiting:
            error = client.read_to_end()[-1].fields()
            assert (error["S"], error["C"]) == ("FATAL", "53300")
            assert re.search(text + (r"4$" if client is waiting[0] else r"[123]$"), error["M"]), error["M"]
        for client in holders:  # the others go on
            client.query("COMMIT")
            assert client.query("SELECT 1") == [["1"]]


def test_each_wait_has_its_own_pool_timeout(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1, "pool_timeout": 3000})
    with gpooler.raw() as holder, gpooler.raw() as waiting:
        holder.login()
        waiting.login()
        for number in range(4):  # together longer than pool_timeout
            begin(holder)
            waiting.send(query(f"SELECT {number}"))
            eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
            holder.query("SELECT pg_sleep(1)")
            holder.query("COMMIT")
            assert waiting.rows() == [[str(number)]]


# --- min_pool_size ----------------------------------------------------------------------------


def test_min_pool_size_is_opened_without_a_client_kept_and_refilled(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    least = rule(pool_size=6, min_pool_size=3, pool_ttl=1)
    gpooler = gpooler_factory(
        postgres,
        config={**workers(2), "database": {"default": None, "app": {"user": {"trust_user": least}}}},
    )
    with ServerWatch(postgres) as watch:
        eventually(lambda: len(postgres.activity()) == 3, within=20)
        assert watch.most <= 3
        with ExitStack() as stack:  # more are opened for clients, and go again
            clients = [stack.enter_context(gpooler.raw()).login() for _ in range(6)]
            assert len({begin(client) for client in clients}) == 6
            for client in clients:
                client.query("COMMIT")
            eventually(lambda: len(postgres.activity()) == 3, within=20)
    for pid in (kept := pids(postgres)):
        postgres.terminate(pid)
    eventually(lambda: len(pids(postgres) - kept) == 3, within=20)
    # three that only clients needed and the three that we terminated: pool_ttl took none of the kept ones
    gone = [line for line in gpooler.log().splitlines() if "server disconnected" in line]
    assert len(gone) == 6, gpooler.log()


def test_min_pool_size_belongs_to_rules_with_one_possible_route(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    one = rule(min_pool_size=1)
    many = {**rule(min_pool_size=1, pool_ttl=1)}
    del many["storage_user"]
    gpooler = gpooler_factory(
        postgres,
        config={"database": {"default": {"user": {"default": one}}, "many": {"user": {"default": many}}}},
    )
    eventually(lambda: servers(postgres) == {"trust_user": 1})
    with gpooler.raw() as client:
        client.login("postgres", "many")
        assert client.query("SELECT current_user") == [["postgres"]]
    eventually(lambda: servers(postgres) == {"trust_user": 1})


# --- shared_pool ------------------------------------------------------------------------------


def shared_pool(
    factory: Factory, postgres: Postgres, size: int, worker_count: int = 1, **options: Any
) -> Gpooler:
    """A rule for each of three users, all under one cap."""
    rules = {user: rule(shared_pool="small", storage_user=user, **options) for user in USERS}
    return factory(
        postgres,
        config={
            **workers(worker_count),
            "shared_pool": {"small": {"pool_size": size}},
            "storage": {"postgres": {"host": f"unix://{postgres.socket_dir}"}},
            "database": {"default": None, "app": {"user": rules}},
        },
    )


@pytest.mark.parametrize("worker_count", [1, 3])
def test_rules_of_a_shared_pool_never_have_more_servers_together(
    postgres: Postgres, gpooler_factory: Factory, worker_count: int
) -> None:
    gpooler = shared_pool(gpooler_factory, postgres, 4, worker_count)

    def work(number: int) -> None:
        user = USERS[number % 3]
        with gpooler.raw(timeout=30) as client:
            client.login(user)
            for turn in range(25):
                value = f"{number} {turn}"
                sql = f"SELECT '{value}', current_user, pg_sleep(0.001)"
                assert client.query(sql) == [[value, user, ""]]

    with ServerWatch(postgres) as watch, ThreadPoolExecutor(18) as pool:
        for job in [pool.submit(work, number) for number in range(18)]:
            job.result()
    assert watch.most == 4


@pytest.mark.parametrize("worker_count", [1, 2])
def test_a_parked_server_of_another_rule_makes_room(
    postgres: Postgres, gpooler_factory: Factory, worker_count: int
) -> None:
    gpooler = shared_pool(gpooler_factory, postgres, 2, worker_count)
    with ExitStack() as stack, ServerWatch(postgres) as watch:
        clients = {user: stack.enter_context(gpooler.raw()).login(user) for user in USERS}

        def is_full() -> bool:
            for user, client in clients.items():
                assert client.query("SELECT current_user") == [[user]]
            return len(servers(postgres)) == 2

        for _ in range(3):
            is_full()
        # both had to go where the first took more than the broker's patience to end
        eventually(is_full)
    assert watch.most == 2


def test_a_server_in_use_is_not_evicted(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = shared_pool(gpooler_factory, postgres, 1, pool_timeout=3000)
    with gpooler.raw() as holder, gpooler.raw() as other:
        holder.login("postgres")
        pid = begin(holder)
        # the route of the other user was never reached: it waits for its first server, too
        with pytest.raises(ServerError, match="pool size 1, queue length 1") as caught:
            other.login("trust_user")
        assert caught.value.sqlstate == "53300"
        assert pid_of(holder) == pid
        holder.query("COMMIT")
    with gpooler.raw() as other:
        other.login("trust_user")
        assert other.query("SELECT current_user") == [["trust_user"]]


def test_who_waits_gets_the_place_of_a_server_that_becomes_free(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = shared_pool(gpooler_factory, postgres, 1)
    with gpooler.raw() as holder, gpooler.raw() as other:
        other.login("trust_user")
        holder.login("postgres")
        begin(holder)
        other.send(query("SELECT current_user"))
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
        assert servers(postgres) == {"postgres": 1}
        holder.query("COMMIT")
        assert other.rows() == [["trust_user"]]


def test_sessions_of_a_shared_pool_wait_at_login_for_each_other(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = shared_pool(gpooler_factory, postgres, 2, 2, pool="session")
    with (
        gpooler.raw() as first, gpooler.raw() as second, gpooler.raw() as third,
        ThreadPoolExecutor(1) as pool, ServerWatch(postgres) as watch,
    ):  # fmt: skip
        first.login("trust_user")
        second.login("postgres")
        job = pool.submit(third.login, "md5_user")
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
        assert servers(postgres) == {"trust_user": 1, "postgres": 1}
        first.terminate()
        assert job.result().pid == pid_of(third)
        assert pid_of(second) == second.pid
        assert servers(postgres) == {"md5_user": 1, "postgres": 1}
    assert watch.most == 2


def test_min_pool_size_is_not_applied_in_a_shared_pool(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = shared_pool(gpooler_factory, postgres, 4, min_pool_size=2, pool_ttl=1)
    with gpooler.raw() as client:
        client.login("trust_user")
        client.query("SELECT 1")
        eventually(lambda: servers(postgres) == {})
        assert client.query("SELECT 1") == [["1"]]


def test_the_only_server_of_a_pool_is_handed_over_alive(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1}, config=workers(2))
    with ExitStack() as stack:
        clients = clients_on(gpooler, {1: 1, 2: 1}, stack)
        found = set()
        for turn in range(20):
            found.add(pid_of(clients[1 + turn % 2][0]))
            time.sleep(0.02)  # older than what protects a fresh one
    assert len(found) == 1
    assert gpooler.route_count(RouteWord.SERVERS_OPENED) == 1
