"""Writes docs/metrics.md from the table of metrics: ``python -m gpooler.stats.document``."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from gpooler.reasons import Reason
from gpooler.stats import catalogue as table

FILE: Final = Path(__file__).parents[2] / "docs" / "metrics.md"

_HEAD: Final = """\
<!-- Made by `python -m gpooler.stats.document`: change gpooler/stats/catalogue.py or document.py instead. -->

# Metrics

gpooler tells two systems what it does: **Graphite**, through statsd, and **Prometheus**, by HTTP. Both see
sums over all workers; what a worker that died has counted is kept.

```toml
[metrics]
statsd_host = "127.0.0.1"     # statsd_port = 8125, statsd_prefix = "gpooler"
prometheus_port = 9127        # prometheus_host = "127.0.0.1"
```

- To statsd everything goes each `stats_interval` of `[logging]`, in as few datagrams as it fits in. A
  statsd that is down, slow or not to be resolved costs nothing but the count `process.lost.metrics`. Parts
  of a name are letters, digits, `_` and `-`; other bytes are written as `-xHH`.
- `GET /metrics` answers in Prometheus' text format or as OpenMetrics, whichever the Accept header prefers.
  Nothing is kept between two scrapes.
- A route is known by `database` and `user`: those of its rule or, where the rule says `default`, those on
  the server. Rules of one name (they differ by address or connection type) are added up.

## Health

On the port of `/metrics`:

| path | answer |
| --- | --- |
| `/healthz` | 200 as long as gpooler lives, to the last moment of a graceful shutdown |
| `/readyz` | 200 `ready`, or 503: `starting`, `draining`, `no worker accepts clients` |

A graceful shutdown shows in `/readyz` first. What follows (no new clients; idle ones are dropped) follows
at once, or after `drain_delay_ms` of `[service]`: give load balancers the time of two or three of their
checks there. In HAProxy:

```
option httpchk GET /readyz
server gpooler1 10.0.0.5:6432 check port 9127
```

The master holds the listening socket and the broker answers: if the broker dies, requests wait for the next
one.

"""
_QUANTILES: Final = """
Histograms count times in two buckets for each power of two of microseconds, from 1 us to 36 minutes.
Prometheus is shown every fourth bound, 64 us to 67 s. Quantiles (option `quantiles` of a rule) are made
from all of them; they may be half too long or a third too short, and mostly are far nearer.

"""
_PGBOUNCER: Final = """
## The names of pgbouncer_exporter

So that dashboards made for it show something. What gpooler has no counterpart of is left out.

"""


def document() -> str:
    """The whole of docs/metrics.md."""
    return "".join(
        (
            _HEAD,
            "## Routes\n\nLabels `database` and `user`; statsd: `routes.DATABASE.USER.…`.\n\n",
            _table(_route_lines()),
            _QUANTILES,
            _reasons(),
            "\n## gpooler as a whole\n\n",
            _table(_process_lines()),
            "\n`NAME` of a process is `master`, `broker`, `worker_1` and so on.\n",
            _PGBOUNCER,
            _table(_pgbouncer_lines()),
        )
    )


def _table(lines: Iterable[tuple[str, str, str, str]]) -> str:
    head = ("Prometheus", "type", "statsd", "what it says")
    rows = [head, ("---",) * 4, *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(row: table.Row, kind: table.Type) -> tuple[str, str, str, str]:
    suffix = "_total" if kind is table.Type.COUNTER else ""
    return f"`{table.NAMESPACE}{row.name}{suffix}`", kind, f"`{row.statsd}`", row.help


def _other(
    row: table.OtherRow, namespace: str = table.NAMESPACE, known: tuple[str, ...] = table.ROUTE_LABELS
) -> tuple[str, str, str, str]:
    """``known``: labels that need not be said."""
    suffix = "_total" if row.type is table.Type.COUNTER else ""
    own = [label for label in row.labels if label not in known]
    labels = f"{{{','.join(own)}}}" if own else ""
    return (
        f"`{namespace}{row.name}{suffix}{labels}`",
        row.type,
        f"`{row.statsd}`" if row.statsd else "",
        row.help,
    )


def _route_lines() -> Iterator[tuple[str, str, str, str]]:
    yield from (_row(row, table.Type.GAUGE) for row in table.ROUTE_GAUGES)
    yield _other(table.MAXWAIT)
    yield from (_row(row, table.Type.COUNTER) for row in table.ROUTE_COUNTERS)
    for time in table.ROUTE_TIMES:
        statsd = f"`{time.statsd}`, mean in ms" if time.statsd else ""
        yield f"`{table.NAMESPACE}{time.name}`", table.Type.HISTOGRAM, statsd, time.help
    yield from (_other(row) for row in table.ROUTE_OTHERS if row is not table.MAXWAIT)


def _process_lines() -> Iterator[tuple[str, str, str, str]]:
    yield from (_row(row, table.Type.GAUGE) for row in table.PROCESS_GAUGES)
    yield from (_row(row, table.Type.COUNTER) for row in table.PROCESS_COUNTERS)
    yield from (_other(row) for row in table.PROCESS_OTHERS)


def _pgbouncer_lines() -> Iterator[tuple[str, str, str, str]]:
    yield from (_other(row, "") for row in table.LISTS)
    for aliases, labels in ((table.POOLS, "database,user"), (table.STATS_TOTALS, "database")):
        for alias in aliases:
            suffix = "_total" if alias.type is table.Type.COUNTER else ""
            yield f"`{alias.name}{suffix}{{{labels}}}`", alias.type, "", alias.help
    yield _other(table.POOLS_MAXWAIT, "", ())


def _reasons() -> str:
    def names(are_errors: bool) -> str:
        found = [
            f"`{reason.label}`"
            for reason in Reason
            if reason != Reason.NONE and (reason not in table.NORMAL_ENDS) is are_errors
        ]
        return ", ".join(found)

    return f"Reasons of errors: {names(True)}.\n\nReasons of ends: {names(False)}.\n"


if __name__ == "__main__":
    FILE.write_text(document(), encoding="utf-8")
