"""The short way in: real sockets, a handler that notes what is left to it, a relay that takes descriptors."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gpooler.auth import md5
from gpooler.auth.exchange import Done, Stored
from gpooler.auth.scram import MECHANISM, ScramClient, ScramKeys, Verifier, derive_keys
from gpooler.auth.scram_server import prepare
from gpooler.client.entrance import Entrance, Guest
from gpooler.client.express import Express
from gpooler.client.login import Login
from gpooler.client.plan import Plan
from gpooler.errors import GpoolerError
from gpooler.relay.params import ParameterSet
from gpooler.relay.relay import Relay
from gpooler.stats.registry import ProcessWord, RouteWord
from gpooler.stats.shared import SharedCounters
from gpooler.wire import messages
from tests.harness.client import message, startup

USER, SECRET, ROUTE = b"joe", b"s3cret", 3
PACKET = startup("joe", "app")
STORED = (md5.hash_password(SECRET, USER),)
STATUSES = messages.parameter_status("TimeZone", "UTC")
PID = 0x40000001


class House:
    """A handler, a relay and what stands between them."""

    def __init__(self, stack: ExitStack) -> None:
        self.demanding: set[int] = set()
        self.told: list[tuple[str, object]] = []
        self.adopted: list[dict[str, Any]] = []
        self.logged_in: list[int] = []
        self.counters = SharedCounters.create()
        stack.callback(self.counters.close)
        self.past = SharedCounters.create()
        stack.callback(self.past.close)
        self.learned: list[ScramKeys | None] = []
        self.route = SimpleNamespace(
            route_id=ROUTE, version=1, learn=lambda secret, keys: self.learned.append(keys)
        )
        self.plan = cast(
            Plan,
            SimpleNamespace(
                data=PACKET[4:],
                route=self.route,
                version=1,
                names=7,
                packet=SimpleNamespace(user="joe", database="app", secret_length=4),
                greeting=SimpleNamespace(parameters=ParameterSet.of({}, False), statuses=STATUSES),
            ),
        )
        self.express = Express(
            cast(Relay, self),
            self.counters.address,
            self.past.address + ProcessWord.SOFT_OOM_SHORT * 8,
            cast(Login, self),
            lambda handle, guest, setup: self.logged_in.append(guest.number),
        )
        self.entrance = Entrance(self.express)
        stack.callback(os.close, self.entrance.fd)
        self._stack = stack
        self._listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self._listener.setblocking(False)

    def knock(self, packet: bytes = PACKET) -> tuple[socket.socket, Guest]:
        """A client that has sent its startup packet, which has been read."""
        client = self._stack.enter_context(socket.create_connection(self._listener.getsockname(), 5))
        client.sendall(packet)
        guest = self.entrance.accept(self._listener.fileno(), 0, 60_000, False)
        assert guest is not None
        self._stack.callback(guest.close)
        self.entrance.read(guest)
        return client, guest

    def remember(
        self, guest: Guest, stored: Stored, is_bound: bool = False, *, is_learned_from: bool = False
    ) -> None:
        self.express.remember(guest, self.plan, stored, is_learned_from, is_bound, ())

    def counted(self) -> tuple[int, int, int, int]:
        """Clients, logins, clients admitted to the route, its logins."""
        return (
            self.counters.process(ProcessWord.CLIENTS),
            self.counters.process(ProcessWord.LOGINS),
            self.counters.route(ROUTE, RouteWord.CLIENTS_ADMITTED),
            self.counters.route(ROUTE, RouteWord.LOGINS),
        )

    # as a handler

    def on_startup(self, guest: Guest, packet: bytes) -> None:
        self.told.append(("startup", packet))

    def on_password(self, guest: Guest, body: bytes) -> None:
        self.told.append(("password", body))

    def on_mismatch(self, guest: Guest, body: bytes) -> None:
        self.told.append(("mismatch", body))

    def on_proved(self, guest: Guest, done: Done) -> None:
        self.told.append(("proved", guest.who.user))

    def on_refused(self, guest: Guest, error: GpoolerError) -> None:
        self.told.append(("refused", error.sqlstate))

    def on_handshake(self, guest: Guest, data: bytes) -> None:
        self.told.append(("handshake", data))

    def on_direct_tls(self, guest: Guest) -> None:
        self.on_bad(guest, True)

    def on_bad(self, guest: Guest, is_startup: bool) -> None:
        self.told.append(("bad", is_startup))

    def on_surprise(self, guest: Guest) -> None:
        raise AssertionError("a mistake")

    def on_gone(self, guest: Guest, cause: str) -> None:
        self.told.append(("gone", cause))
        guest.close()

    # as a relay

    def reserve_pid(self) -> int:
        return PID

    def adopt_client(self, fd: int, route_id: int, client_id: int, parameters: object, **rest: Any) -> int:
        self._stack.callback(os.close, fd)
        self.adopted.append({"route": route_id, "id": client_id, **rest})
        return len(self.adopted)


@pytest.fixture
def house() -> Iterator[House]:
    with ExitStack() as stack:
        yield House(stack)


def answer(salt: bytes, secret: bytes = SECRET) -> bytes:
    return md5.response(md5.hash_password(secret, USER), salt) + b"\0"


def test_a_stranger_is_the_handler_s(house: House) -> None:
    house.knock()
    assert house.told == [("startup", PACKET[4:])]
    assert house.counted() == (0, 0, 0, 0)


def test_who_begins_like_another_is_only_asked_for_the_password(house: House) -> None:
    _, first = house.knock()
    house.remember(first, STORED)
    client, guest = house.knock()
    challenge = client.recv(100)
    assert challenge[:9] == messages.authentication_md5_password(b"1234")[:9]
    assert house.counted() == (1, 0, 0, 0)
    client.sendall(message(b"p", answer(challenge[9:])) + b"the next")
    house.entrance.poll()
    (adopted,) = house.adopted
    greeting = messages.authentication_ok() + STATUSES
    greeting += messages.backend_key_data(PID, adopted["secret"]) + messages.ready_for_query()
    assert client.recv(1000) == greeting
    assert adopted == {
        "route": ROUTE, "id": guest.number, "secret": adopted["secret"], "family": 4,
        "address": b"\x7f\0\0\1",
        "port": client.getsockname()[1],
        "names": 7, "needs_setup": False, "pending": b"the next", "tls": None, "has_more": False,
    }  # fmt: skip
    assert len(adopted["secret"]) == 4
    assert house.logged_in == [guest.number]
    assert (guest.who.user, guest.who.database, guest.fd) == ("joe", "app", -1)
    assert house.counted() == (1, 1, 1, 1)
    assert len(house.told) == 1


def test_each_is_asked_with_a_salt_of_its_own(house: House) -> None:
    _, first = house.knock()
    house.remember(first, STORED)
    salts = {house.knock()[0].recv(100)[9:] for _ in range(50)}
    assert len(salts) == 50


@pytest.mark.parametrize(
    "body",
    [b"", b"\0", b"md5" + b"0" * 32 + b"\0", answer(b"1234"), answer(b"1234")[:-1], b"s3cret\0", b"x" * 36],
)
def test_what_does_not_fit_is_the_handler_s_to_refuse(house: House, body: bytes) -> None:
    _, first = house.knock()
    house.remember(first, STORED)
    client, guest = house.knock()
    client.recv(100)
    client.sendall(message(b"p", body))
    house.entrance.poll()
    assert house.told[1:] == [("mismatch", body)]
    assert house.adopted == []
    assert guest.is_counted  # the handler gives it back


def test_an_answer_to_another_s_salt_does_not_fit(house: House) -> None:
    _, first = house.knock()
    house.remember(first, STORED)
    one, _ = house.knock()
    two, _ = house.knock()
    salt = one.recv(100)[9:]
    two.recv(100)
    two.sendall(message(b"p", answer(salt)))
    house.entrance.poll()
    assert [kind for kind, _ in house.told] == ["startup", "mismatch"]


def test_without_a_password_nobody_is_asked(house: House) -> None:
    _, first = house.knock()
    house.remember(first, None)
    client, _ = house.knock()
    assert client.recv(1000).startswith(messages.authentication_ok() + STATUSES)
    assert house.counted() == (1, 1, 1, 1)


def test_new_parameters_of_the_route_end_the_short_way(house: House) -> None:
    _, first = house.knock()
    house.remember(first, STORED)
    client, _ = house.knock()
    salt = client.recv(100)[9:]
    house.route.version = 2  # between the challenge and its answer
    client.sendall(message(b"p", answer(salt)))
    house.entrance.poll()
    house.knock()
    assert house.told[1:] == [("proved", "joe"), ("startup", PACKET[4:])]


def test_what_was_forgotten_is_the_handler_s(house: House) -> None:
    _, first = house.knock()
    house.remember(first, STORED)
    house.express.forget()
    house.knock()
    assert len(house.told) == 2


def test_rules_for_addresses_hold(house: House) -> None:
    _, first = house.knock()
    house.remember(first, STORED, is_bound=True)
    near, _ = house.knock()
    assert near.recv(100)[:1] == b"R"
    far = house._stack.enter_context(socket.socket())
    far.bind(("127.0.0.2", 0))
    far.connect(house._listener.getsockname())
    far.sendall(PACKET)
    guest = house.entrance.accept(house._listener.fileno(), 0, 60_000, False)
    assert guest is not None
    house._stack.callback(guest.close)
    house.entrance.read(guest)
    assert guest.host == "127.0.0.2"
    assert len(house.told) == 2


def test_who_leaves_before_the_greeting_is_told_and_not_counted_on_the_route(house: House) -> None:
    _, first = house.knock()
    house.remember(first, None)
    client = socket.create_connection(house._listener.getsockname(), 5)
    client.sendall(PACKET)
    guest = house.entrance.accept(house._listener.fileno(), 0, 60_000, False)
    assert guest is not None
    # a socket that takes nothing more: what is sent does not leave
    os.dup2(socket.socket().detach(), guest.fd)
    house.express.on_startup(guest, PACKET[4:])
    client.close()
    assert [kind for kind, _ in house.told] == ["startup", "gone"]
    assert house.counted()[1:] == (0, 0, 0)


VERIFIER = Verifier.build(SECRET, b"0123456789abcdef", 1)
OTHERS = Verifier.build(b"another", b"0123456789abcdef", 1)


def prove(house: House, client: socket.socket, secret: bytes = SECRET) -> ScramClient:
    """The client's side of an exchange, its last message sent and not yet read."""
    side = ScramClient()
    assert client.recv(1000) == messages.authentication_sasl([MECHANISM])
    client.sendall(messages.sasl_initial_response(MECHANISM, side.first()))
    house.entrance.poll()
    challenge = side.challenge(client.recv(1000)[9:])
    keys = derive_keys(secret, challenge.salt, challenge.iterations)
    client.sendall(messages.sasl_response(side.final(challenge, keys)))
    return side


