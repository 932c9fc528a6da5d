"""The ledger's book: rules, routes, workers, and the acts that a change calls for. It decides nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from gpooler.broker.acts import Act, Bury, Disown, Entrust, Hold, Inherit, Send
from gpooler.broker.messages import BrokerMessage, RouteOpened, WorkerId
from gpooler.broker.slots import Cap, Holding, LedgerError, Route, RouteKey, Slot, SlotName, SlotState


@dataclass(frozen=True, slots=True)
class RuleLimits:
    """What the configuration says about the routes of one rule."""

    storage: str
    pool_size: int | None  # None: no limit
    min_pool_size: int  # of its one route, where it has just one
    shared_pool: str | None
    reset_timeout_ms: int  # how long a dead worker's server is expected to take
    database: str | None = None  # on the server; None: as the client says
    user: str | None = None
    pool: str = ""  # what rules that share one ``pool_size`` have in common: one replaces the other
    epoch: int = 0  # servers of a lower one are obsolete

    @property
    def only_names(self) -> tuple[str, str] | None:
        """Database and user on the server, where clients can bring no others."""
        return None if self.database is None or self.user is None else (self.database, self.user)


NOTHING: Final = RuleLimits("", 0, 0, None, 0)
"""Of a rule that is not in the configuration: nothing more is granted."""


@dataclass(frozen=True, slots=True)
class Inherited:
    """A server of an earlier broker's time, of which the master kept the socket."""

    key: RouteKey
    endpoint: str
    pid: int  # 0: it was in login
    secret_hex: str = field(repr=False)


@dataclass(slots=True, eq=False)
class Member:
    """A living worker."""

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


