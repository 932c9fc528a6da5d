"""Puts a view of the whole pooler together: counters read here, rows asked of all workers and the broker."""

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, Final, TypeVar

import gevent

from gpooler import __version__
from gpooler.client.admission import Admission
from gpooler.clock import monotonic_us, wall
from gpooler.config.model import Config
from gpooler.console.asker import Asker, Source
from gpooler.console.facts import (
    BanFact,
    CopyFact,
    HostFact,
    MemoryFact,
    QuantileFact,
    RouteFact,
    RouteView,
    SocketFact,
    StatementFact,
    View,
    WorkerFact,
    name_of,
    of_cells,
)
from gpooler.console.spec import Need
from gpooler.stats.quantiles import asked_for
from gpooler.stats.registry import ProcessWord
from gpooler.stats.shared import SharedCounters, Totals

UTILIZATION_S: Final = 0.1  # over which the CPU of the host is measured
CELLS_AT_ONCE: Final = 200  # rows made to facts, or routes added up, before others have their turn

Fact = TypeVar("Fact")


class Gatherer:
    """That of one worker."""

    def __init__(
        self,
        config: Callable[[], Config],
        admission: Admission,
        counters: SharedCounters,
        past: SharedCounters,
        source: Source,
        asker: Asker,
    ) -> None:
        """``past``: what dead workers counted; ``source``: this worker's own facts."""
        self.config = config
        self._admission = admission
        self._counters = counters
        self._past = past
        self._source = source
        self._asker = asker

    def view(self, needs: Collection[Need], *, has_legacy_columns: bool) -> tuple[View, list[str]]:
        """What tables with these needs are made of, and notices about what is missing of it. Yields."""
        missing: set[int] = set()
        notices: list[str] = []

        def of_all(need: Need, kind: type[Fact]) -> tuple[Fact, ...]:
            if need not in needs:
                return ()
            facts = self._own(need.value)
            rows, lost = self._asker.workers(need.value)
            missing.update(lost)
            for at in range(0, len(rows), CELLS_AT_ONCE):
                facts.extend(of_cells(kind, rows[at : at + CELLS_AT_ONCE]))
                gevent.sleep(0)
            return tuple(facts)

        sockets = of_all(Need.SOCKETS, SocketFact)
        memory = of_all(Need.MEMORY, MemoryFact)
        bans = of_all(Need.BANS, BanFact)
        hosts = of_all(Need.HOSTS, HostFact)
        statements = of_all(Need.STATEMENTS, StatementFact)
        copies = of_all(Need.COPIES, CopyFact)
        workers = of_all(Need.WORKERS, WorkerFact)
        utilization = _utilization() if Need.UTILIZATION in needs else (0.0, 0.0)
        known: list[RouteFact] = []
        is_broker_missing = False
        if Need.ROUTES in needs:
            known, is_broker_missing = self._known_routes(missing)
            if is_broker_missing:
                notices.append("the broker did not answer: averages are 0")
        quantiles: tuple[QuantileFact, ...] = ()
        if Need.QUANTILES in needs and not is_broker_missing and asked_for(self.config().rules):
            quantiles = tuple(of_cells(QuantileFact, self._asker.broker(Need.QUANTILES.value)[0]))
        notices += [f"worker {number} did not answer: its rows are missing" for number in sorted(missing)]
        config = self.config()
        routes = self._route_views(config, known)
        process = self._totals().process()
        view = View(
            config=config,
            version=__version__,
            now_us=monotonic_us(),
            wall_s=wall(),
            process=process,
            consoles=process[ProcessWord.CONSOLES],
            routes=routes,
            sockets=sockets,
            memory=memory,
            bans=bans,
            hosts=hosts,
            statements=_merged(statements),
            copies=copies,
            workers=tuple(sorted(workers, key=lambda fact: fact.worker)),
            quantiles=quantiles,
            utilization=utilization,
            has_legacy_columns=has_legacy_columns,
        )
        return view, notices

    def find_client(self, number: int) -> str | None:
        """The id of the client with that number in SHOW CLIENTS. Yields."""
        view, _ = self.view({Need.SOCKETS}, has_legacy_columns=False)
        return next((fact.id for fact in view.sockets if fact.kind == "C" and fact.number == number), None)

    def _totals(self) -> Totals:
        """Sums over whoever is there now: good until others have had their turn."""
        return Totals(self._past, {-1: self._counters, **self._admission.peers})

    def _route_views(self, config: Config, known: Iterable[RouteFact]) -> tuple[RouteView, ...]:
        """Yields, where there are many."""
        rules = {rule.name: rule for rule in config.served}
        found = []
        totals = self._totals()
        for number, fact in enumerate(sorted(known, key=lambda fact: fact.route_id), 1):
            rule = rules.get(fact.rule)
            if rule is not None:
                found.append(RouteView(fact, rule, *name_of(fact, rule), totals.route(fact.route_id)))
            if number % CELLS_AT_ONCE == 0:
                gevent.sleep(0)
                totals = self._totals()
        return tuple(found)

    def _own(self, what: str) -> list[Any]:
        return [fact for facts in self._source(what) for fact in facts]

    def _known_routes(self, missing: set[int]) -> tuple[list[RouteFact], bool]:
        """As the broker knows them; without it those that any worker knows."""
        rows, is_missing = self._asker.broker("routes")
        if not is_missing:
            return of_cells(RouteFact, rows), False
        rows, lost = self._asker.workers("routes")
        missing.update(lost)
        facts: list[RouteFact] = [*self._own("routes"), *of_cells(RouteFact, rows)]
        return list({fact.route_id: fact for fact in facts}.values()), True


def _merged(facts: Iterable[StatementFact]) -> tuple[StatementFact, ...]:
    """One row a statement: workers call the same one by the same name."""
    found: dict[str, StatementFact] = {}
    for fact in facts:
        before = found.get(fact.name)
        references = fact.references + (before.references if before else 0)
        found[fact.name] = StatementFact(fact.name, fact.text, references)
    return tuple(found.values())


def _utilization() -> tuple[float, float]:
    """CPU and memory of this machine in use, in per cent (proc(5)). Yields."""
    busy, total = _cpu_ticks()
    gevent.sleep(UTILIZATION_S)
    busy_after, total_after = _cpu_ticks()
    cpu = 100 * (busy_after - busy) / max(1, total_after - total)
    sizes = {
        name: int(rest.split()[0])
        for name, _, rest in (line.partition(":") for line in Path("/proc/meminfo").read_text().splitlines())
    }
    return cpu, 100 * (1 - sizes["MemAvailable"] / sizes["MemTotal"])


def _cpu_ticks() -> tuple[int, int]:
    """Ticks that all cores were busy, and all ticks, since the start."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)
