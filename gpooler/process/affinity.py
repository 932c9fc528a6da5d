"""Puts each process on the cores that ``cpu_affinity`` gives it, before it has a second thread."""

import os
from collections.abc import Set
from typing import Final

from gpooler.config.affinity import BROKER, MASTER, WORKER, cores_text, parse_affinity, parse_cores
from gpooler.errors import ConfigurationError
from gpooler.log import LogSettings
from gpooler.logs.direct import open_direct

# Set by a master on few cores, for a gpooler that it starts: that one may have all of them again.
ALLOWED_VARIABLE: Final = "GPOOLER_CORES"


class Cores:
    """Those of one gpooler. ``allowed`` are all that it may use."""

    def __init__(self, text: str) -> None:
        """Raises ConfigurationError: a core that we may not have."""
        self._affinity = parse_affinity(text)
        given = os.environ.get(ALLOWED_VARIABLE)
        # one that has been started by a master on few cores begins there, whatever its own configuration says
        self._is_on = self._affinity.is_auto or bool(self._affinity.cores) or bool(given)
        self.allowed: Set[int] = parse_cores(given) if given else os.sched_getaffinity(0)
        if missing := self._affinity.missing(self.allowed):
            raise ConfigurationError(f"cpu_affinity: {missing}")

    def take_master(self) -> None:
        """For this process, and those it forks until they say otherwise. Raises ConfigurationError."""
        try:
            os.environ[ALLOWED_VARIABLE] = cores_text(self.allowed)
            self._take(MASTER, None)
        except OSError as error:
            raise ConfigurationError(f"could not set cpu_affinity: {error.strerror}") from error

    def take_child(self, worker: int | None, settings: LogSettings) -> None:
        """For a child: the first worker, the second …, or the broker (None).

        What the system does not give is logged.
        """
        try:
            self._take(BROKER if worker is None else WORKER, worker)
        except OSError as error:  # cores may be taken away at any time: better a slow child than none
            log = open_direct(settings)
            log.logger.error(f"could not set cpu_affinity: {error.strerror}", context="master")
            log.close()

    def _take(self, kind: str, number: int | None) -> None:
        if self._is_on:
            os.sched_setaffinity(0, self._affinity.cores_of(kind, number, self.allowed))
