"""Parses host-based rules in the syntax of ``pg_hba.conf``; the files are read by the caller.

Follows "The pg_hba.conf File" of PostgreSQL's documentation. Every mistake is found, none hides another.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Final, Protocol

from gpooler.auth.hba import (
    ALL,
    LOCAL,
    METHODS,
    SAMEHOST,
    SAMENET,
    TAKES,
    Address,
    Entry,
    Hba,
    Method,
    Network,
    Token,
)
from gpooler.auth.host_name import host_name

INCLUDES: Final = ("include", "include_if_exists", "include_dir")
INCLUDE_DEPTH_MOST: Final = 10  # as PostgreSQL's CONF_FILE_MAX_DEPTH
LINES_MOST: Final = 100_000  # of all files together: a mistaken include must not fill the memory
# Methods of PostgreSQL that gpooler does not have.
UNKNOWN_HERE: Final = ("bsd", "gss", "ident", "oauth", "radius", "sspi")


@dataclass(frozen=True, slots=True)
class HbaProblem:
    """What is wrong in a file, and where."""

    file: str
    line: int | None  # None: the whole file
    text: str


class Files(Protocol):
    """Where the files are read. All paths are absolute or relative to the first file's directory."""

    def read(self, path: str) -> str:
        """The text of a file. Raises FileNotFoundError, and ValueError for anything else."""

    def names(self, path: str) -> Sequence[str]:
        """The paths of the ``*.conf`` files in a directory, sorted. Raises ValueError."""

    def join(self, file: str, name: str) -> str:
        """``name`` as ``file`` means it."""


def parse(path: str, files: Files) -> tuple[Hba, tuple[HbaProblem, ...]]:
    """The lines of ``path`` and all it includes, and everything that is wrong with them."""
    reader = _Reader(files)
    reader.add_file(path, ())
    if not reader.entries and not reader.problems:
        reader.problems.append(HbaProblem(path, None, "holds no line: nobody could log in"))
    return Hba(tuple(reader.entries)), tuple(reader.problems)


class _Wrong(ValueError):
    """Why a line cannot be taken."""


Field = list[Token]


class _Reader:
    def __init__(self, files: Files) -> None:
        self._files = files
        self._lines_left = LINES_MOST
        self.entries: list[Entry] = []
        self.problems: list[HbaProblem] = []

    def add_file(self, path: str, outer: tuple[str, ...], *, is_optional: bool = False) -> None:
        """Read ``path``; ``outer`` are the files around it. Raises _Wrong when it cannot be read."""
        try:
            text = self._text(path, outer)
        except FileNotFoundError:
            if is_optional:
                return
            self._fail(path, outer, f"cannot read {path}: it is not there")
            return
        except ValueError as error:
            self._fail(path, outer, str(error))
            return
        for number, line in logical_lines(text):
            try:
                self._add_line(path, number, list(fields(line)), outer)
            except ValueError as wrong:
                self.problems.append(HbaProblem(path, number, str(wrong)))

    def _fail(self, path: str, outer: tuple[str, ...], text: str) -> None:
        """A file that cannot be read is the fault of the line that names it."""
        if outer:
            raise _Wrong(text)
        self.problems.append(HbaProblem(path, None, text))

    def _text(self, path: str, outer: tuple[str, ...]) -> str:
        if path in outer:
            raise _Wrong(f"{path} includes itself")
        if len(outer) > INCLUDE_DEPTH_MOST:
            raise _Wrong(f"includes are nested deeper than {INCLUDE_DEPTH_MOST}")
        text = self._files.read(path)
        self._lines_left -= text.count("\n") + 1
        if self._lines_left < 0:
            raise _Wrong(f"more than {LINES_MOST} lines, includes counted")
        return text

    def _add_line(self, file: str, number: int, line: list[Field], outer: tuple[str, ...]) -> None:
        if not line:
            return
        word = line[0][0].text
        if word in INCLUDES and not line[0][0].is_quoted:
            self._include(file, word, line, (*outer, file))
            return
        self.entries.append(self._entry(file, number, line, (*outer, file)))

    def _include(self, file: str, word: str, line: list[Field], outer: tuple[str, ...]) -> None:
        if len(line) != 2 or len(line[1]) != 1:
            raise _Wrong(f'"{word}" needs one name')
        path = self._files.join(file, line[1][0].text)
        if word != "include_dir":
            self.add_file(path, outer, is_optional=word == "include_if_exists")
            return
        for name in self._files.names(path):
            self.add_file(name, outer)

    def _entry(self, file: str, number: int, line: list[Field], outer: tuple[str, ...]) -> Entry:
        kind = _only(line[0], "type")
        if kind not in TAKES:
            raise _Wrong(f'"{kind}" is no connection type: {", ".join(TAKES)}')
        needed = ("databases", "users", "method") if kind == LOCAL else _HOST_COLUMNS
        if len(line) <= len(needed):
            raise _Wrong(f"ends before the {needed[len(line) - 1]}")
        databases = self._names(file, line[1], outer, _check_database)
        users = self._names(file, line[2], outer, _check_user)
        networks: tuple[Network, ...] = ()
        where, host, rest = LOCAL, "", line[3:]
        if kind != LOCAL:
            networks, where, host, rest = _address(line[3:])
        name = _only(rest[0], "method")
        if len(rest) > 1:
            raise _Wrong(f'options of a method are not supported: "{rest[1][0].text}"')
        return Entry(file, number, kind, databases, users, networks, where, host, _method(name, kind), name)

    def _names(
        self, file: str, field: Field, outer: tuple[str, ...], check: Callable[[Token], None]
    ) -> tuple[Token, ...]:
        """The names of a list, those in its ``@file`` too."""
        names: list[Token] = []
        for token in field:
            if not token.is_quoted and token.text.startswith("@") and len(token.text) > 1:
                path = self._files.join(file, token.text[1:])
                try:
                    text = self._text(path, outer)
                except FileNotFoundError:
                    raise _Wrong(f"cannot read {path}: it is not there") from None
                for _, line in logical_lines(text):
                    for inner in fields(line):
                        names += self._names(path, inner, (*outer, path), check)
            else:
                check(token)
                names.append(token)
        return tuple(names)


