"""The life of a client until the relay has it: startup packet, authentication, route, adoption.

What can be answered at once is answered where its message comes in; a greenlet is spawned for a login only
when it has to wait: for the id of a route, for its turn, for a cancel request to be over.
"""

from collections.abc import Callable
from ipaddress import ip_address
from typing import Final, Protocol

import gevent
from gevent.lock import BoundedSemaphore

from gpooler.auth import exchange
from gpooler.auth.exchange import Done
from gpooler.auth.randomness import random_bytes
from gpooler.auth.secrets import Secret
from gpooler.client.admission import Admission
from gpooler.client.cancels import Cancels
from gpooler.client.entrance import ClientGone, Guest
from gpooler.client.greeting import (
    APPLICATION_NAME,
    Greetings,
    Key,
    application_name,
    is_plain,
    overrides,
    startup_key,
    statuses,
)
from gpooler.config.model import Authentication, Config, ConnectionType, Pool, Rule
from gpooler.errors import (
    AdminShutdown,
    AuthenticationFailed,
    ClientMaxReached,
    FeatureNotSupported,
    GpoolerError,
    LoginTimeout,
    NoRule,
    ParameterCannotChange,
    ProtocolViolation,
    RuleClientMaxReached,
    UserBlocked,
)
from gpooler.faults import fault_point
from gpooler.log import Logger, client_id
from gpooler.net.tcp import set_options, tcp_settings
from gpooler.relay.relay import Relay
from gpooler.routing.route import Route
from gpooler.routing.rules import Rules
from gpooler.server.servers import READ_ONLY
from gpooler.stats.registry import ProcessWord, RouteWord
from gpooler.stats.shared import SharedCounters
from gpooler.wire import messages
from gpooler.wire.startup import (
    CancelRequest,
    GSSENCRequest,
    Replication,
    SSLRequest,
    Startup,
    parse_startup,
    parse_startup_length,
)

# What the server alone decides; the relay never deploys these, so a client that asks has to be told here.
FIXED: Final = frozenset(name.decode() for name in READ_ONLY)
REFUSED: Final = b"N"  # the answer to an encryption request


class Routes(Protocol):
    """Finds routes; the broker gives their ids."""

    def open(self, rule: Rule, database: str, user: str) -> Route:
        """The route of a client. Yields when it is new. Raises GpoolerError."""

    def known(self, rule: Rule, database: str, user: str) -> Route | None:
        """The same without waiting; None when it is new."""


class SetUp:
    """A client that takes a server before it is told that it is logged in."""

    __slots__ = ("key", "route", "secret_length")

    def __init__(self, route: Route, key: Key, secret_length: int) -> None:
        self.route = route
        self.key = key
        self.secret_length = secret_length


class Attempt:
    """How far a login is."""

    __slots__ = ("conversation", "is_counted", "is_debugged", "packet", "requests", "rule")

    def __init__(self) -> None:
        self.requests: set[type] = set()  # encryption requests seen
        self.packet: Startup | None = None
        self.rule: Rule | None = None  # None: no rule, the exchange fails whatever is answered
        self.conversation: exchange.Exchange | None = None
        self.is_counted = False  # against client_max
        self.is_debugged = False  # log_debug, in general or of its rule


