"""Servers on their way from one worker to another while the broker dies."""

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack

from gpooler.stats.registry import RouteWord
from tests.faults.stage import hold_all
from tests.harness import Gpooler, Postgres, eventually
from tests.harness.client import query
from tests.harness.faults import Faults
from tests.harness.load import ServerWatch
from tests.harness.steering import clients_on

Factory = Callable[..., Gpooler]


def pids(postgres: Postgres) -> set[int]:
    return {each.pid for each in postgres.activity()}


def sleepers(postgres: Postgres) -> list[int]:
    return [each.pid for each in postgres.activity() if "pg_sleep" in each.query and each.state == "active"]


def test_server_given_up_to_a_dead_broker_is_kept_and_given_up_to_the_next(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    with Faults() as faults, ExitStack() as stack, ServerWatch(postgres) as watch:
        gpooler = gpooler_factory(
            postgres,
            rule={"pool_size": 4},
            config={"performance": {"workers": 2}},
            environment=faults.environment,
        )
        broker, giver = faults.process("broker"), faults.process("worker 2")
        clients = clients_on(gpooler, {1: 4, 2: 4}, stack)
        hold_all(clients[2])
        before = pids(postgres)
        assert len(before) == 4
        for client in clients[2]:
            client.query("BEGIN; SELECT 1")
        giver.arm("server_released")
        clients[1][0].send(query("SELECT 42"))
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
        clients[2][0].query("COMMIT")
        giver.wait_at("server_released")
        os.kill(broker.pid, signal.SIGKILL)
        eventually(lambda: gpooler.broker_pid() != broker.pid)
        giver.go()
        assert clients[1][0].rows() == [["42"]]
        for client in clients[2][1:]:
            client.query("COMMIT")
        hold_all(clients[1])
        assert pids(postgres) == before
    assert watch.most == 4


def test_what_runs_when_worker_and_broker_die_together_keeps_its_slot_and_is_cancelled(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(
        postgres,
        rule={"pool_size": 3, "pool_reset_timeout_ms": 5000},
        config={"performance": {"workers": 2}},
    )
    with ExitStack() as stack, ServerWatch(postgres) as watch:
        clients = clients_on(gpooler, {1: 2, 2: 3}, stack)
        for client in clients[1]:
            client.send(query("SELECT pg_sleep(100)"))
        busy = eventually(lambda: sleepers(postgres) if len(sleepers(postgres)) == 2 else [])
        postgres.freeze(busy[0])  # this one hears of nothing
        try:
            broker, worker = gpooler.broker_pid(), gpooler.worker_pids()[0]
            os.kill(worker, signal.SIGKILL)
            os.kill(broker, signal.SIGKILL)
            eventually(lambda: gpooler.broker_pid() != broker, within=10)
            eventually(lambda: sleepers(postgres) == busy[:1])
            for client in clients[2]:
                client.send(query("BEGIN; SELECT 1"))
            eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_ACTIVE) == 2)
            eventually(lambda: "stays after its worker died" in gpooler.log())
            eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
            assert len(pids(postgres)) == 3
        finally:
            postgres.thaw(busy[0])
        for client in clients[2]:
            assert client.rows() == [["1"]]
        for client in clients[2]:
            client.query("COMMIT")
    assert watch.most <= 3
