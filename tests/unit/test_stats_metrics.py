"""Snapshots as metrics and as log lines."""

import string
from datetime import UTC, datetime

from hypothesis import example, given
from hypothesis import strategies as st

from gpooler.config.certificates import Expiry
from gpooler.reasons import Reason
from gpooler.stats.metrics import (
    NAME_MOST,
    Kind,
    Metric,
    certificate_metrics,
    metrics,
    safe,
    safe_prefix,
)
from gpooler.stats.registry import ERROR_BASE, WORDS_PER_BLOCK, ProcessWord, RouteWord
from gpooler.stats.snapshot import RouteName, Snapshot, take
from gpooler.stats.summary import summary

NAME = RouteName("order_app", "web")
ALLOWED = set(string.ascii_letters + string.digits + "_-")


def block(**words: int) -> list[int]:
    made = [0] * WORDS_PER_BLOCK
    for name, value in words.items():
        made[RouteWord[name.upper()]] = value
    return made


def snapshot(at_s: int, route: list[int] | None, **process: int) -> Snapshot:
    words = [0] * WORDS_PER_BLOCK
    for name, value in process.items():
        words[ProcessWord[name.upper()]] = value
    return Snapshot(at_s * 1_000_000, 2, words, {} if route is None else {NAME: route})


def told(before: Snapshot | None, now: Snapshot) -> dict[str, tuple[Kind, float]]:
    found = list(metrics(before, now))
    assert len({metric.name for metric in found}) == len(found)
    return {metric.name.replace("routes.order_app.web.", ""): (metric.kind, metric.value) for metric in found}


def test_days_of_certificates_have_a_name_for_each_file() -> None:
    end = datetime(2030, 1, 1, tzinfo=UTC)
    expiries = [
        Expiry("listen", "*:6432", "tls_cert_file", "a.pem", end, 12.5),
        Expiry("listen", "*:6432", "tls_ca_file", "b.pem", end, 400.0),
        Expiry("storage", "orders", "tls_cert_file", "c.pem", end, -1.25),
    ]
    assert list(certificate_metrics(expiries)) == [
        Metric("process.certificate_days.listen.-x2a-x3a6432", Kind.GAUGE, 12.5),
        Metric("process.authority_days.listen.-x2a-x3a6432", Kind.GAUGE, 400.0),
        Metric("process.certificate_days.storage.orders", Kind.GAUGE, -1.25),
    ]


class FakeSums:
    """Sums made of given blocks."""

    def __init__(self, routes: dict[int, list[int]]) -> None:
        self._routes = routes
        self.workers = {0: None, 1: None, 2: None}

    def route(self, route_id: int) -> list[int]:
        return list(self._routes[route_id])

    def process(self) -> list[int]:
        return [0] * WORDS_PER_BLOCK


def test_the_first_snapshot_tells_gauges_only() -> None:
    found = told(None, snapshot(5, block(clients=3, queries=1000), logins=9, clients=4))
    assert {kind for kind, _ in found.values()} == {Kind.GAUGE}
    assert found["clients.total"] == (Kind.GAUGE, 3)
    assert found["process.clients"] == (Kind.GAUGE, 4)
    assert found["process.workers"] == (Kind.GAUGE, 2)


def test_counters_tell_what_they_grew_by_and_times_are_means() -> None:
    before = snapshot(0, block(queries=10, query_us=1000, transactions=5, wait_us=7, assignments=2), logins=3)
    now = snapshot(
        3,
        block(
            clients_active=2, clients_waiting=1, servers_idle=4, queries=30, query_us=9000, transactions=5,
            wait_us=7, assignments=2, bytes_in=100, oldest_wait_us=2_500_000,
        ),
        logins=5,
    )  # fmt: skip
    found = told(before, now)
    assert found["queries"] == (Kind.COUNT, 20)
    assert found["time.query"] == (Kind.TIME, 0.4)
    assert found["transactions"] == (Kind.COUNT, 0)
    assert "time.transaction" not in found
    assert "time.wait" not in found
    assert found["bytes.in"] == (Kind.COUNT, 100)
    assert found["servers.idle"] == (Kind.GAUGE, 4)
    assert found["clients.maxwait_ms"] == (Kind.GAUGE, 500)
    assert found["process.logins"] == (Kind.COUNT, 2)


