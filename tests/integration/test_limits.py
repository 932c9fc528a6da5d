"""Limits of clients over all workers, limits of time at login, and logins while PostgreSQL is away."""

import re
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from gpooler.stats.registry import ProcessWord
from tests.harness import PASSWORD, Gpooler, Postgres, RawClient, eventually, free_port, stopped
from tests.harness.client import SSL_REQUEST, ServerError, message, query, startup, text

Factory = Callable[..., Gpooler]

TWO_WORKERS = {"performance": {"workers": 2}}


def rule(**options: Any) -> dict[str, Any]:
    return {
        "authentication": "none",
        "storage": "postgres",
        "storage_db": "app",
        "storage_user": "trust_user",
        "pool": "transaction",
        "pool_size": 2,
        **options,
    }


def refusal(gpooler: Gpooler, user: str = "trust_user", **options: str) -> dict[str, str]:
    with gpooler.raw() as client, pytest.raises(ServerError) as caught:
        client.login(user, **options)
    return caught.value.fields


@contextmanager
def logged_in(gpooler: Gpooler, count: int, user: str = "trust_user") -> Iterator[list[RawClient]]:
    """So many clients at once."""
    with ExitStack() as stack:
        clients = [stack.enter_context(gpooler.raw()) for _ in range(count)]
        for client in clients:
            client.login(user)
        yield clients


def clients_counted(gpooler: Gpooler) -> int:
    return gpooler.process_count(ProcessWord.CLIENTS)


def test_without_descriptors_clients_wait_and_the_log_says_what_to_do(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule=rule())
    with logged_in(gpooler, 1) as (first,):
        first.query("SELECT 1")
        (worker,) = gpooler.worker_pids()
        files = len(list(Path(f"/proc/{worker}/fd").iterdir()))
        most = resource.prlimit(worker, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (files + 3, most))
        with ExitStack() as stack:
            waiting = [stack.enter_context(gpooler.raw()) for _ in range(6)]
            for client in waiting:
                client.send(startup("trust_user", "app"))
            eventually(lambda: clients_counted(gpooler) == 4)
            eventually(lambda: "cannot accept clients: Too many open files" in gpooler.log())
            assert first.query("SELECT 2") == [["2"]]
        with logged_in(gpooler, 1) as (last,):
            assert last.query("SELECT 3") == [["3"]]
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (most, most))
    assert gpooler.log().count("cannot accept clients") == 1


# --- numbers of clients -----------------------------------------------------------------------


def test_client_max_is_exact_over_the_workers(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, config={**TWO_WORKERS, "limits": {"client_max": 10}})
    for _ in range(2):
        with logged_in(gpooler, 10) as clients:
            for _ in range(6):
                fields = refusal(gpooler)
                assert (fields["S"], fields["C"]) == ("FATAL", "53300")
                assert "client_max is 10" in fields["M"]
            clients[3].terminate()
            eventually(lambda: clients_counted(gpooler) == 9)
            with logged_in(gpooler, 1) as (late,):
                assert late.query("SELECT 1") == [["1"]]
                assert refusal(gpooler)["C"] == "53300"
        eventually(lambda: clients_counted(gpooler) == 0)


def test_client_max_of_a_rule_is_exact_over_the_workers(postgres: Postgres, gpooler_factory: Factory) -> None:
    config = {
        **TWO_WORKERS,
        "database": {
            "default": {"user": {"anna": rule(client_max=6), "bert": rule(client_max=3), "default": rule()}}
        },
    }
    gpooler = gpooler_factory(postgres, config=config)
    for _ in range(2):
        with logged_in(gpooler, 6, "anna"), logged_in(gpooler, 3, "bert"), logged_in(gpooler, 8, "carl"):
            for user, limit in (("anna", 6), ("bert", 3)) * 4:
                fields = refusal(gpooler, user)
                assert (fields["S"], fields["C"]) == ("FATAL", "53300")
                assert f"client_max is {limit}" in fields["M"]
        eventually(lambda: clients_counted(gpooler) == 0)


def test_a_storm_of_logins_never_exceeds_client_max(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, config={**TWO_WORKERS, "limits": {"client_max": 5}})
    with logged_in(gpooler, 1):
        pass
    eventually(lambda: clients_counted(gpooler) == 0)
    for _ in range(3):
        with ExitStack() as stack:
            clients = [stack.enter_context(gpooler.raw()) for _ in range(40)]
            for client in clients:
                client.send(startup("trust_user", "app"))
            admitted = 0
            for client in clients:
                answer = client.read()
                if answer.kind == b"E":
                    assert answer.fields()["C"] == "53300"
                else:
                    client.read_until()
                    admitted += 1
            assert 1 <= admitted <= 5
            with logged_in(gpooler, 5 - admitted):
                assert refusal(gpooler)["C"] == "53300"
        eventually(lambda: clients_counted(gpooler) == 0)


