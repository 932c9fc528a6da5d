"""The ledger's things: caps, routes, what a worker holds of them, and slots with their states.

A slot is in exactly one list at a time and its state says which: a count is the length of a list.
"""

import heapq
from dataclasses import dataclass, field
from enum import IntEnum
from math import exp
from typing import Final, NamedTuple

from gpooler.broker.messages import Recall, ServerState, WorkerId

MEMORY_US: Final = 100_000  # over which the demand is smoothed
SHOWN_US: Final = 1_000_000  # a server that the counters do not show for so long is not on its way


class RouteKey(NamedTuple):
    """What tells routes apart: the rule, and database and user as they are on the server."""

    rule: str
    database: str
    user: str
    is_replication: bool = False  # each server is opened for one client, and ends with it


class SlotName(NamedTuple):
    """A slot's place, whatever its generation."""

    route_id: int
    slot: int


class SlotState(IntEnum):
    """Who has the slot, and what for."""

    FREE = 0
    OPENING = 1  # granted to a worker that connects or logs in
    LEASED = 2  # a worker's, with a living server
    RETURNED = 3  # in the broker's hand, within one event
    LEAVING = 4  # its worker told the server to go; counted until EOF
    BURIED = 5  # its worker is dead or nobody took it: the broker waits for EOF; counted


_MOVES: Final = {
    # the latter three: known from before this broker's time
    SlotState.FREE: (SlotState.OPENING, SlotState.LEASED, SlotState.LEAVING, SlotState.BURIED),
    SlotState.OPENING: (SlotState.LEASED, SlotState.LEAVING, SlotState.BURIED, SlotState.FREE),
    SlotState.LEASED: (SlotState.RETURNED, SlotState.LEAVING, SlotState.BURIED, SlotState.FREE),
    SlotState.RETURNED: (SlotState.LEASED, SlotState.BURIED),
    SlotState.LEAVING: (SlotState.BURIED, SlotState.FREE),
    SlotState.BURIED: (SlotState.FREE,),
}


class LedgerError(Exception):
    """The ledger contradicts itself: a bug."""


@dataclass(slots=True, eq=False)
class Cap:
    """A limit on slots over one or more routes: on all that are not free, or on those being opened."""

    name: str
    size: int | None  # None: no limit
    slots: "dict[SlotName, Slot]" = field(default_factory=dict)
    routes: "dict[int, Route]" = field(default_factory=dict)
    ceiling: int = 0  # what was reported to a new broker may exceed the size; only sinks

    @property
    def has_room(self) -> bool:
        """Whether one more slot may be granted."""
        return self.size is None or len(self.slots) < self.size

    @property
    def is_kept(self) -> bool:
        """The invariant."""
        return self.size is None or len(self.slots) <= max(self.size, self.ceiling)

    @property
    def excess(self) -> int:
        """Slots above the limit."""
        return 0 if self.size is None else max(0, len(self.slots) - self.size)


@dataclass(slots=True, eq=False)
class Slot:
    """A slot that is not free."""

    route: "Route"
    number: int
    generation: int
    state: SlotState = SlotState.FREE
    holder: "Holding | None" = None
    since_us: int = 0  # when it came to its state, or into these hands
    opened_us: int = 0  # when its server was logged in, or reported
    arrives_us: int = 0  # until then a server that was passed on counts as on its way
    server: ServerState | None = None
    endpoint: str = ""  # known from ``Connected`` on
    has_descriptor: bool = False  # the broker has a duplicate of the socket

    @property
    def name(self) -> SlotName:
        """Its place."""
        return SlotName(self.route.route_id, self.number)


