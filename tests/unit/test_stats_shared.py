"""The counters in shared memory and their sums."""

import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import gpooler.relay
from gpooler.reasons import Reason
from gpooler.stats import registry
from gpooler.stats.histogram import BUCKETS, HISTOGRAM_WORDS, SUM_AT, bucket_of
from gpooler.stats.registry import ERROR_BASE, MAX_ROUTES, ProcessWord, RouteWord, Time
from gpooler.stats.shared import SharedCounters, Totals, errors_of, fold


@pytest.fixture
def counters() -> Iterator[SharedCounters]:
    made = SharedCounters.create()
    yield made
    made.close()


@pytest.fixture
def past() -> Iterator[SharedCounters]:
    made = SharedCounters.create()
    yield made
    made.close()


def test_what_is_written_is_read_through_another_mapping(counters: SharedCounters) -> None:
    other = SharedCounters.attach(os.dup(counters.fd))
    counters.add_route(7, RouteWord.QUERIES, 3)
    counters.add_route(7, RouteWord.QUERIES)
    counters.set_process(ProcessWord.CLIENTS, 5)
    counters.add_process(ProcessWord.CLIENTS, -2)
    assert other.route(7, RouteWord.QUERIES) == 4
    assert other.route_block(7)[RouteWord.QUERIES] == 4
    assert other.process(ProcessWord.CLIENTS) == 3
    other.close()
    other.close()


def test_the_last_route_fits(counters: SharedCounters) -> None:
    counters.set_route(MAX_ROUTES - 1, 63, 9)
    assert counters.route_block(MAX_ROUTES - 1)[63] == 9
    assert len(counters.route_block(MAX_ROUTES - 1)) == 64


def test_the_address_is_aligned_and_is_the_first_word(counters: SharedCounters) -> None:
    counters.set_process(0, 0x1122334455667788)
    assert counters.address % 8 == 0
    assert ctypes.c_uint64.from_address(counters.address).value == 0x1122334455667788


def test_asking_for_used_routes_fills_no_hole(counters: SharedCounters) -> None:
    assert list(counters.used_routes()) == []
    counters.add_route(40000, RouteWord.QUERIES)
    used = list(counters.used_routes())
    assert 40000 in used
    assert len(used) < 1000
    assert os.fstat(counters.fd).st_blocks * 512 < 64 * 1024


def test_totals_add_workers_and_take_the_oldest_wait(past: SharedCounters) -> None:
    totals = Totals(past)
    for worker, wait in ((1, 0), (2, 500), (3, 400)):
        counters = SharedCounters.create()
        counters.add_route(1, RouteWord.QUERIES, worker)
        counters.set_route(1, RouteWord.CLIENTS_WAITING, worker)
        counters.set_route(1, RouteWord.OLDEST_WAIT_US, wait)
        counters.add_process(ProcessWord.LOGINS, worker)
        totals.attach(worker, counters)
    block = totals.route(1)
    assert block[RouteWord.QUERIES] == 6
    assert block[RouteWord.CLIENTS_WAITING] == 6
    assert block[RouteWord.OLDEST_WAIT_US] == 400
    assert totals.process()[ProcessWord.LOGINS] == 6
    for worker in (1, 2, 3):
        totals.detach(worker)
    assert totals.route(1)[RouteWord.QUERIES] == 0


def test_a_dead_workers_counters_are_kept_once_and_its_gauges_are_gone(past: SharedCounters) -> None:
    totals = Totals(past)
    dead = SharedCounters.create()
    dead.add_route(2, RouteWord.QUERIES, 10)
    dead.add_route(2, ERROR_BASE + Reason.CLIENT_GONE, 2)
    dead.set_route(2, RouteWord.SERVERS_IDLE, 4)
    dead.add_process(ProcessWord.LOGINS, 3)
    dead.set_process(ProcessWord.CLIENTS, 3)
    totals.attach(1, dead)
    fold(past, dead)
    fold(past, dead)
    for _ in range(2):
        block = totals.route(2)
        assert block[RouteWord.QUERIES] == 10
        assert block[RouteWord.SERVERS_IDLE] == 0
        assert errors_of(block) == {Reason.CLIENT_GONE: 2}
        assert totals.process()[ProcessWord.LOGINS] == 3
        assert totals.process()[ProcessWord.CLIENTS] == 0
        totals.detach(1)


def test_every_reason_has_a_word() -> None:
    words = {ERROR_BASE + reason for reason in Reason}
    assert not words & set(RouteWord)
    assert ERROR_BASE + max(Reason) < registry.WORDS_PER_BLOCK


def test_the_relays_constants_are_those_of_the_registry() -> None:
    text = (Path(next(iter(gpooler.relay.__path__))) / "counters.pxd").read_text()
    found = {name: int(value) for name, value in re.findall(r"^    (\w+) = (\d+)$", text, re.MULTILINE)}
    wanted = {"WORDS_PER_BLOCK": registry.WORDS_PER_BLOCK, "ERROR_BASE": ERROR_BASE}
    wanted |= {f"PROCESS_{word.name}": word.value for word in ProcessWord}
    wanted |= {f"ROUTE_{word.name}": word.value for word in RouteWord}
    wanted |= {f"TIME_{time.name}": time.value for time in Time}
    wanted |= {"HISTOGRAM_WORDS": HISTOGRAM_WORDS, "HISTOGRAM_BUCKETS": BUCKETS}
    for name in ("HUB_TIMES", "RELAY_TIME_WORDS", "HUB_TIME_WORDS", "RELAY_TIMES_AT", "HUB_TIMES_AT"):
        wanted[name] = getattr(registry, name)
    assert found == wanted


def test_histograms_are_added_up_and_outlive_their_worker(past: SharedCounters) -> None:
    totals = Totals(past)
    for worker in (1, 2):
        counters = SharedCounters.create()
        for us in (3, 1000 * worker):
            counters.add_route(MAX_ROUTES - 1, RouteWord.LOGINS)
            counters.observe(MAX_ROUTES - 1, Time.LOGIN, us)
        counters.add_route(7, RouteWord.ASSIGNMENTS)
        counters.add_route(7, RouteWord.QUERY_US, 50)
        counters.add_histogram(7, Time.QUERY, [*[0] * 9, 1, *[0] * 54])
        totals.attach(worker, counters)
    for _ in range(2):
        logins = totals.histograms(MAX_ROUTES - 1)[Time.LOGIN]
        assert logins[SUM_AT] == 3006
        assert {bucket: count for bucket, count in enumerate(logins[:BUCKETS]) if count} == {
            bucket_of(3): 2,
            bucket_of(1000): 1,
            bucket_of(2000): 1,
        }
        queries = totals.histograms(7)[Time.QUERY]
        assert (queries[9], queries[SUM_AT]) == (2, 100)
        fold(past, totals.workers[1])  # dead: the sums stay what they were
        fold(past, totals.workers[1])
    totals.detach(1)
    assert totals.histograms(7)[Time.QUERY] == queries
    totals.detach(2)


def test_reading_histograms_fills_no_hole(counters: SharedCounters, past: SharedCounters) -> None:
    totals = Totals(past)
    totals.attach(1, SharedCounters.attach(os.dup(counters.fd)))
    for route_id in range(0, 60_000, 1000):
        counters.add_route(route_id, RouteWord.CLIENTS)
    before = os.fstat(counters.fd).st_blocks
    for route_id in range(0, 60_000, 1000):
        assert totals.histograms(route_id) == {}
    fold(past, counters)
    assert os.fstat(counters.fd).st_blocks == before
    totals.detach(1)
