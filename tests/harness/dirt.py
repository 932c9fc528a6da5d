"""What clients that are gone have left on the servers of a pool: nothing, or sentences about it."""

from collections.abc import Collection, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from tests.harness.client import RawClient, ServerError
from tests.harness.postgres import HARNESS, Postgres

if TYPE_CHECKING:
    from tests.harness.gpooler import Gpooler

MOST_PROBED: Final = 8  # of the servers of a pool: each costs a login and a query
PROBE_TIMEOUT_S: Final = 5.0

# One row for each server that works, is in a transaction or holds a lock of any kind.
BUSY: Final = f"""
SELECT pid, state, coalesce(string_agg(locktype || ' ' || mode, ', '), 'none')
FROM pg_stat_activity LEFT JOIN pg_locks USING (pid)
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND application_name <> '{HARNESS}'
GROUP BY pid, state HAVING state <> 'idle' OR count(locktype) > 0
"""

# What a session has that another has not: as a client sees it that asked for nothing.
KINDS: Final = {
    "settings": "SELECT string_agg(name, ', ') FROM pg_settings WHERE source = 'session'"
    " AND setting IS DISTINCT FROM reset_val",
    "prepared statements": "SELECT string_agg(name, ', ') FROM pg_prepared_statements"
    " WHERE name !~ '^gp_[0-9a-f]{32}$'",
    "advisory locks": "SELECT string_agg(objid::text, ', ') FROM pg_locks"
    " WHERE pid = pg_backend_pid() AND locktype = 'advisory'",
    "cursors": "SELECT string_agg(name, ', ') FROM pg_cursors",
    "channels": "SELECT string_agg(c, ', ') FROM pg_listening_channels() AS c",
    "temporary objects": "SELECT string_agg(name, ', ') FROM ("
    " SELECT relname AS name FROM pg_class WHERE relnamespace = pg_my_temp_schema()"
    " UNION ALL SELECT proname FROM pg_proc WHERE pronamespace = pg_my_temp_schema()"
    " UNION ALL SELECT typname FROM pg_type WHERE typnamespace = pg_my_temp_schema()) AS t",
    "role": "SELECT current_user WHERE current_user <> session_user",
}
LEFT: Final = f"SELECT pg_backend_pid(), {', '.join(f'({sql})' for sql in KINDS.values())}"


def busy_servers(postgres: Postgres) -> list[str]:
    """Connections to PostgreSQL, the harness's aside, that do not stand idle and without a lock."""
    return [f"server {pid} is {state}; its locks: {locks}" for pid, state, locks in postgres.query(BUSY)]


def left_behind(
    client: RawClient, is_held: bool = True, allowed: Collection[str] = ()
) -> tuple[int, list[str]]:
    """The server that a new client gets, and what it has that the client did not ask for.

    ``is_held``: the client keeps the server, in a transaction; ``allowed``: settings that the rule has set.
    """
    (row,) = client.query(f"BEGIN; {LEFT}" if is_held else LEFT)
    pid = int(row[0] or 0)
    problems = []
    for kind, found in zip(KINDS, row[1:], strict=True):
        names = [name for name in (found or "").split(", ") if name and name.lower() not in allowed]
        if names and kind not in allowed:
            problems.append(f"server {pid} was left with {kind}: {', '.join(names)}")
    return pid, problems


def dirty_servers(
    gpooler: "Gpooler",
    database: str,
    pids: Iterable[int],
    count: int,
    is_held: bool,
    allowed: Collection[str],
) -> list[str]:
    """What new clients find on ``count`` of the servers ``pids``; a pool that takes no client has no say."""
    left, problems = set(pids), list[str]()
    with ExitStack() as stack:
        for _ in range(min(count, MOST_PROBED) if is_held else 1):
            try:
                client = stack.enter_context(gpooler.raw(timeout=PROBE_TIMEOUT_S)).login(database=database)
                pid, found = left_behind(client, is_held, allowed)
            except (ServerError, OSError, EOFError):
                break  # refused on purpose: no such user, no more clients, no PostgreSQL …
            if pid not in left:
                break  # opened for this client: the others belong to other routes
            left.remove(pid)
            problems += found
    return problems
