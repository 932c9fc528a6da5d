"""What a startup packet leads to: found once, then the same for all clients that send the same packet.

The connections of an application begin alike. What is found for one of them (its rule, its parameters, its
greeting) is kept for the next, so that a login costs little more than its password.
"""

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from gpooler.auth.secrets import Secret
from gpooler.client.entrance import Guest
from gpooler.client.greeting import (
    APPLICATION_NAME,
    Greeting,
    Key,
    application_name,
    is_plain,
    startup_key,
)
from gpooler.config import values
from gpooler.config.model import Authentication, Config, ConnectionType, Rule
from gpooler.net.interfaces import interfaces
from gpooler.routing.route import Route
from gpooler.routing.rules import NO_HOSTS, NO_MEMBERS, Hosts, Members, Rules
from gpooler.server.servers import READ_ONLY
from gpooler.wire.startup import Replication, Startup

# Invented packets cannot fill the memory: beyond so many all are dropped, and large ones are not kept.
MAX_PLANS: Final = 512
MAX_PACKET: Final = 2048
# What the server alone decides; the relay never deploys these, so a client that asks has to be told here.
FIXED: Final = frozenset(name.decode() for name in READ_ONLY)


class Plan:
    """For one startup packet from one kind of place; ``login`` fills in what the first login shows."""

    __slots__ = (
        "data", "fixed", "greeting", "has_host_in_name", "is_debugged", "key", "method", "name", "names",
        "packet", "parameters", "refusal", "route", "rule", "secret", "storage_user", "variants", "version",
    )  # fmt: skip

    def __init__(self, data: bytes, packet: Startup, rule: Rule | None, secret: Secret | None) -> None:
        """``data`` says ``packet``; ``rule`` None: none takes the client."""
        self.data = data
        self.packet = packet
        self.rule = rule
        self.secret = secret
        # how the client proves who it is: as the rule says, if no host-based rule says otherwise
        self.method = Authentication.BLOCK if rule is None else rule.authentication
        self.refusal = ""  # by a host-based rule: which, for the log
        self.names = -1  # index of database and user, once somebody has logged in
        self.is_debugged = False
        self.parameters: dict[str, str] = {}  # asked for by the client or its rule; to be maintained
        self.fixed = ""  # one of them that cannot be changed
        if rule is not None:
            parameters = {**packet.parameters, **rule.options}
            self.fixed = next((name for name in parameters if name.lower() in FIXED), "")
            if rule.maintain_params or packet.replication:
                self.parameters = parameters
        self.has_host_in_name = rule is not None and rule.maintain_params and rule.application_name_add_host
        self.name = next(
            (value for name, value in self.parameters.items() if name.lower() == APPLICATION_NAME), ""
        )
        self.key: Key = startup_key(self.parameters)
        self.route: Route | None = None
        self.greeting: Greeting | None = None
        self.version = -1  # of the route's parameters when the greeting was made
        self.storage_user = packet.user  # whom the route is for, unless the rule says whom
        self.variants: dict[str, Plan] = {}

    def variant(self, storage_user: str) -> "Plan":
        """The same for clients that are somebody else at the server."""
        found = self.variants.get(storage_user)
        if found is None:
            found = self.variants[storage_user] = Plan(self.data, self.packet, self.rule, self.secret)
            found.method, found.refusal = self.method, self.refusal
            found.is_debugged = self.is_debugged
            found.storage_user = storage_user
        return found

    @property
    def is_plain(self) -> bool:
        """Whether all who come by it log in alike, their passwords aside."""
        rule = self.rule
        return (
            rule is not None
            and self.method in (Authentication.NONE, Authentication.MD5, Authentication.SCRAM_SHA_256)
            and not self.refusal
            and rule.client_max is None
            and not self.has_host_in_name
            and not self.is_debugged
            and not self.packet.negotiation()
            and len(self.data) <= MAX_PACKET
            and (rule.auth_query is None or self.method is Authentication.NONE)
        )

    def application_name(self, guest: Guest) -> str:
        """The application_name that the session begins with."""
        if self.has_host_in_name:
            return application_name(self.name, f"{guest.host}:{guest.port}")
        return application_name(self.name, None) if is_plain(self.name) else ""

    def named_parameters(self, guest: Guest) -> dict[str, str]:
        """The parameters with the application_name as it is to be."""
        name = self.application_name(guest)
        if not name:
            return self.parameters
        return {
            item: name if item.lower() == APPLICATION_NAME else value
            for item, value in {APPLICATION_NAME: name, **self.parameters}.items()
        }


