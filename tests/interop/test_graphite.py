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

    def most(name: str) -> float:
        return max(graphite.values(name), default=0)

    def arrives(check: Callable[[], bool]) -> None:
        eventually(check, within=WITHIN_S)

    with gpooler.raw().login() as one, gpooler.raw().login() as two:
        two.query("BEGIN")
        for _ in range(20):
            one.query("SELECT pg_sleep(0.01)")
        arrives(lambda: sum_of("queries") == 21)
        arrives(lambda: last(f"{route}.clients.active") == 1)
        arrives(lambda: last(f"{route}.clients.total") == 2)
        arrives(lambda: last("prod.pool.process.workers") == 2)
        arrives(lambda: sum_of("logins") == 2)
        arrives(lambda: sum_of("servers.opened") == len(postgres.activity()))
        arrives(lambda: most(f"timers.{route}.time.query.mean") >= 5)
        arrives(lambda: most(f"gauges.{route}.quantiles.query.p95_ms") >= 8)
        descriptors = "gpooler_process_open_fds"
        arrives(
            lambda: (
                last("prod.pool.process.worker_1.open_fds")
                == scraper.scrape().value(descriptors, process="worker_1")
            )
        )
        arrives(lambda: most("gauges.prod.pool.process.broker.resident_bytes") > 1e6)

        graphite.stop_statsd()
        arrives(lambda: scraper.scrape().value("gpooler_lost_metrics_total") > 0)
        assert one.query("SELECT 1") == [["1"]]
        graphite.start_statsd()
        two.query("COMMIT")
        arrives(lambda: last(f"{route}.clients.active") == 0)
        arrives(lambda: (last("prod.pool.process.lost.metrics") or 0) >= 1)
