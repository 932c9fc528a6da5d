"""What happens to clients and servers when a process of gpooler dies or stands still."""

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from gpooler.stats.registry import ProcessWord, RouteWord
from tests.harness import Gpooler, Postgres, RawClient, eventually
from tests.harness.client import ServerError, query
from tests.harness.faults import Faults
from tests.harness.load import Pgbench, ServerWatch
from tests.harness.steering import clients_on, worker_of

Factory = Callable[..., Gpooler]
Program = Callable[[str], str]


def hold_all_slots(gpooler: Gpooler, pool_size: int, clients: list[RawClient]) -> None:
    """Every slot of the pool can be used at once: so many transactions are open at the same time."""
    for client in clients[:pool_size]:
        client.send(query("BEGIN; SELECT pg_backend_pid()"))
    pids = {client.rows()[0][0] for client in clients[:pool_size]}
    assert len(pids) == pool_size
    for client in clients[:pool_size]:
        client.query("COMMIT")


def sleepers(postgres: Postgres) -> list[str]:
    return [each.query for each in postgres.activity() if "pg_sleep" in each.query and each.state == "active"]


def test_killed_worker_takes_only_its_clients_and_its_queries_along(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 4}, config={"performance": {"workers": 2}})
    with ExitStack() as stack, ServerWatch(postgres) as watch:
        clients = clients_on(gpooler, {1: 3, 2: 4}, stack)
        clients[1][0].send(query("SELECT pg_sleep(100)"))
        clients[1][1].query("BEGIN; SELECT 1")
        clients[2][0].query("BEGIN; SELECT 1")
        eventually(lambda: sleepers(postgres))
        first = gpooler.worker_pids()
        os.kill(first[0], signal.SIGKILL)
        for client in clients[1]:
            assert client.read_to_end() == []
        assert clients[2][0].query("SELECT 2") == [["2"]]
        clients[2][0].query("COMMIT")
        eventually(lambda: not sleepers(postgres))
        hold_all_slots(gpooler, 4, clients[2])
        eventually(lambda: len(gpooler.worker_pids()) == 2 and gpooler.worker_pids()[1] == first[1])
        assert clients_on(gpooler, {1: 1}, stack)[1][0].query("SELECT 3") == [["3"]]
        for client in clients[2]:
            client.query("SELECT 4")
    assert watch.most <= 4


def test_killed_workers_counts_and_clients_are_forgotten(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    most = 40
    gpooler = gpooler_factory(
        postgres, config={"performance": {"workers": 2}, "limits": {"client_max": most}}
    )
    for _ in range(3):
        with ExitStack() as stack:
            clients = clients_on(gpooler, {1: 2, 2: 2}, stack)
            before = gpooler.worker_pids()
            os.kill(before[1], signal.SIGKILL)
            clients[2][0].read_to_end()
            eventually(lambda before=before: len(set(gpooler.worker_pids()) - set(before)) == 1)
            eventually(lambda: gpooler.process_count(ProcessWord.CLIENTS) == 2)
            eventually(lambda: gpooler.process_count(ProcessWord.LISTENING) == 2)
            # client_max counts the living only: with two here there is room for all but two.
            more = [stack.enter_context(gpooler.raw()) for _ in range(most - 2)]
            for client in more:
                client.login()
                client.query("SELECT 1")
            with gpooler.raw() as surplus, pytest.raises(ServerError, match="client_max is 40"):
                surplus.login()
            for client in [*more, *clients[1]]:
                client.terminate()
        eventually(lambda: gpooler.process_count(ProcessWord.CLIENTS) == 0)


def test_killed_broker_is_not_noticed_by_clients_under_load(
    postgres: Postgres, gpooler_factory: Factory, program: Program
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 4}, config={"performance": {"workers": 2}})
    with (
        ServerWatch(postgres) as watch,
        Pgbench(program("pgbench"), gpooler, "SELECT 1;", 12) as load,
        ExitStack() as stack,
    ):
        for _ in range(3):
            before = gpooler.broker_pid()
            count = gpooler.route_count(RouteWord.QUERIES)
            os.kill(before, signal.SIGKILL)
            eventually(lambda count=count: gpooler.route_count(RouteWord.QUERIES) > count + 500)
            eventually(lambda before=before: gpooler.broker_pid() != before)
        assert load.finish() == 0, load.output() + gpooler.tail()
        # New leases are given: more than one worker may have had.
        clients = clients_on(gpooler, {1: 4, 2: 4}, stack)
        hold_all_slots(gpooler, 4, clients[1])
        hold_all_slots(gpooler, 4, clients[2])
        hold_all_slots(gpooler, 4, [clients[1][0], clients[2][0], clients[1][1], clients[2][1]])
    assert watch.most <= 4


