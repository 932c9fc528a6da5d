"""The session tracker against a small model of PostgreSQL's main loop, on random streams and interleavings.

The model is PostgresMain and SocketBackend (tcop/postgres.c) and CopyGetData (commands/copyfromparse.c), cut
down to what decides which messages come back. The tracker sees what was sent and, later, what came back; the
model knows what the server will still do. Whenever the tracker is certain it must agree with the model.
"""

import random
from collections import deque
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpooler.relay.probe import SessionProbe

CLIENT, DEPLOY, RESET = 0, 1, 2
SYNC_POINTS = "QSF"
EXTENDED = "PBDEC"
COPY_ENDS = "cf"


@dataclass(frozen=True, slots=True)
class Message:
    """A frontend message and what the server will make of it."""

    kind: str
    owner: int = CLIENT
    # Query: one word a statement; Execute, Sync, CopyData …: one word
    fate: tuple[str, ...] = ()
    status: str = "I"
    place: int = 0  # in the order of sending


@dataclass(frozen=True, slots=True)
class Answer:
    """A backend message and the message that caused it."""

    kind: str
    cause: Message
    status: str = ""


@dataclass
class Server:
    """PostgreSQL, as far as its answers go."""

    inbox: deque[Message] = field(default_factory=deque)
    outbox: deque[Answer] = field(default_factory=deque)
    is_ignoring: bool = False  # ignore_till_sync
    is_open: bool = False  # an extended message was taken since the last sync point
    copying: Message | None = None  # reads COPY data for this message
    rest: tuple[str, ...] = ()  # statements of its Query that follow the COPY
    is_dead: bool = False

    def work(self) -> None:
        """Read one message."""
        message = self.inbox.popleft()
        if self.copying is not None:
            self._copy(message)
            return
        if message.kind == "S":
            self.is_ignoring = False
        if self.is_ignoring:
            return
        kind = message.kind
        if kind in EXTENDED or kind in SYNC_POINTS:
            self.is_open = kind in EXTENDED
        if kind == "Q":
            self._statements(message, message.fate)
        elif kind == "F":
            self._say(message, "E" if "error" in message.fate else "V")
            self._ready(message)
        elif kind == "S":
            if "error" in message.fate:
                self._say(message, "E")
            self._ready(message)
        elif kind in EXTENDED:
            self._extended(message)
        # Flush, and COPY messages without a COPY, are read and forgotten

    def cancel(self) -> None:
        """A cancel request hits a COPY that waits for data; anything else is covered by fates."""
        if self.copying is not None:
            self._fail_copy()

    def _say(self, cause: Message, kinds: str) -> None:
        self.outbox.extend(Answer(kind, cause) for kind in kinds)

    def _ready(self, cause: Message) -> None:
        self.outbox.append(Answer("Z", cause, cause.status))

    def _extended(self, message: Message) -> None:
        fate = message.fate[0] if message.fate else ""
        if fate == "error":
            self._say(message, "E")
            self.is_ignoring = True
        elif message.kind == "P":
            self._say(message, "1")
        elif message.kind == "B":
            self._say(message, "2")
        elif message.kind == "C":
            self._say(message, "3")
        elif message.kind == "D":
            self._say(message, {"statement": "tT", "statement-no-rows": "tn", "no-rows": "n"}.get(fate, "T"))
        elif fate.startswith("copy-in"):
            self._begin_copy(message, fate, ())
        else:
            self._say(
                message, {"rows": "DDC", "suspend": "DDs", "empty": "I", "copy-out": "HddcC"}.get(fate, "C")
            )

    def _statements(self, message: Message, fates: tuple[str, ...]) -> None:
        for at, fate in enumerate(fates):
            if fate == "error":
                self._say(message, "DE")
                break
            if fate.startswith("copy-in"):
                self._begin_copy(message, fate, fates[at + 1 :])
                return
            self._say(message, {"rows": "TDDC", "empty": "I", "copy-out": "HddcC"}.get(fate, "C"))
        self._ready(message)

    def _begin_copy(self, message: Message, fate: str, rest: tuple[str, ...]) -> None:
        self._say(message, "G")
        self.copying, self.rest = message, rest
        if fate == "copy-in-error":  # a trigger fails before anything is read
            self._fail_copy()

    def _copy(self, message: Message) -> None:
        assert self.copying is not None
        cause = self.copying
        if message.kind == "d":
            if "error" in message.fate:
                self._fail_copy()
        elif message.kind == "c":
            if "error" in message.fate:
                self._fail_copy()
                return
            self.copying = None
            self._say(cause, "C")
            if cause.kind == "Q":
                self._statements(cause, self.rest)
        elif message.kind == "f":
            self._fail_copy()
        elif message.kind not in "SH":
            self._say(cause, "E")
            self.is_dead = True

    def _fail_copy(self) -> None:
        assert self.copying is not None
        cause, self.copying = self.copying, None
        self._say(cause, "E")
        if cause.kind == "Q":
            self._ready(cause)
        else:
            self.is_ignoring = True

    def settled(self) -> "Server":
        """This server when it has read all that was sent."""
        server = Server(
            deque(self.inbox), deque(self.outbox), self.is_ignoring, self.is_open, self.copying, self.rest,
            self.is_dead,
        )  # fmt: skip
        while server.inbox and not server.is_dead:
            server.work()
        return server


