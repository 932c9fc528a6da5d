"""A scene as text for Prometheus, read back by the parsers of its library; and docs/metrics.md."""

import re
from datetime import UTC, datetime
from itertools import pairwise

import pytest
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics_parser

from gpooler.config.certificates import Expiry
from gpooler.reasons import Reason
from gpooler.stats import document
from gpooler.stats.histogram import HISTOGRAM_WORDS, SUM_AT, bucket_of
from gpooler.stats.prometheus import Scene, render
from gpooler.stats.quantiles import Quantile, Windows
from gpooler.stats.registry import ERROR_BASE, WORDS_PER_BLOCK, RouteWord, Time
from gpooler.stats.snapshot import ProcessUse, RouteName, Snapshot

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"
APP = RouteName("app", "web")
ODD = RouteName('a"\\\n{}', "\udcff")

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def histogram(*times: int) -> list[int]:
    made = [0] * HISTOGRAM_WORDS
    for us in times:
        made[bucket_of(us)] += 1
    made[SUM_AT] = sum(times)
    return made


def scene() -> Scene:
    block = [0] * WORDS_PER_BLOCK
    block[RouteWord.CLIENTS] = 5
    block[RouteWord.CLIENTS_WAITING] = 2
    block[RouteWord.QUERIES] = 7
    block[RouteWord.QUERY_US] = 1_500_000
    block[RouteWord.OLDEST_WAIT_US] = 8_000_000
    block[ERROR_BASE + Reason.CLIENT_GONE] = 3
    block[ERROR_BASE + Reason.SERVER_IDLE] = 4
    snapshot = Snapshot(
        at_us=9_250_000,
        workers=2,
        process=[0] * WORDS_PER_BLOCK,
        routes={APP: block, RouteName("app", "other"): block, ODD: block},
        uses={"worker_1": ProcessUse(4096, 250, 7), "master": ProcessUse(1, 0, None)},
    )
    return Scene(
        snapshot=snapshot,
        times={APP: {Time.QUERY: histogram(3, 100, 5_000, 90_000_000)}},
        quantiles=(Quantile(APP, Time.QUERY, 0.99, 1234.0),),
        is_draining=True,
        lost_metrics=6,
        certificates=(
            Expiry("listen", "6432", "tls_cert_file", "c.pem", datetime.fromtimestamp(2e9, UTC), 1.0),
        ),
    )


def read(accept: str) -> Samples:
    body, content_type = render(scene(), accept, lambda: None)
    if accept == OPENMETRICS:
        assert content_type.startswith("application/openmetrics-text")
        families = list(openmetrics_parser.text_string_to_metric_families(body.decode()))
    else:
        assert content_type.startswith("text/plain; version=0.0.4")
        families = list(parser.text_string_to_metric_families(body.decode()))
    assert len({family.name for family in families}) == len(families)
    samples = [sample for family in families for sample in family.samples]
    found = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(found) == len(samples)
    return found


def test_both_formats_say_the_same() -> None:
    assert read("") == read(OPENMETRICS)


