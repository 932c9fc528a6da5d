"""SIGTERM and SIGINT: who is dropped, who may finish, and how the run ends."""

import os
import signal
from collections.abc import Callable

import pytest

from gpooler.stats.registry import RouteWord
from tests.harness import FaultProxy, Gpooler, Postgres, RawClient, eventually
from tests.harness.client import ServerError, query, startup
from tests.harness.load import Pgbench

Factory = Callable[..., Gpooler]


def farewell(client: RawClient) -> tuple[str, str]:
    """Severity and SQLSTATE of the last message before the connection ends."""
    messages = client.read_to_end()
    fields = messages[-1].fields()
    return fields["S"], fields["C"]


def test_idle_clients_are_told_57p01_with_their_id_and_the_exit_status_is_0(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, config={"logging": {"log_session": True}})
    clients = [gpooler.raw().login() for _ in range(5)]
    clients[0].query("SELECT 1")
    gpooler.signal(signal.SIGTERM)
    for client in clients:
        with client:
            fields = client.read_to_end()[-1].fields()
            assert (fields["S"], fields["C"]) == ("FATAL", "57P01")
            name = fields["M"].split()[1].rstrip(":")
            assert fields["M"].startswith("gpooler: c")
            eventually(
                lambda name=name: f"[{name} none] (main) client disconnected: shutdown" in gpooler.log()
            )
    assert gpooler.stop() == 0
    assert not postgres.activity()


