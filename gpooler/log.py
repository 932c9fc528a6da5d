"""Log lines: what is known about a record, and how it becomes one line. No I/O, no clock.

``log_format`` has the flags of Odyssey's reference (chapter 3) or is the word ``json``. A record is
one line whatever it carries: control characters and line breaks of users' values are escaped.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

Level = Literal["debug", "info", "error", "fatal"]

MAX_MESSAGE: Final = 8192
"""Characters of a message that are kept, so that a queue of query texts stays bounded in memory."""

_UNPRINTABLE: Final = re.compile(
    r"[\x00-\x1f\x7f-\xa0\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_TSKV: Final = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r", "\0": "\\0", "=": "\\="})
_SHORT: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


@dataclass(slots=True)
class LogContext:
    """Whom a record is about; filled in as it becomes known. An empty value prints ``none``."""

    client: str = ""  # client id
    server: str = ""  # server id
    user: str = ""
    database: str = ""
    client_host: str = ""
    client_port: int = 0
    server_host: str = ""
    external_id: str = ""  # given by an authentication agent
    facts: Mapping[str, object] | None = None  # what a line in JSON has under keys of its own besides


NOBODY: Final = LogContext()


Formatter = Callable[[float, Level, str, str, LogContext], str]
"""Makes a line of: seconds since the epoch, level, context, message, whom it is about."""


@dataclass(frozen=True, slots=True)
class LogSettings:
    """The ``log_`` options that say how lines look and where they go."""

    format: str
    file: str | None = None
    is_stdout: bool = True
    is_syslog: bool = False
    syslog_ident: str = "gpooler"
    syslog_facility: str = "daemon"
    is_async: bool = True
    queue_depth: int = 30000
    is_debug: bool = False


def client_id(number: int) -> str:
    """The id of a client: ``c`` and 12 hex digits. ``number`` is below 2**48."""
    return f"c{number:012x}"


def parse_client_id(text: str) -> int | None:
    """The number behind a client's id; None when ``text`` is none."""
    return int(text[1:], 16) if re.fullmatch("c[0-9a-f]{12}", text) else None


def server_id(number: int) -> str:
    """The id of a server: ``s`` and 12 hex digits. ``number`` is below 2**48."""
    return f"s{number:012x}"


def escape(text: str) -> str:
    """``text`` with everything that could break or disguise a line written as an escape."""
    return text if text.isprintable() else _UNPRINTABLE.sub(_escape_one, text)


def compile_format(template: str, *, pid: int) -> Formatter:
    """A function that makes lines, without the newline. Raises ValueError on an unknown flag.

    It is made as one f-string, since two lines of each login go through it.
    """
    if template == "json":
        return _json_formatter(pid)
    pieces: list[str] = []
    at = 0
    while at < len(template):
        char = template[at]
        following = template[at + 1 : at + 2]
        at += 1
        if char == "%":
            at += 1
            if following == "%":
                pieces.append("%")
            elif following in _FLAGS:
                pieces.append(_FLAGS[following])
            else:
                raise ValueError(f'log_format: unknown flag "%{following}"')
        elif char == "\\" and following in _ESCAPES:
            at += 1
            pieces.append(_literal(_ESCAPES[following]))
        else:
            pieces.append(_literal(char))
    while pieces and pieces[-1] == _literal("\n"):
        pieces.pop()  # a newline is always added: those at the end are not doubled
    names = {
        "none": "none",
        "pid": pid,
        "thread": threading.get_native_id(),
        "iso": _iso_seconds(),
        "most": MAX_MESSAGE,
        "plain": _plain,
        "shown": _shown,
        "tskv": _tskv,
    }
    formatter: Formatter = eval(f"lambda now, level, context, message, who: f'{''.join(pieces)}'", names)
    return formatter


def _literal(char: str) -> str:
    """A character as it stands in an f-string between single quotes."""
    return char * 2 if char in "{}" else f"\\x{ord(char):02x}" if char in "'\\\n\r\t" else char


