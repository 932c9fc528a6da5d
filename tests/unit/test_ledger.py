"""The ledger, event by event."""

import pytest

from gpooler.broker.acts import Bury, Complain, Disown, Entrust, Hold, Inherit, Release, Send
from gpooler.broker.book import Inherited, RuleLimits
from gpooler.broker.ledger import IDLE_US, LOOKS_MOST, REST_US, RETRY_US, ROUND_US, SETTLE_US, Demand, Ledger
from gpooler.broker.messages import (
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
    ServerState,
    SlotPhase,
    Want,
    WorkerId,
)
from gpooler.broker.shares import EVICTION_PROTECTION_US, PROTECTION_US
from gpooler.broker.slots import SHOWN_US, LedgerError, RouteKey, SlotName, SlotState

A, B, C = WorkerId(1, 1), WorkerId(2, 2), WorkerId(3, 3)
STATE = ServerState("s1", 7, "aabb", "/s", {}, {}, 0, 0, 0)
ROUTE = 0
USUAL = RouteKey("r", "d", "u")
LAST_WILL = ("/s", 7, "aabb")  # what it takes to end the server of STATE


def limits(pool_size=2, minimum=0, shared=None, fixed=None):
    return RuleLimits("p", pool_size or None, minimum, shared, 1500, *(fixed or ()))


class Desk:
    """A ledger, its clock, and what it wants done."""

    def __init__(self, rules=None, shared=None, workers=(A, B), is_settled=True, max_routes=100, logins=9):
        self.ledger = Ledger(rules or {"r": limits()}, shared or {}, {"p": logins, "q": logins}, max_routes)
        self.now = 10 * REST_US
        self.demand = {}
        for worker in workers:
            self.ledger.attach(worker, False)
        self.ledger.serve(self.now, is_settled)
        for worker in workers:
            self.say(worker, ReportEnd())

    def say(self, worker, message):
        """Handle a message; returns the acts."""
        self.now += 1
        acts = self.ledger.handle(self.now, worker, message)
        self.ledger.check()
        return acts

    def tick(self, after_us=0):
        self.now += after_us
        due = self.ledger.due(self.now)
        demand = {
            (worker, route_id): self.seen(worker, route_id)
            for worker, route_id in self.demand
            if route_id in due
        }
        acts = self.ledger.tick(self.now, demand)
        self.ledger.check()
        return acts

    def open_routes(self, *workers, rule="r"):
        for worker in workers:
            self.say(worker, OpenRoute(1, rule, "d", "u", False))

    def see(self, worker, waiting, active, route_id=ROUTE, missing=0):
        """What the counters say from now on; they show all servers but so many."""
        self.demand[worker, route_id] = waiting, active, missing

    def seen(self, worker, route_id):
        waiting, active, missing = self.demand[worker, route_id]
        holding = self.ledger.routes[route_id].holdings.get(worker)
        servers = len(holding.leased) if holding else 0
        return Demand(waiting, active, servers - missing)

    def lease(self, worker, count=1):
        """Have ``worker`` open servers; returns (slot, generation) of each."""
        grants = sent(self.say(worker, Want(ROUTE, count)), GrantOpen)
        for grant in grants:
            at = (ROUTE, grant.slot, grant.generation)
            self.say(worker, Connected(*at, "/s"))
            self.say(worker, Opened(*at, STATE))
        self.say(worker, Want(ROUTE, 0))
        return [(grant.slot, grant.generation) for grant in grants]


def sent(acts, kind):
    return [act.message for act in acts if isinstance(act, Send) and isinstance(act.message, kind)]


def targets(acts, kind):
    return [act.worker for act in acts if isinstance(act, Send) and isinstance(act.message, kind)]


@pytest.fixture
def desk():
    desk = Desk()
    desk.open_routes(A, B)
    return desk


# --- routes -----------------------------------------------------------------------------------------


def test_a_route_has_one_id_in_every_worker():
    desk = Desk()
    first = sent(desk.say(A, OpenRoute(5, "r", "d", "u", False)), RouteOpened)
    second = sent(desk.say(B, OpenRoute(9, "r", "d", "u", False)), RouteOpened)
    other = sent(desk.say(B, OpenRoute(10, "r", "d", "other", False)), RouteOpened)
    assert first == [RouteOpened(5, 0, "r", "d", "u", False, None)]
    assert second == [RouteOpened(9, 0, "r", "d", "u", False, None)]
    assert other[0].route_id == 1


