"""How a table of the console is described: its columns, what it is made of, and how."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from functools import lru_cache
from math import floor

from gpooler.config.model import Config
from gpooler.console.facts import View
from gpooler.console.table import Columns, Row


class Need(Enum):
    """What a table is made of, beside the configuration and the counters of processes."""

    ROUTES = "routes"
    SOCKETS = "sockets"
    MEMORY = "memory"
    BANS = "bans"
    HOSTS = "hosts"
    STATEMENTS = "statements"
    COPIES = "copies"
    WORKERS = "workers"
    UTILIZATION = "utilization"
    QUANTILES = "quantiles"


@dataclass(frozen=True, slots=True)
class Spec:
    """One table: its columns, those that the configuration makes, others ``behind`` them, and ``legacy`` ones
    for those who ask for them.
    """

    columns: Columns
    rows: Callable[[View], Iterable[Row]]
    needs: frozenset[Need] = frozenset()
    legacy: Columns = ()
    varying: Callable[[Config], Columns] = lambda config: ()
    behind: Columns = ()

    def shape(self, config: Config, has_legacy_columns: bool) -> Columns:
        """The columns of a session."""
        found = self.columns + self.varying(config) + self.behind
        return found + self.legacy if has_legacy_columns else found


def seconds_and_rest(us: int) -> tuple[int, int]:
    """A time as PgBouncer shows it: whole seconds, and the microseconds beyond them."""
    return us // 1_000_000, us % 1_000_000


def time_text(view: View, at_us: int) -> str | None:
    """A moment of the monotonic clock as PgBouncer writes times, in UTC; None for never."""
    if not at_us:
        return None
    return _second_text(floor(view.wall_s - (view.now_us - at_us) / 1e6))


@lru_cache(maxsize=4096)
def _second_text(wall_s: int) -> str:
    return datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