class Logger:
    """Writes records. Cheap where the level is off; never raises for what a message contains."""

    __slots__ = ("_flush", "_formatter", "_now", "_write", "is_debug")

    def __init__(
        self,
        formatter: Formatter,
        write: Callable[[Level, str], None],
        now: Callable[[], float],
        *,
        is_debug: bool,
        flush: Callable[[], None] = lambda: None,
    ) -> None:
        """``write`` takes a level and a line; ``flush`` returns when all lines are out, or soon after."""
        self._formatter = formatter
        self._write = write
        self._now = now
        self._flush = flush
        self.is_debug = is_debug

    def configure(self, formatter: Formatter, *, is_debug: bool) -> None:
        """From the next line on."""
        self._formatter = formatter
        self.is_debug = is_debug

    def debug(
        self, message: str, *, context: str = "main", who: LogContext = NOBODY, is_wanted: bool = False
    ) -> None:
        """Protocol detail; nothing without ``log_debug``, unless ``is_wanted``: that of a rule."""
        if self.is_debug or is_wanted:
            self._write("debug", self._formatter(self._now(), "debug", context, message, who))

    def info(self, message: str, *, context: str = "main", who: LogContext = NOBODY) -> None:
        """What happens in the normal run."""
        self._write("info", self._formatter(self._now(), "info", context, message, who))

    def error(self, message: str, *, context: str = "main", who: LogContext = NOBODY) -> None:
        """Something failed and the process goes on."""
        self._write("error", self._formatter(self._now(), "error", context, message, who))

    def fatal(self, message: str, *, context: str = "main", who: LogContext = NOBODY) -> None:
        """The process ends. Waits until the line is out."""
        self._write("fatal", self._formatter(self._now(), "fatal", context, message, who))
        self._flush()


def _escape_one(match: re.Match[str]) -> str:
    char = match[0]
    code = ord(char)
    return _SHORT.get(char) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def _shown(value: str) -> str:
    return escape(value) or "none"


def _plain(message: str) -> str:
    return escape(_cut(message))


def _tskv(message: str) -> str:
    return escape(_cut(message).translate(_TSKV))


def _cut(message: str) -> str:
    if len(message) <= MAX_MESSAGE:
        return message
    return f"{message[:MAX_MESSAGE]}... ({len(message) - MAX_MESSAGE} more characters)"


def _iso_seconds() -> Callable[[float], str]:
    """ISO-8601 of whole seconds, UTC, without the zone; formatted once a second."""
    cached_second = -1
    cached_text = ""

    def iso(now: float) -> str:
        nonlocal cached_second, cached_text
        second = int(now)
        if second != cached_second:
            cached_text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            cached_second = second
        return cached_text

    return iso


# What each flag of the template shows, as it stands in an f-string of what a formatter is given.
_FLAGS: Final = {
    "n": "{int(now)}",
    "t": "{iso(now)}Z",
    "e": "{int(now * 1000) % 1000:03d}",
    "p": "{pid}",
    "T": "{thread}",
    "i": "{who.client if who.client.isalnum() else shown(who.client)}",
    "s": "{who.server if who.server.isalnum() else shown(who.server)}",
    "u": "{who.user if who.user.isalnum() else shown(who.user)}",
    "d": "{who.database if who.database.isalnum() else shown(who.database)}",
    "c": "{context if context.isalnum() else shown(context)}",
    "l": "{level}",
    "m": "{message if len(message) <= most and message.isprintable() else plain(message)}",
    "M": "{tskv(message)}",
    "r": "{who.client_port or none}",
    "h": "{shown(who.client_host)}",
    "H": "{shown(who.server_host)}",
    "x": "{shown(who.external_id)}",
}


def _json_formatter(pid: int) -> Formatter:
    """One JSON object a line; what is absent is null."""
    iso = _iso_seconds()
    encode = json.JSONEncoder(separators=(",", ":")).encode  # ASCII only, so that no line can break

    def formatter(now: float, level: Level, context: str, message: str, who: LogContext) -> str:
        client = {
            "id": who.client or None,
            "ip": who.client_host or None,
            "port": who.client_port or None,
            "user": who.user or None,
            "database": who.database or None,
        }
        return encode(
            {
                "timestamp": f"{iso(now)}.{int(now * 1000) % 1000:03d}Z",
                "pid": pid,
                "level": level,
                "context": context,
                "message": _cut(message),
                "client": client,
                "server": {"id": who.server or None},
                **(who.facts or {}),
            }
        )

    return formatter
