"""Where each key of a TOML document stands, compared with what ``tomllib`` reads."""

import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpooler.config.scan import find_places

NASTY_TEXTS = [
    '"a # b"',
    "'[x]'",
    '"\\" = ]"',
    '"""\n[t]\n  k = 1\n"""',
    "'''\n# {\n'''",
    '""""x"""""',
    '""',
    "''''''",
]
BARE_VALUES = ["true", "1979-05-27 07:32:00", "1e5", "0x1f", "inf", "[]", "{}"]


class Writer:
    """Writes a random valid document in which every key and every number is used once."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.count = 0

    def one(self, items: list[str]) -> str:
        return self.draw(st.sampled_from(items))

    def unique(self) -> str:
        self.count += 1
        return f"{self.count:05d}"

    def key(self) -> str:
        name = f"k{self.unique()}"
        return self.one([name, f'"{name}"', f"'{name}'", f'"\\u006b{name[1:]}"'])

    def value(self, depth: int) -> str:
        kind = self.one(["number", "text", "bare", "array", "table"] if depth < 3 else ["number", "text"])
        if kind == "text":
            return self.one(NASTY_TEXTS)
        if kind == "bare":
            return self.one(BARE_VALUES)
        if kind == "array":
            space = self.one(["", " ", "\n", " # ]\n\n"])
            items = [self.value(depth + 1) for _ in range(self.draw(st.integers(0, 3)))]
            comma = self.one(["", ","]) if items else ""
            return "[" + space + f",{space}".join(items) + space + comma + space + "]"
        if kind == "table":
            items = [self.pair(depth + 1) for _ in range(self.draw(st.integers(0, 3)))]
            return "{ " + " , ".join(items) + " }"
        return f"9{self.unique()}"

    def pair(self, depth: int) -> str:
        dots = self.one([".", " . ", "\t."])
        parts = [self.key() for _ in range(self.draw(st.integers(1, 3)))]
        return dots.join(parts) + self.one(["=", " = ", "\t=\t"]) + self.value(depth)

    def body(self) -> str:
        lines = ""
        for _ in range(self.draw(st.integers(0, 3))):
            indent, tail = self.one(["", "  ", "\n", "# [c]\n"]), self.one(["", " # x", "  "])
            lines += indent + self.pair(0) + tail + "\n"
        return lines

    def document(self) -> str:
        text = self.body()
        tables: list[str] = []
        arrays: list[str] = []
        for _ in range(self.draw(st.integers(0, 6))):
            # Below the newest array only: an older one's elements may be closed by a table.
            outer = self.one(["", *(f"{name}." for name in (tables + arrays)[-2:])])
            match self.one(["table", "array", "again"]):
                case "table":
                    tables.append(outer + self.key() + self.one(["", ".x.y"]))
                    text += f"[ {tables[-1]} ] # t\n"
                case "array":
                    arrays.append(outer + self.key())
                    text += f"[[{arrays[-1]}]]\n"
                case _ if arrays:
                    text += f"[[ {self.one(arrays)} ]]\n"
            text += self.body()
        return text


@st.composite
def documents(draw: st.DrawFn) -> str:
    text = Writer(draw).document()
    return text.replace("\n", draw(st.sampled_from(["\n", "\r\n"])))


def paths(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    items: Any = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, item in items:
        yield (*path, key), item
        yield from paths(item, (*path, key))


@given(documents())
def test_every_key_has_the_line_it_stands_in(text: str) -> None:
    document = tomllib.loads(text)
    places = find_places(text)
    assert places.twice == []
    text = text.replace("\r\n", "\n")
    lines = text.split("\n")
    for path, value in paths(document):
        place = places.keys[path]
        assert text.count("\n", 0, place.offset) + 1 == place.line
        name = path[-1]
        if isinstance(name, str):
            assert name.removeprefix("k") in lines[place.line - 1]
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 900_000:
            assert text.startswith(str(value), place.offset)
    assert set(places.keys) == {path for path, _ in paths(document)}


@given(st.text(alphabet="[]{}=.,'\"\\#\n ab1\r\t", max_size=60))
def test_any_text_is_scanned_to_an_end(text: str) -> None:
    places = find_places(text)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    assert set(places.keys) == {path for path, _ in paths(document)}


@pytest.mark.parametrize(
    ("text", "path", "first", "second"),
    [
        ("a = 1\n\na = 2", ("a",), 1, 3),
        ("[a]\n[b]\n[a]", ("a",), 1, 3),
        ("[a]\nx.y = 1\nx.y = 2", ("a", "x", "y"), 2, 3),
        ("a = { b = 1,\tb = 2 }", ("a", "b"), 1, 1),
        ('a = 1\n"\\u0061" = 2', ("a",), 1, 2),
        ("[[a]]\nb = 1\n[[a]]\nb = 1\nb = 2", ("a", 1, "b"), 4, 5),
    ],
)
def test_what_stands_twice_is_found_with_both_lines(
    text: str, path: tuple[str | int, ...], first: int, second: int
) -> None:
    with pytest.raises(tomllib.TOMLDecodeError):
        tomllib.loads(text)
    [(found, one, two)] = find_places(text).twice
    assert (found, one.line, two.line) == (path, first, second)


def test_a_header_of_its_own_is_the_place_of_a_table_implied_before() -> None:
    places = find_places("[a.b]\n\n[a]\n")
    assert places.keys[("a",)].line == 3
    assert places.keys[("a", "b")].line == 1
