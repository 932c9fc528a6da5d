"""Opening servers: what happens when it fails, takes too long, or is limited; names of hosts."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from gpooler.reasons import Reason
from gpooler.stats.registry import ERROR_BASE, RouteWord
from tests.harness import FaultProxy, Gpooler, Postgres, RawClient, eventually
from tests.harness.client import ServerError, query
from tests.harness.names import NAME, Names
from tests.harness.steering import clients_on

Factory = Callable[..., Gpooler]


def storage(**options: Any) -> dict[str, Any]:
    return {"storage": {"postgres": options}}


def pid_of(client: RawClient) -> int:
    return int(client.query("SELECT pg_backend_pid()")[0][0] or 0)


def begin(client: RawClient) -> int:
    """Open a transaction, which holds a server; returns its process id."""
    client.query("BEGIN")
    return pid_of(client)


def last_error(client: RawClient) -> dict[str, str]:
    return client.read_to_end()[-1].fields()


@pytest.fixture
def narrow_role(postgres: Postgres) -> Iterator[str]:
    """A role that PostgreSQL lets in twice at a time: then 53300."""
    postgres.query("CREATE ROLE narrow LOGIN CONNECTION LIMIT 2")
    yield "narrow"
    eventually(lambda: not [row for row in postgres.activity() if row.usename == "narrow"])
    postgres.query("DROP ROLE narrow")


def refusals(postgres: Postgres, since: int) -> int:
    """How often the role was told that it has too many connections."""
    return postgres.log()[since:].count('too many connections for role "narrow"')


def narrow(factory: Factory, postgres: Postgres, workers: int = 1, retry_ms: int = 1, **rule: Any) -> Gpooler:
    return factory(
        postgres,
        rule={"pool_size": 5, "storage_user": "narrow", **rule},
        config={
            **storage(host=f"unix://{postgres.socket_dir}"),
            "performance": {"workers": workers},
            "limits": {"server_login_retry": retry_ms},
        },
    )


# --- server_login_retry -----------------------------------------------------------------------


@pytest.mark.parametrize("pool_timeout", [0, 20_000])
@pytest.mark.usefixtures("narrow_role")
def test_where_the_server_has_too_many_connections_clients_wait_for_those_there_are(
    postgres: Postgres, gpooler_factory: Factory, pool_timeout: int
) -> None:
    gpooler = narrow(gpooler_factory, postgres, workers=2, pool_timeout=pool_timeout)
    start = len(postgres.log())
    with ExitStack() as stack:
        clients = [stack.enter_context(gpooler.raw()).login() for _ in range(6)]
        holders = clients[:2]
        assert len({begin(client) for client in holders}) == 2
        for client in clients[2:]:
            client.send(query("SELECT current_user"))
        eventually(lambda: refusals(postgres, start) >= 3)
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 4)
        for client in holders:
            client.query("COMMIT")
        for client in clients[2:]:
            assert client.rows() == [["narrow"]]


@pytest.mark.usefixtures("narrow_role")
def test_server_login_retry_is_the_pause_before_another_try(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    patient = narrow(gpooler_factory, postgres, retry_ms=3_600_000, pool_size=2)
    start = len(postgres.log())
    with ExitStack() as stack:
        clients = [stack.enter_context(patient.raw()).login() for _ in range(4)]
        for client in clients[:2]:
            begin(client)
        patient.reload(rule={"pool_size": 5, "pool_timeout": 1500})
        clients[2].send(query("SELECT 1"))
        eventually(lambda: patient.route_count(ERROR_BASE + Reason.SERVER_CONNECT) == 1)
        clients[3].send(query("SELECT 1"))
        for client in clients[2:]:
            assert last_error(client)["C"] == "53300"
        assert refusals(postgres, start) == 1
        patient.reload(rule={"pool_timeout": 0})
        # the servers there are serve on meanwhile
        clients[0].query("COMMIT")
        with patient.raw() as client:
            assert client.login().query("SELECT 1") == [["1"]]


@pytest.mark.usefixtures("narrow_role")
def test_a_place_at_the_server_that_becomes_free_is_taken(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    dsn = postgres.dsn("narrow", host=str(postgres.socket_dir), application_name="harness")
    others = [psycopg.connect(dsn) for _ in range(2)]
    gpooler = narrow(gpooler_factory, postgres, pool_timeout=20_000)
    start = len(postgres.log())
    with gpooler.raw(timeout=20) as client, ThreadPoolExecutor(1) as pool:
        job = pool.submit(client.login, "anybody")
        try:
            eventually(lambda: refusals(postgres, start) >= 2)
        finally:
            for other in others:
                other.close()
        assert job.result().query("SELECT current_user") == [["narrow"]]


# --- errors of the login ----------------------------------------------------------------------


@pytest.fixture
def fickle_role(postgres: Postgres) -> Iterator[str]:
    """A role that may lose its right to log in."""
    postgres.query("CREATE ROLE fickle LOGIN")
    yield "fickle"
    eventually(lambda: not [row for row in postgres.activity() if row.usename == "fickle"])
    postgres.query("DROP ROLE fickle")


@pytest.mark.parametrize(("fail_fast", "workers"), [(False, 1), (False, 2), (True, 1), (True, 2)])
@pytest.mark.usefixtures("fickle_role")
def test_a_login_that_fails_harms_nobody_while_there_are_servers_unless_it_is_to_fail_fast(
    postgres: Postgres, gpooler_factory: Factory, fail_fast: bool, workers: int
) -> None:
    gpooler = gpooler_factory(
        postgres,
        rule={"pool_size": 1, "storage_user": "fickle", "pool_acquire_fail_fast": fail_fast},
        config={
            **storage(host=f"unix://{postgres.socket_dir}"),
            "performance": {"workers": workers},
        },
    )
    with ExitStack() as stack:
        clients = clients_on(gpooler, dict.fromkeys(range(1, workers + 1), 2), stack)
        holder, waiting = clients[1][0], clients[workers][1]
        begin(holder)
        postgres.query("ALTER ROLE fickle NOLOGIN")
        gpooler.reload(rule={"pool_size": 2})  # up to now there was room for no other server
        waiting.send(query("SELECT 5"))
        eventually(lambda: "not permitted to log in" in gpooler.log())
        if fail_fast:
            error = last_error(waiting)
            assert (error["C"], error["S"]) == ("08006", "FATAL")
            holder.query("COMMIT")
        else:
            holder.query("COMMIT")
            assert waiting.rows() == [["5"]]
        assert holder.query("SELECT 6") == [["6"]]


@pytest.mark.usefixtures("fickle_role")
def test_a_login_that_fails_for_good_is_told_at_once_where_there_are_no_servers(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(
        postgres,
        rule={"pool_size": 1, "storage_user": "fickle", "pool_timeout": 60_000},
        config=storage(host=f"unix://{postgres.socket_dir}"),
    )
    with gpooler.raw() as client:
        pid = begin(client.login())
        client.query("COMMIT")
        postgres.query("ALTER ROLE fickle NOLOGIN")
        postgres.terminate(pid)
        eventually(lambda: not postgres.activity())
        client.send(query("SELECT 1"))
        assert last_error(client)["C"] == "08006"


def test_fail_fast_does_not_wait_for_a_host_that_refuses(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    """Without it the client would wait for pool_timeout."""
    gpooler = gpooler_factory(
        postgres,
        rule={"pool_size": 2, "pool_timeout": 60_000, "pool_acquire_fail_fast": True},
        config={"performance": {"workers": 2}},
    )
    with ExitStack() as stack:
        clients = [stack.enter_context(gpooler.raw()).login() for _ in range(5)]
        postgres.stop()
        for client in clients:
            client.send(query("SELECT 1"))
        for client in clients:
            error = last_error(client)
            assert error["C"] == "08006"
            assert error["M"].endswith("could not connect to the server")
        postgres.start()
        with gpooler.raw() as client:
            assert client.login().query("SELECT 1") == [["1"]]


# --- backend_connect_timeout_ms ---------------------------------------------------------------


@pytest.mark.parametrize("pool", ["session", "transaction"])
def test_a_server_that_does_not_answer_in_time_is_given_up(
    postgres: Postgres, gpooler_factory: Factory, pool: str
) -> None:
    with FaultProxy(postgres.port) as proxy:
        proxy.stall("down")
        gpooler = gpooler_factory(
            postgres,
            rule={"pool": pool, "pool_size": 1, "pool_timeout": 60_000},
            config={**storage(port=proxy.port), "limits": {"backend_connect_timeout_ms": 200}},
        )
        with gpooler.raw() as client:
            with pytest.raises(ServerError, match="could not connect to the server") as caught:
                client.login()
            assert caught.value.sqlstate == "08006"
        eventually(lambda: "no answer within 200 ms" in gpooler.log())
        gpooler.reload(config={"limits": {"backend_connect_timeout_ms": 30_000}})
        proxy.resume()
        eventually(lambda: gpooler.route_count(RouteWord.SERVERS_LOGIN) == 0)  # under the old limit
        with gpooler.raw() as client:
            assert client.login().query("SELECT 1") == [["1"]]
        eventually(lambda: len(postgres.activity()) == 1)  # the one that was given up is gone


def test_without_pool_timeout_the_wait_for_a_silent_server_ends_as_well(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    with FaultProxy(postgres.port) as proxy:
        gpooler = gpooler_factory(postgres, config=storage(port=proxy.port))
        with gpooler.raw() as client:
            client.login().query("SELECT 1")
            gpooler.reload(config={"limits": {"backend_connect_timeout_ms": 200}})
            proxy.stall("down")
            proxy.cut()
            client.send(query("SELECT 1"))
            assert last_error(client)["C"] == "08006"


# --- server_max_routing -----------------------------------------------------------------------


def logins_at_once(gpooler: Gpooler) -> int:
    """Over all workers at one moment; 0 where one of them changed while they were looked at.

    A login that ends counts an opened server: whoever shows the same twice has been so all the while.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(closing(counters)) for counters in gpooler.worker_counters()]

        def look() -> list[tuple[int, int]]:
            return [
                (worker.route(route, RouteWord.SERVERS_LOGIN), worker.route(route, RouteWord.SERVERS_OPENED))
                for worker in workers
                for route in worker.used_routes()
            ]

        before = look()
        return sum(logins for logins, _ in before) if look() == before else 0


