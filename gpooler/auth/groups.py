"""The members of groups, as queries name them; asked again and again, never by a login."""

from collections.abc import Callable
from typing import Final

import gevent
from gevent.event import Event

from gpooler.auth.query import Queries, QueryFailed
from gpooler.config.model import Config, GroupRule
from gpooler.log import Logger

GROUP_TIMEOUT_MS: Final = 5000  # nobody waits for it but the first logins
MEMBERS_MOST: Final = 100_000  # of one group; more are a mistake


class Groups:
    """Those of one worker."""

    def __init__(self, config: Config, queries: Queries, logger: Logger) -> None:
        self._rules = [rule for rule in config.rules if isinstance(rule, GroupRule)]
        self._interval_s = config.routing.group_checker_interval / 1000
        self._queries = queries
        self._logger = logger
        self._failures: dict[str, str] = {}
        self._untried = len(self._rules)
        self._all_tried = Event()
        self.members: dict[str, frozenset[str]] = {rule.name: frozenset() for rule in self._rules}
        self.on_change: Callable[[], None] = lambda: None

    @property
    def is_ready(self) -> bool:
        """Whether each group was asked for once."""
        return not self._untried

    def wait(self) -> None:
        """Until ``is_ready``. Yields."""
        if self._untried:
            self._all_tried.wait()

    def start(self) -> None:
        """Ask for each group, from now on."""
        for rule in self._rules:
            gevent.spawn(self._run, rule)

    def _run(self, rule: GroupRule) -> None:
        self._refresh(rule)
        self._untried -= 1
        if not self._untried:
            self._all_tried.set()
        while True:
            gevent.sleep(self._interval_s)
            self._refresh(rule)

    def _refresh(self, rule: GroupRule) -> None:
        """A query that fails leaves the members as they are."""
        try:
            members = self._ask(rule)
        except QueryFailed as error:
            if self._failures.get(rule.name) != str(error):
                self._failures[rule.name] = str(error)
                text = f"group_query of {rule.name} failed, its members stay as they are: {error}"
                self._logger.error(text, context="auth")
            return
        self._failures.pop(rule.name, None)
        if members != self.members[rule.name]:
            self.members[rule.name] = members
            self._logger.info(f"group {rule.name} has {len(members)} members", context="auth")
            self.on_change()

    def _ask(self, rule: GroupRule) -> frozenset[str]:
        """Yields. Raises QueryFailed."""
        query, database, user = rule.group_query, rule.group_query_db, rule.group_query_user
        assert query is not None
        assert database is not None
        assert user is not None
        rows = self._queries.rows(database, user, query, (), timeout_ms=GROUP_TIMEOUT_MS)
        if len(rows) > MEMBERS_MOST:
            raise QueryFailed(f"{len(rows)} rows; a group has at most {MEMBERS_MOST} members")
        return frozenset(row[0] for row in rows if row and row[0])
