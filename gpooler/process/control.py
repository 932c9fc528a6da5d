"""What the master and its children say to each other over a control channel.

One dataclass a message, one datagram each, descriptors along with it (``DESCRIPTORS``). The master
speaks at any time, a child obeys in order. EOF means that the other side is dead.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Final

from gpooler.broker.codec import Codec, Message

# --- master to worker ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AttachBroker:
    """The worker's end of a fresh channel to the broker; replaces the last one."""

    DESCRIPTORS: ClassVar[int] = 1
    incarnation: int  # of the broker


@dataclass(frozen=True, slots=True)
class AttachPeer:
    """An end of a fresh channel to another worker, and that worker's counters (a memfd)."""

    DESCRIPTORS: ClassVar[int] = 2
    worker: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class DetachPeer:
    """Another worker is dead and reaped."""

    DESCRIPTORS: ClassVar[int] = 0
    worker: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no new clients, let the running work finish, then end with EXIT_OK."""

    DESCRIPTORS: ClassVar[int] = 0
    is_patient: bool  # drop nobody: wait until clients leave
    lets_in: bool  # those who are logging in: another generation accepts, so they lose nothing by it


# --- master to broker ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AttachWorker:
    """The broker's end of a fresh channel to a worker, and that worker's counters (a memfd)."""

    DESCRIPTORS: ClassVar[int] = 2
    worker: int
    incarnation: int
    has_history: bool  # it was attached to an earlier broker: it may hold leases


@dataclass(frozen=True, slots=True)
class DetachWorker:
    """A worker is dead and reaped."""

    DESCRIPTORS: ClassVar[int] = 0
    worker: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Serve:
    """Every worker that lives has been attached: once those with a history have reported, grant."""

    DESCRIPTORS: ClassVar[int] = 0
    is_settled: bool  # no server ends that nobody will report: ``Ledger.serve``


@dataclass(frozen=True, slots=True)
class AwaitGone:
    """Answer ``AllGone`` when no server of a database is left, nor one being opened (PAUSE)."""

    DESCRIPTORS: ClassVar[int] = 0
    token: int
    name: str  # of the database, empty for all


# --- master to both -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReopenLog:
    """The log file was moved away: open it anew."""

    DESCRIPTORS: ClassVar[int] = 0


@dataclass(frozen=True, slots=True)
class Prepare:
    """Make ready for another configuration (a memfd, ``process/reload.py``), and say so: ``Prepared``."""

    DESCRIPTORS: ClassVar[int] = 1
    serial: int


@dataclass(frozen=True, slots=True)
class Commit:
    """That configuration is in force: answer ``Committed``. Of an earlier ``Prepare`` nothing is left."""

    DESCRIPTORS: ClassVar[int] = 1
    serial: int


@dataclass(frozen=True, slots=True)
class Listen:
    """A listening socket of a configuration whose ``Commit`` follows."""

    DESCRIPTORS: ClassVar[int] = 1
    number: int
    host: str  # as of ``net.listen.Listener``
    port: int
    is_unix: bool


@dataclass(frozen=True, slots=True)
class Kill:
    """End all clients and servers of a database at once, or one client by its id: answer ``Killed``."""

    DESCRIPTORS: ClassVar[int] = 0
    serial: int
    name: str  # of a database, empty for all; with ``is_client`` the id of a client
    is_client: bool


@dataclass(frozen=True, slots=True)
class Acted:
    """What became of an ``Act``."""

    DESCRIPTORS: ClassVar[int] = 0
    token: int
    is_good: bool
    text: str  # why not; of RELOAD: what changed


# --- between master and broker ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HeldServer:
    """A server's socket and what is needed to end it: kept by the master for the broker's successor.

    From the broker when it gets the socket, again when the server is logged in. To a new broker before
    ``Serve``: what an earlier one had.
    """

    DESCRIPTORS: ClassVar[int] = 1
    route_id: int
    slot: int
    rule: str
    database: str
    user: str
    is_replication: bool
    endpoint: str
    pid: int  # 0: in login
    secret_hex: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class LetServer:
    """From the broker: the PostgreSQL process of that slot is gone, the socket is of no use any more."""

    DESCRIPTORS: ClassVar[int] = 0
    route_id: int
    slot: int


@dataclass(frozen=True, slots=True)
class AllGone:
    """From the broker, for an ``AwaitGone``."""

    DESCRIPTORS: ClassVar[int] = 0
    token: int


# --- child to master ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """The child serves."""

    DESCRIPTORS: ClassVar[int] = 0
    pid: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """Whether a configuration can be used here; ``fault`` says why not, and is empty otherwise."""

    DESCRIPTORS: ClassVar[int] = 0
    serial: int
    fault: str


@dataclass(frozen=True, slots=True)
class Committed:
    """A configuration is in force here."""

    DESCRIPTORS: ClassVar[int] = 0
    serial: int


@dataclass(frozen=True, slots=True)
class Killed:
    """So many were ended for a ``Kill``."""

    DESCRIPTORS: ClassVar[int] = 0
    serial: int
    count: int


@dataclass(frozen=True, slots=True)
class Act:
    """A command of a console that changes something (``process/operations.py``). Answered by ``Acted``."""

    DESCRIPTORS: ClassVar[int] = 0
    token: int
    verb: str
    argument: str  # a database, a client's id, what SHUTDOWN waits for, or empty


@dataclass(frozen=True, slots=True)
class Complaint:
    """The broker asks for the end of a worker that broke the protocol between processes."""

    DESCRIPTORS: ClassVar[int] = 0
    worker: int
    incarnation: int
    text: str


CODEC: Final = Codec(
    (
        AttachBroker,
        AttachPeer,
        DetachPeer,
        Drain,
        AttachWorker,
        DetachWorker,
        Serve,
        AwaitGone,
        AllGone,
        HeldServer,
        LetServer,
        ReopenLog,
        Prepare,
        Commit,
        Prepared,
        Committed,
        Listen,
        Kill,
        Killed,
        Act,
        Acted,
        Ready,
        Complaint,
    )
)


def encode(message: Message) -> bytes:
    """The datagram of a control message. Raises ChannelProtocolError."""
    return CODEC.encode(message)


def decode(datagram: bytes) -> Message:
    """The control message in a datagram. Raises ChannelProtocolError."""
    return CODEC.decode(datagram)
