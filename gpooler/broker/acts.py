"""What the ledger wants done. The service does it; the ledger does not ask how it went, except for Bury.

The service holds one duplicate descriptor for each slot name.
"""

from dataclasses import dataclass, field

from gpooler.broker.messages import BrokerMessage, WorkerId
from gpooler.broker.slots import RouteKey, SlotName


@dataclass(frozen=True, slots=True)
class Send:
    """Send ``message``; with the descriptor of ``slot`` unless that is None."""

    worker: WorkerId
    message: BrokerMessage
    slot: SlotName | None


@dataclass(frozen=True, slots=True)
class Hold:
    """Keep the descriptor that came with the message just handled."""

    slot: SlotName


@dataclass(frozen=True, slots=True)
class Entrust:
    """Give the master a copy of the slot's descriptor, with what a successor must know to end the server."""

    slot: SlotName
    key: RouteKey
    endpoint: str
    pid: int  # 0: in login
    secret_hex: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Inherit:
    """The descriptor that the master kept is the slot's: no worker has that server."""

    slot: SlotName


@dataclass(frozen=True, slots=True)
class Disown:
    """Close the descriptor that the master kept: a worker has reported the slot."""

    slot: SlotName


@dataclass(frozen=True, slots=True)
class Release:
    """Close the descriptor: its server is gone."""

    slot: SlotName


@dataclass(frozen=True, slots=True)
class Bury:
    """Cancel what the server runs, shut it down, wait for EOF, then call ``Ledger.gone``.

    The descriptor stays until the Release that follows.
    """

    slot: SlotName
    generation: int
    rule: str  # its name
    endpoint: str
    pid: int  # 0: idle or in login, there is nothing to cancel
    secret_hex: str = field(repr=False)
    timeout_us: int  # after that it is worth a line in the log; the slot stays taken
    server_id: str = ""  # as in the log; empty when nobody has told it


@dataclass(frozen=True, slots=True)
class Complain:
    """The worker broke the protocol: have it ended."""

    worker: WorkerId
    text: str


Act = Send | Hold | Entrust | Inherit | Disown | Release | Bury | Complain
