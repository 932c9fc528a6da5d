"""Asks a Python function of the user's whether a password is right: ``auth_module``."""

import importlib
from collections.abc import Callable
from typing import Final

from gpooler.auth.offload import Offload
from gpooler.errors import ConfigurationError

THREADS: Final = 8  # of one function: so many calls run at once
QUEUE: Final = 256  # and so many logins wait
TIMEOUT_MS: Final = 5000

# user, database, address (empty for a Unix socket), password; True lets the client in.
Function = Callable[[str, str, str, bytes], bool]


def load(name: str) -> Function:
    """The function ``package.module:function``. Raises ConfigurationError."""
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # it is not our code; what it says is told
        raise ConfigurationError(f'auth_module "{name}" cannot be loaded', cause=f"{error!r}") from error
    if not callable(found):
        raise ConfigurationError(f'auth_module "{name}" is not a function')
    function: Function = found
    return function


class AuthModule:
    """One function, called in threads of its own. Made in the hub."""

    def __init__(self, name: str) -> None:
        """Raises ConfigurationError."""
        self._function = load(name)
        self._offload = Offload(
            f'auth_module "{name}"', threads=THREADS, queue_limit=QUEUE, timeout_ms=TIMEOUT_MS
        )

    def is_right(self, user: str, database: str, address: str, password: bytes) -> bool:
        """What it says, and nothing but True is yes. Yields. Raises OffloadError, and what it raises."""
        return self._offload.run(lambda: self._function(user, database, address, password)) is True
