"""The clients of one worker: accepted here, logged in by ``login``, then known by relay handles only."""

import resource
import socket
from collections.abc import Callable
from functools import lru_cache
from typing import Final

import gevent
from gevent import get_hub
from gevent.server import StreamServer

from gpooler.client.admission import Admission
from gpooler.client.entrance import Entrance, Guest
from gpooler.client.express import Express
from gpooler.client.login import Login, SetUp
from gpooler.client.slow import Slow, describe
from gpooler.clock import monotonic_us
from gpooler.config.model import Authentication, Config, Rule
from gpooler.errors import (
    AdminShutdown,
    GpoolerError,
    IdleInSessionPool,
    IdleInTransactionTimeout,
    IdleSessionTimeout,
    InternalError,
    PoolTimeout,
    PostgresError,
    ProtocolViolation,
    QueryCancelled,
    QueryTimeout,
    ServerConnectFailed,
    ServerLost,
    ServerProtocol,
    SessionStateRefusal,
    StatementPoolRefusal,
    TargetInvalid,
    TargetNotBuilt,
    TransactionTimeout,
    VirtualRefusal,
)
from gpooler.log import LogContext, Logger, client_id, server_id
from gpooler.net.listen import Listener
from gpooler.reasons import Reason
from gpooler.relay.events import ClientEvent
from gpooler.relay.relay import Relay
from gpooler.routing.route import Route
from gpooler.server.awaited import Awaited
from gpooler.stats.registry import ProcessWord
from gpooler.stats.shared import SharedCounters
from gpooler.wire import messages
from gpooler.wire.data_row import data_row

TIMEOUT_TICK_S: Final = 0.05  # precision of client_login_timeout
ACCEPT_AGAIN_S: Final = 0.2  # after the system had no descriptor for a client
COMPLAIN_US: Final = 10_000_000  # it is said so often
BALANCE_TICK_S: Final = 0.02  # a worker that paused looks so often whether it may accept again
REASON_LABELS: Final = {int(reason): reason.label for reason in Reason}
CLIENT_WAITING: Final = 2  # relay/engine.pxd: ClientState
CLIENT_LEAVING: Final = 4
DATA_EXCEPTION: Final = "22"  # class of SQLSTATEs: a value that is none
UNDEFINED_OBJECT: Final = "42704"  # no such parameter
CANT_CHANGE_RUNTIME_PARAM: Final = "55P02"


class Listening(StreamServer):  # type: ignore[misc]
    """Accepts with bare descriptors, one connection a turn, so that workers share fairly."""

    max_accept = 1

    def __init__(self, listener: Listener, accept: Callable[[int], None]) -> None:
        """``accept`` takes the listening descriptor."""
        super().__init__(listener.socket.dup(), handle=accept)
        self._fd = self.socket.fileno()

    def do_read(self) -> None:
        """Accept a guest, if there is one; nothing is left to handle."""
        self.handle(self._fd)

    def do_close(self, *args: object) -> None:
        """The guest owns its descriptor."""