class Run:
    """A server, the tracker in front of it, and what of the server's answers was not delivered yet."""

    def __init__(self) -> None:
        self.server = Server()
        self.tracker = SessionProbe()
        self.sent: list[Message] = []
        self.may_be_uncertain = False
        self.has_reset = False
        self.running: Message | None = None  # the message whose COPY IN began and did not end
        self.copies: list[int] = []  # places of those whose COPY IN ended, once for each COPY

    # acts

    def send(self, message: Message) -> None:
        message = replace(message, place=len(self.sent))
        self.sent.append(message)
        self.server.inbox.append(message)
        self.tracker.frontend(message.kind.encode(), message.owner)
        self._look_for_doubt()

    def work(self, count: int) -> None:
        while count and self.server.inbox and not self.server.is_dead:
            self.server.work()
            count -= 1

    def deliver(self, count: int) -> None:
        while count and self.server.outbox:
            answer = self.server.outbox.popleft()
            is_certain = not self.tracker.is_uncertain
            if is_certain:
                owner = self.owner_of(answer)
                # a stray CopyDone in front of our own Sync leaves what comes before it to the client
                assert self.tracker.owner in (owner, CLIENT if owner == RESET else owner), answer
            self._doubt_of(answer)
            assert self.tracker.backend(answer.kind.encode()) or self.server.is_dead, answer
            if answer.kind == "Z":
                owner = self.tracker.ready(answer.status.encode())
                assert owner >= 0, answer
                if is_certain and not self.tracker.is_uncertain:
                    assert owner == answer.cause.owner
                    assert self.tracker.status == answer.status.encode()
            count -= 1
            self.check()

    # truth

    def owner_of(self, answer: Answer) -> int:
        """Whose it is: that of the next sync point at or behind its cause."""
        for message in self.sent[answer.cause.place :]:
            if message.kind in SYNC_POINTS:
                return message.owner
        return CLIENT

    def _data_of(self, cause: Message) -> str:
        """Kinds sent as data of the COPY that runs now; a Query may have started several."""
        done = self.copies.count(cause.place)
        kinds = ""
        for message in self.sent[cause.place + 1 :]:
            if message.kind in COPY_ENDS:
                if done == 0:
                    break
                done -= 1
                kinds = ""
            else:
                kinds += message.kind
        return kinds

    def _doubt_of(self, answer: Answer) -> None:
        """The documented cases in which a tracker may lose count."""
        if answer.kind == "G":
            self.running = answer.cause
        elif self.running is not None and answer.cause == self.running and answer.kind in "CE":
            if answer.kind == "E" and "S" in self._data_of(self.running):
                self.may_be_uncertain = True
            self.copies.append(self.running.place)
            self.running = None
        self._look_for_doubt()

    def _look_for_doubt(self) -> None:
        if self.running is not None and set(self._data_of(self.running)) - set("dHS"):
            self.may_be_uncertain = True

    def check(self) -> None:
        tracker = self.tracker
        if tracker.is_uncertain:
            assert self.may_be_uncertain
            return
        end = self.server.settled()
        if end.is_dead:
            return
        is_quiet = not end.outbox
        is_idle = is_quiet and not end.is_ignoring and not end.is_open and end.copying is None
        assert tracker.is_idle == is_idle, self.sent
        if is_quiet:
            assert tracker.needs_sync == (end.is_ignoring or end.is_open), self.sent
            assert tracker.is_skipping == end.is_ignoring
            assert tracker.is_copy_in == (end.copying is not None)
            assert not tracker.is_copy_out


