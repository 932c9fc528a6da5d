"""What a client of the console sends, message by message: bytes in, values out. Pure.

Chapter "Message Formats" of PostgreSQL's protocol documentation.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from gpooler.errors import BindMismatch, ProtocolViolation
from gpooler.wire import codes
from gpooler.wire.text import decode

MAX_MESSAGE: Final = 32_768  # bytes; the longest that drivers send are queries of catalogs, a tenth of it
_KINDS: Final = frozenset(
    {
        codes.QUERY, codes.PARSE, codes.BIND, codes.DESCRIBE, codes.EXECUTE, codes.CLOSE, codes.FLUSH,
        codes.SYNC, codes.TERMINATE, codes.FUNCTION_CALL, codes.COPY_DATA, codes.COPY_DONE, codes.COPY_FAIL,
    }
)  # fmt: skip
_BINARY: Final = 1
# Types of a parameter whose binary form is its text.
_TEXT_OIDS: Final = frozenset({0, 18, 19, 25, 705, 1042, 1043})
_INTEGERS: Final = {21: 2, 23: 4, 20: 8}  # sizes by OID


@dataclass(frozen=True, slots=True)
class Parse:
    """A statement under a name; ``types`` of its parameters as far as the client gives them."""

    name: str
    sql: str
    types: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Bind:
    """A portal over a statement. ``values`` are as they came, with ``formats`` as in the message."""

    portal: str
    statement: str
    formats: tuple[int, ...]
    values: tuple[bytes | None, ...]
    results: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """Describe and Close: of a statement (S) or a portal (P)."""

    is_statement: bool
    name: str


@dataclass(frozen=True, slots=True)
class Execute:
    """Run a portal; 0 rows is all."""

    portal: str
    rows: int


class Framer:
    """Cuts a stream into messages."""

    def __init__(self, data: bytes = b"") -> None:
        self._data = bytearray(data)

    def feed(self, data: bytes) -> None:
        """More bytes of the stream."""
        self._data += data

    def messages(self) -> Iterator[tuple[bytes, bytes]]:
        """Type and body of each message that is complete. Raises ProtocolViolation."""
        while len(self._data) >= 5:
            kind = bytes(self._data[:1])
            (length,) = struct.unpack_from("!I", self._data, 1)
            if kind not in _KINDS:
                raise ProtocolViolation(f"invalid frontend message type {kind[0]}")
            if not 4 <= length <= MAX_MESSAGE:
                raise ProtocolViolation("invalid message length", cause=f"type {kind!r}, length {length}")
            if len(self._data) < length + 1:
                return
            body = bytes(self._data[5 : length + 1])
            del self._data[: length + 1]
            yield kind, body


class _Reader:
    """Takes a body apart. Raises ProtocolViolation for what does not fit."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    def string(self) -> str:
        end = self._body.find(b"\0", self._at)
        if end < 0:
            raise ProtocolViolation("invalid string in message")
        text = decode(self._body[self._at : end])
        self._at = end + 1
        return text

    def int16(self) -> int:
        return self._int("!H", 2)

    def int32(self) -> int:
        return self._int("!i", 4)

    def _int(self, form: str, size: int) -> int:
        if len(self._body) - self._at < size:
            raise ProtocolViolation("insufficient data left in message")
        (value,) = struct.unpack_from(form, self._body, self._at)
        self._at += size
        return int(value)

    def bytes(self, size: int) -> bytes:
        if size < 0 or len(self._body) - self._at < size:
            raise ProtocolViolation("insufficient data left in message")
        self._at += size
        return self._body[self._at - size : self._at]

    def end(self) -> None:
        if self._at != len(self._body):
            raise ProtocolViolation("invalid message format")


def read_query(body: bytes) -> str:
    """The text of a Query. Raises ProtocolViolation, as all of these."""
    reader = _Reader(body)
    text = reader.string()
    reader.end()
    return text


def read_parse(body: bytes) -> Parse:
    """A Parse."""
    reader = _Reader(body)
    name, sql = reader.string(), reader.string()
    types = tuple(reader.int32() for _ in range(reader.int16()))
    reader.end()
    return Parse(name, sql, types)


def read_bind(body: bytes) -> Bind:
    """A Bind."""
    reader = _Reader(body)
    portal, statement = reader.string(), reader.string()
    formats = tuple(reader.int16() for _ in range(reader.int16()))
    values: list[bytes | None] = []
    for _ in range(reader.int16()):
        size = reader.int32()
        values.append(None if size == -1 else reader.bytes(size))
    results = tuple(reader.int16() for _ in range(reader.int16()))
    reader.end()
    return Bind(portal, statement, formats, tuple(values), results)


def read_target(body: bytes) -> Target:
    """A Describe or Close."""
    reader = _Reader(body)
    kind, name = reader.bytes(1), reader.string()
    reader.end()
    if kind not in (b"S", b"P"):
        raise ProtocolViolation(f"invalid subtype {kind[0]} of a message")
    return Target(kind == b"S", name)


def read_execute(body: bytes) -> Execute:
    """An Execute."""
    reader = _Reader(body)
    portal, rows = reader.string(), reader.int32()
    reader.end()
    return Execute(portal, max(rows, 0))


def parameter_texts(bind: Bind, types: tuple[int, ...]) -> tuple[str | None, ...]:
    """The values of a Bind as texts; ``types`` are OIDs that the client gave with its Parse.

    Raises BindMismatch.
    """
    formats = bind.formats if len(bind.formats) > 1 else (bind.formats or (0,)) * len(bind.values)
    if len(formats) != len(bind.values):
        raise BindMismatch(
            f"bind message has {len(formats)} parameter formats but {len(bind.values)} parameters"
        )
    texts: list[str | None] = []
    for number, (value, form) in enumerate(zip(bind.values, formats, strict=True)):
        oid = types[number] if number < len(types) else 0
        if value is not None and form == _BINARY and oid not in _TEXT_OIDS:
            if len(value) != _INTEGERS.get(oid):
                raise BindMismatch(f"parameter ${number + 1} has a type that the console cannot read")
            texts.append(str(int.from_bytes(value, "big", signed=True)))
        else:
            texts.append(None if value is None else decode(value))
    return tuple(texts)
