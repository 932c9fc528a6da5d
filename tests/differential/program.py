"""What one client does: steps of messages, each sent in one write, and how its answer ends.

A program prints as the Python that makes it: what a failing run shows can be pasted into test_found.py.
"""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from tests.harness import client

EXTENDED: Final = frozenset({"parse", "bind", "describe", "execute", "close"})


@dataclass(frozen=True, slots=True)
class Part:
    """One frontend message: the name of what makes it, and its arguments."""

    name: str
    arguments: tuple[object, ...] = ()

    def __repr__(self) -> str:
        if self.name.isupper():
            return self.name
        return f"{self.name}({', '.join(map(_literal, self.arguments))})"

    @property
    def data(self) -> bytes:
        """Its bytes."""
        constant = {"SYNC": client.SYNC, "FLUSH": client.FLUSH, "COPY_DONE": client.COPY_DONE}
        if self.name in constant:
            return constant[self.name]
        if self.name == "copy_fail":
            return client.message(b"f", client.text(str(self.arguments[0])))
        if self.name == "call":
            return _call(*self.arguments)  # type: ignore[arg-type]
        made: bytes = getattr(client, self.name)(*self.arguments)
        return made

    @property
    def sql(self) -> str:
        """The text of a Query or Parse, else nothing."""
        return str(self.arguments[0]) if self.name in ("query", "parse") else ""


SYNC: Final = Part("SYNC")
FLUSH: Final = Part("FLUSH")
COPY_DONE: Final = Part("COPY_DONE")


def query(sql: str) -> Part:
    """Query."""
    return Part("query", (sql,))


def parse(sql: str, name: str = "", types: tuple[int, ...] = ()) -> Part:
    """Parse."""
    return Part("parse", (sql, name, types) if types else (sql, name) if name else (sql,))


def bind(name: str = "", values: tuple[bytes | None, ...] = (), portal: str = "") -> Part:
    """Bind with parameters and results as text."""
    arguments = (name, values, portal) if portal else (name, values) if values else (name,) if name else ()
    return Part("bind", arguments)


def execute(portal: str = "", rows: int = 0) -> Part:
    """Execute; 0 rows means all."""
    return Part("execute", (portal, rows) if rows else (portal,) if portal else ())


def describe(kind: str, name: str = "") -> Part:
    """Describe a statement (``S``) or portal (``P``)."""
    return Part("describe", (kind, name) if name else (kind,))


def close(kind: str, name: str = "") -> Part:
    """Close a statement (``S``) or portal (``P``)."""
    return Part("close", (kind, name) if name else (kind,))


def copy_data(data: bytes) -> Part:
    """CopyData."""
    return Part("copy_data", (data,))


def copy_fail(text: str) -> Part:
    """CopyFail."""
    return Part("copy_fail", (text,))


def call(function: int, *values: bytes) -> Part:
    """FunctionCall with arguments and result as text."""
    return Part("call", (function, *values))


def _literal(value: object) -> str:
    """As repr(), long runs of the letter x as a product."""
    text = repr(value)
    if not isinstance(value, str | bytes):
        return text
    prefix, quote = ("b" if isinstance(value, bytes) else ""), text[-1]
    return re.sub("x{200,}", lambda run: f"{quote} + {prefix}'x' * {len(run[0])} + {prefix}{quote}", text)


def _call(function: int, *values: bytes) -> bytes:
    arguments = b"".join(struct.pack("!i", len(value)) + value for value in values)
    return client.message(
        b"F", struct.pack("!Ihh", function, 0, len(values)) + arguments + struct.pack("!h", 0)
    )


Step = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """A session: its startup parameters, its steps, and how it ends.

    ``last`` is sent at the end, and nobody waits for its answer. With ``has_end`` a ROLLBACK comes before
    it; else the client leaves as it is, which nobody sees but the clients after it. What it sends goes out
    in pieces of ``piece`` bytes (0: each step in one).
    """

    steps: tuple[Step, ...]
    startup: Mapping[str, str] = field(default_factory=dict)
    last: Step = ()
    piece: int = 0
    has_end: bool = True
    has_terminate: bool = True

    def __str__(self) -> str:
        lines = [f"        {_shown(step)}," for step in self.steps]
        rest = {
            "startup": repr(dict(self.startup)) if self.startup else "",
            "last": _shown(self.last) if self.last else "",
            "piece": str(self.piece or ""),
            "has_end": "" if self.has_end else "False",
            "has_terminate": "" if self.has_terminate else "False",
        }
        lines = ["Program(", "    (", *lines, "    ),"]
        return "\n".join([*lines, *(f"    {name}={text}," for name, text in rest.items() if text), ")"])


def _shown(step: Step) -> str:
    return f"({', '.join(map(repr, step))},)"


# -- where an answer ends ----------------------------------------------------------------------------

# Behind whatever came before, PostgreSQL answers this with so many CloseComplete and a ReadyForQuery, in any
# state of a transaction, and it changes nothing but the end of a group. No program closes so many in a row.
CLOSES: Final = 4
MARKER: Final = client.COPY_DONE + client.SYNC + client.close("P", "no portal") * CLOSES + client.SYNC
# Ends a program: its answer is the last row of all.
END: Final = client.COPY_DONE + client.SYNC + client.query("ROLLBACK") + client.query("SELECT 'the end'")
LAST_ROW: Final = b"\0\1\0\0\0\7the end"


def readies(step: Step) -> int | None:
    """How many ReadyForQuery answer a step, None when that depends on what happens in it."""
    count = 0
    is_open = is_copying = False
    for part in step:
        if part.name in EXTENDED:
            if is_copying or "FROM STDIN" in part.sql:
                return None
            is_open = True
        elif part.name in ("query", "call"):
            if is_open or is_copying:
                return None
            count += 1
            is_copying = "FROM STDIN" in part.sql
        elif part.name == "SYNC":
            if is_copying:
                return None
            is_open = False
            count += 1
        elif part.name in ("COPY_DONE", "copy_fail"):
            is_copying = False
    return None if is_open or is_copying or not count else count


def ends_in_flush(step: Step) -> bool:
    """Whether a step is one group that a Flush ends: its answer ends with that of its only Execute."""
    names = [part.name for part in step]
    return (
        names[-2:] == ["execute", "FLUSH"]
        and names.count("execute") == 1
        and EXTENDED.issuperset(names[:-1])
        and not any("FROM STDIN" in part.sql for part in step)
    )
