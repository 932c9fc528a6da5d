"""pool_size is exact over all workers, whatever happens to clients, servers and processes."""

import os
import random
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

import psycopg

from gpooler.stats.registry import RouteWord
from tests.harness import Gpooler, Postgres, eventually
from tests.harness.load import Pgbench, ServerWatch

Factory = Callable[..., Gpooler]
Program = Callable[[str], str]
POOL_SIZE = 20
WORKERS = 4
SCRIPT = "\\set pause random(0, 10)\nSELECT pg_sleep(:pause / 1000.0);\n"


class Crowd:
    """pgbench again and again: its clients give up when they lose their connection. A context manager."""

    def __init__(self, pgbench: str, gpooler: Gpooler, clients: int, *options: str) -> None:
        self._make = lambda: Pgbench(pgbench, gpooler, SCRIPT, clients, 2, *options)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Crowd":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._make() as load:
                load.wait()


def test_200_clients_churn_recycling_and_kills_never_see_more_servers_than_pool_size(
    postgres: Postgres, gpooler_factory: Factory, program: Program
) -> None:
    gpooler = gpooler_factory(
        postgres,
        rule={"pool_size": POOL_SIZE, "server_lifetime": 1},
        config={"performance": {"workers": WORKERS}},
    )
    pgbench, chance = program("pgbench"), random.Random(5)

    def served(count: int) -> None:
        before = gpooler.route_count(RouteWord.TRANSACTIONS)
        eventually(lambda: gpooler.route_count(RouteWord.TRANSACTIONS) > before + count, within=20)

    with ServerWatch(postgres) as watch, Crowd(pgbench, gpooler, 100), Crowd(pgbench, gpooler, 100, "-C"):
        served(500)
        for _ in range(3):
            workers = gpooler.worker_pids()
            os.kill(chance.choice(workers), signal.SIGKILL)
            eventually(lambda old=workers: len(set(gpooler.worker_pids()) - set(old)) == 1, within=10)
            served(500)
            os.kill(gpooler.broker_pid(), signal.SIGKILL)
            served(500)
            with suppress(psycopg.Error):
                for each in postgres.activity()[:3]:
                    postgres.terminate(each.pid)
            served(500)
    assert watch.most == POOL_SIZE
    eventually(lambda: gpooler.route_count(RouteWord.SERVERS_IDLE) == len(postgres.activity()), within=10)
