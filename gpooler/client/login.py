"""The life of a client until the relay has it: startup packet, authentication, route, adoption."""

import os
from collections.abc import Callable
from ipaddress import ip_address
from typing import Final, Protocol

from gevent.lock import BoundedSemaphore

from gpooler.auth import exchange
from gpooler.auth.exchange import Done
from gpooler.auth.secrets import Secret
from gpooler.client.admission import Admission
from gpooler.client.cancels import Cancels
from gpooler.client.connection import ClientGone, Connection
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
    NoRule,
    ParameterCannotChange,
    ProtocolViolation,
    RuleClientMaxReached,
    UserBlocked,
)
from gpooler.log import Logger, client_id
from gpooler.relay.engine import Relay
from gpooler.routing.route import Route
from gpooler.routing.rules import Rules
from gpooler.server.servers import READ_ONLY
from gpooler.stats.registry import ProcessWord, RouteWord
from gpooler.stats.shared import SharedCounters
from gpooler.wire import messages
from gpooler.wire.startup import CancelRequest, GSSENCRequest, Replication, SSLRequest, Startup

# What the server alone decides; the relay never deploys these, so a client that asks has to be told here.
FIXED: Final = frozenset(name.decode() for name in READ_ONLY)
REFUSED: Final = b"N"  # the answer to an encryption request


class Routes(Protocol):
    """Finds routes; the broker gives their ids."""

    def open(self, rule: Rule, database: str, user: str) -> Route:
        """The route of a client. Yields when it is new. Raises GpoolerError."""


class SetUp:
    """A client that takes a server before it is told that it is logged in."""

    __slots__ = ("key", "route", "secret_length")

    def __init__(self, route: Route, key: Key, secret_length: int) -> None:
        self.route = route
        self.key = key
        self.secret_length = secret_length


