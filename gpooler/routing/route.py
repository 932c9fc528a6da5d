"""A rule resolved for one (database, user) on the server: the key of a pool. A value, no I/O."""

from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Final

from gpooler.auth.scram import ScramKeys
from gpooler.auth.secrets import Secret
from gpooler.config.model import Config, Endpoint, Pool, Rule
from gpooler.errors import GpoolerError


class Mode(IntEnum):
    """How long a client keeps a server; the relay's numbers (``relay/engine.pxd: PoolMode``)."""

    SESSION = 0
    TRANSACTION = 1
    STATEMENT = 2


# What `pool_smart_discard` runs: DISCARD ALL without DEALLOCATE ALL and DISCARD PLANS, as PostgreSQL's
# documentation of DISCARD takes it apart and in the order of its code. As one query it is one
# transaction: all or nothing. The function's schema is named: a role's default search_path may lead to
# another of its name.
SMART_DISCARD: Final = (
    "CLOSE ALL;"
    "SET SESSION AUTHORIZATION DEFAULT;"
    "RESET ALL;"
    "UNLISTEN *;"
    "SELECT pg_catalog.pg_advisory_unlock_all();"
    "DISCARD TEMP;"
    "DISCARD SEQUENCES"
)
DISCARD_ALL: Final = "DISCARD ALL"

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
    is_replication: bool = False

    @property
    def pool(self) -> "RouteKey":
        """The key of the route whose limits count this one's clients and servers, too."""
        return replace(self, is_replication=False)


@dataclass(slots=True, eq=False)
class Route:
    """What a worker knows of a route. Mutable: parameters and errors come from servers."""

    route_id: int
    key: RouteKey
    rule: Rule
    database: str  # on the server, like ``user``: those of the key until a reload names others
    user: str
    endpoint: Endpoint
    socket_options: tuple[tuple[int, int, int | bytes], ...]
    # id of the route that counts its clients against ``client_max``: its own, but for replication
    admission_id: int
    # reported by the first server's login (name → value); None: no server was reached yet
    parameters: dict[str, str] | None = None
    # counted up whenever ``parameters`` change: what was derived from them is stale
    version: int = 0
    # why the last server could not be opened; None after a success
    failure: GpoolerError | None = None
    # what its user proved itself with here last: it opens servers where the rule has no password for them
    secret: Secret | None = None
    keys: ScramKeys | None = None
    # what a client sent in clear text last, with ``password_passthrough``: it goes before all of these
    password: Secret | None = None
    opening: set[tuple[int, int]] = field(default_factory=set)  # (slot, generation)
    epoch: int = 0  # servers of a lower one are obsolete
    named_by: Rule = field(init=False)  # the rule as it was when the key was made

    def __post_init__(self) -> None:
        """A route begins as its rule says."""
        self.epoch = self.rule.epoch
        self.named_by = self.rule

    def names_under(self, rule: Rule) -> tuple[str, str] | None:
        """Database and user on the server as its rule is now; None when clients would differ in them."""
        before, key = self.named_by, self.key
        database = rule.storage_db or (None if rule.is_default_database else rule.database)
        if database is None and before.storage_db is None:
            database = key.database
        user = rule.storage_user or (None if rule.is_default_user else rule.user)
        if rule.ldap_storage_credentials:
            users = {each.ldap_storage_username for each in rule.ldap_storage_credentials.values()}
            user = key.user if key.user in users else None
        elif user is None and before.storage_user is None and not before.ldap_storage_credentials:
            user = key.user
        return None if database is None or user is None else (database, user)

    def learn(self, secret: Secret | None, keys: ScramKeys | None) -> None:
        """A client of the user that servers know came in with these; None is no news."""
        self.secret = secret or self.secret
        self.keys = keys or self.keys

    def learn_password(self, password: bytes) -> None:
        """A client came in with this one, in clear text (``password_passthrough``)."""
        if self.password is None or self.password.plain != password:  # else keep what was derived from it
            self.password = Secret.of_password(password)

    @property
    def name(self) -> tuple[str, str]:
        """Database and user as metrics and the console have them: the rule's, for default the server's."""
        rule = self.rule
        return (
            self.database if rule.is_default_database else rule.database,
            self.user if rule.is_default_user else rule.user,
        )

    @property
    def is_replication(self) -> bool:
        """Whether each server is opened for one replication client, and ends with it."""
        return self.key.is_replication

    @property
    def mode(self) -> Mode:
        """The pool's mode; a replication connection has its server for the session whatever the pool."""
        return Mode.SESSION if self.is_replication else MODES[self.rule.pool]

    @property
    def discard_query(self) -> str:
        """What brings a server's session back."""
        return self.rule.pool_discard_query or (
            SMART_DISCARD if self.rule.pool_smart_discard else DISCARD_ALL
        )

    @property
    def is_discarded(self) -> bool | None:
        """When a server's session is brought back: None when it is dirty, True always, False never."""
        is_other = self.rule.pool_smart_discard or self.rule.pool_discard_query is not None
        if self.rule.pool_discard is False and is_other:
            return None  # as in Odyssey: no DISCARD ALL, but the other
        return self.rule.pool_discard

    @property
    def idle_timeout_s(self) -> int:
        """How long a client may be idle outside a transaction; 0 is for ever."""
        limits = [limit for limit in (self.rule.client_idle_timeout, self._pools_idle_timeout_s) if limit]
        return min(limits, default=0)

    @property
    def is_idle_limit_the_pools(self) -> bool:
        """Whether that limit is ``pool_client_idle_timeout``."""
        return 0 < self._pools_idle_timeout_s == self.idle_timeout_s

    @property
    def _pools_idle_timeout_s(self) -> int:
        return self.rule.pool_client_idle_timeout if self.rule.pool is Pool.SESSION else 0


def key_of(rule: Rule, database: str, user: str, is_replication: bool) -> RouteKey:
    """The key of a client's route; ``database`` and ``user`` as the client named them."""
    return RouteKey(rule.name, rule.storage_db or database, rule.storage_user or user, is_replication)


def endpoint_of(config: Config, rule: Rule) -> Endpoint:
    """The one host of the rule's storage."""
    return config.storage[rule.storage].endpoints[0]
