"""Asks an agent at a Unix socket whether a token is a user's, as Odyssey's ``external`` does.

Each message is a length, eight bytes, the least significant first, and so many bytes. We send the user's name
and the token, each with a zero at its end; the agent answers one byte, not zero if it accepts, and then an id
for the log.
"""

from dataclasses import dataclass
from typing import Final

import gevent
import gevent.socket
from gevent.lock import BoundedSemaphore

LENGTH_BYTES: Final = 8
ANSWER_MOST: Final = 65_536  # bytes of a message; ids are names and numbers
TIMEOUT_MS: Final = 5000  # of all: Odyssey waits 1 s for the connection and 4 s for the answer
AT_ONCE_MOST: Final = 64  # connections to one agent
WAITING_MOST: Final = 1024  # logins that wait for one of these; the next is refused


class AgentError(Exception):
    """The agent said neither yes nor no; the text says why, for the log."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the agent says."""

    is_accepted: bool
    external_id: str


class Agent:
    """The agent at one socket, as one worker asks it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._free = BoundedSemaphore(AT_ONCE_MOST)
        self._count = 0

    def ask(self, user: bytes, token: bytes) -> Verdict:
        """Yields. Raises AgentError."""
        if self._count >= AT_ONCE_MOST + WAITING_MOST:
            raise AgentError(f"{self._path}: {self._count} logins wait for it already")
        timeout = gevent.Timeout(TIMEOUT_MS / 1000)
        self._count += 1
        try:
            with timeout, self._free:
                return self._talk(user, token)
        except gevent.Timeout as expired:
            if expired is not timeout:
                raise
            raise AgentError(f"{self._path}: no answer within {TIMEOUT_MS} ms") from None
        except OSError as error:
            raise AgentError(f"{self._path}: {error.strerror or error}") from None
        finally:
            self._count -= 1
        raise AssertionError("unreachable")

    def _talk(self, user: bytes, token: bytes) -> Verdict:
        with gevent.socket.socket(gevent.socket.AF_UNIX, gevent.socket.SOCK_STREAM) as sock:
            sock.connect(self._path)
            sock.sendall(_message(user) + _message(token))
            is_accepted = _receive(sock)[:1] not in (b"", b"\0")
            if not is_accepted:
                return Verdict(False, "")
            name = _receive(sock).partition(b"\0")[0]
            return Verdict(True, name.decode("utf-8", "backslashreplace"))


def _message(text: bytes) -> bytes:
    body = text + b"\0"
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def _receive(sock: gevent.socket.socket) -> bytes:
    length = int.from_bytes(_exactly(sock, LENGTH_BYTES), "little")
    if length > ANSWER_MOST:
        raise OSError(f"an answer of {length} bytes")
    return _exactly(sock, length)


def _exactly(sock: gevent.socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = sock.recv(count)
        if not part:
            raise OSError("closed before its answer was complete")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
