"""How long a server lives: pool_ttl, server_lifetime, pool_attach_check, and death while it is parked."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import pytest

from gpooler.stats.registry import RouteWord
from tests.harness import FaultProxy, Gpooler, Postgres, RawClient, eventually, stopped
from tests.harness.client import query
from tests.harness.steering import clients_on
from tests.harness.trace import system_calls

Factory = Callable[..., Gpooler]


def pid_of(client: RawClient) -> int:
    return int(client.query("SELECT pg_backend_pid()")[0][0] or 0)


def pids(postgres: Postgres) -> set[int]:
    return {row.pid for row in postgres.activity()}


def ends(gpooler: Gpooler, reason: str) -> int:
    """How many servers ended for that reason, as the log says."""
    return gpooler.log().count(f"server disconnected: {reason}")


def times(gpooler: Gpooler, what: str) -> dict[str, datetime]:
    """When the log says that of each server."""
    line = re.compile(rf"\d+ (\S+)Z (\d+) \w+ \[\S* (s\w+)\] \(server\) {what}")
    found = (line.match(each) for each in gpooler.log().splitlines())
    return {it[3]: datetime.fromisoformat(f"{it[1]}.{it[2]}") for it in found if it}


def fill(clients: list[RawClient]) -> set[int]:
    """Have each client use a server at the same time; returns the process ids."""
    for client in clients:
        client.send(query("BEGIN; SELECT pg_backend_pid()"))
    found = {int(client.rows()[0][0] or 0) for client in clients}
    for client in clients:
        client.query("COMMIT")
    return found


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


# --- pool_ttl ---------------------------------------------------------------------------------


def test_pool_ttl_closes_idle_servers_and_no_others(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 4, "pool_ttl": 1})
    with ExitStack() as stack:
        clients = [stack.enter_context(gpooler.raw()).login() for _ in range(4)]
        assert len(fill(clients)) == 4
        clients[0].query("BEGIN")  # in use, though nothing is asked of it
        held = pid_of(clients[0])
        since = time.monotonic()
        busy = pid_of(clients[1])

        def used_again() -> int:
            """The server that is not idle for long, unless we have been."""
            nonlocal busy, since
            began = time.monotonic()
            pid = pid_of(clients[1])
            if pid != busy:
                assert time.monotonic() - since >= 1
                busy = pid
            since = began
            return busy

        eventually(lambda: {held, used_again()} == pids(postgres))
        assert pid_of(clients[0]) == held
        clients[0].query("COMMIT")
        eventually(lambda: postgres.activity() == [])
        opened = gpooler.route_count(RouteWord.SERVERS_OPENED)
        assert opened >= 4
        eventually(lambda: ends(gpooler, "server_idle") == opened)
        # the clients do not care
        assert [client.query("SELECT 1") for client in clients] == [[["1"]]] * 4


# --- server_lifetime --------------------------------------------------------------------------


def test_server_lifetime_ends_are_spread(postgres: Postgres, gpooler_factory: Factory) -> None:
    """Over the last fifth of the time, in which relays look more than once."""
    gpooler = gpooler_factory(postgres, rule={"pool_size": 60, "server_lifetime": 10})
    with ExitStack() as stack:
        clients = [stack.enter_context(gpooler.raw()).login() for _ in range(60)]
        assert len(fill(clients)) == 60
        eventually(lambda: postgres.activity() == [])
    eventually(lambda: ends(gpooler, "server_lifetime") == 60)
    opened, ended = times(gpooler, "server connected"), times(gpooler, "server disconnected")
    assert opened.keys() == ended.keys()
    lives = [(ended[server] - opened[server]).total_seconds() for server in opened]
    assert min(lives) < 10
    assert (max(ended.values()) - min(ended.values())).total_seconds() > 0.5  # in more than one look


def test_server_lifetime_never_ends_a_server_in_use(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 3, "server_lifetime": 1})
    stop = threading.Event()

    def work(client: RawClient) -> set[int]:
        found = set()
        while not stop.is_set():
            found.add(pid_of(client))
        return found

    with ExitStack() as stack, ThreadPoolExecutor(4) as pool:
        clients = [stack.enter_context(gpooler.raw()).login() for _ in range(6)]
        clients[4].query("BEGIN")
        held = pid_of(clients[4])
        clients[5].query("LISTEN ear")  # pinned
        pinned = pid_of(clients[5])
        opened = gpooler.route_count(RouteWord.SERVERS_OPENED)
        jobs = [pool.submit(work, client) for client in clients[:4]]
        try:
            eventually(lambda: gpooler.route_count(RouteWord.SERVERS_OPENED) >= opened + 4)
        finally:
            stop.set()
        assert len(set().union(*(job.result() for job in jobs))) >= 3
        assert pid_of(clients[4]) == held
        assert pid_of(clients[5]) == pinned
        clients[4].query("COMMIT")
        assert pid_of(clients[4]) != held
        clients[5].terminate()
        eventually(lambda: is_gone(pinned))


def test_a_session_outlives_the_lifetime_of_its_server(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool": "session", "pool_size": 1, "server_lifetime": 1})
    with gpooler.raw() as client:
        pid = client.login().pid
        client.query("SELECT pg_sleep(1.1)")
        assert pid_of(client) == pid
        client.terminate()
    with gpooler.raw() as client:
        assert client.login().pid != pid
    eventually(lambda: ends(gpooler, "server_lifetime") >= 1)


# --- death while parked -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pool", "attach_check"), [("transaction", True), ("transaction", False), ("session", True)]
)
def test_a_server_terminated_while_parked_is_never_seen(
    postgres: Postgres, gpooler_factory: Factory, pool: str, attach_check: bool
) -> None:
    gpooler = gpooler_factory(
        postgres, rule={"pool": pool, "pool_size": 3, "pool_attach_check": attach_check}
    )

    def serve(client: RawClient, count: int) -> set[int]:
        """Have that many servers used at once, by a client each in a session pool."""
        with ExitStack() as stack:
            others = [stack.enter_context(gpooler.raw()).login() for _ in range(count - 1)]
            found = fill([client, *others])
            for other in others:
                other.terminate()
        return found

    for _ in range(10):
        with gpooler.raw() as client:
            doomed = serve(client.login(), 3)
            if pool == "session":
                client.terminate()
            eventually(lambda: gpooler.route_count(RouteWord.SERVERS_IDLE) == 3)
            for pid in doomed:
                os.kill(pid, signal.SIGTERM)
            for pid in doomed:
                eventually(lambda pid=pid: is_gone(pid))  # type: ignore[misc]
            # at once: nobody waits for gpooler to notice
            if pool == "session":
                with gpooler.raw() as next_client:
                    assert pid_of(next_client.login()) not in doomed
            else:
                assert pid_of(client) not in doomed


@pytest.mark.parametrize("how", ["terminate", "fin", "rst"])
def test_news_of_a_death_that_come_together_with_a_request_come_first(
    postgres: Postgres, gpooler_factory: Factory, how: str
) -> None:
    """The worker stands still while its parked servers die and its client asks for one."""
    with FaultProxy(postgres.port) as proxy:
        way = postgres.port if how == "terminate" else proxy.port
        gpooler = gpooler_factory(
            postgres, rule={"pool_size": 2}, config={"storage": {"postgres": {"port": way}}}
        )
        with gpooler.raw() as client, gpooler.raw() as other:
            client.login()
            other.login()
            for _ in range(5):
                doomed = fill([client, other])
                eventually(lambda: gpooler.route_count(RouteWord.SERVERS_IDLE) == 2)
                with stopped(gpooler.worker_pids()[0]):
                    client.send(query("SELECT pg_backend_pid()"))
                    if how == "rst":
                        proxy.reset()
                    elif how == "fin":
                        proxy.cut()
                    for pid in doomed:
                        postgres.terminate(pid)
                    eventually(lambda: proxy.connections() == 0)
                    for pid in doomed:
                        eventually(lambda pid=pid: is_gone(pid))  # type: ignore[misc]
                ((answer,),) = client.rows()
                assert int(answer or 0) not in doomed
    assert "server_protocol" not in gpooler.log()


def test_a_crash_of_postgres_is_not_seen_by_idle_clients(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 3}, config={"performance": {"workers": 2}})
    with ExitStack() as stack:
        clients = clients_on(gpooler, {1: 2, 2: 2}, stack)
        everybody = [*clients[1], *clients[2]]
        for client in everybody:
            client.query("SELECT 1")
        postgres.kill(next(iter(pids(postgres))))
        assert [client.query("SELECT 1") for client in everybody] == [[["1"]]] * 4


def test_a_parked_server_that_says_what_it_should_not_is_never_used_again(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    with FaultProxy(postgres.port) as proxy:
        gpooler = gpooler_factory(
            postgres, rule={"pool_size": 1}, config={"storage": {"postgres": {"port": proxy.port}}}
        )
        with gpooler.raw() as client:
            client.login()
            for number, rubbish in enumerate((b"Z\0\0\0\5I", b"D\0\0\0\6\0\0", b"C\0\0", b"\0" * 100)):
                pid = pid_of(client)
                eventually(lambda: gpooler.route_count(RouteWord.SERVERS_IDLE) == 1)
                proxy.insert(rubbish, "down")
                assert pid_of(client) != pid, number


# --- pool_attach_check ------------------------------------------------------------------------


@pytest.mark.parametrize(("attach_check", "looks"), [(True, 1), (False, 0)])
def test_pool_attach_check_looks_at_a_server_that_was_parked_for_long(
    postgres: Postgres,
    gpooler_factory: Factory,
    program: Callable[[str], str],
    attach_check: bool,
    looks: int,
) -> None:
    strace = program("strace")
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1, "pool_attach_check": attach_check})
    with gpooler.raw() as client:
        client.login()
        client.query("SELECT 1")
        postgres.query("SELECT pg_sleep(1.1)")
        with system_calls(strace, gpooler.worker_pids()[0], "recvfrom") as calls:
            client.query("SELECT 1")
            client.query("SELECT 1")  # it was parked a moment ago: nothing to look at
        assert sum("MSG_PEEK" in call for call in calls) == looks
