"""Host-based rules, those of a ``pg_hba.conf``: which line takes a client, and what it says.

Follows "The pg_hba.conf File" of PostgreSQL's documentation, less what needs the server's catalogs. As in
Odyssey ``allow`` lets the configuration's rule decide how a client proves who it is, and so does ``trust``: a
file that served Odyssey must not open doors here.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# Kinds of a client's connection.
LOCAL: Final = "local"
HOSTSSL: Final = "hostssl"
HOSTNOSSL: Final = "hostnossl"
# What each kind of line takes; hostgssenc takes nobody, since nobody comes with GSSAPI encryption.
TAKES: Final[Mapping[str, frozenset[str]]] = {
    LOCAL: frozenset({LOCAL}),
    "host": frozenset({HOSTSSL, HOSTNOSSL}),
    HOSTSSL: frozenset({HOSTSSL}),
    HOSTNOSSL: frozenset({HOSTNOSSL}),
    "hostgssenc": frozenset(),
    "hostnogssenc": frozenset({HOSTSSL, HOSTNOSSL}),
}
ALL: Final = "all"
SAMEHOST: Final = "samehost"
SAMENET: Final = "samenet"
NO_HOSTS: Final[Mapping[str, Collection[Address]]] = {}


@dataclass(frozen=True, slots=True)
class Method:
    """What the last column of a line means."""

    # the value of the option ``authentication`` that it stands for; None: the rule's own
    authentication: str | None = None
    is_refusal: bool = False
    option: str = ""  # of the rule, without which nobody comes in so
    lines: Collection[str] = tuple(TAKES)  # kinds of line that may name it


METHODS: Final[Mapping[str, Method]] = {
    "allow": Method(),
    "trust": Method(),
    "deny": Method(is_refusal=True),
    "reject": Method(is_refusal=True),
    "password": Method("clear_text"),
    "md5": Method("md5"),
    "scram-sha-256": Method("scram-sha-256"),
    "peer": Method("peer", lines=(LOCAL,)),
    "cert": Method("cert", lines=(HOSTSSL,)),
    "ldap": Method("clear_text", option="ldap_endpoint_name"),
    "pam": Method("clear_text", option="auth_pam_service"),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One line that takes clients."""

    file: str
    line: int
    kind: str
    databases: tuple["Token", ...]
    users: tuple["Token", ...]
    networks: tuple[Network, ...]  # nothing for a host name, ``local``, ``all``, ``samehost`` and ``samenet``
    where: str  # which of those four it is, or empty
    host: str  # a host name, or empty
    method: Method
    method_name: str

    @property
    def place(self) -> str:
        """Where it stands, for the log."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Token:
    """One name of a list; a quoted one has no special meaning."""

    text: str
    is_quoted: bool = False

    def is_word(self, word: str) -> bool:
        """Whether it is a keyword."""
        return not self.is_quoted and self.text == word


@dataclass(frozen=True, slots=True)
class Interfaces:
    """The addresses of this machine, for ``samehost`` and ``samenet``."""

    networks: tuple[IPv4Network | IPv6Network, ...] = ()
    addresses: frozenset[Address] = frozenset()


@dataclass(frozen=True, slots=True)
class Hba:
    """The lines of all files in their order. The first that takes a client decides."""

    entries: tuple[Entry, ...]
    interfaces: Interfaces = field(default_factory=Interfaces)

    @property
    def has_addresses(self) -> bool:
        """Whether a client's address may decide."""
        return any(entry.where not in (LOCAL, ALL) for entry in self.entries)

    @property
    def host_names(self) -> frozenset[str]:
        """The names whose addresses ``match`` wants to know."""
        return frozenset(entry.host for entry in self.entries if entry.host)

    @property
    def wants_interfaces(self) -> bool:
        """Whether ``interfaces`` matter."""
        return any(entry.where in (SAMEHOST, SAMENET) for entry in self.entries)

    def match(
        self,
        kind: str,
        database: str,
        user: str,
        address: Address | None,
        *,
        is_physical: bool = False,
        hosts: Mapping[str, Collection[Address]] = NO_HOSTS,
    ) -> Entry | None:
        """The line of a client; None when none takes it, which refuses it.

        ``kind`` is one of LOCAL, HOSTSSL, HOSTNOSSL; ``is_physical``: it asks for physical replication,
        which has no database and which ``all`` does not take; ``hosts``: addresses by name.
        """
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        for entry in self.entries:
            if (
                kind in TAKES[entry.kind]
                and self._takes_address(entry, address, hosts)
                and _takes_database(entry.databases, database, user, is_physical)
                and _takes_user(entry.users, user)
            ):
                return entry
        return None

    def _takes_address(
        self, entry: Entry, address: Address | None, hosts: Mapping[str, Collection[Address]]
    ) -> bool:
        if entry.where in (LOCAL, ALL):
            return True
        if address is None:
            return False
        if entry.host:
            return address in hosts.get(entry.host, ())
        if entry.where == SAMEHOST:
            return address in self.interfaces.addresses
        networks = self.interfaces.networks if entry.where == SAMENET else entry.networks
        return any(address.version == network.version and address in network for network in networks)


def _takes_database(tokens: Sequence[Token], database: str, user: str, is_physical: bool) -> bool:
    """``check_db`` of PostgreSQL."""
    for token in tokens:
        if is_physical or token.is_word("replication"):
            if is_physical and token.is_word("replication"):
                return True
        elif token.is_word(ALL) or (token.is_word("sameuser") and database == user) or token.text == database:
            return True
    return False


def _takes_user(tokens: Sequence[Token], user: str) -> bool:
    return any(token.is_word(ALL) or token.text == user for token in tokens)
