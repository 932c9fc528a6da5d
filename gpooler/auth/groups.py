"""The members of groups, as queries name them; asked again and again, never by a login."""

from collections.abc import Callable, Mapping
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
        self._logger = logger
        self._failures: dict[str, str] = {}
        self._rules: list[GroupRule] = []
        self._untried: set[str] = set()
        self._askers: list[gevent.Greenlet] = []
        self._is_started = False
        self.members: dict[str, frozenset[str]] = {}
        self.on_change: Callable[[], None] = lambda: None
        self.configure(config, queries)

    def configure(self, config: Config, queries: Queries) -> None:
        """From now on. Who is asked for in the same way keeps its members until it is asked for again."""
        gevent.killall(self._askers)
        known = {rule.name: rule for rule in self._rules if rule.name not in self._untried}
        self._rules = [rule for rule in config.rules if isinstance(rule, GroupRule)]
        self._interval_s = config.routing.group_checker_interval / 1000
        self._queries = queries
        self.members = {
            rule.name: self.members[rule.name] if _is_known(rule, known) else frozenset()
            for rule in self._rules
        }
        self._untried = {rule.name for rule in self._rules if not _is_known(rule, known)}
        self._all_tried = Event()
        if self._is_started:
            self.start()

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
        self._is_started = True
        self._askers = [gevent.spawn(self._run, rule) for rule in self._rules]

    def _run(self, rule: GroupRule) -> None:
        self._refresh(rule)
        self._untried.discard(rule.name)
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
        rows = self._queries.rows(
            database, user, query, (), timeout_ms=GROUP_TIMEOUT_MS, query_ms=GROUP_TIMEOUT_MS
        )
        if len(rows) > MEMBERS_MOST:
            raise QueryFailed(f"{len(rows)} rows; a group has at most {MEMBERS_MOST} members")
        return frozenset(row[0] for row in rows if row and row[0])


def _is_known(rule: GroupRule, known: Mapping[str, GroupRule]) -> bool:
    """Whether its members were asked for in the same words."""
    before = known.get(rule.name)
    return before is not None and before.group_query == rule.group_query