def test_an_unknown_rule_is_refused():
    assert "nonsense" in sent(Desk().say(A, OpenRoute(5, "nonsense", "d", "u", False)), RouteRefused)[0].cause


def test_a_route_is_refused_when_the_ids_are_used_up():
    desk = Desk(max_routes=1)
    desk.open_routes(A)
    assert "used up" in sent(desk.say(A, OpenRoute(5, "r", "d", "x", False)), RouteRefused)[0].cause


def test_parameters_are_kept_and_spread_to_those_who_know_the_route(desk):
    message = RouteParameters(ROUTE, {"TimeZone": "UTC"})
    assert targets(desk.say(A, message), RouteParameters) == [B]
    assert desk.say(B, message) == []
    desk.ledger.attach(C, False)
    (answer,) = sent(desk.say(C, OpenRoute(3, "r", "d", "u", False)), RouteOpened)
    assert answer.parameters == {"TimeZone": "UTC"}


# --- grants -----------------------------------------------------------------------------------------


def test_free_capacity_is_granted_at_once_and_never_beyond_the_pool(desk):
    assert sent(desk.say(A, Want(ROUTE, 5)), GrantOpen) == [GrantOpen(ROUTE, 1, 1), GrantOpen(ROUTE, 2, 2)]
    assert sent(desk.say(B, Want(ROUTE, 5)), GrantOpen) == []


def test_no_more_is_granted_than_clients_wait(desk):
    assert len(sent(desk.say(A, Want(ROUTE, 1)), GrantOpen)) == 1
    assert desk.say(A, Want(ROUTE, 1)) == []


def test_a_closed_server_makes_room_for_who_waits(desk):
    (slot, generation), _ = desk.lease(A, 2)
    desk.say(B, Want(ROUTE, 1))
    acts = desk.say(A, Closed(ROUTE, slot, generation))
    assert Release(SlotName(ROUTE, slot)) in acts
    assert targets(acts, GrantOpen) == [B]
    assert sent(acts, GrantOpen)[0].generation > generation


def test_a_server_that_is_told_to_go_counts_until_it_is_gone(desk):
    (slot, generation), _ = desk.lease(A, 2)
    desk.say(B, Want(ROUTE, 1))
    assert desk.say(A, Closing(ROUTE, slot, generation)) == []
    assert targets(desk.say(A, Closed(ROUTE, slot, generation)), GrantOpen) == [B]


def test_a_failed_open_pauses_the_route_and_the_wish_remains(desk):
    grant = sent(desk.say(A, Want(ROUTE, 1)), GrantOpen)[0]
    desk.see(A, 1, 0)
    assert desk.say(A, OpenFailed(ROUTE, grant.slot, grant.generation, 50)) == []
    assert desk.tick(49_000) == []
    assert targets(desk.tick(ROUND_US), GrantOpen) == [A]


def test_a_failed_open_pauses_at_least_a_moment(desk):
    grant = sent(desk.say(A, Want(ROUTE, 1)), GrantOpen)[0]
    desk.say(A, OpenFailed(ROUTE, grant.slot, grant.generation, 0))
    assert sent(desk.say(A, Want(ROUTE, 2)), GrantOpen) == []
    assert len(sent(desk.tick(RETRY_US), GrantOpen)) == 2


def test_a_declined_grant_goes_to_another(desk):
    grants = sent(desk.say(A, Want(ROUTE, 2)), GrantOpen)
    desk.say(B, Want(ROUTE, 1))
    acts = desk.say(A, Declined(ROUTE, grants[0].slot, grants[0].generation))
    assert targets(acts, GrantOpen) == [B]


@pytest.mark.parametrize("kind", [Closed, Closing, Declined])
def test_stale_and_repeated_messages_do_nothing(desk, kind):
    (slot, generation), _ = desk.lease(A, 2)
    desk.say(A, Closed(ROUTE, slot, generation))
    desk.say(B, Want(ROUTE, 1))
    assert desk.say(A, kind(ROUTE, slot, generation)) == []
    assert desk.say(A, kind(ROUTE, slot, generation + 100)) == []
    assert desk.say(A, kind(ROUTE, 99, 1)) == []


def test_a_worker_cannot_close_what_is_anothers(desk):
    (slot, generation), _ = desk.lease(A, 2)
    assert desk.say(B, Closed(ROUTE, slot, generation)) == []
    assert desk.ledger.routes[ROUTE].slots[slot].state is SlotState.LEASED


# --- recalls ----------------------------------------------------------------------------------------


