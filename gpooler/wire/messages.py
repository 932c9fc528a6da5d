"""Builds and takes apart the messages that gpooler itself speaks; bytes in, bytes out.

Chapter "Message Formats" of PostgreSQL's protocol documentation. A parser takes the body of a message
(what follows type and length). What a server sent wrongly raises ``ServerProtocol``, what a client
sent wrongly ``ProtocolViolation``. Text crosses the wire as ``wire/text.py`` says.
"""

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from gpooler.errors import GpoolerError, ProtocolViolation, ServerProtocol
from gpooler.wire import codes
from gpooler.wire.text import decode, encode

# What a server may say while it logs us in. libpq takes 30,000 bytes of an error; a ParameterStatus or
# the notice of a login trigger can be longer. Nothing legitimate comes near this.
MAX_LOGIN_MESSAGE_LENGTH: Final = 1 << 20
# PG_MAX_AUTH_TOKEN_LENGTH of PostgreSQL: what a client may send as an answer to an authentication.
MAX_PASSWORD_MESSAGE_LENGTH: Final = 65535
# Secrets of BackendKeyData and CancelRequest: "up to 256 bytes" (protocol 3.2); 4 in 3.0 and 3.1.
MIN_SECRET_LENGTH: Final = 4
MAX_SECRET_LENGTH: Final = 256

_HEADER = struct.Struct("!cI")
_INT16 = struct.Struct("!H")
_INT32 = struct.Struct("!I")
_TEXT_COLUMN: Final = struct.pack("!IhIhih", 0, 0, 25, -1, -1, 0)  # OID, size and modifier of text; as text
_HEADER_LENGTH: Final = 5


def message(kind: bytes, body: bytes = b"") -> bytes:
    """A message of type ``kind`` (one byte)."""
    return _HEADER.pack(kind, len(body) + 4) + body


# --- backend messages, as we send them to clients ---------------------------------------------


def authentication(code: int, data: bytes = b"") -> bytes:
    """An Authentication message of any kind."""
    return message(codes.AUTHENTICATION, _INT32.pack(code) + data)


def authentication_ok() -> bytes:
    """AuthenticationOk."""
    return authentication(codes.AUTHENTICATION_OK)


def authentication_cleartext_password() -> bytes:
    """AuthenticationCleartextPassword."""
    return authentication(codes.AUTHENTICATION_CLEARTEXT_PASSWORD)


def authentication_md5_password(salt: bytes) -> bytes:
    """AuthenticationMD5Password; ``salt`` is 4 bytes."""
    return authentication(codes.AUTHENTICATION_MD5_PASSWORD, salt)


def authentication_sasl(mechanisms: Iterable[bytes]) -> bytes:
    """AuthenticationSASL with the names of the mechanisms, best first."""
    return authentication(codes.AUTHENTICATION_SASL, b"".join(m + b"\0" for m in mechanisms) + b"\0")


def authentication_sasl_continue(data: bytes) -> bytes:
    """AuthenticationSASLContinue."""
    return authentication(codes.AUTHENTICATION_SASL_CONTINUE, data)


def authentication_sasl_final(data: bytes) -> bytes:
    """AuthenticationSASLFinal."""
    return authentication(codes.AUTHENTICATION_SASL_FINAL, data)


def parameter_status(name: str, value: str) -> bytes:
    """ParameterStatus."""
    return message(codes.PARAMETER_STATUS, encode(f"{name}\0{value}\0"))


def backend_key_data(pid: int, secret: bytes) -> bytes:
    """BackendKeyData; ``secret`` is 4 bytes for protocol 3.0 and 3.1, up to 256 from 3.2 on."""
    if not MIN_SECRET_LENGTH <= len(secret) <= MAX_SECRET_LENGTH:
        raise ValueError(f"secret of {len(secret)} bytes")
    return message(codes.BACKEND_KEY_DATA, _INT32.pack(pid) + secret)


def ready_for_query(status: bytes = codes.IDLE) -> bytes:
    """ReadyForQuery; ``status`` is ``I``, ``T`` or ``E``."""
    return message(codes.READY_FOR_QUERY, status)


