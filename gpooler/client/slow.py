"""A line of the slow-request log: the parts of its time, and the trace that its text names. Pure."""

import re
from typing import Final, NamedTuple
from urllib.parse import unquote

SHOWN: Final = 1000  # characters of a text that a line has

# A pair in a comment as sqlcommenter writes it: key='value', both URL-encoded, before a comma or the end.
_TRACEPARENT: Final = re.compile(r"(?:/\*|,)\s*traceparent\s*=\s*'([^']{1,200})'\s*(?:,|\*/)")
# W3C Trace Context, chapter 3.2.2: version, trace id, parent id, flags; ids of zeros alone are none.
_PARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class Slow(NamedTuple):
    """What the relay tells of a request (``Relay.texts``)."""

    wait_us: int
    server_us: int
    send_us: int
    server: int  # its id
    pid: int  # of PostgreSQL's process
    is_answered: bool
    size: int  # of the whole text; 0 unknown
    head: int  # bytes of its beginning, in front of those of its end


def traceparent(text: str) -> str | None:
    """The trace that a comment in a text names; the last one, None when there is none that is valid."""
    for found in reversed(_TRACEPARENT.findall(text)):
        value = unquote(found)
        if _PARENT.fullmatch(value):
            return value
    return None


def describe(slow: Slow, data: bytes, route: str) -> tuple[str, dict[str, object]]:
    """The message of a line, and the keys that a line in JSON has besides.

    ``data``: the beginning of the text, and its end where it is long.
    """
    head = data[: slow.head].decode("utf-8", "backslashreplace")
    tail = data[slow.head :].decode("utf-8", "backslashreplace")
    # where they touch each other a comment may go on from one to the other
    parent = traceparent(head + tail if slow.size == len(data) else f"{head}\0{tail}")
    text = head[:SHOWN]
    if len(text) < len(head) or slow.size > slow.head:
        text += "..."
    times = {
        "duration_ms": slow.wait_us + slow.server_us + slow.send_us,
        "wait_ms": slow.wait_us,
        "server_ms": slow.server_us,
        "send_ms": slow.send_us,
    }
    facts: dict[str, object] = {
        "route": route,
        **{name: us / 1000 for name, us in times.items()},
        "server_pid": slow.pid,
        "answered": slow.is_answered,
        "traceparent": parent,
        "query": text or None,
    }
    duration, wait, server, send = (f"{us / 1000:.3f}" for us in times.values())
    message = (
        f"[{route}] {duration} ms{'' if slow.is_answered else ', not answered'}: "
        f"wait {wait}, server {server}, send {send}; pid {slow.pid}"
        + (f", traceparent {parent}" if parent else "")
        + (f": {text}" if text else "")
    )
    return message, facts
