"""A world on virtual time for the ledger: clients, workers, a broker, channels and PostgreSQL.

Workers stall (their hub stands still while their relay serves on), repeat old messages, die; the broker
dies; servers die, refuse, take their time to go. After each event of the ledger it is checked, and the
servers that PostgreSQL really runs are counted against the caps.
"""

import heapq
import random
from collections import deque
from dataclasses import dataclass, field

from gpooler.broker.acts import Bury, Complain, Disown, Entrust, Hold, Inherit, Release, Send
from gpooler.broker.book import Inherited
from gpooler.broker.ledger import Demand, Ledger
from gpooler.broker.messages import (
    Closed,
    Closing,
    Connected,
    Declined,
    GrantOpen,
    GrantServer,
    Hello,
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
    ServerState,
    SlotPhase,
    Want,
    WorkerId,
)

START_US = 1_000_000_000
MS = 1_000


@dataclass(eq=False)
class Process:
    """A PostgreSQL process and who holds its connection."""

    server_id: str
    key: tuple
    holders: set = field(default_factory=set)
    is_alive: bool = True
    is_visible: bool = False  # it has seen a login: pg_stat_activity may show it
    busy_until: int = 0


@dataclass(frozen=True)
class Load:
    """Clients of one route in one worker."""

    clients: int
    think_us: int = 0  # mean pause between two transactions
    service_us: int = 4_000  # mean length of a transaction


@dataclass
class Faults:
    """Rates per 1,000 opportunities."""

    open_fails: int = 0
    server_dies: int = 0  # per transaction
    repeats: int = 0  # per message of a worker
    declines: int = 0
    stubborn: int = 0  # per burial: the process stays for long


