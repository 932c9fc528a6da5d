"""Counters in shared memory: a worker and its relay write them, every other process may read.

One writer a word: aligned 64-bit stores are single instructions, so readers need no lock. Layout and
words: ``registry.py``. Blocks of routes never used are holes in the memory; reading a hole through
the mapping would fill it with a page, so readers ask only for route ids that were given out (or
those of ``used_routes``).
"""

import ctypes
import mmap
import os
from array import array
from collections.abc import Iterator
from typing import Final

from gpooler.reasons import Reason
from gpooler.stats.histogram import HISTOGRAM_WORDS, SUM_AT, Histogram, added, bucket_of
from gpooler.stats.registry import (
    END_AT,
    ERROR_BASE,
    HUB_TIME_WORDS,
    HUB_TIMES,
    HUB_TIMES_AT,
    MAX_ROUTES,
    PROCESS_COUNTERS,
    RELAY_TIME_WORDS,
    RELAY_TIMES_AT,
    ROUTE_GAUGES,
    TIME_SUMS,
    WORDS_PER_BLOCK,
    ProcessWord,
    RouteWord,
    Time,
)

_BLOCK_BYTES: Final = WORDS_PER_BLOCK * 8
_BLOCKS_BYTES: Final = (1 + MAX_ROUTES) * _BLOCK_BYTES
_SIZE: Final = END_AT * 8
_MASK: Final = (1 << 64) - 1
_COUNTER_WORDS: Final = tuple(word for word in range(WORDS_PER_BLOCK) if word not in ROUTE_GAUGES)
_SUM_RETRIES: Final = 100  # a fold takes microseconds; a reader that is so unlucky takes what it has