def test_a_parked_server_moves_to_who_waits(desk):
    leases = desk.lease(A, 2)
    desk.see(A, 0, 0)
    desk.see(B, 1, 0)
    desk.now += PROTECTION_US
    desk.say(B, Want(ROUTE, 1))
    assert desk.ledger.next_due_us() <= desk.now
    acts = desk.tick()
    (recall,) = sent(acts, Recall)
    assert (targets(acts, Recall), recall.count, recall.is_eviction) == ([A], 1, False)
    desk.say(A, RecallAnswer(ROUTE, recall.recall_id, 1, 0))
    slot, generation = leases[0]
    (act,) = desk.say(A, Returned(ROUTE, slot, generation, STATE))
    assert (act.worker, act.slot) == (B, SlotName(ROUTE, slot))
    assert isinstance(act.message, GrantServer)
    assert act.message.generation > generation


def test_a_lease_is_not_recalled_within_a_millisecond_and_then_at_once(desk):
    desk.lease(A, 2)
    desk.see(A, 5, 2)
    desk.see(B, 1, 0)
    desk.say(B, Want(ROUTE, 1))
    assert sent(desk.tick(), Recall) == []
    due = desk.ledger.next_due_us()
    assert due <= desk.now + PROTECTION_US
    desk.now = due
    assert targets(desk.tick(), Recall) == [A]


def test_a_recall_under_way_is_not_repeated(desk):
    desk.lease(A, 2)
    desk.see(A, 5, 2)
    desk.see(B, 1, 0)
    desk.say(B, Want(ROUTE, 1))
    assert len(sent(desk.tick(ROUND_US), Recall)) == 1
    assert sent(desk.tick(ROUND_US), Recall) == []


def test_a_refused_recall_is_owed_no_more(desk):
    desk.lease(A, 2)
    desk.see(A, 5, 2)
    desk.see(B, 1, 0)
    desk.say(B, Want(ROUTE, 1))
    (recall,) = sent(desk.tick(ROUND_US), Recall)
    desk.say(A, RecallAnswer(ROUTE, recall.recall_id, 0, 0))
    desk.say(A, RecallAnswer(ROUTE, recall.recall_id, 0, 0))
    assert desk.ledger.routes[ROUTE].holdings[A].owed == 0
    assert len(sent(desk.tick(ROUND_US), Recall)) == 1


def test_a_returned_server_that_nobody_waits_for_goes_back(desk):
    ((slot, generation),) = desk.lease(A, 1)
    acts = desk.say(A, Returned(ROUTE, slot, generation, STATE))
    assert targets(acts, GrantServer) == [A]


def test_a_draining_worker_gets_nothing_back(desk):
    ((slot, generation),) = desk.lease(A, 1)
    desk.say(A, Draining())
    assert targets(desk.say(A, Returned(ROUTE, slot, generation, STATE)), GrantServer) == [B]


def test_a_returned_server_that_nobody_can_take_is_closed_by_the_broker():
    desk = Desk(workers=(A,))
    desk.open_routes(A)
    ((slot, generation),) = desk.lease(A, 1)
    desk.say(A, Draining())
    (act,) = desk.say(A, Returned(ROUTE, slot, generation, STATE))
    assert isinstance(act, Bury)
    assert act.pid == 0


# --- deaths -----------------------------------------------------------------------------------------


def test_a_dead_workers_slots_are_free_only_when_their_servers_are_gone(desk):
    desk.lease(A, 2)
    desk.say(B, Want(ROUTE, 2))
    acts = desk.ledger.worker_gone(desk.now, A)
    desk.ledger.check()
    burials = [act for act in acts if isinstance(act, Bury)]
    assert [act.pid for act in burials] == [7, 7]
    assert burials[0].timeout_us == 1_500_000
    assert sent(acts, GrantOpen) == []
    acts = desk.ledger.gone(desk.now, burials[0].slot, burials[0].generation)
    assert targets(acts, GrantOpen) == [B]
    assert desk.ledger.gone(desk.now, burials[0].slot, burials[0].generation) == []


def test_a_worker_that_dies_in_a_login_leaves_a_server_to_bury_once_it_was_connected(desk):
    first, second = sent(desk.say(A, Want(ROUTE, 2)), GrantOpen)
    assert Hold(SlotName(ROUTE, first.slot)) in desk.say(
        A, Connected(ROUTE, first.slot, first.generation, "/s")
    )
    desk.say(B, Want(ROUTE, 2))
    acts = desk.ledger.worker_gone(desk.now, A)
    (burial,) = [act for act in acts if isinstance(act, Bury)]
    assert (burial.slot, burial.pid) == (SlotName(ROUTE, first.slot), 0)
    assert sent(acts, GrantOpen)[0].slot == second.slot