class World:
    """Time, and everything in it."""

    def __init__(self, rules, shared_pools, *, seed=0, faults=None, logins=1_000):
        """``logins``: how many servers may be opened at once."""
        self.random = random.Random(seed)
        self.logins = logins
        self.now = START_US
        self.rules, self.shared_pools = rules, shared_pools
        self.faults = faults or Faults()
        self.processes = {}
        self.workers = []
        self.broker = None
        self.vault = {}  # the master's copies of descriptors, by slot
        self.incarnation = 0
        self.brokers = 0
        self.most_visible = {}
        self.ceiling = 0  # servers granted before the limits sank
        self.steps = self.messages = self.transfers = 0
        self.complaints = []
        self._events = []
        self._order = 0

    def at(self, delay_us, act, *args):
        self._order += 1
        heapq.heappush(self._events, (self.now + max(0, int(delay_us)), self._order, act, args))

    def run(self, duration_us):
        """Let ``duration_us`` pass."""
        end = self.now + duration_us
        while self._events and self._events[0][0] <= end:
            self.now, _, act, args = heapq.heappop(self._events)
            act(*args)
            self.steps += 1
        self.now = end

    def reload(self, rules):
        """Other limits from now on; as with the master, a broker that is dead begins with them."""
        self.ceiling = max([limits.pool_size for limits in (*self.rules.values(), *rules.values())])
        self.rules = rules
        if self.broker is not None and self.broker.is_alive:
            self.broker.configure()

    def spread(self, mean_us):
        return self.random.expovariate(1 / mean_us) if mean_us else 0

    def chance(self, per_mille):
        return self.random.random() * 1000 < per_mille

    # --- PostgreSQL ---

    def start_process(self, key, holder):
        process = Process(f"s{len(self.processes)}", key, {holder})
        self.processes[process.server_id] = process
        return process

    def show(self, process):
        """The process has seen a login: count what pg_stat_activity would."""
        if process.is_alive:
            process.is_visible = True
            self.count()

    def count(self):
        for rule, limits in self.rules.items():
            cap = limits.shared_pool or rule
            size = self.shared_pools[limits.shared_pool] if limits.shared_pool else limits.pool_size
            rules = [name for name, other in self.rules.items() if (other.shared_pool or name) == cap]
            keys = {}
            for process in self.processes.values():
                if process.is_alive and process.is_visible and process.key[0] in rules:
                    pool = cap if limits.shared_pool else process.key[:3]
                    keys[pool] = keys.get(pool, 0) + 1
            for pool, count in keys.items():
                self.most_visible[pool] = max(count, self.most_visible.get(pool, 0))
                most = size and max(size, self.ceiling)
                assert not most or count <= most, f"{pool}: {count} servers of {most} at {self.now}"

    def drop(self, process, holder):
        """A holder lets go; a process that nobody holds ends when its query does."""
        process.holders.discard(holder)
        if not process.holders and process.is_alive:
            wait = max(0, process.busy_until - self.now)
            self.at(wait + self.spread(MS), self.end_process, process)

    def end_process(self, process):
        process.is_alive = False
        self.processes.pop(process.server_id, None)

    # --- processes of ours ---

    def add_worker(self, loads, number=None):
        self.incarnation += 1
        number = number or len(self.workers) + 1
        worker = Worker(self, WorkerId(number, self.incarnation), loads)
        self.workers.append(worker)
        if self.broker is not None:
            self.broker.attach(worker)
        return worker

    def kill_worker(self, worker, respawn_us=20 * MS):
        worker.die()
        self.workers.remove(worker)
        self.at(respawn_us, self.add_worker, worker.loads, worker.id.worker)

    def start_broker(self):
        self.broker = Broker(self)
        for worker in self.workers:
            self.broker.attach(worker)
        self.broker.inherited = {slot: process for slot, (process, _) in self.vault.items()}
        for slot, (process, server) in self.vault.items():
            process.holders.add(self.broker)
            self.broker.ledger.inherit(slot, server)
        self.broker.apply(self.broker.ledger.serve(self.now, self.brokers == 0))
        self.brokers += 1
        self.broker.plan_tick()

    def kill_broker(self, respawn_us=20 * MS):
        if self.broker is None:
            return
        broker, self.broker = self.broker, None
        broker.die()
        self.at(respawn_us, self.start_broker)

    def keep_copy(self, act, process):
        """The master keeps a copy of a descriptor; an older one of the slot goes."""
        self.drop_copy(act.slot)
        process.holders.add(act.slot)
        server = Inherited(act.key, act.endpoint, act.pid, act.secret_hex)
        self.vault[act.slot] = (process, server)

    def drop_copy(self, slot):
        process, _ = self.vault.pop(slot, (None, None))
        if process is not None:
            self.drop(process, slot)

    # --- results ---

    def longest_wait(self, key=None):
        """The longest wait of a client now in a queue."""
        return max(
            (
                self.now - since
                for worker in self.workers
                for pool in worker.pools.values()
                if key in (None, pool.key)
                for since in pool.queue
            ),
            default=0,
        )


class Link:
    """A channel: both directions in order, each message some time under way."""

    def __init__(self, world, worker, broker):
        self.world, self.worker, self.broker = world, worker, broker
        self.last = {worker: 0, broker: 0}

    def send(self, to, deliver, message, process=None):
        """Deliver later. A descriptor under way keeps its process alive."""
        world = self.world
        world.messages += 1
        if process is not None:
            token = object()
            process.holders.add(token)
        else:
            token = None
        when = max(self.last[to] + 1, world.now + int(20 + world.spread(60)))
        self.last[to] = when
        world.at(when - world.now, self._deliver, to, deliver, message, process, token)

    def _deliver(self, to, deliver, message, process, token):
        if to.is_alive:
            deliver(message, process)
        if process is not None:
            self.world.drop(process, token)

    def end(self, to, notice):
        """The other side is dead: tell after what it sent."""
        when = max(self.last[to] + 1, self.world.now)
        self.last[to] = when
        self.world.at(when - self.world.now, notice)


