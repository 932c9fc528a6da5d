"""Real parts for tests: PostgreSQL, gpooler itself, a proxy that breaks things, a client without a driver."""

from tests.harness.client import Message, RawClient
from tests.harness.faultproxy import FaultProxy
from tests.harness.gpooler import Gpooler
from tests.harness.postgres import PASSWORD, Backend, Postgres, PostgresUnavailable
from tests.harness.tools import Unavailable, eventually, find_program, free_port, stopped, unread

__all__ = [
    "PASSWORD",
    "Backend",
    "FaultProxy",
    "Gpooler",
    "Message",
    "Postgres",
    "PostgresUnavailable",
    "RawClient",
    "Unavailable",
    "eventually",
    "find_program",
    "free_port",
    "stopped",
    "unread",
]