@pytest.mark.parametrize(("limit", "workers", "most"), [(0, 3, 3), (2, 3, 2), (1, 4, 1), (5, 1, 5)])
def test_server_max_routing_bounds_logins_at_once_over_all_workers(
    postgres: Postgres, gpooler_factory: Factory, limit: int, workers: int, most: int
) -> None:
    with FaultProxy(postgres.port) as proxy:
        gpooler = gpooler_factory(
            postgres,
            rule={"pool_size": 10},
            config={
                **storage(port=proxy.port, server_max_routing=limit),
                "performance": {"workers": workers},
            },
        )
        seen = 0
        with ExitStack() as stack:
            clients = clients_on(gpooler, dict.fromkeys(range(1, workers + 1), 12 // workers), stack)
            everybody = [client for mine in clients.values() for client in mine][:10]
            proxy.delay(0.02)
            proxy.stall("down")
            for client in everybody:
                client.send(query("BEGIN; SELECT pg_backend_pid()"))
            eventually(lambda: logins_at_once(gpooler) == most)
            proxy.resume()

            def look() -> bool:
                nonlocal seen
                seen = max(seen, logins_at_once(gpooler))
                return gpooler.route_count(RouteWord.SERVERS_ACTIVE) == 10

            eventually(look)
            assert len({client.rows()[0][0] for client in everybody}) == 10
    assert seen <= most


def test_a_storage_that_does_not_answer_holds_up_no_other(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    rule = {
        "authentication": "none",
        "storage_db": "app",
        "storage_user": "trust_user",
        "pool": "transaction",
    }
    with FaultProxy(postgres.port) as proxy:
        proxy.stall("down")
        gpooler = gpooler_factory(
            postgres,
            config={
                "storage": {"silent": {"type": "remote", "host": "127.0.0.1", "port": proxy.port}},
                "database": {"silent": {"user": {"default": {**rule, "storage": "silent"}}}},
            },
        )
        with gpooler.raw() as stuck, gpooler.raw() as client, ThreadPoolExecutor(1) as pool:
            job = pool.submit(stuck.login, "trust_user", "silent")
            try:
                eventually(lambda: proxy.connections() == 1)
                assert client.login().query("SELECT 1") == [["1"]]
                assert not job.done()
            finally:
                proxy.resume()
            assert job.result().query("SELECT 2") == [["2"]]


# --- names and dns_cache_ttl ------------------------------------------------------------------


@pytest.fixture
def names(tmp_path: Path, program: Callable[[str], str]) -> Names:
    return Names(tmp_path, program("cc"))


def named(factory: Factory, postgres: Postgres, names: Names, ttl_ms: int, **rule: Any) -> Gpooler:
    return factory(
        postgres,
        rule=rule,
        config={**storage(host=NAME), "performance": {"dns_cache_ttl": ttl_ms}},
        environment=names.environment,
    )


def open_servers(gpooler: Gpooler, count: int) -> None:
    """Have so many opened, one after the other."""
    with ExitStack() as stack:
        for _ in range(count):
            begin(stack.enter_context(gpooler.raw()).login())


def test_a_resolved_name_is_kept_for_dns_cache_ttl(
    postgres: Postgres, gpooler_factory: Factory, names: Names
) -> None:
    names.set("127.0.0.1")
    gpooler = named(gpooler_factory, postgres, names, 60_000)
    open_servers(gpooler, 4)
    assert names.questions == 1


def test_a_name_is_asked_for_again_when_dns_cache_ttl_is_over(
    postgres: Postgres, gpooler_factory: Factory, names: Names
) -> None:
    names.set("127.0.0.1")
    gpooler = named(gpooler_factory, postgres, names, 0, pool_size=3)
    open_servers(gpooler, 3)
    assert names.questions == 3
    # the host moves
    names.set("::1")
    gpooler.reload(rule={"pool_size": 4})
    open_servers(gpooler, 4)
    hosts = postgres.query(
        "SELECT DISTINCT host(client_addr) FROM pg_stat_activity WHERE usename = 'trust_user'"
    )
    assert ("::1",) in hosts


def test_while_nobody_answers_the_old_address_is_used(
    postgres: Postgres, gpooler_factory: Factory, names: Names
) -> None:
    names.set("127.0.0.1")
    gpooler = named(gpooler_factory, postgres, names, 0, pool_size=1)
    open_servers(gpooler, 1)
    names.set()
    gpooler.reload(rule={"pool_size": 3})
    open_servers(gpooler, 3)
    assert names.questions == 3


def test_the_addresses_of_a_name_are_tried_in_turn(
    postgres: Postgres, gpooler_factory: Factory, names: Names
) -> None:
    """PostgreSQL listens at the last one alone."""
    names.set("127.0.0.3", "127.0.0.2", "127.0.0.1")
    gpooler = named(gpooler_factory, postgres, names, 60_000, pool_size=3)
    open_servers(gpooler, 3)
    assert len(postgres.activity()) == 3
