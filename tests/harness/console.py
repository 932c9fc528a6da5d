"""The console for tests: a configuration that has one, and a client of it."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import psycopg
from psycopg.rows import dict_row

from tests.harness.client import RawClient
from tests.harness.gpooler import Gpooler
from tests.harness.postgres import PASSWORD
from tests.harness.tools import eventually

Row = dict[str, Any]

SILENT: Final = "did not answer"  # part of a notice

# Laid over a basic configuration: two workers, and the users of the database pgbouncer.
CONSOLE: Final[dict[str, Any]] = {
    "performance": {"workers": 2},
    "storage": {"console": {"type": "local"}},
    "database": {
        "pgbouncer": {
            "user": {
                "admin": {"authentication": "none", "storage": "console", "pool": "session", "role": "admin"},
                "stat": {
                    "authentication": "scram-sha-256",
                    "password": PASSWORD,
                    "storage": "console",
                    "pool": "session",
                },
                "nobody": {
                    "authentication": "md5",
                    "password": PASSWORD,
                    "storage": "console",
                    "pool": "session",
                    "role": "notallow",
                },
                "legacy": {
                    "authentication": "none",
                    "storage": "console",
                    "pool": "session",
                    "options": {"gpooler.legacy_columns": "on"},
                },
            }
        }
    },
}


class Console:
    """A connection to the console of some worker. ``port`` is its own.

    ``notices`` are texts, those since ``show`` asked last.
    """

    def __init__(self, pool: Gpooler) -> None:
        self.connection = psycopg.connect(
            pool.dsn("admin", "pgbouncer"), autocommit=True, row_factory=dict_row, prepare_threshold=None
        )
        with socket.socket(fileno=os.dup(self.connection.fileno())) as own:
            self.port = own.getsockname()[1]
        self.notices: list[str] = []
        self.connection.add_notice_handler(lambda notice: self.notices.append(notice.message_primary or ""))

    def show(self, table: str, *, is_whole: bool = True) -> list[Row]:
        """The rows of a table; conditions may follow its name.

        Asked for again while rows are missing because a process was silent for too long, unless ``is_whole``
        is False.
        """

        def answer() -> tuple[list[Row]]:
            self.notices.clear()
            rows = self.connection.execute(f"SHOW {table}").fetchall()  # type: ignore[call-overload]
            assert not (is_whole and any(SILENT in notice for notice in self.notices)), self.notices
            return (rows,)  # true when there are none, too

        return eventually(answer)[0]

    def one(self, table: str) -> Row:
        """Its one row."""
        (row,) = self.show(table)
        return row

    def pool(self) -> Row:
        """The row of the one pool."""
        return self.one("POOLS WHERE database = 'app'")


@contextmanager
def console(pool: Gpooler) -> Iterator[Console]:
    """A client of the console, for a while."""
    found = Console(pool)
    with found.connection:
        yield found


def spread(pool: Gpooler, stack: ExitStack, count: int) -> list[RawClient]:
    """Clients that are logged in, ``count`` or a multiple of it, some in each worker."""
    clients: list[RawClient] = []
    with console(pool) as control:
        while True:
            for _ in range(count):
                client = stack.enter_context(pool.raw())
                client.login()
                clients.append(client)
            shown = control.show("CLIENTS_EXTENDED WHERE database = 'app'")
            if len({row["worker"] for row in shown}) == len(control.show("WORKERS")):
                return clients
