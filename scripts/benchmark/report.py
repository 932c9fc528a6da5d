"""The results as a table, and as a chart for the README."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from html import escape
from pathlib import Path
from statistics import median
from typing import Any, Final

Measured = dict[tuple[str, str], dict[str, dict[int, float]]]
Record = dict[str, Any]  # run, round, case, contender, and numbers (or failed)
# cases whose figure is to be seen beside another case of the same contender
BESIDE: Final = {
    ("loaded-4", "tps"): "loaded-1",
    ("metrics-on", "cpu_us_per_tx"): "metrics-off",
    ("scraped-200", "p99_us"): "routes-200",
    ("shown-10000", "p99_us"): "clients-10000",
}
ORDER: Final = ("direct", "pgbouncer", "gpooler")
COST: Final = ("cpu_us_per_tx", "cpu_us_per_login", "cpu_us_per_mb", "bytes_per_client")  # drawn, first found
UNITS: Final = {
    "cpu_us_per_tx": "CPU per transaction",
    "cpu_us_per_login": "CPU per login",
    "cpu_us_per_mb": "CPU per MB",
    "bytes_per_client": "memory per client",
}


def read(path: Path) -> list[Record]:
    """The records of the last run in a file of JSON lines."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if record["run"] == records[-1]["run"]]


def collect(records: Iterable[Record]) -> Measured:
    """(case, metric) -> contender -> round -> value, in the order measured; NaN left out."""
    table: Measured = defaultdict(lambda: defaultdict(dict))
    for record in records:
        for metric, value in record.get("numbers", {}).items():
            if value is not None and not math.isnan(value):
                table[record["case"], metric][record["contender"]][record["round"]] = value
    return table


def ratios(values: dict[str, dict[int, float]]) -> list[float]:
    """Ours divided by PgBouncer's, for every round that has both."""
    ours, theirs = values.get("gpooler", {}), values.get("pgbouncer", {})
    return [ours[number] / theirs[number] for number in ours if theirs.get(number)]


def table(records: list[Record]) -> str:
    """Medians of all rounds, and the median, least and greatest ratio within a round."""
    lines = [
        f"{'case':<20} {'metric':<27}" + "".join(f"{name:>12}" for name in ORDER) + "   gpooler/pgbouncer"
    ]
    measured = collect(records)
    for (case, metric), values in measured.items():
        cells = "".join(f"{_number(values.get(name)):>12}" for name in ORDER)
        found = ratios(values)
        spread = f"   {median(found):.2f}  ({min(found):.2f}-{max(found):.2f})" if found else ""
        lines.append(f"{case:<20} {metric:<27}{cells}{spread}{_beside(measured, case, metric)}")
    failures = {(r["case"], r["contender"], r["failed"]) for r in records if "failed" in r}
    lines += [f"{case}: {name} could not: {text}" for case, name, text in sorted(failures)]
    return "\n".join(lines)


def _beside(measured: Measured, case: str, metric: str) -> str:
    """Our figure divided by that of the case it is compared with, by rounds."""
    other = BESIDE.get((case, metric), "")
    ours, theirs = (measured.get((name, metric), {}).get("gpooler", {}) for name in (case, other))
    found = [ours[number] / theirs[number] for number in ours if theirs.get(number)]
    return f"   {median(found):.2f} of {other}  ({min(found):.2f}-{max(found):.2f})" if found else ""


def _number(values: dict[int, float] | None) -> str:
    if not values:
        return "-"
    value = median(values.values())
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def chart(records: list[Record]) -> str:
    """An SVG of horizontal bars: gpooler's cost with PgBouncer's as 1."""
    bars = []
    costs = {key: value for key, value in collect(records).items() if key[1] in COST}
    for (case, metric), values in costs.items():
        if found := ratios(values):
            bars.append((f"{case}, {UNITS[metric]}", median(found)))
    left, row, width = 290, 22, 420
    longest = max([1.2, *(value for _, value in bars)])
    height = row * len(bars) + 60
    unit = width / longest
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 60}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<text x="10" y="20" font-size="14">gpooler\'s cost, PgBouncer = 1 (shorter is better)</text>',
    ]
    for number, (label, value) in enumerate(bars):
        y = 36 + number * row
        colour = "#2a7f62" if value <= 1 else "#b5652b"
        parts.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{value * unit:.1f}" height="15" fill="{colour}"/>')
        parts.append(f'<text x="{left + value * unit + 5:.1f}" y="{y + 12}">{value:.2f}</text>')
    line = left + unit
    parts.append(f'<line x1="{line:.1f}" x2="{line:.1f}" y1="30" y2="{height - 20}" stroke="#444"/>')
    parts.append("</svg>")
    return "\n".join(parts) + "\n"
