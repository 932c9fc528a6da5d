"""A log with a bounded queue and a native thread that writes: a slow disk never holds up the hub.

The thread is a real one also where gevent has patched the standard library. It waits a moment before
each batch, so its wake-ups are bounded however many lines come.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from gevent.monkey import get_original

from gpooler.log import Level, LogSettings
from gpooler.logs.direct import DirectLog, Log, make_logger, set_format
from gpooler.logs.sinks import Line, Sink, open_sinks

_start_new_thread = get_original("_thread", "start_new_thread")
_allocate_lock = get_original("_thread", "allocate_lock")
_sleep = get_original("time", "sleep")

_GATHER_S: Final = 0.05  # lines that come within it leave together
_BATCH_LINES: Final = 1000  # bounds the memory of one joined write
_FLUSH_S: Final = 2.0  # a stuck sink holds up the end of a process no longer

Command = Callable[[], None]


class QueuedLog:
    """Lines go through a queue of ``queue_depth``; what does not fit is dropped and counted."""

    def __init__(
        self,
        settings: LogSettings,
        sinks: Sequence[Sink],
        on_lost: Callable[[int], None] = lambda total: None,
    ) -> None:
        """Start the thread, so only after the fork. ``on_lost`` is called where lines are written to
        the log, never in the thread, with the number of lost lines whenever it grew. Raises ValueError.
        """
        self._sinks = sinks
        self._depth = settings.queue_depth
        self._on_lost = on_lost
        self._queue: deque[Line | Command] = deque()
        self._dropped = 0  # by the writers of lines
        self._failed = 0  # by the thread
        self._told = 0
        self._is_asleep = True
        self._is_urgent = False
        self._is_stopped = False
        self._wake = _allocate_lock()
        self._wake.acquire()
        self.logger = make_logger(settings, self._write, self.flush)
        _start_new_thread(self._run, ())

    def _write(self, level: Level, line: str) -> None:
        if len(self._queue) >= self._depth:
            self._dropped += 1
        else:
            self._put((level, line))
        lost = self._dropped + self._failed
        if lost != self._told:
            self._told = lost
            self._on_lost(lost)

    def reopen(self) -> None:
        """Open every sink anew, behind the lines already logged. Does not wait."""
        for sink in self._sinks:
            self._put(sink.reopen)

    def configure(self, settings: LogSettings) -> None:
        """As ``Log``."""
        sinks = open_sinks(settings, may_wait=True)

        def swap() -> None:
            before, self._sinks = self._sinks, sinks
            for sink in before:
                sink.close()

        self._put(swap)
        set_format(self.logger, settings)

    def flush(self) -> None:
        """Wait, in this thread, until what was logged is written, or two seconds."""
        self._finish(lambda: None)

    def close(self) -> None:
        """Write what is left, end the thread. Lines logged afterwards are lost."""
        self._finish(self._stop)

    def _finish(self, command: Command) -> None:
        """Run ``command`` in the thread behind what was logged, and wait for it, but not for ever."""
        done = _allocate_lock()
        done.acquire()

        def run() -> None:
            command()
            done.release()

        self._is_urgent = True
        self._put(run)
        done.acquire(timeout=_FLUSH_S)

    def _put(self, item: Line | Command) -> None:
        self._queue.append(item)
        if self._is_asleep:
            self._is_asleep = False
            try:
                self._wake.release()
            except RuntimeError:
                pass  # woken already

    def _run(self) -> None:
        """The thread: sleeps until the queue fills, then writes until it is empty."""
        while not self._is_stopped or self._queue:
            self._wake.acquire()
            while self._queue or not self._is_asleep:
                if not self._is_urgent:
                    _sleep(_GATHER_S)
                self._is_urgent = False
                while self._queue:
                    self._write_batch()
                self._is_asleep = True  # whoever puts something from here on wakes us

    def _write_batch(self) -> None:
        lines: list[Line] = []
        command: Command | None = None
        while self._queue and len(lines) < _BATCH_LINES and command is None:
            item = self._queue.popleft()
            if isinstance(item, tuple):
                lines.append(item)
            else:
                command = item
        if lines:
            self._failed += max([sink.write(lines) for sink in self._sinks], default=0)
        if command is not None:
            command()

    def _stop(self) -> None:
        for sink in self._sinks:
            sink.close()
        self._sinks = ()
        self._is_stopped = True


def open_log(settings: LogSettings, on_lost: Callable[[int], None] = lambda total: None) -> Log:
    """The log of a worker or of the broker, as ``log_async`` says. Raises ValueError, KeyError."""
    sinks = open_sinks(settings, may_wait=settings.is_async)
    return (QueuedLog if settings.is_async else DirectLog)(settings, sinks, on_lost)