def test_connection_churn_goes_on_while_brokers_die(
    postgres: Postgres, gpooler_factory: Factory, program: Program
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 3}, config={"performance": {"workers": 2}})
    with (
        ServerWatch(postgres) as watch,
        Pgbench(program("pgbench"), gpooler, "SELECT 1;", 6, 60, "-C") as load,
    ):
        for _ in range(2):
            before = gpooler.broker_pid()
            count = gpooler.route_count(RouteWord.QUERIES)
            os.kill(before, signal.SIGKILL)
            eventually(lambda count=count: gpooler.route_count(RouteWord.QUERIES) > count + 50)
            eventually(lambda before=before: gpooler.broker_pid() != before)
        assert load.finish() == 0, load.output() + gpooler.tail()
    assert watch.most <= 3


def test_stopped_broker_leaves_running_clients_alone(
    request: pytest.FixtureRequest, postgres: Postgres, gpooler_factory: Factory, program: Program
) -> None:
    seconds = 5 if request.config.getoption("--full") else 1.5
    gpooler = gpooler_factory(postgres, rule={"pool_size": 4}, config={"performance": {"workers": 2}})
    with ExitStack() as stack:
        clients = clients_on(gpooler, {1: 2, 2: 2}, stack)
        for client in [*clients[1], *clients[2]]:
            client.send(query("BEGIN; SELECT pg_sleep(0.1)"))
        for client in [*clients[1], *clients[2]]:
            client.rows()
            client.query("COMMIT")
        broker = gpooler.broker_pid()
        os.kill(broker, signal.SIGSTOP)
        try:
            with Pgbench(program("pgbench"), gpooler, "SELECT 1;", 8, max(1, round(seconds))) as load:
                assert load.wait() == 0, load.output()
            for client in [*clients[1], *clients[2]]:
                assert client.query("SELECT 5") == [["5"]]
        finally:
            os.kill(broker, signal.SIGCONT)
        assert gpooler.broker_pid() == broker
        hold_all_slots(gpooler, 4, [clients[1][0], clients[2][0], clients[1][1], clients[2][1]])


def test_killed_master_ends_everything(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, config={"performance": {"workers": 2}})
    family = gpooler.processes()
    with ExitStack() as stack:
        clients = clients_on(gpooler, {1: 1, 2: 1}, stack)
        clients[1][0].send(query("SELECT pg_sleep(100)"))
        clients[2][0].query("BEGIN; SELECT 1")
        eventually(lambda: sleepers(postgres))
        gpooler.signal(signal.SIGKILL)
        for client in (clients[1][0], clients[2][0]):
            assert client.read_to_end() == []
        for process in family[1:]:
            eventually(lambda process=process: not process.is_running())
        for each in postgres.activity():  # nobody is left to cancel what still runs
            postgres.terminate(each.pid)


def test_auto_means_one_worker_a_core(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, config={"performance": {"workers": "auto"}})
    cores = len(os.sched_getaffinity(0))
    eventually(lambda: f"ready: {cores} workers" in gpooler.log())
    assert len(gpooler.worker_pids()) == cores


def test_held_gil_stops_no_transaction(
    postgres: Postgres, gpooler_factory: Factory, program: Program
) -> None:
    with Faults() as faults:
        gpooler = gpooler_factory(postgres, rule={"pool_size": 2}, environment=faults.environment)
        worker = faults.process("worker 1")
        with Pgbench(program("pgbench"), gpooler, "BEGIN; SELECT 1; COMMIT;", 4) as load:
            eventually(lambda: gpooler.route_count(RouteWord.TRANSACTIONS) > 100)
            assert worker.ask({"hold_gil": True}) == "held"
            for _ in range(5):
                count = gpooler.route_count(RouteWord.TRANSACTIONS)
                eventually(lambda count=count: gpooler.route_count(RouteWord.TRANSACTIONS) > count + 100)
            assert not worker.hear(0), "the lock was let go before it was tested"
            worker.go()
            assert worker.answer() == "let go"
            assert load.finish() == 0, load.output()


def test_2000_idle_clients_add_fewer_than_200_python_objects(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    with Faults() as faults:
        gpooler = gpooler_factory(postgres, environment=faults.environment)
        worker = faults.process("worker 1")
        for _ in range(20):  # caches fill
            gpooler.raw().login().terminate()
        before = worker.ask({"objects": True})
        with ExitStack() as stack:
            for _ in range(2000):
                stack.enter_context(gpooler.raw()).login()
            eventually(lambda: gpooler.route_count(RouteWord.CLIENTS) == 2000)
            assert worker.ask({"objects": True}) - before < 200


def test_killed_worker_while_another_waits_for_its_slots(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 2}, config={"performance": {"workers": 2}})
    with ExitStack() as stack, ServerWatch(postgres) as watch:
        clients = clients_on(gpooler, {1: 2, 2: 2}, stack)
        for client in clients[1]:
            client.query("BEGIN; SELECT 1")
        for client in clients[2]:
            client.send(query("SELECT 7"))
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 2)
        os.kill(gpooler.worker_pids()[0], signal.SIGKILL)
        for client in clients[2]:
            assert client.rows() == [["7"]]
            assert worker_of(client) == 2
    assert watch.most <= 2
