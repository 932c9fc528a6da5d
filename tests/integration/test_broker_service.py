"""The broker's service over real channels: grants, transfers, deaths, a successor."""

import os
import socket

import gevent
import gevent.event
import pytest

from gpooler.broker import messages as m
from gpooler.broker.book import Inherited, RuleLimits
from gpooler.broker.ledger import Ledger
from gpooler.broker.service import BrokerService
from gpooler.log import LogSettings
from gpooler.logs.direct import DirectLog
from gpooler.process import datagrams
from gpooler.process.channels import Channel
from gpooler.stats.registry import RouteWord
from gpooler.stats.shared import SharedCounters

RULES = {"r": RuleLimits("p", 1, 0, None, 1000)}
SETTINGS = LogSettings(format="%l %m")


class Sink:
    """Log lines, kept."""

    def __init__(self):
        self.lines = []

    def write(self, lines):
        self.lines += [line for _, line in lines]
        return 0

    def reopen(self):
        pass

    def close(self):
        pass


class House:
    """A service, its workers' ends and servers that are plain sockets."""

    def __init__(self):
        self.sink = Sink()
        self.counters = {}
        self.cancels = []
        self.complaints = []
        self.vault = {}  # what the master keeps
        self.incarnation = 0
        self.workers = []
        self.services = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.service = self.new_service()
        self.service.serve(is_settled=True)

    def new_service(self):
        service = BrokerService(
            Ledger(RULES, {}, {"p": 9}, 10),
            self.counters,
            lambda rule, endpoint, pid, secret, timeout_ms: self.cancels.append((endpoint, pid, secret)),
            self,
            DirectLog(SETTINGS, [self.sink]).logger,
            is_checked=True,
            is_session_logged=True,
        )
        self.services.append(service)
        return service

    def complain(self, worker, text):
        self.complaints.append((worker, text))

    def hold(self, server, fd):
        self.let(server.slot)
        self.vault[server.slot] = (server, os.dup(fd))

    def let(self, slot):
        _, fd = self.vault.pop(slot, (None, -1))
        if fd >= 0:
            os.close(fd)

    def add_worker(self, number):
        self.incarnation += 1
        worker = Worker(self, m.WorkerId(number, self.incarnation))
        self.counters[number] = worker.counters
        self.workers.append(worker)
        worker.join(self.service, has_history=False)
        return worker

    def close(self):
        for worker in self.workers:
            worker.die()
        for service in self.services:
            service.close()
        gevent.sleep(0)
        gevent.sleep(0)
        for worker in self.workers:
            worker.counters.close()
        for slot in list(self.vault):
            self.let(slot)
        self.listener.close()


class Worker:
    """The other end of a channel, said and read by the test."""

    def __init__(self, house, worker_id):
        self.house, self.id = house, worker_id
        self.counters = SharedCounters.create()
        self.channel = None
        self.fds = []

    def join(self, service, has_history, report=()):
        ours, theirs = datagrams.pair()
        self.channel = Channel(ours, m.CODEC)
        service.attach(self.id, has_history, theirs)
        self.say(m.Hello(m.PROTOCOL_VERSION, os.getpid(), *self.id))
        for message, fds in report:
            self.channel.send(message, fds)
        self.say(m.ReportEnd())

    def say(self, message, *socks):
        self.channel.send(message, [sock.fileno() for sock in socks])

    def hear(self, kind):
        """The next message of this kind and its sockets; others on the way are skipped."""
        with gevent.Timeout(5):
            while True:
                message, fds = self.channel.receive()
                socks = [socket.socket(fileno=fd) for fd in fds]
                self.fds += socks
                if isinstance(message, kind):
                    return (message, *socks) if socks else message

    def open_route(self):
        self.say(m.OpenRoute(1, "r", "d", "u", False))
        return self.hear(m.RouteOpened).route_id

    def want(self, route_id, waiting):
        """Clients wait: in the counters and by message."""
        self.counters.set_route(route_id, RouteWord.CLIENTS_WAITING, waiting)
        self.say(m.Want(route_id, waiting))

    def open_server(self, grant):
        """Connect for a grant; returns the server's end and ours."""
        ours = socket.create_connection(self.house.listener.getsockname())
        server, _ = self.house.listener.accept()
        self.fds += [ours, server]
        slot = (grant.route_id, grant.slot, grant.generation)
        self.say(m.Connected(*slot, self.house.endpoint), ours)
        self.say(m.Opened(*slot, self.state()))
        self.counters.set_route(grant.route_id, RouteWord.CLIENTS_WAITING, 0)
        return server, ours

    def state(self):
        return m.ServerState("s1", 4711, "00c0ffee", self.house.endpoint, {}, {}, 1, 0, 1)

    def die(self):
        self.channel.close()
        gevent.sleep(0)
        for sock in self.fds:
            sock.close()
        self.fds = []


