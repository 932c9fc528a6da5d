"""Limits of clients over all workers, without a message: own cell up, sum, step back if too many."""

from collections.abc import Iterable
from typing import Final

from gpooler.errors import MemoryShort
from gpooler.reasons import Reason
from gpooler.stats.registry import ERROR_BASE, ProcessWord, RouteWord
from gpooler.stats.shared import SharedCounters

WORD_BYTES: Final = 8
BALANCE_PART: Final = 0.03  # a worker this much …
BALANCE_CLIENTS: Final = 8  # … and this many clients over the mean lets others accept


class Admission:
    """Counts clients in the worker's own cells; ``peers`` are the counters of the other workers."""

    def __init__(self, counters: SharedCounters, past: SharedCounters) -> None:
        """``past``: what dead workers counted, and what the broker says of memory."""
        self._own = counters
        self._past = past
        self.peers: dict[int, SharedCounters] = {}  # by incarnation

    def _all(self) -> Iterable[SharedCounters]:
        yield self._own
        yield from self.peers.values()

    @property
    def is_memory_short(self) -> bool:
        """Whether ``[soft_oom]`` lets nobody in."""
        return bool(self._past.process(ProcessWord.SOFT_OOM_SHORT))

    @property
    def short_address(self) -> int:
        """Where that word stands, for those who look at it without Python."""
        return self._past.address + ProcessWord.SOFT_OOM_SHORT * WORD_BYTES

    def refuse_for_memory(self, route_id: int | None) -> MemoryShort:
        """Count a client that is refused for it, on its route where that is known; what it is told."""
        self._own.add_process(ProcessWord.SOFT_OOM_REFUSED)
        if route_id is not None:
            self._own.add_route(route_id, ERROR_BASE + Reason.SOFT_OOM)
        return MemoryShort(
            self._past.process(ProcessWord.SOFT_OOM_USED), self._past.process(ProcessWord.SOFT_OOM_LIMIT)
        )

    def enter(self, limit: int | None) -> bool:
        """Count one more client; False, and not counted, when there would be more than ``limit``."""
        self._own.add_process(ProcessWord.CLIENTS)
        if limit is None or sum(cell.process(ProcessWord.CLIENTS) for cell in self._all()) <= limit:
            return True
        self.leave()
        return False

    def leave(self) -> None:
        """A counted client is gone."""
        self._own.add_process(ProcessWord.CLIENTS, -1)

    def enter_route(self, route_id: int, limit: int | None) -> bool:
        """As ``enter``, of one route."""
        self._own.add_route(route_id, RouteWord.CLIENTS_ADMITTED)
        if limit is None:
            return True
        if sum(cell.route(route_id, RouteWord.CLIENTS_ADMITTED) for cell in self._all()) <= limit:
            return True
        self.leave_route(route_id)
        return False

    def leave_route(self, route_id: int) -> None:
        """A counted client of the route is gone."""
        self._own.add_route(route_id, RouteWord.CLIENTS_ADMITTED, -1)

    def total(self, route_id: int, *words: RouteWord) -> int:
        """The sum of these words of a route over all workers."""
        return sum(cell.route(route_id, word) for cell in self._all() for word in words)

    def waiting_elsewhere(self, route_id: int) -> int:
        """Clients of a route that wait in other workers."""
        return sum(peer.route(route_id, RouteWord.CLIENTS_WAITING) for peer in self.peers.values())

    def has_too_many(self) -> bool:
        """Whether this worker should let others accept: it is over the mean, and another one accepts."""
        if not any(peer.process(ProcessWord.LISTENING) for peer in self.peers.values()):
            return False
        mine = self._own.process(ProcessWord.CLIENTS)
        mean = sum(cell.process(ProcessWord.CLIENTS) for cell in self._all()) / (1 + len(self.peers))
        return mine > mean * (1 + BALANCE_PART) and mine > mean + BALANCE_CLIENTS
