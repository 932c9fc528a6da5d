"""What Prometheus is told, as text.

The library says which format an Accept header asks for, and reads both back in the tests. Its writer is not
used: it costs 6 to 9 us a line, of which 200 routes have 21,000. Here lines are made a route at a time, with
a pause in between whenever the caller wants one: nothing else in the process waits for a whole scrape.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from prometheus_client.exposition import choose_encoder

from gpooler import __version__
from gpooler.config.certificates import Expiry
from gpooler.reasons import Reason
from gpooler.stats import catalogue as table
from gpooler.stats.histogram import EXPOSED_POWERS, NOTHING, SUM_AT, exposed
from gpooler.stats.quantiles import Quantile, Times
from gpooler.stats.registry import ERROR_BASE, ProcessWord, RouteWord, Time
from gpooler.stats.snapshot import Block, RouteName, Snapshot, oldest_wait_us

LE: Final = (*(f',le="{(1 << power) / 1e6}"' for power in EXPOSED_POWERS), ',le="+Inf"')
_ESCAPES: Final = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


@dataclass(frozen=True, slots=True)
class Scene:
    """All that is told at one moment."""

    snapshot: Snapshot
    times: Times
    quantiles: tuple[Quantile, ...]
    is_draining: bool
    lost_metrics: int
    certificates: tuple[Expiry, ...]


def render(scene: Scene, accept: str, pause: Callable[[], None]) -> tuple[bytes, str]:
    """The scene as text, and its content type, as an Accept header wants it: Prometheus' or OpenMetrics'.

    ``pause`` is called after each route of each family.
    """
    content_type = choose_encoder(accept)[1]
    is_openmetrics = content_type.startswith("application/openmetrics-text")
    lines: list[str] = []
    for family in _Families(scene, pause).all():
        is_counter = family.type is table.Type.COUNTER
        name = f"{family.name}_total" if is_counter and not is_openmetrics else family.name
        lines += (f"# HELP {name} {family.help}\n", f"# TYPE {name} {family.type}\n", *family.lines)
    if is_openmetrics:
        lines.append("# EOF\n")
    return "".join(lines).encode(), content_type


@dataclass(frozen=True, slots=True)
class _Family:
    """Lines of one name; they are made when they are asked for, once."""

    name: str
    type: table.Type
    help: str
    lines: Iterable[str]


class _Families:
    """All that is told of a scene."""

    def __init__(self, scene: Scene, pause: Callable[[], None]) -> None:
        self._scene = scene
        self._pause = pause
        # by labels first: a series that came twice would spoil the whole scrape
        series = {labels(database=name.database, user=name.user): name for name in scene.snapshot.routes}
        self._routes = {name: of for of, name in series.items()}

    def all(self) -> Iterator[_Family]:
        """Every family."""
        yield from self._of_gpooler()
        for row in table.ROUTE_GAUGES:
            yield _own(row, table.Type.GAUGE, self._words(row.name, row.word))
        yield _own(table.MAXWAIT, table.Type.GAUGE, self._maxwait(table.NAMESPACE + table.MAXWAIT.name))
        for row in table.ROUTE_COUNTERS:
            yield _own(row, table.Type.COUNTER, self._words(f"{row.name}_total", row.word))
        for time in table.ROUTE_TIMES:
            lines = self._histograms(table.NAMESPACE + time.name, time.time)
            yield _own(time, table.Type.HISTOGRAM, lines)
        for other, kind in (
            (table.QUERY_QUANTILE, Time.QUERY),
            (table.TRANSACTION_QUANTILE, Time.TRANSACTION),
        ):
            yield _own(other, other.type, self._quantiles(other.name, kind))
        yield _own(table.ERRORS, table.Type.COUNTER, self._reasons(table.ERRORS.name, are_errors=True))
        yield _own(table.ENDS, table.Type.COUNTER, self._reasons(table.ENDS.name, are_errors=False))
        yield from self._of_pgbouncer()

    # --- of gpooler as a whole ------------------------------------------------------------------------

    def _of_gpooler(self) -> Iterator[_Family]:
        scene, snapshot = self._scene, self._scene.snapshot
        yield _single(table.INFO, 1, labels(version=__version__))
        yield _single(table.WORKERS, snapshot.workers)
        yield _single(table.DRAINING, int(scene.is_draining))
        for row in table.PROCESS_GAUGES:
            line = f"{table.NAMESPACE}{row.name} {snapshot.process[row.word]}\n"
            yield _own(row, table.Type.GAUGE, [line])
        for row in table.PROCESS_COUNTERS:
            line = f"{table.NAMESPACE}{row.name}_total {snapshot.process[row.word]}\n"
            yield _own(row, table.Type.COUNTER, [line])
        yield _single(table.LOST_METRICS, scene.lost_metrics)
        uses = [(labels(process=name), use) for name, use in snapshot.uses.items()]
        for other, values in (
            (table.RESIDENT_BYTES, [(of, use.resident_bytes) for of, use in uses]),
            (table.CPU_SECONDS, [(of, use.cpu_ms / 1000) for of, use in uses]),
            (table.OPEN_FDS, [(of, use.open_fds) for of, use in uses if use.open_fds is not None]),
            (table.CERTIFICATE_END, [(_owner(each), each.end.timestamp()) for each in scene.certificates]),
        ):
            name = table.NAMESPACE + _sample_name(other)
            yield _own(other, other.type, [f"{name}{{{of}}} {value}\n" for of, value in values])

    # --- of routes --------------------------------------------------------------------------------------

    def _blocks(self) -> Iterator[tuple[str, RouteName, Block]]:
        """Each route's labels, name and words, with a pause behind it."""
        for route, of in self._routes.items():
            yield of, route, self._scene.snapshot.routes[route]
            self._pause()

    def _words(self, name: str, word: int) -> Iterator[str]:
        name = table.NAMESPACE + name
        return (f"{name}{{{of}}} {block[word]}\n" for of, _, block in self._blocks())

    def _maxwait(self, name: str) -> Iterator[str]:
        at_us = self._scene.snapshot.at_us
        return (f"{name}{{{of}}} {oldest_wait_us(block, at_us) / 1e6}\n" for of, _, block in self._blocks())

    def _histograms(self, name: str, time: Time) -> Iterator[str]:
        for of, route, _ in self._blocks():
            histogram = self._scene.times.get(route, {}).get(time, NOTHING)
            counts = exposed(histogram)
            for le, number in zip(LE, counts, strict=True):
                yield f"{name}_bucket{{{of}{le}}} {number}\n"
            yield f"{name}_count{{{of}}} {counts[-1]}\n"
            yield f"{name}_sum{{{of}}} {histogram[SUM_AT] / 1e6}\n"

    def _quantiles(self, name: str, time: Time) -> Iterator[str]:
        for found in self._scene.quantiles:
            if found.time is time and found.route in self._routes:
                of = f'{self._routes[found.route]},quantile="{found.q}"'
                yield f"{table.NAMESPACE}{name}{{{of}}} {found.us / 1e6}\n"

    def _reasons(self, name: str, *, are_errors: bool) -> Iterator[str]:
        reasons = [
            (ERROR_BASE + reason, reason.label)
            for reason in Reason
            if reason != Reason.NONE and (reason not in table.NORMAL_ENDS) is are_errors
        ]
        for of, _, block in self._blocks():
            for word, label in reasons:
                if block[word]:
                    yield f'{table.NAMESPACE}{name}_total{{{of},reason="{label}"}} {block[word]}\n'

    # --- the names of pgbouncer_exporter ----------------------------------------------------------------

    def _of_pgbouncer(self) -> Iterator[_Family]:
        process = self._scene.snapshot.process
        routes = self._routes.keys()
        servers = (RouteWord.SERVERS_ACTIVE, RouteWord.SERVERS_IDLE, RouteWord.SERVERS_LOGIN)
        open_servers = sum(block[word] for block in self._scene.snapshot.routes.values() for word in servers)
        for row, value in (
            (table.UP, 1),
            (table.DATABASES, len({route.database for route in routes})),
            (table.USERS, len({route.user for route in routes})),
            (table.POOL_COUNT, len(routes)),
            (table.USED_CLIENTS, process[ProcessWord.CLIENTS]),
            (table.LOGIN_CLIENTS, process[ProcessWord.CLIENTS_LOGIN]),
            (table.USED_SERVERS, open_servers),
        ):
            yield _Family(row.name, row.type, row.help, [f"{row.name} {value}\n"])
        row, of = table.VERSION, labels(version=__version__)
        yield _Family(row.name, row.type, row.help, [f"{row.name}{{{of}}} 1\n"])
        for alias in table.POOLS:
            yield _Family(alias.name, alias.type, alias.help, self._pools(alias))
        row = table.POOLS_MAXWAIT
        yield _Family(row.name, row.type, row.help, self._maxwait(row.name))
        for alias in table.STATS_TOTALS:
            yield _Family(alias.name, alias.type, alias.help, self._stats(alias))

    def _pools(self, alias: table.Alias) -> Iterator[str]:
        return (f"{alias.name}{{{of}}} {alias.value(block)}\n" for of, _, block in self._blocks())

    def _stats(self, alias: table.Alias) -> Iterator[str]:
        totals: dict[str, int] = {}
        for _, route, block in self._blocks():
            totals[route.database] = totals.get(route.database, 0) + alias.value(block)
        for database, total in totals.items():
            yield f"{alias.name}_total{{{labels(database=database)}}} {total * alias.scale}\n"


def _own(row: table.Row | table.TimeRow | table.OtherRow, kind: table.Type, lines: Iterable[str]) -> _Family:
    return _Family(table.NAMESPACE + row.name, kind, row.help, lines)


def _single(row: table.OtherRow, value: float, of: str = "") -> _Family:
    """A family of one line."""
    braced = f"{{{of}}}" if of else ""
    return _own(row, row.type, [f"{table.NAMESPACE}{_sample_name(row)}{braced} {value}\n"])


def _sample_name(row: table.OtherRow) -> str:
    return row.name + ("_total" if row.type is table.Type.COUNTER else "")


def labels(**values: str) -> str:
    """What stands between the braces."""
    return ",".join(f'{name}="{_text(value).translate(_ESCAPES)}"' for name, value in values.items())


def _owner(of: Expiry) -> str:
    return labels(section=of.section, name=of.name, option=of.option)


def _text(name: str) -> str:
    """A label is UTF-8: names that are not are told apart by a digest."""
    raw = name.encode("utf-8", "surrogateescape")
    text = raw.decode("utf-8", "replace")
    return name if text == name else f"{text} {hashlib.sha256(raw).hexdigest()[:12]}"
