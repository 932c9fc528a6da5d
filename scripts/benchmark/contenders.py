"""Who is measured: a direct connection, PgBouncer and gpooler, each with a transaction pool of 20."""

import contextlib
import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psycopg
import trustme

from gpooler.auth.scram import Verifier
from gpooler.stats.registry import ProcessWord
from gpooler.stats.shared import SharedCounters
from tests.harness import PASSWORD, Gpooler, Postgres, eventually, free_port
from tests.harness.console import CONSOLE
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
    has_tls: bool = False
    metrics_port: int = 0  # where Prometheus would ask; 0: nowhere

    @property
    def dsn(self) -> str:
        """How pgbench and psql reach it."""
        return psycopg.conninfo.make_conninfo(
            host="127.0.0.1",
            port=self.port,
            user=self.user,
            dbname="app",
            password=PASSWORD,
            sslmode="require" if self.has_tls else "disable",
        )


@dataclass(frozen=True, slots=True)
class Setting:
    """What a case asks of a contender."""

    authentication: str = "none"  # how clients log in: or md5, or scram-sha-256
    has_tls: bool = False  # with clients
    workers: int = 1  # where there are such
    metrics: bool | None = None  # all of them, or none; None: at the defaults
    routes: int = 0  # besides the one that is measured: databases route_0, route_1 …
    has_console: bool = False  # the database pgbouncer, for its user admin

    @property
    def user(self) -> str:
        """Who the clients are."""
        return {"none": "trust_user", "md5": "md5_user"}.get(self.authentication, "scram_user")


PLAIN: Final = Setting()
# With a verifier neither pooler derives keys from a password.
VERIFIER: Final = Verifier.build(PASSWORD.encode(), b"0123456789abcdef").format()

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
            users = {"md5_user": PASSWORD, "trust_user": PASSWORD, "scram_user": VERIFIER}
            (directory / "users").write_text("".join(f'"{user}" "{text}"\n' for user, text in users.items()))
            tls = ""
            if setting.has_tls:
                make_certificate(directory)
                tls = f"""\
client_tls_sslmode = require
client_tls_cert_file = {directory}/cert.pem
client_tls_key_file = {directory}/key.pem
"""
            (directory / "config").write_text(
                f"""\
[databases]
app = host={postgres.host} port={postgres.port} user=trust_user
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = {"trust" if setting.authentication == "none" else setting.authentication}
auth_file = {directory}/users
pool_mode = transaction
default_pool_size = {POOL_SIZE}
max_client_conn = {MANY}
logfile = {directory}/log
{tls}"""
            )
            if account is not None:
                for path in (directory, *directory.iterdir()):
                    os.chown(path, account.uid, account.gid)
            process = subprocess.Popen(
                [binary, "-q", str(directory / "config")], cwd=directory, **as_account(account)
            )
            target = Target(port, setting.user, (process.pid,), has_tls=setting.has_tls)
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
    if setting.authentication != "none":
        secret = PASSWORD if setting.authentication == "md5" else VERIFIER
        rule |= {
            "authentication": setting.authentication,
            "password": secret,
            "storage_password": PASSWORD,
        }
    config: dict[str, dict[str, object]] = {
        # as much as PgBouncer logs: its statistics come once a minute
        "logging": {"log_format": "%p %t %e %l [%i %s] (%c) %m", "stats_interval": 60},
        "performance": {"workers": setting.workers},
    }
    metrics_port = free_port() if setting.metrics else 0
    with ExitStack() as stack:
        if setting.metrics is not None:
            config["logging"] |= {"log_stats": setting.metrics, "stats_interval": 1}
        if setting.metrics:
            sink = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sink.bind(("127.0.0.1", 0))
            port = sink.getsockname()[1]
            config["metrics"] = {
                "statsd_host": "127.0.0.1",
                "statsd_port": port,
                "prometheus_port": metrics_port,
            }
            rule["quantiles"] = [0.5, 0.95, 0.99]
        if setting.routes:
            other = {"authentication": "none", "storage": "postgres", "storage_db": "app"}
            other |= {"storage_user": setting.user, "pool": "transaction", "shared_pool": "others"}
            config["shared_pool"] = {"others": {"pool_size": POOL_SIZE}}
            config["database"] = {
                f"route_{number}": {"user": {"default": other}} for number in range(setting.routes)
            }
        if setting.has_console:
            admin = CONSOLE["database"]["pgbouncer"]["user"]["admin"]
            config["storage"] = {"console": CONSOLE["storage"]["console"]}
            config["database"] = {"pgbouncer": {"user": {"admin": admin}}}
        listener = {}
        if setting.has_tls:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpooler-bench-")))
            make_certificate(directory)
            listener = {
                "tls": "require",
                "tls_cert_file": f"{directory}/cert.pem",
                "tls_key_file": f"{directory}/key.pem",
            }
        pooler = stack.enter_context(Gpooler(postgres, rule=rule, listener=listener, config=config))

        def broker_messages() -> int:
            return pooler.process_count(ProcessWord.BROKER_SENT, ProcessWord.BROKER_RECEIVED)

        pids = tuple(process.pid for process in pooler.processes())
        yield Target(
            pooler.port,
            setting.user,
            pids,
            broker_messages,
            pooler.worker_counters,
            setting.has_tls,
            metrics_port,
        )


def make_certificate(directory: Path) -> None:
    """``cert.pem`` and ``key.pem``, ECDSA with P-256."""
    leaf = trustme.CA().issue_cert("localhost", "127.0.0.1")
    leaf.cert_chain_pems[0].write_to_path(str(directory / "cert.pem"))
    (directory / "key.pem").touch(mode=0o600)
    (directory / "key.pem").write_bytes(leaf.private_key_pem.bytes())


def answers(target: Target) -> bool:
    """Whether a query gets through."""
    with contextlib.suppress(psycopg.OperationalError), psycopg.connect(target.dsn) as connection:
        connection.execute("SELECT 1")
        return True
    return False
