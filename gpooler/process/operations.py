"""What operators ask for while gpooler runs (the console's commands that act), in the master.

What is to hold for new processes, too, is part of the configuration in force (``pauses``, ``disabled``, the
epochs of rules), so it comes into force as a reload does. Who waits for servers to be gone waits here: the
broker says when none is left, being opened or open; which ones were open at some time the vault knows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from gpooler.config.model import Config
from gpooler.config.succession import renew_servers
from gpooler.config.words import Pause
from gpooler.process.changes import Made
from gpooler.process.control import Act, AwaitGone, HeldServer, Kill
from gpooler.process.family import Child
from gpooler.process.reload import Answer, ReloadRefused
from gpooler.process.vault import Vault
from gpooler.routing.rules import is_of_database

EVERY: Final = ""  # in place of a database's name


class Master(Protocol):
    """What is needed of the arbiter."""

    @property
    def config(self) -> Config:
        """The one in force."""

    def change(self, make: Callable[[], Made], answer: Answer, *, title: str) -> None:
        """Bring what ``make`` returns into force, behind the changes under way."""

    def reload(self, answer: Answer) -> None:
        """Read the file again."""

    def shut_down(self, *, is_patient: bool, is_now: bool) -> None:
        """End. ``is_patient``: let clients stay until they leave; ``is_now``: at once."""

    def tell_broker(self, message: AwaitGone) -> None:
        """Send it, if a broker lives."""

    def tell_workers(self, message: Kill) -> list[Child]:
        """Send it to each that lives."""


@dataclass(slots=True)
class _Wait:
    is_over: Callable[[], bool]
    answer: Answer


@dataclass(slots=True)
class _Killing:
    awaited: set[int]  # incarnations
    count: int
    name: str
    is_client: bool
    answer: Answer


class Operations:
    """Those of one master."""

    def __init__(self, master: Master, vault: Vault) -> None:
        self._master = master
        self._vault = vault
        self._waits: list[_Wait] = []
        self._outdated: set[tuple[int, int]] = set()  # route and slot, until that server is gone
        self._killings: dict[int, _Killing] = {}
        self._pausing: dict[int, tuple[str, Answer]] = {}  # databases whose servers are to go
        self._serial = 0

    def perform(self, act: Act, answer: Answer) -> None:
        """Do what ``act`` says; ``answer`` is told when it is done."""
        name = act.argument
        match act.verb:
            case "PAUSE":
                then = lambda: self._await_gone(name, answer)  # noqa: E731
                self._pause(name, Pause.CLOSE, then, answer)
            case "SUSPEND":
                self._pause(EVERY, Pause.KEEP, lambda: answer(True, ""), answer)
            case "RESUME":
                self._resume(name, answer)
            case "DISABLE" | "ENABLE":
                self._disable(name, act.verb == "DISABLE", answer)
            case "RECONNECT" | "DROP SERVERS":
                self._reconnect(name, answer)
            case "WAIT_CLOSE":
                self._wait(lambda: not self._outdated_of(name), answer)
            case "KILL":
                self._pause(name, Pause.CLOSE, lambda: self._kill(name, False, answer), answer)
            case "KILL_CLIENT":
                self._kill(name, True, answer)
            case "RELOAD":
                self._master.reload(answer)
            case "SHUTDOWN":
                self._master.shut_down(is_patient=name == "WAIT_FOR_CLIENTS", is_now=not name)
                answer(True, "")
            case _:
                answer(False, f"the master does not know {act.verb}")

    def look(self) -> None:
        """Servers are gone, or children: answer those whose wait is over."""
        self._outdated &= {_key(held) for held in self._vault.servers()}
        over = [wait for wait in self._waits if wait.is_over()]
        for wait in over:
            self._waits.remove(wait)
            wait.answer(True, "")

    def tell_new_broker(self) -> None:
        """What an earlier one was asked for and has not answered."""
        for token, (name, _) in self._pausing.items():
            self._master.tell_broker(AwaitGone(token, name))

    def gone(self, token: int) -> None:
        """The broker's answer."""
        if token in self._pausing:
            self._pausing.pop(token)[1](True, "")

    def killed(self, child: Child, serial: int, count: int) -> None:
        """A worker has ended so many of those that a ``Kill`` named; none by one that is dead."""
        killing = self._killings.get(serial)
        if killing is None:
            return
        killing.count += count
        killing.awaited.discard(child.incarnation)
        if killing.awaited:
            return
        del self._killings[serial]
        if killing.is_client and not killing.count:
            killing.answer(False, f'there is no client "{killing.name}"')
        else:
            killing.answer(True, "")

    def miss(self, child: Child) -> None:
        """A child is dead."""
        for serial in list(self._killings):
            self.killed(child, serial, 0)

    def give_up(self, text: str) -> None:
        """Nothing that is waited for will be seen here any more."""
        answers = [wait.answer for wait in self._waits]
        answers += [killing.answer for killing in self._killings.values()]
        answers += [answer for _, answer in self._pausing.values()]
        self._waits, self._killings, self._pausing = [], {}, {}
        for answer in answers:
            answer(False, text)

    # --- parts ----------------------------------------------------------------------------------

    def _change(self, update: Callable[[Config], Config], answer: Answer, title: str) -> None:
        """``answer`` has no text when it is in force: that of a change tells which settings differ."""

        def is_done(is_good: bool, text: str) -> None:
            answer(is_good, "" if is_good else text)

        self._master.change(lambda: (update(self._master.config), [], []), is_done, title=title)

    def _pause(self, name: str, mode: Pause, then: Callable[[], None], answer: Answer) -> None:
        """``then`` is called when it is in force; else ``answer`` is told why not."""

        def update(config: Config) -> Config:
            return config.model_copy(update={"pauses": {**config.pauses, name: mode}})

        self._change(
            update, lambda is_good, text: then() if is_good else answer(False, text), f"{_whom(name)} paused"
        )

    def _resume(self, name: str, answer: Answer) -> None:
        """What is paused by then, also by a PAUSE that is still on its way."""
        title = f"{_whom(name)} resumed"

        def update(config: Config) -> Config:
            if name not in config.pauses and not (name == EVERY and config.pauses):
                raise ReloadRefused(f"{_whom(name)} not paused")
            pauses: Mapping[str, Pause] = {
                other: mode for other, mode in config.pauses.items() if name not in (EVERY, other)
            }
            return config.model_copy(update={"pauses": pauses})

        def is_done(is_good: bool, text: str) -> None:
            for token, (paused, waiting) in list(self._pausing.items()):
                if is_good and name in (EVERY, paused):
                    del self._pausing[token]
                    waiting(False, f"{title} before its servers were gone")
            answer(is_good, text)

        self._change(update, is_done, title)

    def _disable(self, name: str, is_disabled: bool, answer: Answer) -> None:
        def update(config: Config) -> Config:
            disabled = config.disabled | {name} if is_disabled else config.disabled - {name}
            return config.model_copy(update={"disabled": disabled})

        self._change(update, answer, f"{_whom(name)} {'disabled' if is_disabled else 'enabled'}")

    def _reconnect(self, name: str, answer: Answer) -> None:
        def update(config: Config) -> Config:
            self._outdated |= {_key(held) for held in self._servers(name)}
            return renew_servers(
                config, lambda rule: name == EVERY or rule.is_default_database or rule.database == name
            )

        self._change(update, answer, f"{_whom(name)} given other servers")

    def _kill(self, name: str, is_client: bool, answer: Answer) -> None:
        self._serial += 1
        workers = self._master.tell_workers(Kill(self._serial, name, is_client))
        awaited = {worker.incarnation for worker in workers}
        self._killings[self._serial] = _Killing(awaited, 0, name, is_client, answer)

    def _await_gone(self, name: str, answer: Answer) -> None:
        self._serial += 1
        self._pausing[self._serial] = name, answer
        self._master.tell_broker(AwaitGone(self._serial, name))

    def _wait(self, is_over: Callable[[], bool], answer: Answer) -> None:
        self._waits.append(_Wait(is_over, answer))
        self.look()

    def _servers(self, name: str) -> list[HeldServer]:
        """Those of a database."""
        config = self._master.config
        rules = {rule.name: rule for rule in (*config.served, *config.removed)}
        return [
            held
            for held in self._vault.servers()
            if not held.is_replication
            and held.rule in rules
            and (name == EVERY or is_of_database(rules[held.rule], held.database, name))
        ]

    def _outdated_of(self, name: str) -> set[tuple[int, int]]:
        return self._outdated & {_key(held) for held in self._servers(name)}


def _key(held: HeldServer) -> tuple[int, int]:
    return held.route_id, held.slot


def _whom(name: str) -> str:
    return f'database "{name}" is' if name else "all databases are"
