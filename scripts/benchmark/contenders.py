"""Who is measured: a direct connection, PgBouncer and gpooler, each with a transaction pool of 20."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psycopg

from gpooler.stats.registry import ProcessWord
from gpooler.stats.shared import SharedCounters
from tests.harness import PASSWORD, Gpooler, Postgres, eventually, free_port
from tests.harness.tools import as_account, unprivileged_account

POOL_SIZE: Final = 20
MANY: Final = 20_000  # no limit on clients is to be in the way


@dataclass(frozen=True, slots=True)
class Target:
    """Something running that speaks PostgreSQL's protocol."""

    port: int
    user: str
    pids: tuple[int, ...] = ()  # of the pooler; empty for a direct connection
    broker_messages: Callable[[], int | None] = lambda: None
    worker_counters: Callable[[], list[SharedCounters]] = list  # of each worker; to be closed

    @property
    def dsn(self) -> str:
        """How pgbench and psql reach it."""
        return psycopg.conninfo.make_conninfo(
            host="127.0.0.1",
            port=self.port,
            user=self.user,
            dbname="app",
            password=PASSWORD,
            sslmode="disable",
        )


@dataclass(frozen=True, slots=True)
class Setting:
    """What a case asks of a contender."""

    with_md5: bool = False  # clients log in with md5 passwords, else with none
    workers: int = 1  # where there are such

    @property
    def user(self) -> str:
        """Who the clients are."""
        return "md5_user" if self.with_md5 else "trust_user"


PLAIN: Final = Setting()

# Starts a contender for one measurement.
Contender = Callable[[Postgres, Setting], AbstractContextManager[Target]]


@contextmanager
def direct(postgres: Postgres, setting: Setting) -> Iterator[Target]:
    """PostgreSQL itself."""
    yield Target(postgres.port, setting.user)


def pgbouncer(binary: str) -> Contender:
    """PgBouncer at its defaults, but for the pool and the number of clients."""

    @contextmanager
    def running(postgres: Postgres, setting: Setting) -> Iterator[Target]:
        account = unprivileged_account()
        with tempfile.TemporaryDirectory(prefix="gpooler-bench-") as name:
            directory = Path(name)
            port = free_port()
            (directory / "users").write_text(f'"md5_user" "{PASSWORD}"\n"trust_user" "{PASSWORD}"\n')
            (directory / "config").write_text(
                f"""\
[databases]
app = host={postgres.host} port={postgres.port} user=trust_user
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = {"md5" if setting.with_md5 else "trust"}
auth_file = {directory}/users
pool_mode = transaction
default_pool_size = {POOL_SIZE}
max_client_conn = {MANY}
logfile = {directory}/log
"""
            )
            if account is not None:
                for path in (directory, *directory.iterdir()):
                    os.chown(path, account.uid, account.gid)
            process = subprocess.Popen(
                [binary, "-q", str(directory / "config")], cwd=directory, **as_account(account)
            )
            target = Target(port, setting.user, (process.pid,))
            try:
                eventually(lambda: process.poll() is not None or answers(target), within=10)
                if process.poll() is not None:
                    raise RuntimeError(f"PgBouncer ended with status {process.returncode}")
                yield target
            finally:
                process.terminate()
                process.wait()

    return running


@contextmanager
def gpooler(postgres: Postgres, setting: Setting) -> Iterator[Target]:
    """Our pooler at its defaults."""
    rule: dict[str, object] = {"pool_size": POOL_SIZE}
    if setting.with_md5:
        rule |= {"authentication": "md5", "password": PASSWORD}
    config = {
        # as much as PgBouncer logs: its statistics come once a minute
        "logging": {"log_format": "%p %t %e %l [%i %s] (%c) %m", "stats_interval": 60},
        "performance": {"workers": setting.workers},
    }
    with Gpooler(postgres, rule=rule, config=config) as pooler:

        def broker_messages() -> int:
            return pooler.process_count(ProcessWord.BROKER_SENT, ProcessWord.BROKER_RECEIVED)

        pids = tuple(process.pid for process in pooler.processes())
        yield Target(pooler.port, setting.user, pids, broker_messages, pooler.worker_counters)


def answers(target: Target) -> bool:
    """Whether a query gets through."""
    with contextlib.suppress(psycopg.OperationalError), psycopg.connect(target.dsn) as connection:
        connection.execute("SELECT 1")
        return True
    return False
