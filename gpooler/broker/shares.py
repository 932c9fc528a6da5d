"""Fair shares: from whom servers are recalled when clients wait elsewhere.

DESIGN §3 Leases. A worker's share is its part of the demand (clients that wait or run) times the slots of the
route that serve. Pure arithmetic over what the ledger knows; nothing is changed here.
"""

from dataclasses import dataclass, field
from math import floor
from typing import Final

from gpooler.broker.messages import WorkerId
from gpooler.broker.slots import Cap, Holding, Route, Slot, SlotState

PROTECTION_US: Final = 1_000  # a lease is not recalled sooner after its grant
EVICTION_PROTECTION_US: Final = 100_000  # a busy server lives at least so long: a login costs milliseconds
PATIENCE_US: Final = 50_000  # a recall may wait for a long transaction: then ask another worker too
TURN_US: Final = 100_000  # how long a worker keeps the slot that cannot be shared evenly
LOPSIDED: Final = 1.25  # times as many slots for the same demand are worth taking turns
_EPSILON: Final = 1e-9  # shares are quotients: 3 * (1 / 3) is a whole slot


@dataclass(slots=True)
class Plan:
    """What to recall of one route."""

    recalls: list[tuple[Holding, int]] = field(default_factory=list)
    wake_us: int | None = None  # when a lease stops being protected that somebody with nothing waits for
    is_turn: bool = False  # a slot that cannot be shared evenly goes round


def share(route: Route, holding: Holding) -> float:
    """The slots that ``holding`` ought to have, of those that serve now."""
    demand = sum(other.demand for other in route.holdings.values())
    return route.have * holding.demand / demand if demand else 0.0


def deficit(route: Route, holding: Holding) -> float:
    """Slots below the fair share; negative above it."""
    return share(route, holding) - holding.have


def on_the_way(route: Route, now_us: int) -> int:
    """Slots that were recalled, or whose server was told to go, lately: they will be free soon."""
    since_us = now_us - PATIENCE_US
    return sum(
        holding.owed * (holding.recalled_us > since_us)
        + sum(slot.since_us > since_us for slot in holding.leaving.values())
        for holding in route.holdings.values()
    )


def recallable(holding: Holding, now_us: int) -> int:
    """Leases that may be recalled now."""
    old = sum(slot.since_us + PROTECTION_US <= now_us for slot in holding.leased.values())
    return max(0, old - holding.owed - holding.owed_evictions)


def idle(holding: Holding, now_us: int) -> int:
    """Parked servers that are not needed, as the demand was lately, and may be recalled now."""
    if holding.waiting or holding.unmet:
        return 0
    spare = min(1.0, holding.demand)  # else one server would go to and fro with every change
    needed = max(holding.active, round(holding.demand + spare))
    parked = len(holding.leased) - needed - holding.owed - holding.owed_evictions
    return max(0, min(parked, recallable(holding, now_us)))


def plan_recalls(route: Route, now_us: int) -> Plan:
    """What to recall for the workers whose clients wait, when nothing can be opened for them.

    Parked servers go to whoever waits. Busy ones move when one worker is a whole slot above its share and
    another a whole slot below, or has waiters and nothing at all. In small pools there remains a part of a
    slot that makes a great difference: workers take turns with it.
    """
    plan = Plan()
    needy = [holding for holding in route.hungry.values() if holding.unmet]
    coming = on_the_way(route, now_us)
    taken = dict.fromkeys(route.holdings, 0)

    def take(holding: Holding, count: int) -> int:
        taken[holding.worker] += count
        return count

    wanted = sum(holding.unmet for holding in needy) - coming
    for holding in route.holdings.values():
        if wanted > 0:
            wanted -= take(holding, min(wanted, idle(holding, now_us)))

    wanted = sum(_whole_slots_below(route, holding) for holding in needy) - coming - sum(taken.values())
    for holding in sorted(route.holdings.values(), key=lambda holding: deficit(route, holding)):
        if wanted > 0:
            above = floor(-deficit(route, holding) + _EPSILON)
            free = recallable(holding, now_us) - taken[holding.worker]
            wanted -= take(holding, max(0, min(wanted, above - taken[holding.worker], free)))

    starving = sum(holding.have == 0 for holding in needy) - coming - sum(taken.values())
    if starving > 0:
        _serve_starving(route, starving, now_us, taken, plan)
    if not coming and not any(taken.values()) and route.turned_us + TURN_US <= now_us:
        giver = _whose_turn_is_over(route, needy, now_us)
        if giver is not None:
            take(giver, 1)
            plan.is_turn = True
    plan.recalls = [(holding, taken[worker]) for worker, holding in route.holdings.items() if taken[worker]]
    return plan


def _whose_turn_is_over(route: Route, needy: list[Holding], now_us: int) -> Holding | None:
    """Who gives a slot that cannot be shared evenly to another; None where it makes no great difference."""

    def wealth(holding: Holding) -> float:
        return holding.have / holding.demand

    poor = [holding for holding in needy if holding.demand and deficit(route, holding) > _EPSILON]
    if not poor:
        return None
    limit = LOPSIDED * min(wealth(holding) for holding in poor)
    rich = [
        holding
        for holding in route.holdings.values()
        if holding.have > 1
        and deficit(route, holding) < -_EPSILON
        and (not holding.demand or wealth(holding) > limit)
        and recallable(holding, now_us)
    ]
    return min(rich, key=lambda holding: holding.served_us, default=None)


