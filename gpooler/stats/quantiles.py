"""Quantiles over the last one to two intervals, from histograms that only grow. Pure."""

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from gpooler.stats.histogram import Histogram, grown, quantile
from gpooler.stats.registry import Time
from gpooler.stats.snapshot import RouteName

Times = Mapping[RouteName, Mapping[Time, Histogram]]
Wanted = Mapping[RouteName, tuple[float, ...]]
MEASURED: Final = (Time.QUERY, Time.TRANSACTION)


class Quantile(NamedTuple):
    """A part ``q`` of what a route did lasted no longer than ``us``."""

    route: RouteName
    time: Time
    q: float
    us: float


class Windows:
    """Two windows that rotate, as Odyssey's."""

    def __init__(self) -> None:
        self._older: Times | None = None
        self._newer: Times | None = None

    def rotate(self, now: Times) -> None:
        """An interval is over; the first call only begins."""
        self._older = now if self._newer is None else self._newer
        self._newer = now

    def quantiles(self, now: Times, wanted: Wanted) -> Iterator[Quantile]:
        """Those that rules ask for; nothing where nothing was measured."""
        if self._older is None:
            return
        for route, qs in wanted.items():
            before, after = self._older.get(route, {}), now.get(route, {})
            for time in MEASURED:
                if time in after:
                    growth = grown(before.get(time), after[time])
                    for q in qs:
                        us = quantile(growth, q)
                        if us is not None:
                            yield Quantile(route, time, q, us)
