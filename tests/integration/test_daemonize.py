"""[service] daemonize: the command ends when the daemon serves, and says why where it does not."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import psutil
import psycopg
import pytest
import toml

from tests.harness import Gpooler, Postgres, eventually, free_port
from tests.harness.gpooler import basic_config, command, merge

Factory = Callable[..., Gpooler]
PROGRAM: Final = f"""
import os, signal, sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from gpooler.process.arbiter import EntryPoints
from gpooler.process.launch import launch

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background commands ignore it

def run(context):
    ACT
    return 0

sys.exit(launch(Path("config.toml"), EntryPoints(run, run)))
"""


class Daemon:
    """A directory with a configuration of relative paths, and what is started from it."""

    def __init__(self, postgres: Postgres, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.config = merge(
            basic_config(postgres, self.port, {}),
            {
                "service": {"daemonize": True, "pid_file": "pid"},
                "logging": {"log_file": "log"},
                "performance": {"workers": 2},
            },
        )
        self.environment = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"}

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Its end is the end of whatever holds its output, too."""
        (self.directory / "config.toml").write_text(toml.dumps(self.config))
        return subprocess.run(
            [*command(), *words, "-c", "config.toml"],
            cwd=self.directory, env=self.environment, timeout=60, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def program(self, act: str) -> list[str]:
        """gpooler with children that do nothing but ``act``."""
        (self.directory / "config.toml").write_text(toml.dumps(self.config))
        return [sys.executable, "-c", PROGRAM.replace("ACT", act)]

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def master(self) -> psutil.Process:
        text = (self.directory / "pid").read_text()
        assert text, "the pid file is not written yet"
        return psutil.Process(int(text))

    def kill(self) -> None:
        if (self.directory / "pid").exists():
            master = self.master()
            family = [*master.children(recursive=True), master]
            for process in family:
                process.kill()
            eventually(lambda: not any(map(is_alive, family)), within=20)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def daemon(postgres: Postgres) -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(prefix="gpooler-daemon-") as directory:
        daemon = Daemon(postgres, Path(directory))
        yield daemon
        daemon.kill()


def files_of(process: psutil.Process) -> list[str]:
    return [os.readlink(path) for path in Path(f"/proc/{process.pid}/fd").iterdir()]


def ask(daemon: Daemon) -> None:
    with psycopg.connect(host="127.0.0.1", port=daemon.port, user="trust_user", dbname="app") as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_the_command_ends_when_the_daemon_serves_and_the_daemon_is_nobodys(daemon: Daemon) -> None:
    done = daemon.command("run")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    ask(daemon)  # at once
    master = daemon.master()
    assert os.getsid(master.pid) == os.getpgid(master.pid) == master.pid
    assert os.getsid(master.pid) != os.getsid(0)
    assert "gpooler: master" in master.cmdline()[0]
    assert master.cwd() == str(daemon.directory)
    family = [master, *master.children(recursive=True)]
    assert len(family) == 4
    pipes: list[str] = []
    for process in family:
        files = {path.name: os.readlink(path) for path in Path(f"/proc/{process.pid}/fd").iterdir()}
        assert [files[name] for name in "012"] == [os.devnull] * 3
        pipes += {link for link in files.values() if link.startswith("pipe:")}
    assert len(pipes) == len(set(pipes)), "the pipe to the command is in several processes"
    assert len([link for link in files_of(master) if link.startswith("pipe:")]) == 2, "that of signals"
    assert f"{master.pid} " in daemon.log.splitlines()[0]
    master.terminate()
    eventually(lambda: not any(map(is_alive, family)), within=20)
    assert "gpooler ends with status 0" in daemon.log
    assert not (daemon.directory / "pid").exists()


def test_a_daemon_is_reloaded_though_the_path_of_its_configuration_is_relative(daemon: Daemon) -> None:
    assert daemon.command("run").returncode == 0
    daemon.config = merge(daemon.config, {"logging": {"log_debug": True}, "service": {"daemonize": False}})
    answer = daemon.command("reload").stdout
    assert "logging.log_debug: false → true: now" in answer
    assert "service.daemonize: true → false: needs a restart" in answer
    ask(daemon)
    eventually(lambda: "debug" in daemon.log, within=20)
    (first, second) = [process for process in daemon.master().children() if "worker" in process.cmdline()[0]]
    first.kill()
    eventually(lambda: "starting another" in daemon.log, within=20)
    second.kill()
    eventually(lambda: len(daemon.master().children()) == 3, within=20)
    eventually(lambda: ask(daemon) is None, within=20)


def test_errors_before_the_terminal_is_left_are_seen_there(daemon: Daemon) -> None:
    with socket.create_server(("127.0.0.1", daemon.port)):
        done = daemon.command("run")
    assert done.returncode == 3
    assert f"gpooler: could not listen on 127.0.0.1:{daemon.port}" in done.stderr
    assert "the log says why" not in done.stderr
    assert not (daemon.directory / "pid").exists()


def test_a_second_daemon_does_not_start(daemon: Daemon) -> None:
    assert daemon.command("run").returncode == 0
    first = daemon.master().pid
    done = daemon.command("run")
    assert done.returncode == 3
    assert f'pid_file "pid" is held by another gpooler (pid {first})' in done.stderr
    assert daemon.master().pid == first
    ask(daemon)


@pytest.mark.parametrize(
    ("act", "status"),
    [("return 3", 3), ("os.kill(int(Path('pid').read_text()), signal.SIGKILL)", 128 + signal.SIGKILL)],
)
def test_what_fails_in_a_child_is_in_the_log_which_the_command_says(
    daemon: Daemon, act: str, status: int
) -> None:
    done = subprocess.run(
        daemon.program(act), cwd=daemon.directory, timeout=60, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr == "gpooler: could not start: the log says why\n"
    if status == 3:
        assert "could not boot" in daemon.log
        assert not (daemon.directory / "pid").exists()
    else:
        (daemon.directory / "pid").unlink()


def test_who_interrupts_the_command_ends_the_daemon(daemon: Daemon) -> None:
    with subprocess.Popen(
        daemon.program("time.sleep(60)"), cwd=daemon.directory, stderr=subprocess.DEVNULL
    ) as process:
        eventually(lambda: daemon.master().children(), within=20)
        master = daemon.master()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) != 0
    assert not is_alive(master)
    assert "got SIGTERM: draining" in daemon.log


def test_a_configuration_that_is_wrong_is_told_before_anything_else(daemon: Daemon) -> None:
    daemon.config = merge(daemon.config, {"service": {"daemonise": True}})
    done = daemon.command("run")
    assert done.returncode == 1
    assert 'did you mean "daemonize"' in done.stderr
    assert not (daemon.directory / "log").exists()


def test_without_a_log_the_check_warns(daemon: Daemon) -> None:
    assert daemon.command("check").stderr == ""
    daemon.config = merge(daemon.config, {"logging": {"log_file": None}})
    checked = daemon.command("check")
    assert checked.returncode == 0
    assert checked.stderr.count("warning") == 1
    assert "service.daemonize: leaves no log" in checked.stderr
    assert daemon.command("run").returncode == 0
    ask(daemon)


def test_a_service_manager_keeps_its_process(postgres: Postgres, gpooler_factory: Factory) -> None:
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"{directory}/notify")
        gpooler = gpooler_factory(
            postgres,
            config={"service": {"daemonize": True}},
            environment={"NOTIFY_SOCKET": f"{directory}/notify"},
        )
        assert gpooler.is_running
        assert (
            "service.daemonize: is ignored: a service manager watches this process (NOTIFY_SOCKET is set)"
            in gpooler.log()
        )
        assert gpooler.stop(signal.SIGTERM) == 0


def test_an_online_restart_of_a_daemon_makes_a_daemon(daemon: Daemon) -> None:
    assert daemon.command("run").returncode == 0
    before = daemon.master()
    daemon.config = merge(daemon.config, {"service": {"daemonize": False}})
    answer = daemon.command("restart")
    assert answer.returncode == 0, answer.stderr
    eventually(lambda: not is_alive(before), within=20)
    master = daemon.master()
    assert master.pid != before.pid
    assert os.getsid(master.pid) != os.getsid(0)
    ask(daemon)
    for process in (master, *master.children()):
        assert [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in range(3)] == [os.devnull] * 3
    assert "service.daemonize: stays as it is in an online restart" in daemon.log
