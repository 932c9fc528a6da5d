"""Reads what a client sends first: StartupMessage, SSLRequest, GSSENCRequest or CancelRequest.

Chapter "Message Formats" of the protocol documentation and ``ProcessStartupPacket`` of PostgreSQL 18, whose
limits and error texts these are. A login is to cost little: one decode and one split for all parameters.
"""

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from gpooler.errors import (
    FeatureNotSupported,
    InvalidAuthorization,
    InvalidParameterValue,
    ProtocolViolation,
)
from gpooler.wire import codes, messages
from gpooler.wire.options import parse_bool, parse_options
from gpooler.wire.text import decode, encode

LENGTH_BYTES: Final = 4
# The length word counts itself; PostgreSQL's MAX_STARTUP_PACKET_LENGTH does not.
MIN_STARTUP_LENGTH: Final = 8
MAX_STARTUP_LENGTH: Final = 10_000 + LENGTH_BYTES
# PostgreSQL cuts user and database names to NAMEDATALEN - 1 bytes before it looks them up.
MAX_NAME_BYTES: Final = 63
SHORT_SECRET_LENGTH: Final = 4  # protocol 3.0 and 3.1
LONG_SECRET_LENGTH: Final = 32  # from 3.2 on, as PostgreSQL 18

_PROTOCOL_OPTION_PREFIX: Final = "_pq_."
_TLS_HANDSHAKE: Final = 0x16  # first byte of a ClientHello: direct TLS, without an SSLRequest
_INT32 = struct.Struct("!I")


class Replication(IntEnum):
    """What the startup parameter ``replication`` asks for."""

    NONE = 0
    PHYSICAL = 1
    DATABASE = 2


@dataclass(frozen=True, slots=True)
class SSLRequest:
    """Asks for TLS; answered with one byte."""


@dataclass(frozen=True, slots=True)
class GSSENCRequest:
    """Asks for GSSAPI encryption; answered with one byte."""


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """Asks to cancel what the holder of this key runs; never answered."""

    pid: int
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Startup:
    """A StartupMessage, checked.

    ``parameters`` are the session parameters in the client's order and spelling, those of ``options`` first;
    explicit ones win over these, as in PostgreSQL. User, database and replication are not among them.
    """

    major: int
    minor: int
    user: str
    database: str
    parameters: dict[str, str]
    replication: Replication
    protocol_options: tuple[str, ...]  # names beginning with _pq_., none of which we understand

    @property
    def spoken_minor(self) -> int:
        """The minor version spoken from now on: the client's, or the newest we know."""
        return min(self.minor, codes.PROTOCOL_LATEST_MINOR)

    @property
    def secret_length(self) -> int:
        """Bytes of the cancel secret in this version."""
        return LONG_SECRET_LENGTH if self.minor >= 2 else SHORT_SECRET_LENGTH

    def negotiation(self) -> bytes:
        """NegotiateProtocolVersion, to be sent before authentication; empty when there is nothing to say.

        As PostgreSQL 18: 3.0, 3.1 and 3.2 are spoken as asked for; a newer minor or an unknown option is
        answered with the version spoken from now on.
        """
        if self.minor <= codes.PROTOCOL_LATEST_MINOR and not self.protocol_options:
            return b""
        version = codes.protocol(self.major, self.spoken_minor)
        return messages.negotiate_protocol_version(version, self.protocol_options)


Packet = SSLRequest | GSSENCRequest | CancelRequest | Startup


def parse_startup_length(word: bytes) -> int:
    """How many bytes follow the length word (4 bytes) of a startup packet.

    Raises ``ProtocolViolation`` when it is out of bounds. PostgreSQL closes without a message then, since
    what speaks here is seldom a PostgreSQL client; the caller may do the same.
    """
    (length,) = _INT32.unpack(word)
    if not MIN_STARTUP_LENGTH <= length <= MAX_STARTUP_LENGTH:
        cause = "direct TLS connection" if word[0] == _TLS_HANDSHAKE else f"length word {word.hex()}"
        raise ProtocolViolation("invalid length of startup packet", cause=cause)
    return int(length) - LENGTH_BYTES