STATUS = st.sampled_from("ITE")
STATEMENT = st.sampled_from(
    ["rows", "rows", "done", "empty", "error", "copy-out", "copy-in", "copy-in", "copy-in-error"]
)
MESSAGES = st.one_of(
    st.builds(
        Message, st.just("Q"), st.just(CLIENT), st.lists(STATEMENT, min_size=1, max_size=3).map(tuple), STATUS
    ),
    st.builds(
        Message, st.sampled_from("SSSF"), st.just(CLIENT), st.sampled_from([(), (), ("error",)]), STATUS
    ),
    st.builds(Message, st.sampled_from("PBC"), st.just(CLIENT), st.sampled_from([(), (), (), ("error",)])),
    st.builds(
        Message,
        st.just("D"),
        st.just(CLIENT),
        st.sampled_from([("statement",), ("statement-no-rows",), ("no-rows",), ("rows",), ("error",)]),
    ),
    st.builds(
        Message,
        st.just("E"),
        st.just(CLIENT),
        st.tuples(
            st.sampled_from(
                [
                    "rows",
                    "suspend",
                    "empty",
                    "done",
                    "error",
                    "copy-out",
                    "copy-in",
                    "copy-in",
                    "copy-in-error",
                ]
            )
        ),
    ),
    st.builds(
        Message, st.sampled_from("ddcccfH"), st.just(CLIENT), st.sampled_from([(), (), (), ("error",)])
    ),
)
# Streams as drivers write them, so that deep states are reached often.
COPY_MESSAGE = Message("E", fate=("copy-in",))
GROUPS = st.sampled_from(
    [
        [Message("E", fate=("rows",)), Message("S")],
        [Message("P"), Message("B"), Message("E", fate=("rows",)), Message("S")],
        [COPY_MESSAGE, Message("S"), Message("d"), Message("c"), Message("S")],
        [COPY_MESSAGE, Message("d"), Message("c"), Message("S")],
        [COPY_MESSAGE, Message("c"), COPY_MESSAGE, Message("c"), Message("S")],
        [COPY_MESSAGE, Message("S"), Message("S"), Message("d", fate=("error",)), Message("c"), Message("S")],
        [Message("Q", fate=("copy-in", "copy-in")), Message("c"), Message("d"), Message("c")],
        [Message("Q", fate=("copy-in",)), Message("S"), Message("c"), Message("Q", fate=("rows",))],
        [Message("Q", fate=("error",)), Message("d"), Message("c")],
        [Message("E", fate=("error",)), Message("E"), Message("Q", fate=("rows",)), Message("S")],
    ]
)
ACTS = st.one_of(
    st.tuples(st.just("send"), st.one_of(MESSAGES.map(lambda message: [message]), GROUPS), st.integers(1, 3)),
    st.tuples(st.just("work"), st.none(), st.integers(1, 6)),
    st.tuples(st.just("deliver"), st.none(), st.integers(1, 8)),
    st.tuples(st.sampled_from(["cancel", "async", "deploy", "reset", "quiet"]), st.none(), st.just(1)),
)


def play(acts: list[tuple[str, list[Message] | None, int]]) -> Run:
    run = Run()
    for act, messages, count in acts:
        if run.server.is_dead or run.tracker.is_uncertain:
            break
        if act == "send" and messages is not None and not run.has_reset:
            for message in messages * count:
                run.send(message)
        elif act == "work":
            run.work(count)
        elif act == "deliver":
            run.deliver(count)
        elif act == "quiet":
            run.work(1000)
            run.deliver(1000)
        elif act == "cancel":
            run.server.cancel()
        elif act == "async":
            assert run.tracker.backend(b"NAS")
        elif act == "deploy" and run.tracker.is_idle:
            run.send(Message("Q", DEPLOY, ("done", "rows")))
        elif act == "reset":
            if run.tracker.is_idle:
                run.has_reset = True
                run.send(Message("Q", RESET, ("done",)))
            elif run.tracker.needs_sync and not run.tracker.is_copy_in:
                run.has_reset = True
                run.send(Message("S", RESET))
        run.check()
    run.work(1000)
    run.deliver(1000)
    run.check()
    return run


@settings(max_examples=1500)
@given(st.lists(ACTS, max_size=25))
def test_tracker_agrees_with_the_model_of_postgres(acts: list[tuple[str, list[Message] | None, int]]) -> None:
    play(acts)


