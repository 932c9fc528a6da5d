"""What an auth_query's rows say, and how long it is believed."""

import math

import gevent
import pytest
from gevent.event import Event

from gpooler.auth import lookup
from gpooler.auth.lookup import FRESH_US, KEPT_US, MAX_KEPT, NOBODY_US, Found, Key, Lookups, read_rows
from gpooler.auth.query import QueryFailed

JOE: Key = ("rule", "joe", "")


def test_rows_are_user_password_and_until_when() -> None:
    assert read_rows([], "joe") == Found()
    assert read_rows([("joe", "secret")], "joe") == Found("secret")
    assert read_rows([("joe", None)], "joe") == read_rows([("joe", "")], "joe") == Found()
    assert read_rows([("joe", "x", None)], "joe") == Found("x", math.inf)
    assert read_rows([("joe", "x", "infinity")], "joe") == Found("x", math.inf)
    assert read_rows([("joe", "x", "-infinity")], "joe").valid_until == -math.inf
    assert read_rows([("joe", "x", "1970-01-01 00:01:00+00")], "joe").valid_until == 60
    assert read_rows([("joe", "x", "1970-01-01 00:01:00.5")], "joe").valid_until == 60.5


@pytest.mark.parametrize(
    "rows",
    [
        [("joe", "a"), ("joe", "b")],
        [("ann", "a")],
        [(None, "a")],
        [("joe",)],
        [("joe", "a", None, None)],
        [("joe", "a", "tomorrow")],
        [("joe", "a", "0044-03-15 12:00:00+00 BC")],
    ],
)
def test_other_rows_are_a_failure(rows: list[lookup.Row]) -> None:
    with pytest.raises(QueryFailed):
        read_rows(rows, "joe")


def test_a_secret_is_not_in_what_a_log_could_show() -> None:
    assert "TOPSECRET" not in repr(Found("TOPSECRET"))


def settle() -> None:
    """Let every greenlet run until it waits."""
    gevent.idle()


class Stage:
    """Lookups under a clock of the test; ``says`` is what the query gives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_us = 0
        self.asked = 0
        self.says: Found | QueryFailed = Found("first")
        self.failures: list[str] = []
        self.gate: Event | None = None
        monkeypatch.setattr(lookup, "monotonic_us", lambda: self.now_us)
        self.lookups = Lookups(self._fetch, lambda key, error: self.failures.append(f"{key[1]}: {error}"))

    def _fetch(self, key: Key) -> Found:
        self.asked += 1
        if self.gate is not None:
            self.gate.wait()
        if isinstance(self.says, QueryFailed):
            raise self.says
        return self.says

    def text(self) -> str | None:
        """What is known of Joe."""
        known = self.lookups.known(JOE)
        assert known is not None
        return known[0].text


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


def test_an_answer_serves_and_is_refreshed_while_in_use(stage: Stage) -> None:
    assert stage.lookups.known(JOE) is None
    stage.lookups.ask(JOE)
    stage.now_us = FRESH_US
    assert stage.text() == "first"
    gevent.sleep(0)
    assert stage.asked == 1
    stage.now_us = FRESH_US + 1
    stage.says = Found("second")
    assert stage.text() == stage.text() == "first"
    settle()
    assert stage.text() == "second"
    assert stage.asked == 2
    stage.now_us += KEPT_US + 1
    assert stage.lookups.known(JOE) is None


def test_a_refresh_that_fails_leaves_the_old_answer_its_time(stage: Stage) -> None:
    stage.lookups.ask(JOE)
    stage.now_us = KEPT_US
    stage.says = QueryFailed("down")
    assert stage.text() == "first"
    settle()
    assert stage.failures == ["joe: down"]
    stage.now_us += 1
    assert stage.lookups.known(JOE) is None
    with pytest.raises(QueryFailed):
        stage.lookups.ask(JOE)


def test_nobody_is_remembered_shortly(stage: Stage) -> None:
    stage.says = Found()
    stage.lookups.ask(JOE)
    stage.now_us = NOBODY_US
    assert stage.text() is None
    stage.now_us += 1
    assert stage.lookups.known(JOE) is None


def test_who_asks_at_once_shares_a_query(stage: Stage) -> None:
    stage.gate = Event()
    asking = [gevent.spawn(stage.lookups.ask, JOE) for _ in range(5)]
    gevent.sleep(0)
    stage.gate.set()
    gevent.joinall(asking, raise_error=True)
    assert stage.asked == 1
    assert {one.value[0].text for one in asking} == {"first"}


def test_the_same_secret_keeps_what_was_derived_from_it(stage: Stage) -> None:
    _, secret = stage.lookups.ask(JOE)
    assert stage.lookups.ask(JOE)[1] is secret
    stage.says = Found("second")
    assert stage.lookups.ask(JOE)[1] is not secret


def test_invented_users_do_not_fill_the_memory(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_KEPT == 10_000
    monkeypatch.setattr(lookup, "MAX_KEPT", 3)
    stage.lookups.ask(JOE)
    for name in ("a", "b", "c"):
        stage.lookups.known(JOE)
        stage.lookups.ask(("rule", name, ""))
    assert stage.lookups.known(JOE) is not None
    assert stage.lookups.known(("rule", "a", "")) is None


def test_the_latest_secret_of_a_rule_is_kept_for_who_has_none(stage: Stage) -> None:
    nobody: Key = ("rule", "nobody", "")
    assert stage.lookups.another(nobody) is None
    _, secret = stage.lookups.ask(JOE)
    stage.says = Found()
    stage.lookups.ask(nobody)
    assert stage.lookups.another(nobody) is secret
    assert stage.lookups.another(("another rule", "nobody", "")) is None