@pytest.mark.parametrize("pool", ["transaction", "session", "statement"])
def test_client_between_transactions_is_dropped_in_each_pool(
    postgres: Postgres, gpooler_factory: Factory, pool: str
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool": pool})
    with gpooler.raw().login() as client:
        assert client.query("SELECT 1") == [["1"]]
        gpooler.signal(signal.SIGINT)
        assert farewell(client) == ("FATAL", "57P01")
        assert gpooler.stop() == 0


def test_client_in_a_transaction_may_finish_it(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres)
    with gpooler.raw().login() as busy, gpooler.raw().login() as idle:
        busy.query("BEGIN")
        busy.query("SELECT 1")
        gpooler.signal(signal.SIGTERM)
        assert farewell(idle) == ("FATAL", "57P01")
        assert busy.query("SELECT 2") == [["2"]]
        busy.query("COMMIT")
        assert farewell(busy) == ("FATAL", "57P01")
        assert gpooler.stop() == 0


def test_query_that_runs_may_finish(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres)
    with gpooler.raw().login() as client:
        client.send(query("SELECT pg_sleep(0.5), 7"))
        eventually(lambda: any("pg_sleep" in each.query for each in postgres.activity()))
        gpooler.signal(signal.SIGTERM)
        assert client.rows() == [["", "7"]]
        assert farewell(client) == ("FATAL", "57P01")
        assert gpooler.stop() == 0


def test_client_that_waits_for_a_server_still_gets_one(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    with gpooler.raw().login() as holder, gpooler.raw().login() as waiter:
        holder.query("BEGIN")
        holder.query("SELECT 1")
        waiter.send(query("SELECT 2"))
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
        gpooler.signal(signal.SIGTERM)
        eventually(lambda: "draining" in gpooler.log())
        holder.query("COMMIT")
        assert waiter.rows() == [["2"]]
        assert farewell(waiter) == ("FATAL", "57P01")
        assert farewell(holder) == ("FATAL", "57P01")
        assert gpooler.stop() == 0


def test_clients_are_dropped_at_the_configured_rate(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(
        postgres,
        config={"service": {"conn_drop_options": {"rate": 2, "interval_ms": 600_000}}},
    )
    clients = [gpooler.raw().login() for _ in range(5)]
    gpooler.signal(signal.SIGTERM)
    eventually(lambda: gpooler.route_count(RouteWord.CLIENTS) == 3)
    # Those who stay are served until their turn comes.
    served = 0
    for client in clients:
        try:
            served += client.query("SELECT 1") == [["1"]]
        except (ServerError, OSError, EOFError):
            pass
    assert served == 3
    assert gpooler.route_count(RouteWord.CLIENTS) == 3
    for client in clients:
        client.close()
    assert gpooler.stop() == 0


def test_without_drop_enabled_the_drain_waits_for_the_clients(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, config={"service": {"conn_drop_options": {"drop_enabled": False}}})
    with gpooler.raw().login() as client:
        gpooler.signal(signal.SIGTERM)
        eventually(lambda: "draining" in gpooler.log())
        with pytest.raises(ConnectionRefusedError):
            eventually(lambda: gpooler.raw().close())
        assert client.query("SELECT 1") == [["1"]]
        client.terminate()
        assert gpooler.stop() == 0


def test_a_transaction_that_never_ends_ends_the_drain_with_124(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, config={"service": {"graceful_shutdown_timeout_ms": 700}})
    with gpooler.raw().login() as client:
        client.query("BEGIN")
        client.query("SELECT 1")
        assert gpooler.stop() == 124
        assert client.read_to_end() == []


def test_the_configured_number_of_signals_ends_it_at_once_with_1(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(
        postgres, config={"service": {"max_sigterms_to_die": 2, "graceful_shutdown_timeout_ms": 60_000}}
    )
    with gpooler.raw().login() as client:
        client.query("BEGIN")
        client.query("SELECT 1")
        gpooler.signal(signal.SIGTERM)
        eventually(lambda: "draining" in gpooler.log())
        assert client.query("SELECT 1") == [["1"]]
        assert gpooler.stop(signal.SIGINT) == 1


def test_login_that_is_under_way_is_refused_with_57p01(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres)
    with gpooler.raw().login() as holder, gpooler.raw() as late:
        holder.query("BEGIN")
        holder.query("SELECT 1")
        packet = startup("trust_user", "app")
        late.send(packet[:2])
        eventually(lambda: gpooler.client_connections() == 2)
        gpooler.signal(signal.SIGTERM)
        eventually(lambda: "draining" in gpooler.log())
        with pytest.raises(ConnectionRefusedError):
            eventually(lambda: gpooler.raw().close())
        late.send(packet[2:])
        assert farewell(late) == ("FATAL", "57P01")
        holder.query("COMMIT")
        assert gpooler.stop() == 0


def test_server_that_was_being_opened_does_not_keep_the_worker(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    with FaultProxy(postgres.port) as proxy:
        gpooler = gpooler_factory(
            postgres,
            config={"storage": {"postgres": {"port": proxy.port}}, "performance": {"workers": 1}},
            rule={"pool_size": 2},
        )
        first = gpooler.raw().login()
        first.query("BEGIN")
        proxy.stall("up")
        second = gpooler.raw().login()
        second.send(query("SELECT 1"))
        eventually(lambda: gpooler.route_count(RouteWord.SERVERS_LOGIN) == 1)
        second.close()
        first.close()
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS) == 0)
        gpooler.signal(signal.SIGTERM)
        eventually(lambda: gpooler.route_count(RouteWord.SERVERS_CLOSING) == 1)
        proxy.resume("up")
        assert gpooler.stop() == 0


def test_usr1_reopens_the_log_of_every_process(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(
        postgres,
        config={
            "logging": {"log_file": "gpooler.log", "log_to_stdout": False, "log_session": True},
            "performance": {"workers": 2},
        },
    )
    path = gpooler.directory / "gpooler.log"
    path.rename(path.with_suffix(".old"))
    gpooler.signal(signal.SIGUSR1)
    eventually(lambda: path.exists() and "log reopened" in path.read_text())

    def all_reopened() -> bool:
        return all(
            str(path)
            in [
                os.readlink(link)
                for link in (f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd"))
                if os.path.islink(link)
            ]
            for pid in [gpooler.broker_pid(), *gpooler.worker_pids()]
        )

    eventually(all_reopened)
    gpooler.raw().login().terminate()
    eventually(lambda: "client connected" in path.read_text())
    assert "client connected" not in path.with_suffix(".old").read_text()


def test_clients_that_never_rest_are_dropped_between_transactions(
    postgres: Postgres, gpooler_factory: Factory, program: Callable[[str], str]
) -> None:
    gpooler = gpooler_factory(
        postgres,
        rule={"pool_size": 4},
        config={
            "service": {
                "graceful_shutdown_timeout_ms": 10_000,
                "conn_drop_options": {"rate": 1000, "interval_ms": 100},
            }
        },
    )
    script = "BEGIN;\nSELECT pg_sleep(0.001);\nCOMMIT;"
    with Pgbench(program("pgbench"), gpooler, script, 40) as load:
        eventually(lambda: gpooler.route_count(RouteWord.TRANSACTIONS) > 500)
        gpooler.signal(signal.SIGTERM)
        assert gpooler.stop() == 0
        load.wait()
        assert load.output().count("FATAL:  gpooler: c") == 40
