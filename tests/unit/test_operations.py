"""What operators ask for, in the master, whatever comes between a change and its end."""

from collections.abc import Callable

import pytest

from gpooler.config.load import load_text
from gpooler.process.changes import Made
from gpooler.process.control import Act, AwaitGone, Kill
from gpooler.process.family import Child
from gpooler.process.operations import Operations
from gpooler.process.reload import Answer, ReloadRefused
from gpooler.process.vault import Vault

TEXT = """
[logging]
log_format = "%m"
[[listen]]
host = "127.0.0.1"
[storage.one]
type = "remote"
host = "h"
[database.app.user.joe]
authentication = "none"
storage = "one"
pool = "transaction"
"""


class Master:
    """Brings changes into force, one after the other, when the test says so, and tells who asked."""

    def __init__(self) -> None:
        self.config = load_text(TEXT).config
        self.changes: list[tuple[Callable[[], Made], Answer]] = []
        self.awaited: list[AwaitGone] = []
        self.operations = Operations(self, Vault())
        self.answers: list[tuple[bool, str]] = []

    def ask(self, verb: str, name: str = "app") -> None:
        def answer(is_good: bool, text: str) -> None:
            self.answers.append((is_good, f"{verb}: {text}"))

        self.operations.perform(Act(0, verb, name), answer)

    def decide(self) -> Answer:
        """The first change is in force here; workers have not all said so. Returns what tells who asked.

        One that is refused when its turn comes has been answered.
        """
        make, answer = self.changes.pop(0)
        try:
            self.config = make()[0]
        except ReloadRefused as refusal:
            answer(False, str(refusal))
        return answer

    def change(self, make: Callable[[], Made], answer: Answer, *, title: str) -> None:
        self.changes.append((make, answer))

    def tell_broker(self, message: AwaitGone) -> None:
        self.awaited.append(message)

    def tell_workers(self, message: Kill) -> list[Child]:
        raise NotImplementedError

    def reload(self, answer: Answer) -> None:
        raise NotImplementedError

    def shut_down(self, *, is_patient: bool, is_now: bool) -> None:
        raise NotImplementedError


@pytest.fixture
def master() -> Master:
    return Master()


def test_a_pause_is_answered_when_its_servers_are_gone(master: Master) -> None:
    master.ask("PAUSE")
    done = master.decide()
    assert master.awaited == []
    done(True, "")
    (wait,) = master.awaited
    assert (wait.name, master.answers) == ("app", [])
    master.operations.gone(wait.token)
    master.operations.gone(wait.token)  # an earlier broker's
    assert master.answers == [(True, "PAUSE: ")]


@pytest.mark.parametrize("name", ["app", ""])
@pytest.mark.parametrize("is_early", [True, False], ids=["before its turn", "while workers commit it"])
def test_a_resume_ends_a_pause_that_is_on_its_way(master: Master, name: str, is_early: bool) -> None:
    master.ask("PAUSE")
    if is_early:
        master.ask("RESUME", name)
    paused = master.decide()
    if not is_early:
        master.ask("RESUME", name)
    paused(True, "")
    (wait,) = master.awaited
    master.decide()(True, "nothing has changed")  # in the file, that is
    whom = 'database "app" is' if name else "all databases are"
    told = False, f"PAUSE: {whom} resumed before its servers were gone"
    assert master.answers == [told, (True, "RESUME: ")]
    assert not master.config.pauses
    master.operations.gone(wait.token)  # too late
    assert len(master.answers) == 2


def test_a_resume_that_cannot_come_into_force_ends_no_pause(master: Master) -> None:
    master.ask("PAUSE")
    master.decide()(True, "")
    master.ask("RESUME")
    _, answer = master.changes.pop(0)
    answer(False, "gpooler is ending")
    assert master.answers == [(False, "RESUME: gpooler is ending")]
    master.operations.gone(master.awaited[0].token)
    assert master.answers[1:] == [(True, "PAUSE: ")]


def test_what_is_not_paused_is_not_resumed(master: Master) -> None:
    for name, text in (("app", 'database "app" is not paused'), ("", "all databases are not paused")):
        master.ask("RESUME", name)
        master.decide()
        assert master.answers.pop() == (False, f"RESUME: {text}")
    master.ask("PAUSE", "")
    master.decide()(True, "")
    master.ask("RESUME")
    master.decide()
    assert master.answers == [(False, 'RESUME: database "app" is not paused')]


def test_a_pause_behind_a_resume_is_another_one(master: Master) -> None:
    master.ask("PAUSE")
    master.decide()(True, "")
    master.ask("RESUME")
    master.ask("PAUSE")
    resumed = master.decide()
    assert not master.config.pauses
    resumed(True, "")
    master.operations.tell_new_broker()  # nobody waits any more
    master.decide()(True, "")
    first, second = master.awaited
    master.operations.tell_new_broker()
    assert master.awaited == [first, second, second]
    master.operations.gone(first.token)
    master.operations.gone(second.token)
    assert [is_good for is_good, _ in master.answers] == [False, True, True]


def test_a_pause_that_does_not_come_into_force_is_told_why(master: Master) -> None:
    master.ask("PAUSE")
    _, answer = master.changes.pop(0)
    answer(False, "a worker could not")
    assert master.answers == [(False, "PAUSE: a worker could not")]
    master.operations.give_up("gpooler is ending")
    assert len(master.answers) == 1


def test_who_waits_is_told_of_the_end_and_who_is_in_the_queue_what_became_of_it(master: Master) -> None:
    master.ask("PAUSE")
    master.decide()(True, "")
    master.ask("PAUSE", "")
    master.operations.give_up("gpooler is being restarted")
    assert master.answers == [(False, "PAUSE: gpooler is being restarted")]
    master.decide()(True, "")  # the restart came to nothing
    master.operations.gone(master.awaited[1].token)
    assert master.answers[1:] == [(True, "PAUSE: ")]
