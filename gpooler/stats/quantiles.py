"""Quantiles over the last one to two intervals, from histograms that only grow. Pure."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple, Protocol

from gpooler.stats.histogram import NOTHING, Histogram, added, grown, quantile
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


class _Rule(Protocol):
    @property
    def quantiles(self) -> tuple[float, ...]: ...


def asked_for(rules: Iterable[_Rule]) -> tuple[float, ...]:
    """All that any of the rules asks for, the least first."""
    return tuple(sorted({q for rule in rules for q in rule.quantiles}))


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
            for time in MEASURED:
                growth = self._growth(route, time, now)
                for q in qs:
                    us = quantile(growth, q)
                    if us is not None:
                        yield Quantile(route, time, q, us)

    def over_all(self, now: Times, qs: Iterable[float]) -> Iterator[tuple[Time, float, float]]:
        """The same of all routes together: time, quantile, us."""
        if self._older is None:
            return
        for time in MEASURED:
            total = NOTHING
            for route in now:
                total = added(total, self._growth(route, time, now))
            for q in qs:
                us = quantile(total, q)
                if us is not None:
                    yield time, q, us

    def _growth(self, route: RouteName, time: Time, now: Times) -> Histogram:
        assert self._older is not None
        after = now.get(route, {}).get(time)
        return NOTHING if after is None else grown(self._older.get(route, {}).get(time), after)