def test_a_route_that_is_new_counts_from_zero() -> None:
    assert told(snapshot(0, None), snapshot(3, block(queries=7)))["queries"] == (Kind.COUNT, 7)


def test_a_counter_that_begins_anew_is_never_negative() -> None:
    found = told(snapshot(0, block(queries=100), logins=10), snapshot(3, block(queries=4), logins=1))
    assert found["queries"] == (Kind.COUNT, 4)
    assert found["process.logins"] == (Kind.COUNT, 1)


def test_ends_are_told_by_reason_and_errors_apart_from_normal_ones() -> None:
    now = block()
    now[ERROR_BASE + Reason.CLIENT_GONE] = 2
    now[ERROR_BASE + Reason.CLIENT_TERMINATED] = 5
    found = told(snapshot(0, block()), snapshot(3, now))
    assert found["errors.client_gone"] == (Kind.COUNT, 2)
    assert found["ends.client_terminated"] == (Kind.COUNT, 5)
    assert "errors.server_lost" not in found


def test_routes_of_one_name_are_added_and_the_oldest_waiter_counts() -> None:
    sums = FakeSums(
        {
            1: block(queries=1, oldest_wait_us=0),
            2: block(queries=2, oldest_wait_us=900),
            3: block(queries=4, oldest_wait_us=500),
            4: block(queries=8),
        }
    )
    taken = take(1000, sums, [(1, "d", "u"), (2, "d", "u"), (3, "d", "u"), (4, "d", "v")])
    assert taken.workers == 2
    assert taken.routes[RouteName("d", "u")][RouteWord.QUERIES] == 7
    assert taken.routes[RouteName("d", "u")][RouteWord.OLDEST_WAIT_US] == 500
    assert taken.routes[RouteName("d", "v")][RouteWord.QUERIES] == 8


def test_common_names_stay_readable() -> None:
    assert [safe(name) for name in ("order_app", "web-1", "a.b", "", "ü", "-x")] == [
        "order_app", "web-1", "a-x2eb", "-x", "-xc3-xbc", "-x2dx",
    ]  # fmt: skip
    assert safe_prefix("prod.eu.gpooler.") == "prod.eu.gpooler"
    assert safe_prefix("a b:c") == "a-x20b-x3ac"


@given(st.text(), st.text())
@example("a.b", "a-x2eb")
@example("-", "-x2d")
@example("", "-x")
@example("x" * 300, "x" * 301)
def test_a_safe_name_is_allowed_and_different_texts_have_different_ones(one: str, other: str) -> None:
    name = safe(one)
    assert set(name) <= ALLOWED
    assert 0 < len(name) <= NAME_MOST
    assert (name == safe(other)) == (one == other)


def test_metric_names_are_safe_whatever_a_client_calls_itself() -> None:
    route = RouteName("a.b:1|c\n@", "\udcff")
    now = Snapshot(0, 1, [0] * WORDS_PER_BLOCK, {route: block()})
    for metric in metrics(now, now):
        assert isinstance(metric, Metric)
        assert set(metric.name) <= ALLOWED | {"."}
        assert len(metric.name.split(".")) <= 5


def test_summary_tells_rates_of_a_second_and_skips_idle_routes() -> None:
    before = snapshot(0, block(transactions=10, transaction_us=5))
    now = snapshot(
        2,
        block(
            clients=3, servers_active=1, servers_idle=2, transactions=210, transaction_us=40_005, bytes_in=10
        ),
    )
    assert list(summary(before, now)) == [
        (
            NAME,
            "clients 3 active 0 waiting 0, servers active 1 idle 2, 100 transactions/s 200 us,"
            " 0 queries/s 0 us, wait 0 us, in 5 bytes/s, out 0 bytes/s",
        )
    ]
    idle = snapshot(0, block(queries=5))
    assert list(summary(idle, snapshot(2, block(queries=5)))) == []
