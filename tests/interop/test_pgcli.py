"""pgcli on the console: it starts, completes, and shows tables."""

import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from tests.harness import Gpooler, Postgres, eventually
from tests.harness.console import CONSOLE

Factory = Callable[..., Gpooler]

PGCLI: Final = Path(sys.executable).with_name("pgcli")
PATIENCE: Final = 30.0


@pytest.fixture
def pool(postgres: Postgres, gpooler_factory: Factory) -> Gpooler:
    return gpooler_factory(postgres, config=CONSOLE)


@pytest.fixture
def command(pool: Gpooler, tmp_path: Path) -> list[str]:
    """pgcli with settings of its own, and a log of all that it sends."""
    settings = tmp_path / "pgclirc"
    settings.write_text(f"[main]\nlog_level = DEBUG\nlog_file = {tmp_path / 'log'}\npager = cat\n")
    return [
        str(PGCLI), "--pgclirc", str(settings), "--warn", "off", "--less-chatty",
        "-h", pool.host, "-p", str(pool.port), "-U", "admin", "pgbouncer",
    ]  # fmt: skip


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    home = {name: str(tmp_path) for name in ("HOME", "XDG_CONFIG_HOME")}
    return {**plain, **home, "TERM": "xterm", "PAGER": "cat", "PROMPT_TOOLKIT_NO_CPR": "1", "TZ": "UTC"}


def test_commands_of_one_run(command: list[str], environment: dict[str, str]) -> None:
    """What ``-c`` gives: tables, messages that say what is wrong, empty lists of what is not there."""

    def run(*commands: str) -> str:
        arguments = [word for one in commands for word in ("-c", one)]
        done = subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
        return done.stdout + done.stderr

    said = run("SHOW POOLS WHERE database = 'pgbouncer'", "SHOW STATE", "RELOAD", "\\conninfo")
    assert "| cl_active |" in said
    assert re.search(r"\| active +\| yes +\|", said)
    assert "nothing has changed" in said
    assert 'You are connected to database "pgbouncer" as user "admin"' in said
    assert 'there is no table "pool"' in run("SHOW POOL")
    for what in ("\\l", "\\d", "\\dt", "\\df", "\\dn", "\\du"):
        assert "SELECT 0" in run(what), what


def test_a_session_at_a_terminal(command: list[str], environment: dict[str, str], tmp_path: Path) -> None:
    """It asks catalogs for names to complete, over a connection of its own; nothing of that fails."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    said = bytearray()

    def reads(what: str) -> bool:
        with suppress(OSError):  # its end has no terminal any more
            while select.select([master], [], [], 0)[0]:
                said.extend(os.read(master, 65_536))
        return what in said.decode(errors="replace")

    def is_over() -> bool:
        reads("")  # or it waits for somebody to do that
        return process.poll() is not None

    def log() -> str:
        return (tmp_path / "log").read_text()

    try:
        eventually(lambda: reads("admin@"), within=PATIENCE)
        # the last query of those that fill its completer
        eventually(lambda: "Databases Query" in log() and "Functions Query" in log(), within=PATIENCE)
        os.write(master, b"SHOW VERSION;\r")
        eventually(lambda: reads("gpooler 0."), within=PATIENCE)
        os.write(master, b"\\q\r")
        eventually(is_over, within=PATIENCE)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
    assert not re.search("Traceback| ERROR - |Exception", log() + said.decode(errors="replace"))
