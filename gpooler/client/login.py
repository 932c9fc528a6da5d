"""The life of a client until the relay has it: startup packet, authentication, route, adoption.

What can be answered at once is answered where its message comes in; a greenlet is spawned for a login only
when it has to wait: for the id of a route, for its turn, for a cancel request to be over.
"""

import traceback
from collections.abc import Callable, Mapping
from typing import Final, Protocol

import gevent
from gevent.lock import BoundedSemaphore

from gpooler.auth import exchange
from gpooler.auth.exchange import Done, Later, Md5Exchange, ScramExchange, Stored
from gpooler.auth.groups import Groups
from gpooler.auth.randomness import random_bytes
from gpooler.client.admission import Admission
from gpooler.client.cancels import Cancels
from gpooler.client.entrance import ClientGone, Guest
from gpooler.client.greeting import Greeting, Greetings, Key, overrides, statuses
from gpooler.client.handshakes import DIRECT, GSSENC, SSL, Handshakes
from gpooler.client.plan import Plan, Plans
from gpooler.client.refusals import Refusals
from gpooler.client.sources import Sources, binding_of, learns_servers_secret
from gpooler.clock import monotonic_us
from gpooler.config.model import Authentication, Config, Rule
from gpooler.errors import (
    AdminShutdown,
    AuthenticationFailed,
    AuthenticationUndecided,
    ClientMaxReached,
    DatabaseDisabled,
    GpoolerError,
    InternalError,
    NoRule,
    ParameterCannotChange,
    ProtocolViolation,
    RuleClientMaxReached,
    TlsRequired,
    UserBlocked,
)
from gpooler.faults import fault_point
from gpooler.log import Logger
from gpooler.net.host_names import HostNames
from gpooler.net.tcp import Option, set_options, tcp_settings
from gpooler.net.tls import Acceptor
from gpooler.relay.relay import Relay
from gpooler.routing.route import Mode, Route
from gpooler.routing.rules import is_of_database
from gpooler.stats.registry import ProcessWord, RouteWord, Time
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

REFUSED: Final = b"N"  # answers to an encryption request
ACCEPTED: Final = b"S"
SSL_REQUEST: Final = SSLRequest()
SSL_REQUEST_DATA: Final = messages.ssl_request()[4:]
READY: Final = messages.ready_for_query()
ASKS_PASSWORD: Final = (Authentication.CLEAR_TEXT, Authentication.MD5, Authentication.SCRAM_SHA_256)
IN_CLEAR: Final = (Authentication.CLEAR_TEXT, Authentication.EXTERNAL)  # what they ask for others can read
STARTUP_VALUES: Final = {Replication.PHYSICAL: "true", Replication.DATABASE: "database"}


class Routes(Protocol):
    """Finds routes; the broker gives their ids."""

    def open(self, rule: Rule, database: str, user: str, is_replication: bool) -> Route:
        """The route of a client. Yields when it is new. Raises GpoolerError."""

    def known(self, rule: Rule, database: str, user: str, is_replication: bool) -> Route | None:
        """The same without waiting; None when it is new."""


# What ``express.Express.remember`` takes.
Remember = Callable[[Guest, Plan, Stored, bool, bool, tuple[Option, ...]], None]


class Console(Protocol):
    """Takes clients of the console (``console/clients.py``)."""

    def takes(self, rule: Rule) -> bool:
        """Whether a rule leads there."""

    def take(self, guest: Guest, plan: Plan, greeting: bytes) -> None:
        """Go on with a client that is who it says. Raises GpoolerError."""


class SetUp:
    """A client that takes a server before it is told that it is logged in."""

    __slots__ = ("began_us", "key", "route", "startup")

    def __init__(self, guest: Guest, route: Route, key: Key, startup: Mapping[str, str] | None) -> None:
        """``startup``: what a server of its own is to be opened with; None: any of the route will do."""
        self.began_us = monotonic_us() - guest.age_us()
        self.route = route
        self.key = key
        self.startup = startup