class Book:
    """All routes, all slots, all workers."""

    def __init__(
        self,
        rules: Mapping[str, RuleLimits],
        shared_pools: Mapping[str, int],
        storages: Mapping[str, int],
        max_routes: int,
    ) -> None:
        """``shared_pools``: sizes by name; ``storages``: logins at once. Ids are 0 to ``max_routes`` - 1."""
        self.max_routes = max_routes
        self.members: dict[WorkerId, Member] = {}
        self.routes: dict[int, Route] = {}
        self.by_key: dict[RouteKey, Route] = {}
        self.hungry: dict[int, Route] = {}  # those with waiting clients
        self.urgent: dict[int, Route] = {}  # asked since the last tick and got nothing
        self.wake: dict[int, int] = {}  # route id → when to look again
        self.generation = 0  # the last one given
        self.is_serving = False  # every living worker has been attached
        self.first_new_id = 0  # lower ones may have been given out by an earlier broker
        self.opens_from_us = 0
        self._acts: list[Act] = []
        self.configure(rules, shared_pools, storages)

    def configure(
        self,
        rules: Mapping[str, RuleLimits],
        shared_pools: Mapping[str, int],
        storages: Mapping[str, int],
    ) -> None:
        """New limits, as in ``__init__``. What is above a limit stays until it is closed."""
        self.rules = rules
        self._pools: dict[tuple[str, str, str], Cap] = {}
        self._shared = {name: Cap(f"shared_pool {name}", size) for name, size in shared_pools.items()}
        self._logins = {name: Cap(f"logins at storage {name}", size) for name, size in storages.items()}
        for route in self.routes.values():
            self._limit(route)
            for cap in (*route.caps, route.logins):
                cap.ceiling = len(cap.slots)

    @property
    def is_ready(self) -> bool:
        """Whether every worker with a history has reported."""
        return self.is_serving and not any(member.is_awaited for member in self.members.values())

    def can_open(self, now_us: int) -> bool:
        """Whether anything may be opened now."""
        return now_us >= self.opens_from_us and self.is_ready

    def check(self) -> None:
        """The invariant: granted ≤ every cap, no slot in two hands. Raises LedgerError."""
        for route_id, route in self.routes.items():
            route.check()
            if not route.holdings.keys() <= self.members.keys():
                raise LedgerError(f"route {route_id}: a dead worker holds")
            if bool(route.hungry) != (route_id in self.hungry):
                raise LedgerError(f"route {route_id}: hungry and not known for it")
            if any(slot.generation > self.generation for slot in route.slots.values()):
                raise LedgerError(f"route {route_id}: a generation from the future")
        if not self.urgent.keys() | self.wake.keys() <= self.hungry.keys():
            raise LedgerError("a route without waiting clients is looked at")

    # --- routes ----------------------------------------------------------------------------------

    def new_route(self, key: RouteKey) -> Route | None:
        """A route with the next id; None when ids are used up. Ids are never given out again."""
        route_id = max(self.first_new_id, max(self.routes, default=-1) + 1)
        return self.make_route(route_id, key) if route_id < self.max_routes else None

    def make_route(self, route_id: int, key: RouteKey) -> Route:
        """A route with this id."""
        route = Route(route_id, key)
        self._limit(route)
        self.routes[route_id] = self.by_key[key] = route
        return route

    def _limit(self, route: Route) -> None:
        """Put a route and its slots under the caps that its rule names."""
        key = route.key
        limits = self.rules.get(key.rule, NOTHING)
        pool = (limits.pool or key.rule, limits.database or key.database, limits.user or key.user)
        caps = [self._pools.setdefault(pool, Cap(f"route {route.route_id}", limits.pool_size))]
        route.min_pool_size = 0 if key.is_replication else limits.min_pool_size
        if limits.shared_pool is not None:
            caps.append(self._shared[limits.shared_pool])
            route.min_pool_size = 0
        route.caps = tuple(caps)
        route.logins = self._logins.get(limits.storage) or Cap(f"logins of route {route.route_id}", 0)
        route.reset_timeout_us = limits.reset_timeout_ms * 1000
        route.epoch = limits.epoch
        for cap in (*caps, route.logins):
            cap.routes[route.route_id] = route
        for slot in route.slots.values():
            for cap in caps:
                cap.slots[slot.name] = slot
            if slot.state is SlotState.OPENING:
                route.logins.slots[slot.name] = slot

    def introduce(self, route: Route, worker: WorkerId, token: int) -> Holding:
        """Tell a worker of a route."""
        self.send(worker, RouteOpened(token, route.route_id, *route.key, route.parameters))
        return route.holdings.setdefault(worker, Holding(worker))

    def set_want(self, route: Route, holding: Holding, waiting: int) -> None:
        """A worker's wish; 0 withdraws it."""
        holding.want = waiting
        if waiting:
            route.hungry[holding.worker] = holding
            self.hungry[route.route_id] = route
            return
        holding.unmet = holding.waiting = 0
        route.hungry.pop(holding.worker, None)
        if not route.hungry:
            self.hungry.pop(route.route_id, None)
            self.urgent.pop(route.route_id, None)
            self.wake.pop(route.route_id, None)

    def looked_at(self, route: Route) -> None:
        """A tick looks at a hungry route: it is the last in turn now."""
        self.urgent.pop(route.route_id, None)
        self.wake.pop(route.route_id, None)
        self.hungry[route.route_id] = self.hungry.pop(route.route_id)

    # --- acts ------------------------------------------------------------------------------------

    def next_generation(self) -> int:
        """A generation that no slot ever had."""
        self.generation += 1
        return self.generation

    def act(self, act: Act) -> None:
        """Have something done."""
        self._acts.append(act)

    def send(self, worker: WorkerId, message: BrokerMessage) -> None:
        """Have a message sent, without a descriptor."""
        self._acts.append(Send(worker, message, None))

    def hold(self, slot: Slot) -> None:
        """The descriptor that came is the slot's."""
        slot.has_descriptor = True
        self._acts.append(Hold(slot.name))
        self.entrust(slot)

    def entrust(self, slot: Slot) -> None:
        """Let the master know what it takes to end the server."""
        pid, secret_hex = (slot.server.pid, slot.server.secret_hex) if slot.server is not None else (0, "")
        self._acts.append(Entrust(slot.name, slot.route.key, slot.endpoint, pid, secret_hex))

    def bury(self, now_us: int, slot: Slot) -> None:
        """The broker closes the server itself."""
        is_idle = slot.state is SlotState.RETURNED
        slot.route.move(slot, SlotState.BURIED)
        slot.since_us = now_us
        pid, secret_hex = 0, ""
        if slot.server is not None and not is_idle:
            pid, secret_hex = slot.server.pid, slot.server.secret_hex
        self._dig(slot, pid, secret_hex)

    def bury_inherited(self, now_us: int, name: SlotName, server: Inherited) -> None:
        """Close a server that an earlier broker had, unless a worker has reported its slot."""
        route = self.routes.get(name.route_id)
        if route is None and server.key not in self.by_key:
            route = self.make_route(name.route_id, server.key)
        if route is None or route.key != server.key or name.slot in route.slots:
            self._acts.append(Disown(name))
            return
        slot = route.add(name.slot, self.next_generation(), SlotState.BURIED, None)
        slot.since_us = now_us
        slot.endpoint = server.endpoint
        slot.has_descriptor = True
        self._acts.append(Inherit(name))
        self._dig(slot, server.pid, server.secret_hex)

    def _dig(self, slot: Slot, pid: int, secret_hex: str) -> None:
        timeout_us = slot.route.reset_timeout_us
        server_id = "" if slot.server is None else slot.server.server_id
        self._acts.append(
            Bury(
                slot.name,
                slot.generation,
                slot.route.key.rule,
                slot.endpoint,
                pid,
                secret_hex,
                timeout_us,
                server_id,
            )
        )

    def take_acts(self) -> list[Act]:
        """What is to be done since the last call."""
        acts, self._acts = self._acts, []
        return acts
