"""The master with small children: what it forks, tells, buries, and how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = textwrap.dedent("""
    import json, os, signal, sys, threading, types
    from gpooler.log import LogSettings
    from gpooler.logs.direct import open_direct
    from gpooler.net.listen import ListenSpec, bind_listeners
    from gpooler.process import control, heartbeat
    from gpooler.process.arbiter import Arbiter, EntryPoints
    from gpooler.process.datagrams import receive, send
    from pathlib import Path
    from gpooler.process.pidfile import PidFile
    from gpooler.stats.registry import RouteWord
    from gpooler.stats.shared import SharedCounters, Totals

    options = json.loads(sys.argv[1])

    def tell(**event):
        os.write(1, (json.dumps(event) + "\\n").encode())

    def obey(role, context, totals=None):
        number = getattr(context, "worker", 0)
        if role in options.get("boot_fails", ()):
            return 3
        if role in options.get("crashes", ()):
            raise LookupError("crash wanted")
        held = [name for name in ("listeners", "past", "counters") if getattr(context, name, None)]
        tell(event="started", role=role, pid=os.getpid(), incarnation=context.incarnation, held=held,
             fds=len(os.listdir("/proc/self/fd")))
        context.counters.set_process(0, role not in options.get("beats_not", ()))
        if role != "broker":
            context.counters.add_route(1, RouteWord.QUERIES, 10)
            context.counters.set_route(1, RouteWord.CLIENTS, 1)
        if role not in options.get("silent", ()):
            send(context.control, control.CODEC, control.Ready(os.getpid()))
        channels = []
        while (item := receive(context.control, control.CODEC)) is not None:
            message, fds = item
            fields = {name: getattr(message, name) for name in message.__dataclass_fields__}
            channels += fds[:1]
            if totals is not None and fds:
                totals.attach(message.worker, SharedCounters.attach(fds[1]))
            elif totals is not None and isinstance(message, control.DetachWorker):
                totals.detach(message.worker)
            else:
                for fd in fds[1:]:
                    os.close(fd)
            counted = totals.route(1)[:9] if totals else []
            tell(event=type(message).__name__, role=role, pid=os.getpid(), counted=counted, **fields)
            if isinstance(message, control.Drain) and not options.get("stays"):
                return 0
            if isinstance(message, control.DetachWorker) and options.get("complains"):
                send(context.control, control.CODEC, control.Complaint(1, options["complains"], "rude"))
        tell(event="eof", role=role, pid=os.getpid())
        return 0

    settings = LogSettings("%l %m")
    log = open_direct(settings)
    listeners = bind_listeners(
        [ListenSpec(0, "127.0.0.1", 0, 5), ListenSpec(1, None, 6432, 5)],
        unix_socket_dir=options["directory"], unix_socket_mode=0o600,
    )
    pid_file = PidFile(options["directory"] + "/pid")
    heartbeat.STALL_S = options.get("stall_s", heartbeat.STALL_S)
    if options.get("thread"):
        threading.Thread(target=signal.pause, daemon=True).start()
    if options.get("hub"):
        import gevent
        gevent.get_hub()
    service = types.SimpleNamespace(
        graceful_shutdown_timeout_ms=options.get("timeout_ms", 0), max_sigterms_to_die=3, drain_delay_ms=0
    )
    arbiter = Arbiter(
        types.SimpleNamespace(service=service), config_path=Path("unused"), workers=2,
        listeners=listeners, log=log, log_settings=settings,
        entries=EntryPoints(
            run_worker=lambda context: obey(f"worker {context.worker}", context),
            run_broker=lambda context: obey("broker", context, Totals(context.past)),
        ),
        pid_file=pid_file,
    )
    tell(event="port", port=listeners[0].port, before=len(os.listdir("/proc/self/fd")))
    status = arbiter.run()
    tell(event="after", fds=len(os.listdir("/proc/self/fd")))
    pid_file.release()
    sys.exit(status)
