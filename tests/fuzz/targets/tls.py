"""TLS records cut anywhere, changed, lost, repeated, put in: out comes what the peer put in, or nothing.

An input is acts of two ends and of somebody between them who sees every byte. Where that one only cuts and
joins, all arrives; from the first byte that he changes on, nothing does.
"""

import zlib
from dataclasses import dataclass, replace

from gpooler.net import openssl
from gpooler.relay.tls import TlsHandshake, TlsSession
from tests.fuzz.given import Given, gives_memory_back
from tests.fuzz.secure import Peer, acceptor, peer_context

openssl.load()
ACCEPTOR = acceptor()
PEERS = [peer_context(is_1_3, is_member) for is_1_3 in (True, False) for is_member in (False, True)]
PATTERN = bytes(range(251)) * 300
MOST_PLAIN = 40_000
RECORD = 16384
HEADER = 5
EVERYTHING = 1 << 20
MOST_ROUNDS = 100  # until two ends have nothing more to say to each other
MEASURED = 64  # of so many inputs one is looked at for memory


class Acceptance:
    """gpooler's end."""

    def __init__(self) -> None:
        self._handshake: TlsHandshake | None = ACCEPTOR.begin()
        self.session: TlsSession | None = None
        self.received = b""
        self.is_closed = False  # by the peer's close_notify
        self.is_broken = False

    def put(self, data: bytes) -> bytes:
        """Take in what was sent; what is to be sent."""
        if self._handshake is not None and not self.is_broken:
            self._handshake.feed(data)
            try:
                is_over = self._handshake.step()
            except ConnectionError:
                self.is_broken = True
                return self._handshake.take()
            answer = self._handshake.take()
            if not is_over:
                return answer
            self.session = self._handshake.session()
            self._handshake = None
            return answer + self.read()
        if self.session is None:
            return b""
        self.session.put(data)
        return self.read()

    def read(self, most: int = RECORD) -> bytes:
        """As far as whole records are there; what is to be sent, as an answer or an alert."""
        assert self.session is not None
        while True:
            try:
                found = self.session.read(most)
            except ConnectionError:
                self.is_broken = True
                break
            assert not found or not self.is_broken, "nothing comes out of what is broken"
            if not found:
                self.is_closed |= found is None
                break
            self.received += found
        return self.session.take()

    def write(self, data: bytes) -> bytes:
        """Bytes for the peer."""
        if self.session is None:
            return b""
        try:
            self.session.write(data)
        except ConnectionError:
            assert self.is_broken or self.is_closed
            return b""
        return self.session.take()

    def close(self) -> bytes:
        """A close_notify."""
        if self.session is None:
            return b""
        self.session.close()
        return self.session.take()

    def slim(self) -> None:
        """As a quiet session does."""
        if self.session is not None:
            self.session.slim()


@dataclass(slots=True)
class Record:
    """A record on its way."""

    data: bytes
    before: int  # plain bytes that were written before those in it
    behind: int
    is_whole: bool = True  # nothing of it has been delivered


