"""The socket by which the command line speaks to a running master: abstract, named after its process id.

One request is one datagram of JSON, and so is the answer: a status, 0 for success, and a text. Only root and
the user that the master runs as are heard.
"""

import json
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

TEXT_MOST: Final = 100_000  # characters of an answer
BACKLOG: Final = 8
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid


def address_of(pid: int) -> bytes:
    """Where the master with this process id listens; containers that share a network may share ids."""
    return b"\0gpooler-%d-%d" % (os.stat("/proc/self/ns/pid").st_ino, pid)


class AdminError(Exception):
    """A master could not be asked; the text says why."""


class Asker:
    """Somebody who has connected, and may have asked."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock

    def answer(self, is_good: bool, text: str) -> None:
        """Answer and close; whoever does not listen any more misses it."""
        with suppress(OSError):
            status = 0 if is_good else 1
            self.socket.send(json.dumps({"status": status, "text": text[:TEXT_MOST]}).encode())
        self.socket.close()


class AdminSocket:
    """The listening socket of this process and those who have connected."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        self._listener.bind(address_of(os.getpid()))
        self._listener.listen(BACKLOG)
        self._askers: list[Asker] = []

    def filenos(self) -> list[int]:
        """What to wait for to be readable."""
        return [self._listener.fileno(), *(asker.socket.fileno() for asker in self._askers)]

    def read(self) -> Iterator[tuple[Asker, dict[str, Any]]]:
        """The requests that have come; each is to be answered. Never waits."""
        with suppress(OSError):  # nobody waits, or no descriptor is left: the master goes on in any case
            while True:
                self._take_in(self._listener.accept()[0])
        for asker in list(self._askers):
            try:
                data = asker.socket.recv(65_536)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            self._askers.remove(asker)
            try:
                request = json.loads(data)
            except ValueError:
                request = None
            if isinstance(request, dict):
                yield asker, request
            else:
                asker.socket.close()

    def _take_in(self, sock: socket.socket) -> None:
        _, uid, _ = _CREDENTIALS.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        asker = Asker(sock)
        if uid in (0, os.geteuid()):
            self._askers.append(asker)
        else:
            asker.answer(False, "only root and the user that gpooler runs as may do that")

    def close(self) -> None:
        """Close everything; in a child, too."""
        self._listener.close()
        for asker in self._askers:
            asker.socket.close()


def ask(pid: int, request: dict[str, Any]) -> tuple[int, str]:
    """Ask the master with this process id; returns the status and the text. Waits. Raises AdminError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        try:
            sock.connect(address_of(pid))
            sock.send(json.dumps(request).encode())
            data = sock.recv(8 * TEXT_MOST)
        except OSError as error:
            raise AdminError(f"no gpooler answers with process id {pid}: {error.strerror}") from None
    if not data:
        raise AdminError(f"gpooler with process id {pid} did not answer")
    answer = json.loads(data)
    return answer["status"], answer["text"]