class Clients:
    """Accepts, and handles what the relay says of clients."""

    def __init__(
        self,
        config: Config,
        relay: Relay,
        counters: SharedCounters,
        admission: Admission,
        listeners: tuple[Listener, ...],
        logger: Logger,
        routes: dict[int, Route],
        awaited: Awaited,
    ) -> None:
        """``awaited`` is told of clients that wait for a server of their own."""
        self._relay = relay
        self._counters = counters
        self._admission = admission
        self._logger = logger
        self._routes = routes
        self._awaited = awaited
        self._names: list[tuple[str, str]] = []
        self._name_index: dict[tuple[str, str], int] = {}
        self._setups: dict[int, SetUp] = {}
        self._external_ids: dict[int, str] = {}  # by the number of the client
        self._replications: dict[int, str] = {}  # kinds of replication, by handle
        self._ticker: gevent.Greenlet | None = None
        self._is_paused = False
        self._complain_us = 0
        self._entrance: Entrance | None = None
        self._express: Express | None = None
        self.login: Login | None = None
        self._servers: dict[Listener, Listening] = {}
        self.configure(config)
        for listener in listeners:
            self.listen(listener)

    def configure(self, config: Config) -> None:
        """From now on; at addresses that are not in it nobody is accepted any more."""
        self._config = config
        self._login_timeouts_ms = {listen.number: listen.client_login_timeout for listen in config.listen}
        for listener in list(self._servers):
            if listener.number not in self._login_timeouts_ms:
                self._servers.pop(listener).close()
                listener.socket.close()
        self._is_session_logged = config.logging.log_session
        self._lingers = not config.performance.disable_nolinger
        self._has_agents = any(
            rule.authentication is Authentication.EXTERNAL or rule.enable_mdb_iamproxy_auth
            for rule in config.served
        )

    # -- accepting

    def start(self) -> None:
        """Begin to accept."""
        assert self.login is not None
        self._express = Express(
            self._relay,
            self._counters.address,
            self._admission.short_address,
            self.login,
            self.on_adopted,
        )
        self.login.remember = self._express.remember
        self.login.forget = self._express.forget
        self._entrance = Entrance(self._express)
        watcher = get_hub().loop.io(self._entrance.fd, 1)
        watcher.start(self._entrance.poll)
        for server in self._servers.values():
            server.start()
        self._counters.set_process(ProcessWord.LISTENING, int(bool(self._servers)))

    def drain(self, *, lets_in: bool) -> None:
        """Accept no more, and refuse who is still logging in unless ``lets_in``.

        When every process has closed the listeners, the kernel refuses clients.
        """
        assert self.login is not None
        if not lets_in:
            self.login.is_draining = True
            if self._express is not None:
                self._express.forget()
        self._counters.set_process(ProcessWord.LISTENING, 0)
        for listener, server in self._servers.items():
            server.close()
            listener.socket.close()
        self._servers = {}

    @property
    def has_guests(self) -> bool:
        """Whether anybody is logging in."""
        return self._entrance is not None and len(self._entrance) > 0

    def listen(self, listener: Listener) -> None:
        """Accept there, too."""
        assert self.login is None or not self.login.is_draining
        server = self._servers[listener] = Listening(listener, self._acceptor(listener))
        if self._entrance is not None:
            server.start()
            if self._is_paused:
                server.stop_accepting()
            else:
                self._counters.set_process(ProcessWord.LISTENING, 1)

    def _acceptor(self, listener: Listener) -> Callable[[int], None]:
        def accept(fd: int) -> None:
            assert self._entrance is not None
            timeout_ms = self._login_timeouts_ms[listener.number]
            try:
                guest = self._entrance.accept(fd, listener.number, timeout_ms, self._lingers)
            except OSError as error:
                self._cannot_accept(error)
                return
            if guest is None:
                return
            try:
                self._entrance.look(guest)  # most have sent their startup packet by now
            finally:
                if guest.fd >= 0 and self._ticker is None:
                    self._ticker = gevent.spawn(self._end_late_logins)
            if not self._is_paused and self._admission.has_too_many():
                self._pause()

        return accept

    def _cannot_accept(self, error: OSError) -> None:
        """Most likely there are too many open files; clients wait in the kernel's queue meanwhile."""
        now_us = monotonic_us()
        if now_us >= self._complain_us:
            self._complain_us = now_us + COMPLAIN_US
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            self._logger.error(
                f"cannot accept clients: {error.strerror}; the limit of open files is {limit} a process "
                "(ulimit -n, LimitNOFILE=)",
                context="main",
            )
        self._pause(ACCEPT_AGAIN_S)

    def _end_late_logins(self) -> None:
        """End logins that take longer than ``client_login_timeout``, as long as there are any."""
        assert self._entrance is not None
        assert self.login is not None
        while True:  # once at least: expired() forgets who is through
            self._counters.set_process(ProcessWord.CLIENTS_LOGIN, len(self._entrance))
            gevent.sleep(TIMEOUT_TICK_S)
            for guest in self._entrance.expired(int(TIMEOUT_TICK_S * 1e6)):
                self.login.expire(guest)
            if not len(self._entrance):
                break
        self._counters.set_process(ProcessWord.CLIENTS_LOGIN, 0)
        self._ticker = None

    def _pause(self, least_s: float = 0.0) -> None:
        """Too many clients here: let other workers accept until the counts are even, ``least_s`` at least."""
        self._is_paused = True
        self._counters.set_process(ProcessWord.LISTENING, 0)
        for server in self._servers.values():
            server.stop_accepting()
        gevent.spawn(self._resume, least_s)

    def _resume(self, least_s: float) -> None:
        gevent.sleep(least_s)
        while self._admission.has_too_many():
            gevent.sleep(BALANCE_TICK_S)
        self._is_paused = False
        if self._servers:
            self._counters.set_process(ProcessWord.LISTENING, 1)
        for server in self._servers.values():
            server.start_accepting()

    # -- the relay has them

    def names(self, database: str, user: str) -> int:
        """The index under which the relay keeps a client's names."""
        pair = (database, user)
        index = self._name_index.get(pair)
        if index is None:
            index = self._name_index[pair] = len(self._names)
            self._names.append(pair)
        return index

    def name_of(self, index: int) -> tuple[str, str]:
        """Database and user as a client named them."""
        return self._names[index]

    def replication_of(self, handle: int) -> str:
        """``none``, ``physical`` or ``logical``."""
        return self._replications.get(handle, "none")

    def on_adopted(self, handle: int, guest: Guest, setup: SetUp | None) -> None:
        """A client is the relay's."""
        if self._has_agents and guest.who.external_id:
            self._external_ids[guest.number] = guest.who.external_id
        if setup is not None:
            self._setups[handle] = setup
            if setup.startup is not None:
                is_physical = setup.startup["replication"] == "true"
                self._replications[handle] = "physical" if is_physical else "logical"
                self._awaited.add(setup.route.route_id, handle, setup.startup)
        if self._is_session_logged:
            self._logger.info("client connected", context="startup", who=guest.who)

    def on_event(self, handle: int, bits: int) -> None:
        """Events of one client (``relay/engine.pxd: EventBit``)."""
        if bits & ClientEvent.READY and not bits & ClientEvent.CLOSED:
            assert self.login is not None
            setup = self._setups.pop(handle, None)
            if setup is not None:
                try:
                    self.login.finish_setup(handle, setup)
                    if self._logger.is_debug or setup.route.rule.log_debug:
                        who = self._who(self._relay.client(handle))
                        self._logger.debug("set up and logged in", context="startup", who=who, is_wanted=True)
                except KeyError:
                    pass  # its server is gone already: EVENT_TEXT_WANTED follows
        if bits & ClientEvent.TEXT_WANTED and not bits & ClientEvent.CLOSED:
            self._say_why(handle)
        if bits & ClientEvent.CLOSED:
            self._on_closed(handle)

    def _who(self, record: dict[str, object]) -> LogContext:
        database, user = self._names[int(record["names"])]  # type: ignore[call-overload]
        return LogContext(
            client=client_id(int(record["id"])),  # type: ignore[call-overload]
            server=self._server_id(int(record["server"])),  # type: ignore[call-overload]
            user=user,
            database=database,
            client_host=_host(int(record["family"]), record["address"]),  # type: ignore[call-overload]
            client_port=int(record["port"]),  # type: ignore[call-overload]
            external_id=self._external_ids.get(int(record["id"]), ""),  # type: ignore[call-overload]
        )

    def _server_id(self, handle: int) -> str:
        """The id of the server a client has; empty for none, or one that is gone."""
        try:
            return server_id(self._relay.server(handle)["id"]) if handle else ""
        except KeyError:
            return ""

    def refuse(self, handle: int, route: Route) -> None:
        """The server that was to be opened for this client alone could not be."""
        try:
            record = self._relay.client(handle)
        except KeyError:
            return  # it has not waited for that
        if record["state"] != CLIENT_WAITING:
            return  # it is told something else
        failure = route.failure
        if isinstance(failure, PostgresError) and _is_about_startup(failure):
            self._say(handle, record, failure, True, Reason.SERVER_DEPLOY_FAILED)
        else:
            self._say(handle, record, _connect_error(route), True, Reason.SERVER_CONNECT)

    def _say_why(self, handle: int) -> None:
        record = self._relay.client(handle)
        error = self._error(self._routes[record["route"]], record)
        self._say(handle, record, error, record["state"] == CLIENT_LEAVING, Reason(record["reason"]))

    def _say(
        self, handle: int, record: dict[str, object], error: GpoolerError, is_end: bool, reason: Reason
    ) -> None:
        """Tell a client what went wrong; with ``is_end`` that is the last thing it is told."""
        if self._setups.pop(handle, None) is not None:
            self._counters.add_process(ProcessWord.LOGIN_ERRORS)
        if not isinstance(error, AdminShutdown):  # the master has said it once for all
            self._logger.error(f"{error.sqlstate} {error.log_text()}", context="main", who=self._who(record))
        rule = self._routes[int(record["route"])].rule  # type: ignore[call-overload]
        # what PostgreSQL says to the client's own startup parameters is passed on as it is
        is_shown = rule.client_show_id and reason != Reason.SERVER_DEPLOY_FAILED
        shown = client_id(int(record["id"])) if is_shown else None  # type: ignore[call-overload]
        text = messages.error_response(_as_fatal(error) if is_end else error, shown)
        self._relay.inject(handle, text, close_after=is_end, reason=reason if is_end else Reason.NONE)

    def _error(self, route: Route, record: dict[str, object]) -> GpoolerError:
        """What a client is told for the reason the relay gives."""
        reason = Reason(int(record["reason"]))  # type: ignore[call-overload]
        note = record["note"]
        assert isinstance(note, bytes)
        match reason:
            case Reason.CLIENT_POOL_TIMEOUT:
                length = int.from_bytes(note, "little") + self._admission.waiting_elsewhere(route.route_id)
                failure = "" if route.failure is None else route.failure.log_text()
                return PoolTimeout(
                    route.rule.pool_timeout, self._pool_size(route.rule), length, failure=failure
                )
            case Reason.CLIENT_PROTOCOL:
                return ProtocolViolation("invalid frontend message")
            case Reason.CLIENT_CANCELLED:
                return QueryCancelled()
            case Reason.CLIENT_IDLE:
                return IdleInSessionPool() if route.is_idle_limit_the_pools else IdleSessionTimeout()
            case Reason.CLIENT_IDLE_IN_TRANSACTION:
                return IdleInTransactionTimeout()
            case Reason.CLIENT_QUERY_TIMEOUT:
                return QueryTimeout()
            case Reason.CLIENT_TRANSACTION_TIMEOUT:
                return TransactionTimeout()
            case Reason.STATEMENT_POOL:
                return StatementPoolRefusal()
            case Reason.SESSION_STATE:
                return SessionStateRefusal()
            case Reason.TARGET_UNBUILT:
                return TargetNotBuilt()
            case Reason.TARGET_INVALID:
                return TargetInvalid()
            case Reason.VIRTUAL_UNCLEAR:
                return VirtualRefusal()
            case Reason.SERVER_LOST:
                return ServerLost()
            case Reason.SERVER_PROTOCOL:
                return ServerProtocol(cause="unexpected message")
            case Reason.SERVER_DEPLOY_FAILED:
                return PostgresError(messages.parse_error(note[5:]))
            case Reason.SERVER_CONNECT:
                return _connect_error(route)
            case Reason.SHUTDOWN | Reason.CLIENT_KILLED:
                return AdminShutdown()
        return InternalError(cause=f"connection ended: {reason.label}")

    def _pool_size(self, rule: Rule) -> int:
        """Of the rule, or of the pool it shares; 0 is no limit."""
        return (
            rule.pool_size
            if rule.shared_pool is None
            else self._config.shared_pool[rule.shared_pool].pool_size
        )

    def _on_closed(self, handle: int) -> None:
        number, route_id, reason, names, family, address, port, lived_us = self._relay.free_client(handle)
        route = self._routes[route_id]
        setup = self._setups.pop(handle, None)
        self._replications.pop(handle, None)
        if setup is not None and setup.startup is not None:
            self._awaited.forget(route_id, handle)
        self._admission.leave()
        self._admission.leave_route(route.admission_id)
        external_id = self._external_ids.pop(number, "")
        if self._is_session_logged:
            database, user = self._names[names]
            host = _host(family, address)
            who = LogContext(client_id(number), "", user, database, host, port, "", external_id)
            what = f"client disconnected: {REASON_LABELS[reason]}, after {lived_us / 1e6:.3f} s"
            self._logger.info(what, context="main", who=who)

    def log_texts(self) -> None:
        """Query texts and slow requests that wait for the log."""
        for handle, text, slow in self._relay.texts():
            try:
                record = self._relay.client(handle)
            except KeyError:
                continue
            who = self._who(record)
            if slow is None:
                self._logger.info(_query_text(text), context="query", who=who)
            else:
                told = Slow(*slow)
                name = self._routes[record["route"]].name
                message, who.facts = describe(told, text, f"{name[0]}.{name[1]}")
                who.server = server_id(told.server)
                self._logger.info(message, context="slow", who=who)