def test_a_receiver_that_dies_leaves_its_server_to_the_broker(desk):
    (slot, generation), _ = desk.lease(A, 2)
    desk.say(B, Want(ROUTE, 1))
    desk.say(A, Returned(ROUTE, slot, generation, STATE))
    acts = desk.ledger.worker_gone(desk.now, B)
    assert [act.slot for act in acts if isinstance(act, Bury)] == [SlotName(ROUTE, slot)]


def test_a_dead_worker_is_not_spoken_to(desk):
    desk.ledger.worker_gone(desk.now, A)
    assert desk.say(A, Want(ROUTE, 1)) == []
    assert desk.ledger.worker_gone(desk.now, A) == []


# --- rebuild ----------------------------------------------------------------------------------------


def rebuilt():
    """A second broker; A and B have a history."""
    desk = Desk(workers=())
    desk.ledger = Ledger({"r": limits(3)}, {}, {"p": 9}, 100)
    desk.ledger.attach(A, True)
    desk.ledger.attach(B, True)
    desk.ledger.serve(desk.now, is_settled=False)
    return desk


def report(desk, worker, *slots):
    desk.say(worker, ReportRoute(4, "r", "d", "u", False))
    for slot, generation in slots:
        acts = desk.say(worker, ReportServer(4, slot, generation, SlotPhase.OPEN, STATE))
        entrusted = Entrust(SlotName(4, slot), USUAL, *LAST_WILL)
        assert acts == [Hold(SlotName(4, slot)), entrusted]
    return desk.say(worker, ReportEnd())


def test_route_ids_survive_the_broker_and_new_ones_wait_for_every_report():
    desk = rebuilt()
    report(desk, A, (1, 70))
    assert desk.say(A, OpenRoute(1, "r", "d", "new", False)) == []
    assert sent(desk.say(A, OpenRoute(2, "r", "d", "u", False)), RouteOpened)[0].route_id == 4
    acts = report(desk, B, (2, 80))
    assert [message.route_id for message in sent(acts, RouteOpened)] == [5]


