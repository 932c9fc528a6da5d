"""The secrets that an ``auth_query`` gives, remembered for seconds and refreshed while they are in use."""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import gevent

from gpooler.auth.query import QueryFailed, Row
from gpooler.auth.secrets import Secret
from gpooler.clock import monotonic_us

FRESH_US: Final = 10_000_000  # an answer in use that is older is asked for again, while it still serves
KEPT_US: Final = 15_000_000  # older than this it serves nobody
NOBODY_US: Final = 2_000_000  # the same of "no such user": a user just made should not have to wait
MAX_KEPT: Final = 10_000  # answers; invented users cannot fill the memory
COLUMNS: Final = (2, 3)

Key = tuple[str, ...]
"""First of all the name of the rule whose query it is."""


@dataclass(frozen=True, slots=True)
class Found:
    """What the query says of a user."""

    text: str | None = None  # of the secret; None: no such user, or none for it
    valid_until: float = math.inf  # seconds since the epoch

    def __repr__(self) -> str:
        return f"<Found {'nothing' if self.text is None else 'a secret'}>"


@dataclass(slots=True)
class _Answer:
    found: Found
    secret: Secret | None
    since_us: int


def read_rows(rows: list[Row], user: str) -> Found:
    """The answer in the rows of a query: user, password, and maybe until when it is valid.

    Raises QueryFailed for what is none.
    """
    if not rows:
        return Found()
    if len(rows) > 1:
        raise QueryFailed(f"{len(rows)} rows instead of one")
    (row,) = rows
    if len(row) not in COLUMNS:
        raise QueryFailed(f"{len(row)} columns: user and password are wanted, and maybe valuntil")
    if row[0] != user:
        raise QueryFailed("the row is of another user")
    valid_until = _seconds(row[2]) if len(row) == 3 and row[2] is not None else math.inf
    return Found(row[1] or None, valid_until)


def _seconds(text: str) -> float:
    """A time as PostgreSQL writes it, DateStyle ISO and TimeZone UTC."""
    if text in ("infinity", "-infinity"):
        return math.inf if text == "infinity" else -math.inf
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise QueryFailed("the third column, valuntil, is no time") from None  # it may be the secret
    return time.timestamp() if time.tzinfo is not None else time.replace(tzinfo=UTC).timestamp()


class Lookups:
    """Answers by key. Whoever asks for the same at once shares one query."""

    def __init__(self, fetch: Callable[[Key], Found], on_failure: Callable[[Key, QueryFailed], None]) -> None:
        """``fetch`` yields and raises QueryFailed; ``on_failure``: nobody waited for that answer."""
        self._fetch = fetch
        self._on_failure = on_failure
        self._answers: OrderedDict[Key, _Answer] = OrderedDict()
        self._flights: dict[Key, gevent.Greenlet] = {}
        self._latest: dict[str, Secret] = {}  # by rule

    def another(self, key: Key) -> Secret | None:
        """One that the same query gave of some user: what a user without one is to cost."""
        return self._latest.get(key[0])

    def known(self, key: Key) -> tuple[Found, Secret | None] | None:
        """The answer if it is there and serves; does not wait, but may ask again for the next."""
        answer = self._answers.get(key)
        if answer is None:
            return None
        age_us = monotonic_us() - answer.since_us
        if age_us > (NOBODY_US if answer.secret is None else KEPT_US):
            return None
        self._answers.move_to_end(key)
        if age_us > FRESH_US and key not in self._flights:
            gevent.spawn(self._refresh, key)
        return answer.found, answer.secret

    def ask(self, key: Key) -> tuple[Found, Secret | None]:
        """The answer, asked for now. Yields. Raises QueryFailed."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = gevent.spawn(self._fly, key)
        result = flight.get()
        if isinstance(result, QueryFailed):
            raise result
        return result.found, result.secret

    def _refresh(self, key: Key) -> None:
        try:
            self.ask(key)
        except QueryFailed as error:
            self._on_failure(key, error)

    def _fly(self, key: Key) -> _Answer | QueryFailed:
        """An error is returned: gevent prints the traceback of one that is raised."""
        try:
            found = self._fetch(key)
        except QueryFailed as error:
            return error
        finally:
            del self._flights[key]
        old = self._answers.get(key)
        secret = None if found.text is None else Secret(found.text)
        if old is not None and old.found.text == found.text:
            secret = old.secret  # which remembers what was dear to derive
        if secret is not None:
            self._latest[key[0]] = secret
        answer = self._answers[key] = _Answer(found, secret, monotonic_us())
        self._answers.move_to_end(key)
        if len(self._answers) > MAX_KEPT:
            self._answers.popitem(last=False)
        return answer
