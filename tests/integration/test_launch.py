"""From a configuration file to the arbiter, with children that only wait."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.harness.tools import eventually, find_program, free_port

ROOT = Path(__file__).parents[2]
PROGRAM = textwrap.dedent("""
    import os, resource, sys
    from pathlib import Path
    from gpooler.process import control
    from gpooler.process.arbiter import EntryPoints
    from gpooler.process.datagrams import receive, send
    from gpooler.process.launch import launch

    def run(context):
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        os.write(1, f"child {context.is_debug} {limits[0] == limits[1]}\\n".encode())
        send(context.control, control.CODEC, control.Ready(os.getpid()))
        while (item := receive(context.control, control.CODEC)) is not None:
            for fd in item[1]:
                os.close(fd)
            if isinstance(item[0], control.Drain):
                return 0
        return 0

    sys.exit(launch(Path(sys.argv[1]), EntryPoints(run, run)))
""")
CONFIG = """
[service]
pid_file = "{directory}/pid"
[logging]
log_format = "%l %m"
log_config = true
log_file = "{directory}/log"
[performance]
workers = 1
cache_coroutine = 9
[[listen]]
host = "127.0.0.1"
port = {port}
[storage.pg]
type = "remote"
host = "127.0.0.1"
[database.default.user.default]
authentication = "clear_text"
password = "do-not-tell"
storage = "pg"
pool = "session"
"""


def launch(directory: Path, config: str, most_files: int = 0) -> subprocess.Popen[str]:
    path = directory / "config.toml"
    path.write_text(config)
    limited = [find_program("prlimit"), f"--nofile={most_files}"] if most_files else []
    return subprocess.Popen(
        [*limited, sys.executable, "-c", PROGRAM, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "GPOOLER_DEBUG": "1"},
    )


def test_a_run_logs_serves_and_leaves_nothing(tmp_path: Path) -> None:
    port = free_port()
    log = tmp_path / "log"
    with launch(tmp_path, CONFIG.format(directory=tmp_path, port=port)) as process:
        eventually(lambda: log.exists() and "ready: 1 workers" in log.read_text())
        assert (tmp_path / "pid").read_text() == f"{process.pid}\n"
        assert Path(f"/proc/{process.pid}/cmdline").read_bytes().startswith(b"gpooler: master")
        socket.create_connection(("127.0.0.1", port)).close()
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert errors == ""
    assert out.count("child True True\n") == 2
    text = log.read_text()
    assert "info warning: " in text
    assert "cache_coroutine" in text
    assert "do-not-tell" not in text + out
    assert "ends with status 0" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "log"]


def test_too_few_open_files_are_told_at_the_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    config = CONFIG.format(directory=tmp_path, port=free_port()) + "\n[limits]\nclient_max = 1000\n"
    with launch(tmp_path, config, most_files=1000) as process:
        eventually(lambda: log.exists() and "ready: 1 workers" in log.read_text())
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert "a process may open 1000 files, but this configuration may need 1064" in log.read_text()


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        (("pool = ", "pol = "), 1, "error: "),
        (('host = "127.0.0.1"\nport', 'host = "192.0.2.1"\nport'), 3, "could not listen on 192.0.2.1"),
        (("/pid", "/missing/pid"), 3, "could not open pid_file"),
    ],
)
def test_what_cannot_start_says_why_and_ends(
    tmp_path: Path, change: tuple[str, str], status: int, told: str
) -> None:
    config = CONFIG.replace(*change).format(directory=tmp_path, port=free_port())
    with launch(tmp_path, config) as process:
        out, errors = process.communicate(timeout=20)
    assert process.returncode == status
    assert told in out + errors
    assert "child" not in out
