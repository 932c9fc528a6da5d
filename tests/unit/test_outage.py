"""How long a route's servers could not be opened."""

from gpooler.server.outage import CALM_US, Outages

TIMEOUT_US = 3_000_000
ROUTE, OTHER = 1, 2


def test_an_outage_begins_with_the_first_try_that_failed() -> None:
    outages = Outages(TIMEOUT_US)
    assert outages.failed(ROUTE, 1_000, 1_500) == 500
    assert outages.failed(ROUTE, 2_000, 2_500) == 1_500
    assert outages.failed(OTHER, 2_000, 2_500) == 500


def test_tries_that_overlap_count_from_the_earliest() -> None:
    outages = Outages(TIMEOUT_US)
    assert outages.failed(ROUTE, 5_000, 6_000) == 1_000
    assert outages.failed(ROUTE, 1_000, 7_000) == 6_000


def test_a_success_ends_it() -> None:
    outages = Outages(TIMEOUT_US)
    outages.failed(ROUTE, 1_000, 1_500)
    outages.over(ROUTE)
    outages.over(OTHER)
    assert outages.failed(ROUTE, 2_000, 2_100) == 100


def test_a_failure_of_long_ago_is_forgotten() -> None:
    outages = Outages(TIMEOUT_US)
    outages.failed(ROUTE, 0, 1_000)
    later = 1_000 + 2 * TIMEOUT_US + CALM_US
    assert outages.failed(ROUTE, later, later + 10) == later + 10
    again = later + 10 + 2 * TIMEOUT_US + CALM_US + 1
    assert outages.failed(ROUTE, again, again + 10) == 10
