"""All counters at one moment, and what happened between two of them. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from gpooler.stats.registry import ROUTE_GAUGES, WORDS_PER_BLOCK, RouteWord

Block = list[int]
"""The 64 words of a block of stats/registry.py."""


class RouteName(NamedTuple):
    """Database and user of a rule: the same for several rules when they differ by address only."""

    database: str
    user: str


class NamedRoute(NamedTuple):
    """A route for those who tell of it."""

    route_id: int
    name: RouteName
    quantiles: tuple[float, ...]  # that its rule asks for


class ProcessUse(NamedTuple):
    """What a process uses."""

    resident_bytes: int
    cpu_ms: int
    open_fds: int | None  # None: not to be known


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Sums over all workers. ``at_us`` is monotonic."""

    at_us: int
    workers: int  # how many live
    process: Block
    routes: dict[RouteName, Block]
    uses: dict[str, ProcessUse] = field(default_factory=dict)  # by process: master, broker, worker_1 …


class Sums(Protocol):
    """Where a snapshot is taken from: ``stats.shared.Totals``."""

    @property
    def workers(self) -> Mapping[int, object]:
        """Those attached, by number; 0 is the broker."""

    def route(self, route_id: int) -> Block:
        """Sums of a route."""

    def process(self) -> Block:
        """Sums of the process blocks."""


def take(
    at_us: int,
    sums: Sums,
    routes: Iterable[tuple[int, str, str]],
    uses: dict[str, ProcessUse] | None = None,
) -> Snapshot:
    """A snapshot of ``routes``, given as (route id, database, user); those of one name are added up."""
    blocks: dict[RouteName, Block] = {}
    for route_id, database, user in routes:
        name = RouteName(database, user)
        block = sums.route(route_id)
        before = blocks.get(name)
        blocks[name] = block if before is None else _added(before, block)
    workers = len([number for number in sums.workers if number])
    return Snapshot(at_us, workers, sums.process(), blocks, uses or {})


def grown(before: Block | None, now: Block) -> Block:
    """What each counter grew by; gauges as they are now. A counter that fell was begun anew."""
    if before is None:
        return now
    return [
        value if word in ROUTE_GAUGES or value < old else value - old
        for word, (old, value) in enumerate(zip(before, now, strict=True))
    ]


def process_grown(before: Block, now: Block) -> Block:
    """As ``grown`` for the process block, gauges included: the caller takes those from ``now``."""
    return [value if value < old else value - old for old, value in zip(before, now, strict=True)]


def oldest_wait_us(block: Block, at_us: int) -> int:
    """How long the head of the queue has waited; 0 when nobody waits."""
    since_us = block[RouteWord.OLDEST_WAIT_US]
    return max(0, at_us - since_us) if since_us else 0


def average(block: Block, time_word: RouteWord, count_word: RouteWord) -> float | None:
    """Mean time in us by a block of differences; None when nothing happened."""
    return block[time_word] / block[count_word] if block[count_word] else None


def _added(one: Block, other: Block) -> Block:
    total = [a + b for a, b in zip(one, other, strict=True)]
    waits = [block[RouteWord.OLDEST_WAIT_US] for block in (one, other)]
    total[RouteWord.OLDEST_WAIT_US] = min(filter(None, waits), default=0)
    return total


NOTHING: Block = [0] * WORDS_PER_BLOCK
