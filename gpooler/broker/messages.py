"""What a worker and the broker say to each other: one dataclass a message, one datagram each.

The channel's first message is the worker's ``Hello``; then its report (``ReportRoute``,
``RouteParameters``, ``ReportSlot``, ``ReportServer``, closed by ``ReportEnd``), also when there is nothing to
report; then anything.
A slot is named by (route_id, slot, generation); what names an old generation is a no-op. A generation
ends when the slot changes hands or becomes free.

The life of a lease, seen from the worker:

- ``GrantOpen`` → connect → ``Connected`` (with a duplicate of the socket, before the login begins) → login
  → ``Opened``; or ``OpenFailed`` at any point; or ``Declined`` by a worker that ends. A grant is used
  also when nobody waits any more: the server is parked.
- ``GrantServer`` → adopt the server that comes along; nothing is answered. A server that cannot be adopted
  is closed: ``Closing``, ``Closed``.
- A route of replication connections has nothing but servers that were opened for one client each. They are
  never recalled, evicted or passed on; a grant for a client that is gone is ``Declined``.
- A server that PostgreSQL ended: ``Closed``. One that we end: leave epoll, Terminate, shut the sending half
  down, ``Closing``; at EOF ``Closed``.
- ``Recall`` → exactly one ``RecallAnswer(now, later)``: the worker owes now + later ≤ count more servers,
  never more than it has. Each leaves by ``Returned`` (the worker has let go of it and closes its descriptor
  without a shutdown) or, if it is a TLS server or the recall an eviction, by ``Closing``. Whatever leaves a
  worker counts for what it owes, also when it leaves for another reason: a ``Returned`` for plain recalls, a
  ``Closing`` or a ``Closed`` without one for evictions first. A new broker is owed nothing.

All times are microseconds of the monotonic clock. The channel is DESIGN §2, the leases are §3.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import ClassVar, Final, NamedTuple

from gpooler.broker.codec import Codec, Message

PROTOCOL_VERSION: Final = 1


class WorkerId(NamedTuple):
    """A worker process: its number (a successor has the same) and its incarnation (unique)."""

    worker: int
    incarnation: int


class SlotPhase(IntEnum):
    """What a worker does with a slot that it reports."""

    OPENING = 1  # connecting or logging in
    OPEN = 2
    CLOSING = 3  # told to go, EOF not seen yet


@dataclass(frozen=True, slots=True)
class ServerState:
    """All that a worker must know of a server that it takes over, and the broker to bury it."""

    server_id: str  # unique id, as in the log
    pid: int  # of the PostgreSQL process
    secret_hex: str = field(repr=False)  # cancel key, hexadecimal; 4 to 256 bytes (protocol 3.2)
    endpoint: str  # "address:port" with a numeric address (v6 in brackets), or "/path/of/socket"
    parameters: dict[str, str]  # as they are now
    initial_parameters: dict[str, str]  # as they were after the login: what a reset leads back to
    opened_at_us: int
    expires_at_us: int  # server_lifetime with its spread; 0: never
    uses: int  # clients it was attached to
    epoch: int = 0  # of its route when it was opened

    @property
    def is_unix(self) -> bool:
        """Whether the connection is a Unix socket."""
        return self.endpoint.startswith("/")


# --- worker to broker: report -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of a channel."""

    DESCRIPTORS: ClassVar[int] = 0
    version: int
    pid: int
    worker: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class ReportRoute:
    """A route that the worker knows, with the id it was given by an earlier broker."""

    DESCRIPTORS: ClassVar[int] = 0
    route_id: int
    rule: str
    database: str
    user: str
    is_replication: bool


@dataclass(frozen=True, slots=True)
class ReportSlot:
    """A slot without a socket yet (phase OPENING, not connected)."""

    DESCRIPTORS: ClassVar[int] = 0
    route_id: int
    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class ReportServer:
    """A slot with a socket, whose duplicate comes along. ``state`` is None while it is logged in."""

    DESCRIPTORS: ClassVar[int] = 1
    route_id: int
    slot: int
    generation: int
    phase: SlotPhase
    state: ServerState | None


@dataclass(frozen=True, slots=True)
class ReportEnd:
    """The report is complete."""

    DESCRIPTORS: ClassVar[int] = 0


# --- worker to broker: routes and wishes --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenRoute:
    """Ask for the id of a route. Answered by ``RouteOpened`` or ``RouteRefused`` with the same token."""

    DESCRIPTORS: ClassVar[int] = 0
    token: int  # > 0
    rule: str
    database: str
    user: str
    is_replication: bool


@dataclass(frozen=True, slots=True)
class Want:
    """So many clients of the route wait here and nothing is parked; 0 withdraws. Replaces the last."""

    DESCRIPTORS: ClassVar[int] = 0
    route_id: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Draining:
    """The worker takes no new clients: it is filled with nothing it did not ask for."""

    DESCRIPTORS: ClassVar[int] = 0


# --- worker to broker: slots ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connected:
    """The socket stands, the login begins. A duplicate of the socket comes along."""

    DESCRIPTORS: ClassVar[int] = 1
    route_id: int
    slot: int
    generation: int
    endpoint: str  # as in ServerState