@dataclass(slots=True, eq=False)
class Holding:
    """What one worker has of one route, and what it wishes."""

    worker: WorkerId
    opening: dict[int, Slot] = field(default_factory=dict)
    leased: dict[int, Slot] = field(default_factory=dict)
    leaving: dict[int, Slot] = field(default_factory=dict)
    want: int = 0  # as the last Want said; above 0 it is in ``Route.hungry``
    unmet: int = 0  # waiters for whom nothing is on its way, as far as we know
    waiting: int = 0  # observed, or as the last Want said
    active: int = 0  # observed
    demand: float = 0.0  # clients that use or wish a server, smoothed
    observed_us: int = 0
    served_us: int = 0  # the last grant
    recalls: dict[int, Recall] = field(default_factory=dict)  # not answered yet, by id
    owed: int = 0  # recalled and still here
    owed_evictions: int = 0
    recalled_us: int = 0  # the last recall
    kept: int = -1  # as the last Keep said; -1: nothing was said yet, an earlier broker may have

    @property
    def have(self) -> int:
        """Slots that serve or soon will."""
        return len(self.opening) + len(self.leased)

    def wait_for(self, waiting: int, now_us: int, missing: int = 0) -> None:
        """So many clients wait. ``missing``: servers that are open and not shown by the worker's counters."""
        arriving = max(missing, sum(slot.arrives_us > now_us for slot in self.leased.values()))
        self.waiting = waiting
        self.unmet = max(0, waiting - len(self.opening) - arriving) if self.want else 0

    def observe(self, waiting: int, active: int, servers: int, now_us: int) -> None:
        """Take in what the worker's counters say.

        A server that they do not show is on its way, or has just left, of which the worker will tell.

        One look tells little: which process just had its turn on the processor decides who seems idle. So
        the demand is the mean of what was seen lately; after a pause the newest look counts alone.
        """
        new = sum(slot.since_us + SHOWN_US > now_us for slot in self.leased.values())
        self.wait_for(waiting, now_us, min(new, max(0, len(self.leased) - servers)))
        self.active = active
        weight = 1 - exp((self.observed_us - now_us) / MEMORY_US)
        self.demand += (waiting + active - self.demand) * weight
        self.observed_us = now_us

    def recalled(self, recall: Recall, now_us: int) -> None:
        """A recall goes out."""
        self.recalls[recall.recall_id] = recall
        self.recalled_us = now_us
        if recall.is_eviction:
            self.owed_evictions += recall.count
        else:
            self.owed += recall.count

    def answered(self, recall: Recall, promised: int) -> None:
        """A recall is answered; what was not promised is not owed."""
        refused = max(0, recall.count - promised)
        if recall.is_eviction:
            self.owed_evictions = max(0, self.owed_evictions - refused)
        else:
            self.owed = max(0, self.owed - refused)

    def leave(self, is_returned: bool) -> None:
        """A lease left: it counts for what is owed."""
        if self.owed_evictions and not is_returned:
            self.owed_evictions -= 1
        elif self.owed:
            self.owed -= 1
        self.clamp()

    def clamp(self) -> None:
        """Nobody owes more than he has."""
        self.owed_evictions = min(self.owed_evictions, len(self.leased))
        self.owed = min(self.owed, len(self.leased) - self.owed_evictions)


