"""Finds the rule of a client: reference §7, by specificity or in the order of the file. Pure."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from gpooler.config.model import DEFAULT, Config, Rule
from gpooler.config.words import ConnectionType, PoolRouting

Address = IPv4Address | IPv6Address

DATABASE_SCORE: Final = 1000
USER_SCORE: Final = 100
ADDRESS_SCORE: Final = 10
CONNECTION_TYPE_SCORE: Final = 1

# The kinds of connection that each kind of rule takes. A client is hostssl, hostnossl or local.
TCP: Final = frozenset({ConnectionType.HOST, ConnectionType.HOSTSSL, ConnectionType.HOSTNOSSL})
TAKES: Final[Mapping[ConnectionType, frozenset[ConnectionType]]] = {
    ConnectionType.DEFAULT: TCP | {ConnectionType.LOCAL},
    ConnectionType.HOST: TCP,
    ConnectionType.HOSTSSL: frozenset({ConnectionType.HOSTSSL}),
    ConnectionType.HOSTNOSSL: frozenset({ConnectionType.HOSTNOSSL}),
    ConnectionType.LOCAL: frozenset({ConnectionType.LOCAL}),
}


Members = Mapping[str, Collection[str]]  # of groups, by the name of the rule
NO_MEMBERS: Final[Members] = {}
Hosts = Mapping[str, Collection[Address]]  # addresses by host name
NO_HOSTS: Final[Hosts] = {}
GROUPS: Final = "\0"  # in place of a user's name, which never is that


@dataclass(frozen=True, slots=True)
class _Candidate:
    rank: int  # place in the order of the file
    rule: Rule
    takes_all: bool  # neither address nor connection type matter, nor who is in a group

    def takes(
        self,
        user: str,
        address: Address | None,
        connection_type: ConnectionType,
        members: Members,
        hosts: Hosts,
    ) -> bool:
        if self.takes_all:
            return True
        if self.rule.group is not None and user not in members.get(self.rule.name, ()):
            return False
        if connection_type not in TAKES[self.rule.connection_type]:
            return False
        where = self.rule.address
        if where is None:
            return True
        # A client with an IPv4 address may come over an IPv6 listener.
        plain = (isinstance(address, IPv6Address) and address.ipv4_mapped) or address
        if isinstance(where, str):
            return plain in hosts.get(where, ())
        if where.version == 4:
            address = plain
        return address is not None and address.version == where.version and address in where


class Rules:
    """The rules of a configuration, indexed by database and user. Immutable."""

    __slots__ = ("_by_pair", "_is_sequential", "has_addresses")

    def __init__(self, config: Config) -> None:
        self._is_sequential = config.routing.sequential_routing
        self._by_pair = _index(config.rules, self._is_sequential)
        self.has_addresses = any(rule.address is not None for rule in config.rules)

    def match(
        self,
        database: str,
        user: str,
        address: Address | None,
        connection_type: ConnectionType,
        members: Members = NO_MEMBERS,
        hosts: Hosts = NO_HOSTS,
    ) -> Rule | None:
        """The rule of a client; ``address`` is None for a Unix socket. None when no rule takes it."""
        return _match(
            self._by_pair, database, user, address, connection_type, members, hosts, self._is_sequential
        )


def is_of_database(rule: Rule, database: str, name: str) -> bool:
    """Whether a route counts as one of the database ``name`` of the console: by its rule's, which may be any;
    ``database`` is the one on the server.
    """
    return rule.database == name or (rule.is_default_database and database == name)


def rule_for_queries(rules: Iterable[Rule], database: str, user: str) -> Rule | None:
    """The most specific rule for gpooler's own queries, internal ones included; None when there is none.

    The names are not a client's: a rule that looks at where a client comes from does not take them.
    """
    found = [
        rule
        for rule in rules
        if rule.database in (database, DEFAULT)
        and rule.user in (user, DEFAULT)
        and rule.group is None
        and rule.address is None
        and rule.connection_type is ConnectionType.DEFAULT
    ]
    return max(found, key=score, default=None)


def score(rule: Rule) -> int:
    """How specific a rule is: what it names counts, what is ``default`` does not."""
    return (
        DATABASE_SCORE * (not rule.is_default_database)
        + USER_SCORE * (not rule.is_default_user or rule.group is not None)
        + ADDRESS_SCORE * (rule.address is not None)
        + CONNECTION_TYPE_SCORE * (rule.connection_type is not ConnectionType.DEFAULT)
    )


_Index = Mapping[tuple[str, str], tuple[_Candidate, ...]]


def _index(rules: Iterable[Rule], is_sequential: bool) -> _Index:
    """Candidates by (database, user), the one to ask first at the front."""
    by_pair: dict[tuple[str, str], list[_Candidate]] = {}
    for rank, rule in enumerate(rules):
        if rule.pool_routing is not PoolRouting.INTERNAL:
            is_anywhere = rule.address is None and rule.connection_type is ConnectionType.DEFAULT
            takes_all = is_anywhere and rule.group is None
            user = rule.user if rule.group is None else GROUPS
            by_pair.setdefault((rule.database, user), []).append(_Candidate(rank, rule, takes_all))
    if not is_sequential:
        for candidates in by_pair.values():
            candidates.sort(key=lambda candidate: -score(candidate.rule))
    return {pair: tuple(candidates) for pair, candidates in by_pair.items()}


def _match(
    index: _Index,
    database: str,
    user: str,
    address: Address | None,
    connection_type: ConnectionType,
    members: Members,
    hosts: Hosts,
    is_sequential: bool,
) -> Rule | None:
    best: _Candidate | None = None
    # From the most specific to the least, a user before its groups: address and connection type cannot
    # outweigh a name.
    for pair in (
        (database, user), (database, GROUPS), (database, DEFAULT),
        (DEFAULT, user), (DEFAULT, GROUPS), (DEFAULT, DEFAULT),
    ):  # fmt: skip
        for candidate in index.get(pair, ()):
            if candidate.takes(user, address, connection_type, members, hosts):
                if not is_sequential:
                    return candidate.rule
                if best is None or candidate.rank < best.rank:
                    best = candidate
                break
    return None if best is None else best.rule
