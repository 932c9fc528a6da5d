"""Tables of the console: columns with PostgreSQL's types, rows, and how their values cross the wire. Pure."""

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from gpooler.wire import codes, messages
from gpooler.wire.text import encode

Cell = str | int | float | bool | None
Row = tuple[Cell, ...]

TEXT_FORMAT: Final = 0
BINARY_FORMAT: Final = 1
_NUMERIC_BASE: Final = 10_000


class Type(NamedTuple):
    """A type of PostgreSQL: its OID, and its size, -1 where that varies (pg_type.dat)."""

    oid: int
    size: int
    name: str


TEXT: Final = Type(25, -1, "text")
INT4: Final = Type(23, 4, "integer")
INT8: Final = Type(20, 8, "bigint")
NUMERIC: Final = Type(1700, -1, "numeric")
BOOL: Final = Type(16, 1, "boolean")
FLOAT8: Final = Type(701, 8, "double precision")
BYTEA: Final = Type(17, -1, "bytea")

# The letters are those of PgBouncer's sources, which the tables are written after.
_LETTERS: Final = {
    "s": TEXT, "i": INT4, "q": INT8, "N": NUMERIC, "T": TEXT, "b": BYTEA, "f": FLOAT8, "B": BOOL,
}  # fmt: skip


class Column(NamedTuple):
    """One column."""

    name: str
    type: Type


Columns = tuple[Column, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A result; ``rows`` may be made while they are read."""

    columns: Columns
    rows: Iterable[Row]


def columns(text: str) -> Columns:
    """Columns written as ``s: database user i: pool_size``: a letter for the type of those behind it."""
    found = []
    kind = TEXT
    for word in text.split():
        if word.endswith(":"):
            kind = _LETTERS[word[:-1]]
        else:
            found.append(Column(word, kind))
    return tuple(found)


def _numeric(value: int) -> bytes:
    """A whole number as PostgreSQL's numeric: digits to the base of 10,000 (numeric_send)."""
    digits = []
    rest = abs(value)
    while rest:
        rest, digit = divmod(rest, _NUMERIC_BASE)
        digits.append(digit)
    weight = len(digits) - 1
    while digits and not digits[0]:
        digits.pop(0)  # zeros at the end are not sent
    sign = 0x4000 if value < 0 else 0
    digits.reverse()
    return struct.pack(f"!hhHh{len(digits)}h", len(digits), max(weight, 0), sign, 0, *digits)


_BINARY: Final[dict[int, Callable[[Cell], bytes] | None]] = {
    TEXT.oid: None,  # its text
    BYTEA.oid: None,
    INT4.oid: lambda cell: struct.pack("!i", cell),
    INT8.oid: lambda cell: struct.pack("!q", cell),
    NUMERIC.oid: lambda cell: _numeric(int(cell or 0)),
    BOOL.oid: lambda cell: b"\x01" if cell else b"\0",
    FLOAT8.oid: lambda cell: struct.pack("!d", cell),
}


def encoders(shape: Columns, formats: Sequence[int]) -> list[Callable[[Cell], bytes] | None]:
    """How ``data_row`` sends the cells of each column, None for text.

    ``formats`` as in Bind: none, one for all, or one for each.
    """
    wanted = list(formats) if len(formats) > 1 else list(formats or (TEXT_FORMAT,)) * len(shape)
    return [
        _BINARY[column.type.oid] if is_binary else None
        for column, is_binary in zip(shape, wanted, strict=True)
    ]


def row_description(shape: Columns, formats: Sequence[int] = ()) -> bytes:
    """RowDescription; ``formats`` as for ``encoders``."""
    wanted = list(formats) if len(formats) > 1 else list(formats or (TEXT_FORMAT,)) * len(shape)
    parts = [struct.pack("!H", len(shape))]
    for column, form in zip(shape, wanted, strict=True):
        parts.append(encode(column.name) + b"\0")
        parts.append(struct.pack("!IhIhih", 0, 0, column.type.oid, column.type.size, -1, form))
    return messages.message(codes.ROW_DESCRIPTION, b"".join(parts))
