"""What tables are made of: what a worker, or the broker, says of itself, and all of it together. Pure values.

Facts cross from process to process as rows of cells, in the order of their fields.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, NamedTuple, TypeVar

from gpooler.config.model import Config, Rule
from gpooler.stats.registry import WORDS_PER_BLOCK, RouteWord

Block = list[int]
Fact = TypeVar("Fact")

# Words of a route that averages are made of: the broker remembers them for a while.
AVERAGED: Final = (
    RouteWord.ASSIGNMENTS,
    RouteWord.TRANSACTIONS,
    RouteWord.QUERIES,
    RouteWord.BYTES_IN,
    RouteWord.BYTES_OUT,
    RouteWord.TRANSACTION_US,
    RouteWord.QUERY_US,
    RouteWord.WAIT_US,
    RouteWord.CLIENT_PARSES,
    RouteWord.SERVER_PARSES,
    RouteWord.BINDS,
    RouteWord.LOGINS,
)


class SocketFact(NamedTuple):
    """A client or a server, of any worker."""

    worker: int
    kind: str  # C client, S server
    number: int  # unique among the clients and servers that are there now; fits an int4
    id: str  # as the log has it
    user: str
    database: str
    replication: str
    state: str
    address: str
    port: int
    local_address: str
    local_port: int
    born_us: int  # times are of the monotonic clock; 0 never
    request_us: int
    since_us: int  # in this state
    is_waiting: int
    closes: int
    link: str  # id of its server or client
    remote_pid: int
    tls: str
    name: str  # application_name
    prepared: int
    left: int
    held: int
    queued: int
    fd: int
    pins: str  # why its server is bound to its client
    transaction: str  # I, T or E; empty: none
    transaction_us: int  # since when; 0: none is open
    query_us: int
    link_pid: int  # of PostgreSQL's process behind it
    storage: str
    uses: int
    expires_us: int
    cancelling: int


@dataclass(frozen=True, slots=True)
class RouteFact:
    """A route, as its broker or a worker knows it."""

    route_id: int
    rule: str
    database: str  # on the server
    user: str
    is_replication: int
    at_us: int  # of the older counters; 0: there are none
    older: tuple[int, ...] = ()  # AVERAGED


@dataclass(frozen=True, slots=True)
class MemoryFact:
    """What one kind of record takes in one worker."""

    name: str
    size: int
    used: int
    free: int


@dataclass(frozen=True, slots=True)
class BanFact:
    """A ban of failed logins; address and user are unknown when the worker that set it is dead."""

    address: str | None
    user: str | None
    failures: int
    until_us: int


@dataclass(frozen=True, slots=True)
class HostFact:
    """A host name that a worker has resolved."""

    name: str
    expires_us: int
    addresses: str


@dataclass(frozen=True, slots=True)
class StatementFact:
    """A prepared statement as servers have it."""

    name: str
    text: str
    references: int


@dataclass(frozen=True, slots=True)
class CopyFact:
    """A prepared statement on one server."""

    user: str
    database: str
    server_id: str
    name: str


@dataclass(frozen=True, slots=True)
class QuantileFact:
    """A part ``q`` of what a pool did lasted no longer than ``us``. Without a name: of all measured ones."""

    database: str | None
    user: str | None
    time: str  # query, transaction
    q: str  # as ``quantile_text`` has it
    us: int


def quantile_text(q: float) -> str:
    """A quantile as it is written in the name of a column."""
    return f"{q:.12g}"


@dataclass(frozen=True, slots=True)
class WorkerFact:
    """A worker process."""

    worker: int
    pid: int
    clients: int
    clients_login: int
    consoles: int
    is_listening: int
    rss_bytes: int
    broker_sent: int
    broker_received: int
    lost_log_lines: int


def to_cells(fact: Any) -> tuple[str | int | None, ...]:
    """A fact as a row; a tuple at its end is laid out flat."""
    if isinstance(fact, tuple):
        return fact
    cells: list[str | int | None] = []
    for field in fields(fact):
        value = getattr(fact, field.name)
        if isinstance(value, tuple):
            cells.extend(value)
        else:
            cells.append(value)
    return tuple(cells)


def of_cells(kind: type[Fact], rows: Iterable[Sequence[str | int | None]]) -> list[Fact]:
    """The facts in rows that ``to_cells`` made."""
    if kind is RouteFact:
        return [kind(*row[:6], tuple(row[6:])) for row in rows]  # type: ignore[call-arg]
    return [kind(*row) for row in rows]


@dataclass(frozen=True, slots=True)
class RouteView:
    """A route with its name, its rule and its counters over all workers."""

    fact: RouteFact
    rule: Rule
    database: str  # as the rule calls it; where it says default, that on the server
    user: str
    block: Block


@dataclass(frozen=True, slots=True)
class View:
    """Everything a table may be made of, at one moment. What was not asked for is empty."""

    config: Config
    version: str
    now_us: int
    wall_s: float
    process: Block
    consoles: int
    routes: tuple[RouteView, ...] = ()
    sockets: tuple[SocketFact, ...] = ()
    memory: tuple[MemoryFact, ...] = ()
    bans: tuple[BanFact, ...] = ()
    hosts: tuple[HostFact, ...] = ()
    statements: tuple[StatementFact, ...] = ()
    copies: tuple[CopyFact, ...] = ()
    workers: tuple[WorkerFact, ...] = ()
    quantiles: tuple[QuantileFact, ...] = ()
    utilization: tuple[float, float] = (0.0, 0.0)  # CPU and memory of the host, in per cent
    has_legacy_columns: bool = False


NOTHING: Final[Block] = [0] * WORDS_PER_BLOCK


def name_of(fact: RouteFact, rule: Rule) -> tuple[str, str]:
    """Database and user of a route as metrics and the console show it (as the broker's ``_name``)."""
    database = fact.database if rule.is_default_database else rule.database
    return database, fact.user if rule.is_default_user else rule.user
