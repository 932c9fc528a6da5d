"""Online restart: an old master hands everything over to a new one that it has started, piece by piece.

What passes between the two, over a pair that the new one inherits. Sockets, locks and memory come as
descriptors; the old master keeps its own copies until the new one serves, so that it can take all back.

1. The old one starts the new one, the same command, and offers: ``Offer``, the listeners, the pid file.
2. The new one reads its configuration as a reload would, binds what is missing, forks broker and workers.
   None of them accepts yet. Whatever fails up to here is told (``Failed``) and nothing has happened.
3. ``Take``: the old one ends its broker, as if it had died, and hands over its workers (``OldWorker``: their
   control channels and counters), its vault, and what dead workers counted (``Estate``). The new broker
   rebuilds its ledger from the reports of the old workers, so every limit holds over both generations.
4. The new workers are given the listeners. ``Serving``: the old one lets go of what the new one has
   (``Gone``), and from then on only buries its workers (``OldWorkerEnded``); the new one tells them to drain.

An end of the channel before ``Serving``: the old one kills what is left of the new one and begins a broker of
its own, as after the death of one. An end after it: the last old worker has drained, or all of them died.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Final

from gpooler.broker.codec import Codec
from gpooler.process.control import HeldServer

VERSION: Final = 1  # of this protocol, of the control channel and of what is pickled: ``config.model``
VARIABLE: Final = "GPOOLER_OLD_MASTER"  # the descriptor of the new master's end, in its environment

# --- old master to new -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Offer:
    """First message. The configuration in force comes along (``process/reload.py: pack``)."""

    DESCRIPTORS: ClassVar[int] = 1
    version: int
    pid: int
    incarnation: int  # of its latest child
    first_worker: int  # the lowest number of its workers
    workers: int
    mock_key_hex: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class OfferListener:
    """A listening socket; ``is_metrics``: of prometheus_port."""

    DESCRIPTORS: ClassVar[int] = 1
    is_metrics: bool


@dataclass(frozen=True, slots=True)
class OfferLock:
    """The lock of a Unix listener, or of the pid file: whoever holds it may remove the file at the end."""

    DESCRIPTORS: ClassVar[int] = 1
    path: str  # of the socket, or of the pid file


@dataclass(frozen=True, slots=True)
class OfferEnd:
    """That is all for the start."""

    DESCRIPTORS: ClassVar[int] = 0


@dataclass(frozen=True, slots=True)
class OldWorker:
    """A worker that goes on under the new master: our end of its control channel, and its counters."""

    DESCRIPTORS: ClassVar[int] = 2
    number: int
    incarnation: int
    pid: int


@dataclass(frozen=True, slots=True)
class Estate:
    """Behind the workers and the vault: what dead workers have counted. The old broker is gone."""

    DESCRIPTORS: ClassVar[int] = 1


@dataclass(frozen=True, slots=True)
class OldWorkerEnded:
    """It was reaped."""

    DESCRIPTORS: ClassVar[int] = 0
    number: int
    incarnation: int
    how: str


@dataclass(frozen=True, slots=True)
class Gone:
    """All that was offered is the new master's alone, but for the old workers' burial."""

    DESCRIPTORS: ClassVar[int] = 0


# --- new master to old -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Failed:
    """It ends, for this reason."""

    DESCRIPTORS: ClassVar[int] = 0
    text: str


@dataclass(frozen=True, slots=True)
class Take:
    """Its workers could serve. They are named so that old workers can be told to forget them."""

    DESCRIPTORS: ClassVar[int] = 0
    workers: tuple[int, ...]  # number, incarnation, number, …


@dataclass(frozen=True, slots=True)
class Serving:
    """It serves. Of the files of locks it goes on with ``kept``."""

    DESCRIPTORS: ClassVar[int] = 0
    pid: int
    kept: tuple[str, ...]


CODEC: Final = Codec(
    (
        Offer,
        OfferListener,
        OfferLock,
        OfferEnd,
        OldWorker,
        HeldServer,
        Estate,
        OldWorkerEnded,
        Gone,
        Failed,
        Take,
        Serving,
    )
)
