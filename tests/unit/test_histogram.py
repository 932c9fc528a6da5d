"""Histograms of times, beside ddsketch as an oracle of quantiles."""

import random

import pytest
from ddsketch import DDSketch
from hypothesis import given
from hypothesis import strategies as st

from gpooler.relay.probe import histogram_bucket
from gpooler.stats.histogram import (
    BUCKETS,
    EXPOSED_POWERS,
    HISTOGRAM_WORDS,
    bucket_of,
    count,
    exposed,
    grown,
    lower_bound,
    quantile,
)

TIMES = st.integers(min_value=0, max_value=(1 << 64) - 1)


def histogram_of(times: list[int]) -> list[int]:
    made = [0] * HISTOGRAM_WORDS
    for us in times:
        made[bucket_of(us)] += 1
    return made


@given(TIMES | st.integers(min_value=0, max_value=70).map(lambda power: (1 << power) % (1 << 64)))
def test_the_relay_counts_in_the_same_bucket(us: int) -> None:
    for near in {us, max(us, 1) - 1}:
        assert histogram_bucket(near) == bucket_of(near)


@given(TIMES)
def test_a_time_lies_within_its_bucket(us: int) -> None:
    bucket = bucket_of(us)
    assert lower_bound(bucket) <= us
    assert bucket == BUCKETS - 1 or us < lower_bound(bucket + 1)


@given(st.lists(st.integers(min_value=0, max_value=1 << 34), max_size=200))
def test_exposed_counts_are_those_of_shorter_times(times: list[int]) -> None:
    counts = exposed(histogram_of(times))
    assert counts == [sum(us < 1 << power for us in times) for power in EXPOSED_POWERS] + [len(times)]
    assert count(histogram_of(times)) == len(times)


@pytest.mark.parametrize("shape", ["even", "long tail", "two humps"])
def test_quantiles_agree_with_ddsketch(shape: str) -> None:
    rng = random.Random(7)
    draw = {
        "even": lambda: rng.randrange(100, 10_000),
        "long tail": lambda: int(rng.lognormvariate(7, 2)),
        "two humps": lambda: int(max(0.0, rng.gauss(*rng.choice([(80, 9), (50_000, 4000)])))),
    }[shape]
    times = [draw() for _ in range(20_000)]
    sketch = DDSketch(0.001)
    for us in times:
        sketch.add(us)
    histogram = histogram_of(times)
    for q in (0.0, 0.01, 0.1, 0.25, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0):
        ours, theirs = quantile(histogram, q), sketch.get_quantile_value(q)
        assert ours is not None
        assert theirs is not None
        assert theirs / 1.5 - 1 <= ours <= theirs * 1.5 + 1, q


def test_nothing_has_no_quantile() -> None:
    assert quantile([0] * HISTOGRAM_WORDS, 0.5) is None


def test_what_was_measured_between_two_moments() -> None:
    before, now = histogram_of([5, 5]), histogram_of([5, 5, 5, 900])
    assert grown(before, now) == histogram_of([5, 900])
    assert grown(None, now) == now
