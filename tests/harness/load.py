"""Load and what is watched under it: pgbench in the background, the highest number of servers ever seen."""

import signal
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psycopg

from tests.harness.gpooler import Gpooler
from tests.harness.postgres import PASSWORD, Postgres
from tests.harness.tools import eventually


class Pgbench:
    """pgbench with a script of one's own until ``finish``. A context manager."""

    def __init__(
        self,
        program: str,
        gpooler: Gpooler,
        script: str = "SELECT 1;",
        clients: int = 8,
        seconds: int = 60,
        *options: str,
    ) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="gpooler-pgbench-")
        path = Path(self._directory.name)
        (path / "script.sql").write_text(script)
        self._output = open(path / "output", "w+b")  # noqa: SIM115  # closed at the end
        self._process = subprocess.Popen(
            [
                program, "-n", "-f", str(path / "script.sql"), "-c", str(clients), "-T", str(seconds),
                *options, "-h", gpooler.host, "-p", str(gpooler.port), "-U", "trust_user", "app",
            ],
            stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output,
            env={"PGPASSWORD": PASSWORD, "PATH": "/usr/bin:/bin"},
        )  # fmt: skip

    def __enter__(self) -> "Pgbench":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._output.close()
        self._directory.cleanup()

    @property
    def is_running(self) -> bool:
        """Whether it still sends queries; one that saw an error ends early or says so in ``output``."""
        return self._process.poll() is None

    def output(self) -> str:
        """All it has said."""
        return Path(self._output.name).read_text()

    def finish(self) -> int:
        """Let the transactions under way end, and it with them; the exit status."""
        self._process.send_signal(signal.SIGALRM)  # as its own timer does
        return self.wait()

    def wait(self, timeout: float = 60) -> int:
        """The exit status, 0 when no client saw an error."""
        return self._process.wait(timeout)


class ServerWatch:
    """The most client backends that pg_stat_activity has shown at once. A context manager.

    Goes on when PostgreSQL is away for a while; fails at the end if it never had an answer.
    """

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.most = 0
        self.looks = 0
        self.failure: Exception | None = None

    def __enter__(self) -> "ServerWatch":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self._look_once_more()
        self._stop.set()
        self._thread.join()
        if kind is None and self.failure is not None:
            raise self.failure
        assert kind is not None or self.looks, "nothing was seen"

    def _run(self) -> None:
        try:
            while not self._stop.wait(0.01):
                with suppress(psycopg.OperationalError), self._postgres.connect() as connection:
                    self._look(connection)
        except Exception as error:  # noqa: BLE001  # told at the end
            self.failure = error

    def _look_once_more(self) -> None:
        """Let what has just been opened become old enough to be counted."""
        enough = self.looks + 4
        with suppress(AssertionError):  # PostgreSQL is away
            eventually(lambda: self.looks >= enough, within=2)

    def _look(self, connection: psycopg.Connection[Any]) -> None:
        while not self._stop.wait(0.01):
            row = connection.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
                " AND application_name <> 'harness' AND usename IS NOT NULL"
                # a connection of our own has neither name nor state for a moment
                " AND NOT (application_name = '' AND state IS NULL)"
            ).fetchone()
            self.most = max(self.most, row[0] if row else 0)
            self.looks += 1
