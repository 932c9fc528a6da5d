"""What gpooler tells statsd, read back from Graphite's files."""

from collections.abc import Callable, Iterator

import pytest

from tests.harness import Gpooler, Postgres, Unavailable, eventually, free_port
from tests.harness.graphite import Graphite
from tests.harness.scrape import Scraper

Factory = Callable[..., Gpooler]
WITHIN_S = 30  # two intervals of gpooler, statsd and carbon


@pytest.fixture
def graphite() -> Iterator[Graphite]:
    try:
        made = Graphite()
    except Unavailable as error:
        pytest.skip(str(error))
    with made:
        yield made


def test_values_arrive_in_graphite_and_again_when_statsd_was_away(
    postgres: Postgres, gpooler_factory: Factory, graphite: Graphite
) -> None:
    scraper = Scraper(free_port())
    gpooler = gpooler_factory(
        postgres,
        rule={"quantiles": [0.95]},
        config={
            "performance": {"workers": 2},
            "logging": {"stats_interval": 1, "log_stats": False},
            "metrics": {
                "statsd_host": graphite.host,
                "statsd_port": graphite.port,
                "statsd_prefix": "prod.pool",
                "prometheus_port": scraper.port,
            },
        },
    )
    route = "prod.pool.routes.app.trust_user"

    def sum_of(name: str) -> float:
        return sum(graphite.values(f"counters.{route}.{name}.count"))

    def last(name: str) -> float | None:
        return next(reversed(graphite.values(f"gauges.{name}")), None)

    with gpooler.raw().login() as one, gpooler.raw().login() as two:
        two.query("BEGIN")
        for _ in range(20):
            one.query("SELECT pg_sleep(0.01)")
        eventually(lambda: sum_of("queries") == 21, within=WITHIN_S)
        eventually(lambda: last(f"{route}.clients.active") == 1, within=WITHIN_S)
        assert last(f"{route}.clients.total") == 2
        assert last("prod.pool.process.workers") == 2
        assert sum_of("logins") == 2
        assert sum_of("servers.opened") == len(postgres.activity())
        assert max(graphite.values(f"timers.{route}.time.query.mean")) >= 5
        assert max(graphite.values(f"gauges.{route}.quantiles.query.p95_ms")) >= 8
        assert last("prod.pool.process.worker_1.open_fds") == scraper.scrape().value(
            "gpooler_process_open_fds", process="worker_1"
        )
        assert max(graphite.values("gauges.prod.pool.process.broker.resident_bytes")) > 1e6

        graphite.stop_statsd()
        eventually(lambda: scraper.scrape().value("gpooler_lost_metrics_total") > 0, within=WITHIN_S)
        assert one.query("SELECT 1") == [["1"]]
        graphite.start_statsd()
        two.query("COMMIT")
        eventually(lambda: last(f"{route}.clients.active") == 0, within=WITHIN_S)
        assert (last("prod.pool.process.lost.metrics") or 0) >= 1
