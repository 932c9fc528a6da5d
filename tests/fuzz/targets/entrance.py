"""Whoever comes: a whole worker and clients who say anything, in any pieces, and go at any time.

An input is a configuration and acts of up to three clients: what they put together to say, how much of it
they send, TLS, and their end. Only who has proved it gets in, all are told what the protocol allows, and when
they are gone nothing of them is left.
"""

import os
import re
import socket
import struct
import zlib
from contextlib import suppress

from gpooler.auth import md5
from gpooler.auth.scram import ScramClient, ScramKeys, derive_keys
from gpooler.errors import GpoolerError
from gpooler.wire import codes, messages
from tests.fuzz.given import Given, gives_memory_back
from tests.fuzz.house import SECRET, STRICT, TRUSTED, USERS, House
from tests.fuzz.secure import Peer, peer_context

HOUSES = (House(), House(STRICT))
PEERS = [peer_context(is_1_3, is_member) for is_1_3 in (True, False) for is_member in (False, True)]
VERSIONS = (codes.PROTOCOL_3_0, codes.protocol(3, 2), codes.protocol(3, 9), codes.protocol(2, 0))
PARAMETERS: tuple[dict[str, str], ...] = (
    {},
    {"application_name": "fuzz"},
    {"TimeZone": "UTC"},
    {"options": "-c statement_timeout=5s --search_path=a\\ b"},
    {"options": "-x"},
    {"replication": "database"},
    {"replication": "perhaps"},
    {"_pq_.command_tag": "1"},
    {"is_superuser": "on"},
    {f"x.{number}": "" for number in range(500)},
    {"application_name": "caf\u00e9", "application_name ": "x" * 3000},
)
# what may be told: types of messages, SQLSTATEs, and one text for every login that failed
TYPES = b"RvESKZN"
REFUSALS = ("08P01", "0A000", "22023", "28000", "28P01", "3D000", "42601", "53300", "54000", "55P02", "57P01")
FAILED = re.compile(r'(gpooler: c[0-9a-f]{12}: )?password authentication failed for user ".*"', re.DOTALL)
RECORD_TYPES = (b"\x15", b"\x16")
ALL = 1 << 20
MOST_VISITORS = 3
MEASURED = 64  # of so many inputs one is looked at for memory
KEYS: dict[tuple[bytes, int], ScramKeys] = {}


