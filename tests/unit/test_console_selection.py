"""WHERE, ORDER BY and LIMIT, and how values cross the wire."""

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg.types.numeric import NumericBinaryLoader

from gpooler.console.grammar import parse
from gpooler.console.selection import compile_show, parameters_of
from gpooler.console.statements import Show
from gpooler.console.table import BYTEA, NUMERIC, Cell, Row, columns, encoders, row_description
from gpooler.errors import ConsoleSyntaxError, InvalidText, UndefinedColumn
from gpooler.wire.data_row import data_row
from gpooler.wire.text import decode, encode

SHAPE = columns("s: name i: size B: is_open")
ROWS: list[Row] = [("ann", 3, True), ("bob", None, False), ("a%", 10, True), (None, 1, False)]


def selected(text: str, *values: str | None) -> list[Cell]:
    """The names of the rows that ``SHOW t text`` has."""
    (show,) = parse(f"SHOW t {text}", {"t"})
    assert isinstance(show, Show)
    return [row[0] for row in compile_show(show, SHAPE, values).apply(ROWS)]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ["ann", "bob", "a%", None]),
        ("WHERE size > 2", ["ann", "a%"]),
        ("WHERE size >= 3 AND size < 10", ["ann"]),
        ("WHERE size <> 3", ["a%", None]),
        ("WHERE NOT size = 3", ["a%", None]),  # NULL is neither
        ("WHERE size = NULL", []),
        ("WHERE size IS NULL OR name = 'ann'", ["ann", "bob"]),
        ("WHERE size < 2.5", [None]),
        ("WHERE name LIKE 'a%'", ["ann", "a%"]),
        ("WHERE name LIKE '%'", ["ann", "bob", "a%"]),
        (r"WHERE name LIKE 'a\%'", ["a%"]),
        ("WHERE name LIKE '_o_'", ["bob"]),
        ("WHERE name ILIKE 'A_N'", ["ann"]),
        ("WHERE size LIKE '1%'", ["a%", None]),
        ("WHERE is_open = true", ["ann", "a%"]),
        ("WHERE is_open = 'off'", ["bob", None]),
        ("WHERE name IN ('ann', 'bob')", ["ann", "bob"]),
        ("ORDER BY size", [None, "ann", "a%", "bob"]),  # NULL last
        ("ORDER BY size DESC", ["bob", "a%", "ann", None]),
        ("ORDER BY is_open DESC, name", ["a%", "ann", "bob", None]),
        ("ORDER BY 2 LIMIT 2 OFFSET 1", ["ann", "a%"]),
        ("LIMIT 0", []),
        ("LIMIT ALL OFFSET 3", [None]),
    ],
)
def test_rows_that_are_wanted(text: str, names: list[Cell]) -> None:
    assert selected(text) == names


