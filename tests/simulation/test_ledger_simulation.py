"""The ledger in a world that goes wrong: never a slot too many, and everybody is served."""

import itertools
import random

import pytest

from gpooler.broker.book import RuleLimits
from tests.simulation.world import MS, Faults, Load, World

KEY = ("r", "d", "u", False)
SECOND = 1_000 * MS


def limits(pool_size, minimum=0, shared=None, fixed=None):
    return RuleLimits("p", pool_size or None, minimum, shared, 1000, *(fixed or ()))


def world_of(pool_size, loads, **settings):
    """A world with one route, one load a worker, and a broker."""
    minimum = settings.pop("minimum", 0)
    world = World({"r": limits(pool_size, minimum, fixed=("d", "u"))}, {}, **settings)
    for load in loads:
        world.add_worker({KEY: load})
    world.start_broker()
    return world


def leases(world):
    return [worker.pools[KEY].living for worker in world.workers]


def measure(world, duration_us):
    """Transactions and mean wait of each worker over ``duration_us``."""
    for worker in world.workers:
        worker.pools[KEY].waits.clear()
        worker.pools[KEY].served = 0
    world.run(duration_us)
    pools = [worker.pools[KEY] for worker in world.workers]
    return [pool.served for pool in pools], [sum(pool.waits) / max(1, len(pool.waits)) for pool in pools]


def test_one_loaded_worker_of_four_reaches_every_slot():
    world = world_of(20, [Load(50), Load(0), Load(0), Load(0)])
    world.run(SECOND)
    assert leases(world) == [20, 0, 0, 0]


def test_slots_follow_the_load_from_one_worker_to_another():
    world = world_of(20, [Load(50), Load(0)])
    world.run(SECOND)
    first, second = world.workers
    first.set_load(KEY, Load(0))
    second.set_load(KEY, Load(50))
    world.run(SECOND)
    assert leases(world) == [0, 20]
    assert world.transfers == 20


@pytest.mark.parametrize(("workers", "pool_size"), [(2, 20), (3, 20), (4, 20), (4, 4), (4, 3), (3, 1)])
def test_equal_loads_wait_equally(workers, pool_size):
    world = world_of(pool_size, [Load(2 * pool_size) for _ in range(workers)])
    world.run(SECOND)
    served, waits = measure(world, 3 * SECOND)
    assert max(waits) <= 2 * min(waits) * 1.05
    assert max(served) <= 2 * min(served) * 1.05


@pytest.mark.parametrize(
    ("workers", "pool_size"), [(2, 1), (2, 3), (2, 5), (3, 2), (3, 4), (4, 5), (4, 6), (4, 7)]
)
def test_slots_that_cannot_be_shared_evenly_take_turns(workers, pool_size):
    world = world_of(pool_size, [Load(2 * pool_size) for _ in range(workers)])
    world.run(SECOND)
    transfers = world.transfers
    served, waits = measure(world, 4 * SECOND)
    assert max(waits) <= 1.25 * min(waits)
    assert max(served) <= 1.25 * min(served)
    if pool_size > workers:
        assert world.transfers - transfers <= 4 * 10 + workers  # ten turns a second


def test_unequal_loads_get_shares_that_follow_the_demand():
    world = world_of(20, [Load(60), Load(20), Load(20)])
    world.run(SECOND)
    assert leases(world)[0] in (11, 12, 13)
    _, waits = measure(world, 2 * SECOND)
    assert max(waits) <= 1.5 * min(waits)


def test_a_steady_load_above_the_pool_moves_nothing():
    world = world_of(20, [Load(20), Load(20)])
    world.run(SECOND)
    transfers, messages = world.transfers, world.messages
    world.run(2 * SECOND)
    assert world.transfers - transfers <= 4
    assert world.messages - messages <= 50


def test_a_load_below_the_pool_needs_no_message():
    world = world_of(20, [Load(8), Load(8)])
    world.run(SECOND)
    messages = world.messages
    served, _ = measure(world, 2 * SECOND)
    assert (world.messages - messages) * 1000 <= sum(served)


def test_a_fluctuating_load_moves_a_bounded_number_of_servers():
    world = world_of(10, [Load(8, think_us=500), Load(8, think_us=500)])
    world.run(SECOND)
    transfers = world.transfers
    world.run(2 * SECOND)
    assert world.transfers - transfers <= 2 * 100 * 4  # at most some in each round


def test_long_transactions_elsewhere_do_not_keep_a_worker_from_being_served():
    world = world_of(2, [Load(4, service_us=50 * MS), Load(4, service_us=50 * MS)])
    world.run(5 * SECOND)
    served, _ = measure(world, 5 * SECOND)
    assert min(served) * 2 >= max(served)


def test_min_pool_size_is_opened_one_a_second_without_a_client():
    world = world_of(10, [Load(0), Load(0)], minimum=4)
    seen = [0]
    for _ in range(6):
        world.run(SECOND)
        seen.append(sum(leases(world)))
    assert all(after - before <= 1 for before, after in itertools.pairwise(seen))
    assert seen[-1] == 4
    assert leases(world) == [2, 2]
    assert [worker.pools[KEY].keep for worker in world.workers] == [2, 2]


def test_a_route_without_a_limit_opens_for_every_waiter():
    world = world_of(0, [Load(30), Load(30)])
    world.run(SECOND)
    assert sum(leases(world)) >= 60
    assert world.transfers == 0


def shared_world(size, loads, seed=0):
    world = World({"a": limits(0, shared="s"), "b": limits(0, shared="s")}, {"s": size}, seed=seed)
    for first, second in loads:
        world.add_worker({("a", "d", "u", False): first, ("b", "d", "u", False): second})
    world.start_broker()
    return world