def test_places_come_back_after_failed_and_broken_logins(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    secret = {"authentication": "clear_text", "password": PASSWORD}
    config = {
        **TWO_WORKERS,
        "limits": {"client_max": 4},
        "database": {
            "default": {
                "user": {
                    "right": rule(**secret, client_max=4),
                    "blocked": rule(authentication="block"),
                    "lost": rule(storage_db="no_such_database", client_max=4),
                    "session": rule(pool="session", client_max=4),
                    "default": rule(client_max=4),
                }
            }
        },
    }
    gpooler = gpooler_factory(postgres, config=config)
    for _ in range(6):
        assert refusal(gpooler, "right", password="wrong")["C"] == "28P01"
        assert refusal(gpooler, "blocked")["C"] == "28000"
        assert refusal(gpooler, "lost")["C"] == "08006"
        assert refusal(gpooler, "trust_user", TimeZone="nonsense")["C"] == "22023"
        assert refusal(gpooler, "session", TimeZone="nonsense")["C"] == "22023"
        assert refusal(gpooler, "trust_user", server_version="1")["C"] == "55P02"
        for leave in (RawClient.close, RawClient.reset, RawClient.terminate):
            client = gpooler.raw()
            client.send(startup("right", "app"))
            client.read()  # asked for the password
            leave(client)
            client = gpooler.raw()
            client.login()
            leave(client)
            eventually(lambda: clients_counted(gpooler) == 0)
    for user in ("right", "session", "trust_user"):
        with logged_in(gpooler, 2 if user == "session" else 4, user):
            pass
        eventually(lambda: clients_counted(gpooler) == 0)


def test_client_max_routing_bounds_logins_but_refuses_nobody(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(
        postgres, rule={"storage_db": None}, config={"limits": {"client_max_routing": 1}}
    )
    databases = ("app", "postgres", "template1")
    with ExitStack() as stack:
        clients = [stack.enter_context(gpooler.raw()) for _ in range(12)]
        for number, client in enumerate(clients):
            client.send(startup("anybody", databases[number % 3]))
        for number, client in enumerate(clients):
            client.read_until()
            assert client.query("SELECT current_database()") == [[databases[number % 3]]]


# --- time for a login -------------------------------------------------------------------------


def test_a_login_that_is_not_completed_in_time_is_ended(postgres: Postgres, gpooler_factory: Factory) -> None:
    ports = [free_port(), free_port()]
    gpooler = gpooler_factory(
        postgres,
        port=ports[0],
        rule={"authentication": "clear_text", "password": PASSWORD},
        config={
            "listen": [
                {"host": "127.0.0.1", "port": ports[0], "client_login_timeout": 800},
                {"host": "127.0.0.1", "port": ports[1], "client_login_timeout": 60_000},
            ]
        },
    )
    whole = startup("trust_user", "app")
    with RawClient(ports[1]) as patient:
        for beginning in (b"", whole[:3], whole[:-1], SSL_REQUEST, whole, whole + message(b"p", b"x")[:4]):
            with gpooler.raw() as client:
                client.send(beginning)
                if beginning == SSL_REQUEST:
                    assert client.receive(1) == b"N"
                *before, last = client.read_to_end()
                assert [answer.kind for answer in before] in ([], [b"R"])
                fields = last.fields()
                assert (fields["S"], fields["C"]) == ("FATAL", "08P01")
                assert "800 ms" in fields["M"]
        patient.send(whole)
        assert patient.read().kind == b"R"
        patient.send(message(b"p", text(PASSWORD)))
        patient.read_until()
        assert patient.query("SELECT 1") == [["1"]]
    eventually(lambda: clients_counted(gpooler) == 0)


def test_waiting_for_a_server_at_login_counts_against_pool_timeout_alone(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(
        postgres,
        rule={"pool": "session", "pool_size": 1},
        config={
            "listen": [{"host": "127.0.0.1", "port": (port := free_port()), "client_login_timeout": 3000}]
        },
        port=port,
    )
    with gpooler.raw() as holder, gpooler.raw() as waiting:
        holder.login()
        waiting.send(startup("trust_user", "app"))
        assert waiting.read().kind == b"R"
        for _ in range(2):  # each is a clock that runs for client_login_timeout
            with gpooler.raw() as silent:
                silent.read_to_end()
        holder.terminate()
        assert waiting.read_until()[-1].kind == b"Z"
        assert waiting.query("SELECT 1") == [["1"]]


def test_a_session_login_that_finds_no_server_says_pool_size_and_queue_length(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(
        postgres, rule={"pool": "session", "pool_size": 2}, config={"performance": {"workers": 1}}
    )
    with logged_in(gpooler, 2), gpooler.raw() as first, gpooler.raw() as second:
        gpooler.reload(rule={"pool_timeout": 300})
        with stopped(gpooler.worker_pids()[0]):  # it finds both at once
            first.send(startup("trust_user", "app"))
            second.send(startup("trust_user", "app"))
        lengths = []
        for client in (first, second):
            error = client.read_to_end()[-1].fields()
            assert (error["S"], error["C"]) == ("FATAL", "53300")
            found = re.search(r"pool size 2, queue length (\d)", error["M"])
            assert found is not None, error["M"]
            lengths.append(found[1])
        assert lengths in (["2", "1"], ["1", "2"], ["2", "2"])
    eventually(lambda: clients_counted(gpooler) == 0)


# --- PostgreSQL is away -----------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["session", "transaction"])
def test_a_route_never_reached_gets_a_general_error(
    postgres: Postgres, gpooler_factory: Factory, pool: str
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool": pool, "pool_timeout": 60_000}, config=TWO_WORKERS)
    postgres.stop()
    for _ in range(4):
        fields = refusal(gpooler)
        assert (fields["S"], fields["C"]) == ("FATAL", "08006")
        assert fields["M"].endswith(": could not connect to the server")
    eventually(lambda: "Connection refused" in gpooler.log())
    postgres.start()
    with logged_in(gpooler, 1) as (client,):
        assert client.query("SELECT 1") == [["1"]]


@pytest.mark.parametrize("pool", ["session", "transaction"])
def test_the_servers_own_error_at_its_login_is_forwarded_where_the_rule_says_so(
    any_postgres: Postgres, gpooler_factory: Factory, pool: str
) -> None:
    with psycopg.connect(any_postgres.dsn(dbname="app"), autocommit=True) as connection:
        assert connection.info.server_version // 10000 == any_postgres.version
    users = {
        "told": rule(pool=pool, storage_db="no_such_database", client_fwd_error=True),
        "kept": rule(pool=pool, storage_db="no_such_database"),
        "nobody": rule(pool=pool, storage_user="no_such_role", client_fwd_error=True),
    }
    gpooler = gpooler_factory(any_postgres, config={"database": {"default": {"user": users}}})
    told = refusal(gpooler, "told")
    assert (told["S"], told["C"]) == ("FATAL", "3D000")
    assert told["M"].endswith('database "no_such_database" does not exist')
    kept = refusal(gpooler, "kept")
    assert (kept["S"], kept["C"]) == ("FATAL", "08006")
    assert "no_such_database" not in str(kept)
    nobody = refusal(gpooler, "nobody")
    assert nobody["S"] == "FATAL"
    assert nobody["C"] == "28000"
    eventually(lambda: 'database "no_such_database" does not exist' in gpooler.log())


def test_known_routes_log_in_and_wait_while_postgres_is_away(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 3}, config=TWO_WORKERS)
    with logged_in(gpooler, 1) as (client,):
        expected = client.parameters
        assert client.query("SELECT 1") == [["1"]]
    gpooler.reload(rule={"pool_timeout": 400})
    postgres.stop()
    with logged_in(gpooler, 6) as clients:  # both workers: the broker has told the other one
        for client in clients:
            assert client.parameters == expected
            client.send(query("SELECT 1"))
            (error,) = client.read_to_end()
            assert (error.fields()["S"], error.fields()["C"]) == ("FATAL", "53300")
            assert "pool size 3, queue length 1" in error.fields()["M"]
    eventually(lambda: clients_counted(gpooler) == 0)
    eventually(lambda: "last server login failed" in gpooler.log())
    gpooler.reload(rule={"pool_timeout": 0})
    postgres.start()
    with logged_in(gpooler, 2) as clients:
        for client in clients:
            assert client.query("SELECT 1") == [["1"]]


def test_a_client_that_waits_is_served_when_postgres_is_back(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_timeout": 60_000}, config=TWO_WORKERS)
    with logged_in(gpooler, 4) as clients:
        clients[0].query("SELECT 1")
        postgres.stop()
        answers: list[Any] = []
        threads = [
            threading.Thread(target=lambda c=client: answers.append(c.query("SELECT 1")))  # type: ignore[misc]
            for client in clients
        ]
        for client in clients:
            client.socket.settimeout(60)
        for thread in threads:
            thread.start()
        eventually(lambda: "Connection refused" in gpooler.log())
        assert answers == []
        postgres.start()
        for thread in threads:
            thread.join()
        assert answers == [[["1"]]] * 4


def test_a_session_login_waits_while_postgres_is_away(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool": "session", "pool_size": 2, "pool_ttl": 1})
    with logged_in(gpooler, 1):
        pass
    gpooler.reload(rule={"pool_timeout": 400})
    postgres.stop()
    fields = refusal(gpooler)
    assert (fields["S"], fields["C"]) == ("FATAL", "53300")
    assert "pool size 2, queue length 1" in fields["M"]
    gpooler.reload(rule={"pool_timeout": 0})
    postgres.start()
    with logged_in(gpooler, 1) as (client,):
        assert client.query("SELECT pg_backend_pid()") == [[str(client.pid)]]
