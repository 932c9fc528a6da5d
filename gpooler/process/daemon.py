"""``daemonize``: gpooler goes on in a process of its own; the command that starts it waits until it serves.

The fork comes before anything is bound or locked, so that what is the process' own (pid file, log) is the
daemon's. Until all of that is done errors go to the terminal; then only the log is left.
"""

import os
import signal
import sys
from collections.abc import Mapping
from typing import Final

from gpooler.process.context import EXIT_BOOT, EXIT_OK
from gpooler.process.fork import assert_can_fork

_LEFT: Final = b"L"  # the terminal: from now on errors are in the log alone
_SERVING: Final = b"S"
_KILLED: Final = 128  # what a shell adds to the number of a signal


class Starter:
    """The command that waits, as the daemon sees it. Owns one end of a pipe; its EOF is a failed start."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def leave_terminal(self) -> None:
        """Standard input, output and error lead nowhere from now on. Raises OSError."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(nowhere, fd)
        if nowhere > 2:
            os.close(nowhere)
        self._tell(_LEFT)

    def serving(self) -> None:
        """It may go."""
        self._tell(_SERVING)
        self.forget()

    def forget(self) -> None:
        """Tell it nothing more; in a child, too."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _tell(self, what: bytes) -> None:
        try:
            os.write(self._fd, what)
        except BrokenPipeError:  # somebody has ended it: we were asked to run all the same
            pass


def manager_variable(environ: Mapping[str, str] = os.environ) -> str:
    """By what variable a service manager shows that it watches this very process; empty: none does."""
    if environ.get("NOTIFY_SOCKET"):
        return "NOTIFY_SOCKET"
    return "LISTEN_PID" if environ.get("LISTEN_PID") == str(os.getpid()) else ""


def detach() -> Starter | int:
    """Fork. In the daemon, which has a session of its own: whom to tell. In the command: its exit status.

    The command returns when the daemon serves or has ended. Raises RuntimeError, OSError.
    """
    assert_can_fork()
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        os.setsid()
        return Starter(writer)
    os.close(writer)
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        told = b""
        try:
            while _SERVING not in told and (data := pipe.read(1)):
                told += data
        except KeyboardInterrupt:
            os.kill(pid, signal.SIGTERM)
    return EXIT_OK if _SERVING in told else _failed(pid, has_left=_LEFT in told)


def _failed(pid: int, *, has_left: bool) -> int:
    """The exit status for a daemon that does not serve."""
    _, wait_status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(wait_status)
    if has_left:
        print("gpooler: could not start: the log says why", file=sys.stderr)
    if code < 0:
        return _KILLED - code
    return code or EXIT_BOOT
