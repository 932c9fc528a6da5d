"""Runs blocking library calls in native threads: so many at once, so many waiting, and never longer than so.

A library that asks a directory (libldap, libpam) blocks the thread it is called in, so it must not be the
hub's. A thread cannot be interrupted: when its time is over the caller goes on without it and the thread is
left to finish. Until then it counts, so that a directory which hangs costs a fixed number of threads, and
whoever asks another one does not notice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import gevent
from gevent.lock import BoundedSemaphore
from gevent.threadpool import ThreadPool

T = TypeVar("T")


class OffloadError(Exception):
    """No result was had; the text says why, for the log."""


class OffloadFull(OffloadError):
    """Too many wait already; nothing was begun."""


class OffloadTimeout(OffloadError):
    """No result in time; the call may still run."""


@dataclass(frozen=True, slots=True)
class _Outcome(Generic[T]):
    """Of one call. An exception is handed over: gevent prints the traceback of one that leaves a thread."""

    value: T | None
    error: BaseException | None


class Offload:
    """The threads for one thing that may hang: a directory, a PAM service. Of one hub; made in it."""

    def __init__(self, name: str, *, threads: int, queue_limit: int, timeout_ms: int) -> None:
        """``name`` is for the log; ``timeout_ms`` is the limit of waiting and running together."""
        self._name = name
        self._limit = threads + queue_limit
        self._timeout_ms = timeout_ms
        self._pool = ThreadPool(threads)
        # The pool's own queue would begin what nobody waits for any more.
        self._free = BoundedSemaphore(threads)
        self._unfinished = 0

    @property
    def unfinished(self) -> int:
        """Calls that wait or run, those that nobody waits for any more included."""
        return self._unfinished

    def run(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, called in a thread of the pool; what it raises is raised here.

        Yields. Raises ``OffloadFull``, ``OffloadTimeout``.
        """
        if self._unfinished >= self._limit:
            raise OffloadFull(f"{self._name}: {self._unfinished} logins wait for it already")
        timeout = gevent.Timeout(self._timeout_ms / 1000)
        with timeout:
            try:
                return self._run(work)
            except gevent.Timeout as expired:
                if expired is not timeout:
                    raise
                raise OffloadTimeout(f"{self._name}: no answer within {self._timeout_ms} ms") from None
        raise AssertionError("unreachable")

    def _run(self, work: Callable[[], T]) -> T:
        self._unfinished += 1
        try:
            self._free.acquire()
        except BaseException:
            self._unfinished -= 1
            raise
        result = self._pool.spawn(_call, work)
        result.rawlink(self._finish)
        outcome: _Outcome[T] = result.get()
        if outcome.error is not None:
            raise outcome.error
        return outcome.value  # type: ignore[return-value]  # without an error it is a T

    def _finish(self, _: object) -> None:
        self._unfinished -= 1
        self._free.release()


def _call(work: Callable[[], T]) -> _Outcome[T]:
    """In a thread."""
    try:
        return _Outcome(work(), None)
    except BaseException as error:  # noqa: BLE001  # raised again where it is waited for
        return _Outcome(None, error)
