"""The relay alone: what it makes of Python's commands, with clients and servers played by the test."""

import select
import socket
import threading

import pytest

from gpooler.relay.events import ClientEvent, RouteEvent, ServerEvent
from gpooler.relay.params import ParameterSet
from gpooler.relay.relay import Relay
from gpooler.stats.registry import ProcessWord, RouteWord
from gpooler.stats.shared import SharedCounters
from tests.harness import eventually
from tests.harness.client import message, query

ROUTE = 0
READY = b"Z\0\0\0\5I"
ANSWER = b"C\0\0\0\5\0" + READY


class House:
    """A running relay with one transaction route."""

    def __init__(self, log_query=False, **limits):
        self.counters = SharedCounters.create()
        self.relay = Relay(self.counters.address, 1, True, bytes(16))
        self.thread = threading.Thread(target=self.relay.run)
        self.thread.start()
        limits = {"idle_timeout_s": 0, "idle_in_transaction_s": 0, **limits}
        self.relay.open_route(
            ROUTE, mode=1, discard=None, can_cancel=True, can_rollback=True, attach_check=True,
            maintain_params=True, adds_host=False, defers_begin=False, has_prepared=True, max_copies=500,
            max_names_bytes=1_000_000,
            session_state=0, pin_on_listen=False, state_check=1, log_query=log_query, log_slow_ms=0,
            pool_timeout_ms=0, pool_ttl_s=0, reset_timeout_ms=1000, login_timeout_ms=1000, keep=0,
            discard_query=b"DISCARD ALL", keeps_copies=False, resets_parameters=True,
            drops_old_plans=False, query_timeout_s=0,
            transaction_timeout_s=0, notice_after_ms=-1, notices=(b"", b"", b""),
            virtual_answers=(), **limits,
        )  # fmt: skip
        self.nothing = ParameterSet.of({}, True)
        self.sockets = []
        self.events = []

    def close(self):
        self.relay.stop()
        self.thread.join()
        for sock in self.sockets:
            sock.close()
        self.counters.close()

    def pair(self):
        ours, theirs = socket.socketpair()
        ours.settimeout(5)
        theirs.setblocking(False)
        self.sockets.append(ours)
        return ours, theirs

    def client(self, room=None):
        ours, theirs = self.pair()
        if room:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
        self.relay.adopt_client(
            theirs.detach(), ROUTE, 1, self.nothing, secret=b"0123", address=b"", family=0, port=0, names=0,
            needs_setup=False, pending=b"",
        )  # fmt: skip
        eventually(lambda: self.count(RouteWord.CLIENTS))
        return ours

    def server(self, said=b"", is_dead=False):
        ours, theirs = self.pair()
        self.sockets.append(theirs)
        ours.sendall(said)
        if is_dead:
            ours.close()
        handle = self.relay.adopt_server(
            theirs.fileno(), ROUTE, 1, self.nothing, self.nothing, pid=1, secret=b"0123", slot=1,
            generation=1, opened_us=1, expires_us=0, uses=0, is_unix=True, is_new=True,
        )  # fmt: skip
        return ours, handle

    def count(self, word):
        return self.counters.route(ROUTE, word)

    def poll(self):
        self.events += self.relay.poll()
        return self.events

    def reply(self, token):
        return eventually(lambda: [what for kind, of, what in self.poll() if kind == "=" and of == token])[0]

    def bits(self, kind):
        return [what for each, _, what in self.poll() if each == kind]


@pytest.fixture
def house():
    house = House()
    yield house
    house.close()


def let_the_relay_look(house):
    """Sweeps pass, about one a second, which is when an idle relay wakes."""
    beats = house.counters.process(ProcessWord.RELAY_BEAT)
    eventually(lambda: house.counters.process(ProcessWord.RELAY_BEAT) >= beats + 2)


def wait_in_vain(house):
    """A client asks, waits and goes."""
    client = house.client()
    client.sendall(query("SELECT 1"))
    eventually(lambda: house.count(RouteWord.CLIENTS_WAITING))
    client.close()
    eventually(lambda: not house.count(RouteWord.CLIENTS))


def test_a_queue_that_came_and_went_unseen_is_calm(house):
    wait_in_vain(house)
    let_the_relay_look(house)
    assert house.bits("r") == [RouteEvent.CALM]


def test_demand_after_an_unseen_calm_is_demand(house):
    client = house.client()
    client.sendall(query("SELECT 1"))
    assert eventually(lambda: house.bits("r")) == [RouteEvent.DEMAND]
    house.events.clear()
    client.close()
    eventually(lambda: not house.count(RouteWord.CLIENTS))
    let_the_relay_look(house)
    client = house.client()
    client.sendall(query("SELECT 1"))
    eventually(lambda: house.count(RouteWord.CLIENTS_WAITING))
    assert house.bits("r") == [RouteEvent.DEMAND]