@dataclass(frozen=True, slots=True)
class Opened:
    """The server is logged in."""

    DESCRIPTORS: ClassVar[int] = 0
    route_id: int
    slot: int
    generation: int
    state: ServerState


@dataclass(frozen=True, slots=True)
class OpenFailed:
    """No server came of it; no PostgreSQL process is left of the attempt."""

    DESCRIPTORS: ClassVar[int] = 0
    route_id: int
    slot: int
    generation: int
    retry_after_ms: int  # no worker is told to open one of this route before; 0: at once


@dataclass(frozen=True, slots=True)
class Declined:
    """The right to open is given back unused."""

    DESCRIPTORS: ClassVar[int] = 0
    route_id: int
    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class Returned:
    """A living server is given up. The worker does not touch its socket any more."""

    DESCRIPTORS: ClassVar[int] = 0
    route_id: int
    slot: int
    generation: int
    state: ServerState


@dataclass(frozen=True, slots=True)
class RecallAnswer:
    """What becomes of a recall: so many at once, so many when clients let them go."""

    DESCRIPTORS: ClassVar[int] = 0
    route_id: int
    recall_id: int
    now: int
    later: int


@dataclass(frozen=True, slots=True)
class Closing:
    """A server was told to go."""

    DESCRIPTORS: ClassVar[int] = 0
    route_id: int
    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class Closed:
    """EOF was seen: the PostgreSQL process is gone."""

    DESCRIPTORS: ClassVar[int] = 0
    route_id: int
    slot: int
    generation: int


# --- both ways --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RouteParameters:
    """The ParameterStatus set that a login of this route gives, from the first server or a change of it."""

    DESCRIPTORS: ClassVar[int] = 0
    route_id: int
    parameters: dict[str, str]


@dataclass(frozen=True, slots=True)
class Ask:
    """Rows for the console are wanted (``console/facts.py``); of the broker, or of another worker."""

    DESCRIPTORS: ClassVar[int] = 0
    token: int
    what: str


@dataclass(frozen=True, slots=True)
class Rows:
    """A part of the answer to an ``Ask``."""

    DESCRIPTORS: ClassVar[int] = 0
    token: int
    is_last: bool
    rows: tuple[tuple[str | int | None, ...], ...]


# --- broker to worker -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Welcome:
    """The broker took the ``Hello``."""

    DESCRIPTORS: ClassVar[int] = 0
    version: int
    pid: int


@dataclass(frozen=True, slots=True)
class RouteOpened:
    """The id of a route; with token 0 unasked, before the first grant to a worker that does not know it."""

    DESCRIPTORS: ClassVar[int] = 0
    token: int
    route_id: int
    rule: str
    database: str
    user: str
    is_replication: bool
    parameters: dict[str, str] | None


@dataclass(frozen=True, slots=True)
class RouteRefused:
    """No id for this route: its rule is not in the broker's configuration, or the ids are used up."""

    DESCRIPTORS: ClassVar[int] = 0
    token: int
    cause: str  # for the log


@dataclass(frozen=True, slots=True)
class GrantOpen:
    """The right to open one server."""

    DESCRIPTORS: ClassVar[int] = 0
    route_id: int
    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class GrantServer:
    """A living server; its descriptor comes along."""

    DESCRIPTORS: ClassVar[int] = 1
    route_id: int
    slot: int
    generation: int
    state: ServerState


@dataclass(frozen=True, slots=True)
class Recall:
    """Give up ``count`` servers, each before the worker's own queue is served with it."""

    DESCRIPTORS: ClassVar[int] = 0
    route_id: int
    recall_id: int
    count: int
    is_eviction: bool  # close them instead: the place is for another route


@dataclass(frozen=True, slots=True)
class Keep:
    """``pool_ttl`` leaves the worker this many servers of the route: its part of min_pool_size."""

    DESCRIPTORS: ClassVar[int] = 0
    route_id: int
    count: int


WorkerMessage = (
    Hello
    | ReportRoute
    | ReportSlot
    | ReportServer
    | ReportEnd
    | OpenRoute
    | Want
    | Draining
    | Connected
    | Opened
    | OpenFailed
    | Declined
    | Returned
    | RecallAnswer
    | Closing
    | Closed
    | RouteParameters
)
BrokerMessage = (
    Welcome | RouteOpened | RouteRefused | GrantOpen | GrantServer | Recall | Keep | RouteParameters
)

_TO_BROKER: Final = (
    Hello,
    ReportRoute,
    ReportSlot,
    ReportServer,
    ReportEnd,
    OpenRoute,
    Want,
    Draining,
    Connected,
    Opened,
    OpenFailed,
    Declined,
    Returned,
    RecallAnswer,
    Closing,
    Closed,
    RouteParameters,
)
_TO_WORKER: Final = (
    Welcome,
    RouteOpened,
    RouteRefused,
    GrantOpen,
    GrantServer,
    Recall,
    Keep,
    RouteParameters,
)

CODEC: Final = Codec(dict.fromkeys((*_TO_BROKER, *_TO_WORKER, Ask, Rows)))


def encode(message: Message) -> bytes:
    """The datagram of a message of this channel. Raises ChannelProtocolError."""
    return CODEC.encode(message)


def decode(datagram: bytes) -> Message:
    """The message in a datagram of this channel, of either direction. Raises ChannelProtocolError."""
    return CODEC.decode(datagram)