@pytest.mark.parametrize("secret", [SECRET, b"another"])
def test_scram_proves_and_is_proved_to(house: House, secret: bytes) -> None:
    _, first = house.knock()
    house.remember(first, prepare([OTHERS, VERIFIER]), is_learned_from=True)
    client, guest = house.knock()
    side = prove(house, client, secret)
    house.entrance.poll()
    (adopted,) = house.adopted
    signature, ok, greeting = client.recv(1000).partition(messages.authentication_ok())
    side.verify(signature[9:])
    assert ok + greeting == (
        messages.authentication_ok()
        + STATUSES
        + messages.backend_key_data(PID, adopted["secret"])
        + messages.ready_for_query()
    )
    assert (house.logged_in, house.counted()) == ([guest.number], (1, 1, 1, 1))
    assert house.learned == [derive_keys(secret, b"0123456789abcdef", 1)]
    assert len(house.told) == 1


def test_keys_are_learned_only_where_they_are_wanted(house: House) -> None:
    _, first = house.knock()
    house.remember(first, prepare([VERIFIER]))
    client, _ = house.knock()
    prove(house, client)
    house.entrance.poll()
    assert (len(house.adopted), house.learned) == (1, [])


def test_a_wrong_proof_is_the_handler_s_to_refuse(house: House) -> None:
    _, first = house.knock()
    house.remember(first, prepare([VERIFIER]), is_learned_from=True)
    client, guest = house.knock()
    prove(house, client, b"wrong")
    house.entrance.poll()
    assert house.told[1:] == [("refused", "28P01")]
    assert (house.adopted, house.learned, guest.is_counted) == ([], [], True)