@pytest.mark.parametrize("seed", range(20))
def test_tracker_agrees_on_long_random_pipelines(seed: int) -> None:
    chance = random.Random(seed)
    run = Run()
    for _ in range(400):
        if run.server.is_dead or run.tracker.is_uncertain:
            break
        # no COPY IN here, else the stream soon ends in a dead server
        kind = chance.choice("QSSFPBDECEEEcfdH")
        error = ("error",) if chance.random() < 0.1 and kind not in "cfd" else ()
        run.send(Message(kind, CLIENT, error or (("rows",) if kind in "QE" else ()), chance.choice("ITE")))
        if chance.random() < 0.2:
            run.work(chance.randrange(20))
            run.deliver(chance.randrange(20))
    assert not run.tracker.is_uncertain
    run.work(10_000)
    run.deliver(10_000)


# the same, spelled out


def test_a_fresh_tracker_is_idle() -> None:
    session = SessionProbe()
    assert session.is_idle
    assert not session.needs_sync
    assert session.status == b"I"


def test_error_drops_everything_up_to_the_next_sync_query_included() -> None:
    session = SessionProbe()
    session.frontend(b"PBEPBEQS")
    session.backend(b"12E")
    assert session.ready() == CLIENT
    assert session.is_idle


def test_error_without_a_sync_waits_for_one() -> None:
    session = SessionProbe()
    session.frontend(b"PBEQ")
    session.backend(b"1E")
    assert session.is_skipping
    assert session.needs_sync
    session.frontend(b"QEEc")
    assert session.owner == CLIENT
    session.frontend(b"S", RESET)
    assert session.owner == RESET
    assert session.ready() == RESET
    assert session.is_idle


def test_answered_extended_messages_without_a_sync_are_not_idle() -> None:
    # Flush brings the answers, but the implicit transaction stays open
    session = SessionProbe()
    session.frontend(b"PBEH")
    assert session.backend(b"12DC")
    assert session.due == 0
    assert not session.is_idle
    assert session.needs_sync
    session.frontend(b"S", RESET)
    assert session.ready() == RESET
    assert session.is_idle


def test_a_query_ends_an_open_group_as_well() -> None:
    session = SessionProbe()
    session.frontend(b"PBEH")
    session.backend(b"12C")
    session.frontend(b"Q", RESET)
    assert not session.needs_sync
    session.backend(b"C")
    assert session.ready() == RESET
    assert session.is_idle


def test_copy_by_execute_swallows_the_sync_that_was_pipelined() -> None:
    session = SessionProbe()
    session.frontend(b"PBDES")
    session.backend(b"12nG")
    assert session.is_copy_in
    assert session.needs_sync
    session.frontend(b"ddc")
    assert not session.is_copy_in
    assert session.backend(b"C")
    assert not session.is_idle
    assert session.ready() == -1
    session.frontend(b"S")
    assert session.ready() == CLIENT
    assert session.is_idle
    assert not session.is_uncertain


def test_copy_that_fails_behind_its_copy_done_leaves_the_swallowed_sync_in_doubt() -> None:
    # The error may have come before the first Sync was read: then there are two ReadyForQuery.
    session = SessionProbe()
    session.frontend(b"ES")
    session.backend(b"G")
    session.frontend(b"dcS")
    session.backend(b"E")
    assert session.is_uncertain
    assert session.ready() == CLIENT
    assert session.ready() == CLIENT


def test_copy_done_sent_before_the_copy_is_known_ends_it() -> None:
    session = SessionProbe()
    session.frontend(b"QddcQ")
    assert session.backend(b"GC")
    assert session.ready() == CLIENT
    assert not session.is_idle
    session.backend(b"TDC")
    assert session.ready() == CLIENT
    assert session.is_idle


def test_late_copy_messages_after_a_failed_copy_mean_nothing() -> None:
    session = SessionProbe()
    session.frontend(b"Q")
    session.backend(b"GE")
    session.frontend(b"dd")
    assert session.ready() == CLIENT
    session.frontend(b"dcf")
    assert session.is_idle
    assert not session.is_uncertain


@pytest.mark.parametrize("end", [b"cCC", b"cTDCCC", b"E"], ids=["stopped", "timeline", "failed"])
@pytest.mark.parametrize("is_late", [False, True], ids=["before", "after"])
def test_a_replication_stream_ends_from_either_side(end: bytes, is_late: bool) -> None:
    session = SessionProbe()
    session.frontend(b"Q")
    assert session.backend(b"W")
    session.frontend(b"ddd")
    assert session.backend(b"dddSd")
    assert session.is_copy_both
    assert not session.is_idle
    if not is_late:
        session.frontend(b"dc")
    assert session.backend(end)
    assert session.ready() == CLIENT
    assert not session.is_copy_both
    if is_late:
        session.frontend(b"dc")
    session.frontend(b"Q")
    assert session.backend(b"TDC")
    assert session.ready() == CLIENT
    assert session.is_idle
    assert not session.is_uncertain


