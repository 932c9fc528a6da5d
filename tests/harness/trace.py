"""The system calls of a running process, as strace writes them."""

import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def system_calls(strace: str, pid: int, names: str) -> Iterator[list[str]]:
    """The calls of these names by every thread, a line each, filled in at the end. May skip the test."""
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="gpooler-strace-") as directory:
        output = Path(directory) / "calls"
        command = [
            strace,
            "-f",
            "-e",
            "signal=none",
            "-e",
            f"trace={names}",
            "-o",
            str(output),
            "-p",
            str(pid),
        ]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            first = process.stderr.readline()
            if "attached" not in first:
                pytest.skip(f"strace cannot attach: {first.strip()}")
            try:
                yield lines
            finally:
                process.send_signal(signal.SIGINT)
                process.communicate(timeout=20)
        lines += output.read_text().splitlines()