class Login:
    """Logs clients in. One greenlet runs ``run`` for each."""

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
        on_adopted: Callable[[int, Connection, SetUp | None], None],
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
        self._mock_key = mock_key
        self._names = names
        self._on_adopted = on_adopted
        self._gate = BoundedSemaphore(max(1, config.limits.routing_limit(workers) // workers))
        self._greetings: dict[int, Greetings] = {}
        self.is_draining = False

    def run(self, client: Connection) -> None:
        """Log a client in and hand it to the relay. Yields. Closes the connection on any failure."""
        rule: Rule | None = None
        try:
            packet = self._first_packet(client)
            if isinstance(packet, CancelRequest):
                self._cancels.request(packet.pid, packet.secret)
                return
            assert isinstance(packet, Startup)
            client.who.user, client.who.database = packet.user, packet.database
            rule = self._find_rule(client, packet)
            self._log_in(client, packet, rule)
        except ClientGone as gone:
            if client.who.user:
                self._logger.info(f"client gone during login: {gone}", context="startup", who=client.who)
        except GpoolerError as error:
            self._refuse(client, error, rule is None or rule.client_show_id)
        finally:
            client.close()

    def _refuse(self, client: Connection, error: GpoolerError, is_id_shown: bool) -> None:
        """Tell the client and the log why."""
        self._counters.add_process(ProcessWord.LOGIN_ERRORS)
        self._logger.error(
            f"login refused: {error.sqlstate} {error.log_text()}", context="startup", who=client.who
        )
        try:
            os.write(
                client.fd, messages.error_response(error, client_id(client.number) if is_id_shown else None)
            )
        except OSError:
            return  # it is gone, or does not read: either way it is not told

    def _first_packet(self, client: Connection) -> CancelRequest | Startup:
        """SSLRequest and GSSENCRequest may come once each, in any order. Raises ClientGone, ClientFault."""
        seen: set[type] = set()
        while True:
            packet = client.read_startup()
            if isinstance(packet, SSLRequest | GSSENCRequest):
                if type(packet) in seen:
                    raise ProtocolViolation("encryption was requested twice")
                seen.add(type(packet))
                client.refuse_rest()
                client.write(REFUSED)
                continue
            return packet

    def _find_rule(self, client: Connection, packet: Startup) -> Rule:
        """The client's rule. An unknown user of a known database goes through an exchange that fails."""
        address = None if client.family == 0 else ip_address(client.address)
        kind = ConnectionType.LOCAL if client.family == 0 else ConnectionType.HOSTNOSSL
        rule = self._rules.match(packet.database, packet.user, address, kind)
        if rule is not None:
            return rule
        cause = f'no rule for database "{packet.database}" and user "{packet.user}" from this address'
        for other in self._config.rules:
            if other.is_default_database or other.database == packet.database:
                method = other.authentication
                if method in (Authentication.NONE, Authentication.BLOCK):
                    method = Authentication.SCRAM_SHA_256
                client.write(packet.negotiation())
                self._converse(
                    client,
                    exchange.begin(method.value, packet.user, None, self._mock_key, unknown_cause=cause),
                )
                raise AuthenticationFailed(packet.user, cause=cause)
        raise NoRule(packet.database, packet.user)

    def _converse(self, client: Connection, conversation: exchange.Exchange) -> Done:
        """Run an authentication exchange. Yields. Raises ClientFault, ClientGone."""
        said = conversation.challenge()
        while not isinstance(said, Done):
            client.write(said)
            said = conversation.answer(client.read_password())
        return said

    def _log_in(self, client: Connection, packet: Startup, rule: Rule) -> None:
        if rule.authentication is Authentication.BLOCK:
            raise UserBlocked(packet.user, packet.database)
        if packet.replication is not Replication.NONE:
            raise FeatureNotSupported("replication connections are not supported yet")
        if self.is_draining:
            raise AdminShutdown
        if not self._admission.enter(self._config.limits.client_max):
            raise ClientMaxReached(self._config.limits.client_max or 0)
        is_counted = True
        try:
            done = self._authenticate(client, packet, rule)
            with self._gate:
                self._adopt(client, packet, rule, done)
            is_counted = False
        finally:
            if is_counted:
                self._admission.leave()

    def _authenticate(self, client: Connection, packet: Startup, rule: Rule) -> Done:
        negotiation = packet.negotiation()
        if negotiation:
            client.write(negotiation)
        return self._converse(
            client,
            exchange.begin(
                rule.authentication.value,
                packet.user,
                self._secrets.get(rule.name),
                self._mock_key,
                salt_name=rule.name if rule.is_default_user else None,
            ),
        )

    def _adopt(self, client: Connection, packet: Startup, rule: Rule, done: Done) -> None:
        """Route, limits, greeting; the relay has the client afterwards."""
        route = self._routes.open(rule, packet.database, packet.user)
        if not self._admission.enter_route(route.route_id, rule.client_max):
            raise RuleClientMaxReached(rule.client_max or 0, packet.database, packet.user)
        try:
            handle, setup = self._hand_over(client, packet, rule, route, done)
        except BaseException:
            self._admission.leave_route(route.route_id)
            raise
        self._counters.add_process(ProcessWord.LOGINS)
        self._counters.add_route(route.route_id, RouteWord.LOGINS)
        self._on_adopted(handle, client, setup)

    def _hand_over(
        self, client: Connection, packet: Startup, rule: Rule, route: Route, done: Done
    ) -> tuple[int, SetUp | None]:
        parameters = {**packet.parameters, **rule.options} if rule.options else packet.parameters
        for item in parameters:
            if item.lower() in FIXED:
                raise ParameterCannotChange(item)
        name = _application_name(client, parameters, rule)
        key = startup_key(parameters)
        greetings = self._greetings.get(route.route_id)
        if greetings is None:
            greetings = self._greetings[route.route_id] = Greetings()
        found = None if rule.pool is Pool.SESSION else greetings.find(route, key, name)
        secret = b"" if rule.pool is Pool.SESSION else os.urandom(packet.secret_length)
        setup = None
        if found is None:
            if name:
                parameters = {
                    item: name if item.lower() == APPLICATION_NAME else value
                    for item, value in {APPLICATION_NAME: name, **parameters}.items()
                }
            client.write(done.messages)
            relay_set = overrides(parameters)
            setup = SetUp(route, key, packet.secret_length)
        else:
            relay_set = found.parameters
            client.write(
                b"".join(
                    (
                        done.messages,
                        found.statuses,
                        messages.backend_key_data(self._relay.reserve_pid(), secret),
                        messages.ready_for_query(),
                    )
                )
            )
        handle = self._relay.adopt_client(
            client.detach(),
            route.route_id,
            client.number,
            relay_set,
            secret=secret,
            address=client.address,
            family=client.family,
            port=client.port,
            names=self._names(packet.database, packet.user),
            needs_setup=setup is not None,
            pending=client.buffer,
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


def _application_name(client: Connection, parameters: dict[str, str], rule: Rule) -> str:
    value = next((value for item, value in parameters.items() if item.lower() == APPLICATION_NAME), "")
    if rule.application_name_add_host:
        return application_name(value, f"{client.who.client_host}:{client.port}")
    return application_name(value, None) if is_plain(value) else ""