def test_parameters_take_the_place_of_constants() -> None:
    assert selected("WHERE size > $1 AND name LIKE $2 LIMIT $3", "2", "a%", "1") == ["ann"]
    assert selected("WHERE size > $1", None) == []
    (show,) = parse("SHOW t WHERE size > $2 OR NOT name IN ($1, $4)", {"t"})
    assert isinstance(show, Show)
    assert parameters_of(show) == 4


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("WHERE nam = 'x'", UndefinedColumn, 'column "nam" does not exist'),
        ("ORDER BY 4", ConsoleSyntaxError, "ORDER BY position 4"),
        ("WHERE size = 'x'", InvalidText, 'type integer: "x"'),
        ("WHERE is_open = 'x'", InvalidText, 'type boolean: "x"'),
        ("LIMIT -1", ConsoleSyntaxError, "must not be negative"),
    ],
)
def test_what_does_not_fit_the_table_is_refused(text: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        selected(text)


def test_the_nearest_column_is_suggested() -> None:
    with pytest.raises(UndefinedColumn) as caught:
        selected("WHERE nam = 'x'")
    assert caught.value.hint == 'Perhaps you meant "name".'


@given(st.text("ab%_", max_size=8), st.text("ab", max_size=8))
def test_like_is_what_it_is_in_sql(pattern: str, text: str) -> None:
    def matches(pattern: str, text: str) -> bool:
        if not pattern:
            return not text
        if pattern[0] == "%":
            return any(matches(pattern[1:], text[at:]) for at in range(len(text) + 1))
        return bool(text) and pattern[0] in ("_", text[0]) and matches(pattern[1:], text[1:])

    (show,) = parse(f"SHOW t WHERE name LIKE '{pattern}'", {"t"})
    assert isinstance(show, Show)
    found = list(compile_show(show, SHAPE).apply([(text, 1, True)]))
    assert bool(found) == matches(pattern, text)


def test_a_pattern_of_many_wildcards_takes_no_time() -> None:
    (show,) = parse(f"SHOW t WHERE name LIKE '{'%a' * 40}b'", {"t"})
    assert isinstance(show, Show)
    assert not list(compile_show(show, SHAPE).apply([("a" * 2000, 1, True)]))


def values(data: bytes) -> list[bytes | None]:
    """Those of a DataRow."""
    kind, length, count = struct.unpack_from("!cIH", data)
    assert (kind, length) == (b"D", len(data) - 1)
    found: list[bytes | None] = []
    at = 7
    for _ in range(count):
        (size,) = struct.unpack_from("!i", data, at)
        found.append(None if size < 0 else data[at + 4 : at + 4 + size])
        at += 4 + max(size, 0)
    assert at == len(data)
    return found


@given(st.integers(-(2**64), 2**64))
def test_numeric_in_binary_is_what_drivers_read(value: int) -> None:
    (sent,) = values(data_row((value,), encoders(columns("N: n"), [1])))
    assert NumericBinaryLoader(NUMERIC.oid).load(sent or b"") == value


def test_formats_of_each_column() -> None:
    shape = columns("i: a q: b f: c B: d s: e")
    row: Row = (1, 2, 0.5, True, "x")
    texts = [b"1", b"2", b"0.5", b"t", b"x"]
    assert values(data_row(row, encoders(shape, ()))) == texts
    assert values(data_row(row, encoders(shape, [0]))) == texts
    mixed = values(data_row(row, encoders(shape, [1, 0, 1, 1, 1])))
    assert mixed == [b"\0\0\0\x01", b"2", b"\x3f\xe0" + b"\0" * 6, b"\x01", b"x"]


@given(st.lists(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()))
def test_cells_go_as_their_text(cells: list[Any]) -> None:
    row = tuple(decode(cell) if isinstance(cell, bytes) else cell for cell in cells)
    truths = {None: None, True: b"t", False: b"f"}
    wanted = [truths[cell] if cell is None or isinstance(cell, bool) else encode(str(cell)) for cell in row]
    assert values(data_row(row, [None] * len(row))) == wanted


def test_a_row_is_as_wide_as_its_table() -> None:
    with pytest.raises(ValueError, match="2 cells for 1 columns"):
        data_row(("a", "b"), encoders(columns("s: a"), ()))
    assert values(data_row(("x" * 100_000, 2**80), [None, None])) == [
        b"x" * 100_000,
        b"1208925819614629174706176",
    ]


def test_row_description_names_types() -> None:
    body = row_description(columns("s: a b: c"), [1])
    assert body[:1] == b"T"
    assert b"a\0" + b"\0" * 6 + b"\0\0\0\x19\xff\xff\xff\xff\xff\xff\0\x01" in body
    assert b"c\0" + b"\0" * 6 + bytes((0, 0, 0, BYTEA.oid)) in body


def test_null_has_no_bytes() -> None:
    assert data_row((None,), encoders(columns("s: a"), ())) == b"D\0\0\0\x0a\0\x01\xff\xff\xff\xff"
