"""The entrance of a worker alone: real sockets, and a handler that notes what it is told."""

import re
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import gpooler.client
from gpooler.client.entrance import ClientGone, Entrance, Guest
from gpooler.wire.messages import MAX_PASSWORD_MESSAGE_LENGTH
from gpooler.wire.startup import MAX_STARTUP_LENGTH, MIN_STARTUP_LENGTH
from tests.harness import eventually
from tests.harness.client import message

TIMEOUT_MS = 60_000
STARTUP = struct.pack("!ii", 20, 196608) + b"user\0me\0data"
PASSWORD = message(b"p", b"secret\0")


class Notes:
    """A handler: what it was told, and what each guest is to send next (``startup``, ``password``)."""

    def __init__(self, *expectations: str) -> None:
        self.told: list[tuple[str, object]] = []
        self._expectations = list(expectations)

    def on_startup(self, guest: Guest, packet: bytes) -> None:
        self.told.append(("startup", packet))
        self._go_on(guest)

    def on_password(self, guest: Guest, body: bytes) -> None:
        self.told.append(("password", body))
        self._go_on(guest)

    def on_handshake(self, guest: Guest, data: bytes) -> None:
        self.told.append(("handshake", data))

    def on_direct_tls(self, guest: Guest) -> None:
        self.on_bad(guest, True)

    def on_bad(self, guest: Guest, is_startup: bool) -> None:
        self.told.append(("bad", is_startup))

    def on_gone(self, guest: Guest, cause: str) -> None:
        self.told.append(("gone", cause))
        guest.close()

    def _go_on(self, guest: Guest) -> None:
        if self._expectations:
            if self._expectations.pop(0) == "startup":
                guest.expect_startup()
            else:
                guest.expect_password()


class Door:
    """An entrance with a listener, and clients that knock."""

    def __init__(self, stack: ExitStack, notes: Notes, listener: socket.socket, lingers: bool) -> None:
        self.notes = notes
        self.entrance = Entrance(notes)
        self._stack, self._listener, self._lingers = stack, stack.enter_context(listener), lingers
        self._guests: list[Guest] = []
        stack.callback(self._leave)

    def knock(self, timeout_ms: int = TIMEOUT_MS) -> tuple[socket.socket, Guest]:
        client = self._stack.enter_context(socket.socket(self._listener.family))
        client.settimeout(5)
        client.connect(self._listener.getsockname())
        guest = self.entrance.accept(self._listener.fileno(), 0, timeout_ms, self._lingers)
        assert guest is not None
        self._guests.append(guest)
        guest.resume()
        return client, guest

    def nobody(self) -> None:
        assert self.entrance.accept(self._listener.fileno(), 0, TIMEOUT_MS, False) is None

    def hear(self) -> None:
        """Take in what arrives, at least something."""
        assert select.select([self.entrance.fd], [], [], 5)[0]
        self.entrance.poll()

    def _leave(self) -> None:
        for guest in self._guests:
            guest.close()
        assert len(self.entrance) == 0
        socket.close(self.entrance.fd)


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Callable[..., Door]]:
    with ExitStack() as stack:

        def make(*expectations: str, family: int = socket.AF_INET, lingers: bool = False) -> Door:
            address: object = ("::1" if family == socket.AF_INET6 else "127.0.0.1", 0)
            if family == socket.AF_UNIX:
                address = str(tmp_path / "door")
            listener = socket.socket(family)
            listener.bind(address)
            listener.listen()
            listener.setblocking(False)
            return Door(stack, Notes(*expectations), listener, lingers)

        yield make


Make = Callable[..., Door]


def test_limits_are_those_of_the_wire() -> None:
    text = (Path(gpooler.client.__path__[0]) / "entrance.pyx").read_text(encoding="utf-8")
    numbers = {name: int(value) for name, value in re.findall(r"^    (M\w+) = (\d+)$", text, re.MULTILINE)}
    assert numbers["MIN_STARTUP"] == MIN_STARTUP_LENGTH
    assert numbers["MAX_STARTUP"] == MAX_STARTUP_LENGTH
    assert numbers["MAX_PASSWORD"] == MAX_PASSWORD_MESSAGE_LENGTH


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
def test_a_guest_knows_where_it_comes_from(door: Make, family: int) -> None:
    one = door(family=family)
    client, guest = one.knock()
    if family == socket.AF_UNIX:
        assert (guest.family, guest.host, guest.address, guest.port) == (0, "local", b"", 0)
    else:
        host, port = client.getsockname()[:2]
        assert (guest.family, guest.host, guest.port) == (4 if family == socket.AF_INET else 6, host, port)
        assert guest.address == socket.inet_pton(family, host)
    assert guest.timeout_ms == TIMEOUT_MS
    assert 0 <= guest.number < 1 << 48
    one.nobody()


def test_a_mistake_with_one_guest_is_not_felt_by_others(door: Make) -> None:
    """Both have spoken before anybody looks."""
    one = door("startup")
    (bad, first), (good, second) = one.knock(), one.knock()
    surprised: list[Guest] = []

    def stumble(guest: Guest, packet: bytes) -> None:
        if guest is first:
            raise LookupError("a mistake")
        one.notes.told.append(("startup", packet))

    one.notes.on_startup = stumble  # type: ignore[method-assign]
    one.notes.on_surprise = surprised.append  # type: ignore[attr-defined]
    bad.sendall(STARTUP)
    good.sendall(STARTUP)
    while len(one.notes.told) < 1 or not surprised:
        one.hear()
    assert surprised == [first]
    assert one.notes.told == [("startup", STARTUP[4:])]
    assert second.fd >= 0


