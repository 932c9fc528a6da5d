"""Finds the line of each key of a TOML document, which ``tomllib`` does not tell.

The text is first read by ``tomllib``, so the scanner need not judge it: it walks over keys, strings and
brackets as TOML 1.0 lays them out. Where it meets text it does not understand it stops, and what it
found so far stays.
"""

import re
import tomllib
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Final

from gpooler.config.problems import BARE_KEY, KeyPath

BLANK: Final = re.compile(r"[ \t]*")
SPACE: Final = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")  # what may stand between the elements of an array
BARE_VALUE: Final = re.compile(r"[^,\]}#\n]*")
BASIC: Final = re.compile(r'"(?:[^"\\\n]|\\.)*"')
LITERAL: Final = re.compile(r"'[^'\n]*'")
MULTI_BASIC: Final = re.compile(r'"""(?:[^"\\]|\\.|"{1,2}(?!"))*"{3,5}', re.DOTALL)
MULTI_LITERAL: Final = re.compile(r"'''(?:[^']|'{1,2}(?!'))*'{3,5}")
STRINGS: Final = (MULTI_BASIC, MULTI_LITERAL, BASIC, LITERAL)


class _Lost(Exception):
    """The text is not what a TOML document holds here."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a key stands: ``offset`` in characters from the start, ``line`` from 1."""

    line: int
    offset: int


@dataclass(slots=True)
class Places:
    """What the scanner found. ``tables`` are the paths that have a header of their own."""

    keys: dict[KeyPath, Place] = field(default_factory=dict)
    tables: set[KeyPath] = field(default_factory=set)
    twice: list[tuple[KeyPath, Place, Place]] = field(default_factory=list)  # path, first, second


def find_places(text: str) -> Places:
    """The places of all keys, tables and array elements, by key path as ``tomllib`` nests them."""
    scanner = _Scanner(text.replace("\r\n", "\n"))
    try:
        scanner.document()
    except (_Lost, RecursionError):
        pass
    return scanner.places


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.places = Places()
        self._lines = [0, *(match.end() for match in re.finditer("\n", text))]
        self._elements: dict[KeyPath, int] = {}  # array of tables -> elements so far
        self._values: set[KeyPath] = set()

    def document(self) -> None:
        table: KeyPath = ()
        while self._skip(SPACE) < len(self.text):
            if self.text.startswith("[", self.at):
                table = self._header()
            else:
                self._key_value(table)
            self._skip(BLANK)

    def _header(self) -> KeyPath:
        start = self.at
        is_array = self.text.startswith("[[", start)
        self.at += 2 if is_array else 1
        parts = self._key()
        self._expect("]]" if is_array else "]")
        path: KeyPath = ()
        for part in parts[:-1]:
            path = self._last_element((*path, part))
            self._note(path, start, is_own=False)
        path = (*path, parts[-1])
        if is_array:
            self._note(path, start, is_own=False)
            number = self._elements.get(path, 0)
            self._elements[path] = number + 1
            path = (*path, number)
        if path in self.places.tables or path in self._values:
            self.places.twice.append((path, self.places.keys[path], self._place(start)))
        self.places.tables.add(path)
        self._note(path, start, is_own=True)
        return path

    def _last_element(self, path: KeyPath) -> KeyPath:
        """``path`` itself, or the newest element when it is an array of tables."""
        return (*path, self._elements[path] - 1) if path in self._elements else path

    def _key_value(self, table: KeyPath) -> None:
        start = self.at
        path = table
        parts = self._key()
        self._expect("=")
        for part in parts:
            path = (*path, part)
            if path == (*table, *parts) and path in self.places.keys:
                self.places.twice.append((path, self.places.keys[path], self._place(start)))
            self._note(path, start, is_own=False)
        self._values.add(path)
        self._skip(BLANK)
        self._value(path)

    def _value(self, path: KeyPath) -> None:
        if self.text.startswith("[", self.at):
            self._array(path)
        elif self.text.startswith("{", self.at):
            self._inline_table(path)
        elif self.text[self.at : self.at + 1] in ("'", '"'):
            self._string()
        elif not self._match(BARE_VALUE).strip():
            raise _Lost

    def _array(self, path: KeyPath) -> None:
        self._expect("[")
        number = 0
        while self._skip(SPACE) < len(self.text) and not self.text.startswith("]", self.at):
            self._note((*path, number), self.at, is_own=False)
            self._value((*path, number))
            number += 1
            self._skip(SPACE)
            if not self.text.startswith("]", self.at):
                self._expect(",")
        self._expect("]")

    def _inline_table(self, path: KeyPath) -> None:
        self._expect("{")
        while self._skip(BLANK) < len(self.text) and not self.text.startswith("}", self.at):
            self._key_value(path)
            self._skip(BLANK)
            if not self.text.startswith("}", self.at):
                self._expect(",")
        self._expect("}")

    def _key(self) -> tuple[str, ...]:
        parts = []
        while True:
            self._skip(BLANK)
            if self.text[self.at : self.at + 1] in ("'", '"'):
                token = self._match(BASIC if self.text[self.at] == '"' else LITERAL)
                parts.append(token[1:-1] if "\\" not in token else _decode(token))
            else:
                parts.append(self._match(BARE_KEY))
            self._skip(BLANK)
            if not self.text.startswith(".", self.at):
                return tuple(parts)
            self.at += 1

    def _string(self) -> None:
        for pattern in STRINGS:
            match = pattern.match(self.text, self.at)
            if match:
                self.at = match.end()
                return
        raise _Lost

    def _match(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        if match is None:
            raise _Lost
        self.at = match.end()
        return match[0]

    def _skip(self, pattern: re.Pattern[str]) -> int:
        self._match(pattern)
        return self.at

    def _expect(self, token: str) -> None:
        self._skip(BLANK)
        if not self.text.startswith(token, self.at):
            raise _Lost
        self.at += len(token)

    def _place(self, offset: int) -> Place:
        return Place(bisect_right(self._lines, offset), offset)

    def _note(self, path: KeyPath, offset: int, *, is_own: bool) -> None:
        """Keep the first place of ``path``; a header of its own replaces one that was implied."""
        if is_own or path not in self.places.keys:
            self.places.keys[path] = self._place(offset)


def _decode(token: str) -> str:
    try:
        return str(tomllib.loads(f"{token} = 0").popitem()[0])
    except tomllib.TOMLDecodeError:
        raise _Lost from None
