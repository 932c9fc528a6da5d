"""Named points where a test halts a process: nothing unless GPOOLER_DEBUG is the path of a test's socket.

The test listens there (SOCK_SEQPACKET, one JSON object a datagram). A process says who it is; the test
arms points, by name or ``name:detail``; the next time the process comes to an armed one it says so and
stands still, hub and all, until it is told to go on. What the relay does meanwhile is its own affair.
Commands are read at every point and, as the hub comes by every BEAT_S, at the point ``beat``.

Process: ``{"who", "pid"}`` once, ``{"reached", "detail"}``, ``{"answer"}``.
Test: ``{"arm": point}``, ``{"go": true}``, ``{"hold_gil": true}`` (until ``go``), ``{"objects": true}``,
``{"ping": true}``.
"""

import ctypes
import gc
import json
import os
import select
import struct
from socket import AF_UNIX, SOCK_SEQPACKET, socket  # bound before gevent patches: a halt stops the hub
from typing import Any, Final

VARIABLE: Final = "GPOOLER_DEBUG"
BEAT_S: Final = 0.2
_HOLD_MS: Final = 20_000  # if no word comes
_MOST: Final = 4096  # bytes of one datagram


class _Control:
    """The connection to the test. Lives as long as the process."""

    def __init__(self, path: str, who: str) -> None:
        with socket(AF_UNIX, SOCK_SEQPACKET) as made:
            made.connect(path)
            self._fd = made.detach()
        self._armed: set[str] = set()
        self._say({"who": who, "pid": os.getpid()})

    def come_to(self, point: str, detail: str) -> None:
        os.set_blocking(self._fd, False)
        while (command := self._read()) is not None:
            self._obey(command)
        found = self._armed & {point, f"{point}:{detail}"}
        if not found:
            return
        self._armed -= found
        self._say({"reached": point, "detail": detail})
        os.set_blocking(self._fd, True)
        while (command := self._read()) is not None:
            if "go" in command:
                return
            self._obey(command)

    def _read(self) -> dict[str, Any] | None:
        try:
            data = os.read(self._fd, _MOST)
        except OSError:
            return None  # nothing there, or the test is gone
        if not data:
            return None
        command: dict[str, Any] = json.loads(data)
        return command

    def _say(self, message: dict[str, object]) -> None:
        try:
            os.write(self._fd, json.dumps(message).encode())
        except OSError:
            pass  # the test is gone

    def _obey(self, command: dict[str, Any]) -> None:
        if "arm" in command:
            self._armed.add(command["arm"])
            self._say({"answer": "armed"})
        elif "hold_gil" in command:
            self._say({"answer": "held"})
            # PyDLL calls C with the lock held; struct pollfd: fd, events, revents
            wanted = ctypes.create_string_buffer(struct.pack("ihh", self._fd, select.POLLIN, 0))
            ctypes.PyDLL(None).poll(wanted, 1, _HOLD_MS)
            self._read()
            self._say({"answer": "let go"})
        elif "objects" in command:
            gc.collect()
            self._say({"answer": len(gc.get_objects())})
        else:
            self._say({"answer": "here"})


_control: _Control | None = None  # one a process, since a point may stand anywhere


def connect(who: str) -> None:
    """Meet the test, if GPOOLER_DEBUG is a path. Once in a child, after the fork. Raises OSError."""
    global _control
    path = os.environ.get(VARIABLE, "")
    if "/" in path:
        _control = _Control(path, who)


def is_connected() -> bool:
    """Whether a test holds the strings."""
    return _control is not None


def fault_point(name: str, detail: str = "") -> None:
    """A place in the life of clients and servers where a test may halt this process."""
    if _control is not None:
        _control.come_to(name, detail)