def parse_startup(packet: bytes) -> Packet:
    """What a startup packet (without its length word) asks for.

    Raises ``ProtocolViolation`` (08P01), ``FeatureNotSupported`` (0A000, major version),
    ``InvalidAuthorization`` (28000, no user), ``InvalidParameterValue`` (22023, replication) or
    ``InvalidArguments`` (42601, options).
    """
    if len(packet) < 4:
        raise ProtocolViolation("incomplete startup packet")
    (version,) = _INT32.unpack_from(packet)
    if version >> 16 == codes.PROTOCOL_MAJOR:
        return _parse_parameters(version & 0xFFFF, packet)
    if version == codes.CANCEL_REQUEST_CODE:
        return _parse_cancel(packet)
    if version == codes.SSL_REQUEST_CODE and len(packet) == 4:
        return SSLRequest()
    if version == codes.GSSENC_REQUEST_CODE and len(packet) == 4:
        return GSSENCRequest()
    if version in (codes.SSL_REQUEST_CODE, codes.GSSENC_REQUEST_CODE):
        raise ProtocolViolation(
            "invalid length of startup packet", cause="bytes behind an encryption request"
        )
    raise FeatureNotSupported(
        f"unsupported frontend protocol {version >> 16}.{version & 0xFFFF}: server supports "
        f"{codes.PROTOCOL_MAJOR}.0 to {codes.PROTOCOL_MAJOR}.{codes.PROTOCOL_LATEST_MINOR}"
    )


def _parse_cancel(packet: bytes) -> CancelRequest:
    if len(packet) < 8:
        raise ProtocolViolation("invalid length of cancel request packet")
    secret = packet[8:]
    if not messages.MIN_SECRET_LENGTH <= len(secret) <= messages.MAX_SECRET_LENGTH:
        raise ProtocolViolation("invalid length of cancel key in cancel request packet")
    return CancelRequest(_INT32.unpack_from(packet, 4)[0], secret)


def _parse_parameters(minor: int, packet: bytes) -> Startup:
    text = decode(packet[4:])
    parts = text.split("\0")
    # "user\0app\0\0" splits into [user, app, "", ""]: pairs, then the terminator and what follows it.
    names = parts[:-2:2]
    if len(parts) % 2 or parts[-1] or parts[-2] or "" in names:
        raise ProtocolViolation("invalid startup packet layout: expected terminator as last byte")
    parameters = dict(zip(names, parts[1:-2:2], strict=True))

    protocol_options: tuple[str, ...] = ()
    if _PROTOCOL_OPTION_PREFIX in text:
        protocol_options = tuple(name for name in parameters if name.startswith(_PROTOCOL_OPTION_PREFIX))
        for name in protocol_options:
            del parameters[name]

    user = parameters.pop("user", "")
    if not user:
        raise InvalidAuthorization("no PostgreSQL user name specified in startup packet")
    database = parameters.pop("database", "") or user
    replication = Replication.NONE
    if "replication" in parameters:
        replication = _parse_replication(parameters.pop("replication"))
    if "options" in parameters:
        parameters = _merge_options(parameters)
    return Startup(
        codes.PROTOCOL_MAJOR,
        minor,
        _truncate(user),
        _truncate(database),
        parameters,
        replication,
        protocol_options,
    )


def _parse_replication(value: str) -> Replication:
    if value == "database":
        return Replication.DATABASE
    is_replication = parse_bool(value)
    if is_replication is None:
        raise InvalidParameterValue(
            f'invalid value for parameter "replication": "{value}"',
            hint='Valid values are: "false", 0, "true", 1, "database".',
        )
    return Replication.PHYSICAL if is_replication else Replication.NONE


def _merge_options(parameters: dict[str, str]) -> dict[str, str]:
    """The parameters with those of ``options`` in front; explicit ones win, names compared in any case."""
    options = parse_options(parameters.pop("options"))
    explicit = {name.lower() for name in parameters}
    merged = {name: value for name, value in options.items() if name.lower() not in explicit}
    merged.update(parameters)
    return merged


def _truncate(name: str) -> str:
    if len(name) * 4 <= MAX_NAME_BYTES:  # no character takes more than 4 bytes
        return name
    encoded = encode(name)
    return name if len(encoded) <= MAX_NAME_BYTES else decode(encoded[:MAX_NAME_BYTES])
