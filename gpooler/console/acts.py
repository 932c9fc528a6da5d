"""Commands that change something: who may, whether what they name is there, and that the master does it."""

from collections.abc import Callable
from typing import Final

from gpooler.config.field import Status
from gpooler.config.model import Config
from gpooler.config.options import TABLE
from gpooler.config.words import Role, StorageType
from gpooler.console.statements import Act
from gpooler.errors import ConsoleDenied, ConsoleRefused, ConsoleUnsupported, UnknownDatabase
from gpooler.log import LogContext, Logger

OPTIONS: Final = frozenset(option.name for option in TABLE if option.about.status is Status.BUILT)
_OF_DATABASE: Final = frozenset({"PAUSE", "RESUME", "DISABLE", "ENABLE", "KILL", "RECONNECT", "WAIT_CLOSE"})

Deed = Callable[[str, str], tuple[bool, str]]
"""Has the master do something: a verb and what it is about. Whether it did, and in words. Yields."""


class Acts:
    """Those of one worker. ``perform`` is the one place where a command of a console leads to a deed."""

    def __init__(
        self,
        config: Callable[[], Config],
        deed: Deed,
        find_client: Callable[[int], str | None],
        logger: Logger,
    ) -> None:
        """``find_client`` gives the id of the client with a number of SHOW CLIENTS' column ``id``. Yields."""
        self._config = config
        self._deed = deed
        self._find_client = find_client
        self._logger = logger

    def perform(self, act: Act, role: Role, who: LogContext) -> str:
        """Carry ``act`` out; returns what is to be told of it. Yields.

        Raises ConsoleDenied, UnknownDatabase, ConsoleRefused, ConsoleUnsupported.
        """
        if role is not Role.ADMIN:
            raise ConsoleDenied(act.name)
        if act.name == "SET":
            raise ConsoleUnsupported(
                "options are not set in the console", hint="Change the configuration file, then RELOAD."
            )
        self._logger.info(f"console: {' '.join((act.name, *act.arguments))}", context="console", who=who)
        about = act.arguments[0] if act.arguments else ""
        if act.name in _OF_DATABASE and about:
            self._check_database(about)
        if act.name == "KILL_CLIENT" and about.isdigit():
            found = self._find_client(int(about))
            if found is None:
                raise ConsoleRefused(f"there is no client {about}")
            about = found
        is_good, text = self._deed(act.name, about)
        if not is_good:
            raise ConsoleRefused(text)
        return text

    def _check_database(self, name: str) -> None:
        config = self._config()
        rules = [
            rule
            for rule in (*config.served, *config.removed)
            if config.storage[rule.storage].type is not StorageType.LOCAL
        ]
        if not any(rule.is_default_database or rule.database == name for rule in rules):
            raise UnknownDatabase(name)