class Broker:
    """The service, as far as the ledger sees it."""

    def __init__(self, world):
        self.world = world
        self.is_alive = True
        self.ledger = Ledger(world.rules, world.shared_pools, {"p": world.logins}, 100)
        self.links = {}
        self.held = {}
        self.inherited = {}
        self.workers = {}
        self.tick_at = 0

    def attach(self, worker):
        self.ledger.attach(worker.id, worker.has_history)
        link = Link(self.world, worker, self)
        self.links[worker.id] = link
        self.workers[worker.id] = worker
        if worker.is_alive:
            self.world.at(self.world.spread(2 * MS), worker.attach, link)

    def die(self):
        self.is_alive = False
        for process in (*self.held.values(), *self.inherited.values()):
            self.world.drop(process, self)
        for worker in self.workers.values():
            if worker.is_alive:
                link = self.links[worker.id]
                link.end(worker, lambda worker=worker, link=link: worker.hub(worker.broker_lost, link))

    def receive(self, worker, message, process):
        if isinstance(message, Hello):
            assert message.incarnation == worker.id.incarnation
            return
        self.apply(self.ledger.handle(self.world.now, worker.id, message), process)

    def configure(self):
        self.apply(
            self.ledger.configure(
                self.world.now, self.world.rules, self.world.shared_pools, {"p": self.world.logins}
            )
        )

    def worker_gone(self, worker):
        if self.is_alive:
            self.workers.pop(worker.id, None)
            self.apply(self.ledger.worker_gone(self.world.now, worker.id))

    def apply(self, acts, process=None):
        self.ledger.check()
        for act in acts:
            match act:
                case Hold(slot):
                    assert process is not None
                    before = self.held.get(slot)
                    if before not in (None, process):
                        self.world.drop(before, self)
                    self.held[slot] = process
                    process.holders.add(self)
                case Entrust(slot):
                    self.world.keep_copy(act, self.held[slot])
                case Inherit(slot):
                    assert slot not in self.held
                    self.held[slot] = self.inherited.pop(slot)
                case Disown(slot):
                    process = self.inherited.pop(slot)
                    if process not in self.held.values():
                        self.world.drop(process, self)
                    if slot not in self.held:
                        self.world.drop_copy(slot)
                case Release(slot):
                    self.world.drop(self.held.pop(slot), self)
                    self.world.drop_copy(slot)
                case Send(worker, message, slot):
                    self.send(worker, message, slot)
                case Bury():
                    self.bury(act)
                case Complain(worker, text):
                    self.world.complaints.append((worker, text))
        self.plan_tick()

    def send(self, worker_id, message, slot):
        worker = self.workers.get(worker_id)
        process = self.held[slot] if slot is not None else None
        if isinstance(message, GrantServer):
            self.world.transfers += 1
            assert message.state.server_id == process.server_id
        if worker is not None:
            self.links[worker_id].send(worker, worker.receive, message, process)

    def bury(self, act):
        process = self.held[act.slot]
        if act.pid:
            process.busy_until = 0
        wait = 3_000 * MS if self.world.chance(self.world.faults.stubborn) else self.world.spread(3 * MS)

        def ended():
            self.world.end_process(process)
            if self.is_alive:
                self.apply(self.ledger.gone(self.world.now, act.slot, act.generation))

        self.world.at(wait, ended)

    def plan_tick(self):
        due = max(self.ledger.next_due_us(), self.world.now)
        if self.is_alive and (self.tick_at <= self.world.now or due < self.tick_at):
            self.tick_at = due
            self.world.at(due - self.world.now, self.tick, due)

    def tick(self, planned):
        if not self.is_alive or planned != self.tick_at:
            return
        self.tick_at = 0
        demand = {}
        for route_id in self.ledger.due(self.world.now):
            key = tuple(self.ledger.routes[route_id].key)
            for worker in self.workers.values():
                pool = worker.pools.get(key)
                if pool is not None:
                    demand[worker.id, route_id] = Demand(len(pool.queue), pool.active, pool.living)
        self.apply(self.ledger.tick(self.world.now, demand))


