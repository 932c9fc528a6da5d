"""A change of the configuration while everything runs: prepared by every process, then in force in all.

The master reads and checks the file. Every child makes ready what can fail, the certificates first of all,
and says so (``Prepare``, ``Prepared``). Only when all can does it come into force: in the broker first, which
must know the rules that workers ask for, then in the workers (``Commit``, ``Committed``). A child that is
forked meanwhile begins with the one that is in force; one that dies is waited for no more. Workers of the
master before this one go on as they are, until they have drained.
"""

import os
import pickle
import traceback
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Generic, TypeVar

from gpooler.config.diff import Change, changes
from gpooler.config.load import ConfigError, load
from gpooler.config.model import Config, Rule
from gpooler.config.succession import succeed
from gpooler.errors import ConfigurationError
from gpooler.logs.direct import Log
from gpooler.net.listen import Listener
from gpooler.process.control import Commit, Committed, Listen, Prepare, Prepared
from gpooler.process.family import BROKER, Child, Family
from gpooler.process.fork import EXIT_CRASH

T = TypeVar("T")
Answer = Callable[[bool, str], None]
"""Told how a reload ended: whether it went well, and in words."""


def pack(config: Config) -> int:
    """A configuration in memory of its own; the descriptor is the caller's. Raises OSError."""
    fd = os.memfd_create("gpooler-config", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as file:
        pickle.dump(config, file)
    return fd


def unpack(fd: int) -> Config:
    """What ``pack`` made, by a process of ours. Closes ``fd``."""
    with os.fdopen(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY), "rb") as file:
        os.close(fd)
        config: Config = pickle.load(file)  # the master's
        return config


def take_over(config: Config, before: Config) -> Config:
    """``config`` with the rules that have not changed as the objects they were: whoever has one sees that."""
    known = {rule.name: rule for rule in (*before.rules, *before.retired, *before.removed)}

    def kept(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        return tuple(known[rule.name] if known.get(rule.name) == rule else rule for rule in rules)

    return config.model_copy(
        update={
            "rules": kept(config.rules),
            "retired": kept(config.retired),
            "removed": kept(config.removed),
        }
    )


class Candidate(Generic[T]):
    """In a child: what it has made ready of a configuration that may come into force."""

    def __init__(self, make: Callable[[Config], T]) -> None:
        """``make`` does all that can fail; raises ConfigurationError."""
        self._make = make
        self._ready: tuple[int, T] | None = None

    def prepare(self, serial: int, fd: int) -> str:
        """Make ready; returns why that cannot be, or nothing. Closes ``fd``."""
        try:
            self._ready = serial, self._make(unpack(fd))
        except ConfigurationError as error:
            return error.log_text()
        return ""

    def take(self, serial: int, fd: int, log: Log, context: str) -> T:
        """What was made ready; a child that was not asked before, and cannot, begins anew. Closes ``fd``."""
        if self._ready is None or self._ready[0] != serial:
            fault = self.prepare(serial, fd)
            if fault:
                log.logger.fatal(f"cannot go on with the new configuration: {fault}", context=context)
                log.close()
                os._exit(EXIT_CRASH)
        else:
            os.close(fd)
        assert self._ready is not None
        (_, ready), self._ready = self._ready, None
        return ready


class Stage(IntEnum):
    """Whose word is waited for."""

    PREPARING = 0  # of all
    BROKER = 1
    WORKERS = 2
    DONE = 3


class Reload:
    """One change under way. Drops its descriptor when it is over."""

    def __init__(
        self,
        serial: int,
        config: Config,
        found: Sequence[Change],
        opened: Sequence[Listener],
        family: Family,
    ) -> None:
        """Ask every child to prepare for ``config``; ``opened``: its listeners that the old one has not."""
        self.serial = serial
        self.config = config
        self.found = found
        self.opened = opened
        self.fault = ""  # why it failed
        self.stage = Stage.PREPARING
        self._family = family
        self._fd = pack(config)
        self._awaited: set[int] = set()  # incarnations
        self._ask(Prepare(serial), family.own)

    @property
    def is_in_force(self) -> bool:
        """Whether children that are forked from now on begin with it."""
        return self.stage > Stage.PREPARING and not self.fault

    def hear(self, child: Child, message: Prepared | Committed) -> None:
        """A child's answer."""
        if message.serial != self.serial:
            return
        if isinstance(message, Prepared) and message.fault and self.stage is Stage.PREPARING:
            self.fault = f"{child.name}: {message.fault}"
            self._end()
            return
        self.miss(child)

    def miss(self, child: Child) -> None:
        """A child has answered, or is dead: go on when it was the last."""
        self._awaited.discard(child.incarnation)
        while not self._awaited and self.stage < Stage.DONE:
            self.stage = Stage(self.stage + 1)
            if self.stage is Stage.BROKER:
                broker = self._family.get(BROKER)
                self._ask(Commit(self.serial), [] if broker is None else [broker])
            elif self.stage is Stage.WORKERS:
                self._give_listeners()
                self._ask(Commit(self.serial), self._family.own_workers)
            else:
                self._end()

    def forget(self) -> None:
        """In a child that is forked meanwhile: close what it does not need."""
        if self.stage < Stage.DONE:
            os.close(self._fd)
        if not self.is_in_force:
            for listener in self.opened:
                listener.socket.close()

    def _give_listeners(self) -> None:
        for listener in self.opened:
            message = Listen(listener.number, listener.host, listener.port, listener.is_unix)
            for worker in self._family.own_workers:
                worker.link.send(message, [listener.socket.fileno()])

    def _ask(self, message: Prepare | Commit, children: Sequence[Child]) -> None:
        self._awaited = {child.incarnation for child in children}
        for child in children:
            child.link.send(message, [self._fd])

    def _end(self) -> None:
        self.stage = Stage.DONE
        os.close(self._fd)


class ReloadRefused(Exception):
    """Nothing was changed; the text says why."""


def read(path: Path, before: Config) -> tuple[Config, list[Change], list[str]]:
    """What a reload of ``path`` would bring into force, what that changes, and warnings.

    Raises ReloadRefused with every problem of the file.
    """
    try:
        loaded = load(path)
        warnings = [f"warning: {warning}" for warning in loaded.warnings]
        return succeed(before, loaded.config), changes(before, loaded.config), warnings
    except ConfigError as error:
        raise ReloadRefused("\n".join(f"error: {problem}" for problem in error.problems)) from None
    except Exception:  # noqa: BLE001  # of ours: everything else goes on
        raise ReloadRefused(f"error: {traceback.format_exc()}") from None