class Visitor:
    """A client by hand."""

    def __init__(self, house: House, given: Given) -> None:
        self._given = given
        flags = given.byte()
        self.socket = house.connect(flags & 1 == 1)
        self._context = PEERS[flags >> 1 & 3]
        self._is_member = flags >> 1 & 1 == 1
        self._peer: Peer | None = None
        self._wire = b""  # to be sent
        self._clear = b""  # what it was told in the clear
        self._said = b""
        self._user = "nobody"
        self._scram: ScramClient | None = None
        self._has_proof = False

    def act(self, house: House) -> None:
        """One act of the input."""
        given = self._given
        what = given.byte() % 16
        if what < 3:
            self._say(given.damaged(self._startup()))
        elif what < 6:
            self._say(given.damaged(self._answer()))
        elif what == 6:
            self._say(given.damaged(given.choice((SSL_REQUEST, GSSENC_REQUEST, *self._cancels()))))
        elif what == 7:
            self._say(given.some(given.byte()))
        elif what == 8 and self._peer is None:
            self._peer = Peer(self._context)
            self._peer.go_on()
            self._wire += self._peer.take()
        elif what == 9:
            self._wire = given.damaged(self._wire)
        elif what == 10:
            self._end(given.byte() % 3)
        elif what == 11 and given.byte() > 192:
            house.expire()
        else:
            self._send(given.byte() + 1 if what < 14 else ALL)
            house.turn()
            self._hear()

    # -- what it says

    def _startup(self) -> bytes:
        given = self._given
        self._user = given.choice(USERS)
        database = given.choice(("app", "app", "app", "other"))
        parameters = {"user": self._user, "database": database, **given.choice(PARAMETERS)}
        return messages.startup_message(parameters, given.choice(VERSIONS))

    def _answer(self) -> bytes:
        """To what it was asked last, right or wrong."""
        is_right = self._given.byte() & 3 > 0
        password = SECRET.encode() if is_right else b"wrong"
        asked = [body for kind, body in self._told() if kind == codes.AUTHENTICATION]
        code, data = messages.parse_authentication(asked[-1]) if asked else (0, b"")
        if code == codes.AUTHENTICATION_SASL:
            return self._initial(data)
        if code == codes.AUTHENTICATION_SASL_CONTINUE and self._scram is not None:
            self._has_proof |= is_right
            return self._final(data, password)
        self._has_proof |= is_right
        if code == codes.AUTHENTICATION_MD5_PASSWORD:
            password = md5.response(md5.hash_password(password, self._user.encode()), data)
        return messages.password_message(password)

    def _initial(self, data: bytes) -> bytes:
        offers = data[:-2].split(b"\0")
        binding = None if self._peer is None or self._given.byte() & 1 else self._peer.binding()
        self._scram = ScramClient(binding=binding, offers=offers)
        return messages.sasl_initial_response(self._scram.mechanism, self._scram.first())

    def _final(self, data: bytes, password: bytes) -> bytes:
        assert self._scram is not None
        try:
            challenge = self._scram.challenge(data)
        except GpoolerError:
            return b""  # the challenge of another exchange
        key = challenge.salt, challenge.iterations
        if password != SECRET.encode():
            keys = ScramKeys(bytes(32), bytes(32))
        else:
            keys = KEYS[key] = KEYS.get(key) or derive_keys(password, *key)
        return messages.sasl_response(self._scram.final(challenge, keys))

    def _cancels(self) -> list[bytes]:
        return [messages.cancel_request(1, b"none")] + [
            messages.cancel_request(*messages.parse_backend_key_data(body))
            for kind, body in self._told()
            if kind == codes.BACKEND_KEY_DATA
        ]

    def _say(self, data: bytes) -> None:
        self._said += data
        if self._peer is None:
            self._wire += data
        elif data and self._peer.write(data):
            self._wire += self._peer.take()

    def _send(self, count: int) -> None:
        try:
            sent = self.socket.send(self._wire[:count])
        except OSError:
            sent = len(self._wire)  # nobody reads it any more
        self._wire = self._wire[sent:]

    def _end(self, how: int) -> None:
        if how == 0:
            if self._peer is not None and self._peer.close():
                self._wire += self._peer.take()
            return
        with suppress(OSError):  # it has ended
            if how == 1:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.socket.close()
            else:
                self.socket.shutdown(socket.SHUT_WR)

    # -- what it is told

    def _hear(self) -> None:
        data = b""
        with suppress(OSError):
            while part := self.socket.recv(65536):
                data += part
        if self._peer is None:
            self._clear += data
        elif data:
            self._peer.put(data)
            self._wire += self._peer.take()

    def _told(self) -> list[tuple[bytes, bytes]]:
        """Messages, without the answers to requests for encryption."""
        clear = self._clear.lstrip(b"NS")
        if clear[:1] in RECORD_TYPES:
            clear = b""
        secret = b"" if self._peer is None else self._peer.received.lstrip(b"N")
        return messages.split_messages(clear)[0] + messages.split_messages(secret)[0]

    def leave(self) -> None:
        """The end of it, and a look at what it was told."""
        self._hear()
        self.socket.close()
        told = self._told()
        for at, (kind, body) in enumerate(told):
            assert kind in TYPES, f"it was told {kind!r}"
            if kind == codes.ERROR_RESPONSE:
                fields = messages.parse_error(body)
                assert fields["C"] in REFUSALS, fields
                assert at == len(told) - 1
                assert fields["C"] != "28P01" or FAILED.fullmatch(fields["M"])
            elif (kind, body) == AUTHENTICATED:
                assert self._may_enter(), "it got in without a proof"

    def _may_enter(self) -> bool:
        trusted = any(user.encode() in self._said for user in TRUSTED)
        return self._has_proof or self._is_member or trusted or SECRET.encode() in self._said


SSL_REQUEST = messages.ssl_request()
GSSENC_REQUEST = struct.pack("!II", 8, codes.GSSENC_REQUEST_CODE)
AUTHENTICATED = (codes.AUTHENTICATION, bytes(4))


def stay(data: bytes) -> None:
    """One input."""
    given = Given(data)
    flags = given.byte()
    house = HOUSES[flags & 1]
    house.begin(is_draining=flags & 14 == 14)
    visitors: list[Visitor] = []
    open_files = len(os.listdir("/proc/self/fd"))
    try:
        while given:
            number = given.byte() % 8
            if number >= len(visitors):
                if len(visitors) < MOST_VISITORS and (not visitors or number >= 6):
                    visitors.append(Visitor(house, given))
                number = -1
            visitors[number].act(house)
        house.turn()
    finally:
        for visitor in visitors:
            visitor.leave()
    house.end()
    left = len(os.listdir("/proc/self/fd")) - open_files
    assert not left, f"{left} files are left open"


def run(data: bytes) -> None:
    stay(data)
    if data and zlib.crc32(data) % MEASURED == 0:
        HOUSES[data[0] & 1].fill_pool()
        gives_memory_back(lambda: stay(data))