@pytest.fixture
def house():
    house = House()
    yield house
    house.close()


def settle(condition):
    """Let greenlets run until the condition holds."""
    with gevent.Timeout(5):
        while not condition():
            gevent.sleep(0.001)


def test_a_server_travels_from_one_worker_to_another(house):
    first, second = house.add_worker(1), house.add_worker(2)
    route_id = first.open_route()
    assert second.open_route() == route_id
    first.want(route_id, 1)
    grant = first.hear(m.GrantOpen)
    server, ours = first.open_server(grant)
    second.want(route_id, 1)
    recall = first.hear(m.Recall)
    first.say(m.RecallAnswer(route_id, recall.recall_id, 1, 0))
    first.say(m.Returned(route_id, grant.slot, grant.generation, first.state()))
    ours.close()
    passed, sock = second.hear(m.GrantServer)
    assert passed.state == first.state()
    assert (passed.slot, passed.generation > grant.generation) == (grant.slot, True)
    assert not os.get_inheritable(sock.fileno())
    server.sendall(b"still here")
    assert sock.recv(20) == b"still here"


def test_a_dead_workers_server_is_cancelled_and_its_slot_free_when_it_is_gone(house):
    first, second = house.add_worker(1), house.add_worker(2)
    route_id = first.open_route()
    second.open_route()
    first.want(route_id, 1)
    server, ours = first.open_server(first.hear(m.GrantOpen))
    settle(lambda: house.service.held == 1)
    second.want(route_id, 1)
    server = server.dup()
    first.die()
    settle(lambda: house.cancels)
    assert house.cancels == [(house.endpoint, 4711, bytes.fromhex("00c0ffee"))]
    assert server.recv(1) == b""  # the broker shut its sending half down
    assert house.service.held == 1
    server.sendall(b"what PostgreSQL still says")
    server.close()
    second.hear(m.GrantOpen)
    assert house.service.held == 0
    assert ours.fileno() == -1


def test_a_dead_workers_idle_server_needs_no_cancel(house, monkeypatch):
    monkeypatch.setattr("gpooler.broker.burial._SHORT_S", 5.0)
    first, second = house.add_worker(1), house.add_worker(2)
    route_id = first.open_route()
    second.open_route()
    first.want(route_id, 1)
    server, _ = first.open_server(first.hear(m.GrantOpen))
    settle(lambda: house.service.held == 1)
    server = server.dup()

    def idle_server():
        server.setblocking(False)
        while True:
            try:
                assert server.recv(1) == b""
                return server.close()
            except BlockingIOError:
                gevent.sleep(0)

    ending = gevent.spawn(idle_server)
    first.die()
    ending.get(timeout=5)
    second.want(route_id, 1)
    second.hear(m.GrantOpen)
    assert house.cancels == []