def test_nothing_is_opened_before_the_reports_and_a_pause():
    desk = rebuilt()
    report(desk, A, (1, 70))
    assert desk.say(A, Want(4, 2)) == []
    report(desk, B, (2, 80))
    desk.see(A, 2, 1, 4)
    assert sent(desk.tick(SETTLE_US // 2), GrantOpen) == []
    (grant,) = sent(desk.tick(SETTLE_US), GrantOpen)
    assert (grant.slot, grant.generation) == (3, 81)


def test_a_dead_worker_is_not_waited_for():
    desk = rebuilt()
    report(desk, A, (1, 70))
    assert not desk.ledger.is_ready
    desk.ledger.worker_gone(desk.now, B)
    assert desk.ledger.is_ready


def test_the_master_is_entrusted_with_a_server_at_the_connect_and_at_the_login(desk):
    desk.open_routes(A)
    (grant,) = sent(desk.say(A, Want(ROUTE, 1)), GrantOpen)
    at = (ROUTE, grant.slot, grant.generation)
    name = SlotName(ROUTE, grant.slot)
    assert desk.say(A, Connected(*at, "/s")) == [Hold(name), Entrust(name, USUAL, "/s", 0, "")]
    assert Entrust(name, USUAL, *LAST_WILL) in desk.say(A, Opened(*at, STATE))


def test_a_server_whose_worker_and_broker_died_keeps_its_slot_until_it_is_gone():
    desk = Desk(workers=())
    desk.ledger = Ledger({"r": limits(2)}, {}, {"p": 9}, 100)
    desk.ledger.attach(A, True)
    desk.ledger.inherit(SlotName(4, 1), Inherited(USUAL, *LAST_WILL))
    desk.ledger.inherit(SlotName(4, 2), Inherited(USUAL, *LAST_WILL))
    desk.ledger.serve(desk.now, is_settled=False)
    acts = report(desk, A, (2, 70))
    name = SlotName(4, 1)
    assert acts == [Inherit(name), Bury(name, 71, USUAL.rule, *LAST_WILL, 1_500_000), Disown(SlotName(4, 2))]
    desk.now += SETTLE_US
    assert sent(desk.say(A, Want(4, 1)), GrantOpen) == []
    acts = desk.ledger.gone(desk.now, name, 71)
    assert acts[0] == Release(name)
    assert len(sent(acts, GrantOpen)) == 1


def test_a_server_that_nobody_reports_is_not_buried_before_every_report():
    desk = Desk(workers=())
    desk.ledger = Ledger({"r": limits(2)}, {}, {"p": 9}, 100)
    desk.ledger.attach(A, True)
    desk.ledger.attach(B, True)
    desk.ledger.inherit(SlotName(4, 1), Inherited(USUAL, *LAST_WILL))
    assert desk.ledger.serve(desk.now, is_settled=False) == []
    assert report(desk, A) == []
    assert desk.ledger.worker_gone(desk.now, B)[0] == Inherit(SlotName(4, 1))
    desk.ledger.check()


def test_a_server_of_a_rule_that_is_gone_is_ended():
    desk = Desk(workers=())
    desk.ledger = Ledger({}, {}, {}, 100)
    desk.ledger.inherit(SlotName(4, 1), Inherited(USUAL, *LAST_WILL))
    assert isinstance(desk.ledger.serve(desk.now, is_settled=False)[1], Bury)
    desk.ledger.check()


def test_route_ids_that_something_was_counted_under_are_not_given_out_again():
    desk = Desk(workers=())
    desk.ledger = Ledger({"r": limits()}, {}, {"p": 9}, 100)
    desk.ledger.attach(A, True)
    desk.ledger.serve(desk.now, is_settled=False, first_new_id=9)
    report(desk, A)
    assert sent(desk.say(A, OpenRoute(1, "r", "d", "new", False)), RouteOpened)[0].route_id == 9
    assert sent(desk.say(A, OpenRoute(2, "r", "d", "newer", False)), RouteOpened)[0].route_id == 10


def test_servers_above_the_cap_are_reported_kept_and_shed():
    desk = Desk(workers=())
    desk.ledger = Ledger({"r": limits(1)}, {}, {"p": 9}, 100)
    desk.ledger.attach(A, True)
    desk.ledger.serve(desk.now, is_settled=False)
    report(desk, A, (1, 70), (2, 71), (3, 72))
    (recall,) = sent(desk.tick(REST_US), Recall)
    assert (recall.count, recall.is_eviction) == (2, True)
    desk.say(A, Closed(4, 1, 70))
    desk.say(A, Closed(4, 2, 71))
    assert desk.ledger.routes[4].caps[0].ceiling == 1


def test_a_route_whose_rule_is_gone_gets_nothing_more():
    desk = Desk(workers=())
    desk.ledger = Ledger({}, {}, {}, 100)
    desk.ledger.attach(A, True)
    desk.ledger.serve(desk.now, is_settled=False)
    report(desk, A, (1, 70))
    desk.say(A, Want(4, 5))
    assert sent(desk.tick(2 * SETTLE_US), GrantOpen) == []


@pytest.mark.parametrize(
    "message",
    [
        ReportServer(4, 1, 70, SlotPhase.OPEN, STATE),  # in other hands
        ReportServer(4, 2, 70, SlotPhase.OPEN, None),
        ReportSlot(4, 0, 1),
        ReportSlot(4, 10**9, 1),
        ReportSlot(9, 1, 1),
        ReportRoute(4, "r", "d", "other", False),
        ReportRoute(5, "r", "d", "u", False),
        ReportRoute(-1, "r", "x", "u", False),
        ReportRoute(100, "r", "x", "u", False),
    ],
)
def test_a_report_that_cannot_be_is_a_reason_to_complain(message):
    desk = rebuilt()
    report(desk, A, (1, 70))
    desk.say(B, ReportRoute(4, "r", "d", "u", False))
    (act,) = desk.say(B, message)
    assert isinstance(act, Complain)
    assert act.worker == B


@pytest.mark.parametrize(
    "message", [Want(9, 1), Want(ROUTE, -1), RecallAnswer(ROUTE, 1, -1, 0), RouteParameters(9, {})]
)
def test_nonsense_is_a_reason_to_complain(desk, message):
    (act,) = desk.say(A, message)
    assert isinstance(act, Complain)


# --- server_max_routing -----------------------------------------------------------------------------


def opened(desk, worker, grant):
    """Tell of a login that succeeded; returns the acts."""
    at = (grant.route_id, grant.slot, grant.generation)
    desk.say(worker, Connected(*at, "/s"))
    return desk.say(worker, Opened(*at, STATE))


def test_logins_at_a_storage_are_limited_over_all_workers_and_routes():
    desk = Desk({"r": limits(9), "other": limits(9)}, logins=2)
    desk.open_routes(A, B)
    desk.open_routes(A, B, rule="other")
    first, second = sent(desk.say(A, Want(ROUTE, 3)), GrantOpen)
    assert sent(desk.say(B, Want(1, 3)), GrantOpen) == []
    # the other route has nothing yet: its turn
    acts = opened(desk, A, first)
    assert [(act.worker, act.message.route_id) for act in acts if isinstance(act, Send)] == [(B, 1)]
    failed = OpenFailed(ROUTE, second.slot, second.generation, 1000)
    assert targets(desk.say(A, failed), GrantOpen) == [B]


@pytest.mark.parametrize("end", ["closing", "declined", "dead"])
def test_a_login_that_ends_in_any_way_lets_the_next_begin(end):
    desk = Desk({"r": limits(9), "other": limits(9)}, logins=1)
    desk.open_routes(A)
    desk.open_routes(B, rule="other")
    (grant,) = sent(desk.say(A, Want(ROUTE, 1)), GrantOpen)
    at = (ROUTE, grant.slot, grant.generation)
    assert sent(desk.say(B, Want(1, 1)), GrantOpen) == []
    desk.say(A, Want(ROUTE, 0))
    if end == "closing":
        desk.say(A, Connected(*at, "/s"))
        acts = desk.say(A, Closing(*at))
    elif end == "declined":
        acts = desk.say(A, Declined(*at))
    else:
        acts = desk.ledger.worker_gone(desk.now, A)
        desk.ledger.check()
    assert targets(acts, GrantOpen) == [B]


def test_storages_do_not_wait_for_each_other():
    rules = {"r": limits(9), "far": RuleLimits("q", 9, 0, None, 1500)}
    desk = Desk(rules, logins=1)
    desk.open_routes(A)
    desk.open_routes(A, rule="far")
    assert len(sent(desk.say(A, Want(ROUTE, 3)), GrantOpen)) == 1
    assert len(sent(desk.say(A, Want(1, 3)), GrantOpen)) == 1


def test_reported_logins_above_the_limit_are_counted_until_they_end():
    desk = Desk({"r": limits(9)}, logins=1)
    desk.ledger = Ledger({"r": limits(9)}, {}, {"p": 1}, 100)
    desk.ledger.attach(A, True)
    desk.ledger.serve(desk.now, False)
    desk.say(A, ReportRoute(ROUTE, "r", "d", "u", False))
    for slot in (1, 2):
        desk.say(A, ReportSlot(ROUTE, slot, slot))
    desk.say(A, ReportEnd())
    desk.now += SETTLE_US
    desk.say(A, Want(ROUTE, 5))
    assert sent(desk.say(A, Declined(ROUTE, 1, 1)), GrantOpen) == []
    assert len(sent(desk.say(A, Declined(ROUTE, 2, 2)), GrantOpen)) == 1


def test_min_pool_size_of_many_routes_is_filled_as_logins_end():
    rules = {name: limits(5, 1, fixed=("d", name)) for name in ("r", "s", "t")}
    desk = Desk(rules, workers=(A,), logins=1)
    seen = []
    acts = desk.tick(REST_US)
    while grants := sent(acts, GrantOpen):
        (grant,) = grants
        seen.append(grant.route_id)
        acts = opened(desk, A, grant)
    assert seen == [0, 1, 2]


# --- min_pool_size and caps --------------------------------------------------------------------------


def test_min_pool_size_is_filled_by_the_broker_and_kept_from_the_ttl():
    desk = Desk({"r": limits(5, 2, fixed=("d", "u"))})
    acts = desk.tick(REST_US)
    assert [type(act.message) for act in acts] == [RouteOpened, Keep, GrantOpen]
    assert {act.worker for act in acts} == {A}
    assert acts[1].message == Keep(0, 1)  # before the server is there: nobody may find it one too many
    grant = acts[2].message
    desk.say(A, Connected(0, grant.slot, grant.generation, "/s"))
    assert sent(desk.say(A, Opened(0, grant.slot, grant.generation, STATE)), Keep) == []
    assert targets(desk.tick(REST_US), GrantOpen) == [B]
    assert desk.tick(REST_US) == []


def test_a_share_of_min_pool_size_is_not_lowered_because_another_rose():
    desk = Desk({"r": limits(6, 3, fixed=("d", "u"))})
    desk.open_routes(A, B)
    said = []
    for worker, count in ((B, 1), (A, 1), (B, 2), (A, 3)):  # wishes that nothing has met yet
        for grant in sent(desk.say(worker, Want(ROUTE, count)), GrantOpen):
            acts = opened(desk, worker, grant)
            said += zip(targets(acts, Keep), [keep.count for keep in sent(acts, Keep)], strict=True)
    assert said == [(A, 0), (B, 1), (A, 1), (B, 2)]


def test_a_draining_worker_is_not_filled():
    desk = Desk({"r": limits(5, 1, fixed=("d", "u"))})
    desk.say(A, Draining())
    assert targets(desk.tick(REST_US), GrantOpen) == [B]


def test_an_idle_server_of_another_route_is_evicted_under_a_shared_cap():
    desk = Desk({"r": limits(0, shared="s"), "other": limits(0, shared="s")}, {"s": 1})
    desk.open_routes(A)
    desk.open_routes(A, B, rule="other")
    ((slot, generation),) = desk.lease(A, 1)
    desk.see(A, 0, 0)
    desk.see(B, 1, 0, route_id=1)
    desk.now += PROTECTION_US
    assert sent(desk.say(B, Want(1, 1)), GrantOpen) == []
    (recall,) = sent(desk.tick(), Recall)
    assert (recall.route_id, recall.count, recall.is_eviction) == (ROUTE, 1, True)
    desk.say(A, Closing(ROUTE, slot, generation))
    assert targets(desk.say(A, Closed(ROUTE, slot, generation)), GrantOpen) == [B]


def test_a_server_is_on_its_way_until_the_counters_show_it():
    """The relay may get no turn for many milliseconds: its client needs no second one."""
    desk = Desk({"r": limits(3)})
    desk.open_routes(A)
    (grant,) = sent(desk.say(A, Want(ROUTE, 1)), GrantOpen)
    at = (ROUTE, grant.slot, grant.generation)
    desk.say(A, Connected(*at, "/s"))
    desk.say(A, Opened(*at, STATE))
    desk.see(A, 1, 0, missing=1)
    for _ in range(10):
        assert sent(desk.tick(ROUND_US), GrantOpen) == []
    desk.see(A, 2, 0, missing=1)
    assert len(sent(desk.tick(ROUND_US), GrantOpen)) == 1
    desk.see(A, 2, 1)
    assert len(sent(desk.tick(ROUND_US), GrantOpen)) == 1


def test_a_server_that_never_shows_keeps_nobody_waiting():
    desk = Desk({"r": limits(2)})
    desk.open_routes(A)
    desk.lease(A)
    desk.say(A, Want(ROUTE, 1))
    desk.see(A, 1, 0, missing=1)
    assert sent(desk.tick(ROUND_US), GrantOpen) == []
    assert len(sent(desk.tick(SHOWN_US), GrantOpen)) == 1


def replicating_desk(pool_size):
    """A and B know the usual route (0) and that of replication connections (1)."""
    desk = Desk({"r": limits(pool_size)})
    desk.open_routes(A, B)
    for worker in (A, B):
        (answer,) = sent(desk.say(worker, OpenRoute(2, "r", "d", "u", True)), RouteOpened)
        assert (answer.route_id, answer.is_replication) == (1, True)
    return desk


def replicate(desk, worker):
    """Open a server for a replication client; returns its slot's name and generation."""
    (grant,) = sent(desk.say(worker, Want(1, 1)), GrantOpen)
    at = (1, grant.slot, grant.generation)
    desk.say(worker, Connected(*at, "/s"))
    desk.say(worker, Opened(*at, STATE))
    desk.say(worker, Want(1, 0))
    desk.now += ROUND_US  # it has arrived
    return at


def test_replication_and_other_servers_are_counted_together():
    desk = replicating_desk(2)
    desk.lease(A, 1)
    at = replicate(desk, B)
    assert sent(desk.say(B, Want(1, 1)), GrantOpen) == []
    assert sent(desk.say(A, Want(ROUTE, 1)), GrantOpen) == []
    assert targets(desk.say(B, Closed(*at)), GrantOpen) != []


def test_a_parked_server_goes_for_a_replication_client():
    desk = replicating_desk(1)
    ((slot, generation),) = desk.lease(A, 1)
    desk.see(A, 0, 0)
    desk.see(A, 1, 0, route_id=1)
    desk.now += PROTECTION_US
    assert sent(desk.say(A, Want(1, 1)), GrantOpen) == []
    (recall,) = sent(desk.tick(), Recall)
    assert (recall.route_id, recall.count, recall.is_eviction) == (ROUTE, 1, True)
    desk.say(A, Closing(ROUTE, slot, generation))
    (grant,) = sent(desk.say(A, Closed(ROUTE, slot, generation)), GrantOpen)
    assert grant.route_id == 1


def test_a_busy_server_goes_for_each_replication_client_that_waits():
    desk = replicating_desk(2)
    replicate(desk, A)
    desk.lease(A, 1)
    desk.see(A, 5, 1)
    desk.see(A, 0, 1, route_id=1)
    desk.see(B, 1, 0, route_id=1)
    desk.say(A, Want(ROUTE, 5))
    assert sent(desk.say(B, Want(1, 1)), GrantOpen) == []
    recalls = sent(desk.tick(EVICTION_PROTECTION_US), Recall)
    assert [(recall.route_id, recall.count, recall.is_eviction) for recall in recalls] == [(ROUTE, 1, True)]


def test_replication_servers_are_never_recalled():
    desk = replicating_desk(2)
    replicate(desk, A)
    replicate(desk, A)
    desk.see(A, 0, 0, route_id=1)
    desk.see(B, 9, 0)
    desk.see(B, 3, 0, route_id=1)
    desk.say(B, Want(ROUTE, 9))
    desk.say(B, Want(1, 3))
    for _ in range(20):
        acts = desk.tick(EVICTION_PROTECTION_US)
        assert sent(acts, Recall) == []


def test_servers_of_both_kinds_that_were_reported_are_told_apart():
    desk = Desk({"r": limits(1)}, workers=(), is_settled=False)
    name = SlotName(4, 1)
    desk.ledger.inherit(name, Inherited(USUAL._replace(is_replication=True), "/s", 7, "00"))
    acts = desk.ledger.serve(desk.now, is_settled=False)
    assert [act.slot for act in acts if isinstance(act, Bury)] == [name]
    assert desk.ledger.routes[4].key.is_replication
    desk.ledger.check()


def test_min_pool_size_is_not_filled_with_replication_servers():
    desk = Desk({"r": limits(3, 2)}, workers=(A,))
    desk.say(A, OpenRoute(1, "r", "d", "u", True))
    assert sent(desk.tick(REST_US), GrantOpen) == []


def test_only_routes_with_waiting_clients_are_looked_at():
    desk = Desk(max_routes=2000)
    for number in range(1000):
        desk.say(A, OpenRoute(1, "r", "d", f"u{number}", False))
    desk.say(A, Want(7, 9))
    desk.tick(ROUND_US)
    assert desk.ledger.due(desk.now + ROUND_US) == [7]


@pytest.mark.parametrize("shared", [None, "s"])
def test_a_tick_looks_at_some_of_many_waiting_routes_and_in_turn_at_all(shared):
    desk = Desk({"r": limits(1, shared=shared)}, {"s": 5}, max_routes=300)
    count = 300
    for number in range(count):
        desk.say(A, OpenRoute(1, "r", "d", f"u{number}", False))
    for number in range(count):
        desk.say(A, Want(number, 1))
        desk.see(A, 1, 0, number)
    seen = set()
    for _ in range(2 * count // LOOKS_MOST):
        desk.now += ROUND_US
        due = desk.ledger.due(desk.now)
        assert len(due) <= LOOKS_MOST + 5  # and those that have something under the same cap
        desk.tick()
        seen.update(due)
    assert len(seen) == count


def test_an_idle_ledger_rests_until_something_happens(desk):
    desk.tick(REST_US)
    last = desk.now
    assert desk.ledger.next_due_us() == last + IDLE_US
    desk.say(A, Draining())
    assert desk.ledger.next_due_us() == last + REST_US


def test_a_ledger_below_a_min_pool_size_looks_every_round():
    desk = Desk({"r": limits(5, 1, fixed=("d", "u"))}, workers=(A,))
    (_, _, grant) = desk.tick(REST_US)
    assert desk.ledger.next_due_us() == desk.now + REST_US
    opened(desk, A, grant.message)
    desk.tick(REST_US)
    assert desk.ledger.next_due_us() == desk.now + IDLE_US


def test_the_check_finds_a_slot_in_two_lists(desk):
    desk.lease(A, 1)
    route = desk.ledger.routes[ROUTE]
    route.buried[1] = route.slots[1]
    with pytest.raises(LedgerError, match="two lists"):
        desk.ledger.check()


def test_an_illegal_change_of_state_names_both(desk):
    desk.lease(A, 1)
    route = desk.ledger.routes[ROUTE]
    with pytest.raises(LedgerError, match="LEASED to OPENING"):
        route.move(route.slots[1], SlotState.OPENING)
