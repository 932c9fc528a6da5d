"""The places log lines are written to. Everything here blocks; nothing here raises after it is made.

A sink returns how many lines it could not write, so that losses can be counted.
"""

import contextlib
import errno
import os
import stat
import syslog
import time
from collections.abc import Sequence
from select import POLLOUT, poll  # bound before gevent patches: sinks run in native threads
from socket import AF_UNIX, SOCK_DGRAM, socket  # likewise
from typing import Final, Protocol

from gpooler.log import Level, LogSettings

Line = tuple[Level, str]

_PRIORITY: Final = {
    "debug": syslog.LOG_DEBUG,
    "info": syslog.LOG_INFO,
    "error": syslog.LOG_ERR,
    "fatal": syslog.LOG_CRIT,
}
_FACILITY: Final = {
    "daemon": syslog.LOG_DAEMON,
    "user": syslog.LOG_USER,
    **{f"local{number}": getattr(syslog, f"LOG_LOCAL{number}") for number in range(8)},
}
SYSLOG_SOCKET: Final = "/dev/log"  # where the system's daemon listens
_SYSLOG_WAIT_S: Final = 1.0  # a daemon that is stuck costs lines, not the master's attention
_STDOUT: Final = 1
_FILE_MODE: Final = 0o640


class Sink(Protocol):
    """One destination."""

    def write(self, lines: Sequence[Line]) -> int:
        """Write lines; return how many are lost."""

    def reopen(self) -> None:
        """Open the destination anew, as after a rotation."""

    def close(self) -> None:
        """Give the destination back."""


class StdoutSink:
    """Standard output, whatever it is: a file, a terminal, a pipe that may be non-blocking."""

    def __init__(self, *, may_wait: bool = True) -> None:
        """``may_wait``: for a reader that is slow; else what a pipe or terminal does not take is lost."""
        self._fd = _STDOUT
        if not may_wait:
            kind = os.fstat(_STDOUT).st_mode
            if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
                # Non-blocking for this process alone: the flag belongs to who opened it.
                with contextlib.suppress(OSError):
                    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                    self._fd = os.open(f"/proc/self/fd/{_STDOUT}", flags)

    def write(self, lines: Sequence[Line]) -> int:
        """Write the lines in one call; all count as lost when the reader is gone or the disk is full."""
        return 0 if _write_all(self._fd, _joined(lines), self._fd == _STDOUT) else len(lines)

    def reopen(self) -> None:
        """Nothing to do: standard output is its owner's."""

    def close(self) -> None:
        """Give back what was opened."""
        if self._fd != _STDOUT:
            os.close(self._fd)
            self._fd = _STDOUT


class FileSink:
    """A file that is appended to. Processes share it: each batch is one write at the end."""

    def __init__(self, path: str) -> None:
        """Open ``path``; where that fails say so on standard output, lose the lines, try again at reopen."""
        self._path = path
        self._fd = -1
        self.reopen()

    def write(self, lines: Sequence[Line]) -> int:
        """Append the lines."""
        return 0 if self._fd >= 0 and _write_all(self._fd, _joined(lines)) else len(lines)

    def reopen(self) -> None:
        """Open the path again; the old file stays in use where that fails."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
        try:
            fd = os.open(self._path, flags, _FILE_MODE)
        except (OSError, ValueError) as error:
            text = f"gpooler: could not open log file {self._path!r}: {error}\n"
            _write_all(_STDOUT, text.encode(errors="backslashreplace"))
            return
        self.close()
        self._fd = fd

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class SyslogSink:
    """The system's log, with the level as priority: datagrams as the C library sends them (RFC 3164).

    The C library's own function neither tells of losses nor bounds its wait for a daemon that is stuck.
    """

    def __init__(self, ident: str, facility: str, path: str = SYSLOG_SOCKET) -> None:
        """``facility`` is daemon, user or local0 to local7. Raises KeyError for another. Does no I/O."""
        self._tag = f"{ident}[{os.getpid()}]"
        self._facility = _FACILITY[facility]
        self._path = path
        self._socket: socket | None = None

    def write(self, lines: Sequence[Line]) -> int:
        """Send the lines one by one; lost are those that no daemon takes within a second."""
        stamp = time.strftime("%b %e %H:%M:%S")
        lost = 0
        for level, line in lines:
            text = f"<{self._facility | _PRIORITY[level]}>{stamp} {self._tag}: {line}"
            lost += not self._send(text.encode(errors="backslashreplace"))
        return lost

    def _send(self, datagram: bytes) -> bool:
        for _ in range(2):  # the daemon may have been started anew since the last line
            try:
                if self._socket is None:
                    self._socket = self._connect()
                self._socket.send(datagram)
            except TimeoutError:
                return False
            except OSError:
                self.close()
            else:
                return True
        return False

    def _connect(self) -> socket:
        """Raises OSError."""
        made = socket(AF_UNIX, SOCK_DGRAM)
        made.settimeout(_SYSLOG_WAIT_S)
        try:
            made.connect(self._path)
        except BaseException:
            made.close()
            raise
        return made

    def reopen(self) -> None:
        """Connect again at the next line."""
        self.close()

    def close(self) -> None:
        """Disconnect."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def open_sinks(settings: LogSettings, *, may_wait: bool) -> list[Sink]:
    """The sinks that ``settings`` name. Raises KeyError for an unknown syslog facility.

    ``may_wait``: who writes has nothing else to do than to wait for a reader of standard output.
    """
    sinks: list[Sink] = []
    if settings.is_stdout:
        sinks.append(StdoutSink(may_wait=may_wait))
    if settings.file is not None:
        sinks.append(FileSink(settings.file))
    if settings.is_syslog:
        sinks.append(SyslogSink(settings.syslog_ident, settings.syslog_facility))
    return sinks


def _joined(lines: Sequence[Line]) -> bytes:
    text = "\n".join([line for _, line in lines])
    return f"{text}\n".encode(errors="backslashreplace")


def _write_all(fd: int, data: bytes, may_wait: bool = True) -> bool:
    """Write everything, also to a non-blocking descriptor; False when it cannot be written, or not now."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except OSError as error:
            if error.errno != errno.EAGAIN or not may_wait:
                return False
            writable = poll()
            writable.register(fd, POLLOUT)
            writable.poll()
    return True