def negotiate_protocol_version(version: int, names: Iterable[str]) -> bytes:
    """NegotiateProtocolVersion.

    ``version`` is the whole version word spoken from now on (PostgreSQL sends that, not only the minor),
    ``names`` are the ``_pq_.`` options not understood.
    """
    options = [encode(name) + b"\0" for name in names]
    body = struct.pack("!II", version, len(options)) + b"".join(options)
    return message(codes.NEGOTIATE_PROTOCOL_VERSION, body)


def error_response(error: GpoolerError, client_id: str | None = None) -> bytes:
    """ErrorResponse of ``error``; with a client id its text begins ``gpooler: <client id>: ``."""
    return message(codes.ERROR_RESPONSE, _fields(error.fields(), client_id))


def notice_response(
    text: str, *, severity: str = "NOTICE", sqlstate: str = "00000", client_id: str | None = None
) -> bytes:
    """NoticeResponse."""
    fields = {"S": severity, "V": severity, "C": sqlstate, "M": text}
    return message(codes.NOTICE_RESPONSE, _fields(fields, client_id))


def row_description(names: Iterable[str]) -> bytes:
    """RowDescription of columns of type text that belong to no table."""
    columns = [encode(name) + b"\0" + _TEXT_COLUMN for name in names]
    return message(codes.ROW_DESCRIPTION, _INT16.pack(len(columns)) + b"".join(columns))


def command_complete(tag: str) -> bytes:
    """CommandComplete."""
    return message(codes.COMMAND_COMPLETE, encode(tag) + b"\0")


def _fields(fields: Mapping[str, str], client_id: str | None) -> bytes:
    parts = []
    for code, value in fields.items():
        if code == "M" and client_id is not None:
            value = f"gpooler: {client_id}: {value}"
        parts.append(f"{code}{value}".replace("\0", "") + "\0")
    return encode("".join(parts)) + b"\0"


# --- frontend messages, as we send them to servers --------------------------------------------


def startup_message(parameters: Mapping[str, str], version: int = codes.PROTOCOL_3_0) -> bytes:
    """StartupMessage; ``parameters`` include ``user`` and ``database``, order is kept."""
    pairs = "".join(f"{name}\0{value}\0" for name, value in parameters.items())
    body = _INT32.pack(version) + encode(pairs) + b"\0"
    return _INT32.pack(len(body) + 4) + body


def cancel_request(pid: int, secret: bytes) -> bytes:
    """CancelRequest."""
    body = struct.pack("!II", codes.CANCEL_REQUEST_CODE, pid) + secret
    return _INT32.pack(len(body) + 4) + body


def ssl_request() -> bytes:
    """SSLRequest."""
    return struct.pack("!II", 8, codes.SSL_REQUEST_CODE)


def password_message(password: bytes) -> bytes:
    """PasswordMessage, of a clear-text or an MD5 password."""
    return message(codes.PASSWORD_MESSAGE, password + b"\0")


def sasl_initial_response(mechanism: bytes, data: bytes) -> bytes:
    """SASLInitialResponse with the client's first message."""
    return message(codes.PASSWORD_MESSAGE, mechanism + b"\0" + _INT32.pack(len(data)) + data)


def sasl_response(data: bytes) -> bytes:
    """SASLResponse."""
    return message(codes.PASSWORD_MESSAGE, data)


def query(sql: str) -> bytes:
    """Query."""
    return message(codes.QUERY, encode(sql) + b"\0")


def sync() -> bytes:
    """Sync."""
    return message(codes.SYNC)


def terminate() -> bytes:
    """Terminate."""
    return message(codes.TERMINATE)


# --- taking a stream apart --------------------------------------------------------------------


def take_message(
    buffer: bytes, offset: int = 0, limit: int = MAX_LOGIN_MESSAGE_LENGTH
) -> tuple[bytes, bytes, int] | None:
    """Type and body of the message a server sent at ``offset``, and the offset behind it.

    None while it is incomplete. A length under 4 or above ``limit`` (it counts itself) raises
    ``ServerProtocol`` as soon as it is seen.
    """
    if len(buffer) - offset < _HEADER_LENGTH:
        return None
    kind, length = _HEADER.unpack_from(buffer, offset)
    if not 4 <= length <= limit:
        raise ServerProtocol(cause=f"message type {kind!r} has a length of {length}")
    end = offset + 1 + length
    if len(buffer) < end:
        return None
    return kind, buffer[offset + _HEADER_LENGTH : end], end


