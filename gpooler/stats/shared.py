"""Counters in shared memory: a worker and its relay write them, every other process may read.

One writer a word: aligned 64-bit stores are single instructions, so readers need no lock. Layout and
words: ``registry.py``. Blocks of routes never used are holes in the memory; reading a hole through
the mapping would fill it with a page, so readers ask only for route ids that were given out (or
those of ``used_routes``).
"""

import ctypes
import mmap
import os
from collections.abc import Iterator
from typing import Final

from gpooler.reasons import Reason
from gpooler.stats.registry import (
    ERROR_BASE,
    MAX_ROUTES,
    PROCESS_COUNTERS,
    ROUTE_GAUGES,
    WORDS_PER_BLOCK,
    ProcessWord,
    RouteWord,
)

_BLOCK_BYTES: Final = WORDS_PER_BLOCK * 8
_SIZE: Final = (1 + MAX_ROUTES) * _BLOCK_BYTES
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

    def used_routes(self) -> Iterator[int]:
        """Ids of routes whose block lies in a page that somebody touched; holes stay holes."""
        at = _BLOCK_BYTES
        while at < _SIZE:
            try:
                start = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole up to the end
                return
            at = min(os.lseek(self.fd, start, os.SEEK_HOLE), _SIZE)
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
    dead.set_process(ProcessWord.FOLDED, 1)
    past.add_process(ProcessWord.FOLD_SEQUENCE)


class Totals:
    """Sums over several workers' counters and the past of dead ones. Owns what is attached."""

    def __init__(self, past: SharedCounters) -> None:
        self._past = past
        self._live: dict[int, SharedCounters] = {}

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