class SharedCounters:
    """The counters of one process. Owns its descriptor and mapping until ``close``."""

    __slots__ = ("_map", "_words", "address", "fd")

    def __init__(self, fd: int) -> None:
        """Map the memory behind ``fd``, which this object owns from now on. Raises OSError, ValueError."""
        self.fd = fd
        self._map = mmap.mmap(fd, _SIZE)
        self._words = memoryview(self._map).cast("Q")
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @classmethod
    def create(cls) -> "SharedCounters":
        """New counters, all zero, in a memfd that an exec closes. Raises OSError."""
        fd = os.memfd_create("gpooler-counters", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, _SIZE)
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int) -> "SharedCounters":
        """The counters that another process made. Takes ``fd`` over. Raises OSError, ValueError."""
        return cls(fd)

    def close(self) -> None:
        """Give the descriptor back and unmap. ``address`` must not be used any more."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self._words.release()
            self._words = memoryview(b"").cast("Q")
            self.address = 0
            self._map.close()

    def process(self, word: int) -> int:
        """One word of the process block."""
        return self._words[word]

    def set_process(self, word: int, value: int) -> None:
        """Store one word of the process block; for its one writer."""
        self._words[word] = value

    def add_process(self, word: int, by: int = 1) -> None:
        """Add to one word of the process block; for its one writer."""
        self._words[word] = (self._words[word] + by) & _MASK

    def process_block(self) -> list[int]:
        """A copy of the process block."""
        return self._words[:WORDS_PER_BLOCK].tolist()

    def route(self, route_id: int, word: int) -> int:
        """One word of a route's block; ``route_id`` is 0 to MAX_ROUTES - 1."""
        return self._words[(1 + route_id) * WORDS_PER_BLOCK + word]

    def set_route(self, route_id: int, word: int, value: int) -> None:
        """Store one word of a route's block; for its one writer."""
        self._words[(1 + route_id) * WORDS_PER_BLOCK + word] = value

    def add_route(self, route_id: int, word: int, by: int = 1) -> None:
        """Add to one word of a route's block; for its one writer."""
        at = (1 + route_id) * WORDS_PER_BLOCK + word
        self._words[at] = (self._words[at] + by) & _MASK

    def route_block(self, route_id: int) -> list[int]:
        """A copy of a route's block: 64 words, each as it was at some moment of the call."""
        at = (1 + route_id) * WORDS_PER_BLOCK
        return self._words[at : at + WORDS_PER_BLOCK].tolist()

    def observe(self, route_id: int, time: Time, us: int) -> None:
        """Count a time of the hub's in its histogram; for the hub."""
        at = _histogram_at(route_id, time)
        self._words[at + bucket_of(us)] += 1
        self._words[at + SUM_AT] = (self._words[at + SUM_AT] + us) & _MASK

    def histogram(self, route_id: int, time: Time) -> Histogram:
        """A copy of the histogram of a route that something was counted of (others may be holes)."""
        at = _histogram_at(route_id, time)
        return self._words[at : at + HISTOGRAM_WORDS].tolist()

    def add_histogram(self, route_id: int, time: Time, histogram: Histogram) -> None:
        """Add another one to it; for its one writer."""
        at = _histogram_at(route_id, time)
        self._words[at : at + HISTOGRAM_WORDS] = memoryview(
            array("Q", added(self.histogram(route_id, time), histogram))
        )

    def used_routes(self) -> Iterator[int]:
        """Ids of routes whose block lies in a page that somebody touched; holes stay holes."""
        at = _BLOCK_BYTES
        while at < _BLOCKS_BYTES:
            try:
                start = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole up to the end
                return
            at = min(os.lseek(self.fd, start, os.SEEK_HOLE), _BLOCKS_BYTES)
            yield from range(max(start, _BLOCK_BYTES) // _BLOCK_BYTES - 1, at // _BLOCK_BYTES - 1)


def fold(past: SharedCounters, dead: SharedCounters) -> None:
    """Add the counters (not the gauges) of a dead process to ``past``, once however often called.

    Only the master calls it, when the process has been reaped; it is the one writer of ``past``.
    Readers see through FOLD_SEQUENCE and FOLDED that nothing is counted twice.
    """
    if dead.process(ProcessWord.FOLDED):
        return
    past.add_process(ProcessWord.FOLD_SEQUENCE)
    for counter in PROCESS_COUNTERS:
        past.add_process(counter, dead.process(counter))
    for route_id in dead.used_routes():
        block = dead.route_block(route_id)
        for word in _COUNTER_WORDS:
            if block[word]:
                past.add_route(route_id, word, block[word])
        for time in _measured(block):
            past.add_histogram(route_id, time, dead.histogram(route_id, time))
    dead.set_process(ProcessWord.FOLDED, 1)
    past.add_process(ProcessWord.FOLD_SEQUENCE)


class Totals:
    """Sums over several workers' counters and the past of dead ones. Owns what is attached."""

    def __init__(self, past: SharedCounters, live: dict[int, SharedCounters] | None = None) -> None:
        """``live``: those to begin with, which stay the caller's as long as nothing is attached."""
        self._past = past
        self._live = live or {}

    def attach(self, worker: int, counters: SharedCounters) -> None:
        """Count ``counters`` in as those of ``worker``; what stood there before is closed."""
        self.detach(worker)
        self._live[worker] = counters

    def detach(self, worker: int) -> None:
        """Leave a worker out; what it counted is in the past as soon as the master has folded it."""
        counters = self._live.pop(worker, None)
        if counters is not None:
            counters.close()

    @property
    def workers(self) -> dict[int, SharedCounters]:
        """The attached counters by worker number; not to be changed."""
        return self._live

    def route(self, route_id: int) -> list[int]:
        """64 words of a route over all workers: sums, and the earliest of OLDEST_WAIT_US."""
        for _ in range(_SUM_RETRIES):
            before = self._past.process(ProcessWord.FOLD_SEQUENCE)
            total = self._past.route_block(route_id)
            waits = []
            for counters in self._live.values():
                if counters.process(ProcessWord.FOLDED):
                    continue
                block = counters.route_block(route_id)
                waits.append(block[RouteWord.OLDEST_WAIT_US])
                total = [(a + b) & _MASK for a, b in zip(total, block, strict=True)]
            total[RouteWord.OLDEST_WAIT_US] = min(filter(None, waits), default=0)
            if before % 2 == 0 and before == self._past.process(ProcessWord.FOLD_SEQUENCE):
                break
        return total

    def histograms(self, route_id: int) -> dict[Time, Histogram]:
        """The histograms of a route over all workers; what was never measured is left out."""
        for _ in range(_SUM_RETRIES):
            before = self._past.process(ProcessWord.FOLD_SEQUENCE)
            total: dict[Time, Histogram] = {}
            for counters in (self._past, *self._live.values()):
                if counters.process(ProcessWord.FOLDED):
                    continue
                block = counters.route_block(route_id)
                for time in _measured(block):
                    histogram = counters.histogram(route_id, time)
                    if time in TIME_SUMS:
                        histogram[SUM_AT] = block[TIME_SUMS[time]]
                    total[time] = added(total[time], histogram) if time in total else histogram
            if before % 2 == 0 and before == self._past.process(ProcessWord.FOLD_SEQUENCE):
                break
        return total

    def process(self) -> list[int]:
        """64 words of the process block over all workers; beats and flags are not meaningful."""
        for _ in range(_SUM_RETRIES):
            before = self._past.process(ProcessWord.FOLD_SEQUENCE)
            total = self._past.process_block()
            for counters in self._live.values():
                if not counters.process(ProcessWord.FOLDED):
                    block = counters.process_block()
                    total = [(a + b) & _MASK for a, b in zip(total, block, strict=True)]
            if before % 2 == 0 and before == self._past.process(ProcessWord.FOLD_SEQUENCE):
                break
        return total


def errors_of(block: list[int]) -> dict[Reason, int]:
    """Ends by reason in a route's block; reasons that never happened are left out."""
    return {reason: block[ERROR_BASE + reason] for reason in Reason if block[ERROR_BASE + reason]}


def _histogram_at(route_id: int, time: Time) -> int:
    if time < HUB_TIMES:
        return RELAY_TIMES_AT + route_id * RELAY_TIME_WORDS + time * HISTOGRAM_WORDS
    return HUB_TIMES_AT + route_id * HUB_TIME_WORDS + (time - HUB_TIMES) * HISTOGRAM_WORDS


def _measured(block: list[int]) -> Iterator[Time]:
    """Which histograms of a route are no holes, by its counters."""
    if block[RouteWord.ASSIGNMENTS] or block[RouteWord.WAIT_US]:
        yield from (Time.WAIT, Time.QUERY, Time.TRANSACTION)
    if block[RouteWord.SERVERS_OPENED] or block[RouteWord.LOGINS]:
        yield from (Time.CONNECT, Time.LOGIN)
