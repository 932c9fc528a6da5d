"""A log whose lines are written where they arise: for the master, and with ``log_async = no``."""

import os
from collections.abc import Callable, Sequence
from typing import Protocol

from gpooler.clock import wall
from gpooler.log import Level, Logger, LogSettings, compile_format
from gpooler.logs.sinks import Sink, open_sinks


class Log(Protocol):
    """The open log of a process: its logger and the few acts on it."""

    logger: Logger

    def reopen(self) -> None:
        """Open files and syslog anew, after what was logged before."""

    def configure(self, settings: LogSettings) -> None:
        """Go on as ``settings`` say, behind what was logged; the queue stays as it is. Raises OSError."""

    def close(self) -> None:
        """Write what is left and give the destinations back."""


class DirectLog:
    """Writes each line at once. What a pipe or terminal does not take is lost."""

    def __init__(
        self,
        settings: LogSettings,
        sinks: Sequence[Sink],
        on_lost: Callable[[int], None] = lambda total: None,
    ) -> None:
        """``on_lost`` is told the number of lost lines whenever it grew. Raises ValueError: format."""
        self._sinks = sinks
        self._on_lost = on_lost
        self._lost = 0
        self.logger = make_logger(settings, self._write)

    def _write(self, level: Level, line: str) -> None:
        lost = max([sink.write([(level, line)]) for sink in self._sinks], default=0)
        if lost:
            self._lost += lost
            self._on_lost(self._lost)

    def reopen(self) -> None:
        """Open every sink anew."""
        for sink in self._sinks:
            sink.reopen()

    def configure(self, settings: LogSettings) -> None:
        """As ``Log``."""
        before, self._sinks = self._sinks, open_sinks(settings, may_wait=False)
        set_format(self.logger, settings)
        for sink in before:
            sink.close()

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def make_logger(
    settings: LogSettings, write: Callable[[Level, str], None], flush: Callable[[], None] = lambda: None
) -> Logger:
    """A logger of this process with the format of ``settings``. Raises ValueError."""
    formatter = compile_format(settings.format, pid=os.getpid())
    return Logger(formatter, write, wall, is_debug=settings.is_debug, flush=flush)


def set_format(logger: Logger, settings: LogSettings) -> None:
    """Have a logger of this process write as ``settings`` say. Raises ValueError."""
    logger.configure(compile_format(settings.format, pid=os.getpid()), is_debug=settings.is_debug)


def open_direct(settings: LogSettings, on_lost: Callable[[int], None] = lambda total: None) -> DirectLog:
    """Open the sinks of ``settings`` for direct writes. Raises ValueError, KeyError."""
    return DirectLog(settings, open_sinks(settings, may_wait=False), on_lost)