_HOST_COLUMNS: Final = ("databases", "users", "address", "method")


def _only(field: Field, what: str) -> str:
    if len(field) > 1:
        raise _Wrong(f"more than one {what}")
    return field[0].text


def _check_database(token: Token) -> None:
    if token.is_word("samerole") or token.is_word("samegroup"):
        raise _Wrong(
            f'"{token.text}" is not supported: roles are known to the server alone; name the databases'
        )
    _check_no_pattern(token)


def _check_user(token: Token) -> None:
    if not token.is_quoted and token.text.startswith("+"):
        raise _Wrong(f'"{token.text}" is not supported: roles are known to the server alone; name the users')
    _check_no_pattern(token)


def _check_no_pattern(token: Token) -> None:
    if not token.is_quoted and token.text.startswith("/"):
        raise _Wrong(f'regular expressions are not supported: "{token.text}"')


def _method(name: str, kind: str) -> Method:
    method = METHODS.get(name)
    if method is None:
        known = ", ".join(METHODS)
        if name in UNKNOWN_HERE:
            raise _Wrong(f'method "{name}" is not supported; there are {known}')
        raise _Wrong(f'"{name}" is no method; there are {known}')
    if kind not in method.lines:
        raise _Wrong(f'method "{name}" has a place in {", ".join(method.lines)} lines only')
    return method


def _address(columns: list[Field]) -> tuple[tuple[Network, ...], str, str, list[Field]]:
    """Networks, keyword, host name and the columns behind the address."""
    text, is_quoted = _only(columns[0], "address"), columns[0][0].is_quoted
    if text in (ALL, SAMEHOST, SAMENET) and not is_quoted:
        return (), text, "", columns[1:]
    if "/" in text:
        prefix = text.partition("/")[2]
        if not prefix.isascii() or not prefix.isdecimal():
            raise _Wrong(f'"{text}" is no network')
        try:
            return (ip_network(text, strict=False),), "", "", columns[1:]
        except ValueError:
            raise _Wrong(f'"{text}" is no network') from None
    try:
        address = ip_address(text)
    except ValueError:
        try:
            return (), "", host_name(text), columns[1:]
        except ValueError as error:
            raise _Wrong(f'"{text}" is no address and no host name: {error}') from None
    if len(columns) < 3:
        raise _Wrong(f'"{text}" needs a mask: write "{text}/{address.max_prefixlen}" for this one address')
    return (_masked(address, _only(columns[1], "mask")),), "", "", columns[2:]


def _masked(address: Address, text: str) -> Network:
    try:
        mask = ip_address(text)
    except ValueError:
        raise _Wrong(f'"{text}" is no mask') from None
    if mask.version != address.version:
        raise _Wrong(f"address {address} and mask {mask} do not fit")
    ones = int(mask).bit_count()
    if int(mask) != ((1 << ones) - 1) << (mask.max_prefixlen - ones):
        raise _Wrong(f"the mask {mask} has a gap")
    return ip_network(f"{address}/{ones}", strict=False)


def logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with the number of their first part; a backslash at the end joins a line and the next."""
    joined, first = "", 0
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        first = first or number
        if line.endswith("\\"):
            joined += line[:-1]
            continue
        yield first, joined + line
        joined, first = "", 0
    if first:
        yield first, joined


def fields(line: str) -> Iterator[Field]:
    """The columns of a line, each a list of names: a comma at the end of a name says that more follow."""
    at = 0
    while True:
        found: Field = []
        has_more = True
        while has_more:
            token, has_more, at = _next_token(line, at)
            if token is not None:
                found.append(token)
        if not found:
            return
        yield found


def _next_token(line: str, at: int) -> tuple[Token | None, bool, int]:
    """A name, whether a comma follows at once, and where to go on; None at the end or at a comment.

    As ``next_token`` of PostgreSQL, but a quote that is not closed is refused.
    """
    while at < len(line) and (line[at].isspace() or line[at] == ","):
        at += 1
    start, text, in_quotes = at, "", False
    while at < len(line):
        char = line[at]
        if not in_quotes and (char.isspace() or char in ",#"):
            break
        at += 1
        if char != '"':
            text += char
        elif in_quotes and line[at : at + 1] == '"':
            text += char
            at += 1
        else:
            in_quotes = not in_quotes
    if in_quotes:
        raise _Wrong("a quote is not closed")
    if at == start:
        return None, False, at
    return Token(text, line[start] == '"'), line[at : at + 1] == ",", at
