"""The ledger: who may hold a server. Events and the time go in, acts come out.

DESIGN §3 Leases. Pure: it reads no clock and does no I/O; all times are microseconds of one monotonic clock.
What it does not know, the number of clients that wait and run, is given to ``tick`` for the routes that
``due`` names. Free capacity is handed out at once; who gives up a busy server is decided in ticks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Final

from gpooler.broker.acts import Act, Complain
from gpooler.broker.book import Book, Inherited, Member, RuleLimits
from gpooler.broker.messages import (
    Closed,
    Closing,
    Connected,
    Declined,
    Draining,
    Opened,
    OpenFailed,
    OpenRoute,
    RecallAnswer,
    ReportEnd,
    ReportRoute,
    ReportServer,
    ReportSlot,
    Returned,
    RouteParameters,
    RouteRefused,
    SlotPhase,
    Want,
    WorkerId,
    WorkerMessage,
)
from gpooler.broker.sharing import ARRIVAL_US, Sharing
from gpooler.broker.slots import Holding, Route, RouteKey, Slot, SlotName, SlotState

MAX_SLOT: Final = 1_000_000  # a larger slot number in a report is nonsense
MAX_WAITING: Final = 1_000_000_000
ROUND_US: Final = 10_000  # ticks while clients wait somewhere
LOOKS_MOST: Final = 64  # routes a tick; what is left is looked at by the next: messages come in between
REST_US: Final = 1_000_000  # ticks otherwise; min_pool_size is filled by one server a round
IDLE_US: Final = 60_000_000  # and once a tick has found nothing to do, until something happens
RETRY_US: Final = 10_000  # least pause after a failed open, so that a dead server is not hammered
SETTLE_US: Final = 1_000_000  # after a rebuild: servers that nobody reported are ending meanwhile


@dataclass(frozen=True, slots=True)
class Demand:
    """Clients and servers of one route in one worker, as its counters say."""

    waiting: int
    active: int
    servers: int  # that its relay has: attached, being reset, parked


_SlotMessage = Connected | Opened | OpenFailed | Declined | Returned | Closing | Closed


class _Violation(Exception):
    """A worker says what cannot be; not for stale and repeated messages, which are ignored."""


class Ledger:
    """All routes, all slots, all workers."""

    def __init__(
        self,
        rules: Mapping[str, RuleLimits],
        shared_pools: Mapping[str, int],
        storages: Mapping[str, int],
        max_routes: int,
    ) -> None:
        """``shared_pools``: sizes by name; ``storages``: logins at once. Ids are 0 to ``max_routes`` - 1."""
        self._book = Book(rules, shared_pools, storages, max_routes)
        self._sharing = Sharing(self._book)
        self._pending: dict[tuple[WorkerId, int], OpenRoute] = {}  # until every worker has reported
        self._inherited: dict[SlotName, Inherited] = {}  # until every worker has reported
        self._must_settle = False
        self._round_us = 0  # the last round
        self._rest_us = 0  # the last round that looked at everything
        self._is_idle = False  # it found nothing to do, and nothing has happened since
        self._handlers: dict[type[Any], Callable[[int, Member, Any], None]] = {
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

    def configure(
        self,
        now_us: int,
        rules: Mapping[str, RuleLimits],
        shared_pools: Mapping[str, int],
        storages: Mapping[str, int],
    ) -> list[Act]:
        """New limits: what is above them is closed as it becomes free, what they allow is handed out."""
        self._is_idle = False
        minimums = {route_id: route.min_pool_size for route_id, route in self._book.routes.items()}
        self._book.configure(rules, shared_pools, storages)
        for route_id, route in self._book.routes.items():
            route.paused_until_us = 0  # what failed may work now
            if route.min_pool_size < minimums[route_id]:
                self._sharing.keep_nothing(route)
            self._sharing.keep_minimum(route)
        self._sharing.shed_excess(now_us)
        if self._book.is_ready:
            self._make_fixed_routes()
            self._sharing.fill(now_us, self._book.hungry.values())
        return self._book.take_acts()

    # --- events ---------------------------------------------------------------------------------

    def attach(self, worker: WorkerId, has_history: bool) -> None:
        """A worker lives. With a history it may hold leases: nothing is granted before it has reported."""
        self._book.members[worker] = Member(worker, has_history)

    def inherit(self, name: SlotName, server: Inherited) -> None:
        """The master kept this server; to be told before ``serve``. Ended unless a worker reports it."""
        self._inherited[name] = server

    def serve(self, now_us: int, is_settled: bool, first_new_id: int = 0) -> list[Act]:
        """Every worker that lives has been attached. ``is_settled``: no server ends
        that nobody will report, as there was no broker before, or it ended in peace.

        ``first_new_id``: lower route ids may have been given out by an earlier broker.
        """
        self._is_idle = False
        self._book.is_serving = True
        self._book.first_new_id = first_new_id
        self._must_settle = not is_settled
        self._begin_if_ready(now_us)
        return self._book.take_acts()

    def handle(self, now_us: int, worker: WorkerId, message: WorkerMessage) -> list[Act]:
        """A worker's message other than Hello. Its descriptor is kept only if an act says so."""
        sender = self._book.members.get(worker)
        if sender is None:
            return []
        self._is_idle = False
        try:
            handler = self._handlers.get(type(message))
            if handler is None:
                raise _Violation("unexpected")
            handler(now_us, sender, message)
        except _Violation as violation:
            self._book.act(Complain(worker, f"{type(message).__name__}: {violation}"))
        return self._book.take_acts()

    def worker_gone(self, now_us: int, worker: WorkerId) -> list[Act]:
        """A worker is dead, and every message that it sent has been handled."""
        if self._book.members.pop(worker, None) is None:
            return []
        self._is_idle = False
        self._pending = {at: message for at, message in self._pending.items() if at[0] != worker}
        routes = [route for route in self._book.routes.values() if worker in route.holdings]
        for route in routes:
            holding = route.holdings.pop(worker)
            self._book.set_want(route, holding, 0)
            for slot in [*holding.opening.values(), *holding.leased.values(), *holding.leaving.values()]:
                if slot.has_descriptor:
                    self._book.bury(now_us, slot)
                else:
                    route.free(slot)  # nothing was connected: no PostgreSQL process can be left
        for route in routes:
            self._sharing.after_change(now_us, route)
        self._begin_if_ready(now_us)
        return self._book.take_acts()

    def gone(self, now_us: int, name: SlotName, generation: int) -> list[Act]:
        """The PostgreSQL process of a buried slot is gone."""
        self._is_idle = False
        route = self._book.routes.get(name.route_id)
        slot = route.buried.get(name.slot) if route is not None else None
        if slot is not None and slot.generation == generation:
            self._sharing.free(now_us, slot)
        return self._book.take_acts()

    def due(self, now_us: int) -> list[int]:
        """Ids of the routes whose demand the tick at ``now_us`` wants to know, for every worker.

        Those that it looks at, and those that have anything under the same caps.
        """
        routes = self._due(now_us)
        seen = {route.route_id for route in routes}
        for cap in {id(cap): cap for route in routes for cap in route.caps}.values():
            seen.update([name.route_id for name in cap.slots])
        return sorted(seen)

    def next_due_us(self) -> int:
        """When to tick at the latest; a time that has passed means at once."""
        if self._book.urgent:
            return 0
        rounds = [self._round_us + ROUND_US] if self._book.hungry else []
        return min([*rounds, self._rest_due_us, *self._book.wake.values()])

    def tick(self, now_us: int, demand: Mapping[tuple[WorkerId, int], Demand]) -> list[Act]:
        """Share out anew. ``demand`` by worker and route id, for the routes of ``due(now_us)``."""
        due = self._due(now_us)
        for (worker, route_id), seen in demand.items():
            route = self._book.routes.get(route_id)
            holding = route.holdings.get(worker) if route is not None else None
            if holding is not None:
                holding.observe(seen.waiting, seen.active, seen.servers, now_us)
        is_round = self._is_round(now_us)
        for route in due:
            self._book.looked_at(route)
        self._sharing.fill(now_us, due)
        for route in due:
            self._sharing.evict(now_us, route)
        for route in due:
            self._sharing.recall(now_us, route)
        if is_round:
            self._round_us = now_us
        if now_us >= self._rest_due_us:
            self._rest_us = now_us
            has_excess = self._sharing.shed_excess(now_us)
            is_below = self._sharing.fill_minimum(now_us)
            self._is_idle = not (has_excess or is_below)
        return self._book.take_acts()

    @property
    def _rest_due_us(self) -> int:
        """When everything is looked at next."""
        return self._rest_us + (IDLE_US if self._is_idle else REST_US)

    # --- state for others --------------------------------------------------------------------------

    @property
    def routes(self) -> Mapping[int, Route]:
        """The routes by id; to be read only."""
        return self._book.routes

    @property
    def is_ready(self) -> bool:
        """Whether every worker with a history has reported."""
        return self._book.is_ready

    def check(self) -> None:
        """The invariant: granted ≤ every cap, no slot in two hands. Raises LedgerError."""
        self._book.check()

    # --- reports ---------------------------------------------------------------------------------

    def _on_report_route(self, now_us: int, sender: Member, message: ReportRoute) -> None:
        key = RouteKey(message.rule, message.database, message.user, message.is_replication)
        route = self._book.by_key.get(key)
        if route is None and message.route_id not in self._book.routes:
            if not 0 <= message.route_id < self._book.max_routes:
                raise _Violation(f"route id {message.route_id}")
            route = self._book.make_route(message.route_id, key)
        if route is None or route.route_id != message.route_id:
            raise _Violation(f"route {message.route_id} is another")
        route.holdings.setdefault(sender.worker, Holding(sender.worker))

    def _on_report_slot(self, now_us: int, sender: Member, message: ReportSlot) -> None:
        self._take_report(now_us, sender, message, SlotState.OPENING)

    def _on_report_server(self, now_us: int, sender: Member, message: ReportServer) -> None:
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
            self._book.hold(slot)

    def _take_report(
        self, now_us: int, sender: Member, message: ReportSlot | ReportServer, state: SlotState
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
        self._book.generation = max(self._book.generation, message.generation)
        slot = route.add(message.slot, message.generation, state, holding)
        slot.since_us = slot.opened_us = now_us
        return slot

    def _on_report_end(self, now_us: int, sender: Member, message: ReportEnd) -> None:
        if not sender.is_reported:
            sender.is_reported = True
            self._begin_if_ready(now_us)

    def _begin_if_ready(self, now_us: int) -> None:
        """Once all is known: answer who waits for a route, make the fixed routes, grant."""
        if not self._book.is_ready:
            return
        if self._must_settle:
            self._must_settle = False
            self._book.opens_from_us = now_us + SETTLE_US
        inherited, self._inherited = self._inherited, {}
        for name, server in inherited.items():
            self._book.bury_inherited(now_us, name, server)
        pending, self._pending = self._pending, {}
        for (worker, _), message in pending.items():
            self._on_open_route(now_us, self._book.members[worker], message)
        self._make_fixed_routes()
        self._sharing.fill(now_us, self._book.hungry.values())

    def _make_fixed_routes(self) -> None:
        """Those that have servers before anybody asks for them."""
        for rule, limits in self._book.rules.items():
            if limits.min_pool_size and limits.only_names and not limits.shared_pool:
                key = RouteKey(rule, *limits.only_names)
                if key not in self._book.by_key:
                    self._book.new_route(key)

    # --- routes ----------------------------------------------------------------------------------

    def _on_open_route(self, now_us: int, sender: Member, message: OpenRoute) -> None:
        key = RouteKey(message.rule, message.database, message.user, message.is_replication)
        route = self._book.by_key.get(key)
        if route is None and not self._book.is_ready:
            self._pending[sender.worker, message.token] = message
            return
        if route is None and message.rule in self._book.rules:
            route = self._book.new_route(key)
        if route is None:
            cause = (
                "route ids are used up"
                if message.rule in self._book.rules
                else f"unknown rule {message.rule}"
            )
            self._book.send(sender.worker, RouteRefused(message.token, cause))
            return
        self._book.introduce(route, sender.worker, message.token)

    def _on_parameters(self, now_us: int, sender: Member, message: RouteParameters) -> None:
        route, _ = self._holding(sender, message.route_id)
        if route.parameters == message.parameters:
            return
        route.parameters = message.parameters
        for worker in route.holdings:
            if worker != sender.worker:
                self._book.send(worker, message)

    # --- wishes ----------------------------------------------------------------------------------

    def _on_want(self, now_us: int, sender: Member, message: Want) -> None:
        route, holding = self._holding(sender, message.route_id)
        if not 0 <= message.waiting <= MAX_WAITING:
            raise _Violation(f"{message.waiting} clients")
        self._book.set_want(route, holding, message.waiting)
        holding.wait_for(message.waiting, now_us)
        self._sharing.fill(now_us, [route])
        if holding.unmet:
            self._book.urgent[route.route_id] = route

    def _on_draining(self, now_us: int, sender: Member, message: Draining) -> None:
        sender.is_draining = True

    # --- slots -----------------------------------------------------------------------------------

    def _on_connected(self, now_us: int, sender: Member, message: Connected) -> None:
        slot = self._slot(sender, message, (SlotState.OPENING,))
        if slot is not None:  # once more when the first connection had to be given up: TLS refused, say
            slot.endpoint = message.endpoint
            self._book.hold(slot)

    def _on_opened(self, now_us: int, sender: Member, message: Opened) -> None:
        slot = self._slot(sender, message, (SlotState.OPENING,))
        if slot is None:
            return
        if not slot.has_descriptor:
            raise _Violation("was never connected")
        slot.server = message.state
        slot.endpoint = message.state.endpoint
        slot.since_us = slot.opened_us = now_us
        slot.arrives_us = now_us + ARRIVAL_US  # its client is counted as waiting until the relay has it
        self._book.entrust(slot)
        slot.route.move(slot, SlotState.LEASED)
        self._sharing.keep_minimum(slot.route)
        self._sharing.login_over(now_us, slot.route)

    def _on_open_failed(self, now_us: int, sender: Member, message: OpenFailed) -> None:
        slot = self._slot(sender, message, (SlotState.OPENING,))
        if slot is None:
            return
        holding = slot.holder
        if holding is not None and holding.unmet < holding.want:
            holding.unmet += 1  # whom it was meant for waits on, as far as we know
        route = slot.route
        pause_us = max(RETRY_US, message.retry_after_ms * 1000)
        route.paused_until_us = max(route.paused_until_us, now_us + pause_us)
        self._sharing.free(now_us, slot)

    def _on_declined(self, now_us: int, sender: Member, message: Declined) -> None:
        slot = self._slot(sender, message, (SlotState.OPENING,))
        if slot is not None:
            self._sharing.free(now_us, slot)

    def _on_closing(self, now_us: int, sender: Member, message: Closing) -> None:
        slot = self._slot(sender, message, (SlotState.OPENING, SlotState.LEASED))
        if slot is not None and slot.holder is not None:
            was_leased = slot.state is SlotState.LEASED
            slot.since_us = now_us
            slot.route.move(slot, SlotState.LEAVING)
            if was_leased:
                slot.holder.leave(is_returned=False)
                self._sharing.keep_minimum(slot.route)
            else:
                self._sharing.login_over(now_us, slot.route)

    def _on_closed(self, now_us: int, sender: Member, message: Closed) -> None:
        slot = self._slot(sender, message, (SlotState.OPENING, SlotState.LEASED, SlotState.LEAVING))
        if slot is not None:
            was_leased, holding = slot.state is SlotState.LEASED, slot.holder
            self._sharing.free(now_us, slot)
            if was_leased and holding is not None:
                holding.leave(is_returned=False)

    def _on_returned(self, now_us: int, sender: Member, message: Returned) -> None:
        slot = self._slot(sender, message, (SlotState.LEASED,))
        if slot is None or slot.holder is None:
            return
        giver, route = slot.holder, slot.route
        slot.server = message.state
        route.move(slot, SlotState.RETURNED)
        giver.leave(is_returned=True)
        self._sharing.pass_on(now_us, slot, giver, message.state)

    def _on_recall_answer(self, now_us: int, sender: Member, message: RecallAnswer) -> None:
        _, holding = self._holding(sender, message.route_id)
        if message.now < 0 or message.later < 0:
            raise _Violation("negative")
        recall = holding.recalls.pop(message.recall_id, None)
        if recall is not None:
            holding.answered(recall, message.now + message.later)

    # --- small parts -----------------------------------------------------------------------------

    def _is_round(self, now_us: int) -> bool:
        return bool(self._book.hungry) and now_us >= self._round_us + ROUND_US

    def _due(self, now_us: int) -> list[Route]:
        """The routes with waiting clients that the tick at ``now_us`` looks at, LOOKS_MOST of them."""
        awake = [self._book.hungry[route_id] for route_id, at in self._book.wake.items() if at <= now_us]
        rest = self._book.hungry.values() if self._is_round(now_us) else ()
        routes = {
            id(route): route
            for route in islice(chain(self._book.urgent.values(), awake, rest), 3 * LOOKS_MOST)
        }
        return list(islice(routes.values(), LOOKS_MOST))

    def _holding(self, sender: Member, route_id: int) -> tuple[Route, Holding]:
        route = self._book.routes.get(route_id)
        holding = route.holdings.get(sender.worker) if route is not None else None
        if route is None or holding is None:
            raise _Violation(f"route {route_id} was never opened")
        return route, holding

    def _slot(self, sender: Member, message: _SlotMessage, states: tuple[SlotState, ...]) -> Slot | None:
        """The slot that a message is about; None when the message is stale or a repetition."""
        route, holding = self._holding(sender, message.route_id)
        slot = route.slots.get(message.slot)
        if slot is None or slot.generation != message.generation or slot.holder is not holding:
            return None
        return slot if slot.state in states else None
