"""TLS 1.3's records from a client that has the keys and sends what it likes, beside a model in Python.

An input is acts: records right and wrong, cut anywhere, read in pieces, with writing in between. What comes
out, how it ends and what is sent back must be what the model of RFC 8446 says.
"""

import zlib

from tests.fuzz.given import Given, gives_memory_back
from tests.harness.records import ALERT, DATA, HANDSHAKE, HEADER, SUITES, TAG, Peer, prepare

RECORD = 16384
MOST_INNER = RECORD + 256 - TAG
MOST_QUIET = 32
KEY_UPDATE = 24
MEASURED = 64  # of so many inputs one is looked at for memory
PATTERN = bytes(range(251)) * 70
SMALL = (0, 1, 2, 5, 17, 100, 1023, 1024, 1025)
LARGE = (*SMALL, RECORD - 1, RECORD, RECORD + 1)
MOST_LARGE = 8
ROOMS = (RECORD, 1, 3, 1024, RECORD - 1)
CONTENTS = (DATA, DATA, DATA, HANDSHAKE, HANDSHAKE, ALERT, 20, 0)
MESSAGES = (b"\x18\0\0\1\0", b"\x18\0\0\1\1", b"\x18\0\0\1\2", b"\x18\0\0\2\0", b"\4\0\0\1\0")
ALERTS = (b"\1\x5a", b"\1\0", b"\2\0", b"\2\x14", b"\1", b"\1\0\0")

prepare()


class Model:
    """What a client's records mean."""

    def __init__(self) -> None:
        self.received = b""
        self.is_ended = False
        self.alert: int | None = None  # that is to be sent; -1: broken, and none
        self.owes_update = False
        self._quiet = 0
        self._message = b""

    @property
    def is_over(self) -> bool:
        """Nothing is heard any more."""
        return self.is_ended or self.alert is not None

    def new_bytes(self) -> None:
        """The count of records without bytes is one of a read."""
        self._quiet = 0

    def hear(self, inner: bytes) -> bool:
        """A genuine record; whether the client's keys are new behind it."""
        if self.is_over:
            return False
        inner = inner.rstrip(b"\0")
        if not inner:
            return self._fail(10)
        content, data = inner[-1], inner[:-1]
        if len(data) > RECORD:
            return self._fail(22)
        if self._message and content != HANDSHAKE:
            return self._fail(10)
        if content == DATA and data:
            self.received += data
            return False
        self._quiet += 1
        if self._quiet > MOST_QUIET:
            return self._fail(10)
        if content == DATA:
            return False
        if content == HANDSHAKE and data:
            return self._hear_message(data)
        if content != ALERT or not data:
            return self._fail(10)
        if len(data) != 2:
            return self._fail(50)
        if data[1] == 0:
            self.is_ended = True
        elif data[1] != 90:
            return self._fail(-1)
        return False

    def _hear_message(self, data: bytes) -> bool:
        self._message += data
        if len(self._message) > 5 or self._message[0] != KEY_UPDATE:
            return self._fail(10)
        if len(self._message) < 5:
            return False
        message, self._message = self._message, b""
        if message[1:4] != b"\0\0\1":
            return self._fail(50)
        if message[4] > 1:
            return self._fail(47)
        self.owes_update |= message[4] == 1
        return True

    def _fail(self, alert: int) -> bool:
        self.alert = alert
        return False


