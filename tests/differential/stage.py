"""Two databases alike, one behind gpooler and one asked directly, and many clients at once."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg

from tests.differential.generator import generate
from tests.differential.play import Difference, Transcript, compare, play
from tests.differential.program import Program
from tests.differential.shrink import shrink
from tests.harness import Gpooler, Postgres, eventually

LANES: Final = 12  # clients at once; each has tables, locks and channels of its own
SERVERS: Final = 3
POOLED: Final = "mirror_pooled"
DIRECT: Final = "mirror_direct"
TIMEOUT_S: Final = 15.0
REPLAYS: Final = 4  # of a candidate before it counts as answered alike: it may depend on what others do
ERA: Final = 20 * LANES  # so many programs without, then with what stays in a session
MOST_DIFFERENCES: Final = 5  # then a run is over

TABLES: Final = """
CREATE TABLE t{0} (n int CHECK (n < 1000), d text);
CREATE TABLE u{0} (n int UNIQUE DEFERRABLE INITIALLY DEFERRED);
GRANT ALL ON t{0}, u{0} TO PUBLIC;
"""

HELD: Final = """
SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database
WHERE locktype = 'advisory' AND classid = {0} AND datname = current_database()
"""


def make_mirrors(postgres: Postgres) -> None:
    """Both databases, once for a cluster. One is a copy of the other: their tables have the same numbers."""
    if postgres.query(f"SELECT 1 FROM pg_database WHERE datname = '{DIRECT}'"):
        return
    postgres.query(f"CREATE DATABASE {POOLED}")
    postgres.query("".join(TABLES.format(lane) for lane in range(LANES)), POOLED)
    postgres.query(f"CREATE DATABASE {DIRECT} TEMPLATE {POOLED}")


class Lane:
    """One client after another, through gpooler and directly, on the same tables."""

    def __init__(self, postgres: Postgres, pool: Gpooler, number: int) -> None:
        self.number = number
        self._postgres, self._pool = postgres, pool
        self._keepers: list[psycopg.Connection[Any]] = []

    def __enter__(self) -> "Lane":
        self._keepers = [self._postgres.connect(database) for database in (POOLED, DIRECT)]
        for keeper in self._keepers:
            keeper.execute("SET lock_timeout = '20s'")
        return self

    def __exit__(self, *_: object) -> None:
        for keeper in self._keepers:
            keeper.close()

    def both(self, program: Program) -> tuple[Transcript, Transcript]:
        """What PostgreSQL and gpooler say."""
        self._clean()
        direct = play(program, self._postgres.port, DIRECT, TIMEOUT_S)
        pooled = play(program, self._pool.port, POOLED, TIMEOUT_S)
        return direct, pooled

    def difference(self, program: Program, replays: int = REPLAYS) -> Difference | None:
        """The first difference in so many replays. A program that hangs PostgreSQL itself has none."""
        for _ in range(replays):
            direct, pooled = self.both(program)
            if direct.has_hung:
                return None
            if found := compare(direct, pooled):
                return found
        return None

    def _clean(self) -> None:
        """Empty tables, and no lock left: the end of the client before may be still under way."""
        for keeper in self._keepers:
            keeper.execute(f"TRUNCATE t{self.number}, u{self.number}")
            held = HELD.format(self.number)
            eventually(lambda keeper=keeper, held=held: keeper.execute(held).fetchone() == (0,))  # type: ignore[misc]


@dataclass(slots=True)
class Outcome:
    """What a run came to."""

    sessions: int = 0
    messages: int = 0
    reports: list[str] = field(default_factory=list)


class Run:
    """Programs from one seed, on all lanes at once, up to a number of them or to a time.

    ``limits`` are those known limits that the programs may use; without ``has_shrinking`` the run ends at the
    first difference.
    """

    def __init__(
        self,
        postgres: Postgres,
        pool: Gpooler,
        seed: int,
        limits: frozenset[str] = frozenset(),
        has_shrinking: bool = True,
    ) -> None:
        self._postgres, self._pool = postgres, pool
        self._seed = seed
        self._limits = limits
        self._has_shrinking = has_shrinking
        self._lock = threading.Lock()
        self._shrinking = 0
        self._is_over = False
        self.outcome = Outcome()

    def sessions(self, count: int) -> Outcome:
        """Run so many programs."""
        return self._run(lambda number: number < count)

    def seconds(self, seconds: float) -> Outcome:
        """Begin programs for so long."""
        until = time.monotonic() + seconds
        return self._run(lambda number: time.monotonic() < until)

    def _run(self, is_wanted: Callable[[int], bool]) -> Outcome:
        failures: list[BaseException] = []

        def lane(number: int) -> None:
            try:
                with Lane(self._postgres, self._pool, number) as mine:
                    self._programs(mine, is_wanted)
            except BaseException as failure:  # noqa: BLE001  # raised below
                failures.append(failure)
                self._is_over = True

        threads = [threading.Thread(target=lane, args=(number,), daemon=True) for number in range(LANES)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return self.outcome

    def _programs(self, lane: Lane, is_wanted: Callable[[int], bool]) -> None:
        """Every LANES-th program; also as company, without being counted, while another lane shrinks one."""
        number = lane.number
        while not self._is_over and (is_wanted(number) or self._shrinking):
            # Where nobody leaves anything behind no server is discarded: each gathers what clients prepare.
            may_leave_state = number // ERA % 2 == 1
            program = generate(f"{self._seed}:{number}", lane.number, self._limits, may_leave_state)
            direct, pooled = lane.both(program)
            with self._lock:
                self.outcome.sessions += 1
                self.outcome.messages += pooled.count
            assert not direct.has_hung, f"PostgreSQL itself does not answer program {number}:\n{program}"
            if found := compare(direct, pooled):
                self._report(lane, number, program, found)
            number += LANES

    def _report(self, lane: Lane, number: int, program: Program, found: Difference) -> None:
        title = f"seed {self._seed}, program {number}, lane {lane.number}, {len(program.steps)} steps"
        if self._has_shrinking:
            with self._lock:
                self._shrinking += 1
            try:
                short, seen = self._shrunk(lane, program, found)
            finally:
                with self._lock:
                    self._shrinking -= 1
            title += f", shrunk to {len(short.steps)}" if short is not program else "; it did not come again"
            program, found = short, seen
        else:
            self._is_over = True
        with self._lock:
            self.outcome.reports.append(f"{title}:\n{program}\n{found}")
            if len(self.outcome.reports) >= MOST_DIFFERENCES:
                self._is_over = True

    def _shrunk(self, lane: Lane, program: Program, found: Difference) -> tuple[Program, Difference]:
        seen = found

        def differs(candidate: Program) -> bool:
            nonlocal seen
            again = lane.difference(candidate)
            if again is None or again.kind != found.kind:
                return False
            seen = again
            return True

        if not differs(program):
            return program, found
        return shrink(program, differs), seen
