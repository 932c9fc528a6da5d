"""Changes of the configuration in force, one after the other: the master's side of ``process/reload.py``."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gpooler.config.diff import Change
from gpooler.config.model import Config
from gpooler.errors import ConfigurationError
from gpooler.log import Logger
from gpooler.net.listen import Listener
from gpooler.process.control import Committed, Prepared
from gpooler.process.family import Child, Family
from gpooler.process.listeners import bind
from gpooler.process.reload import Answer, Reload, ReloadRefused, Stage, read

Made = tuple[Config, list[Change], list[str]]
"""A configuration as it is to come into force, what it changes, and warnings."""


@dataclass(frozen=True, slots=True)
class _Asked:
    make: Callable[[], Made]  # when its turn comes; raises ReloadRefused
    answer: Answer
    title: str  # for the log, when it is done


class Changes:
    """Those of one master. ``config`` and ``listeners`` are what is in force; the listeners are its own."""

    def __init__(
        self,
        config: Config,
        path: Path,
        listeners: Sequence[Listener],
        *,
        can_begin: Callable[[], bool],
        on_done: Callable[[Config, bool], None],
        logger: Logger,
        are_given: bool = True,
    ) -> None:
        """``can_begin``: whether one may begin now; raises ReloadRefused where none may ever again.

        ``on_done`` is told of a configuration that is in force in all children, and whether its file differs.
        Unless the listeners ``are_given`` to children from the start, the first change gives them.
        """
        self.config = config
        self.listeners = tuple(listeners) if are_given else ()
        self._bound = [] if are_given else list(listeners)
        self._path = path
        self._can_begin = can_begin
        self._on_done = on_done
        self._logger = logger
        self._asked: deque[_Asked] = deque()  # the first is under way with ``_reload``
        self._reload: Reload | None = None
        self._serial = 0
        self._in_force = 0  # its serial

    def reload(self, family: Family, answer: Answer) -> None:
        """Read the file again."""
        title = "configuration reloaded"
        self.change(family, lambda: read(self._path, self.config), answer, title=title)

    def try_reload(self) -> tuple[bool, str]:
        """What a reload would do: whether it would be done, and in words."""
        try:
            _, found, warnings = read(self._path, self.config)
        except ReloadRefused as refusal:
            return False, str(refusal)
        return True, "\n".join([*warnings, *(map(str, found) if found else ["nothing would change"])])

    def change(self, family: Family, make: Callable[[], Made], answer: Answer, *, title: str) -> None:
        """Bring what ``make`` returns into force, behind the changes under way."""
        self._asked.append(_Asked(make, answer, title))
        self.begin(family)

    @property
    def keeps_listeners_back(self) -> bool:
        """Whether no child has been given the listeners yet."""
        return bool(self._bound)

    @property
    def is_under_way(self) -> bool:
        """Whether children are waited for."""
        return self._reload is not None

    def refuse_all(self, text: str) -> None:
        """Nothing that was asked for will begin any more."""
        while self._asked:
            self._refuse(text)

    def begin(self, family: Family) -> None:
        """Begin what was asked for, unless something is under way."""
        while self._reload is None and self._asked:
            try:
                if not self._can_begin():
                    return
                config, found, warnings = self._asked[0].make()
                bound = {listener.number for listener in (*self.listeners, *self._bound)}
                opened = bind(config, [listen for listen in config.listen if listen.number not in bound])
                opened, self._bound = self._bound + opened, []
            except ReloadRefused as refusal:
                self._refuse(str(refusal))
                continue
            except ConfigurationError as error:
                self._refuse(f"error: {error.log_text()}")
                continue
            for warning in warnings:
                self._logger.info(warning, context="config")
            self._serial += 1
            self._reload = Reload(self._serial, config, found, opened, family)

    def hear(self, family: Family, child: Child, message: Prepared | Committed) -> None:
        """A child's answer."""
        if self._reload is not None:
            self._reload.hear(child, message)
            self._go_on(family)

    def miss(self, family: Family, child: Child) -> None:
        """A child is dead."""
        if self._reload is not None:
            self._reload.miss(child)
            self._go_on(family)

    def forget(self) -> None:
        """In a child: close what it does not need."""
        if self._reload is not None:
            self._reload.forget()
        for listener in self._bound:
            listener.socket.close()

    def own(self, locks: Mapping[str, int]) -> None:
        """Unix sockets whose locks we have got are ours to remove."""
        self.listeners = tuple(
            replace(each, lock_fd=locks[each.host]) if each.is_unix and each.host in locks else each
            for each in self.listeners
        )

    def close_listeners(self) -> None:
        """From now on the kernel refuses clients, once no worker listens any more."""
        for listener in (*self.listeners, *self._bound):
            listener.close()

    def _go_on(self, family: Family) -> None:
        reload = self._reload
        assert reload is not None
        if reload.is_in_force and reload.serial != self._in_force:
            self._in_force = reload.serial
            self.config = reload.config
            self.listeners = (*self.listeners, *reload.opened)
        if reload.stage is not Stage.DONE:
            return
        self._reload = None
        if reload.fault:
            for listener in reload.opened:
                listener.close()
            self._refuse(f"error: {reload.fault}")
        else:
            self._finish(reload)
        self.begin(family)

    def _finish(self, reload: Reload) -> None:
        """It is in force in every child."""
        asked = self._asked.popleft()
        self._listen_as_configured()
        self._on_done(reload.config, bool(reload.found))
        lines = [str(found) for found in reload.found]
        for line in [asked.title, *lines]:
            self._logger.info(line, context="config")
        asked.answer(True, "\n".join(lines or ["nothing has changed"]))

    def _listen_as_configured(self) -> None:
        """Close what is not asked for any more; the workers have."""
        listens = {listen.number: listen for listen in self.config.listen}
        for listener in self.listeners:
            if listener.socket.fileno() < 0:
                pass  # a drain has begun
            elif listener.number in listens:
                listener.socket.listen(listens[listener.number].backlog)
            else:
                listener.close()
        self.listeners = tuple(each for each in self.listeners if each.number in listens)

    def _refuse(self, text: str) -> None:
        for line in [*text.splitlines(), "nothing is changed: all stays as it was"]:
            self._logger.error(line, context="config")
        self._asked.popleft().answer(False, text)