def test_words_times_and_the_rest_become_samples() -> None:
    found = read("text/plain")

    def value(name: str, database: str = "app", user: str = "web", **labels: str) -> float:
        return found[name, frozenset({"database": database, "user": user, **labels}.items())]

    assert value("gpooler_clients") == 5
    assert value("gpooler_queries_total") == 7
    assert value("gpooler_maxwait_seconds") == 1.25
    assert value("gpooler_errors_total", reason="client_gone") == 3
    assert value("gpooler_ends_total", reason="server_idle") == 4
    assert value("gpooler_query_seconds_bucket", le="6.4e-05") == 1
    assert value("gpooler_query_seconds_bucket", le="0.000256") == 2
    assert value("gpooler_query_seconds_bucket", le="67.108864") == 3
    assert value("gpooler_query_seconds_bucket", le="+Inf") == 4
    assert value("gpooler_query_seconds_count") == 4
    assert value("gpooler_query_seconds_sum") == 90.005103
    assert value("gpooler_wait_seconds_count") == 0
    assert value("gpooler_query_quantile_seconds", quantile="0.99") == 0.001234
    assert value("pgbouncer_pools_client_active_connections") == 3
    assert value("pgbouncer_pools_client_maxwait_seconds") == 1.25
    alone = {name: value for (name, labels), value in found.items() if not labels}
    assert alone["gpooler_workers"] == 2
    assert alone["gpooler_draining"] == 1
    assert alone["gpooler_lost_metrics_total"] == 6
    assert alone["pgbouncer_pools"] == 3
    assert (
        found["pgbouncer_stats_totals_queries_duration_seconds_total", frozenset({("database", "app")})] == 3
    )
    worker, master = (frozenset({("process", name)}) for name in ("worker_1", "master"))
    assert found["gpooler_process_resident_memory_bytes", worker] == 4096
    assert found["gpooler_process_cpu_seconds_total", worker] == 0.25
    assert found["gpooler_process_open_fds", worker] == 7
    assert ("gpooler_process_open_fds", master) not in found
    certificate = {"section": "listen", "name": "6432", "option": "tls_cert_file"}
    assert found["gpooler_certificate_not_after_seconds", frozenset(certificate.items())] == 2e9


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_names_of_any_bytes_are_labels(accept: str) -> None:
    users = {
        dict(labels)["user"]
        for (name, labels) in read(accept)
        if name == "gpooler_clients" and ("database", ODD.database) in labels
    }
    assert [re.fullmatch("\ufffd [0-9a-f]{12}", user) is not None for user in users] == [True]


def test_there_is_a_pause_behind_each_route_of_each_family() -> None:
    pauses: list[int] = []
    body, _ = render(scene(), "", lambda: pauses.append(1))
    of_routes = set(
        re.findall(r'^(\w+?)(?:_bucket|_count|_sum)?\{database="app".*user="web"', body.decode(), re.M)
    )
    assert len(pauses) >= 3 * (len(of_routes) - 1) > 60  # quantiles are few


def test_quantiles_over_all_are_of_what_every_route_measured() -> None:
    other = RouteName("other", "u")
    windows = Windows()
    start = {APP: {Time.QUERY: histogram(5000)}, other: {Time.QUERY: histogram()}}
    assert not list(windows.over_all(start, (1.0,)))
    windows.rotate(start)
    assert not list(windows.over_all(start, (1.0,)))
    now = {APP: {Time.QUERY: histogram(5000, 100, 100, 100)}, other: {Time.QUERY: histogram(70_000)}}
    found = {q: us for _, q, us in windows.over_all(now, (0.5, 1.0))}
    assert 96 <= found[0.5] <= 128
    assert 65_536 <= found[1.0] <= 98_304


def test_quantiles_are_those_of_the_last_one_to_two_intervals() -> None:
    windows = Windows()
    wanted = {APP: (0.5,)}

    def told(now: dict[RouteName, dict[Time, list[int]]]) -> list[int]:
        return [int(found.us) for found in windows.quantiles(now, wanted)]

    moments = [
        {APP: {Time.QUERY: histogram(*times)}}
        for times in (
            [2] * 9,
            [2] * 9 + [1000] * 3,
            [2] * 9 + [1000] * 3 + [64_000],
            [2] * 9 + [1000] * 3 + [64_000],
        )
    ]
    assert told(moments[0]) == []
    found = []
    for before, now in pairwise([*moments, moments[-1]]):
        windows.rotate(before)
        found.append(told(now))
    assert [len(each) for each in found] == [1, 1, 1, 0]
    assert 512 <= found[0][0] <= 1024
    assert 512 <= found[1][0] <= 1024
    assert 49_152 <= found[2][0] <= 65_536


def test_the_metrics_in_docs_are_not_stale_and_all_there() -> None:
    text = document.FILE.read_text()
    assert text == document.document()
    body, _ = render(scene(), OPENMETRICS, lambda: None)
    for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", body.decode(), re.MULTILINE):
        shown = f"{name}_total" if kind == "counter" else name
        assert re.search(rf"^\| `{shown}(\{{\S+\}})?` \| {kind} \|", text, re.MULTILINE), name
