"""The arithmetic of scripts/bench."""

import math
from xml.etree import ElementTree

from scripts.benchmark import report
from scripts.benchmark.measure import percentile

RECORDS: list[report.Record] = [
    {"run": "r", "round": number, "case": "select", "contender": name, "numbers": {"cpu_us_per_tx": value}}
    for number, (ours, theirs) in enumerate([(8.0, 10.0), (9.0, 10.0), (30.0, 20.0)])
    for name, value in (("gpooler", ours), ("pgbouncer", theirs), ("direct", None))
]


def test_percentile_is_the_smallest_value_that_covers_the_share() -> None:
    values = list(range(100, 0, -1))
    assert percentile(values, 0.5) == 50
    assert percentile(values, 0.99) == 99
    assert percentile([7], 0.99) == 7
    assert math.isnan(percentile([], 0.5))


def test_ratios_are_taken_within_a_round() -> None:
    values = report.collect(RECORDS)["select", "cpu_us_per_tx"]
    assert report.ratios(values) == [0.8, 0.9, 1.5]
    assert "0.90  (0.80-1.50)" in report.table(RECORDS)


def test_a_failure_is_named() -> None:
    failed = {"run": "r", "round": 0, "case": "copy", "contender": "gpooler", "failed": "psql: no"}
    assert "copy: gpooler could not: psql: no" in report.table([*RECORDS, failed])


def test_the_chart_is_an_svg_with_a_bar_a_case() -> None:
    root = ElementTree.fromstring(report.chart(RECORDS))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "0.90" in [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_a_case_is_set_beside_the_one_it_is_compared_with() -> None:
    records: list[report.Record] = [
        {"run": "r", "round": number, "case": case, "contender": "gpooler", "numbers": {"tps": value}}
        for number in range(2)
        for case, value in (("loaded-1", 1000.0), ("loaded-4", 900.0 + 100 * number))
    ]
    assert "0.95 of loaded-1  (0.90-1.00)" in report.table(records)
