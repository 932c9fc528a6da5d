"""Two snapshots as metrics for statsd, with names that Graphite takes. Pure."""

import hashlib
import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Final, NamedTuple

from gpooler.reasons import Reason
from gpooler.stats.registry import ERROR_BASE, ProcessWord, RouteWord
from gpooler.stats.snapshot import Block, Snapshot, average, grown, oldest_wait_us, process_grown

NAME_MOST: Final = 200  # bytes of one part: a file name for Graphite
_DIGEST: Final = 12
_UNSAFE: Final = re.compile(rb"[^A-Za-z0-9_-]|-(?=x)")

NORMAL_ENDS: Final = frozenset(
    {
        Reason.CLIENT_TERMINATED,
        Reason.SHUTDOWN,
        Reason.SERVER_LIFETIME,
        Reason.SERVER_IDLE,
        Reason.SERVER_RECALLED,
        Reason.SERVER_SURPLUS,
        Reason.SERVER_CLIENT_LEFT,
    }
)
"""Reasons that are nobody's error: counted under ``ends``, the others under ``errors``."""

_ROUTE_GAUGES: Final = {
    "clients.total": RouteWord.CLIENTS,
    "clients.active": RouteWord.CLIENTS_ACTIVE,
    "clients.waiting": RouteWord.CLIENTS_WAITING,
    "servers.active": RouteWord.SERVERS_ACTIVE,
    "servers.idle": RouteWord.SERVERS_IDLE,
    "servers.login": RouteWord.SERVERS_LOGIN,
    "servers.closing": RouteWord.SERVERS_CLOSING,
}
_ROUTE_COUNTS: Final = {
    "transactions": RouteWord.TRANSACTIONS,
    "queries": RouteWord.QUERIES,
    "bytes.in": RouteWord.BYTES_IN,
    "bytes.out": RouteWord.BYTES_OUT,
    "assignments": RouteWord.ASSIGNMENTS,
    "deploys": RouteWord.DEPLOYS,
    "resets": RouteWord.RESETS,
    "pins": RouteWord.PINS,
    "cancels": RouteWord.CANCELS,
    "logins": RouteWord.LOGINS,
    "servers.opened": RouteWord.SERVERS_OPENED,
}
_ROUTE_TIMES: Final = {
    "time.wait": (RouteWord.WAIT_US, RouteWord.ASSIGNMENTS),
    "time.query": (RouteWord.QUERY_US, RouteWord.QUERIES),
    "time.transaction": (RouteWord.TRANSACTION_US, RouteWord.TRANSACTIONS),
}
_PROCESS_GAUGES: Final = {
    "clients": ProcessWord.CLIENTS,
    "clients_login": ProcessWord.CLIENTS_LOGIN,
    "listening": ProcessWord.LISTENING,
}
_PROCESS_COUNTS: Final = {
    "logins": ProcessWord.LOGINS,
    "login_errors": ProcessWord.LOGIN_ERRORS,
    "broker_messages.sent": ProcessWord.BROKER_SENT,
    "broker_messages.received": ProcessWord.BROKER_RECEIVED,
    "lost.log_lines": ProcessWord.LOG_LINES_LOST,
    "lost.text_events": ProcessWord.TEXT_EVENTS_LOST,
}


class Kind(StrEnum):
    """Types of statsd."""

    GAUGE = "g"
    COUNT = "c"
    TIME = "ms"


class Metric(NamedTuple):
    """One line for statsd; ``name`` without the prefix. Times are in ms."""

    name: str
    kind: Kind
    value: float


def metrics(before: Snapshot | None, now: Snapshot) -> Iterator[Metric]:
    """What to tell of the time between two snapshots; of the first one the gauges only.

    ``process.…`` is about all workers, ``routes.DATABASE.USER.…`` about a route: the names of its rule, or
    those on the server where the rule says ``default``.
    """
    yield Metric("process.workers", Kind.GAUGE, now.workers)
    for name, word in _PROCESS_GAUGES.items():
        yield Metric(f"process.{name}", Kind.GAUGE, now.process[word])
    if before is not None:
        growth = process_grown(before.process, now.process)
        for name, word in _PROCESS_COUNTS.items():
            yield Metric(f"process.{name}", Kind.COUNT, growth[word])
    for route, block in now.routes.items():
        prefix = f"routes.{safe(route.database)}.{safe(route.user)}"
        for name, gauge in _ROUTE_GAUGES.items():
            yield Metric(f"{prefix}.{name}", Kind.GAUGE, block[gauge])
        yield Metric(f"{prefix}.clients.maxwait_ms", Kind.GAUGE, oldest_wait_us(block, now.at_us) / 1000)
        if before is not None:
            yield from _happened(prefix, grown(before.routes.get(route), block))


def safe(part: str) -> str:
    """A part of a metric's name: letters, digits, ``_`` and ``-`` stay, other bytes become ``-xHH``.

    Different texts have different names: ``-x`` is written as ``-x2dx``, nothing at all as ``-x``. A
    name that is too long ends with a digest of the whole.
    """
    raw = part.encode("utf-8", "surrogateescape")
    name = _UNSAFE.sub(lambda match: b"-x%02x" % match[0][0], raw).decode("ascii") or "-x"
    if len(name) <= NAME_MOST:
        return name
    return f"{name[: NAME_MOST - _DIGEST - 2]}-x{hashlib.sha256(raw).hexdigest()[:_DIGEST]}"


def safe_prefix(prefix: str) -> str:
    """The configured prefix, whose dots stay."""
    return ".".join([safe(part) for part in prefix.split(".") if part])


def _happened(prefix: str, growth: Block) -> Iterator[Metric]:
    for name, word in _ROUTE_COUNTS.items():
        yield Metric(f"{prefix}.{name}", Kind.COUNT, growth[word])
    for name, (time_word, count_word) in _ROUTE_TIMES.items():
        mean_us = average(growth, time_word, count_word)
        if mean_us is not None:
            yield Metric(f"{prefix}.{name}", Kind.TIME, mean_us / 1000)
    for reason in Reason:
        count = growth[ERROR_BASE + reason]
        if count and reason != Reason.NONE:
            group = "ends" if reason in NORMAL_ENDS else "errors"
            yield Metric(f"{prefix}.{group}.{reason.label}", Kind.COUNT, count)
