"""A client of a transaction pool cannot tell gpooler from its own server.

Random sessions (generator.py) run through one gpooler, many at once on a few servers, and each alone on
PostgreSQL itself; the answers are compared message by message (play.py says what is not).

    GPOOLER_DIFFERENTIAL=5000   sessions of the short run (default 7,000: about two minutes)
    GPOOLER_DIFFERENTIAL_SEED   its seed (default: another one each time; a failing run prints it)
    GPOOLER_DIFFERENTIAL_LIMITS known limits (generator.LIMITS) to test all the same, by comma, or "all"
    GPOOLER_DIFFERENTIAL_SHRINK 0: end at the first difference, as it was found
    GPOOLER_SOAK_S              seconds of the long run, with --full
"""

import os
import random
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

import pytest

from tests.differential.conftest import MakePool
from tests.differential.generator import LIMITS
from tests.differential.stage import POOLED, SERVERS, Outcome, Run
from tests.harness import Gpooler, Postgres, eventually
from tests.harness.dirt import busy_servers, left_behind
from tests.harness.load import Pgbench

SESSIONS: Final = int(os.environ.get("GPOOLER_DIFFERENTIAL", "7000"))
SECONDS: Final = float(os.environ.get("GPOOLER_SOAK_S", "300"))
HAS_SHRINKING: Final = os.environ.get("GPOOLER_DIFFERENTIAL_SHRINK", "1") != "0"

# Others keep the servers busy for moments, so that a client seldom gets the one that it had.
COMPANY: Final = "SELECT pg_sleep(0.002 * random()), :client_id;"


def chosen_limits() -> frozenset[str]:
    text = os.environ.get("GPOOLER_DIFFERENTIAL_LIMITS", "")
    names = frozenset(LIMITS) if text == "all" else frozenset(text.split(",")) - {""}
    assert names <= LIMITS.keys(), f"no such limit: {sorted(names - LIMITS.keys())}"
    return names


def chosen_seed() -> int:
    return int(os.environ.get("GPOOLER_DIFFERENTIAL_SEED") or random.SystemRandom().getrandbits(40))


def check_servers(postgres: Postgres, pool: Gpooler, servers: int) -> None:
    """Each server is idle, holds no lock, and is as new to the next client."""
    eventually(lambda: not busy_servers(postgres))
    with ExitStack() as stack:
        pids = set()
        for _ in range(servers):
            client = stack.enter_context(pool.raw(timeout=20)).login(database=POOLED)
            pid, problems = left_behind(client)
            assert problems == []
            pids.add(pid)
        assert len(pids) == servers
        # those of the direct sessions end in their own time
        eventually(lambda: len(postgres.activity()) == servers)


@pytest.fixture(params=[(SERVERS, 2), (SERVERS - 1, 1)], ids=["two workers", "one worker"])
def compare_all(
    request: pytest.FixtureRequest, postgres: Postgres, make_pool: MakePool, program: Callable[[str], str]
) -> Callable[[Callable[[Run], Outcome]], None]:
    """In a pool whose servers go from worker to worker, and in one whose servers gather statements."""
    servers, workers = request.param

    def compare(run: Callable[[Run], Outcome]) -> None:
        pool, seed = make_pool(servers, workers), chosen_seed()
        with Pgbench(program("pgbench"), pool, COMPANY, servers, 86400, "-M", "prepared") as company:
            outcome = run(Run(postgres, pool, seed, chosen_limits(), HAS_SHRINKING))
            has_failed = not company.is_running and company.output()
        print(f"seed {seed}: {outcome.sessions} sessions, {outcome.messages} messages", file=sys.stderr)
        if outcome.reports:
            found = [f"{len(outcome.reports)} differences", *outcome.reports]
            pytest.fail("\n\n".join(found), pytrace=False)
        assert not has_failed, has_failed
        check_servers(postgres, pool, servers)

    return compare


Compare = Callable[[Callable[[Run], Outcome]], None]


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_sessions_are_answered_as_by_postgres(compare_all: Compare) -> None:
    compare_all(lambda run: run.sessions(SESSIONS // 2))


@pytest.mark.full
@pytest.mark.timeout(SECONDS + 900)
def test_sessions_are_answered_as_by_postgres_for_long(compare_all: Compare) -> None:
    compare_all(lambda run: run.seconds(SECONDS / 2))
