"""Takes the text of a console command apart: words, names, strings, numbers, signs. Pure.

The rules are PostgreSQL's (chapter "Lexical Structure"): comments, doubled quotes, escape strings.
"""

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

from gpooler.errors import ConsoleSyntaxError


class Kind(Enum):
    """What a token is."""

    WORD = "word"
    NAME = "name"  # in double quotes
    STRING = "string"
    NUMBER = "number"
    PARAMETER = "parameter"
    SIGN = "sign"
    END = "end"


@dataclass(frozen=True, slots=True)
class Token:
    """``value`` without quotes and escapes; ``text`` as it was written."""

    kind: Kind
    value: str
    text: str

    def is_sign(self, sign: str) -> bool:
        """Whether it is that sign."""
        return self.kind is Kind.SIGN and self.value == sign


_TOKEN: Final = re.compile(
    r"""
    (?P<space>\s+|--[^\n]*)
    | (?P<comment>/\*)
    | (?P<escape>[eE]'(?:[^'\\]|''|\\.)*')
    | (?P<string>'(?:[^']|'')*')
    | (?P<name>"(?:[^"]|"")*")
    | (?P<parameter>\$[0-9]{1,5})
    | (?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)
    | (?P<word>[^\W\d][\w$]*)
    | (?P<sign><>|!=|<=|>=|::|[-+*/<>=~!@\#%^&|`?(),;.\[\]:])
    """,
    re.VERBOSE | re.DOTALL,
)
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


def statements(text: str) -> list[list[Token]]:
    """The tokens of each statement of ``text``, empty ones left out. Raises ConsoleSyntaxError."""
    found: list[list[Token]] = [[]]
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ConsoleSyntaxError(_unreadable(text[at:]))
        at = match.end()
        kind, written = match.lastgroup, match[0]
        if kind == "comment":
            at = _comment_end(text, at)
        elif written == ";":
            found.append([])
        elif kind is not None and kind != "space":
            found[-1].append(_token(kind, written))
    return [tokens for tokens in found if tokens]


def _token(kind: str, written: str) -> Token:
    if kind == "string":
        return Token(Kind.STRING, written[1:-1].replace("''", "'"), written)
    if kind == "escape":
        value = re.sub(r"\\(.)|''", _unescape, written[2:-1], flags=re.DOTALL)
        return Token(Kind.STRING, value, written)
    if kind == "name":
        return Token(Kind.NAME, written[1:-1].replace('""', '"'), written)
    if kind == "parameter":
        return Token(Kind.PARAMETER, written[1:], written)
    return Token(Kind(kind), written, written)


def _unescape(match: re.Match[str]) -> str:
    return "'" if match[1] is None else _ESCAPES.get(match[1], match[1])


def _comment_end(text: str, at: int) -> int:
    """Behind a comment that began before ``at``; they nest."""
    depth = 1
    for match in re.compile(r"/\*|\*/").finditer(text, at):
        depth += 1 if match[0] == "/*" else -1
        if not depth:
            return match.end()
    raise ConsoleSyntaxError("unterminated comment")


def _unreadable(rest: str) -> str:
    if rest[:1] in "'\"" or rest[:2].lower() == "e'":
        return "unterminated quoted " + ("identifier" if rest.startswith('"') else "string")
    return f'syntax error at or near "{rest[:1]}"'
