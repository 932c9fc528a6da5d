"""Readings of the kernel and of pgbench's logs."""

import math
import resource
from collections.abc import Iterable
from pathlib import Path


def cpu_us(pids: Iterable[int]) -> float:
    """Microseconds of CPU, user and system, that all threads of these processes have used."""
    total = 0
    for pid in pids:
        for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            total += int(path.read_text().split()[0])
    return total / 1000


def pss_bytes(pids: Iterable[int]) -> int:
    """Proportional set size of these processes together."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def percentile(values: list[int], share: float) -> float:
    """The smallest value that at least that share of all values does not exceed; NaN of none."""
    if not values:
        return math.nan
    return float(sorted(values)[max(math.ceil(share * len(values)) - 1, 0)])


def latencies_us(directory: Path) -> list[int]:
    """Latency of each transaction that pgbench logged (``--log``, third column)."""
    return [
        int(line.split(maxsplit=3)[2])
        for path in directory.glob("pgbench_log.*")
        for line in path.read_text().splitlines()
    ]


def raise_descriptor_limit(wanted: int) -> int:
    """Let us and our children open that many files, as far as the system permits; what is permitted."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (max(wanted, hard), hard):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        except (ValueError, PermissionError):
            continue
        return limit
    return hard
