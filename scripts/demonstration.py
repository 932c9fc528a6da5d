"""The demo behind scripts/demo: PostgreSQL 18 from a Python package, gpooler in front, a hundred clients."""

import argparse
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import psycopg

from tests.harness import Gpooler, Postgres, free_port
from tests.harness.tools import reserve

USUAL_PORT: Final = 6432
CLIENTS: Final = 100
TRANSACTIONS_EACH: Final = 20
POOL_SIZE: Final = 5
PATIENCE_S: Final = 60

CONFIG: Final = """\
[logging]
log_format = "%t %e %l [%i %s] (%c) %m"
log_to_stdout = true

[performance]
workers = 2

[[listen]]
host = "127.0.0.1"
port = {port}

[storage.postgres]
type = "remote"
host = "127.0.0.1"
port = {postgres_port}

# every database and user not named elsewhere
[database.default.user.default]
authentication = "none"
storage = "postgres"
storage_db = "app"
storage_user = "scram_user"
storage_password = "s3cret"
pool = "transaction"
pool_size = {pool_size}
"""


def say(text: str = "") -> None:
    """A line of progress, at once."""
    print(text, flush=True)


def choose_port() -> int:
    """The port people expect, else a free one."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", USUAL_PORT))
        except OSError:
            return free_port()
    return USUAL_PORT if reserve(USUAL_PORT) else free_port()


def crowd(gpooler: Gpooler) -> set[int]:
    """Many clients at once, each with several transactions; the process ids of the servers they met."""

    def one_client(number: int) -> set[int]:
        with gpooler.connect(application_name=f"demo {number}") as connection:
            everybody_is_in.wait()
            servers = set()
            for _ in range(TRANSACTIONS_EACH):
                with connection.transaction():
                    row = connection.execute("SELECT pg_backend_pid()").fetchone()
                    assert row is not None
                    servers.add(row[0])
            return servers

    everybody_is_in = threading.Barrier(CLIENTS, timeout=PATIENCE_S)
    threads = ThreadPoolExecutor(CLIENTS)
    try:
        return set().union(*threads.map(one_client, range(CLIENTS), timeout=PATIENCE_S))
    finally:
        threads.shutdown(wait=False)  # a client that hangs ends when gpooler does


def show(gpooler: Gpooler) -> None:
    """Real queries through gpooler."""
    with gpooler.connect() as connection:
        row = connection.execute("SELECT split_part(version(), ' on ', 1), current_user").fetchone()
        assert row is not None
        say(f"  {row[0]} answers through gpooler, as {row[1]}")
        connection.execute("CREATE TABLE visits (who text, at timestamptz DEFAULT now())")
        with connection.transaction():
            connection.execute("INSERT INTO visits (who) VALUES ('Ada'), ('Grace'), ('Edsger')")
        rows = connection.execute("SELECT who FROM visits ORDER BY who").fetchall()
        say(f"  a table, a transaction, {len(rows)} rows back: {', '.join(who for (who,) in rows)}")
    servers = crowd(gpooler)
    say(
        f"  {CLIENTS} clients at once ran {CLIENTS * TRANSACTIONS_EACH} transactions "
        f"on {len(servers)} server connections (pool_size {POOL_SIZE})"
    )


def main() -> int:
    """Run the demo; 0 when all went well."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="exit after the queries instead of staying")
    once: bool = parser.parse_args().once
    for ending in (signal.SIGINT, signal.SIGTERM):  # also where a shell started us with SIGINT ignored
        signal.signal(ending, signal.default_int_handler)
    try:
        say("[demo] starting PostgreSQL 18")
        with Postgres(18) as postgres:
            port = choose_port()
            say(f"[demo] starting gpooler on port {port}")
            text = CONFIG.format(port=port, postgres_port=postgres.port, pool_size=POOL_SIZE)
            with Gpooler(text=text, port=port) as gpooler:
                say("[demo] running queries")
                try:
                    show(gpooler)
                except Exception:
                    say(gpooler.tail())
                    raise
                if not once:
                    say("[demo] connect with")
                    say(f'  psql "{gpooler.dsn(password=None)}"')
                    say(f"  configuration: {gpooler.config_file}")
                    say(f"  log:           {gpooler.log_file}")
                    say("[demo] Ctrl-C ends it")
                    while gpooler.is_running:
                        signal.sigtimedwait([signal.SIGCHLD], 1)
                    say(f"[demo] gpooler ended by itself:\n{gpooler.tail()}")
                    return 1
                say("[demo] stopping")
    except KeyboardInterrupt:
        say("\n[demo] stopped")
    except (RuntimeError, AssertionError, OSError, threading.BrokenBarrierError, psycopg.Error) as error:
        say(f"[demo] failed: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
