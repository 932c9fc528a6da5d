"""Prepared statements against plain dictionaries, which are applied to PostgreSQL's side when it answers.

The tables of relay/prepared.pyx run ahead of PostgreSQL: a change is made when its message is sent. The model
keeps what PostgreSQL has done apart from what it was asked to do; where it skips messages, the first is true.
"""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from gpooler.relay.probe import PreparedProbe

NAMES = [b"s%d" % number for number in range(5)] + [b"S_%d" % number for number in range(20)]
BODIES = [b"SELECT %d\0\0\0" % number for number in range(12)]
SETTINGS = [b"", b"TimeZone\0UTC\0", b"TimeZone\0GMT\0"]
# What a name takes besides its text and the text of its statement.
RECORD = 32


@dataclass
class View:
    """What there is, seen from one point in the stream."""

    names: dict[bytes, tuple[bytes, bytes]] = field(default_factory=dict)
    copies: set[tuple[bytes, bytes]] = field(default_factory=set)

    def copy(self) -> "View":
        return View(dict(self.names), set(self.copies))


@dataclass(frozen=True)
class Change:
    """A change that PostgreSQL has not answered: what it does to a view."""

    name: bytes | None = None
    statement: tuple[bytes, bytes] | None = None  # None with a name: it is forgotten
    is_copy: bool = False
    is_evicted: bool = False

    def apply(self, view: View) -> None:
        if self.name is not None and self.statement is not None:
            view.names[self.name] = self.statement
        elif self.name is not None:
            view.names.pop(self.name, None)
        if self.statement is not None and self.is_copy:
            view.copies.add(self.statement)
        elif self.statement is not None and self.is_evicted:
            view.copies.discard(self.statement)


class Run:
    """The tables, and the model of them."""

    def __init__(self, most: int) -> None:
        self.probe = PreparedProbe()
        self.most = most
        self.ahead = View()
        self.done = View()
        self.pending: list[Change] = []
        self.hashed: dict[tuple[bytes, bytes], bytes] = {}

    def _change(self, change: Change) -> None:
        change.apply(self.ahead)
        self.pending.append(change)

    def _copy(self, oldest: bytes | None) -> None:
        if len(self.ahead.copies) >= self.most:
            (evicted,) = (one for one in self.ahead.copies if b"".join(one) == oldest)
            self._change(Change(statement=evicted, is_evicted=True))

    def define(self, name: bytes, body: bytes, part: bytes) -> None:
        statement = (body, part)
        oldest = self.probe.copied[-1] if self.probe.copied else None
        assert self.probe.define(name, body, part, self.most) == (name not in self.ahead.names)
        if name in self.ahead.names:
            return
        is_copy = statement not in self.ahead.copies
        if is_copy:
            self._copy(oldest)
        self._change(Change(name, statement, is_copy))
        assert self.probe.copied[0] == body + part

    def bind(self, name: bytes) -> None:
        oldest = self.probe.copied[-1] if self.probe.copied else None
        hashed = self.probe.bind(name, self.most)
        statement = self.ahead.names.get(name)
        if statement is None:
            assert hashed is None
            return
        assert hashed is not None
        assert hashed.startswith(b"gp_")
        assert len(hashed) == 35
        assert self.hashed.setdefault(statement, hashed) == hashed
        if statement not in self.ahead.copies:
            self._copy(oldest)
            self._change(Change(statement=statement, is_copy=True))
        assert self.probe.copied[0] == b"".join(statement)

    def close(self, name: bytes) -> None:
        assert self.probe.close(name) == (name in self.ahead.names)
        if name in self.ahead.names:
            self._change(Change(name))

    def commit(self, count: int) -> None:
        for _ in range(count):
            assert self.probe.commit() == bool(self.pending)
            if self.pending:
                self.pending.pop(0).apply(self.done)

    def skip(self) -> None:
        self.probe.undo()
        self.pending.clear()
        self.ahead = self.done.copy()

    def leave(self) -> None:
        """The client goes; nothing of what it asked for is done any more."""
        self.probe.drop_names()
        self.probe.undo(has_client=False)
        self.pending.clear()
        self.ahead = View(copies=set(self.done.copies))
        self.done = self.ahead.copy()

    def discard(self) -> None:
        """DISCARD ALL between two clients."""
        self.probe.undo()
        self.probe.drop_copies()
        self.pending.clear()
        self.done.copies.clear()
        self.ahead = self.done.copy()

    def check(self) -> None:
        probe = self.probe
        assert probe.named == {name: b"".join(one) for name, one in self.ahead.names.items()}
        assert sorted(probe.copied) == sorted(map(b"".join, self.ahead.copies))
        assert len(probe.copied) <= max(self.most, len(self.done.copies))
        assert probe.pending == len(self.pending)
        statements, taken = probe.counts
        used = set(self.ahead.names.values()) | self.ahead.copies
        assert len(used) <= statements
        if not self.pending:
            assert statements == len(used)
        bodies = sum(len(name) + len(body) for name, (body, _) in self.ahead.names.items())
        assert taken == bodies + RECORD * len(self.ahead.names)
        assert len(set(self.hashed.values())) == len(self.hashed)


ACTS = st.one_of(
    st.tuples(st.just("define"), st.sampled_from(NAMES), st.sampled_from(BODIES), st.sampled_from(SETTINGS)),
    st.tuples(st.just("bind"), st.sampled_from(NAMES[:8])),
    st.tuples(st.just("close"), st.sampled_from(NAMES[:8])),
    st.tuples(st.just("commit"), st.integers(1, 6)),
    st.tuples(st.sampled_from(["skip", "leave", "discard"])),
)


def play(acts: list[tuple[str, ...]], most: int) -> Run:
    run = Run(most)
    for act, *arguments in acts:
        getattr(run, act)(*arguments)
        run.check()
    return run


@settings(max_examples=600)
@given(st.lists(ACTS, max_size=60), st.sampled_from([1, 2, 5, 100]))
def test_tables_run_ahead_of_postgres_and_come_back(acts: list[tuple[str, ...]], most: int) -> None:
    run = play(acts, most)
    run.commit(len(run.pending))
    run.check()
    run.leave()
    run.discard()
    assert run.probe.counts == (0, 0)


@settings(max_examples=300)
@given(st.lists(ACTS, max_size=30), st.integers(0, 20), st.sampled_from([1, 3, 100]))
def test_a_part_is_taken_back_and_nothing_is_left(acts: list[tuple[str, ...]], count: int, most: int) -> None:
    run = play(acts, most)
    run.probe.undo(count)
    assert run.probe.pending == max(0, len(run.pending) - count)
    while run.probe.commit():
        pass
    run.probe.drop_names()
    run.probe.drop_copies()
    assert run.probe.counts == (0, 0)
