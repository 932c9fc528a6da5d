"""Minutes of everything at once, with processes killed and PostgreSQL restarted; then all counts are back."""

import os
import random
import signal
import time
from collections.abc import Callable
from typing import Final

import psutil
import pytest

from gpooler.stats.registry import ProcessWord, RouteWord
from tests.full.actors import SCHEMA, Weather, cast, told
from tests.harness import Gpooler, Postgres, eventually
from tests.harness.client import query
from tests.harness.load import ServerWatch

Factory = Callable[..., Gpooler]
SECONDS: Final = float(os.environ.get("GPOOLER_SOAK_S", "300"))
QUIET_S: Final = 5.0  # between two blows
POOL_SIZE: Final = 6
SESSION_POOL_SIZE: Final = 4
LIMIT: Final = POOL_SIZE + SESSION_POOL_SIZE
WORKERS: Final = 3
GROWTH: Final = 12 << 20  # bytes that a worker may gain after the first blows: fragmentation, caches
RULES: Final = {
    "authentication": "none",
    "storage": "postgres",
    "storage_db": "app",
    "storage_user": "trust_user",
}


ROUTE_WORDS: Final = (
    RouteWord.CLIENTS, RouteWord.CLIENTS_ACTIVE, RouteWord.CLIENTS_WAITING, RouteWord.SERVERS_ACTIVE,
    RouteWord.SERVERS_LOGIN, RouteWord.SERVERS_CLOSING, RouteWord.CLIENTS_ADMITTED,
)  # fmt: skip
PROCESS_WORDS: Final = (ProcessWord.CLIENTS, ProcessWord.CLIENTS_LOGIN)


class Blows:
    """What is done to the system from outside."""

    def __init__(self, gpooler: Gpooler, postgres: Postgres, weather: Weather) -> None:
        self._gpooler, self._postgres, self._weather = gpooler, postgres, weather
        self._random = random.Random(2)

    def worker_killed(self) -> None:
        with self._weather.storm():
            before = self._gpooler.worker_pids()
            os.kill(self._random.choice(before), signal.SIGKILL)
            eventually(lambda: len(set(self._gpooler.worker_pids()) - set(before)) == 1, within=10)
            self._wait_until_all_accept()

    def broker_killed(self) -> None:
        """No client may notice."""
        before = self._gpooler.broker_pid()
        os.kill(before, signal.SIGKILL)
        eventually(lambda: self._gpooler.broker_pid() != before, within=10)

    def broker_stopped(self) -> None:
        """No client may notice, though some wait."""
        broker = self._gpooler.broker_pid()
        os.kill(broker, signal.SIGSTOP)
        try:
            time.sleep(self._random.random() * 2)
        finally:
            os.kill(broker, signal.SIGCONT)

    def postgres_restarted(self) -> None:
        with self._weather.storm():
            self._postgres.restart()

    def server_terminated(self) -> None:
        with self._weather.storm():
            pids = [each.pid for each in self._postgres.activity()]
            if pids:
                chosen = self._random.choice(pids)
                self._postgres.terminate(chosen)
                eventually(lambda: chosen not in [each.pid for each in self._postgres.activity()])

    def server_killed(self) -> None:
        """pg_stat_activity shows it until PostgreSQL has noticed; its successor may be there already."""
        with self._weather.storm():
            pids = [each.pid for each in self._postgres.activity()]
            if pids:
                self._postgres.kill(self._random.choice(pids))

    def worker_and_broker_killed(self) -> None:
        with self._weather.storm():
            before = self._gpooler.worker_pids()
            os.kill(self._gpooler.broker_pid(), signal.SIGKILL)
            os.kill(self._random.choice(before), signal.SIGKILL)
            eventually(lambda: len(set(self._gpooler.worker_pids()) - set(before)) == 1, within=10)
            eventually(self._gpooler.broker_pid, within=10)
            self._wait_until_all_accept()

    def log_reopened(self) -> None:
        self._gpooler.signal(signal.SIGUSR1)

    def _wait_until_all_accept(self) -> None:
        # one with many clients pauses while others accept
        eventually(lambda: len(self._gpooler.worker_pids()) == WORKERS, within=10)
        eventually(lambda: self._gpooler.process_count(ProcessWord.LISTENING) >= 1, within=10)


