"""Drivers of other languages: a program of theirs beside this file, asked line by line."""

import os
import select
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from tests.harness import Unavailable, find_program
from tests.harness.npm import node_modules

HERE: Final = Path(__file__).parent
JDBC: Final = Path("/usr/share/java/postgresql.jar")
ANSWER_S: Final = 30
INSTALL_S: Final = 40


class DriverError(Exception):
    """What the driver raised; ``code`` is the SQLSTATE where the server gave one."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text


class Foreign:
    """A running program; a context manager."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> "Foreign":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, task: str, connection: str) -> str:
        """Have it do a task on a new connection, and return what it found. Raises DriverError."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{task}\t{connection}\n".encode())
        self._process.stdin.flush()
        answer = b""
        while not answer.endswith(b"\n"):
            assert select.select([self._process.stdout], [], [], ANSWER_S)[0], f"no answer to {task}"
            part = os.read(self._process.stdout.fileno(), 65536)
            assert part, f"it ended while it did {task}"
            answer += part
        kind, *rest = answer.decode().rstrip("\n").split("\t")
        if kind == "error":
            raise DriverError(*rest)
        return rest[0]


def node() -> Foreign:
    """Node with ``pg``, which npm brings once. Raises Unavailable."""
    program, modules = find_program("node"), node_modules(HERE / "node")
    return Foreign([program, str(HERE / "node" / "driver.js")], {"NODE_PATH": str(modules)})


def jdbc(directory: Path) -> Foreign:
    """Java with PostgreSQL's JDBC driver, compiled into ``directory``. Raises Unavailable."""
    java, javac = find_program("java"), find_program("javac")
    if not JDBC.exists():
        raise Unavailable("Debian's package libpostgresql-jdbc-java is not installed")
    source = str(HERE / "jdbc" / "Driver.java")
    subprocess.run([javac, "-cp", str(JDBC), "-d", str(directory), source], check=True, timeout=INSTALL_S)
    options = ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx256m"]
    return Foreign([java, *options, "-cp", f"{directory}:{JDBC}", "Driver"], {})