class Meeting:
    """The two ends."""

    def __init__(self, data: bytes) -> None:
        self._given = Given(data)
        self._peer = Peer(self._given.choice(tuple(SUITES)))
        self._room = self._given.choice(ROOMS)
        self._model = Model()
        self._sender = Model()  # says when the client has new keys: of all it sent, not of what arrived
        self._wire = bytearray()  # sent, and not delivered
        self._inners: list[tuple[int, bytes]] = []  # of records on their way: where they end, what is in them
        self._sent = self._delivered = 0
        self._received = bytearray()
        self._is_closed = self._is_broken = False
        self._has_told = False  # the alert
        self._large = 0

    def run(self) -> None:
        """All acts, and what is still on its way."""
        while self._given and not self._is_broken:
            self._act()
        self._deliver(len(self._wire))
        self._read()
        assert self._received == self._model.received
        assert self._is_broken == (self._model.alert is not None)

    def _act(self) -> None:
        given = self._given
        what = given.byte() % 8
        if what < 3:
            self._seal(self._content() + bytes(given.byte() % 64 if what else 0))
        elif what == 3:
            self._deliver(given.byte())
        elif what == 4:
            self._deliver(len(self._wire))
        elif what == 5:
            self._read()
        elif what == 6:
            self._write(PATTERN[: self._size() + given.byte() + 1])
        else:
            self._peer.session.close()
            self._take(b"", is_closing=True)

    def _size(self) -> int:
        """Few of them large, as time goes with bytes."""
        size = self._given.choice(SMALL if self._large == MOST_LARGE or self._room < SMALL[-1] else LARGE)
        self._large += size > SMALL[-1]
        return size

    def _content(self) -> bytes:
        given = self._given
        content = given.choice(CONTENTS)
        if content == HANDSHAKE:
            data = given.choice(MESSAGES)
            cut = given.byte()
            data = data[cut & 7 :][: cut >> 4 or 5]
        elif content == ALERT:
            data = given.choice(ALERTS)
        else:
            data = PATTERN[: self._size()]
        return data + bytes([content])

    def _seal(self, inner: bytes) -> None:
        inner = inner[:MOST_INNER]
        self._wire += self._peer.out.seal_inner(inner)
        self._sent += HEADER + len(inner) + TAG
        self._inners.append((self._sent, inner))
        self._sender.new_bytes()
        if self._sender.hear(inner):
            self._peer.out.renew()

    def _deliver(self, count: int) -> None:
        data = bytes(self._wire[:count])
        del self._wire[:count]
        if not data:
            return
        self._peer.send(data)
        self._delivered += len(data)
        self._model.new_bytes()
        self._read()

    def _read(self) -> None:
        while self._inners and self._inners[0][0] <= self._delivered:
            self._model.hear(self._inners.pop(0)[1])
        try:
            while part := self._peer.session.read(self._room):
                self._received += part
            assert (part is None) == self._model.is_ended
        except ConnectionError:
            self._is_broken = True
        self._take(b"")

    def _write(self, data: bytes) -> None:
        try:
            self._peer.session.write(data)
        except ConnectionError:
            assert self._is_closed or self._is_broken
            return
        assert not self._is_closed
        assert not self._is_broken
        self._take(data)

    def _take(self, data: bytes, *, is_closing: bool = False) -> None:
        """What is sent back: new keys that are owed, the data, an alert, and nothing behind that."""
        expected: list[tuple[int, bytes]] = []
        model = self._model
        if model.owes_update and not self._is_closed and not (self._is_broken and not data):
            expected.append((HANDSHAKE, b"\x18\0\0\1\0"))
            model.owes_update = False
        expected += [(DATA, data[at : at + RECORD]) for at in range(0, len(data), RECORD)]
        if self._is_broken and not self._is_closed and not self._has_told:
            self._has_told = True
            assert model.alert is not None
            if model.alert >= 0:
                expected.append((ALERT, bytes([2, model.alert])))
                self._is_closed = True
        elif is_closing and not self._is_closed and not self._is_broken:
            expected.append((ALERT, b"\1\0"))
            self._is_closed = True
        found = self._peer.take()
        assert found == expected, f"{_brief(found)} for {_brief(expected)}"


def _brief(records: list[tuple[int, bytes]]) -> list[tuple[int, int, str]]:
    return [(content, len(data), data[:8].hex()) for content, data in records]


def run(data: bytes) -> None:
    """One input."""
    Meeting(data).run()
    if zlib.crc32(data) % MEASURED == 0:
        gives_memory_back(lambda: Meeting(data).run())
