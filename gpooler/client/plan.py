"""What a startup packet leads to: found once, then the same for all clients that send the same packet.

The connections of an application begin alike. What is found for one of them (its rule, its parameters, its
greeting) is kept for the next, so that a login costs little more than its password.
"""

from ipaddress import ip_address
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
from gpooler.config.model import Authentication, Config, ConnectionType, Rule
from gpooler.routing.route import Route
from gpooler.routing.rules import Rules
from gpooler.server.servers import READ_ONLY
from gpooler.wire.startup import Startup

# Invented packets cannot fill the memory: beyond so many all are dropped, and large ones are not kept.
MAX_PLANS: Final = 512
MAX_PACKET: Final = 2048
# What the server alone decides; the relay never deploys these, so a client that asks has to be told here.
FIXED: Final = frozenset(name.decode() for name in READ_ONLY)


class Plan:
    """For one startup packet from one kind of place; ``login`` fills in what the first login shows."""

    __slots__ = (
        "data", "fixed", "greeting", "has_host_in_name", "is_debugged", "key", "name", "names", "packet",
        "parameters", "route", "rule", "secret", "storage_user", "variants", "version",
    )  # fmt: skip

    def __init__(self, data: bytes, packet: Startup, rule: Rule | None, secret: Secret | None) -> None:
        """``data`` says ``packet``; ``rule`` None: none takes the client."""
        self.data = data
        self.packet = packet
        self.rule = rule
        self.secret = secret
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
            found.is_debugged = self.is_debugged
            found.storage_user = storage_user
        return found

    @property
    def is_plain(self) -> bool:
        """Whether all who come by it log in alike, their passwords aside."""
        rule = self.rule
        return (
            rule is not None
            and rule.authentication in (Authentication.NONE, Authentication.MD5)
            and rule.client_max is None
            and not self.has_host_in_name
            and not self.is_debugged
            and not self.packet.negotiation()
            and len(self.data) <= MAX_PACKET
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


class Plans:
    """The plans of a configuration."""

    def __init__(self, config: Config, is_debug: bool) -> None:
        """``is_debug``: of all clients, whatever their rules say."""
        self._rules = Rules(config)
        self.has_addresses = self._rules.has_addresses  # a client's address may decide
        self._secrets = {
            rule.name: Secret(rule.password.get_secret_value())
            for rule in config.rules
            if rule.password is not None
        }
        self._is_debug = is_debug
        self._plans: dict[tuple[bytes, tuple[bytes | bool, bool]], Plan] = {}

    def __len__(self) -> int:
        return len(self._plans)

    def find(self, guest: Guest, data: bytes) -> Plan | None:
        """The plan for a startup packet (without its length word); None when it is new."""
        return self._plans.get((data, self._place(guest)))

    def make(self, guest: Guest, data: bytes, packet: Startup) -> Plan:
        """A plan for ``data``, which says ``packet``."""
        address = ip_address(guest.address) if self.has_addresses and guest.family else None
        kind = ConnectionType.HOSTNOSSL if guest.tls is None else ConnectionType.HOSTSSL
        if guest.family == 0:
            kind = ConnectionType.LOCAL
        rule = self._rules.match(packet.database, packet.user, address, kind)
        secret = None if rule is None else self._secrets.get(rule.name)
        plan = Plan(data, packet, rule, secret)
        plan.is_debugged = self._is_debug or (rule is not None and rule.log_debug)
        if len(data) <= MAX_PACKET:
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            self._plans[data, self._place(guest)] = plan
        return plan

    def _place(self, guest: Guest) -> tuple[bytes | bool, bool]:
        """What of a client's connection the rules may look at."""
        return guest.address if self.has_addresses else guest.family == 0, guest.tls is not None
