"""The lines of ``log_stats``: what each route did between two snapshots. Pure."""

from collections.abc import Iterator

from gpooler.stats.registry import RouteWord
from gpooler.stats.snapshot import NOTHING, Block, RouteName, Snapshot, average, grown


def summary(before: Snapshot, now: Snapshot) -> Iterator[tuple[RouteName, str]]:
    """A line a route that has clients or servers, or did something. Rates are a second's."""
    seconds = max(now.at_us - before.at_us, 1) / 1e6
    for route, block in now.routes.items():
        growth = grown(before.routes.get(route), block)
        if growth != NOTHING:
            yield route, _line(growth, seconds)


def _line(growth: Block, seconds: float) -> str:
    def rate(word: RouteWord) -> int:
        return round(growth[word] / seconds)

    def mean_us(time_word: RouteWord, count_word: RouteWord) -> int:
        return round(average(growth, time_word, count_word) or 0)

    return (
        f"clients {growth[RouteWord.CLIENTS]} active {growth[RouteWord.CLIENTS_ACTIVE]}"
        f" waiting {growth[RouteWord.CLIENTS_WAITING]},"
        f" servers active {growth[RouteWord.SERVERS_ACTIVE]} idle {growth[RouteWord.SERVERS_IDLE]},"
        f" {rate(RouteWord.TRANSACTIONS)} transactions/s"
        f" {mean_us(RouteWord.TRANSACTION_US, RouteWord.TRANSACTIONS)} us,"
        f" {rate(RouteWord.QUERIES)} queries/s {mean_us(RouteWord.QUERY_US, RouteWord.QUERIES)} us,"
        f" wait {mean_us(RouteWord.WAIT_US, RouteWord.ASSIGNMENTS)} us,"
        f" in {rate(RouteWord.BYTES_IN)} bytes/s, out {rate(RouteWord.BYTES_OUT)} bytes/s"
    )