def secret_of(passwords: Sequence[values.Secret]) -> Secret:
    """The option ``password``: any of them lets a client in, the first serves servers."""
    first, *others = (password.get_secret_value() for password in passwords)
    return Secret(first, others)


class Plans:
    """The plans of a configuration."""

    def __init__(self, config: Config, is_debug: bool) -> None:
        """``is_debug``: of all clients, whatever their rules say."""
        self._rules = Rules(config)
        self._hba = config.hba
        if self._hba is not None and self._hba.wants_interfaces:
            self._hba = replace(self._hba, interfaces=interfaces())
        # a client's address may decide
        self.has_addresses = self._rules.has_addresses or bool(self._hba and self._hba.has_addresses)
        self._secrets = {
            rule.name: secret_of(rule.password) for rule in config.rules if rule.password is not None
        }
        self._is_debug = is_debug
        # whoever changes these calls ``forget``
        self.members: Members = NO_MEMBERS  # of groups
        self.hosts: Hosts = NO_HOSTS  # whose names rules have
        self._plans: dict[tuple[bytes, tuple[bytes | bool, bool]], Plan] = {}

    def __len__(self) -> int:
        return len(self._plans)

    def forget(self) -> None:
        """Find everything anew: the members of a group have changed, or the addresses of a host."""
        self._plans.clear()

    def find(self, guest: Guest, data: bytes) -> Plan | None:
        """The plan for a startup packet (without its length word); None when it is new."""
        return self._plans.get((data, self._place(guest)))

    def make(self, guest: Guest, data: bytes, packet: Startup) -> Plan:
        """A plan for ``data``, which says ``packet``."""
        address = ip_address(guest.address) if self.has_addresses and guest.family else None
        kind = ConnectionType.HOSTNOSSL if guest.tls is None else ConnectionType.HOSTSSL
        if guest.family == 0:
            kind = ConnectionType.LOCAL
        rule = self._rules.match(packet.database, packet.user, address, kind, self.members, self.hosts)
        secret = None if rule is None else self._secrets.get(rule.name)
        plan = Plan(data, packet, rule, secret)
        self._apply_hba(plan, kind, address)
        if plan.method is Authentication.PEER and kind is not ConnectionType.LOCAL and not plan.refusal:
            plan.refusal = "peer needs a Unix socket"
        plan.is_debugged = self._is_debug or (rule is not None and rule.log_debug)
        if len(data) <= MAX_PACKET:
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            self._plans[data, self._place(guest)] = plan
        return plan

    def _apply_hba(self, plan: Plan, kind: ConnectionType, address: IPv4Address | IPv6Address | None) -> None:
        if self._hba is None:
            return
        packet = plan.packet
        is_physical = packet.replication is Replication.PHYSICAL
        entry = self._hba.match(
            kind, packet.database, packet.user, address, is_physical=is_physical, hosts=self.hosts
        )
        if entry is None:
            plan.refusal = "no line of hba_file takes it"
        elif entry.method.is_refusal:
            plan.refusal = f"{entry.place} says {entry.method_name}"
        elif (option := entry.method.option) and plan.rule is not None and not getattr(plan.rule, option):
            plan.refusal = f"{entry.place} says {entry.method_name}, and the rule has no {option}"
        elif entry.method.authentication is not None and plan.method is not Authentication.BLOCK:
            plan.method = Authentication(entry.method.authentication)

    def _place(self, guest: Guest) -> tuple[bytes | bool, bool]:
        """What of a client's connection the rules may look at."""
        return guest.address if self.has_addresses else guest.family == 0, guest.tls is not None
