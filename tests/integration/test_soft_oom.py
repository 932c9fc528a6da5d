"""[soft_oom]: with too much memory in use new clients are refused, and the largest processes signalled."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import psutil
import psycopg
import pytest

from gpooler.process.memory import Consumer, largest, measure
from gpooler.reasons import Reason
from gpooler.stats.registry import ERROR_BASE, ProcessWord
from tests.harness import Gpooler, Postgres, eventually, free_port
from tests.harness.client import ServerError
from tests.harness.console import CONSOLE, console
from tests.harness.postgres import PASSWORD
from tests.harness.scrape import Scraper
from tests.harness.tools import unprivileged_account

Factory = Callable[..., Gpooler]
MB: Final = 1 << 20
# Takes a name, and some memory that is its own; says so, and waits for a signal.
HOG: Final = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None)
libc.prctl(15, sys.argv[1].encode(), 0, 0, 0)
ballast = bytearray(os.urandom(1 << 20)) * int(sys.argv[2])
for _ in range(int(sys.argv[3])):
    if os.fork() == 0:
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)
        ballast = bytearray(os.urandom(1 << 20)) * int(sys.argv[2])
        break
print(os.getpid(), flush=True)
signal.pause()
"""
START: Final = "memory is short, new clients are refused"
END: Final = "memory is short no more"


