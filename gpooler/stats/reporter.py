"""Each ``stats_interval``: a log line a route and the metrics for statsd. A greenlet of the broker."""

import time
import traceback
from collections.abc import Callable, Iterable

import gevent

from gpooler.config.certificates import Expiry
from gpooler.log import LogContext, Logger
from gpooler.stats.metrics import Kind, Metric, certificate_metrics, metrics
from gpooler.stats.quantiles import Quantile
from gpooler.stats.snapshot import Snapshot
from gpooler.stats.statsd import Statsd
from gpooler.stats.summary import summary


class Reporter:
    """Takes snapshots and tells of the time between them."""

    def __init__(
        self,
        take: Callable[[], Snapshot],
        *,
        interval_s: float,
        logger: Logger,
        is_logged: bool,
        statsd: Statsd | None,
        expiries: Callable[[], Iterable[Expiry]] = tuple,
        quantiles: Callable[[], tuple[Quantile, ...]] = tuple,
    ) -> None:
        """``take`` makes a snapshot; ``is_logged`` is ``log_stats``; ``statsd`` stays the caller's.

        ``quantiles`` ends an interval and says what it was like.
        """
        self._take = take
        self._expiries = expiries
        self._interval_s = interval_s
        self._logger = logger
        self._is_logged = is_logged
        self._statsd = statsd
        self._quantiles = quantiles
        self._before: Snapshot | None = None

    def run(self) -> None:
        """Report for ever; to be spawned, and killed at the end. Yields."""
        next_s = time.monotonic()
        while True:
            try:
                self.report()
            except Exception:  # noqa: BLE001  # the top of a greenlet
                self._logger.error(f"statistics failed: {traceback.format_exc()}", context="stats")
            now_s = time.monotonic()
            next_s = max(next_s + self._interval_s, now_s)  # intervals that were missed are not made up for
            gevent.sleep(next_s - now_s)

    def report(self) -> None:
        """Tell what happened since the last call; the first one has only gauges to tell. Yields."""
        before, now, quantiles = self._before, self._take(), self._quantiles()
        self._before = now
        if self._is_logged and before is not None:
            for route, line in summary(before, now):
                who = LogContext(user=route.user, database=route.database)
                self._logger.info(f"[{route.database}.{route.user}] {line}", context="stats", who=who)
        if self._statsd is not None:
            lost = Metric("process.lost.metrics", Kind.GAUGE, self._statsd.failed)
            # A resolver that hangs must not hold up the next lines of the log.
            is_sent = False
            with gevent.Timeout(self._interval_s, exception=False):
                certificates = certificate_metrics(self._expiries())
                self._statsd.send([*metrics(before, now, quantiles), *certificates, lost])
                is_sent = True
            if not is_sent:
                self._statsd.failed += 1
