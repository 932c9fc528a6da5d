"""The clocks gpooler reads: one place, so that pure code can be given another time."""

import time


def monotonic_us() -> int:
    """Microseconds of the monotonic clock; the relay stamps with the same clock."""
    return time.monotonic_ns() // 1000


wall = time.time
"""Seconds since the epoch, for log lines and ``connect_time`` columns."""