@contextmanager
def hog(name: str, mb: int, children: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A process of that name with some MB of its own, and children that have as much."""
    arguments = [sys.executable, "-c", HOG, name, str(mb), str(children)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(1 + children):
            assert process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def name() -> str:
    """What no other process has in its name; longer ones begin with it."""
    return f"hog{free_port()}"


def refused(gpooler: Gpooler, **parameters: Any) -> str:
    """The text of the error that a new client gets."""
    with pytest.raises(psycopg.OperationalError) as caught:
        gpooler.connect(**parameters)
    return str(caught.value)


def ask(gpooler: Gpooler, **parameters: Any) -> None:
    with gpooler.connect(**parameters) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def is_short(gpooler: Gpooler) -> bool:
    return gpooler.process_count(ProcessWord.SOFT_OOM_SHORT) == 1


def options(name: str, mb: int, **more: Any) -> dict[str, Any]:
    return {"soft_oom": {"limit": f"{mb}MB", "process": name, "check_interval_ms": 50, **more}}


@pytest.mark.parametrize("authentication", ["none", "md5", "scram-sha-256"])
def test_new_clients_are_refused_after_authentication_while_memory_is_short(
    postgres: Postgres, gpooler_factory: Factory, name: str, authentication: str
) -> None:
    gpooler = gpooler_factory(
        postgres,
        rule={"authentication": authentication, "password": PASSWORD},
        config={**CONSOLE, **options(name, 32)},
    )
    for _ in range(8):  # both ways in, of both workers
        ask(gpooler)
    with gpooler.connect() as before:
        with hog(name, 48):
            eventually(lambda: is_short(gpooler), within=20)
            for parameters in ({}, {"user": "another"}):
                told = refused(gpooler, **parameters)
                assert "FATAL:  gpooler: c" in told
                assert "out of memory: no new clients are taken while soft_oom.limit is exceeded" in told
            with gpooler.raw() as client, pytest.raises(ServerError) as caught:
                client.login()
            assert caught.value.sqlstate == "53200"
            if authentication != "none":
                assert "password authentication failed" in refused(gpooler, password="wrong")
            assert before.execute("SELECT 1").fetchone() == (1,)
            with console(gpooler) as control:  # its clients come in
                row = control.one("SOFT_OOM")
            assert (row["process"], row["limit_bytes"], row["is_short"]) == (name, 32 * MB, True)
            assert row["used_bytes"] > 32 * MB
            assert (row["refused_clients"], row["signals"]) == (3, 0)
        eventually(lambda: not is_short(gpooler), within=20)
        for _ in range(8):
            ask(gpooler)
    eventually(lambda: END in gpooler.log())
    log = gpooler.log()
    assert (log.count(START), log.count(END)) == (1, 1)
    assert log.count("login refused: 53200") == 3


def test_metrics_tell_of_memory_and_of_refusals(
    postgres: Postgres, gpooler_factory: Factory, name: str
) -> None:
    scraper = Scraper(free_port())
    config = {"metrics": {"prometheus_port": scraper.port}, **options(name, 32)}
    gpooler = gpooler_factory(postgres, config=config)
    ask(gpooler)

    def told(metric: str) -> float:
        return scraper.scrape().value(f"gpooler_soft_oom_{metric}")

    assert (told("limit_bytes"), told("used_bytes"), told("short")) == (32 * MB, 0, 0)
    with hog(name, 48):
        eventually(lambda: told("short") == 1, within=20)
        assert told("used_bytes") > 32 * MB
        refused(gpooler)
        refused(gpooler)
        assert told("refused_clients_total") == 2
        assert gpooler.route_count(ERROR_BASE + Reason.SOFT_OOM) == 2  # type: ignore[arg-type]


def test_a_reload_begins_changes_and_ends_it(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres)
    ask(gpooler)
    # of the whole machine something is always in use
    assert "soft_oom: added: now" in gpooler.reload(config={"soft_oom": {"limit": "1B"}})
    eventually(lambda: is_short(gpooler), within=20)
    assert "out of memory" in refused(gpooler)
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < gpooler.process_count(ProcessWord.SOFT_OOM_USED) < most
    answer = gpooler.reload(config={"soft_oom": {"limit": 2 * most}})
    assert f"soft_oom.limit: 1 → {2 * most}: now" in answer
    eventually(lambda: not is_short(gpooler), within=20)
    ask(gpooler)
    gpooler.reload(config={"soft_oom": {"limit": "1B"}})
    eventually(lambda: is_short(gpooler), within=20)
    assert "soft_oom: removed: now" in gpooler.reload(config={"soft_oom": None})
    assert not is_short(gpooler)
    ask(gpooler)
    eventually(lambda: "soft_oom is off" in gpooler.log())


def test_the_next_broker_goes_on_with_a_shortage(
    postgres: Postgres, gpooler_factory: Factory, name: str
) -> None:
    gpooler = gpooler_factory(postgres, config=options(name, 32))
    with hog(name, 48):
        eventually(lambda: is_short(gpooler), within=20)
        eventually(lambda: START in gpooler.log())
        first = gpooler.broker_pid()
        os.kill(first, signal.SIGKILL)
        assert "out of memory" in refused(gpooler)
        eventually(lambda: gpooler.broker_pid() != first, within=20)
        assert "out of memory" in refused(gpooler)
    eventually(lambda: not is_short(gpooler), within=20)
    ask(gpooler)
    eventually(lambda: END in gpooler.log())
    assert (gpooler.log().count(START), gpooler.log().count(END)) == (1, 1)


def test_an_online_restart_goes_on_with_it(postgres: Postgres, gpooler_factory: Factory, name: str) -> None:
    gpooler = gpooler_factory(postgres, config=options(name, 32))
    gpooler.restart()
    ask(gpooler)
    with hog(name, 48):
        eventually(lambda: is_short(gpooler), within=20)
        assert "out of memory" in refused(gpooler)
        gpooler.restart()
        eventually(lambda: is_short(gpooler), within=20)
        assert "out of memory" in refused(gpooler)
    eventually(lambda: not is_short(gpooler), within=20)
    ask(gpooler)


def test_the_largest_are_told_to_go_until_there_is_enough(
    postgres: Postgres, gpooler_factory: Factory, name: str
) -> None:
    drop = {"signal": "term", "max_rate": 1}
    with hog(f"{name}a", 20) as small, hog(f"{name}b", 90) as large, hog(f"{name}c", 60) as middle:
        gpooler = gpooler_factory(postgres, config=options(name, 64, check_interval_ms=1000, drop=drop))
        assert large.wait(20) == middle.wait(20) == -signal.SIGTERM
        eventually(lambda: not is_short(gpooler), within=20)
        assert small.poll() is None
        ask(gpooler)
        eventually(lambda: END in gpooler.log())
        log = gpooler.log()
        first, second = (log.index(f"sent SIGTERM to {name}{end} (pid ") for end in "bc")
        assert first < second
        assert f"sent SIGTERM to {name}b (pid {large.pid}), which has " in log
        assert f"{name}a" not in log
        assert gpooler.process_count(ProcessWord.SOFT_OOM_SIGNALS) == log.count("sent SIGTERM")


def test_a_process_whose_children_are_among_them_is_spared(
    postgres: Postgres, gpooler_factory: Factory, name: str
) -> None:
    with hog(name, 20, children=2) as parent:
        # more than all of them together once the children are gone
        gpooler_factory(postgres, config=options(name, 48, drop={"signal": "SIGKILL", "max_rate": 5}))
        eventually(lambda: not has_children(parent), within=20)
        assert parent.poll() is None


def has_children(parent: subprocess.Popen[str]) -> bool:
    """Whether some of them live."""
    children = psutil.Process(parent.pid).children()
    return any(child.status() != psutil.STATUS_ZOMBIE for child in children)


def test_who_heeds_no_signal_does_not_keep_it_from_the_others(
    postgres: Postgres, gpooler_factory: Factory, name: str
) -> None:
    drop = {"signal": "CONT", "max_rate": 1}  # goes on as before
    with hog(f"{name}a", 20) as one, hog(f"{name}b", 40) as other:
        gpooler = gpooler_factory(postgres, config=options(name, 32, drop=drop))
        lines = [f"sent SIGCONT to {name}{end} (pid {hog.pid})" for end, hog in (("a", one), ("b", other))]
        eventually(lambda: all(gpooler.log().count(line) > 1 for line in lines), within=20)
        log = gpooler.log()
        counts = [log.count(line) for line in lines]
        assert abs(counts[0] - counts[1]) <= 1


def test_gpooler_signals_neither_its_master_nor_its_broker(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    # others may run gpoolers on this machine: a signal that does nothing
    drop = {"signal": "WINCH", "max_rate": 1000}
    gpooler = gpooler_factory(postgres, config=options("gpooler: ", 1, drop=drop))
    (worker,) = gpooler.worker_pids()
    eventually(lambda: f"(pid {worker}), which has" in gpooler.log(), within=20)  # it is named, after all
    for pid in (gpooler.pid, gpooler.broker_pid()):
        assert f"(pid {pid}), which has" not in gpooler.log()


def test_the_largest_come_first_and_parents_not_at_all() -> None:
    processes = [
        Consumer(pid, "x", size, parent, 0)
        for pid, size, parent in ((10, 900, 1), (11, 5, 10), (12, 7, 10), (13, 800, 1), (14, 7, 1))
    ]
    assert [consumer.pid for consumer in largest(processes, {13})] == [12, 14, 11]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_what_may_not_be_read_is_not_counted_but_told(name: str) -> None:
    account = unprivileged_account()
    assert account is not None
    with hog(name, 8):
        seen = measure(name)
        assert (len(seen.consumers), seen.unread) == (1, 0)
        assert seen.bytes == seen.consumers[0].bytes > 8 * MB
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setuid(account.uid)
            blind = measure(name)
            os.write(writer, f"{blind.bytes} {len(blind.consumers)} {blind.unread}".encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            assert pipe.read() == "0 0 1"
        os.waitpid(pid, 0)