""")

Event = dict[str, Any]


class Master:
    """The program above, its events and its log lines."""

    def __init__(self, directory: Path, **options: object) -> None:
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps({"directory": str(directory), **options})],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.events: list[Event] = []
        self.lines: list[str] = []
        self._came = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            line = raw.decode().rstrip("\n")
            with self._came:
                if line.startswith("{"):
                    self.events.append(json.loads(line))
                else:
                    self.lines.append(line)
                self._came.notify_all()

    def event(self, **wanted: object) -> Event:
        """The latest event with these values, waited for."""
        found: list[Event] = []

        def look() -> bool:
            found[:] = [event for event in self.events if wanted.items() <= event.items()]
            return bool(found)

        self._wait(look, str(wanted))
        return found[-1]

    def line(self, text: str) -> str:
        """The latest log line that has ``text``, waited for."""
        self._wait(lambda: any(text in line for line in self.lines), text)
        return [line for line in self.lines if text in line][-1]

    def _wait(self, look: Callable[[], bool], what: str) -> None:
        with self._came:
            if not self._came.wait_for(look, timeout=20):
                raise AssertionError(f"{what} did not come in {self.events} {self.lines}")

    def end(self) -> int:
        """Wait for the end and return the exit status."""
        status = self.process.wait(20)
        self._reader.join(20)
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
        self._reader.join(20)  # every child that holds the pipe is gone
        assert self.process.stdout is not None
        self.process.stdout.close()


StartMaster = Callable[..., Master]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartMaster]:
    masters: list[Master] = []

    def start_master(**options: object) -> Master:
        masters.append(Master(tmp_path, **options))
        return masters[-1]

    yield start_master
    for master in masters:
        master.close()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def eventually(look: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not look():
        assert time.monotonic() < until
        time.sleep(0.005)


def title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode()


def test_children_are_introduced_to_each_other_and_named(start: StartMaster) -> None:
    master = start()
    line = master.line("ready: 2 workers listen on 127.0.0.1:")
    assert str(master.directory / ".s.PGSQL.6432") in line
    broker, one, two = (
        master.event(event="started", role=role) for role in ("broker", "worker 1", "worker 2")
    )
    assert len({broker["incarnation"], one["incarnation"], two["incarnation"]}) == 3
    for child, name in ((broker, "broker"), (one, "worker 1"), (two, "worker 2")):
        assert title(child["pid"]) == f"gpooler: {name}"
    master.event(event="AttachBroker", role="worker 1", incarnation=broker["incarnation"])
    master.event(event="AttachBroker", role="worker 2", incarnation=broker["incarnation"])
    master.event(event="AttachPeer", role="worker 1", worker=2, incarnation=two["incarnation"])
    master.event(event="AttachPeer", role="worker 2", worker=1, incarnation=one["incarnation"])
    serve = master.event(event="Serve", role="broker")
    attached = [e for e in master.events[: master.events.index(serve)] if e["event"] == "AttachWorker"]
    assert [(e["worker"], e["has_history"]) for e in attached] == [(1, False), (2, False)]


def test_children_hold_nothing_of_the_master_or_of_siblings(start: StartMaster) -> None:
    master = start()
    master.line("ready")
    # 0-2, control, own counters twice (mmap keeps a copy), the directory being listed
    assert (
        master.event(event="started", role="worker 2")["fds"] == 3 + 1 + 2 + 1 + 2 + 2
    )  # listeners, the past
    assert master.event(event="started", role="broker")["fds"] == 3 + 1 + 2 + 1 + 2  # and the past


def test_killed_worker_has_a_successor_and_its_counts_are_kept(start: StartMaster) -> None:
    master = start()
    master.line("ready")
    first = master.event(event="started", role="worker 1")
    os.kill(first["pid"], signal.SIGKILL)
    master.line(f"worker 1 (pid {first['pid']}) was ended by signal 9; starting another")
    gone = master.event(event="DetachWorker", role="broker", worker=1, incarnation=first["incarnation"])
    master.event(event="DetachPeer", role="worker 2", worker=1, incarnation=first["incarnation"])
    assert (gone["counted"][0], gone["counted"][8]) == (1, 20)
    attach = master.event(event="AttachWorker", role="broker", worker=1, incarnation=first["incarnation"] + 2)
    assert attach["has_history"] is False
    master.event(event="AttachPeer", role="worker 2", worker=1, incarnation=first["incarnation"] + 2)
    successor = master.event(event="started", role="worker 1", incarnation=first["incarnation"] + 2)
    master.event(event="AttachBroker", role="worker 1", pid=successor["pid"])
    assert title(successor["pid"]) == "gpooler: worker 1"
    assert is_alive(master.event(event="started", role="worker 2")["pid"])


def test_killed_broker_has_a_successor_that_meets_workers_with_a_history(start: StartMaster) -> None:
    master = start()
    master.line("ready")
    first = master.event(event="started", role="broker")
    os.kill(first["pid"], signal.SIGKILL)
    second = first["incarnation"] + 3
    successor = master.event(event="started", role="broker", incarnation=second)
    for worker in (1, 2):
        master.event(event="AttachWorker", pid=successor["pid"], worker=worker, has_history=True)
        master.event(event="AttachBroker", role=f"worker {worker}", incarnation=second)
    master.event(event="Serve", pid=successor["pid"])


@pytest.mark.parametrize("role", ["worker 1", "broker"])
def test_child_that_cannot_boot_ends_everything(start: StartMaster, role: str) -> None:
    master = start(boot_fails=[role])
    assert master.end() == 3
    assert "could not boot" in master.line(f"fatal {role}")
    pids = [event["pid"] for event in master.events if event["event"] == "started"]
    assert not any(is_alive(pid) for pid in pids)
    assert not (master.directory / "pid").exists()


def test_child_that_crashes_at_each_boot_is_given_up(start: StartMaster) -> None:
    master = start(crashes=["worker 2"])
    assert master.end() == 3
    assert len([line for line in master.lines if "LookupError: crash wanted" in line]) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_drain_refuses_clients_lets_workers_finish_and_ends_the_broker(
    start: StartMaster, number: signal.Signals
) -> None:
    master = start()
    master.line("ready")
    port = master.event(event="port")["port"]
    socket.create_connection(("127.0.0.1", port)).close()
    os.kill(master.process.pid, number)
    assert master.end() == 0
    master.event(event="Drain", role="worker 1")
    master.event(event="Drain", role="worker 2")
    master.event(event="eof", role="broker")
    assert len([event for event in master.events if event["event"] == "started"]) == 3
    assert list(master.directory.iterdir()) == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    before, after = master.event(event="port")["before"], master.event(event="after")["fds"]
    assert after == before - 3  # two listeners and the socket's lock; nothing else is left


def test_drain_that_takes_too_long_ends_with_124(start: StartMaster) -> None:
    master = start(stays=True, timeout_ms=50)
    master.line("ready")
    os.kill(master.process.pid, signal.SIGTERM)
    assert master.end() == 124
    assert not any(is_alive(event["pid"]) for event in master.events if event["event"] == "started")


def test_worker_that_dies_while_draining_is_not_replaced_but_the_broker_is(start: StartMaster) -> None:
    master = start(stays=True)
    master.line("ready")
    os.kill(master.process.pid, signal.SIGTERM)
    master.event(event="Drain", role="worker 1")
    broker = master.event(event="started", role="broker")
    os.kill(broker["pid"], signal.SIGKILL)
    master.event(event="started", role="broker", incarnation=broker["incarnation"] + 3)
    for role in ("worker 1", "worker 2"):
        os.kill(master.event(event="started", role=role)["pid"], signal.SIGKILL)
    assert master.end() == 0
    assert len([event for event in master.events if event["event"] == "started"]) == 4


def test_the_third_signal_exits_at_once_with_1(start: StartMaster) -> None:
    master = start(stays=True)
    master.line("ready")
    # Equal signals merge while they are pending, so each is waited for.
    for number, text in (
        (1, "got SIGTERM: draining"),
        (2, "SIGTERM again (2 of 3)"),
        (3, "SIGTERM again (3 of 3)"),
    ):
        os.kill(master.process.pid, signal.SIGTERM)
        assert master.line(text), number
    assert master.end() == 1


def test_usr1_reopens_logs_everywhere(start: StartMaster) -> None:
    master = start()
    master.line("ready")
    os.kill(master.process.pid, signal.SIGUSR1)
    for role in ("broker", "worker 1", "worker 2"):
        master.event(event="ReopenLog", role=role)
    master.line("log reopened")


def test_signals_to_the_whole_group_reach_children_only_through_the_master(start: StartMaster) -> None:
    master = start(stays=True)
    master.line("ready")
    pids = [master.event(event="started", role=role)["pid"] for role in ("broker", "worker 1", "worker 2")]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        for pid in pids:
            os.kill(pid, number)
    os.kill(master.process.pid, signal.SIGUSR1)
    for pid in pids:
        master.event(event="ReopenLog", pid=pid)


def test_children_end_when_the_master_is_killed(start: StartMaster) -> None:
    master = start()
    master.line("ready")
    pids = [master.event(event="started", role=role)["pid"] for role in ("broker", "worker 1", "worker 2")]
    master.process.kill()
    master.process.wait(20)
    eventually(lambda: not any(is_alive(pid) for pid in pids))


def test_worker_the_broker_complains_about_is_killed(start: StartMaster) -> None:
    master = start(complains=2)
    master.line("ready")
    one, two = (master.event(event="started", role=role) for role in ("worker 1", "worker 2"))
    assert one["incarnation"] == 2
    os.kill(two["pid"], signal.SIGKILL)
    assert "rude" in master.line(f"worker 1 (pid {one['pid']}) is refused by the broker")
    master.event(event="DetachWorker", worker=1, incarnation=2)


@pytest.mark.parametrize(
    ("option", "text"), [("thread", "fork with 2 threads"), ("hub", "with a gevent hub")]
)
def test_master_with_a_thread_or_a_hub_does_not_fork(start: StartMaster, option: str, text: str) -> None:
    master = start(**{option: True})
    assert master.end() == 1
    master.line(text)
    assert not [event for event in master.events if event["event"] == "started"]


def test_a_second_gpooler_with_the_same_files_is_refused(start: StartMaster) -> None:
    master = start()
    master.line("ready")
    second = start()
    assert second.end() == 1
    second.line("another process holds its lock")
    assert master.process.poll() is None
    assert (master.directory / "pid").read_text() == f"{master.process.pid}\n"
    assert (master.directory / ".s.PGSQL.6432").is_socket()