def test_what_was_promised_to_a_dead_broker_is_kept(house):
    client = house.client()
    server, handle = house.server()
    eventually(lambda: house.count(RouteWord.SERVERS_IDLE))
    client.sendall(query("SELECT 1"))
    assert server.recv(100) == query("SELECT 1")
    assert house.reply(house.relay.recall(ROUTE, 1, False))[:2] == (0, 1)
    house.relay.forget_recalls()
    house.reply(house.relay.drop_idle(0))  # commands are done in order
    server.sendall(ANSWER)
    assert client.recv(100) == ANSWER
    eventually(lambda: house.count(RouteWord.SERVERS_IDLE))
    assert not house.bits("s")
    # a new recall counts for itself
    assert house.reply(house.relay.recall(ROUTE, 1, False))[:2] == (1, 0)
    assert eventually(lambda: house.bits("s")) == [ServerEvent.RELEASED]
    house.relay.free_server(handle)


def test_a_server_that_died_on_its_way_is_given_to_nobody(house):
    client = house.client()
    client.sendall(query("SELECT 1"))
    eventually(lambda: house.count(RouteWord.CLIENTS_WAITING))
    house.server(is_dead=True)
    assert eventually(lambda: house.bits("s")) == [ServerEvent.CLOSED]
    assert house.count(RouteWord.CLIENTS_WAITING) == 1
    server, _ = house.server()
    assert server.recv(100) == query("SELECT 1")
    server.sendall(ANSWER)
    assert client.recv(100) == ANSWER


def test_a_server_that_said_something_on_its_way_serves(house):
    client = house.client()
    client.sendall(query("SELECT 1"))
    eventually(lambda: house.count(RouteWord.CLIENTS_WAITING))
    server, _ = house.server(message(b"N", b"\0") + message(b"S", b"TimeZone\0UTC\0"))
    assert server.recv(100) == query("SELECT 1")
    server.sendall(ANSWER)
    assert client.recv(100) == ANSWER


def test_no_reply_stays_behind_without_a_wake_up(house):
    """A reply that is put while Python takes others wakes it again."""
    for number in range(50_000):
        due = {house.relay.drop_idle(0) for _ in range(1 + number % 4)}
        while due:
            assert select.select([house.relay.event_fd], [], [], 5)[0], number
            due -= {token for _, token, _ in house.relay.poll()}


def test_query_texts_nobody_takes_are_counted_and_those_before_them_are_whole():
    house = House(log_query=True)
    try:
        client = house.client()
        server, _ = house.server()
        texts = [b"SELECT %04d %s\0" % (number, b"x" * 3000) for number in range(1000)]  # as a Query has them
        for text in texts:
            client.sendall(message(b"Q", text))
            asked = b""
            while len(asked) < 5 + len(text):
                asked += server.recv(65536)
            server.sendall(ANSWER)
            assert client.recv(100) == ANSWER
        lost = house.counters.process(ProcessWord.TEXT_EVENTS_LOST)
        kept = [text for _, text, _ in house.relay.texts()]
        assert kept == texts[: len(kept)]
        assert 0 < len(kept) < len(texts) == len(kept) + lost
        # there is room again
        client.sendall(query("SELECT 1"))
        assert server.recv(100) == query("SELECT 1")
        assert [text for _, text, _ in house.relay.texts()] == [b"SELECT 1\0"]
        assert house.counters.process(ProcessWord.TEXT_EVENTS_LOST) == lost
    finally:
        house.close()


@pytest.mark.parametrize("size", [1_000, 100_000], ids=["in the kernel", "in the relay too"])
@pytest.mark.parametrize(
    ("limit", "status"), [("idle_timeout_s", b"I"), ("idle_in_transaction_s", b"T")], ids=["I", "T"]
)
def test_who_has_not_read_its_answer_yet_is_not_idle(limit, status, size):
    house = House(**{limit: 1})
    try:
        client = house.client(room=4096)
        server, _ = house.server()
        client.sendall(query("SELECT 1"))
        assert server.recv(1000) == query("SELECT 1")
        answer = message(b"D", b"x" * size) + b"C\0\0\0\5\0" + b"Z\0\0\0\5" + status
        server.sendall(answer)
        for _ in range(2):
            let_the_relay_look(house)
        assert house.bits("c") == []
        got = b""
        while len(got) < len(answer):
            got += client.recv(65536)
        assert got == answer
        assert eventually(lambda: house.bits("c")) == [ClientEvent.TEXT_WANTED]
        if status == b"T":
            assert server.recv(1000) == query("ROLLBACK")
    finally:
        house.close()
