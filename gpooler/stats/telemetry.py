"""What the broker tells of all processes: reports at intervals, and the text that Prometheus asks for."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import gevent

from gpooler.clock import monotonic_us
from gpooler.config.certificates import Expiry
from gpooler.config.model import Config
from gpooler.log import Logger
from gpooler.stats.histogram import Histogram, added
from gpooler.stats.processes import use_of
from gpooler.stats.prometheus import Scene, render
from gpooler.stats.quantiles import Quantile, Times, Wanted, Windows
from gpooler.stats.registry import ProcessWord, Time
from gpooler.stats.reporter import Reporter
from gpooler.stats.shared import Totals
from gpooler.stats.snapshot import NamedRoute, ProcessUse, RouteName, Snapshot, take
from gpooler.stats.statsd import Statsd

SLICE_US: Final = 250  # so long the broker's other work may wait for a scrape


class Telemetry:
    """Sees all counters. ``run`` reports for ever; ``render`` answers a scrape."""

    def __init__(
        self,
        config: Config,
        totals: Totals,
        routes: Callable[[], list[NamedRoute]],
        *,
        is_draining: Callable[[], bool],
        expiries: Callable[[], Iterable[Expiry]],
        logger: Logger,
    ) -> None:
        """``routes``: those there are now; ``expiries``: of the certificates in use."""
        self._totals = totals
        self._routes = routes
        self._is_draining = is_draining
        self._expiries = expiries
        self._windows = Windows()
        metrics = config.metrics
        self._statsd: Statsd | None = None
        if metrics.statsd_host is not None:
            self._statsd = Statsd(metrics.statsd_host, metrics.statsd_port, metrics.statsd_prefix)
        has_quantiles = any(rule.quantiles for rule in config.rules)
        self._reporter = Reporter(
            lambda: self._snapshot(self._routes()),
            interval_s=config.logging.stats_interval,
            logger=logger,
            is_logged=config.logging.log_stats,
            statsd=self._statsd,
            expiries=expiries,
            quantiles=self._rotate if has_quantiles else tuple,
        )
        self.has_reports = config.logging.log_stats or self._statsd is not None or has_quantiles

    def run(self) -> None:
        """Report at intervals, for ever. Yields."""
        self._reporter.run()

    def render(self, accept: str) -> tuple[bytes, str]:
        """Everything as an Accept header wants it, and its content type. Yields: half of the time at most is
        spent here.
        """
        pause = _Pause()
        routes = self._routes()
        snapshot = self._snapshot(pause.between(routes))
        times = self._times(pause.between(routes))
        scene = Scene(
            snapshot=snapshot,
            times=times,
            quantiles=tuple(self._windows.quantiles(times, _wanted(routes))),
            is_draining=self._is_draining(),
            lost_metrics=self._statsd.failed if self._statsd else 0,
            certificates=tuple(self._expiries()),
        )
        return render(scene, accept, pause)

    def quantiles(
        self, qs: tuple[float, ...]
    ) -> tuple[tuple[Quantile, ...], tuple[tuple[Time, float, float], ...]]:
        """These of each route whose rule asks for any, and of those together (time, q, us). Yields."""
        pause = _Pause()
        routes = [route for route in self._routes() if route.quantiles]
        times = self._times(pause.between(routes))
        each = self._windows.quantiles(times, {route.name: qs for route in routes})
        return tuple(each), tuple(self._windows.over_all(times, qs))

    def _rotate(self) -> tuple[Quantile, ...]:
        """The quantiles of the windows that end now."""
        routes = [route for route in self._routes() if route.quantiles]
        times = self._times(routes)
        found = tuple(self._windows.quantiles(times, _wanted(routes)))
        self._windows.rotate(times)
        return found

    def _snapshot(self, routes: Iterable[NamedRoute]) -> Snapshot:
        named = ((route.route_id, *route.name) for route in routes)
        return take(monotonic_us(), self._totals, named, dict(self._uses()))

    def _uses(self) -> Iterator[tuple[str, ProcessUse]]:
        pids = {"master": os.getppid(), "broker": os.getpid()}
        for number, counters in self._totals.workers.items():
            pids[f"worker_{number}"] = counters.process(ProcessWord.PID)
        for name, pid in pids.items():
            use = use_of(pid)
            if use is not None:
                yield name, use

    def _times(self, routes: Iterable[NamedRoute]) -> Times:
        """The histograms of these routes; those of one name are added up."""
        total: dict[RouteName, dict[Time, Histogram]] = {}
        for route in routes:
            times = self._totals.histograms(route.route_id)
            before = total.get(route.name)
            if before is not None:
                times |= {time: added(before[time], times[time]) for time in times.keys() & before.keys()}
                times = before | times
            total[route.name] = times
        return total


class _Pause:
    """Lets others run for three times as long as we did, whenever we have run for a slice. Yields."""

    def __init__(self) -> None:
        self._since_us = monotonic_us()

    def __call__(self) -> None:
        worked_us = monotonic_us() - self._since_us
        if worked_us >= SLICE_US:
            gevent.sleep(3 * worked_us / 1e6)
            self._since_us = monotonic_us()

    def between(self, routes: Iterable[NamedRoute]) -> Iterator[NamedRoute]:
        """The routes, with a pause before each."""
        for route in routes:
            self()
            yield route


def _wanted(routes: Iterable[NamedRoute]) -> Wanted:
    """What the rules of each name ask for."""
    wanted: dict[RouteName, tuple[float, ...]] = {}
    for route in routes:
        if route.quantiles:
            wanted[route.name] = tuple(sorted({*wanted.get(route.name, ()), *route.quantiles}))
    return wanted