def test_an_idle_server_of_another_route_makes_room_under_a_shared_cap():
    world = shared_world(6, [(Load(20), Load(0)), (Load(20), Load(0))])
    world.run(SECOND)
    for worker in world.workers:
        worker.set_load(("a", "d", "u", False), Load(0))
        worker.set_load(("b", "d", "u", False), Load(10))
    world.run(2 * SECOND)
    living = {
        rule: sum(worker.pools[rule, "d", "u", False].living for worker in world.workers)
        for rule in ("a", "b")
    }
    assert living == {"a": 0, "b": 6}


def test_two_busy_routes_under_one_cap_are_both_served():
    world = shared_world(1, [(Load(4), Load(4)), (Load(4), Load(4))])
    world.run(2 * SECOND)
    for worker in world.workers:
        for pool in worker.pools.values():
            pool.served = 0
    world.run(8 * SECOND)
    served = [pool.served for worker in world.workers for pool in worker.pools.values()]
    assert min(served) > 0


def test_a_dead_workers_slots_come_back():
    world = world_of(20, [Load(40), Load(40)], faults=Faults(stubborn=100))
    world.run(SECOND)
    world.kill_worker(world.workers[0], respawn_us=60 * SECOND)
    world.run(5 * SECOND)
    assert leases(world) == [20]


def test_a_broker_that_dies_under_load_is_not_felt():
    world = world_of(20, [Load(40), Load(40)])
    world.run(SECOND)
    world.kill_broker()
    for _ in range(100):
        world.run(10 * MS)
        assert sum(leases(world)) >= 19  # what was on its way when it died may be lost
    assert min(leases(world)) >= 9
    assert world.complaints == []


@pytest.mark.parametrize("seed", range(4))
def test_what_runs_when_worker_and_broker_die_together_keeps_its_slot(seed):
    """The world counts: nothing is opened instead before PostgreSQL has let go."""
    long, short = Load(4, service_us=20 * SECOND), Load(8)
    world = world_of(4, [long, short], seed=seed, faults=Faults(stubborn=500))
    world.run(3 * SECOND)
    for _ in range(3):
        world.kill_worker(world.workers[0], respawn_us=SECOND)
        world.kill_broker(respawn_us=50 * MS)
        world.run(10 * SECOND)
    assert world.complaints == []
    assert sum(leases(world)) == 4


def test_a_new_broker_grants_nothing_before_a_stalled_worker_has_reported():
    world = world_of(4, [Load(4), Load(4), Load(1)])
    world.run(SECOND)
    first = world.workers[0]
    first.stall(3 * SECOND)
    world.kill_broker()
    world.run(2 * SECOND)
    assert world.broker.ledger.is_ready is False
    world.workers[2].set_load(KEY, Load(10))
    world.run(4 * SECOND)
    assert world.broker.ledger.is_ready
    assert world.most_visible[KEY[:3]] == 4
    assert world.longest_wait() < SECOND


def clients(dice, key):
    """How many there are of a route; few of those that need a server of their own."""
    *_, is_replication = key
    return dice.randint(0, 2 if is_replication else 10)


@pytest.mark.parametrize("seed", range(12))
def test_chaos_never_exceeds_a_cap_and_ends_in_service_for_everybody(seed):
    dice = random.Random(seed)
    faults = Faults(open_fails=50, server_dies=2, repeats=50, declines=20, stubborn=50)
    rules = {
        "r": limits(dice.randint(1, 8), dice.choice([0, 2]), fixed=("d", "u")),
        "a": limits(0, shared="s"),
        "b": limits(0, shared="s"),
    }
    world = World(rules, {"s": dice.randint(1, 4)}, seed=seed, faults=faults, logins=1 + seed % 4)
    keys = [(rule, "d", "u", is_replication) for rule in rules for is_replication in (False, True)]
    for _ in range(dice.randint(2, 4)):
        loads = {
            key: Load(clients(dice, key), dice.choice([0, 2 * MS]), dice.choice([1 * MS, 5 * MS]))
            for key in keys
        }
        world.add_worker(loads)
    world.start_broker()
    for _ in range(40):
        world.run(dice.randint(1, 150) * MS)
        deed = dice.randrange(8)
        if deed == 0 and world.workers:
            world.kill_worker(dice.choice(world.workers), dice.randint(1, 300) * MS)
        elif deed == 1:
            world.kill_broker(dice.randint(1, 300) * MS)
        elif deed == 2 and world.workers:
            dice.choice(world.workers).stall(dice.randint(1, 500) * MS)
        elif deed == 3 and world.workers and world.broker:
            world.kill_broker(dice.randint(1, 100) * MS)
            world.kill_worker(dice.choice(world.workers), dice.randint(1, 300) * MS)
        elif deed == 4 and world.workers:
            worker, key = dice.choice(world.workers), dice.choice(keys)
            worker.set_load(key, Load(clients(dice, key), 0, 1 * MS))
    world.faults = Faults()
    world.run(8 * SECOND)
    assert world.complaints == []
    assert world.longest_wait() < 2 * SECOND


@pytest.mark.parametrize("seed", range(6))
def test_limits_that_change_under_load_hold_soon_and_everybody_is_served(seed):
    world = world_of(20, [Load(50), Load(30), Load(0)], seed=seed)
    for size in (3, 12, 1, 20, 5):
        world.reload({"r": limits(size, fixed=("d", "u"))})
        world.run(SECOND)
        if seed % 4 == 1:
            world.kill_broker()
        world.run(2 * SECOND)
        world.ceiling = 0
        world.count()
        served, _ = measure(world, SECOND)
        assert sum(leases(world)) == size
        assert min(served[:2]) > 0