def wait_notices() -> tuple[bytes, bytes, bytes]:
    """What clients that wait are told, as ``Relay.open_route`` takes it."""
    waiting = messages.notice_response("gpooler: waiting for a server")
    before, after = messages.notice_response("gpooler: waited # ms for a server")[5:].split(b"#")
    return waiting, before, after


def virtual_answers() -> tuple[bytes, ...]:
    """What SHOW (by either name), SET and RESET of target_session_attrs are answered with, as for open_route.

    There is one value, so that nothing has to be kept.
    """
    notice = messages.notice_response("gpooler: answered without a server")
    shown = data_row(("any",), [None]) + messages.command_complete("SHOW")
    return (
        notice + messages.row_description(["odyssey.target_session_attrs"]) + shown,
        notice + messages.row_description(["gpooler.target_session_attrs"]) + shown,
        notice + messages.command_complete("SET"),
        notice + messages.command_complete("RESET"),
    )


def _connect_error(route: Route) -> GpoolerError:
    """Why no server could be opened: the server's own words only with ``client_fwd_error``."""
    failure = route.failure
    if isinstance(failure, PostgresError) and route.rule.client_fwd_error:
        return failure
    return ServerConnectFailed(cause="" if failure is None else failure.log_text())


def _is_about_startup(error: PostgresError) -> bool:
    """Whether PostgreSQL says that to parameters of a startup packet, and not to how we log in."""
    code = error.server_sqlstate
    return code.startswith(DATA_EXCEPTION) or code in (UNDEFINED_OBJECT, CANT_CHANGE_RUNTIME_PARAM)


def _as_fatal(error: GpoolerError) -> GpoolerError:
    """The last message of a connection has severity FATAL."""
    fields = error.fields()
    if fields["S"] == "FATAL":
        return error
    return PostgresError({**fields, "S": "FATAL", "V": "FATAL"})


def _query_text(text: bytes) -> str:
    """A Query's SQL, or a Parse's name and SQL."""
    return " ".join(part.decode("utf-8", "backslashreplace") for part in text.split(b"\0") if part)


@lru_cache(maxsize=1024)
def _host(family: int, address: bytes) -> str:
    if family == 0:
        return "local"
    return socket.inet_ntop(socket.AF_INET6 if family == 6 else socket.AF_INET, address)
