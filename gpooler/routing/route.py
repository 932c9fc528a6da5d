"""A rule resolved for one (database, user) on the server: the key of a pool. A value, no I/O."""

from dataclasses import dataclass, field
from enum import IntEnum

from gpooler.config.model import Config, Endpoint, Pool, Rule
from gpooler.errors import GpoolerError


class Mode(IntEnum):
    """How long a client keeps a server; the relay's numbers (``relay/engine.pxd: PoolMode``)."""

    SESSION = 0
    TRANSACTION = 1
    STATEMENT = 2


MODES = {
    Pool.SESSION: Mode.SESSION,
    Pool.TRANSACTION: Mode.TRANSACTION,
    Pool.STATEMENT: Mode.STATEMENT,
}


@dataclass(frozen=True, slots=True)
class RouteKey:
    """Identity of a route in every process: rule name, and database and user as the server knows them."""

    rule: str
    database: str
    user: str


@dataclass(slots=True, eq=False)
class Route:
    """What a worker knows of a route. Mutable: parameters and errors come from servers."""

    route_id: int
    rule: Rule
    database: str
    user: str
    endpoint: Endpoint
    socket_options: tuple[tuple[int, int, int | bytes], ...]
    # reported by the first server's login (name → value); None: no server was reached yet
    parameters: dict[str, str] | None = None
    # counted up whenever ``parameters`` change: what was derived from them is stale
    version: int = 0
    # why the last server could not be opened; None after a success
    failure: GpoolerError | None = None
    opening: set[tuple[int, int]] = field(default_factory=set)  # (slot, generation)

    @property
    def mode(self) -> Mode:
        """The pool's mode."""
        return MODES[self.rule.pool]

    @property
    def key(self) -> RouteKey:
        """Its identity."""
        return RouteKey(self.rule.name, self.database, self.user)


def key_of(rule: Rule, database: str, user: str) -> RouteKey:
    """The key of a client's route; ``database`` and ``user`` as the client named them."""
    return RouteKey(rule.name, rule.storage_db or database, rule.storage_user or user)


def endpoint_of(config: Config, rule: Rule) -> Endpoint:
    """The one host of the rule's storage."""
    return config.storage[rule.storage].endpoints[0]
