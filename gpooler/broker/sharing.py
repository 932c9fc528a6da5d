"""Who gets what is free, and from whom something is recalled: the acts of ``shares.py``'s plans.

DESIGN §3 Leases. Free capacity is handed out at once; recalls and evictions belong to ticks.
"""

import heapq
from collections.abc import Iterable
from math import floor
from typing import Final

from gpooler.broker.acts import Release, Send
from gpooler.broker.book import Book
from gpooler.broker.messages import GrantOpen, GrantServer, Keep, Recall, ServerState
from gpooler.broker.shares import (
    deficit,
    is_needed_elsewhere,
    plan_evictions,
    plan_excess,
    plan_recalls,
    spread_minimum,
)
from gpooler.broker.slots import Holding, Route, Slot, SlotState

ARRIVAL_US: Final = 2_000  # what a server takes to reach its new worker, while nobody looks at its counters

_Urgency = tuple[bool, bool, int, int]
_Wish = tuple[_Urgency, int, Route, Holding]  # the number keeps equals in order


class Sharing:
    """Decides over the book."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._recall_id = 0
        self._lined_up = 0
        self._held_back: set[str] = set()  # names of ``logins`` caps that kept something from being opened
        self._below: dict[int, Route] = {}  # due one server of min_pool_size, and no login was allowed yet

    def free(self, now_us: int, slot: Slot) -> None:
        """The slot's PostgreSQL process is gone, or there never was one: another may have its place."""
        slot.route.free(slot)
        if slot.has_descriptor:
            self._book.act(Release(slot.name))
        self.after_change(now_us, slot.route)

    def after_change(self, now_us: int, route: Route) -> None:
        """Slots left a worker or became free."""
        self.keep_minimum(route)
        self.fill(now_us, [route])
        self.login_over(now_us, route)

    def login_over(self, now_us: int, route: Route) -> None:
        """A login at the storage of ``route`` may have come to its end: others wait for their turn."""
        logins = route.logins
        if not logins.has_room:
            return
        if logins.name in self._held_back:
            self._held_back.remove(logins.name)
            self.fill(now_us, [one for one in self._book.hungry.values() if one.logins is logins])
        self._fill_below(now_us)

    def pass_on(self, now_us: int, slot: Slot, giver: Holding, state: ServerState) -> None:
        """A returned server goes to another worker, or to its end."""
        route = slot.route
        is_wanted = state.epoch >= route.epoch and not is_needed_elsewhere(slot, now_us)
        taker = self._taker(route, giver) if is_wanted else None
        if taker is None:
            self._book.bury(now_us, slot)
            return
        slot.generation = self._book.next_generation()
        slot.since_us = now_us
        slot.arrives_us = now_us + ARRIVAL_US
        route.move(slot, SlotState.LEASED, taker)
        self._served(now_us, taker)
        grant = GrantServer(route.route_id, slot.number, slot.generation, state)
        self._book.act(Send(taker.worker, grant, slot.name))
        self.keep_minimum(route)

    def _taker(self, route: Route, giver: Holding) -> Holding | None:
        """Who gets a returned server: whoever waits, the giver last; else whoever has too little."""
        waiting = [holding for holding in route.hungry.values() if holding.unmet]
        others = [holding for holding in waiting if holding is not giver]
        if others or waiting:
            return min(others or waiting, key=lambda holding: self._urgency(route, holding))
        guests = [
            holding for worker, holding in route.holdings.items() if self._book.members[worker].is_guest
        ]
        return max(guests, key=lambda holding: (deficit(route, holding), holding is giver), default=None)

    def fill(self, now_us: int, routes: Iterable[Route]) -> None:
        """Hand out what the caps leave to the workers whose clients wait, under the same caps too."""
        if not self._book.can_open(now_us):
            return
        candidates = {
            route.route_id: route
            for one in routes
            for cap in one.caps
            if cap.has_room
            for route in cap.routes.values()
            if route.hungry and route.paused_until_us <= now_us
        }
        heap: list[_Wish] = []
        for route in candidates.values():
            self._line_up(heap, route)
        while heap:
            urgency, _, route, holding = heapq.heappop(heap)
            if not holding.unmet or urgency != self._urgency(route, holding):
                continue  # another one of the same route was served meanwhile: it is lined up anew
            if route.has_room and not route.logins.has_room:
                self._held_back.add(route.logins.name)
            elif route.has_room:
                self._grant_open(now_us, route, holding)
                self._line_up(heap, route)

    def _line_up(self, heap: "list[_Wish]", route: Route) -> None:
        """Add the workers of a route whose clients wait, if the route may get anything."""
        if route.has_room:
            for holding in route.hungry.values():
                if holding.unmet:
                    self._lined_up += 1
                    heapq.heappush(heap, (self._urgency(route, holding), self._lined_up, route, holding))

    def _urgency(self, route: Route, holding: Holding) -> _Urgency:
        """Least first: routes and workers that have nothing; who lacks most slots; who waited longest."""
        lack = floor(deficit(route, holding) + 0.5) if holding.have else 0
        return route.have > 0, holding.have > 0, -lack, holding.served_us

    def _grant_open(self, now_us: int, route: Route, holding: Holding) -> None:
        slot = route.add(None, self._book.next_generation(), SlotState.OPENING, holding)
        slot.since_us = now_us
        self._served(now_us, holding)
        self._book.send(holding.worker, GrantOpen(route.route_id, slot.number, slot.generation))

    def _served(self, now_us: int, holding: Holding) -> None:
        holding.unmet = max(0, holding.unmet - 1)
        holding.served_us = now_us

    def recall(self, now_us: int, route: Route) -> None:
        """Recall for waiting clients what other workers can spare."""
        if route.key.is_replication or not any(holding.unmet for holding in route.hungry.values()):
            return
        plan = plan_recalls(route, now_us)
        for holding, count in plan.recalls:
            self._send_recall(now_us, route, holding, count, is_eviction=False)
        if plan.is_turn:
            route.turned_us = now_us
        if plan.wake_us is not None:
            self._book.wake[route.route_id] = plan.wake_us

    def evict(self, now_us: int, route: Route) -> None:
        """Make room under caps that other routes fill."""
        if route.paused_until_us > now_us or not self._book.can_open(now_us):
            return
        for cap in route.caps:
            if len(cap.routes) > 1 and not cap.has_room:
                for other, holding, count in plan_evictions(route, cap, now_us):
                    self._send_recall(now_us, other, holding, count, is_eviction=True)

    def _send_recall(
        self, now_us: int, route: Route, holding: Holding, count: int, *, is_eviction: bool
    ) -> None:
        self._recall_id += 1
        recall = Recall(route.route_id, self._recall_id, count, is_eviction)
        holding.recalled(recall, now_us)
        self._book.send(holding.worker, recall)

    def shed_excess(self, now_us: int) -> bool:
        """Close what was reported above a cap. Whether there was any."""
        has_excess = False
        for cap in {id(cap): cap for route in self._book.routes.values() for cap in route.caps}.values():
            if cap.excess:
                has_excess = True
                for route, holding, count in plan_excess(cap, now_us):
                    self._send_recall(now_us, route, holding, count, is_eviction=True)
        return has_excess

    def fill_minimum(self, now_us: int) -> bool:
        """One server for each route below its min_pool_size. Whether there was any, also a paused one."""
        below = [route for route in self._book.routes.values() if route.have < route.min_pool_size]
        self._below = {route.route_id: route for route in below if route.paused_until_us <= now_us}
        self._fill_below(now_us)
        return bool(below)

    def _fill_below(self, now_us: int) -> None:
        """For the routes that are due one: in the worker that has fewest servers of it."""
        if not self._below or not self._book.can_open(now_us):
            return
        workers = [member.worker for member in self._book.members.values() if member.is_guest]
        for route in list(self._below.values()):
            if not route.may_open or not workers:
                continue
            del self._below[route.route_id]
            if route.have >= route.min_pool_size:
                continue
            have = {worker: holding.have for worker, holding in route.holdings.items()}
            worker = min(workers, key=lambda worker: (have.get(worker, 0), worker))
            holding = route.holdings.get(worker) or self._book.introduce(route, worker, 0)
            # before it is there: pool_ttl might take another one until its worker hears of the new share
            holding.kept = max(0, min(holding.kept, len(holding.leased))) + 1
            self._book.send(worker, Keep(route.route_id, holding.kept))
            self._grant_open(now_us, route, holding)

    def keep_nothing(self, route: Route) -> None:
        """Begin anew: shares are never lowered otherwise."""
        for worker, holding in route.holdings.items():
            if holding.kept:
                holding.kept = 0
                self._book.send(worker, Keep(route.route_id, 0))

    def keep_minimum(self, route: Route) -> None:
        """Tell the workers how many servers they keep, where that changed."""
        if not route.min_pool_size:
            return
        for worker, count in spread_minimum(route).items():
            holding = route.holdings[worker]
            if holding.kept != count:
                holding.kept = count
                self._book.send(worker, Keep(route.route_id, count))