def test_a_new_broker_learns_all_from_the_workers(house):
    first = house.add_worker(1)
    route_id = first.open_route()
    first.want(route_id, 1)
    grant = first.hear(m.GrantOpen)
    _, ours = first.open_server(grant)
    settle(lambda: house.service.held == 1)
    house.service.close()
    house.service = house.new_service()
    slot = (route_id, grant.slot, grant.generation)
    report = [
        (m.ReportRoute(route_id, "r", "d", "u", False), []),
        (m.RouteParameters(route_id, {"TimeZone": "UTC"}), []),
        (m.ReportServer(*slot, m.SlotPhase.OPEN, first.state()), [ours.fileno()]),
    ]
    first.channel.close()
    first.join(house.service, has_history=True, report=report)
    second = house.add_worker(2)
    house.service.serve(is_settled=False)
    assert second.open_route() == route_id
    settle(lambda: house.service.ledger.is_ready)
    assert house.service.held == 1
    first.say(m.Closed(*slot))
    settle(lambda: house.service.held == 0)


def test_the_master_keeps_a_copy_until_the_server_is_gone(house):
    first = house.add_worker(1)
    route_id = first.open_route()
    first.want(route_id, 1)
    grant = first.hear(m.GrantOpen)
    first.open_server(grant)
    settle(lambda: [server.pid for server, _ in house.vault.values()] == [4711])
    first.say(m.Closed(route_id, grant.slot, grant.generation))
    settle(lambda: not house.vault)


def test_a_server_whose_worker_and_broker_died_is_cancelled_by_the_next_broker(house):
    first = house.add_worker(1)
    route_id = first.open_route()
    first.want(route_id, 1)
    grant = first.hear(m.GrantOpen)
    server, _ = first.open_server(grant)
    settle(lambda: [server.pid for server, _ in house.vault.values()] == [4711])
    server = server.dup()
    house.service.close()
    first.die()
    house.service = house.new_service()
    for name, (kept, fd) in house.vault.items():
        inherited = Inherited(kept.key, kept.endpoint, kept.pid, kept.secret_hex)
        house.service.inherit(name, inherited, os.dup(fd))
    house.service.serve(is_settled=False)
    settle(lambda: house.cancels)
    assert house.cancels == [(house.endpoint, 4711, bytes.fromhex("00c0ffee"))]
    assert server.recv(1) == b""
    assert (house.service.held, len(house.vault)) == (1, 1)
    server.close()
    settle(lambda: not house.vault)
    assert house.service.held == 0


def test_a_worker_that_breaks_the_protocol_is_reported_and_loses_its_slots_when_it_is_reaped(house):
    first, second = house.add_worker(1), house.add_worker(2)
    route_id = first.open_route()
    second.open_route()
    first.want(route_id, 1)
    first.hear(m.GrantOpen)
    first.say(m.Want(77, 1))
    settle(lambda: house.complaints)
    assert house.complaints[0][0] == first.id
    second.want(route_id, 1)
    gevent.sleep(0)
    house.service.detach(first.id)
    second.hear(m.GrantOpen)
    assert any("broke the protocol" in line for line in house.sink.lines)


@pytest.mark.parametrize(
    "message", [m.Hello(99, 1, 1, 1), m.Hello(m.PROTOCOL_VERSION, 1, 5, 5), m.Welcome(1, 1), m.Want(0, 1)]
)
def test_a_channel_must_begin_with_the_right_hello(house, message):
    ours, theirs = datagrams.pair()
    worker = m.WorkerId(1, 1)
    house.service.attach(worker, False, theirs)
    channel = Channel(ours, m.CODEC)
    channel.send(message)
    settle(lambda: house.complaints)
    assert house.complaints[0][0] == worker
    channel.close()


def test_descriptors_of_stale_messages_are_closed(house):
    worker = house.add_worker(1)
    route_id = worker.open_route()
    left, right = socket.socketpair()
    worker.say(m.Connected(route_id, 1, 99, "/s"), left)
    left.close()
    right.settimeout(5)
    assert gevent.get_hub().threadpool.apply(right.recv, (1,)) == b""
    right.close()
    assert house.service.held == 0