def census(gpooler: Gpooler) -> dict[str, int]:
    """Everything that must be nothing when nobody is there."""
    routes = {word.name: gpooler.route_count(word) for word in ROUTE_WORDS}
    return routes | {f"PROCESS_{word.name}": gpooler.process_count(word) for word in PROCESS_WORDS}


def check_counts(gpooler: Gpooler, postgres: Postgres) -> None:
    """Nobody is left, no server is anywhere but parked, and the rest of the pool can be opened at once."""

    def nobody_is_there() -> bool:
        found = {name: count for name, count in census(gpooler).items() if count}
        assert not found, f"{found}\n{postgres.activity()}"
        return True

    eventually(nobody_is_there, within=10)
    eventually(lambda: gpooler.process_count(ProcessWord.LISTENING) == WORKERS, within=10)
    eventually(lambda: len(postgres.activity()) == gpooler.route_count(RouteWord.SERVERS_IDLE), within=10)
    assert all(each.state == "idle" for each in postgres.activity())
    for user, size in (("trust_user", POOL_SIZE), ("session_user", SESSION_POOL_SIZE)):
        clients = [gpooler.raw(timeout=20).login(user) for _ in range(size)]
        for client in clients:
            client.send(query("BEGIN; SELECT pg_backend_pid()"))
        assert len({client.rows()[0][0] for client in clients}) == size
        for client in clients:
            client.query("COMMIT")
        for number in range(1000):
            assert clients[number % size].query(f"SELECT {number}") == [[str(number)]]
        for client in clients:
            client.terminate()


def check_end(gpooler: Gpooler) -> None:
    eventually(lambda: gpooler.process_count(ProcessWord.CLIENTS) == 0, within=10)
    assert gpooler.process_count(ProcessWord.LOG_LINES_LOST) == 0


@pytest.mark.full
@pytest.mark.timeout(SECONDS + 300)
def test_soak(postgres: Postgres, gpooler_factory: Factory) -> None:
    postgres.query(SCHEMA, dbname="app")
    postgres.query("GRANT ALL ON soak TO PUBLIC", dbname="app")
    user = {
        "default": {**RULES, "pool": "transaction", "pool_size": POOL_SIZE, "server_lifetime": 7},
        "session_user": {**RULES, "pool": "session", "pool_size": SESSION_POOL_SIZE},
    }
    gpooler = gpooler_factory(
        postgres, config={"performance": {"workers": WORKERS}, "database": {"default": {"user": user}}}
    )
    weather = Weather()
    blows = Blows(gpooler, postgres, weather)
    plan = [
        blows.broker_killed,
        blows.worker_killed,
        blows.broker_stopped,
        blows.postgres_restarted,
        blows.server_terminated,
        blows.worker_and_broker_killed,
        blows.server_killed,
        blows.log_reopened,
    ]
    memory: dict[int, int] = {}
    end = time.monotonic() + SECONDS
    rounds = 0
    try:
        with cast(gpooler, weather) as actors:
            while time.monotonic() < end:
                for blow in plan:
                    turns = sum(actor.turns for actor in actors)
                    with ServerWatch(postgres) as watch:
                        blow()
                        time.sleep(QUIET_S)
                    if blow != blows.server_killed:
                        assert watch.most <= LIMIT, f"{watch.most} servers: {blow.__name__}"
                    failures = [failure for actor in actors for failure in actor.failures]
                    assert not failures, "\n".join(failures[:3])
                    assert sum(actor.turns for actor in actors) > turns, (
                        f"all stand still after {blow.__name__}"
                    )
                rounds += 1
                for pid in [gpooler.broker_pid(), *gpooler.worker_pids()]:
                    now = psutil.Process(pid).memory_info().rss
                    assert now <= memory.setdefault(pid, now) + GROWTH, f"{pid} grows"
        print(f"soak: {rounds} rounds, {told(actors)}")
        failures = [failure for actor in actors for failure in actor.failures]
        assert not failures, "\n".join(failures[:3])
        assert all(actor.turns for actor in actors), told(actors)
        check_counts(gpooler, postgres)
        check_end(gpooler)
        assert postgres.query("SELECT count(*) FROM soak", dbname="app") == [(0,)]
    finally:
        if not postgres.is_running:
            postgres.start()
        postgres.query("DROP TABLE soak", dbname="app")
