"""``[soft_oom]``, in the broker: measures memory, tells workers whether it is short, and sends signals.

Workers look at the verdict at each login (``client/admission.py``); no message is needed. It is a word of the
past's block, as that outlives the broker: a successor goes on where the last one was.
"""

import os
import signal
from typing import Final

import gevent
from gevent import get_hub

from gpooler.config.model import SoftOom, SoftOomDrop
from gpooler.log import Logger
from gpooler.process.memory import Consumer, Measured, is_there, largest, measure
from gpooler.stats.registry import ProcessWord
from gpooler.stats.shared import SharedCounters

_MB: Final = 1 << 20
_CONTEXT: Final = "soft_oom"


class MemoryWatch:
    """One for the life of a broker. The one writer of the words ``SOFT_OOM_…`` of the past's block."""

    def __init__(self, past: SharedCounters, logger: Logger) -> None:
        self._past = past
        self._logger = logger
        self._options: SoftOom | None = None
        self._greenlet: gevent.Greenlet | None = None
        self._told: set[str] = set()  # what need not be logged again
        self._signalled: set[tuple[int, int]] = set()  # pid and start, in this shortage

    def configure(self, options: SoftOom | None) -> None:
        """Go on by these options, None for no more measuring."""
        if options == self._options and (self._greenlet is not None or options is None):
            return
        self.close()
        self._options = options
        self._told.clear()
        self._signalled.clear()
        self._past.set_process(ProcessWord.SOFT_OOM_LIMIT, 0 if options is None else options.limit)
        if options is not None:
            self._greenlet = gevent.spawn(self._run, options)
            return
        self._past.set_process(ProcessWord.SOFT_OOM_USED, 0)
        if self._past.process(ProcessWord.SOFT_OOM_SHORT):
            self._past.set_process(ProcessWord.SOFT_OOM_SHORT, 0)
            self._log("soft_oom is off: new clients are taken again")

    def close(self) -> None:
        """Measure no more; the last verdict stays."""
        if self._greenlet is not None:
            self._greenlet.kill()
            self._greenlet = None

    def _run(self, options: SoftOom) -> None:
        while True:
            try:
                # in a thread: the kernel may walk through gigabytes, while others wait for servers
                found = get_hub().threadpool.apply(measure, (options.process,))
            except (OSError, ValueError) as error:
                self._log_once(f"could not measure memory, new clients are taken: {error}")
                self._judge(options, Measured(0))
            else:
                self._judge(options, found)
            gevent.sleep(options.check_interval_ms / 1000)

    def _judge(self, options: SoftOom, found: Measured) -> None:
        if found.unread:
            self._log_once(f"the memory of {found.unread} processes may not be read: it is not counted")
        was_short = bool(self._past.process(ProcessWord.SOFT_OOM_SHORT))
        is_short = found.bytes > options.limit
        self._past.set_process(ProcessWord.SOFT_OOM_USED, found.bytes)
        self._past.set_process(ProcessWord.SOFT_OOM_SHORT, int(is_short))
        use = f"{_text(found.bytes)} are in use, the limit is {_text(options.limit)}"
        if is_short and not was_short:
            self._logger.error(f"memory is short, new clients are refused: {use}", context=_CONTEXT)
        elif was_short and not is_short:
            self._log(f"memory is short no more, new clients are taken again: {use}")
        if not is_short:
            self._signalled.clear()
        elif options.drop is not None:
            self._drop(options.drop, found)

    def _drop(self, options: SoftOomDrop, found: Measured) -> None:
        """Signal the largest, each once before any gets another."""
        candidates = largest(found.consumers, {os.getpid(), os.getppid()})
        fresh = [each for each in candidates if (each.pid, each.started) not in self._signalled]
        if not fresh:
            self._signalled.clear()
        left = options.max_rate
        for consumer in fresh or candidates:
            if not left:
                return
            left -= self._send(consumer, signal.Signals[options.signal])

    def _send(self, consumer: Consumer, number: signal.Signals) -> bool:
        """Whether it was sent."""
        whom = f"{consumer.name} (pid {consumer.pid})"
        try:
            if not is_there(consumer):
                return False
            os.kill(consumer.pid, number)
        except ProcessLookupError:
            return False
        except PermissionError:
            self._log_once(f"may not send signals to {whom}")
            return False
        self._signalled.add((consumer.pid, consumer.started))
        self._past.add_process(ProcessWord.SOFT_OOM_SIGNALS)
        self._log(f"sent {number.name} to {whom}, which has {_text(consumer.bytes)}")
        return True

    def _log(self, text: str) -> None:
        self._logger.info(text, context=_CONTEXT)

    def _log_once(self, text: str) -> None:
        # numbers in it may change from one look to the next
        key = "".join(letter for letter in text if not letter.isdigit())
        if key not in self._told:
            self._told.add(key)
            self._logger.error(text, context=_CONTEXT)


def _text(size: int) -> str:
    return f"{size / _MB:.1f} MB"