@dataclass(slots=True, eq=False)
class Route:
    """A route, its slots by state and its holders."""

    route_id: int
    key: RouteKey
    # the configuration's: see ``Book.configure``
    caps: tuple[Cap, ...] = ()
    logins: Cap = field(default_factory=lambda: Cap("no logins", 0))  # of its storage; slots being opened
    min_pool_size: int = 0
    reset_timeout_us: int = 0
    epoch: int = 0  # servers of a lower one are obsolete
    slots: dict[int, Slot] = field(default_factory=dict)  # all that are not free
    buried: dict[int, Slot] = field(default_factory=dict)
    returned: dict[int, Slot] = field(default_factory=dict)
    holdings: dict[WorkerId, Holding] = field(default_factory=dict)  # of all workers that know the route
    hungry: dict[WorkerId, Holding] = field(default_factory=dict)
    parameters: dict[str, str] | None = None
    paused_until_us: int = 0  # no opens before: the last one failed
    turned_us: int = 0  # the last time that a slot which cannot be shared evenly went on
    _free: list[int] = field(default_factory=list)  # freed numbers, a heap; may name some in use
    _next: int = 1  # below it, all numbers are in use or in the heap

    @property
    def have(self) -> int:
        """Slots that serve or soon will, over all workers."""
        return sum(holding.have for holding in self.holdings.values())

    @property
    def has_room(self) -> bool:
        """Whether every cap allows one slot more."""
        return all(cap.has_room for cap in self.caps)

    @property
    def may_open(self) -> bool:
        """Whether the storage allows one more login, too."""
        return self.logins.has_room and self.has_room

    def starves(self, now_us: int) -> bool:
        """Whether clients wait, no slot of it can ever serve them and it might open something."""
        return (
            self.paused_until_us <= now_us
            and any(holding.unmet for holding in self.hungry.values())
            and (self.key.is_replication or not self.have)
        )

    def check(self) -> None:
        """No slot in two hands, every cap kept. Raises LedgerError."""
        lists = [self.buried]
        for holding in self.holdings.values():
            lists += [holding.opening, holding.leased, holding.leaving]
            if (holding.want > 0) != (holding.worker in self.hungry):
                raise LedgerError(f"route {self.route_id}: {holding.worker} wants {holding.want}")
        if self.returned:
            raise LedgerError(f"route {self.route_id}: a server stayed in the broker's hand")
        if sorted(number for list_ in lists for number in list_) != sorted(self.slots):
            raise LedgerError(f"route {self.route_id}: a slot is in two lists or in none")
        for number, slot in self.slots.items():
            if self.home(slot).get(number) is not slot:
                raise LedgerError(f"slot {slot.name} is {slot.state.name} and elsewhere")
        for cap in self.caps:
            counted = {name for name in cap.slots if name.route_id == self.route_id}
            if counted != {slot.name for slot in self.slots.values()}:
                raise LedgerError(f"{cap.name} does not count what route {self.route_id} has")
            if not cap.is_kept:
                raise LedgerError(f"{cap.name}: {len(cap.slots)} slots granted of {cap.size}")
        opening = {slot.name for slot in self.slots.values() if slot.state is SlotState.OPENING}
        if opening != {name for name in self.logins.slots if name.route_id == self.route_id}:
            raise LedgerError(f"{self.logins.name} does not count what route {self.route_id} opens")
        if not self.logins.is_kept:
            raise LedgerError(f"{self.logins.name}: {len(self.logins.slots)} granted of {self.logins.size}")

    def home(self, slot: Slot) -> dict[int, Slot]:
        """The list in which the slot is, by its state. Raises LedgerError for a free one."""
        if slot.state is SlotState.BURIED:
            return self.buried
        if slot.state is SlotState.RETURNED:
            return self.returned
        if slot.holder is None or slot.state is SlotState.FREE:
            raise LedgerError(f"slot {slot.name} is {slot.state.name} and nobody's")
        if slot.state is SlotState.OPENING:
            return slot.holder.opening
        return slot.holder.leased if slot.state is SlotState.LEASED else slot.holder.leaving

    def add(self, number: int | None, generation: int, state: SlotState, holder: "Holding | None") -> Slot:
        """Take a free slot: one known from before this broker's time, or the lowest; BURIED has no holder."""
        is_report = number is not None
        slot = Slot(self, self._lowest_free() if number is None else number, generation)
        self.slots[slot.number] = slot
        for cap in self.caps:
            cap.slots[slot.name] = slot
        self._enter(slot, state, holder)
        if is_report:
            for cap in (*self.caps, self.logins):
                cap.ceiling = max(cap.ceiling, len(cap.slots))
        return slot

    def move(self, slot: Slot, state: SlotState, holder: Holding | None = None) -> None:
        """Change state and list. ``holder`` stays unless the slot changes hands. Raises LedgerError."""
        del self.home(slot)[slot.number]
        if slot.state is SlotState.OPENING:
            _take_out(self.logins, slot)
        if slot.state is SlotState.RETURNED or state in (SlotState.RETURNED, SlotState.BURIED):
            slot.holder = None
        self._enter(slot, state, holder or slot.holder)

    def free(self, slot: Slot) -> None:
        """The slot is nobody's. Raises LedgerError."""
        self.move(slot, SlotState.FREE)
        del self.slots[slot.number]
        heapq.heappush(self._free, slot.number)
        for cap in self.caps:
            _take_out(cap, slot)

    def _enter(self, slot: Slot, state: SlotState, holder: Holding | None) -> None:
        if state not in _MOVES[slot.state]:
            raise LedgerError(f"slot {slot.name} cannot go from {slot.state.name} to {state.name}")
        slot.state = state
        slot.holder = holder
        if state is not SlotState.FREE:
            self.home(slot)[slot.number] = slot
        if state is SlotState.OPENING:
            self.logins.slots[slot.name] = slot

    def _lowest_free(self) -> int:
        while self._free:
            number = heapq.heappop(self._free)
            if number not in self.slots:
                return number
        while self._next in self.slots:
            self._next += 1
        return self._next


def _take_out(cap: Cap, slot: Slot) -> None:
    del cap.slots[slot.name]
    cap.ceiling = min(cap.ceiling, len(cap.slots))