def split_messages(
    buffer: bytes, limit: int = MAX_LOGIN_MESSAGE_LENGTH
) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Cuts what a server sent into complete (type, body) pairs and the rest, which is incomplete.

    Raises as ``take_message``.
    """
    messages: list[tuple[bytes, bytes]] = []
    offset = 0
    while (taken := take_message(buffer, offset, limit)) is not None:
        kind, body, offset = taken
        messages.append((kind, body))
    return messages, buffer[offset:]


def split_password_message(
    buffer: bytes, limit: int = MAX_PASSWORD_MESSAGE_LENGTH
) -> tuple[bytes, bytes] | None:
    """The body of the one message a client may send while it logs in, and the bytes behind it.

    None while it is incomplete. Another type, or a length under 4 or above ``limit``, raises
    ``ProtocolViolation`` as soon as it is seen.
    """
    if buffer and buffer[:1] != codes.PASSWORD_MESSAGE:
        raise ProtocolViolation(f"expected password response, got message type {buffer[0]}")
    if len(buffer) < _HEADER_LENGTH:
        return None
    (length,) = _INT32.unpack_from(buffer, 1)
    if not 4 <= length <= limit:
        raise ProtocolViolation("invalid message length", cause=f"password message of {length} bytes")
    if len(buffer) < length + 1:
        return None
    return buffer[_HEADER_LENGTH : length + 1], buffer[length + 1 :]


# --- bodies of backend messages ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NegotiateProtocolVersion:
    """What a server will speak, and what it did not understand."""

    version: int
    names: tuple[str, ...]


def parse_error(body: bytes) -> dict[str, str]:
    """Fields of an ErrorResponse or NoticeResponse, by code, in order."""
    fields: dict[str, str] = {}
    if body == b"\0":
        return fields
    if body[-2:] != b"\0\0":
        raise ServerProtocol(cause="ErrorResponse without terminator")
    for field in decode(body[:-2]).split("\0"):
        if not field:
            raise ServerProtocol(cause="ErrorResponse with an empty field")
        fields[field[0]] = field[1:]
    return fields


def parse_parameter_status(body: bytes) -> tuple[str, str]:
    """Name and value of a ParameterStatus."""
    parts = decode(body).split("\0")
    if len(parts) != 3 or parts[2] or not parts[0]:
        raise ServerProtocol(cause="malformed ParameterStatus")
    return parts[0], parts[1]


def parse_backend_key_data(body: bytes) -> tuple[int, bytes]:
    """Process id and secret of a BackendKeyData."""
    if not MIN_SECRET_LENGTH <= len(body) - 4 <= MAX_SECRET_LENGTH:
        raise ServerProtocol(cause=f"BackendKeyData of {len(body)} bytes")
    return int.from_bytes(body[:4], "big"), body[4:]


def parse_authentication(body: bytes) -> tuple[int, bytes]:
    """Code (``codes.AUTHENTICATION_…``) and data of an Authentication message."""
    if len(body) < 4:
        raise ServerProtocol(cause="Authentication message without a code")
    return int.from_bytes(body[:4], "big"), body[4:]


def parse_sasl_mechanisms(data: bytes) -> list[bytes]:
    """Names in an AuthenticationSASL."""
    if data[-2:] != b"\0\0":
        raise ServerProtocol(cause="AuthenticationSASL without terminator")
    return data[:-2].split(b"\0")


def parse_ready_for_query(body: bytes) -> bytes:
    """Transaction status: ``I``, ``T`` or ``E``."""
    if body not in (codes.IDLE, codes.IN_TRANSACTION, codes.IN_FAILED_TRANSACTION):
        raise ServerProtocol(cause="malformed ReadyForQuery")
    return body


def parse_negotiate_protocol_version(body: bytes) -> NegotiateProtocolVersion:
    """Version and names of a NegotiateProtocolVersion."""
    if len(body) < 8:
        raise ServerProtocol(cause="NegotiateProtocolVersion too short")
    version, count = struct.unpack_from("!II", body)
    parts = decode(body[8:]).split("\0")
    if parts[-1] or len(parts) - 1 != count:
        raise ServerProtocol(cause="NegotiateProtocolVersion with a wrong count")
    return NegotiateProtocolVersion(version, tuple(parts[:-1]))
