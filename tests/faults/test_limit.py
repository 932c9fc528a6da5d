"""pool_size is exact whatever happens: churn, recycling, processes that are killed."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Final

import pytest

from gpooler.stats.registry import RouteWord
from tests.harness import Gpooler, Postgres, RawClient, eventually
from tests.harness.load import ServerWatch

WORKERS: Final = 4
CLIENTS: Final = 200
POOL_SIZE: Final = 20
QUERIES_MOST: Final = 30  # of one connection


class Churn:
    """Clients that log in, ask a few questions and go, each in a thread; they put up with lost connections.

    A wrong answer or an error is: ``stop`` raises it.
    """

    def __init__(self, gpooler: Gpooler) -> None:
        self._gpooler = gpooler
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(CLIENTS)]
        self.failures: list[BaseException] = []
        self.answers = self.losses = 0
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let them finish."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _run(self, seed: int) -> None:
        dice = random.Random(seed)
        while not self._stopped.is_set() and not self.failures:
            try:
                with self._gpooler.raw(timeout=30) as client:
                    client.login()
                    for number in range(dice.randint(1, QUERIES_MOST)):
                        self._ask(client, dice, number)
                        if self._stopped.is_set():
                            break
                    client.terminate()
            except (EOFError, ConnectionError):
                self.losses += 1
            except BaseException as error:  # noqa: BLE001  # told at the end
                self.failures.append(error)

    def _ask(self, client: RawClient, dice: random.Random, number: int) -> None:
        match dice.randrange(4):
            case 0:
                rows = client.query(f"BEGIN; SELECT {number} FROM pg_sleep({dice.random() / 20})")
                client.query("COMMIT")
            case 1:
                rows = client.query(f"SELECT {number} FROM pg_sleep({dice.random() / 10})")
            case _:
                rows = client.query(f"SELECT {number}")
        assert rows == [[str(number)]]
        self.answers += 1


@pytest.mark.timeout(400)
def test_no_server_too_many_while_workers_and_brokers_are_killed(
    request: pytest.FixtureRequest, postgres: Postgres, gpooler_factory: Callable[..., Gpooler]
) -> None:
    seconds = 180 if request.config.getoption("--full") else 15
    dice = random.Random(0)
    gpooler = gpooler_factory(
        postgres,
        rule={"pool_size": POOL_SIZE, "server_lifetime": 2, "pool_timeout": 0},
        config={"performance": {"workers": WORKERS}},
    )
    with ServerWatch(postgres) as watch:
        churn = Churn(gpooler)
        try:
            end = time.monotonic() + seconds
            for kill in count(1):
                pause = threading.Event()
                pause.wait(dice.random() * 1.5)
                if time.monotonic() > end or churn.failures:
                    break
                with suppress(AssertionError, IndexError, ProcessLookupError):  # a successor is on its way
                    victim = gpooler.broker_pid() if kill % 3 == 0 else dice.choice(gpooler.worker_pids())
                    os.kill(victim, signal.SIGKILL)
        finally:
            churn.stop()
    assert not churn.failures, (churn.failures[:3], gpooler.tail())
    assert watch.most == POOL_SIZE
    print(f"{churn.answers} answers, {churn.losses} lost connections, {kill} kills")
    assert churn.answers > 1000
    assert churn.losses
    eventually(lambda: len(gpooler.worker_pids()) == WORKERS and gpooler.broker_pid(), within=20)
    words = (
        RouteWord.CLIENTS,
        RouteWord.CLIENTS_ADMITTED,
        RouteWord.SERVERS_ACTIVE,
        RouteWord.SERVERS_CLOSING,
    )
    eventually(lambda: not any(gpooler.route_count(word) for word in words), within=20)
    eventually(lambda: gpooler.route_count(RouteWord.SERVERS_IDLE) == len(postgres.activity()), within=20)