@dataclass(eq=False)
class Lease:
    """A slot in a worker's hands."""

    generation: int
    phase: str  # connecting, opening, parked, busy, closing
    process: Process | None = None


class Pool:
    """One route in one worker: what the relay keeps."""

    def __init__(self, key):
        self.key = key
        self.route_id = None
        self.queue = deque()
        self.leases = {}
        self.owed = self.owed_evictions = 0
        self.wanted = 0
        self.served = 0
        self.waits = []
        self.keep = 0

    @property
    def is_replication(self):
        """Each server is opened for one client and ends with it."""
        return self.key[3]

    @property
    def active(self):
        return sum(lease.phase == "busy" for lease in self.leases.values())

    @property
    def opening(self):
        return sum(lease.phase in ("connecting", "opening") for lease in self.leases.values())

    @property
    def living(self):
        return sum(lease.phase in ("parked", "busy") for lease in self.leases.values())


class Worker:
    """Relay (pools, at once) and hub (messages, in order, stands still in a stall)."""

    def __init__(self, world, worker_id, loads):
        self.world, self.id, self.loads = world, worker_id, loads
        self.is_alive = True
        self.has_history = False
        self.link = None
        self.pools = {key: Pool(key) for key in loads}
        self.stalled_until = 0
        self.hub_at = 0
        self.said = []
        self.unread = []  # descriptors in the socket's buffer
        self.token = 0
        self.tokens = {}

    # --- hub ---

    def hub(self, act, *args):
        when = max(self.hub_at, self.stalled_until, self.world.now)
        self.hub_at = when
        self.world.at(when - self.world.now, self._hub, act, args)

    def _hub(self, act, args):
        if not self.is_alive:
            return
        if self.stalled_until > self.world.now:
            self.world.at(self.stalled_until - self.world.now, self._hub, act, args)
            return
        act(*args)

    def stall(self, duration_us):
        self.stalled_until = self.world.now + duration_us

    def say(self, message, process=None):
        """Send to the broker, now and then again later."""
        if self.link is None or not self.link.broker.is_alive:
            return
        broker = self.link.broker
        deliver = lambda message, process: broker.receive(self, message, process)  # noqa: E731
        self.link.send(broker, deliver, message, process)
        if isinstance(message, (Want, OpenRoute, ReportEnd, Hello)):
            return
        self.said.append((message, process))
        if self.world.chance(self.world.faults.repeats):
            message, process = self.world.random.choice(self.said[-50:])
            if process is None or process.is_alive:
                self.link.send(broker, deliver, message, process)

    def receive(self, message, process):
        token = object()
        if process is not None:
            process.holders.add(token)
            self.unread.append((process, token))
        self.hub(self._receive, message, process, token)

    def _receive(self, message, process, token):
        self.handle(message, process)
        if process is not None:
            self.unread.remove((process, token))
            self.world.drop(process, token)

    # --- broker comes and goes ---

    def attach(self, link):
        self.hub(self._attach, link)

    def _attach(self, link):
        self.link = link
        self.has_history = True
        self.said = []  # a new channel carries no old messages
        if not link.broker.is_alive:
            return
        self.say(Hello(1, 1, *self.id))
        for pool in self.pools.values():
            if pool.route_id is not None:
                self.say(ReportRoute(pool.route_id, *pool.key))
        for pool in self.pools.values():
            for slot, lease in pool.leases.items():
                self.report(pool.route_id, slot, lease)
        self.say(ReportEnd())
        for pool in self.pools.values():
            if pool.route_id is None:
                self.open_route(pool)
            pool.wanted = 0
            self.want(pool)

    def report(self, route_id, slot, lease):
        if lease.phase == "connecting":
            self.say(ReportSlot(route_id, slot, lease.generation))
            return
        phases = {"opening": SlotPhase.OPENING, "closing": SlotPhase.CLOSING}
        phase = phases.get(lease.phase, SlotPhase.OPEN)
        state = self.state(lease.process) if phase is SlotPhase.OPEN else None
        self.say(ReportServer(route_id, slot, lease.generation, phase, state), lease.process)

    def broker_lost(self, link):
        if self.link is link:
            self.link = None
            for pool in self.pools.values():
                pool.owed = pool.owed_evictions = 0

    def die(self):
        self.is_alive = False
        for process, token in self.unread:
            self.world.drop(process, token)
        for process in list(self.world.processes.values()):
            if self in process.holders:
                self.world.drop(process, self)
        if self.link is not None:
            broker = self.link.broker
            self.link.end(broker, lambda: broker.worker_gone(self))
        elif self.world.broker is not None:
            broker = self.world.broker
            self.world.at(0, lambda: broker.worker_gone(self))

    # --- routes and clients ---

    def open_route(self, pool):
        self.token += 1
        self.tokens[self.token] = pool
        self.say(OpenRoute(self.token, *pool.key))

    def start_clients(self, pool):
        for _ in range(self.loads[pool.key].clients):
            self.world.at(self.world.spread(5 * MS), self.request, pool)

    def set_load(self, key, load):
        """Change the load; new clients begin, the old ones go on as they are."""
        old = self.loads[key]
        self.loads = {**self.loads, key: load}
        for _ in range(load.clients - old.clients):
            self.world.at(self.world.spread(MS), self.request, self.pools[key])
        self.pools[key].leaving_clients = max(0, old.clients - load.clients)

    def request(self, pool):
        if not self.is_alive:
            return
        if getattr(pool, "leaving_clients", 0):
            pool.leaving_clients -= 1
            return
        pool.queue.append(self.world.now)
        self.serve(pool)
        self.want(pool)

    def serve(self, pool):
        """Waiting clients take parked servers."""
        for slot, lease in pool.leases.items():
            if pool.queue and lease.phase == "parked":
                pool.waits.append(self.world.now - pool.queue.popleft())
                lease.phase = "busy"
                service = self.world.spread(self.loads[pool.key].service_us)
                lease.process.busy_until = self.world.now + int(service)
                self.world.at(service, self.release, pool, slot, lease)

    def release(self, pool, slot, lease):
        if not self.is_alive or pool.leases.get(slot) is not lease or lease.phase != "busy":
            return
        pool.served += 1
        self.world.at(self.world.spread(self.loads[pool.key].think_us), self.request, pool)
        lease.phase = "parked"
        if pool.is_replication:
            self.close(pool, slot)
        elif self.world.chance(self.world.faults.server_dies):
            self.world.end_process(lease.process)
            self.lose(pool, slot)
        elif pool.owed_evictions or pool.owed:
            self.give_up(pool, slot)
        self.serve(pool)
        self.want(pool)

    def want(self, pool):
        """Tell when the queue begins, doubles, or is gone."""
        waiting = len(pool.queue)
        if pool.route_id is None or not (
            (waiting and not pool.wanted) or waiting > 2 * pool.wanted or (pool.wanted and not waiting)
        ):
            return
        pool.wanted = waiting
        self.hub(lambda: self.say(Want(pool.route_id, waiting)))

    # --- leases ---

    def state(self, process):
        return ServerState(process.server_id, 1, "00", "/s", {}, {}, 0, 0, 0)

    def give_up(self, pool, slot):
        """A parked server goes, for what is owed."""
        lease = pool.leases[slot]
        if pool.owed_evictions or self.link is None:
            self.close(pool, slot)
            return
        pool.owed = max(0, pool.owed - 1)
        del pool.leases[slot]
        process = lease.process
        self.hub(self._return, pool, slot, lease.generation, process)

    def _return(self, pool, slot, generation, process):
        if self.link is None:  # the broker is gone: keep it
            pool.leases[slot] = Lease(generation, "parked", process)
            self.serve(pool)
            return
        self.say(Returned(pool.route_id, slot, generation, self.state(process)))
        self.world.drop(process, self)

    def close(self, pool, slot):
        lease = pool.leases[slot]
        self.left(pool, lease)
        lease.phase = "closing"
        self.hub(self.say, Closing(pool.route_id, slot, lease.generation))
        self.world.at(self.world.spread(2 * MS), self.closed, pool, slot, lease)

    def closed(self, pool, slot, lease):
        self.world.end_process(lease.process)
        if self.is_alive and pool.leases.get(slot) is lease:
            del pool.leases[slot]
            self.hub(self.say, Closed(pool.route_id, slot, lease.generation))

    def lose(self, pool, slot):
        """A server died."""
        lease = pool.leases.pop(slot)
        self.left(pool, lease)
        self.hub(self.say, Closed(pool.route_id, slot, lease.generation))

    def left(self, pool, lease):
        if lease.phase in ("parked", "busy"):
            if pool.owed_evictions:
                pool.owed_evictions -= 1
            elif pool.owed:
                pool.owed -= 1

    def handle(self, message, process):
        pool = next((p for p in self.pools.values() if p.route_id == getattr(message, "route_id", -1)), None)
        match message:
            case RouteOpened(token, route_id):
                key = (message.rule, message.database, message.user, message.is_replication)
                pool = self.tokens.pop(token, None) or self.pools[key]
                is_new = pool.route_id is None
                assert pool.route_id in (None, route_id), "a route id changed"
                pool.route_id = route_id
                if is_new:
                    self.start_clients(pool)
            case GrantOpen(_, slot, generation):
                assert slot not in pool.leases
                is_over = pool.is_replication and len(pool.queue) <= pool.opening
                if is_over or self.world.chance(self.world.faults.declines):
                    self.say(Declined(pool.route_id, slot, generation))
                    return
                lease = pool.leases[slot] = Lease(generation, "connecting")
                self.world.at(self.world.spread(200), self.hub, self.connect, pool, slot, lease)
            case GrantServer(_, slot, generation):
                assert slot not in pool.leases
                assert not pool.is_replication
                process.holders.add(self)
                pool.leases[slot] = Lease(generation, "parked", process)
                if process.is_alive:
                    self.serve(pool)
                    self.want(pool)
                else:
                    self.lose(pool, slot)
            case Recall():
                self.recall(pool, message)
            case Keep(_, count):
                pool.keep = count
            case RouteParameters():
                pass

    def recall(self, pool, message):
        assert not pool.is_replication
        free = [slot for slot, lease in pool.leases.items() if lease.phase == "parked"]
        owing = pool.owed + pool.owed_evictions
        count = max(0, min(message.count, pool.living - owing))
        now = min(count, len(free))
        if message.is_eviction:
            pool.owed_evictions += count
        else:
            pool.owed += count
        self.say(RecallAnswer(pool.route_id, message.recall_id, now, count - now))
        for slot in free[:now]:
            self.give_up(pool, slot)

    def connect(self, pool, slot, lease):
        if pool.leases.get(slot) is not lease:
            return
        process = lease.process = self.world.start_process(pool.key, self)
        lease.phase = "opening"
        self.say(Connected(pool.route_id, slot, lease.generation, "/s"), process)
        self.world.show(process)
        self.world.at(self.world.spread(4 * MS), self.hub, self.log_in, pool, slot, lease)

    def log_in(self, pool, slot, lease):
        if self.world.chance(self.world.faults.open_fails):
            self.world.end_process(lease.process)
            del pool.leases[slot]
            self.say(OpenFailed(pool.route_id, slot, lease.generation, 5))
            return
        lease.phase = "parked"
        self.say(Opened(pool.route_id, slot, lease.generation, self.state(lease.process)))
        self.serve(pool)
        if pool.is_replication and lease.phase == "parked":
            self.close(pool, slot)  # its client is gone