def test_two_copies_in_one_query_take_two_ends_sent_ahead() -> None:
    session = SessionProbe()
    session.frontend(b"Qdcdc")
    assert session.backend(b"GCGC")
    assert not session.is_copy_in
    assert not session.is_uncertain
    assert session.ready() == CLIENT
    assert session.is_idle


def test_two_copies_by_execute_in_a_pipeline() -> None:
    session = SessionProbe()
    session.frontend(b"EcEcS")
    assert session.backend(b"GCGC")
    assert session.ready() == CLIENT
    assert session.is_idle
    assert not session.is_uncertain


def test_message_inside_a_copy_that_postgres_does_not_take_is_uncertain() -> None:
    for kinds in (b"EP", b"EPS", b"EQ", b"QQ", b"QP", b"QPc", b"ESES"):
        session = SessionProbe()
        session.frontend(kinds)
        session.backend(b"G")
        assert session.is_uncertain, kinds


def test_equal_groups_take_one_run() -> None:
    session = SessionProbe()
    session.frontend(b"PBDES" * 1000)
    assert session.runs == 1
    for number in range(1000):
        assert not session.is_idle, number
        session.backend(b"12TDDC")
        assert session.ready() == CLIENT
    assert session.is_idle


def test_ring_grows_wraps_and_is_given_back() -> None:
    session = SessionProbe()
    answers = 0
    for number in range(5000):
        session.frontend(b"E" * (number % 7) + b"S")
        answers += 1
        if number % 3 == 0:
            assert session.backend(b"C" * ((number // 3) % 7))
            assert session.ready() == CLIENT
            answers -= 1
    assert session.capacity >= 2048
    for number in range(5000 - answers, 5000):
        assert session.backend(b"C" * (number % 7))
        assert session.ready() == CLIENT
    assert session.is_idle
    assert session.capacity == 4


def test_pipeline_of_too_many_runs_is_uncertain_and_takes_any_answer() -> None:
    session = SessionProbe()
    session.frontend(b"SQ" * 131072)
    assert not session.is_uncertain
    session.frontend(b"SQ")
    assert session.is_uncertain
    for _ in range(262146):
        assert session.backend(b"C")
        assert session.ready() == CLIENT
    assert session.is_idle


def test_error_at_sync_is_followed_by_ready_for_query() -> None:
    session = SessionProbe()
    session.frontend(b"PBES")
    session.backend(b"12C")
    assert session.backend(b"E")
    assert not session.is_skipping
    assert session.ready(b"I") == CLIENT
    assert session.is_idle


def test_deploy_before_and_reset_after_are_told_apart() -> None:
    session = SessionProbe()
    session.frontend(b"Q", DEPLOY)
    session.frontend(b"PBES")
    session.frontend(b"Q", RESET)
    assert session.owner == DEPLOY
    session.backend(b"SCC")
    assert session.owner == DEPLOY
    assert session.ready() == DEPLOY
    assert session.owner == CLIENT
    session.backend(b"12C")
    assert session.ready(b"T") == CLIENT
    assert session.status == b"T"
    assert session.owner == RESET
    session.backend(b"C")
    assert session.ready() == RESET
    assert session.is_idle


@pytest.mark.parametrize("kind", list("DdcCTI123nstGHVE"))
def test_answer_to_nothing_is_out_of_place(kind: str) -> None:
    assert not SessionProbe().backend(kind.encode())


@pytest.mark.parametrize("kind", list("123nst"))
def test_extended_answer_to_a_query_is_out_of_place(kind: str) -> None:
    session = SessionProbe()
    session.frontend(b"Q")
    assert not session.backend(kind.encode())


def test_ready_for_query_that_nobody_asked_for_is_refused() -> None:
    session = SessionProbe()
    assert session.ready() == -1
    session.frontend(b"PS")
    assert session.ready() == -1


def test_status_that_is_none_is_refused() -> None:
    session = SessionProbe()
    session.frontend(b"Q")
    session.backend(b"C")
    assert session.ready(b"X") == -1


def test_notices_change_nothing() -> None:
    session = SessionProbe()
    assert session.backend(b"NAS")
    session.frontend(b"E")
    assert session.backend(b"NAS")
    assert session.due == 1


def test_an_error_is_remembered_until_the_next_message() -> None:
    session = SessionProbe()
    session.frontend(b"Q")
    session.backend(b"E")
    assert session.error_was_last
    session.ready()
    assert not session.error_was_last
