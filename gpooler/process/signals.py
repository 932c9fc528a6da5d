"""Signals as things to be read: a handler does nothing but wake the loop that reads them."""

import os
import signal
from types import FrameType
from typing import Final

from gpooler.process.fork import MASTER_SIGNALS

_READ_MOST: Final = 4096


class SignalQueue:
    """Catches the master's signals and SIGCHLD until ``close``. One for a process, in its main thread."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {
            number: signal.signal(number, _ignore) for number in (*MASTER_SIGNALS, signal.SIGCHLD)
        }

    def fileno(self) -> int:
        """Readable when signals have come."""
        return self._reader

    def read(self) -> list[signal.Signals]:
        """The signals that came since the last call, in order. Never waits."""
        try:
            return [signal.Signals(number) for number in os.read(self._reader, _READ_MOST)]
        except BlockingIOError:
            return []

    def forget(self) -> None:
        """In a child: close the pipe without touching the signals, which ``fork`` has set."""
        os.close(self._reader)
        os.close(self._writer)

    def close(self) -> None:
        """Put everything back as it was."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self.forget()


def _ignore(number: int, frame: FrameType | None) -> None:
    """The interpreter writes the number to the wake-up pipe; that is all that is wanted."""