class Wire:
    """Records on their way in one direction, and how much of what they carry may arrive."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.written = b""
        self.is_changed = False
        self.most: int | None = None  # plain bytes that may arrive, once a record was changed
        self.must_break = False

    def add(self, data: bytes, plain: bytes = b"") -> None:
        """What an end sends: whole records, which carry ``plain``."""
        before, behind = len(self.written), len(self.written) + len(plain)
        self.written += plain
        while data:
            size = HEADER + int.from_bytes(data[3:HEADER], "big")
            assert size <= len(data)
            self.records.append(Record(data[:size], before, behind))
            data = data[size:]

    def deliver(self, count: int) -> bytes:
        """The next bytes."""
        data = b""
        while self.records and len(data) < count:
            record = self.records[0]
            part = record.data[: count - len(data)]
            data += part
            if len(part) == len(record.data):
                del self.records[0]
            else:
                record.data = record.data[len(part) :]
                record.is_whole = False
        return data

    def change(self, given: Given, is_secured: bool) -> None:
        """What somebody between the ends may do, once, as another act might undo the first.

        ``is_secured``: the handshake is over on both.
        """
        how, at = given.byte() % 5, given.byte()
        if not self.records or self.is_changed:
            return
        at %= len(self.records)
        record = self.records[at]
        most = record.before
        if how == 0:
            del self.records[at]
        elif how == 1:
            most = record.behind
            self.records.insert(at + 1, replace(record))
        elif how == 2:
            other = self.records[at - 1]
            most = min(most, other.before)
            self.records[at], self.records[at - 1] = other, record
            if other.data == record.data:
                return
        elif how == 3:
            head = bytes([20 + given.byte() % 5, 3, 3, 0, given.byte() % 64])
            self.records.insert(at, Record(head + given.some(given.byte() % 64), most, most))
        else:
            place = (given.byte() * 256 + given.byte()) % len(record.data)
            changed = record.data[:place] + given.some(1) + record.data[place + 1 :]
            if changed == record.data:
                return
            is_body = record.is_whole and place >= HEADER and len(changed) == len(record.data)
            self.must_break = is_secured and is_body
            record.data = changed
        self.is_changed = True
        if is_secured:
            self.most = most


class Meeting:
    """Two ends and the wires between them."""

    def __init__(self, data: bytes) -> None:
        self._given = Given(data)
        flags = self._given.byte()
        self._may_change = flags & 4 != 0
        self._peer = Peer(PEERS[flags % 4])
        self._server = Acceptance()
        self._up, self._down = Wire(), Wire()
        self._has_closed = self._is_closed = False  # the peer; gpooler
        self._has_renegotiated = False
        self._peer.go_on()
        self._up.add(self._peer.take())

    def run(self) -> None:
        """All acts, the end, and a look at what came of it."""
        while self._given:
            self._act()
        self._arrive()
        self._check()

    def _act(self) -> None:
        given = self._given
        what = given.byte() % 16
        if what < 4:
            self._deliver_up(given.byte())
        elif what < 6:
            self._deliver_down(given.byte())
        elif what == 6:
            self._deliver_up(EVERYTHING)
        elif what == 7:
            self._deliver_down(EVERYTHING)
        elif what < 10:
            self._write_up(self._plain(self._up))
        elif what == 10:
            self._write_down(self._plain(self._down))
        elif what == 11:
            self._server.slim()
        elif what == 12 and self._may_change:
            wire = self._down if given.byte() >= 192 else self._up
            wire.change(given, self._server.session is not None and self._peer.is_secured)
        elif what == 13:
            self._has_renegotiated = True
            self._peer.renegotiate()
            self._up.add(self._peer.take())
        elif what == 14:
            self._has_closed |= self._peer.close()
            self._up.add(self._peer.take())
        elif what == 15:
            self._is_closed |= self._server.session is not None
            self._down.add(self._server.close())

    def _plain(self, wire: Wire) -> bytes:
        size = self._given.byte() << self._given.byte() % 8
        return PATTERN[len(wire.written) :][: min(size, MOST_PLAIN - len(wire.written))]

    def _write_up(self, plain: bytes) -> None:
        for at in range(0, len(plain), RECORD):
            part = plain[at : at + RECORD]
            if not self._has_closed and self._peer.write(part):
                self._up.add(self._peer.take(), part)

    def _write_down(self, plain: bytes) -> None:
        if not self._is_closed and (data := self._server.write(plain)):
            self._down.add(data, plain)

    def _deliver_up(self, count: int) -> None:
        if data := self._up.deliver(count):
            self._down.add(self._server.put(data))

    def _deliver_down(self, count: int) -> None:
        if data := self._down.deliver(count):
            self._peer.put(data)
            self._up.add(self._peer.take())

    def _arrive(self) -> None:
        """All that is on its way."""
        for _ in range(MOST_ROUNDS):
            if not self._up.records and not self._down.records:
                return
            self._deliver_up(EVERYTHING)
            self._deliver_down(EVERYTHING)
        raise AssertionError("they talk for ever")

    def _check(self) -> None:
        server, peer, up, down = self._server, self._peer, self._up, self._down
        assert up.written.startswith(server.received), "gpooler has got what nobody wrote"
        assert down.written.startswith(peer.received), "the peer has got what nobody wrote"
        if up.is_changed or down.is_changed:
            assert up.most is None or len(server.received) <= up.most, "it came through a changed record"
            assert server.is_broken or not up.must_break, "a changed record was not seen"
            return
        assert server.session is not None
        assert server.received == up.written, "something was lost on the way to gpooler"
        if not self._has_renegotiated:  # a peer that is refused that ends with an alert
            assert not server.is_broken
            assert server.is_closed is self._has_closed
            assert peer.received == down.written, "something was lost on the way back"


def run(data: bytes) -> None:
    Meeting(data).run()
    if zlib.crc32(data) % MEASURED == 0:
        gives_memory_back(lambda: Meeting(data).run())