def _whole_slots_below(route: Route, holding: Holding) -> int:
    """Slots due to a worker with waiters."""
    due = max(floor(deficit(route, holding) + _EPSILON), holding.have == 0)
    return min(due, holding.unmet)


def _serve_starving(route: Route, wanted: int, now_us: int, taken: dict[WorkerId, int], plan: Plan) -> None:
    """One slot each for workers with waiters and nothing: from who has several, then who had one longest."""

    def order(holding: Holding) -> tuple[bool, float, int]:
        return holding.have == 1, deficit(route, holding) if holding.have > 1 else 0.0, holding.served_us

    for holding in sorted((h for h in route.holdings.values() if h.leased), key=order):
        if wanted <= 0:
            return
        if recallable(holding, now_us) > taken[holding.worker]:
            taken[holding.worker] += 1
            wanted -= 1
    protected = [
        slot.since_us + PROTECTION_US
        for holding in route.holdings.values()
        for slot in holding.leased.values()
        if slot.since_us + PROTECTION_US > now_us
    ]
    if wanted > 0 and protected:
        plan.wake_us = min(protected)


def plan_evictions(route: Route, cap: Cap, now_us: int) -> list[tuple[Route, Holding, int]]:
    """Whose servers to close so that ``route`` can open some under a cap that is full.

    Parked servers of other routes; and one busy server when the route has nothing at all.
    """
    wanted = sum(holding.unmet for holding in route.hungry.values()) - on_the_way(route, now_us)
    wanted -= _evictions_on_the_way(cap, now_us)
    others = [(other, holding) for other, holding in _holders(cap) if other is not route]
    evictions = []
    for other, holding in others:
        count = min(wanted, idle(holding, now_us))
        if count > 0:
            evictions.append((other, holding, count))
            wanted -= count
    if not evictions and route.starves(now_us) and not _evictions_on_the_way(cap, now_us):
        before_us = now_us - EVICTION_PROTECTION_US
        busy = [
            pair for pair in others if any(slot.opened_us <= before_us for slot in pair[1].leased.values())
        ]
        if busy:
            other, holding = max(busy, key=lambda pair: (pair[0].have, pair[1].have))
            evictions.append((other, holding, 1))
    return evictions


def is_needed_elsewhere(slot: Slot, now_us: int) -> bool:
    """Whether a returned server is better closed: another route under its caps has waiters and nothing.

    Recalls between the workers of a busy route may leave no moment in which an eviction finds a server.
    """
    if slot.opened_us + EVICTION_PROTECTION_US > now_us:
        return False
    return any(
        other.starves(now_us)
        for cap in slot.route.caps
        if not cap.has_room and not _evictions_on_the_way(cap, now_us)
        for other in cap.routes.values()
        if other is not slot.route
    )


def plan_excess(cap: Cap, now_us: int) -> list[tuple[Route, Holding, int]]:
    """Whose servers to close when more are granted than a cap allows."""
    holders = _holders(cap)
    wanted = cap.excess - sum(holding.owed_evictions + len(holding.leaving) for _, holding in holders)
    evictions = []
    for route, holding in holders:
        count = min(wanted, recallable(holding, now_us))
        if count > 0:
            evictions.append((route, holding, count))
            wanted -= count
    return evictions


def _holders(cap: Cap) -> list[tuple[Route, Holding]]:
    """Who has anything to give up under a cap: of the routes that may be there only these matter."""
    holders = {
        id(slot.holder): (slot.route, slot.holder)
        for slot in cap.slots.values()
        if slot.holder is not None and not slot.route.key.is_replication
    }
    return list(holders.values())


def _evictions_on_the_way(cap: Cap, now_us: int) -> int:
    """Places under a cap that will soon be free because something was or is being closed for them."""
    since_us = now_us - PATIENCE_US
    owed = sum(holding.owed_evictions for _, holding in _holders(cap) if holding.recalled_us > since_us)
    ending = (SlotState.LEAVING, SlotState.BURIED)
    return owed + sum(slot.state in ending and slot.since_us > since_us for slot in cap.slots.values())


def spread_minimum(route: Route) -> dict[WorkerId, int]:
    """How many servers each worker keeps from ``pool_ttl``, so that min_pool_size of them stay.

    A worker keeps as many as before as long as it has them: were one share lowered because another rose,
    the lowered one could act first, and a server too many would be closed.
    """
    keep = {
        worker: max(0, min(holding.kept, len(holding.leased)))
        for worker, holding in sorted(route.holdings.items())
    }
    total = sum(len(holding.leased) for holding in route.holdings.values())
    left = min(route.min_pool_size, total) - sum(keep.values())
    while left > 0:
        for worker, count in keep.items():
            if left and count < len(route.holdings[worker].leased):
                keep[worker] += 1
                left -= 1
    return keep
