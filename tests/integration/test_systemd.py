"""What gpooler says to a service manager, and the sockets that it takes from one."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from tests.harness import Gpooler, Postgres, eventually, free_port
from tests.harness.gpooler import command

Factory = Callable[..., Gpooler]
# Becomes gpooler with the descriptor 3 as the one socket that it is handed.
ACTIVATE = (
    "import os, sys; os.environ |= {'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1'}; "
    "os.dup2(int(sys.argv[1]), 3); os.set_inheritable(3, True); os.execv(sys.argv[2], sys.argv[2:])"
)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(20)
        yield sock


def told(manager: socket.socket) -> dict[str, str]:
    """The next that is no sign of life."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        lines = dict(line.split("=", 1) for line in manager.recv(4096).decode().splitlines())
        if "WATCHDOG" not in lines:
            return lines
    raise AssertionError("nothing but signs of life")


def test_it_is_told_of_readiness_reloads_life_and_the_end(
    postgres: Postgres, gpooler_factory: Factory, manager: socket.socket
) -> None:
    environment = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "400000"}
    gpooler = gpooler_factory(postgres, environment=environment)
    first = told(manager)
    assert first["READY"] == "1"
    assert str(gpooler.port) in first["STATUS"]
    assert [manager.recv(4096) for _ in range(3)] == [b"WATCHDOG=1"] * 3
    gpooler.signal(signal.SIGHUP)
    reloading = told(manager)
    assert reloading["RELOADING"] == "1"
    assert int(reloading["MONOTONIC_USEC"]) > 0
    assert told(manager)["READY"] == "1"
    gpooler.signal(signal.SIGTERM)
    assert told(manager) == {"STOPPING": "1", "STATUS": "draining"}
    eventually(lambda: not gpooler.is_running, within=10)


def test_it_follows_an_online_restart(
    postgres: Postgres, gpooler_factory: Factory, manager: socket.socket
) -> None:
    environment = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "2000000"}
    gpooler = gpooler_factory(postgres, environment=environment)
    assert told(manager)["READY"] == "1"
    before = gpooler.pid
    gpooler.restart()
    assert told(manager) == {"MAINPID": str(gpooler.pid)}
    assert gpooler.pid != before
    assert told(manager)["READY"] == "1"
    assert manager.recv(4096) == b"WATCHDOG=1"  # by the new one: the old one says nothing any more
    assert gpooler.stop() == 0
    assert told(manager) == {"STOPPING": "1", "STATUS": "draining"}


def activated(config: Path, log: Path, given: socket.socket) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-c", ACTIVATE, str(given.fileno()), *command(), "run", "-c", str(config)],
            pass_fds=[given.fileno()], stdout=output, stderr=output, stdin=subprocess.DEVNULL,
        )  # fmt: skip


def test_sockets_that_are_handed_over_are_used(postgres: Postgres, tmp_path: Path) -> None:
    """The one at the given address; the Unix socket is gpooler's own. Clients wait meanwhile."""
    log = tmp_path / "log"
    with Gpooler(
        postgres, config={"service": {"unix_socket_dir": str(tmp_path), "unix_socket_mode": "0777"}}
    ) as template:
        text = template.config_file.read_text()
    port = free_port()
    config = tmp_path / "config.toml"
    config.write_text(
        text.replace(f"port = {template.port}", f"port = {port}") + "\n[[listen]]\nport = 6432\n"
    )
    with socket.create_server(("127.0.0.1", port)) as given:
        early = socket.create_connection(("127.0.0.1", port))  # nobody accepts it yet
        process = activated(config, log, given)
        try:
            dsn = {"user": "trust_user", "dbname": "app", "port": port}
            with psycopg.connect(host="127.0.0.1", **dsn) as connection:
                assert connection.execute("SELECT 1").fetchone() == (1,)
            psycopg.connect(host=str(tmp_path), user="trust_user", dbname="app", port=6432).close()
            early.close()
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0, log.read_text()
        assert given.fileno() >= 0


def test_a_socket_that_nobody_asks_for_is_refused(postgres: Postgres, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Gpooler(postgres) as template:
        text = template.config_file.read_text()
    config = tmp_path / "config.toml"
    config.write_text(text)
    with socket.create_server(("127.0.0.1", free_port())) as given:
        process = activated(config, log, given)
        assert process.wait(20) == 3
    assert "hands over a socket at ('127.0.0.1'," in log.read_text()


def test_the_unit_file_starts_what_there_is() -> None:
    """systemd-analyze is not everywhere: the command and the signal are looked at."""
    unit = (Path(__file__).parents[2] / "docs/gpooler.service").read_text()
    options = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line and line[0] != "#")
    assert options["Type"] == "notify"
    assert options["ExecStart"].split()[1:3] == ["run", "-c"]
    assert options["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert os.path.basename(options["ExecStart"].split()[0]) == "gpooler"