def test_messages_are_handed_over_whole_however_they_are_cut(door: Make) -> None:
    whole = STARTUP + STARTUP + PASSWORD
    for size in (1, 3, 7, len(STARTUP), len(STARTUP) + 1, len(whole)):
        one = door("startup", "password")
        client, guest = one.knock()
        for at in range(0, len(whole), size):
            client.sendall(whole[at : at + size])
            one.hear()
        assert one.notes.told == [
            ("startup", STARTUP[4:]),
            ("startup", STARTUP[4:]),
            ("password", b"secret\0"),
        ]
        assert guest.buffer == b""


def test_what_comes_behind_the_last_message_is_kept(door: Make) -> None:
    one = door("password")
    client, guest = one.knock()
    client.sendall(STARTUP + PASSWORD + b"Q\0\0\0\5\0more")
    one.hear()
    assert guest.buffer == b"Q\0\0\0\5\0more"
    # nothing is expected, so nothing is read
    client.sendall(b"and more")
    assert not select.select([one.entrance.fd], [], [], 0.05)[0]
    assert guest.buffer == b"Q\0\0\0\5\0more"


def test_an_answer_from_elsewhere_goes_on_with_what_is_there_already(door: Make) -> None:
    one = door()
    client, guest = one.knock()
    client.sendall(STARTUP + PASSWORD)
    one.hear()
    assert one.notes.told == [("startup", STARTUP[4:])]
    guest.expect_password()
    guest.resume()
    assert one.notes.told[1:] == [("password", b"secret\0")]


@pytest.mark.parametrize("length", [-1, 0, 4, MIN_STARTUP_LENGTH - 1, MAX_STARTUP_LENGTH + 1, 2**31 - 1])
def test_a_startup_packet_of_a_bad_length_is_refused_at_its_length(door: Make, length: int) -> None:
    one = door()
    client, _ = one.knock()
    client.sendall(struct.pack("!i", length))
    one.hear()
    assert one.notes.told == [("bad", True)]


def test_the_longest_startup_packet_and_password_are_taken(door: Make) -> None:
    one = door("password")
    client, _ = one.knock()
    packet = struct.pack("!i", MAX_STARTUP_LENGTH) + b"x" * (MAX_STARTUP_LENGTH - 4)
    body = b"y" * (MAX_PASSWORD_MESSAGE_LENGTH - 4)
    client.sendall(packet + message(b"p", body))
    eventually(lambda: one.entrance.poll() or len(one.notes.told) == 2)
    assert one.notes.told == [("startup", packet[4:]), ("password", body)]


@pytest.mark.parametrize(
    "data",
    [
        b"Q",
        b"p" + struct.pack("!i", 3),
        b"p" + struct.pack("!i", -1),
        b"p" + struct.pack("!i", MAX_PASSWORD_MESSAGE_LENGTH + 1),
        STARTUP,
    ],
)
def test_what_is_no_password_message_is_refused(door: Make, data: bytes) -> None:
    one = door("password")
    client, _ = one.knock()
    client.sendall(STARTUP)
    one.hear()
    client.sendall(data)
    one.hear()
    assert one.notes.told[1:] == [("bad", False)]


def test_a_client_that_closes_or_resets_is_gone(door: Make) -> None:
    one = door()
    for way in ("close", "reset", "half a packet"):
        client, guest = one.knock()
        if way == "half a packet":
            client.sendall(STARTUP[:10])
            one.hear()
        elif way == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        one.hear()
        assert guest.fd == -1
    assert one.notes.told == [("gone", "closed"), ("gone", "Connection reset by peer"), ("gone", "closed")]
    assert len(one.entrance) == 0


def test_send_reaches_the_client_and_fails_when_nobody_reads(door: Make) -> None:
    one = door(family=socket.AF_UNIX)
    client, guest = one.knock()
    guest.send(b"hello")
    assert client.recv(5) == b"hello"
    with pytest.raises(ClientGone, match="does not read"):
        guest.send(b"x" * (16 << 20))
    client.close()
    with pytest.raises(ClientGone, match="Broken pipe"):
        guest.send(b"hello")
    guest.close()
    with pytest.raises(ClientGone, match="closed"):
        guest.send(b"hello")


def test_a_detached_descriptor_is_the_callers(door: Make) -> None:
    one = door()
    client, guest = one.knock()
    client.sendall(STARTUP)
    one.hear()
    with socket.socket(fileno=guest.detach()) as taken:
        assert guest.fd == -1
        assert len(one.entrance) == 0
        guest.close()  # nothing: it is not its own any more
        taken.sendall(b"still open")
        assert client.recv(100) == b"still open"
        # and the entrance does not hear of it
        client.sendall(PASSWORD)
        assert not select.select([one.entrance.fd], [], [], 0.05)[0]


def test_guests_expire_in_the_order_of_their_own_timeouts(door: Make) -> None:
    one = door()
    _, late = one.knock(600_000)
    _, soon = one.knock(100_000)
    _, gone = one.knock(100_000)
    _, next_one = one.knock(200_000)
    for guest in (late, soon, gone, next_one):
        one.entrance.look(guest)
    gone.close()
    assert one.entrance.expired(0) == []
    assert one.entrance.expired(150_000_000) == [soon]
    assert one.entrance.expired(150_000_000) == []  # told once
    assert one.entrance.expired(300_000_000) == [next_one]
    assert one.entrance.expired(601_000_000) == [late]
    assert len(one.entrance) == 3  # whoever is told of them closes them


@pytest.mark.parametrize("lingers", [True, False])
def test_with_linger_a_close_resets_the_connection(door: Make, lingers: bool) -> None:
    one = door(lingers=lingers)
    client, guest = one.knock()
    guest.close()
    if lingers:
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    else:
        assert client.recv(1) == b""