class Login:
    """Logs clients in: the handler of ``entrance.Entrance``."""

    def __init__(
        self,
        config: Config,
        acceptors: Mapping[int, Acceptor],
        relay: Relay,
        counters: SharedCounters,
        admission: Admission,
        routes: Routes,
        cancels: Cancels,
        logger: Logger,
        workers: int,
        mock_key: bytes,
        sources: Sources,
        groups: Groups,
        hosts: HostNames,
        names: Callable[[str, str], int],
        on_adopted: Callable[[int, Guest, SetUp | None], None],
        refusals: Refusals,
        handshakes: Handshakes,
    ) -> None:
        """``acceptors`` by the number of their listener; ``names`` gives the index of a (database, user);
        ``mock_key``: see ``auth.exchange``.
        """
        self._relay = relay
        self._counters = counters
        self._admission = admission
        self._routes = routes
        self._cancels = cancels
        self._logger = logger
        self._workers = workers
        self._mock_key = mock_key
        self._sources = sources
        self._groups = groups
        self._hosts = hosts
        groups.on_change = hosts.on_change = self._look_anew
        self._names = names
        self._on_adopted = on_adopted
        self._refusals = refusals
        self._handshakes = handshakes
        self._greetings: dict[int, Greetings] = {}
        self.is_draining = False
        self.demanding = handshakes.demanding
        self.console: Console | None = None
        self.remember: Remember = lambda *_: None
        self.forget: Callable[[], None] = lambda: None  # what was remembered
        self.configure(config, acceptors)

    def configure(self, config: Config, acceptors: Mapping[int, Acceptor]) -> None:
        """From now on; who is logging in already goes on by what its rule is now."""
        self._config = config
        self._refusals.configure(config.limits)
        self._handshakes.configure(acceptors)
        self._rules = {rule.name: rule for rule in config.served}
        self._plans = Plans(config, self._logger.is_debug)
        self._plans.members = self._groups.members
        self._plans.hosts = self._hosts.addresses
        general = tcp_settings(config.performance)
        self._socket_changes = {
            rule.name: tcp_settings(config.performance, rule).changes(general) for rule in config.served
        }
        self._gate = BoundedSemaphore(max(1, config.limits.routing_limit(self._workers) // self._workers))
        self.forget()

    # -- the entrance speaks

    def on_startup(self, guest: Guest, packet: bytes) -> None:
        """A startup packet, without its length word."""
        try:
            self._on_startup(guest, packet)
        except (GpoolerError, ClientGone) as error:
            self._refusals.end(guest, error)

    def on_password(self, guest: Guest, body: bytes) -> None:
        """The body of a password message."""
        try:
            assert guest.conversation is not None
            said = guest.conversation.answer(body)
            if isinstance(said, Later):
                self._refusals.refuse_banned(guest)  # nobody is asked for who is refused anyway
            self._go_on(guest, said)
        except (GpoolerError, ClientGone) as error:
            self._refusals.end(guest, error)

    def on_direct_tls(self, guest: Guest) -> None:
        """A TLS handshake in place of a startup packet (``sslnegotiation=direct`` of libpq)."""
        if self._handshakes.is_possible(guest):
            guest.requests |= SSL | DIRECT
            self._handshakes.begin(guest)
        else:
            self.on_bad(guest, True)

    def on_handshake(self, guest: Guest, data: bytes) -> None:
        """Bytes of a TLS handshake."""
        self._handshakes.go_on(guest, data)

    def on_mismatch(self, guest: Guest, body: bytes) -> None:
        """The body of a password message that does not fit ``guest.salt``: say what is wrong with it."""
        assert guest.plan is not None
        guest.conversation = self._sources.exchange(guest, guest.plan, guest.salt)
        self.on_password(guest, body)

    def on_proved(self, guest: Guest, done: Done) -> None:
        """The client is who it says, but what was known of its route has changed."""
        try:
            self._go_on(guest, done)
        except (GpoolerError, ClientGone) as error:
            self._refusals.end(guest, error)

    def on_refused(self, guest: Guest, error: GpoolerError) -> None:
        """What the client answered proves nothing."""
        self._refusals.end(guest, error)

    def on_bad(self, guest: Guest, is_startup: bool) -> None:
        """Bytes that are no message of the kind expected."""
        try:
            if is_startup:
                parse_startup_length(guest.buffer[:4])
            else:
                messages.split_password_message(guest.buffer)
            raise AssertionError("the entrance and the parsers disagree")
        except GpoolerError as error:
            self._refusals.end(guest, error)

    def on_surprise(self, guest: Guest) -> None:
        """A mistake of ours, told in an except clause: it ends this login alone."""
        self._logger.error(traceback.format_exc(), context="startup", who=guest.who)
        if guest.fd >= 0:
            self._refusals.end(guest, InternalError(cause="uncaught"))

    def on_gone(self, guest: Guest, cause: str) -> None:
        """The client closed or broke the connection."""
        self._refusals.end(guest, ClientGone(cause))

    def expire(self, guest: Guest) -> None:
        """Its client_login_timeout is over."""
        self._refusals.expire(guest)

    # -- steps of a login

    def _on_startup(self, guest: Guest, data: bytes) -> None:
        """Raises ClientFault, ClientGone."""
        plan = self._plans.find(guest, data)
        if plan is not None:
            self._begin(guest, plan)
            return
        packet = SSL_REQUEST if data == SSL_REQUEST_DATA else parse_startup(data)
        if isinstance(packet, SSLRequest | GSSENCRequest):
            request = SSL if isinstance(packet, SSLRequest) else GSSENC
            if guest.requests & request:
                raise ProtocolViolation("encryption was requested twice")
            guest.requests |= request
            if guest.buffer:
                raise ProtocolViolation("received unencrypted data after an encryption request")
            is_taken = request == SSL and self._handshakes.is_possible(guest)
            answer = ACCEPTED if is_taken else REFUSED
            if self._logger.is_debug:
                said = f"{type(packet).__name__}: answered {answer.decode()}"
                self._logger.debug(said, context="startup", who=guest.who)
            guest.send(answer)
            if is_taken:
                self._handshakes.begin(guest)
            else:
                guest.expect_startup()
        elif isinstance(packet, CancelRequest):
            gevent.spawn(self._cancel, guest, packet)
        elif self._groups.is_ready:
            self._begin(guest, self._plans.make(guest, data, packet))
        else:
            gevent.spawn(self._wait_for_groups, guest, data, packet)

    def _look_anew(self) -> None:
        """Who is in which group has changed, or which addresses a host has."""
        self._plans.forget()
        self.forget()

    def _wait_for_groups(self, guest: Guest, data: bytes, packet: Startup) -> None:
        """The first logins of a worker: who is in which group is being asked."""
        self._groups.wait()
        self._in_greenlet(guest, lambda: self._begin(guest, self._plans.make(guest, data, packet)))

    def _cancel(self, guest: Guest, packet: CancelRequest) -> None:
        try:
            self._cancels.request(packet.pid, packet.secret)
        finally:
            guest.close()

    def _begin(self, guest: Guest, plan: Plan) -> None:
        """Begin the exchange. Raises ClientFault, ClientGone."""
        guest.plan = plan
        packet, rule = plan.packet, plan.rule
        if guest.tls is None and guest.family and guest.listener in self.demanding:
            raise TlsRequired
        fault_point("login_started")
        if plan.is_debugged:
            self._debug(guest, _described(plan))
        if rule is None:
            guest.conversation = self._unknown(guest, packet)
        elif plan.refusal:
            # who is to be kept out must not be asked for a password that others could read
            is_overheard = guest.family and guest.tls is None and plan.method in IN_CLEAR
            method = Authentication.SCRAM_SHA_256 if is_overheard else plan.method
            guest.conversation = self._doomed(guest, packet, method, plan.refusal)
        else:
            if rule.authentication is Authentication.BLOCK:
                raise UserBlocked(packet.user, packet.database)
            if self.is_draining:
                raise AdminShutdown
            if any(is_of_database(rule, packet.database, name) for name in self._config.disabled):
                raise DatabaseDisabled(packet.database)
            if not self._is_of_console(rule):  # whoever looks why there are too many must come in
                if not self._admission.enter(self._config.limits.client_max):
                    raise ClientMaxReached(self._config.limits.client_max or 0)
                guest.is_counted = True
            guest.conversation = self._sources.exchange(guest, plan, None)
        negotiation = packet.negotiation()
        if negotiation:
            guest.send(negotiation)
        self._go_on(guest, guest.conversation.challenge())

    def _is_of_console(self, rule: Rule) -> bool:
        return self.console is not None and self.console.takes(rule)

    def _debug(self, guest: Guest, message: str) -> None:
        self._logger.debug(message, context="startup", who=guest.who, is_wanted=True)

    def _unknown(self, guest: Guest, packet: Startup) -> exchange.Exchange:
        """An exchange for an unknown user of a known database: it fails as a wrong password does."""
        cause = f'no rule for database "{packet.database}" and user "{packet.user}" from this address'
        for other in self._config.rules:
            if other.is_default_database or other.database == packet.database:
                return self._doomed(guest, packet, other.authentication, cause)
        raise NoRule(packet.database, packet.user)

    def _doomed(self, guest: Guest, packet: Startup, method: Authentication, cause: str) -> exchange.Exchange:
        """An exchange that fails as one by ``method`` does with a wrong password."""
        if method is Authentication.EXTERNAL:
            method = Authentication.CLEAR_TEXT  # as it asks
        elif method not in ASKS_PASSWORD:
            method = Authentication.SCRAM_SHA_256
        return exchange.begin(
            method.value,
            packet.user,
            None,
            self._mock_key,
            binding=binding_of(guest),
            unknown_cause=cause,
        )

    def _ask(self, guest: Guest, later: Later) -> None:
        """Somebody else decides; the client may be gone by then."""

        def step() -> None:
            said = later.work()
            if guest.fd >= 0:
                self._go_on(guest, said)

        self._in_greenlet(guest, step)

    def _in_greenlet(self, guest: Guest, step: Callable[[], None]) -> None:
        """A step outside the entrance's calls, if the client is there still."""
        try:
            if guest.fd >= 0:
                step()
            if guest.fd >= 0:
                guest.resume()
        except (GpoolerError, ClientGone) as error:
            if guest.fd >= 0:
                self._refusals.end(guest, error)
            elif isinstance(error, AuthenticationFailed):
                # or guesses would be free for who hangs up in time
                self._refusals.note_failure(guest, error)
        except Exception as error:  # noqa: BLE001  # a library's surprise: the client is told as usual
            self._logger.error(traceback.format_exc(), context="startup", who=guest.who)
            if guest.fd >= 0 and guest.plan is not None:
                user = guest.plan.packet.user
                self._refusals.end(
                    guest, AuthenticationUndecided(user, cause=f"uncaught {type(error).__name__}")
                )

    def _go_on(self, guest: Guest, said: bytes | Done | Later) -> None:
        """What the exchange says: to the client, or that it is over. Raises ClientFault, ClientGone."""
        plan = guest.plan
        assert plan is not None
        if isinstance(said, Later):
            gevent.spawn(self._ask, guest, said)
        elif not isinstance(said, Done):
            guest.send(said)
            guest.expect_password()
            if plan.is_debugged:
                self._debug(guest, "authentication: the client is asked")
        elif plan.rule is None:
            raise AuthenticationFailed(plan.packet.user, cause="no rule")
        else:
            rule, packet = self._in_force(plan), plan.packet
            if plan.method is not Authentication.NONE:
                self._refusals.refuse_banned(guest)
                self._refusals.forgive(guest)
            if self.console is not None and self.console.takes(rule):
                self.console.take(guest, plan, said.messages)
                return
            if said.storage_user is not None:
                plan = guest.plan = plan.variant(said.storage_user)
            route = plan.route or self._routes.known(
                rule, packet.database, plan.storage_user, packet.replication is not Replication.NONE
            )
            if self._admission.is_memory_short:
                raise self._admission.refuse_for_memory(None if route is None else route.route_id)
            if route is not None:
                self._adopt(guest, plan, rule, route, said)
            else:
                gevent.spawn(self._wait_for_route, guest, plan, rule, said)

    def _in_force(self, plan: Plan) -> Rule:
        """The rule of a plan as it is now. Raises AdminShutdown: it was removed."""
        assert plan.rule is not None
        rule = self._rules.get(plan.rule.name)
        if rule is None:
            raise AdminShutdown
        if rule is not plan.rule:
            plan.rule = rule
            plan.route = None
        return rule

    def _wait_for_route(self, guest: Guest, plan: Plan, rule: Rule, done: Done) -> None:
        """The first client of a route here; ``client_max_routing`` bounds how many wait at once."""
        try:
            with self._gate:
                packet = plan.packet
                is_replication = packet.replication is not Replication.NONE
                route = self._routes.open(rule, packet.database, plan.storage_user, is_replication)
                if guest.fd >= 0:
                    self._adopt(guest, plan, rule, route, done)
        except (GpoolerError, ClientGone) as error:
            if guest.fd >= 0:
                self._refusals.end(guest, error)

    def _adopt(self, guest: Guest, plan: Plan, rule: Rule, route: Route, done: Done) -> None:
        """Limits and greeting; the relay has the client afterwards. Raises ClientFault, ClientGone."""
        if plan.route is None:
            plan.route = route
            plan.names = self._names(plan.packet.database, plan.packet.user)
        if rule.password_passthrough and done.password is not None:
            route.learn_password(done.password)
        elif _is_learned_from(plan, rule):
            route.learn(done.secret, done.keys)
        if not self._admission.enter_route(route.admission_id, rule.client_max):
            raise RuleClientMaxReached(rule.client_max or 0, plan.packet.database, plan.packet.user)
        try:
            handle, setup = self._hand_over(guest, plan, rule, route, done)
        except BaseException:
            self._admission.leave_route(route.admission_id)
            raise
        if setup is None:
            self._count_login(route, guest.age_us())
            self._remember(guest, plan, rule)
        guest.is_counted = False  # from now on the relay's event gives it back
        if plan.is_debugged:
            what = "its parameters are known" if setup is None else "it is set up on a server"
            self._debug(guest, f"authenticated, on route {route.route_id}: {what}")
        self._on_adopted(handle, guest, setup)

    def _hand_over(
        self, guest: Guest, plan: Plan, rule: Rule, route: Route, done: Done
    ) -> tuple[int, SetUp | None]:
        fault_point("login_adopting")
        if plan.fixed:
            raise ParameterCannotChange(plan.fixed)
        secret_length = plan.packet.secret_length
        greeting = self._find_greeting(guest, plan, route)
        setup = None
        if greeting is None:
            guest.send(done.messages)
            secret = b"" if route.mode is Mode.SESSION else random_bytes(secret_length)
            if route.is_replication:
                value = STARTUP_VALUES[plan.packet.replication]
                setup = SetUp(guest, route, (), {**plan.named_parameters(guest), "replication": value})
                parameters = overrides({})
            else:
                setup = SetUp(guest, route, plan.key, None)
                parameters = overrides(plan.named_parameters(guest))
        else:
            secret = random_bytes(secret_length)
            key_data = messages.backend_key_data(self._relay.reserve_pid(), secret)
            guest.send(b"".join((done.messages, greeting.statuses, key_data, READY)))
            parameters = greeting.parameters
        if guest.family and (changes := self._socket_changes[rule.name]):
            set_options(guest.fd, changes)
        handle = self._relay.adopt_client(
            guest.detach(),
            route.route_id,
            guest.number,
            parameters,
            secret=secret,
            address=guest.address,
            family=guest.family,
            port=guest.port,
            names=plan.names,
            needs_setup=setup is not None,
            pending=guest.buffer,
            tls=guest.tls,
            has_more=guest.has_more,
        )
        return handle, setup

    def _find_greeting(self, guest: Guest, plan: Plan, route: Route) -> Greeting | None:
        """None for a client that must be set up on a server first."""
        if route.mode is Mode.SESSION:
            return None
        if plan.greeting is not None and plan.version == route.version and not plan.has_host_in_name:
            return plan.greeting
        greetings = self._greetings.setdefault(route.route_id, Greetings())
        plan.greeting = greetings.find(route, plan.key, plan.application_name(guest))
        plan.version = route.version
        return plan.greeting

    def _remember(self, guest: Guest, plan: Plan, rule: Rule) -> None:
        """Let clients that begin like this one take the short way, if nothing else has to be looked at."""
        limits = self._config.limits
        if limits.client_max is not None or not plan.is_plain or self.is_draining:
            return
        if self._plans.find(guest, plan.data) is not plan:
            return  # who is in which group, or where, has changed since
        if limits.auth_failure_max and plan.method is not Authentication.NONE:
            return  # the short way knows of no ban
        stored: Stored = None
        if plan.method is not Authentication.NONE:
            if not isinstance(guest.conversation, Md5Exchange | ScramExchange):
                return  # it came the short way itself: the next one will do
            stored = guest.conversation.stored
        changes = self._socket_changes[rule.name]
        is_learned_from = _is_learned_from(plan, rule)
        self.remember(guest, plan, stored, is_learned_from, self._plans.has_addresses, changes)

    def finish_setup(self, handle: int, setup: SetUp) -> None:
        """The client has its parameters from a server (``ClientEvent.READY``): tell it so."""
        record = self._relay.client(handle)
        parameters = self._relay.client_parameters(handle)
        route = setup.route
        self._greetings.setdefault(route.route_id, Greetings()).learn(setup.key, parameters)
        if route.mode is Mode.SESSION:
            server = self._relay.server(record["server"])
            pid, secret = server["pid"], server["secret"]
        else:
            pid, secret = record["pid"], record["secret"]
        self._relay.start_client(
            handle,
            statuses(parameters) + messages.backend_key_data(pid, secret) + READY,
            pid,
            secret,
        )
        self._count_login(route, monotonic_us() - setup.began_us)

    def _count_login(self, route: Route, lasted_us: int) -> None:
        self._counters.add_process(ProcessWord.LOGINS)
        self._counters.add_route(route.route_id, RouteWord.LOGINS)
        self._counters.observe(route.route_id, Time.LOGIN, lasted_us)


def _is_learned_from(plan: Plan, rule: Rule) -> bool:
    """Whether what its clients prove themselves with opens servers."""
    return plan.storage_user == plan.packet.user and learns_servers_secret(rule, plan.packet.user)


def _described(plan: Plan) -> str:
    """A startup packet for the log."""
    packet, rule = plan.packet, plan.rule
    parameters = ", ".join(f"{name}={value}" for name, value in packet.parameters.items())
    found = "no rule" if rule is None else f"rule {rule.name}, authentication {plan.method}"
    replication = f"replication={STARTUP_VALUES[packet.replication]}, " if packet.replication else ""
    return (
        f"startup packet: protocol {packet.major}.{packet.minor}, {replication}{found}, "
        f"parameters: {parameters or 'none'}"
    )
