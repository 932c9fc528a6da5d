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
from gpooler.auth.failures import Failures
from gpooler.auth.groups import Groups
from gpooler.auth.randomness import random_bytes
from gpooler.client.admission import Admission
from gpooler.client.cancels import Cancels
from gpooler.client.entrance import ClientGone, Guest
from gpooler.client.greeting import Greeting, Greetings, Key, overrides, statuses
from gpooler.client.plan import Plan, Plans
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
    LoginTimeout,
    NoRule,
    ParameterCannotChange,
    ProtocolViolation,
    RuleClientMaxReached,
    TlsFailed,
    TlsRequired,
    UserBlocked,
)
from gpooler.faults import fault_point
from gpooler.log import Logger, client_id
from gpooler.net.host_names import HostNames
from gpooler.net.tcp import Option, set_options, tcp_settings
from gpooler.net.tls import ALPN, Acceptor, TlsFault, run_heavy
from gpooler.relay.relay import Relay
from gpooler.relay.tls import TlsHandshake
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
from gpooler.wire.text import encode

REFUSED: Final = b"N"  # answers to an encryption request
ACCEPTED: Final = b"S"
SSL_REQUEST: Final = SSLRequest()
SSL_REQUEST_DATA: Final = messages.ssl_request()[4:]
SSL: Final = 1  # bits of Guest.requests
GSSENC: Final = 2
DIRECT: Final = 4  # TLS without a request
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
        failures: Failures,
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
        self._failures = failures
        self._kept_back: dict[Guest, GpoolerError] = {}  # refused, and not told so yet
        self._greetings: dict[int, Greetings] = {}
        self.is_draining = False
        self.demanding: set[int] = set()  # numbers of listeners that take nobody without TLS
        self.console: Console | None = None
        self.remember: Remember = lambda *_: None
        self.forget: Callable[[], None] = lambda: None  # what was remembered
        self.configure(config, acceptors)

    def configure(self, config: Config, acceptors: Mapping[int, Acceptor]) -> None:
        """From now on; who is logging in already goes on by what its rule is now."""
        self._config = config
        self._acceptors = acceptors
        self.demanding.clear()
        self.demanding.update(number for number, acceptor in acceptors.items() if acceptor.is_required)
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
            self._end(guest, error)

    def on_password(self, guest: Guest, body: bytes) -> None:
        """The body of a password message."""
        try:
            assert guest.conversation is not None
            said = guest.conversation.answer(body)
            if isinstance(said, Later):
                self._refuse_banned(guest)  # nobody is asked for who is refused anyway
            self._go_on(guest, said)
        except (GpoolerError, ClientGone) as error:
            self._end(guest, error)

    def on_direct_tls(self, guest: Guest) -> None:
        """A TLS handshake in place of a startup packet (``sslnegotiation=direct`` of libpq)."""
        acceptor = self._acceptors.get(guest.listener)
        if acceptor is None or not guest.family:
            self.on_bad(guest, True)
        else:
            guest.requests |= SSL | DIRECT
            self._begin_tls(guest, acceptor)

    def _begin_tls(self, guest: Guest, acceptor: Acceptor) -> None:
        guest.handshake = acceptor.begin()
        guest.expect_handshake()

    def on_handshake(self, guest: Guest, data: bytes) -> None:
        """Bytes of a TLS handshake."""
        assert guest.handshake is not None
        guest.handshake.feed(data)
        if guest.handshake.is_heavy:
            gevent.spawn(self._shake_hands, guest, guest.handshake, run_heavy)
        else:
            self._shake_hands(guest, guest.handshake, None)

    def _shake_hands(
        self, guest: Guest, handshake: TlsHandshake, run: Callable[[Callable[[], bool]], bool] | None
    ) -> None:
        """Go on with a handshake; ``run`` calls its step, None for at once."""
        try:
            try:
                is_over = handshake.step() if run is None else run(handshake.step)
            finally:
                if guest.fd >= 0 and (data := handshake.take()):
                    guest.send_handshake(data)
            if guest.fd < 0:
                return
            if not is_over:
                guest.expect_handshake()
            else:
                session = handshake.session()
                if guest.requests & DIRECT and session.facts.alpn != ALPN:
                    raise TlsFault(f'direct TLS without the protocol name "{ALPN.decode()}" (ALPN)')
                guest.secure(session)
                if self._logger.is_debug:
                    self._logger.debug(f"TLS: {session.facts}", context="startup", who=guest.who)
                guest.expect_startup()
        except (TlsFault, ConnectionError) as error:
            self._end(guest, TlsFailed(cause=str(error)))
        except ClientGone as error:
            self._end(guest, error)
        else:
            if run is not None:
                guest.resume()

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
            self._end(guest, error)

    def on_refused(self, guest: Guest, error: GpoolerError) -> None:
        """What the client answered proves nothing."""
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

    def on_surprise(self, guest: Guest) -> None:
        """A mistake of ours, told in an except clause: it ends this login alone."""
        self._logger.error(traceback.format_exc(), context="startup", who=guest.who)
        if guest.fd >= 0:
            self._end(guest, InternalError(cause="uncaught"))

    def on_gone(self, guest: Guest, cause: str) -> None:
        """The client closed or broke the connection."""
        self._end(guest, ClientGone(cause))

    def expire(self, guest: Guest) -> None:
        """Its client_login_timeout is over."""
        if guest in self._kept_back:
            self._let_go(guest)
        else:
            self._end(guest, LoginTimeout(guest.timeout_ms))

    def _end(self, guest: Guest, error: GpoolerError | ClientGone) -> None:
        """A login failed: tell the log, and the client if it is there; nothing of it is left."""
        if guest.is_counted:
            guest.is_counted = False
            self._admission.leave()
        if isinstance(error, GpoolerError):
            self._counters.add_process(ProcessWord.LOGIN_ERRORS)
            self._logger.error(
                f"login refused: {error.sqlstate} {error.log_text()}", context="startup", who=guest.who
            )
            if isinstance(error, AuthenticationFailed) and (delay_s := self._note_failure(guest, error)):
                self._kept_back[guest] = error
                gevent.spawn_later(delay_s, self._let_go, guest)
                return
            self._tell(guest, error)
        elif guest.who.user:
            self._logger.info(f"client gone during login: {error}", context="startup", who=guest.who)
        guest.close()

    def _note_failure(self, guest: Guest, error: AuthenticationFailed) -> float:
        """Count a failed login; returns for how many seconds its answer is to be kept back."""
        assert guest.plan is not None
        is_guess = not isinstance(error, AuthenticationUndecided)
        if is_guess and self._failures.add(guest.address, encode(guest.plan.packet.user)):
            limits = self._config.limits
            self._logger.error(
                f"banned for {limits.auth_failure_ban_ms} ms after {limits.auth_failure_max} failed logins",
                context="startup",
                who=guest.who,
            )
        return self._failures.delay_s(guest.address)

    def _let_go(self, guest: Guest) -> None:
        """Tell a client what was kept back."""
        error = self._kept_back.pop(guest, None)
        if error is not None:
            self._tell(guest, error)
            guest.close()

    def _tell(self, guest: Guest, error: GpoolerError) -> None:
        rule = None if guest.plan is None else guest.plan.rule
        is_id_shown = rule is None or rule.client_show_id
        if guest.handshake is not None:
            return  # an alert was all that could be said
        try:
            guest.send(messages.error_response(error, client_id(guest.number) if is_id_shown else None))
        except ClientGone:
            return  # or does not read: either way it is not told

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
            is_possible = request == SSL and guest.family and guest.tls is None
            acceptor = self._acceptors.get(guest.listener) if is_possible else None
            answer = REFUSED if acceptor is None else ACCEPTED
            if self._logger.is_debug:
                said = f"{type(packet).__name__}: answered {answer.decode()}"
                self._logger.debug(said, context="startup", who=guest.who)
            guest.send(answer)
            if acceptor is None:
                guest.expect_startup()
            else:
                self._begin_tls(guest, acceptor)
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
                self._end(guest, error)
            elif isinstance(error, AuthenticationFailed):
                self._note_failure(guest, error)  # or guesses would be free for who hangs up in time
        except Exception as error:  # noqa: BLE001  # a library's surprise: the client is told as usual
            self._logger.error(traceback.format_exc(), context="startup", who=guest.who)
            if guest.fd >= 0 and guest.plan is not None:
                user = guest.plan.packet.user
                self._end(guest, AuthenticationUndecided(user, cause=f"uncaught {type(error).__name__}"))

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
                self._refuse_banned(guest)
                self._failures.clear(guest.address, encode(packet.user))
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

    def _refuse_banned(self, guest: Guest) -> None:
        """Who is banned fails where a wrong password would. Raises AuthenticationFailed."""
        assert guest.plan is not None
        user = guest.plan.packet.user
        if self._failures.is_banned(guest.address, encode(user)):
            raise AuthenticationFailed(user, cause="banned after too many failed logins")

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
                self._end(guest, error)

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