def test_new_parameters_of_the_route_end_the_short_way_of_scram(house: House) -> None:
    _, first = house.knock()
    house.remember(first, prepare([VERIFIER]))
    client, _ = house.knock()
    prove(house, client)
    house.route.version = 2
    house.entrance.poll()
    assert house.told[1:] == [("proved", "joe")]


@pytest.mark.parametrize("stored", [None, STORED, prepare([VERIFIER])])
def test_while_memory_is_short_nobody_takes_the_short_way(house: House, stored: Stored) -> None:
    _, first = house.knock()
    house.remember(first, stored)
    house.past.set_process(ProcessWord.SOFT_OOM_SHORT, 1)
    house.knock()
    assert house.told == [("startup", PACKET[4:])] * 2
    house.past.set_process(ProcessWord.SOFT_OOM_SHORT, 0)
    house.knock()
    assert len(house.told) == 2


def test_memory_that_is_short_when_the_password_comes_ends_the_short_way(house: House) -> None:
    _, first = house.knock()
    house.remember(first, STORED)
    client, _ = house.knock()
    salt = client.recv(100)[9:]
    house.past.set_process(ProcessWord.SOFT_OOM_SHORT, 1)
    client.sendall(message(b"p", answer(salt)))
    house.entrance.poll()
    assert house.told[1:] == [("proved", "joe")]


def test_memory_that_is_short_when_a_proof_comes_ends_the_short_way(house: House) -> None:
    _, first = house.knock()
    house.remember(first, prepare([VERIFIER]))
    client, _ = house.knock()
    prove(house, client)
    house.past.set_process(ProcessWord.SOFT_OOM_SHORT, 1)
    house.entrance.poll()
    assert house.told[1:] == [("proved", "joe")]
