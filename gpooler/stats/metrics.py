"""Two snapshots as metrics for statsd, with names that Graphite takes. Pure."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Final, NamedTuple

from gpooler.config.certificates import AUTHORITIES, Expiry
from gpooler.reasons import Reason
from gpooler.stats.catalogue import (
    NORMAL_ENDS,
    PROCESS_COUNTERS,
    PROCESS_GAUGES,
    ROUTE_COUNTERS,
    ROUTE_GAUGES,
    ROUTE_TIMES,
)
from gpooler.stats.quantiles import Quantile
from gpooler.stats.registry import ERROR_BASE
from gpooler.stats.snapshot import Block, Snapshot, average, grown, oldest_wait_us, process_grown

NAME_MOST: Final = 200  # bytes of one part: a file name for Graphite
_DIGEST: Final = 12
_UNSAFE: Final = re.compile(rb"[^A-Za-z0-9_-]|-(?=x)")


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


def metrics(before: Snapshot | None, now: Snapshot, quantiles: Iterable[Quantile] = ()) -> Iterator[Metric]:
    """What to tell of the time between two snapshots; of the first one the gauges only.

    ``process.…`` is about all workers, ``routes.DATABASE.USER.…`` about a route: the names of its rule, or
    those on the server where the rule says ``default``.
    """
    yield Metric("process.workers", Kind.GAUGE, now.workers)
    for row in PROCESS_GAUGES:
        yield Metric(row.statsd, Kind.GAUGE, now.process[row.word])
    if before is not None:
        growth = process_grown(before.process, now.process)
        for row in PROCESS_COUNTERS:
            yield Metric(row.statsd, Kind.COUNT, growth[row.word])
    yield from _uses(before, now)
    for route, block in now.routes.items():
        prefix = f"routes.{safe(route.database)}.{safe(route.user)}"
        for row in ROUTE_GAUGES:
            yield Metric(f"{prefix}.{row.statsd}", Kind.GAUGE, block[row.word])
        yield Metric(f"{prefix}.clients.maxwait_ms", Kind.GAUGE, oldest_wait_us(block, now.at_us) / 1000)
        if before is not None:
            yield from _happened(prefix, grown(before.routes.get(route), block))
    for quantile in quantiles:
        prefix = f"routes.{safe(quantile.route.database)}.{safe(quantile.route.user)}"
        percent = f"{quantile.q * 100:.6g}".replace(".", "_")
        name = f"{prefix}.quantiles.{quantile.time.name.lower()}.p{percent}_ms"
        yield Metric(name, Kind.GAUGE, quantile.us / 1000)


def certificate_metrics(expiries: Iterable[Expiry]) -> Iterator[Metric]:
    """Days until they end: ``process.certificate_days.SECTION.NAME``, of authorities ``authority_days``."""
    for one in expiries:
        what = "authority_days" if one.option == AUTHORITIES else "certificate_days"
        yield Metric(f"process.{what}.{one.section}.{safe(one.name)}", Kind.GAUGE, one.days_left)


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


def _uses(before: Snapshot | None, now: Snapshot) -> Iterator[Metric]:
    for name, use in now.uses.items():
        yield Metric(f"process.{name}.resident_bytes", Kind.GAUGE, use.resident_bytes)
        if use.open_fds is not None:
            yield Metric(f"process.{name}.open_fds", Kind.GAUGE, use.open_fds)
        if before is not None and name in before.uses:
            cpu_ms = use.cpu_ms - before.uses[name].cpu_ms
            yield Metric(f"process.{name}.cpu_ms", Kind.COUNT, use.cpu_ms if cpu_ms < 0 else cpu_ms)


def _happened(prefix: str, growth: Block) -> Iterator[Metric]:
    for row in ROUTE_COUNTERS:
        yield Metric(f"{prefix}.{row.statsd}", Kind.COUNT, growth[row.word])
    for time in ROUTE_TIMES:
        if time.sum_word is not None and time.count_word is not None:
            mean_us = average(growth, time.sum_word, time.count_word)
            if mean_us is not None:
                yield Metric(f"{prefix}.{time.statsd}", Kind.TIME, mean_us / 1000)
    for reason in Reason:
        count = growth[ERROR_BASE + reason]
        if count and reason != Reason.NONE:
            group = "ends" if reason in NORMAL_ENDS else "errors"
            yield Metric(f"{prefix}.{group}.{reason.label}", Kind.COUNT, count)
