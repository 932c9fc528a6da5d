"""How long clients of each worker wait for a server, watched while a load runs."""

import threading
import time
from contextlib import ExitStack, closing
from typing import Final

from gpooler.stats.registry import RouteWord
from gpooler.stats.shared import SharedCounters

INTERVAL_S: Final = 0.005
LEAST_WORKERS: Final = 2


class WorkerWaits:
    """A context manager that reads the counters of every worker again and again; closes them at the end."""

    def __init__(self, workers: list[SharedCounters]) -> None:
        self._workers = workers
        self._began: list[tuple[int, int]] = []
        self._longest_us = [0] * len(workers)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._means: list[float] = []

    def __enter__(self) -> "WorkerWaits":
        self._began = [_waited(counters) for counters in self._workers]
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with ExitStack() as stack:
            for counters, (wait_us, servers) in zip(self._workers, self._began, strict=True):
                stack.enter_context(closing(counters))
                after_us, after = _waited(counters)
                self._means.append((after_us - wait_us) / max(1, after - servers))

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            now_us = time.monotonic_ns() // 1000
            for place, counters in enumerate(self._workers):
                since_us = min(
                    filter(
                        None, (counters.route(r, RouteWord.OLDEST_WAIT_US) for r in counters.used_routes())
                    ),
                    default=now_us,
                )
                self._longest_us[place] = max(self._longest_us[place], now_us - since_us)

    def numbers(self) -> dict[str, float]:
        """Waits of the worst and the best worker, in microseconds, and their ratios; empty for one worker."""
        if len(self._workers) < LEAST_WORKERS:
            return {}
        return {
            "workers": float(len(self._workers)),
            "mean_wait_us_worst": max(self._means),
            "mean_wait_us_best": min(self._means),
            "mean_wait_ratio": max(self._means) / max(1.0, min(self._means)),
            "longest_wait_us_worst": float(max(self._longest_us)),
            "longest_wait_us_best": float(min(self._longest_us)),
            "longest_wait_ratio": max(self._longest_us) / max(1.0, min(self._longest_us)),
        }


def _waited(counters: SharedCounters) -> tuple[int, int]:
    """Microseconds that clients have waited, and how many servers they were given."""
    routes = list(counters.used_routes())
    return (
        sum(counters.route(route, RouteWord.WAIT_US) for route in routes),
        sum(counters.route(route, RouteWord.ASSIGNMENTS) for route in routes),
    )
