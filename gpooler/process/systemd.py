"""What a service manager like systemd is told, and what it hands over: sd_notify(3), sd_listen_fds(3)."""

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

from gpooler.clock import monotonic_us

FIRST_FD: Final = 3
PATIENCE_S: Final = 0.5  # with a manager whose queue is full: whom it watches it must hear
_ABSTRACT: Final = "@"


class Manager:
    """The manager of this process, if it has one; what it does not take is lost. Owns a socket."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        """``watchdog_s``: it wants to hear of us so often; None: it does not. Raises nothing."""
        self._address = environ.get("NOTIFY_SOCKET", "")
        if self._address.startswith(_ABSTRACT):
            self._address = "\0" + self._address[1:]
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if self._address else None
        if self._socket is not None:
            self._socket.settimeout(PATIENCE_S)
        self.watchdog_s: float | None = None
        is_ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        with suppress(ValueError):
            if self._socket is not None and is_ours and "WATCHDOG_USEC" in environ:
                self.watchdog_s = int(environ["WATCHDOG_USEC"]) / 1e6 / 2

    def ready(self, status: str) -> None:
        """We serve, from now on or again."""
        self._tell("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """Another configuration is on its way; ``ready`` ends that."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={monotonic_us()}")

    def stopping(self, status: str) -> None:
        """We end."""
        self._tell("STOPPING=1", f"STATUS={status}")

    def replaced(self, pid: int) -> None:
        """Another process is the one to watch from now on; it will say the rest."""
        self._tell(f"MAINPID={pid}")

    def alive(self) -> None:
        """For its watchdog."""
        self._tell("WATCHDOG=1", flags=socket.MSG_DONTWAIT)

    def close(self) -> None:
        """Tell nothing more; in a child, too."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _tell(self, *lines: str, flags: int = 0) -> None:
        if self._socket is not None:
            with suppress(OSError):
                self._socket.sendto("\n".join(lines).encode(), flags, self._address)


def given_sockets(environ: Mapping[str, str] = os.environ) -> list[socket.socket]:
    """The listening sockets that the manager hands over; none when they are not for this process."""
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    try:
        count = int(environ.get("LISTEN_FDS", "0"))
    except ValueError:
        return []
    found = []
    for fd in range(FIRST_FD, FIRST_FD + count):
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        found.append(sock)
    return found
