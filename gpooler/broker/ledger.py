"""The ledger: who may hold a server. Events and the time go in, acts come out.

DESIGN §3 Leases. Pure: it reads no clock and does no I/O; all times are microseconds of one monotonic clock.
What it does not know, the number of clients that wait and run, is given to ``tick`` for the routes that
``due`` names. Free capacity is handed out at once; who gives up a busy server is decided in ticks.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gpooler.broker.acts import Act, Bury, Complain, Hold, Release, Send
from gpooler.broker.messages import (
    BrokerMessage,
    Closed,
    Closing,
    Connected,
    Declined,
    Draining,
    GrantOpen,
    GrantServer,
    Keep,
    Opened,
    OpenFailed,
    OpenRoute,
    Recall,
    RecallAnswer,
    ReportEnd,
    ReportRoute,
    ReportServer,
    ReportSlot,
    Returned,
    RouteOpened,
    RouteParameters,
    RouteRefused,
    SlotPhase,
    Want,
    WorkerId,
    WorkerMessage,
)
from gpooler.broker.shares import (
    deficit,
    is_needed_elsewhere,
    plan_evictions,
    plan_excess,
    plan_recalls,
    spread_minimum,
)
from gpooler.broker.slots import Cap, Holding, LedgerError, Route, RouteKey, Slot, SlotName, SlotState

MAX_SLOT: Final = 1_000_000  # a larger slot number in a report is nonsense
MAX_WAITING: Final = 1_000_000_000
ROUND_US: Final = 10_000  # ticks while clients wait somewhere
REST_US: Final = 1_000_000  # ticks otherwise; min_pool_size is filled by one server a round
ARRIVAL_US: Final = 2_000  # what a server takes to reach its relay and the counters to show it
RETRY_US: Final = 10_000  # least pause after a failed open, so that a dead server is not hammered
SETTLE_US: Final = 1_000_000  # after a rebuild: servers that nobody reported are ending meanwhile


@dataclass(frozen=True, slots=True)
class RuleLimits:
    """What the configuration says about the routes of one rule."""

    pool_size: int  # 0: no limit
    min_pool_size: int
    shared_pool: str | None
    reset_timeout_ms: int  # how long a dead worker's server is expected to take
    fixed: tuple[str, str] | None  # database and user on the server, where the rule has just one route


@dataclass(frozen=True, slots=True)
class Demand:
    """Clients of one route in one worker, as its counters say."""

    waiting: int
    active: int


_SlotMessage = Connected | Opened | OpenFailed | Declined | Returned | Closing | Closed


class _Violation(Exception):
    """A worker says what cannot be; not for stale and repeated messages, which are ignored."""


@dataclass(slots=True, eq=False)
class _Worker:
    worker: WorkerId
    has_history: bool
    is_reported: bool = False  # before that it is given nothing: a report would repeat it
    is_draining: bool = False

    @property
    def is_awaited(self) -> bool:
        """Whether it may hold leases that we do not know of."""
        return self.has_history and not self.is_reported

    @property
    def is_guest(self) -> bool:
        """Whether it may be given what it did not ask for."""
        return self.is_reported and not self.is_draining


class Ledger:
    """All routes, all slots, all workers."""

    def __init__(
        self, rules: Mapping[str, RuleLimits], shared_pools: Mapping[str, int], max_routes: int
    ) -> None:
        """``shared_pools``: sizes by name. Route ids are 0 to ``max_routes`` - 1."""
        self._rules = rules
        self._shared = {name: Cap(f"shared_pool {name}", size) for name, size in shared_pools.items()}
        self._max_routes = max_routes
        self._workers: dict[WorkerId, _Worker] = {}
        self._routes: dict[int, Route] = {}
        self._by_key: dict[RouteKey, Route] = {}
        self._hungry: dict[int, Route] = {}
        self._urgent: dict[int, Route] = {}  # asked since the last tick and got nothing
        self._wake: dict[int, int] = {}  # route id → when to look again
        self._pending: dict[tuple[WorkerId, int], OpenRoute] = {}  # until every worker has reported
        self._is_serving = False
        self._opens_from_us = 0
        self._must_settle = False
        self._generation = 0
        self._recall_id = 0
        self._round_us = 0  # the last round
        self._rest_us = 0  # the last round that looked at everything
        self._acts: list[Act] = []
        self._handlers: dict[type[Any], Callable[[int, _Worker, Any], None]] = {
            ReportRoute: self._on_report_route,
            ReportSlot: self._on_report_slot,
            ReportServer: self._on_report_server,
            ReportEnd: self._on_report_end,
            OpenRoute: self._on_open_route,
            Want: self._on_want,
            Draining: self._on_draining,
            Connected: self._on_connected,
            Opened: self._on_opened,
            OpenFailed: self._on_open_failed,
            Declined: self._on_declined,
            Returned: self._on_returned,
            RecallAnswer: self._on_recall_answer,
            Closing: self._on_closing,
            Closed: self._on_closed,
            RouteParameters: self._on_parameters,
        }

    # --- events ---------------------------------------------------------------------------------

    def attach(self, worker: WorkerId, has_history: bool) -> None:
        """A worker lives. With a history it may hold leases: nothing is granted before it has reported."""
        self._workers[worker] = _Worker(worker, has_history)

    def serve(self, now_us: int, is_first: bool) -> list[Act]:
        """Every worker that lives has been attached. ``is_first``: there was no broker before."""
        self._is_serving = True
        self._must_settle = not is_first
        self._begin_if_ready(now_us)
        return self._take()

    def handle(self, now_us: int, worker: WorkerId, message: WorkerMessage) -> list[Act]:
        """A worker's message other than Hello. Its descriptor is kept only if an act says so."""
        sender = self._workers.get(worker)
        if sender is None:
            return []
        try:
            handler = self._handlers.get(type(message))
            if handler is None:
                raise _Violation("unexpected")
            handler(now_us, sender, message)
        except _Violation as violation:
            self._acts.append(Complain(worker, f"{type(message).__name__}: {violation}"))
        return self._take()

    def worker_gone(self, now_us: int, worker: WorkerId) -> list[Act]:
        """A worker is dead, and every message that it sent has been handled."""
        if self._workers.pop(worker, None) is None:
            return []
        self._pending = {at: message for at, message in self._pending.items() if at[0] != worker}
        for route in self._routes.values():
            holding = route.holdings.get(worker)
            if holding is None:
                continue
            self._set_want(route, holding, 0)
            for slot in [*holding.opening.values(), *holding.leased.values(), *holding.leaving.values()]:
                if slot.has_descriptor:
                    self._bury(now_us, slot)
                else:
                    route.free(slot)  # nothing was connected: no PostgreSQL process can be left
            del route.holdings[worker]
            self._after_change(now_us, route)
        self._begin_if_ready(now_us)
        return self._take()

    def gone(self, now_us: int, name: SlotName, generation: int) -> list[Act]:
        """The PostgreSQL process of a buried slot is gone."""
        route = self._routes.get(name.route_id)
        slot = route.buried.get(name.slot) if route is not None else None
        if slot is not None and slot.generation == generation:
            self._free(now_us, slot)
        return self._take()

    def due(self, now_us: int) -> list[int]:
        """Ids of the routes whose demand the tick at ``now_us`` wants to know, for every worker."""
        routes = self._due(now_us)
        seen = {route.route_id for route in routes}
        for route in routes:
            for cap in route.caps:
                seen.update(cap.routes)
        return sorted(seen)

    def next_due_us(self) -> int:
        """When to tick at the latest; a time that has passed means at once."""
        if self._urgent:
            return 0
        rounds = [self._round_us + ROUND_US] if self._hungry else []
        return min([*rounds, self._rest_us + REST_US, *self._wake.values()])

    def tick(self, now_us: int, demand: Mapping[tuple[WorkerId, int], Demand]) -> list[Act]:
        """Share out anew. ``demand`` by worker and route id, for the routes of ``due(now_us)``."""
        due = self._due(now_us)
        for (worker, route_id), seen in demand.items():
            route = self._routes.get(route_id)
            holding = route.holdings.get(worker) if route is not None else None
            if holding is not None:
                holding.observe(seen.waiting, seen.active, now_us)
        self._urgent.clear()
        self._wake = {route_id: at for route_id, at in self._wake.items() if at > now_us}
        for route in due:
            self._fill(now_us, [route])
        for route in due:
            self._evict(now_us, route)
        for route in due:
            self._recall(now_us, route)
        if self._is_round(now_us):
            self._round_us = now_us
        if now_us >= self._rest_us + REST_US:
            self._rest_us = now_us
            self._shed_excess(now_us)
            self._fill_minimum(now_us)
        return self._take()

    # --- state for others --------------------------------------------------------------------------

    @property
    def routes(self) -> Mapping[int, Route]:
        """The routes by id; to be read only."""
        return self._routes

    @property
    def is_ready(self) -> bool:
        """Whether every worker with a history has reported."""
        return self._is_serving and not any(worker.is_awaited for worker in self._workers.values())

    def check(self) -> None:
        """The invariant: granted ≤ every cap, no slot in two hands. Raises LedgerError."""
        for route_id, route in self._routes.items():
            route.check()
            if not route.holdings.keys() <= self._workers.keys():
                raise LedgerError(f"route {route_id}: a dead worker holds")
            if bool(route.hungry) != (route_id in self._hungry):
                raise LedgerError(f"route {route_id}: hungry and not known for it")
            if any(slot.generation > self._generation for slot in route.slots.values()):
                raise LedgerError(f"route {route_id}: a generation from the future")
        for looked_at in (self._urgent, self._wake):
            if not looked_at.keys() <= self._hungry.keys():
                raise LedgerError("a route without waiting clients is looked at")

    # --- reports ---------------------------------------------------------------------------------

    def _on_report_route(self, now_us: int, sender: _Worker, message: ReportRoute) -> None:
        key = RouteKey(message.rule, message.database, message.user)
        route = self._by_key.get(key)
        if route is None and message.route_id not in self._routes:
            if not 0 <= message.route_id < self._max_routes:
                raise _Violation(f"route id {message.route_id}")
            route = self._make_route(message.route_id, key)
        if route is None or route.route_id != message.route_id:
            raise _Violation(f"route {message.route_id} is another")
        route.holdings.setdefault(sender.worker, Holding(sender.worker))

    def _on_report_slot(self, now_us: int, sender: _Worker, message: ReportSlot) -> None:
        self._take_report(now_us, sender, message, SlotState.OPENING)

    def _on_report_server(self, now_us: int, sender: _Worker, message: ReportServer) -> None:
        if message.phase is SlotPhase.OPEN and message.state is None:
            raise _Violation("open and without a state")
        states = {
            SlotPhase.OPENING: SlotState.OPENING,
            SlotPhase.OPEN: SlotState.LEASED,
            SlotPhase.CLOSING: SlotState.LEAVING,
        }
        slot = self._take_report(now_us, sender, message, states[message.phase])
        if slot is not None:
            slot.server = message.state
            slot.endpoint = message.state.endpoint if message.state is not None else ""
            self._hold(slot)

    def _take_report(
        self, now_us: int, sender: _Worker, message: ReportSlot | ReportServer, state: SlotState
    ) -> Slot | None:
        """The slot that a worker reports; None when the report is a repetition."""
        if sender.is_reported:
            return None
        route, holding = self._holding(sender, message.route_id)
        known = route.slots.get(message.slot)
        if known is not None:
            if known.generation == message.generation and known.holder is holding:
                return None
            raise _Violation(f"slot {known.name} is in other hands")
        if not 0 < message.slot <= MAX_SLOT or message.generation < 0:
            raise _Violation(f"slot {message.slot} generation {message.generation}")
        self._generation = max(self._generation, message.generation)
        slot = route.add(message.slot, message.generation, state, holding)
        slot.since_us = slot.opened_us = now_us
        return slot

    def _on_report_end(self, now_us: int, sender: _Worker, message: ReportEnd) -> None:
        if not sender.is_reported:
            sender.is_reported = True
            self._begin_if_ready(now_us)

    def _begin_if_ready(self, now_us: int) -> None:
        """Once all is known: answer who waits for a route, make the fixed routes, grant."""
        if not self.is_ready:
            return
        if self._must_settle:
            self._must_settle = False
            self._opens_from_us = now_us + SETTLE_US
        pending, self._pending = self._pending, {}
        for (worker, _), message in pending.items():
            self._on_open_route(now_us, self._workers[worker], message)
        for rule, limits in self._rules.items():
            if limits.min_pool_size and limits.fixed and not limits.shared_pool:
                key = RouteKey(rule, *limits.fixed)
                if key not in self._by_key:
                    self._new_route(key)
        self._fill(now_us, self._hungry.values())

    # --- routes ----------------------------------------------------------------------------------

    def _on_open_route(self, now_us: int, sender: _Worker, message: OpenRoute) -> None:
        key = RouteKey(message.rule, message.database, message.user)
        route = self._by_key.get(key)
        if route is None and not self.is_ready:
            self._pending[sender.worker, message.token] = message
            return
        if route is None and message.rule in self._rules:
            route = self._new_route(key)
        if route is None:
            cause = "route ids are used up" if message.rule in self._rules else f"unknown rule {message.rule}"
            self._send(sender.worker, RouteRefused(message.token, cause))
            return
        self._introduce(route, sender.worker, message.token)

    def _introduce(self, route: Route, worker: WorkerId, token: int) -> Holding:
        """Tell a worker of a route."""
        self._send(worker, RouteOpened(token, route.route_id, *route.key, route.parameters))
        return route.holdings.setdefault(worker, Holding(worker))

    def _new_route(self, key: RouteKey) -> Route | None:
        """A route with the next id; None when ids are used up. Ids are never given out again."""
        route_id = max(self._routes, default=-1) + 1
        return self._make_route(route_id, key) if route_id < self._max_routes else None

    def _make_route(self, route_id: int, key: RouteKey) -> Route:
        limits = self._rules.get(key.rule)
        if limits is None:  # reported to a broker with a newer configuration: nothing more is granted
            limits = RuleLimits(0, 0, None, 0, None)
            caps = [Cap(f"route {route_id}", 0)]
        else:
            caps = [Cap(f"route {route_id}", limits.pool_size or None)]
        minimum = limits.min_pool_size
        if limits.shared_pool is not None:
            caps.append(self._shared[limits.shared_pool])
            minimum = 0
        route = Route(route_id, key, tuple(caps), minimum, limits.reset_timeout_ms * 1000)
        for cap in caps:
            cap.routes[route_id] = route
        self._routes[route_id] = self._by_key[key] = route
        return route

    def _on_parameters(self, now_us: int, sender: _Worker, message: RouteParameters) -> None:
        route, _ = self._holding(sender, message.route_id)
        if route.parameters == message.parameters:
            return
        route.parameters = message.parameters
        for worker in route.holdings:
            if worker != sender.worker:
                self._send(worker, message)

    # --- wishes ----------------------------------------------------------------------------------

    def _on_want(self, now_us: int, sender: _Worker, message: Want) -> None:
        route, holding = self._holding(sender, message.route_id)
        if not 0 <= message.waiting <= MAX_WAITING:
            raise _Violation(f"{message.waiting} clients")
        self._set_want(route, holding, message.waiting)
        holding.wait_for(message.waiting, now_us)
        self._fill(now_us, [route])
        if holding.unmet:
            self._urgent[route.route_id] = route

    def _set_want(self, route: Route, holding: Holding, waiting: int) -> None:
        holding.want = waiting
        if waiting:
            route.hungry[holding.worker] = holding
            self._hungry[route.route_id] = route
        else:
            holding.unmet = holding.waiting = 0
            route.hungry.pop(holding.worker, None)
            if not route.hungry:
                for routes in (self._hungry, self._urgent):
                    routes.pop(route.route_id, None)
                self._wake.pop(route.route_id, None)

    def _on_draining(self, now_us: int, sender: _Worker, message: Draining) -> None:
        sender.is_draining = True

    # --- slots -----------------------------------------------------------------------------------

    def _on_connected(self, now_us: int, sender: _Worker, message: Connected) -> None:
        slot = self._slot(sender, message, (SlotState.OPENING,))
        if slot is not None and not slot.has_descriptor:
            slot.endpoint = message.endpoint
            self._hold(slot)

    def _on_opened(self, now_us: int, sender: _Worker, message: Opened) -> None:
        slot = self._slot(sender, message, (SlotState.OPENING,))
        if slot is None:
            return
        if not slot.has_descriptor:
            raise _Violation("was never connected")
        slot.server = message.state
        slot.endpoint = message.state.endpoint
        slot.since_us = slot.opened_us = now_us
        slot.arrives_us = now_us + ARRIVAL_US  # its client is counted as waiting until the relay has it
        slot.route.move(slot, SlotState.LEASED)
        self._spread_minimum(slot.route)

    def _on_open_failed(self, now_us: int, sender: _Worker, message: OpenFailed) -> None:
        slot = self._slot(sender, message, (SlotState.OPENING,))
        if slot is None:
            return
        holding = slot.holder
        if holding is not None and holding.unmet < holding.want:
            holding.unmet += 1  # whom it was meant for waits on, as far as we know
        route = slot.route
        pause_us = max(RETRY_US, message.retry_after_ms * 1000)
        route.paused_until_us = max(route.paused_until_us, now_us + pause_us)
        self._free(now_us, slot)

    def _on_declined(self, now_us: int, sender: _Worker, message: Declined) -> None:
        slot = self._slot(sender, message, (SlotState.OPENING,))
        if slot is not None:
            self._free(now_us, slot)

    def _on_closing(self, now_us: int, sender: _Worker, message: Closing) -> None:
        slot = self._slot(sender, message, (SlotState.OPENING, SlotState.LEASED))
        if slot is not None and slot.holder is not None:
            was_leased = slot.state is SlotState.LEASED
            slot.since_us = now_us
            slot.route.move(slot, SlotState.LEAVING)
            if was_leased:
                slot.holder.leave(is_returned=False)
                self._spread_minimum(slot.route)

    def _on_closed(self, now_us: int, sender: _Worker, message: Closed) -> None:
        slot = self._slot(sender, message, (SlotState.OPENING, SlotState.LEASED, SlotState.LEAVING))
        if slot is not None:
            was_leased, holding = slot.state is SlotState.LEASED, slot.holder
            self._free(now_us, slot)
            if was_leased and holding is not None:
                holding.leave(is_returned=False)

    def _on_returned(self, now_us: int, sender: _Worker, message: Returned) -> None:
        slot = self._slot(sender, message, (SlotState.LEASED,))
        if slot is None or slot.holder is None:
            return
        giver, route = slot.holder, slot.route
        slot.server = message.state
        route.move(slot, SlotState.RETURNED)
        giver.leave(is_returned=True)
        taker = None if is_needed_elsewhere(slot, now_us) else self._taker(now_us, route, giver)
        if taker is None:
            self._bury(now_us, slot)
            return
        self._generation += 1
        slot.generation = self._generation
        slot.since_us = now_us
        slot.arrives_us = now_us + ARRIVAL_US
        route.move(slot, SlotState.LEASED, taker)
        self._served(now_us, taker)
        grant = GrantServer(route.route_id, slot.number, slot.generation, message.state)
        self._acts.append(Send(taker.worker, grant, slot.name))
        self._spread_minimum(route)

    def _taker(self, now_us: int, route: Route, giver: Holding) -> Holding | None:
        """Who gets a returned server: whoever waits, the giver last; else whoever has too little."""
        waiting = [holding for holding in route.hungry.values() if holding.unmet]
        others = [holding for holding in waiting if holding is not giver]
        if others or waiting:
            return min(others or waiting, key=lambda holding: self._urgency(route, holding))
        guests = [holding for worker, holding in route.holdings.items() if self._workers[worker].is_guest]
        return max(guests, key=lambda holding: (deficit(route, holding), holding is giver), default=None)

    def _on_recall_answer(self, now_us: int, sender: _Worker, message: RecallAnswer) -> None:
        _, holding = self._holding(sender, message.route_id)
        if message.now < 0 or message.later < 0:
            raise _Violation("negative")
        recall = holding.recalls.pop(message.recall_id, None)
        if recall is not None:
            holding.answered(recall, message.now + message.later)

    # --- sharing out -----------------------------------------------------------------------------

    def _fill(self, now_us: int, routes: Iterable[Route]) -> None:
        """Hand out what the caps leave to the workers whose clients wait, under the same caps too."""
        if now_us < self._opens_from_us or not self.is_ready:
            return
        candidates = {
            route.route_id: route
            for one in routes
            for cap in one.caps
            for route in cap.routes.values()
            if route.hungry and route.paused_until_us <= now_us
        }
        while True:
            choice = [
                (not_first, self._urgency(route, holding), route, holding)
                for route in candidates.values()
                if route.has_room
                for not_first in (route.have > 0,)
                for holding in route.hungry.values()
                if holding.unmet
            ]
            if not choice:
                return
            _, _, route, holding = min(choice, key=lambda item: item[:2])
            self._grant_open(now_us, route, holding)

    def _urgency(self, route: Route, holding: Holding) -> tuple[bool, float, int]:
        """Least first: who has nothing, then who has least of its share, then who was served longest ago."""
        lack = deficit(route, holding) if holding.have else 0.0
        return holding.have > 0, -lack, holding.served_us

    def _grant_open(self, now_us: int, route: Route, holding: Holding) -> None:
        self._generation += 1
        slot = route.add(None, self._generation, SlotState.OPENING, holding)
        slot.since_us = now_us
        self._served(now_us, holding)
        self._send(holding.worker, GrantOpen(route.route_id, slot.number, slot.generation))

    def _served(self, now_us: int, holding: Holding) -> None:
        holding.unmet = max(0, holding.unmet - 1)
        holding.served_us = now_us

    def _recall(self, now_us: int, route: Route) -> None:
        """Recall for waiting clients what other workers can spare."""
        if not any(holding.unmet for holding in route.hungry.values()):
            return
        plan = plan_recalls(route, now_us)
        for holding, count in plan.recalls:
            self._send_recall(now_us, route, holding, count, is_eviction=False)
        if plan.wake_us is not None:
            self._wake[route.route_id] = plan.wake_us

    def _evict(self, now_us: int, route: Route) -> None:
        """Make room under caps that other routes fill."""
        if route.paused_until_us > now_us or not self.is_ready:
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
        self._send(holding.worker, recall)

    def _shed_excess(self, now_us: int) -> None:
        """Close what was reported above a cap."""
        for cap in {id(cap): cap for route in self._routes.values() for cap in route.caps}.values():
            if cap.excess:
                for route, holding, count in plan_excess(cap, now_us):
                    self._send_recall(now_us, route, holding, count, is_eviction=True)

    def _fill_minimum(self, now_us: int) -> None:
        """One server for each route below its min_pool_size, in the worker that has fewest of it."""
        if now_us < self._opens_from_us or not self.is_ready:
            return
        workers = [entry.worker for entry in self._workers.values() if entry.is_guest]
        for route in self._routes.values():
            if route.have >= route.min_pool_size or route.paused_until_us > now_us or not route.has_room:
                continue
            have = {worker: holding.have for worker, holding in route.holdings.items()}
            worker = min(workers, key=lambda worker: (have.get(worker, 0), worker), default=None)
            if worker is not None:
                holding = route.holdings.get(worker) or self._introduce(route, worker, 0)
                self._grant_open(now_us, route, holding)

    def _spread_minimum(self, route: Route) -> None:
        """Tell the workers how many servers they keep, where that changed."""
        if not route.min_pool_size:
            return
        for worker, count in spread_minimum(route).items():
            holding = route.holdings[worker]
            if holding.kept != count:
                holding.kept = count
                self._send(worker, Keep(route.route_id, count))

    # --- small parts -----------------------------------------------------------------------------

    def _is_round(self, now_us: int) -> bool:
        return bool(self._hungry) and now_us >= self._round_us + ROUND_US

    def _due(self, now_us: int) -> list[Route]:
        """The routes with waiting clients that the tick at ``now_us`` looks at."""
        if self._is_round(now_us):
            return list(self._hungry.values())
        awake = [self._hungry[route_id] for route_id, at in self._wake.items() if at <= now_us]
        return list({route.route_id: route for route in [*self._urgent.values(), *awake]}.values())

    def _holding(self, sender: _Worker, route_id: int) -> tuple[Route, Holding]:
        route = self._routes.get(route_id)
        holding = route.holdings.get(sender.worker) if route is not None else None
        if route is None or holding is None:
            raise _Violation(f"route {route_id} was never opened")
        return route, holding

    def _slot(self, sender: _Worker, message: _SlotMessage, states: tuple[SlotState, ...]) -> Slot | None:
        """The slot that a message is about; None when the message is stale or a repetition."""
        route, holding = self._holding(sender, message.route_id)
        slot = route.slots.get(message.slot)
        if slot is None or slot.generation != message.generation or slot.holder is not holding:
            return None
        return slot if slot.state in states else None

    def _hold(self, slot: Slot) -> None:
        slot.has_descriptor = True
        self._acts.append(Hold(slot.name))

    def _bury(self, now_us: int, slot: Slot) -> None:
        """The broker closes the server itself."""
        was_returned = slot.state is SlotState.RETURNED
        slot.route.move(slot, SlotState.BURIED)
        slot.since_us = now_us
        pid, secret_hex = 0, ""
        if slot.server is not None and not was_returned:
            pid, secret_hex = slot.server.pid, slot.server.secret_hex
        timeout_us = slot.route.reset_timeout_us
        self._acts.append(Bury(slot.name, slot.generation, slot.endpoint, pid, secret_hex, timeout_us))

    def _free(self, now_us: int, slot: Slot) -> None:
        """The slot's PostgreSQL process is gone, or there never was one."""
        slot.route.free(slot)
        if slot.has_descriptor:
            self._acts.append(Release(slot.name))
        self._after_change(now_us, slot.route)

    def _after_change(self, now_us: int, route: Route) -> None:
        self._spread_minimum(route)
        self._fill(now_us, [route])

    def _send(self, worker: WorkerId, message: BrokerMessage) -> None:
        self._acts.append(Send(worker, message, None))

    def _take(self) -> list[Act]:
        acts, self._acts = self._acts, []
        return acts
