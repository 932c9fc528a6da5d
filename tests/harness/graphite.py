"""Graphite as sites have it: the npm statsd in front of Debian's carbon; its whisper files are read back."""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from tests.harness.npm import node_modules
from tests.harness.tools import as_account, eventually, find_program, free_port, unprivileged_account

PACKAGES: Final = Path(__file__).parent / "node-statsd"
STOP_TIMEOUT_S: Final = 10
FLUSH_MS: Final = 2000  # two flushes never share a point of one second
CARBON: Final = """
[cache]
STORAGE_DIR = {directory}
LOCAL_DATA_DIR = {directory}/whisper
CONF_DIR = {directory}
LOG_DIR = {directory}
PID_DIR = {directory}
USER =
MAX_CACHE_SIZE = inf
MAX_UPDATES_PER_SECOND = inf
MAX_CREATES_PER_MINUTE = inf
LINE_RECEIVER_INTERFACE = 127.0.0.1
LINE_RECEIVER_PORT = {line}
PICKLE_RECEIVER_INTERFACE = 127.0.0.1
PICKLE_RECEIVER_PORT = {pickle}
CACHE_QUERY_INTERFACE = 127.0.0.1
CACHE_QUERY_PORT = {query}
CARBON_METRIC_INTERVAL = 0
"""
SCHEMAS: Final = "[all]\npattern = .*\nretentions = 1s:10m\n"


class Graphite:
    """statsd on ``port`` (UDP) and carbon behind it; a context manager."""

    def __init__(self) -> None:
        """Raises Unavailable."""
        self._carbon = find_program("carbon-cache")
        self._fetch = find_program("whisper-fetch")
        self._node = find_program("node")
        self._statsd = node_modules(PACKAGES) / "statsd" / "stats.js"
        self.host = "127.0.0.1"
        self.port = free_port()
        self._line = free_port()
        self._management = free_port()
        self._account = as_account(unprivileged_account())
        self._directory = Path(tempfile.mkdtemp(prefix="gpooler-graphite-"))
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Graphite":
        try:
            self._prepare()
            carbon = ["--config", str(self._directory / "carbon.conf"), "--nodaemon", "start"]
            self._start("carbon", [self._carbon, *carbon], self._account)
            eventually(lambda: self._listens("carbon", self._line), within=20)
            self.start_statsd()
        except BaseException:
            self.destroy()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()

    def start_statsd(self) -> None:
        """Start statsd, if it was stopped, and wait until it takes metrics."""
        self._start("statsd", [self._node, str(self._statsd), str(self._directory / "statsd.js")])
        eventually(lambda: self._listens("statsd", self._management), within=20)

    def stop_statsd(self) -> None:
        """Its port is closed from now on."""
        self._stop("statsd")

    def destroy(self) -> None:
        """Stop everything and remove every file."""
        for name in list(self._running):
            self._stop(name)
        shutil.rmtree(self._directory)

    def values(self, name: str) -> list[float]:
        """What whisper has of a metric of the last minutes, oldest first."""
        file = self._directory / "whisper" / (name.replace(".", "/") + ".wsp")
        if not file.exists():
            return []
        since = f"--from={int(time.time()) - 500}"
        done = subprocess.run([self._fetch, "--json", since, str(file)], capture_output=True, check=False)
        assert done.returncode == 0, f"{file} is not written yet: {done.stderr!r}"
        return [value for value in json.loads(done.stdout)["values"] if value is not None]

    def _prepare(self) -> None:
        ports = {"line": self._line, "pickle": free_port(), "query": free_port()}
        statsd = {
            "graphiteHost": self.host,
            "graphitePort": self._line,
            "address": self.host,
            "port": self.port,
            "mgmt_address": self.host,
            "mgmt_port": self._management,
            "flushInterval": FLUSH_MS,
            "graphite": {"legacyNamespace": False, "globalPrefix": ""},
        }
        for name, text in {
            "carbon.conf": CARBON.format(directory=self._directory, **ports),
            "storage-schemas.conf": SCHEMAS,
            "statsd.js": json.dumps(statsd),
        }.items():
            (self._directory / name).write_text(text)
        (self._directory / "whisper").mkdir()
        if account := self._account:
            for path in (self._directory, *self._directory.iterdir()):
                os.chown(path, account["user"], account["group"])

    def _start(self, name: str, command: list[str], account: dict[str, Any] | None = None) -> None:
        with open(self._directory / f"{name}.out", "ab") as out:
            self._running[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=self._directory,
                **(account or {}),
            )

    def _stop(self, name: str) -> None:
        process = self._running.pop(name)
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _listens(self, name: str, port: int) -> bool:
        if self._running[name].poll() is not None:
            raise RuntimeError(f"{name} ended:\n{(self._directory / f'{name}.out').read_text()}")
        try:
            socket.create_connection((self.host, port), 5).close()
        except OSError:
            return False
        return True
