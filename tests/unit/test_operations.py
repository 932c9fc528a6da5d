"""What operators ask for, in the master, whatever comes between a change and its end."""

from collections.abc import Callable

import pytest

from gpooler.config.load import load_text
from gpooler.config.model import Config
from gpooler.process.changes import Made
from gpooler.process.control import Act, AwaitGone, Kill
from gpooler.process.family import Child
from gpooler.process.operations import Operations
from gpooler.process.reload import Answer
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
        """The first change is in force here; workers have not all said so. Returns what tells who asked."""
        make, answer = self.changes.pop(0)
        self.config = make()[0]
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


def pauses(config: Config) -> set[str]:
    return set(config.pauses)


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
def test_a_resume_while_workers_still_commit_the_pause_ends_it(master: Master, name: str) -> None:
    master.ask("PAUSE")
    paused = master.decide()
    master.ask("RESUME", name)
    assert [is_good for is_good, _ in master.answers] == [False]
    assert "resumed before its servers were gone" in master.answers[0][1]
    paused(True, "")
    assert master.awaited == []
    master.decide()(True, "")
    assert master.answers[1:] == [(True, "RESUME: ")]
    assert pauses(master.config) == set()


def test_a_pause_behind_a_resume_is_another_one(master: Master) -> None:
    master.ask("PAUSE")
    paused = master.decide()
    master.ask("RESUME")
    master.ask("PAUSE")
    paused(True, "")
    master.operations.tell_new_broker()  # which knows the first one's pause only
    assert master.awaited == []
    master.decide()(True, "")
    assert pauses(master.config) == set()
    master.decide()(True, "")
    (wait,) = master.awaited
    master.operations.tell_new_broker()
    assert master.awaited == [wait, wait]
    master.operations.gone(wait.token)
    assert [is_good for is_good, _ in master.answers] == [False, True, True]


def test_a_pause_that_does_not_come_into_force_is_told_why(master: Master) -> None:
    master.ask("PAUSE")
    _, answer = master.changes.pop(0)
    answer(False, "a worker could not")
    assert master.answers == [(False, "PAUSE: a worker could not")]
    master.operations.give_up("gpooler is ending")
    assert len(master.answers) == 1


def test_who_waits_is_told_of_the_end(master: Master) -> None:
    master.ask("PAUSE")
    master.operations.give_up("gpooler is ending")
    assert master.answers == [(False, "PAUSE: gpooler is ending")]
    master.decide()(False, "gpooler is ending")
    assert len(master.answers) == 1
