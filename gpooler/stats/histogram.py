"""Histograms of times: which bucket counts a time, and what the counts say. Pure.

Two buckets for each power of two of microseconds, from 0 to 36 minutes: an index is found by counting leading
zeros, without a division. ``relay/histogram.pxd`` repeats that in C; a test compares the two.
"""

from collections.abc import Sequence
from typing import Final

HISTOGRAM_WORDS: Final = 64  # the buckets, and the sum
BUCKETS: Final = HISTOGRAM_WORDS - 1
SUM_AT: Final = BUCKETS  # sum of the times in us, for those kinds whose sum stands nowhere else

Histogram = list[int]
"""Counts by bucket, then the sum of all times in us."""

EXPOSED_POWERS: Final = range(6, 28, 2)
"""The bounds that Prometheus is shown: every second power of two, 64 us to 67 s. Rules ask for quantiles."""


def bucket_of(us: int) -> int:
    """The bucket that counts a time."""
    if us < 2:
        return us
    power = us.bit_length() - 1
    return min(2 * power + (us >> (power - 1) & 1), BUCKETS - 1)


def lower_bound(bucket: int) -> int:
    """The shortest time in us that ``bucket`` counts; the next one's is the first that it does not."""
    if bucket < 2:
        return bucket
    half = 1 << bucket // 2 - 1
    return half * (2 + bucket % 2)


def count(histogram: Sequence[int]) -> int:
    """How many times were measured."""
    return sum(histogram[:BUCKETS])


def exposed(histogram: Sequence[int]) -> list[int]:
    """How many times were shorter than each of EXPOSED_POWERS, then all of them."""
    counts = []
    total = at = 0
    for power in EXPOSED_POWERS:
        total += sum(histogram[at : 2 * power])
        at = 2 * power
        counts.append(total)
    counts.append(total + sum(histogram[at:BUCKETS]))
    return counts


def quantile(histogram: Sequence[int], q: float) -> float | None:
    """The time in us that a part ``q`` (0 to 1) of all did not exceed; None when nothing was measured.

    Within its bucket the times are taken to be spread evenly: the true time may be that of its other end.
    """
    rank = q * count(histogram)
    if not rank and not any(histogram[:BUCKETS]):
        return None
    below = 0
    for bucket, here in enumerate(histogram[:BUCKETS]):
        if here and below + here >= rank:
            low, high = lower_bound(bucket), lower_bound(bucket + 1)
            return low + (high - low) * max(0.0, rank - below) / here
        below += here
    raise AssertionError("the ranks of a histogram end with its count")


def added(one: Sequence[int], other: Sequence[int]) -> Histogram:
    """Both together."""
    return [a + b for a, b in zip(one, other, strict=True)]


def grown(before: Sequence[int] | None, now: Histogram) -> Histogram:
    """What was measured between two moments."""
    return now if before is None else [max(0, b - a) for a, b in zip(before, now, strict=True)]


NOTHING: Final[Histogram] = [0] * HISTOGRAM_WORDS