class Login:
    """Logs clients in: the handler of ``entrance.Entrance``."""

    def __init__(
        self,
        config: Config,
        relay: Relay,
        counters: SharedCounters,
        admission: Admission,
        routes: Routes,
        cancels: Cancels,
        logger: Logger,
        workers: int,
        mock_key: bytes,
        names: Callable[[str, str], int],
        on_adopted: Callable[[int, Guest, SetUp | None], None],
    ) -> None:
        """``names`` gives the index of a (database, user) pair; ``mock_key``: see ``auth.exchange``."""
        self._config = config
        self._relay = relay
        self._counters = counters
        self._admission = admission
        self._routes = routes
        self._cancels = cancels
        self._logger = logger
        self._rules = Rules(config)
        self._secrets = {
            rule.name: Secret(rule.password.get_secret_value())
            for rule in config.rules
            if rule.password is not None
        }
        general = tcp_settings(config.performance)
        self._socket_changes = {
            rule.name: tcp_settings(config.performance, rule).changes(general) for rule in config.rules
        }
        self._mock_key = mock_key
        self._names = names
        self._on_adopted = on_adopted
        self._gate = BoundedSemaphore(max(1, config.limits.routing_limit(workers) // workers))
        self._greetings: dict[int, Greetings] = {}
        self.is_draining = False

    # -- the entrance speaks

    def on_startup(self, guest: Guest, packet: bytes) -> None:
        """A startup packet, without its length word."""
        try:
            self._on_startup(guest, packet)
        except (GpoolerError, ClientGone) as error:
            self._end(guest, error)

    def on_password(self, guest: Guest, body: bytes) -> None:
        """The body of a password message."""
        try:
            assert guest.attempt.conversation is not None
            self._go_on(guest, guest.attempt.conversation.answer(body))
        except (GpoolerError, ClientGone) as error:
            self._end(guest, error)

    def on_bad(self, guest: Guest, is_startup: bool) -> None:
        """Bytes that are no message of the kind expected."""
        try:
            if is_startup:
                parse_startup_length(guest.buffer[:4])
            else:
                messages.split_password_message(guest.buffer)
            raise AssertionError("the entrance and the parsers disagree")
        except GpoolerError as error:
            self._end(guest, error)

    def on_gone(self, guest: Guest, cause: str) -> None:
        """The client closed or broke the connection."""
        self._end(guest, ClientGone(cause))

    def expire(self, guest: Guest) -> None:
        """Its client_login_timeout is over."""
        self._end(guest, LoginTimeout(guest.timeout_ms))

    def _end(self, guest: Guest, error: GpoolerError | ClientGone) -> None:
        """A login failed: tell the log, and the client if it is there; nothing of it is left."""
        attempt: Attempt = guest.attempt
        if attempt.is_counted:
            attempt.is_counted = False
            self._admission.leave()
        if isinstance(error, GpoolerError):
            self._refuse(guest, error, attempt.rule is None or attempt.rule.client_show_id)
        elif guest.who.user:
            self._logger.info(f"client gone during login: {error}", context="startup", who=guest.who)
        guest.close()

    def _refuse(self, guest: Guest, error: GpoolerError, is_id_shown: bool) -> None:
        self._counters.add_process(ProcessWord.LOGIN_ERRORS)
        self._logger.error(
            f"login refused: {error.sqlstate} {error.log_text()}", context="startup", who=guest.who
        )
        try:
            guest.send(messages.error_response(error, client_id(guest.number) if is_id_shown else None))
        except ClientGone:
            return  # or does not read: either way it is not told

    # -- steps of a login

    def _on_startup(self, guest: Guest, data: bytes) -> None:
        """Raises ClientFault, ClientGone."""
        packet = parse_startup(data)
        if isinstance(packet, SSLRequest | GSSENCRequest):
            requests: set[type] = guest.attempt.requests
            if type(packet) in requests:
                raise ProtocolViolation("encryption was requested twice")
            requests.add(type(packet))
            if guest.buffer:
                raise ProtocolViolation("received unencrypted data after an encryption request")
            self._logger.debug(f"{type(packet).__name__}: answered N", context="startup", who=guest.who)
            guest.send(REFUSED)
            guest.expect_startup()
        elif isinstance(packet, CancelRequest):
            gevent.spawn(self._cancel, guest, packet)
        else:
            self._begin(guest, packet)

    def _cancel(self, guest: Guest, packet: CancelRequest) -> None:
        try:
            self._cancels.request(packet.pid, packet.secret)
        finally:
            guest.close()

    def _begin(self, guest: Guest, packet: Startup) -> None:
        """Find the rule, begin the exchange. Raises ClientFault, ClientGone."""
        attempt: Attempt = guest.attempt
        attempt.packet = packet
        guest.who.user, guest.who.database = packet.user, packet.database
        fault_point("login_started")
        attempt.rule = rule = self._find_rule(guest, packet)
        attempt.is_debugged = self._logger.is_debug or (rule is not None and rule.log_debug)
        if attempt.is_debugged:
            self._debug(guest, _described(packet, rule))
        if rule is None:
            attempt.conversation = self._doomed(packet)
        else:
            if rule.authentication is Authentication.BLOCK:
                raise UserBlocked(packet.user, packet.database)
            if packet.replication is not Replication.NONE:
                raise FeatureNotSupported("replication connections are not supported yet")
            if self.is_draining:
                raise AdminShutdown
            if not self._admission.enter(self._config.limits.client_max):
                raise ClientMaxReached(self._config.limits.client_max or 0)
            attempt.is_counted = True
            attempt.conversation = exchange.begin(
                rule.authentication.value,
                packet.user,
                self._secrets.get(rule.name),
                self._mock_key,
                salt_name=rule.name if rule.is_default_user else None,
            )
        negotiation = packet.negotiation()
        if negotiation:
            guest.send(negotiation)
        self._go_on(guest, attempt.conversation.challenge())

    def _debug(self, guest: Guest, message: str) -> None:
        self._logger.debug(message, context="startup", who=guest.who, is_wanted=True)

    def _find_rule(self, guest: Guest, packet: Startup) -> Rule | None:
        address = ip_address(guest.address) if self._rules.has_addresses and guest.family else None
        kind = ConnectionType.LOCAL if guest.family == 0 else ConnectionType.HOSTNOSSL
        return self._rules.match(packet.database, packet.user, address, kind)

    def _doomed(self, packet: Startup) -> exchange.Exchange:
        """An exchange for an unknown user of a known database: it fails as a wrong password does."""
        cause = f'no rule for database "{packet.database}" and user "{packet.user}" from this address'
        for other in self._config.rules:
            if other.is_default_database or other.database == packet.database:
                method = other.authentication
                if method in (Authentication.NONE, Authentication.BLOCK):
                    method = Authentication.SCRAM_SHA_256
                return exchange.begin(method.value, packet.user, None, self._mock_key, unknown_cause=cause)
        raise NoRule(packet.database, packet.user)

    def _go_on(self, guest: Guest, said: bytes | Done) -> None:
        """What the exchange says: to the client, or that it is over. Raises ClientFault, ClientGone."""
        attempt: Attempt = guest.attempt
        if not isinstance(said, Done):
            guest.send(said)
            guest.expect_password()
            if attempt.is_debugged:
                self._debug(guest, "authentication: the client is asked")
            return
        packet, rule = attempt.packet, attempt.rule
        assert packet is not None
        if rule is None:
            raise AuthenticationFailed(packet.user, cause="no rule")
        route = self._routes.known(rule, packet.database, packet.user)
        if route is not None:
            self._adopt(guest, packet, rule, route, said)
        else:
            gevent.spawn(self._wait_for_route, guest, packet, rule, said)

    def _wait_for_route(self, guest: Guest, packet: Startup, rule: Rule, done: Done) -> None:
        """The first client of a route here; ``client_max_routing`` bounds how many wait at once."""
        try:
            with self._gate:
                route = self._routes.open(rule, packet.database, packet.user)
                if guest.fd >= 0:
                    self._adopt(guest, packet, rule, route, done)
        except (GpoolerError, ClientGone) as error:
            if guest.fd >= 0:
                self._end(guest, error)

    def _adopt(self, guest: Guest, packet: Startup, rule: Rule, route: Route, done: Done) -> None:
        """Limits and greeting; the relay has the client afterwards. Raises ClientFault, ClientGone."""
        if not self._admission.enter_route(route.route_id, rule.client_max):
            raise RuleClientMaxReached(rule.client_max or 0, packet.database, packet.user)
        try:
            handle, setup = self._hand_over(guest, packet, rule, route, done)
        except BaseException:
            self._admission.leave_route(route.route_id)
            raise
        if setup is None:
            self._count_login(route)
        guest.attempt.is_counted = False  # from now on the relay's event gives it back
        if guest.attempt.is_debugged:
            what = "its parameters are known" if setup is None else "it is set up on a server"
            self._debug(guest, f"authenticated, on route {route.route_id}: {what}")
        self._on_adopted(handle, guest, setup)

    def _hand_over(
        self, guest: Guest, packet: Startup, rule: Rule, route: Route, done: Done
    ) -> tuple[int, SetUp | None]:
        fault_point("login_adopting")
        parameters = {**packet.parameters, **rule.options} if rule.options else packet.parameters
        for item in parameters:
            if item.lower() in FIXED:
                raise ParameterCannotChange(item)
        if not rule.maintain_params:
            parameters = {}
        name = _application_name(guest, parameters, rule) if rule.maintain_params else ""
        key = startup_key(parameters)
        greetings = self._greetings.get(route.route_id)
        if greetings is None:
            greetings = self._greetings[route.route_id] = Greetings()
        found = None if rule.pool is Pool.SESSION else greetings.find(route, key, name)
        secret = b"" if rule.pool is Pool.SESSION else random_bytes(packet.secret_length)
        setup = None
        if found is None:
            if name:
                parameters = {
                    item: name if item.lower() == APPLICATION_NAME else value
                    for item, value in {APPLICATION_NAME: name, **parameters}.items()
                }
            guest.send(done.messages)
            relay_set = overrides(parameters)
            setup = SetUp(route, key, packet.secret_length)
        else:
            relay_set = found.parameters
            guest.send(
                b"".join(
                    (
                        done.messages,
                        found.statuses,
                        messages.backend_key_data(self._relay.reserve_pid(), secret),
                        messages.ready_for_query(),
                    )
                )
            )
        if guest.family and (changes := self._socket_changes[rule.name]):
            set_options(guest.fd, changes)
        handle = self._relay.adopt_client(
            guest.detach(),
            route.route_id,
            guest.number,
            relay_set,
            secret=secret,
            address=guest.address,
            family=guest.family,
            port=guest.port,
            names=self._names(packet.database, packet.user),
            needs_setup=setup is not None,
            pending=guest.buffer,
        )
        return handle, setup

    def finish_setup(self, handle: int, setup: SetUp) -> None:
        """The client has its parameters from a server (``ClientEvent.READY``): tell it so."""
        record = self._relay.client(handle)
        parameters = self._relay.client_parameters(handle)
        route = setup.route
        self._greetings.setdefault(route.route_id, Greetings()).learn(setup.key, parameters)
        if route.rule.pool is Pool.SESSION:
            server = self._relay.server(record["server"])
            pid, secret = server["pid"], server["secret"]
        else:
            pid, secret = record["pid"], record["secret"]
        self._relay.start_client(
            handle,
            statuses(parameters) + messages.backend_key_data(pid, secret) + messages.ready_for_query(),
            pid,
            secret,
        )
        self._count_login(route)

    def _count_login(self, route: Route) -> None:
        self._counters.add_process(ProcessWord.LOGINS)
        self._counters.add_route(route.route_id, RouteWord.LOGINS)


def _described(packet: Startup, rule: Rule | None) -> str:
    """A startup packet for the log."""
    parameters = ", ".join(f"{name}={value}" for name, value in packet.parameters.items())
    found = "no rule" if rule is None else f"rule {rule.name}, authentication {rule.authentication}"
    return (
        f"startup packet: protocol {packet.major}.{packet.minor}, {found}, parameters: {parameters or 'none'}"
    )


def _application_name(guest: Guest, parameters: dict[str, str], rule: Rule) -> str:
    value = next((value for item, value in parameters.items() if item.lower() == APPLICATION_NAME), "")
    if rule.application_name_add_host:
        return application_name(value, f"{guest.host}:{guest.port}")
    return application_name(value, None) if is_plain(value) else ""
