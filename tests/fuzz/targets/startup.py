"""Startup packets: read as a model reads them, written again, or refused as PostgreSQL would.

An input is what tests/wire/startup holds: a packet with its length word.
"""

import struct

from gpooler.errors import ClientFault
from gpooler.wire import codes, messages, startup
from gpooler.wire.text import decode, encode

SPECIAL = ("user", "database", "options", "replication")
REQUESTS = {80877103: startup.SSLRequest(), 80877104: startup.GSSENCRequest()}
VIOLATION, UNSUPPORTED, NO_USER, BAD_VALUE, BAD_OPTIONS = "08P01", "0A000", "28000", "22023", "42601"
MOST_NAME = 63


def run(data: bytes) -> None:
    if len(data) < 4:
        return
    check_length(data[:4])
    packet = data[4:]
    wanted = refusal(packet)
    try:
        found = startup.parse_startup(packet)
    except ClientFault as error:
        assert error.sqlstate == wanted or (error.sqlstate == BAD_OPTIONS and b"options\0" in packet)
        check_text(error)
        return
    assert not wanted, f"read, and is to be refused with {wanted}"
    (version,) = struct.unpack_from("!I", packet)
    if isinstance(found, startup.Startup):
        check_startup(found, version, pairs(packet) or {})
    elif isinstance(found, startup.CancelRequest):
        assert messages.cancel_request(found.pid, found.secret)[4:] == packet
    else:
        assert found == REQUESTS[version]


def check_length(word: bytes) -> None:
    (length,) = struct.unpack("!I", word)
    try:
        behind = startup.parse_startup_length(word)
    except ClientFault as error:
        assert error.sqlstate == VIOLATION
        assert not 8 <= length <= 10_004
    else:
        assert behind == length - 4
        assert 8 <= length <= 10_004


def check_text(error: ClientFault) -> None:
    """The client can be told, whatever it sent."""
    fields = messages.parse_error(messages.error_response(error, "c0")[5:])
    assert (fields["S"], fields["C"]) == ("FATAL", error.sqlstate)


# -- the model: a packet as ProcessStartupPacket walks through it


def pairs(packet: bytes) -> dict[bytes, bytes] | None:
    """Names and values of a StartupMessage; None where its layout is wrong."""
    found: dict[bytes, bytes] = {}
    at = 4
    while at < len(packet) and packet[at]:
        ends = packet.find(0, at)
        value_ends = packet.find(0, ends + 1)
        if ends < 0 or value_ends < 0:
            return None
        found[packet[at:ends]] = packet[ends + 1 : value_ends]
        at = value_ends + 1
    return found if at == len(packet) - 1 else None


def refusal(packet: bytes) -> str:
    """The SQLSTATE with which it is refused; empty where it is not, but perhaps for its options."""
    if len(packet) < 4:
        return VIOLATION
    (version,) = struct.unpack_from("!I", packet)
    if version == 80877102:
        return "" if 4 + 4 + 4 <= len(packet) <= 4 + 4 + 256 else VIOLATION
    if version in REQUESTS:
        return "" if len(packet) == 4 else VIOLATION
    if version >> 16 != 3:
        return UNSUPPORTED
    found = pairs(packet)
    if found is None:
        return VIOLATION
    if not found.get(b"user"):
        return NO_USER
    return BAD_VALUE if replication(found) is None else ""


def replication(found: dict[bytes, bytes]) -> int | None:
    value = found.get(b"replication", b"false").decode("utf-8", "replace")
    if value == "database":
        return 2
    value = value.lower()
    for meaning, words in enumerate((("false", "no", "off", "0"), ("true", "yes", "on", "1"))):
        for word in words:
            if word.startswith(value) and len(value) >= (2 if word[0] == "o" else 1):
                return meaning
    return None


# -- what a StartupMessage is read as


def check_startup(found: startup.Startup, version: int, given: dict[bytes, bytes]) -> None:
    assert (found.major, found.minor) == (3, version & 0xFFFF)
    user = given[b"user"]
    assert encode(found.user) == user[:MOST_NAME]
    assert encode(found.database) == (given.get(b"database") or user)[:MOST_NAME]
    assert found.replication == replication(given)
    unknown = [name for name in given if name.startswith(b"_pq_.")]
    assert [encode(name) for name in found.protocol_options] == unknown
    explicit = {
        decode(name): decode(value)
        for name, value in given.items()
        if decode(name) not in SPECIAL and name not in unknown
    }
    assert explicit.items() <= found.parameters.items()
    assert b"options" in given or explicit == found.parameters
    negotiation = found.negotiation()
    assert bool(negotiation) is (found.minor > 2 or bool(unknown))
    if negotiation:
        told = messages.parse_negotiate_protocol_version(negotiation[5:])
        assert (told.version, told.names) == (3 << 16 | min(found.minor, 2), found.protocol_options)
    assert startup.parse_startup(written(found)) == found


def written(found: startup.Startup) -> bytes:
    """A packet that says the same; what an explicit parameter cannot say is said by ``options``."""
    parameters = {"user": found.user, "database": found.database, **dict.fromkeys(found.protocol_options, "")}
    if found.replication:
        parameters["replication"] = "database" if found.replication == 2 else "on"
    options = []
    for name, value in found.parameters.items():
        if name in SPECIAL or name.startswith("_pq_."):
            options += ["-c", "".join(f"\\{char}" for char in f"{name}={value}")]
        else:
            parameters[name] = value
    if options:
        parameters["options"] = " ".join(options)
    return messages.startup_message(parameters, codes.protocol(found.major, found.minor))[4:]
