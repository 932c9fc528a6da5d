"""Online restart: another gpooler takes over, the same sockets, servers and counts; clients feel nothing."""

import os
import random
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Final

import psutil
import psycopg
import pytest

from gpooler.stats.registry import RouteWord
from tests.harness import Gpooler, Postgres, eventually, free_port
from tests.harness.console import CONSOLE, console
from tests.harness.gpooler import merge
from tests.harness.load import Pgbench, ServerWatch
from tests.harness.tools import find_program

Factory = Callable[..., Gpooler]
# Old clients stay for as long as they like.
PATIENT: Final = {
    "service": {"conn_drop_options": {"drop_enabled": False}, "graceful_shutdown_timeout_ms": 60_000},
    "performance": {"workers": 2},
}
POOL_SIZE: Final = 4


def backends(postgres: Postgres) -> list[int]:
    return sorted(backend.pid for backend in postgres.activity())


def test_another_process_serves_at_the_same_addresses(
    postgres: Postgres, gpooler_factory: Factory, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    service = {"pid_file": str(pid_file), "unix_socket_dir": str(tmp_path), "unix_socket_mode": "0600"}
    port = free_port()
    listen = [{"host": "127.0.0.1", "port": port, "tls": "disable"}, {"port": port, "tls": "disable"}]
    gpooler = gpooler_factory(
        postgres, port=port, config={"service": service, "listen": listen, "performance": {"workers": 2}}
    )
    unix = f"host={tmp_path} port={port} user=joe dbname=app"
    assert int(pid_file.read_text()) == gpooler.pid
    for _ in range(3):
        before = gpooler.pid
        gpooler.restart()
        assert gpooler.pid != before
        assert int(pid_file.read_text()) == gpooler.pid
        for dsn in (gpooler.dsn(), unix):
            with closing(psycopg.connect(dsn, autocommit=True)) as client:
                assert client.execute("SELECT 1").fetchone() == (1,)
        assert len(gpooler.worker_pids()) == 2
    assert gpooler.stop() == 0
    assert list(tmp_path.iterdir()) == []


def test_who_is_connected_stays_until_it_leaves(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, config=PATIENT)
    with gpooler.connect() as idle, gpooler.connect() as busy, gpooler.connect() as asking:
        busy.execute("BEGIN")
        busy.execute("SET LOCAL work_mem = '1MB'")
        old = psutil.Process(gpooler.pid)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(asking.execute, "SELECT pg_sleep(1.5), 'slept'")
            eventually(lambda: any(it.query.startswith("SELECT pg_sleep") for it in postgres.activity()))
            gpooler.restart(is_awaited=False)
            row = answer.result().fetchone()
        assert row is not None
        assert row[1] == "slept"
        assert busy.execute("SHOW work_mem").fetchone() == ("1MB",)
        assert idle.execute("SELECT 1").fetchone() == (1,)
        with gpooler.connect() as new:
            assert new.execute("SELECT 2").fetchone() == (2,)
        busy.execute("COMMIT")
        assert is_alive(old)
        refusal = gpooler.restart(is_refused=True)
        assert "still drain" in refusal
    eventually(lambda: not is_alive(old), within=20)
    gpooler.restart()


def test_who_is_idle_is_told_to_go(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, config={"performance": {"workers": 2}})
    with gpooler.connect() as client:
        gpooler.restart()
        with pytest.raises(psycopg.errors.AdminShutdown):
            client.execute("SELECT 1")


def test_the_limits_hold_over_both(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": POOL_SIZE, "client_max": 12}, config=PATIENT)
    with ExitStack() as stack, ServerWatch(postgres) as watch:
        old = [stack.enter_context(gpooler.connect()) for _ in range(POOL_SIZE)]
        for client in old[1:]:
            client.execute("BEGIN")
            client.execute("SELECT 1")
        old[0].execute("SELECT 1")
        before = backends(postgres)
        gpooler.restart(is_awaited=False)
        new = [stack.enter_context(gpooler.connect()) for _ in range(8)]
        with pytest.raises(psycopg.OperationalError, match="client_max"):
            gpooler.connect()
        with ThreadPoolExecutor(8) as pool:  # through the one server that is free, an old one
            assert [it.fetchone() for it in pool.map(lambda c: c.execute("SELECT 1"), new)] == [(1,)] * 8
            assert backends(postgres) == before
            for client in old[1:]:
                client.execute("ROLLBACK")
            assert len(list(pool.map(lambda c: c.execute("SELECT pg_sleep(0.1)"), new))) == 8
        assert backends(postgres) == before
        assert watch.most <= POOL_SIZE


def test_a_cancel_finds_its_client_in_either(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, config=PATIENT)
    with gpooler.connect() as old, ThreadPoolExecutor(1) as pool:
        gpooler.restart(is_awaited=False)
        with gpooler.connect() as new:
            for client in (old, new):
                sleep = pool.submit(client.execute, "SELECT pg_sleep(60)")
                eventually(
                    lambda: [
                        it
                        for it in postgres.activity()
                        if it.query.startswith("SELECT pg_sleep") and it.state == "active"
                    ]
                )
                client.cancel()  # by a connection of its own, which the new workers accept
                with pytest.raises(psycopg.errors.QueryCanceled):
                    sleep.result(20)


def test_the_console_shows_both_and_counts_go_on(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, config=merge(PATIENT, CONSOLE))
    with gpooler.connect(application_name="old one") as old:
        for _ in range(20):
            old.execute("SELECT 1")
        gpooler.restart(is_awaited=False)
        with gpooler.connect(application_name="new one") as new, console(gpooler) as control:
            new.execute("SELECT 1")
            names = {row["application_name"] for row in control.show("CLIENTS")}
            assert {"old one", "new one"} <= names
            assert gpooler.route_count(RouteWord.TRANSACTIONS) >= 21
            (killed,) = control.show("CLIENTS WHERE application_name = 'old one'")
            control.connection.execute(f"KILL_CLIENT {killed['ptr']}")
            with pytest.raises(psycopg.OperationalError):
                old.execute("SELECT 1")
            eventually(lambda: len(gpooler.worker_pids()) == 2)
            assert gpooler.route_count(RouteWord.TRANSACTIONS) >= 21


def test_what_operators_have_done_holds(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, config=merge({"performance": {"workers": 2}}, CONSOLE))
    with console(gpooler) as control:
        control.connection.execute("DISABLE app")
    gpooler.restart()
    with pytest.raises(psycopg.OperationalError, match="not currently accepting"):
        gpooler.connect()
    with console(gpooler) as control:
        control.connection.execute("ENABLE app")
    gpooler.connect().close()


def test_the_file_is_read_anew(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, config=PATIENT, rule={"pool_size": POOL_SIZE})
    port = free_port()
    with gpooler.connect() as old:
        old.execute("SELECT 1")
        change = {
            "performance": {"workers": 3},  # which no reload can change
            "listen": [
                {"host": "127.0.0.1", "port": gpooler.port, "tls": "disable"},
                {"host": "127.0.0.1", "port": port, "tls": "disable"},
            ],
        }
        gpooler.rewrite(rule={"pool": "session"}, config=change)
        gpooler.restart(is_awaited=False)
        assert old.execute("SELECT 1").fetchone() == (1,)
        with closing(psycopg.connect(gpooler.dsn(port=port), autocommit=True)) as new:
            new.execute("SET work_mem = '1MB'")
            assert new.execute("SHOW work_mem").fetchone() == ("1MB",)
        assert old.execute("SHOW work_mem").fetchone() != ("1MB",)
    eventually(lambda: len(gpooler.worker_pids()) == 3, within=20)


# --- what goes wrong -------------------------------------------------------------------------------------


def test_a_broken_configuration_leaves_the_old_one(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, config=PATIENT)
    pid, good = gpooler.pid, gpooler.config_file.read_text()
    with gpooler.connect() as client:
        gpooler.config_file.write_text(good + "\n[nonsense]\nx = 1\n")
        assert "nonsense" in gpooler.restart(is_refused=True)
        taken = free_port()
        with socket.create_server(("127.0.0.1", taken)):
            gpooler.config_file.write_text(good.replace(f"port = {gpooler.port}", f"port = {taken}"))
            assert str(taken) in gpooler.restart(is_refused=True)
        assert client.execute("SELECT 1").fetchone() == (1,)
        gpooler.config_file.write_text(good)
        assert gpooler.pid == pid
        gpooler.restart(is_awaited=False)


def test_it_can_be_forbidden(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, config={"service": {"enable_online_restart": False}})
    assert "enable_online_restart" in gpooler.restart(is_refused=True)
    gpooler.signal(signal.SIGUSR2)
    eventually(lambda: gpooler.log().count("enable_online_restart is off") == 2)
    gpooler.connect().close()


def test_repeated_signals_start_one(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, config={"performance": {"workers": 2}})
    refusal, said = "another online restart is under way", ""
    while refusal not in said:  # the first one may be over before we come to the second
        old, log = psutil.Process(gpooler.pid), len(gpooler.log())

        def is_refused(old: psutil.Process = old, log: int = log) -> bool:
            with suppress(psutil.NoSuchProcess):
                old.send_signal(signal.SIGUSR2)
            return refusal in gpooler.log()[log:] or not is_alive(old)

        eventually(is_refused)
        eventually(lambda old=old: not is_alive(old), within=30)  # type: ignore[misc]
        said = gpooler.log()[log:]
        assert said.count("the new master has pid") == 1
        gpooler.adopt()
    gpooler.connect().close()


SERVES: Final = " serves: "
STAYS: Final = "all stays as it was"


def outcome_of(log: str) -> str:
    """How an online restart ended, as the old master says; empty while it has not."""
    return next((words for words in (SERVES, STAYS) if words in log), "")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_new_master_that_dies_at_any_moment_leaves_the_old_one(
    postgres: Postgres, gpooler_factory: Factory, number: signal.Signals
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": POOL_SIZE}, config=PATIENT)
    seed, failed = random.Random(number), 0
    with ServerWatch(postgres) as watch:
        for turn in range(6):
            with gpooler.connect() as idle:
                log = len(gpooler.log())
                gpooler.signal(signal.SIGUSR2)
                new = eventually(lambda: new_masters(gpooler), within=10)[0]
                if turn % 2:
                    eventually(lambda new=new: len(new.children()) == 3, within=20)
                time.sleep(seed.uniform(0, 0.3))
                new.send_signal(number)
                outcome = eventually(lambda log=log: outcome_of(gpooler.log()[log:]))
                if outcome == SERVES:  # too late, so it is the end of all; by SIGTERM with the last client
                    idle.close()
                    eventually(lambda: not gpooler.is_running)
                    eventually(lambda new=new: not is_alive(new))
                    gpooler.start()
                    continue
                failed += 1
                eventually(lambda new=new: not is_alive(new))
                assert gpooler.is_running
                assert idle.execute("SELECT 1").fetchone() == (1,)
                with ExitStack() as stack, ThreadPoolExecutor(2 * POOL_SIZE) as pool:
                    clients = [stack.enter_context(gpooler.connect()) for _ in range(2 * POOL_SIZE)]
                    list(pool.map(lambda client: client.execute("SELECT pg_sleep(0.05)"), clients))
    assert failed
    assert watch.most <= POOL_SIZE
    gpooler.restart()


def test_an_old_master_that_dies_takes_its_clients_alone(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, config=PATIENT)
    old = gpooler.pid
    with gpooler.connect() as left:
        gpooler.restart(is_awaited=False)
        with gpooler.connect() as new:
            os.kill(old, signal.SIGKILL)
            with pytest.raises(psycopg.OperationalError):
                left.execute("SELECT pg_sleep(20)")
            assert new.execute("SELECT 1").fetchone() == (1,)
    eventually(lambda: len(gpooler.worker_pids()) == 2)
    gpooler.restart()


def test_a_reload_of_the_new_one_leaves_old_clients_alone(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, config=PATIENT)
    with gpooler.connect() as old:
        gpooler.restart(is_awaited=False)
        assert "pool_size" in gpooler.reload(rule={"pool_size": POOL_SIZE})
        assert old.execute("SELECT 1").fetchone() == (1,)
        gpooler.connect().close()


# --- under load ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["simple", "prepared"])
def test_nobody_feels_restarts_and_reloads(
    postgres: Postgres, gpooler_factory: Factory, protocol: str
) -> None:
    """Clients that come and go by themselves; each transaction on a connection of its own."""
    port = free_port()
    config = merge(PATIENT, {"metrics": {"prometheus_port": port}})
    gpooler = gpooler_factory(postgres, rule={"pool_size": POOL_SIZE}, config=config)
    options = ("-C", "-M", protocol)
    with (
        ServerWatch(postgres) as watch,
        Readiness(port) as readiness,
        Pgbench(find_program("pgbench"), gpooler, "SELECT 1;", 20, 60, *options) as pgbench,
    ):
        for size in (3, POOL_SIZE, 3):
            time.sleep(0.3)
            gpooler.restart()
            gpooler.reload(rule={"pool_size": size})
        time.sleep(0.5)
        assert pgbench.is_running, pgbench.output()
        assert pgbench.finish() == 0, pgbench.output()
    assert watch.most <= POOL_SIZE
    assert readiness.failures == []
    assert readiness.looks > 10


class Readiness:
    """Asks /readyz again and again, and keeps what is no "yes". A context manager."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/readyz"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.failures: list[str] = []
        self.looks = 0

    def __enter__(self) -> "Readiness":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            try:
                with urllib.request.urlopen(self._url, timeout=20) as answer:
                    answer.read()
            except urllib.error.HTTPError as error:
                self.failures.append(error.read().decode())
            except OSError as error:
                self.failures.append(str(error))
            self.looks += 1


def new_masters(gpooler: Gpooler) -> list[psutil.Process]:
    """Those that the one that runs has started."""
    children = psutil.Process(gpooler.pid).children()
    return [
        child
        for child in children
        if is_alive(child) and (title := child.cmdline()) and not re.match("gpooler: [bw]", title[0])
    ]


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
