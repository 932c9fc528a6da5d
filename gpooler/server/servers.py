"""The servers of one worker: leases come from the broker, connections go to the relay and end here."""

import contextlib
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Protocol

import gevent
import gevent.socket

from gpooler.auth.secrets import Secret
from gpooler.broker import messages
from gpooler.broker.codec import Message
from gpooler.clock import monotonic_us
from gpooler.config.model import Config, Rule
from gpooler.errors import PostgresError, ServerFault
from gpooler.faults import fault_point
from gpooler.log import LogContext, Logger, client_id, server_id
from gpooler.net.resolve import Address, Resolver
from gpooler.net.tls import Connector
from gpooler.reasons import Reason
from gpooler.relay.events import ServerEvent
from gpooler.relay.params import ParameterSet
from gpooler.relay.relay import Relay
from gpooler.relay.tls import TlsSession
from gpooler.routing.route import Route
from gpooler.server.awaited import Awaited, Parameters
from gpooler.server.login import OpenServer, open_server
from gpooler.server.outage import Outages
from gpooler.stats.registry import RouteWord, Time
from gpooler.stats.shared import SharedCounters
from gpooler.wire.text import decode, encode

# Reported by PostgreSQL, but no session can set them.
READ_ONLY: Final = frozenset(
    {
        b"server_version",
        b"server_encoding",
        b"integer_datetimes",
        b"is_superuser",
        b"session_authorization",
        b"in_hot_standby",
    }
)
TOO_MANY_CONNECTIONS: Final = "53300"
# PostgreSQL is starting, stopping or recovering: waiting helps.
TRANSIENT: Final = frozenset({TOO_MANY_CONNECTIONS, "57P01", "57P02", "57P03"})
RETRY_MS: Final = 100  # pause after a failed connect, so that a dead host is not asked in a loop
LIFETIME_SPREAD: Final = 0.2  # part of server_lifetime over which the ends are spread
ID_BITS: Final = 48


class Broker(Protocol):
    """What is needed of the way to the broker."""

    @property
    def is_attached(self) -> bool:
        """Whether what was sent last may have reached it."""

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send or queue a message; the descriptors stay the caller's."""


@dataclass(slots=True)
class Lease:
    """A slot of this worker: being opened, open or closing. ``fd`` is -1 before the connect."""

    route: Route
    slot: int
    generation: int
    server_id: int
    epoch: int
    fd: int = -1
    address: Address | None = None
    state: messages.ServerState | None = None
    is_closing: bool = False
    client: int = 0  # relay handle of the client that it is opened for alone; 0: for whoever waits
    startup: Parameters | None = None  # that client's startup parameters
    born_us: int = field(default_factory=monotonic_us)


class Servers:
    """Opens what the broker grants, and tells it what becomes of each slot."""

    def __init__(
        self,
        config: Config,
        relay: Relay,
        counters: SharedCounters,
        resolver: Resolver,
        logger: Logger,
        cancel: Callable[[int], None],
        count_servers: Callable[[int], int],
        connectors: Mapping[str, Connector],
    ) -> None:
        """``cancel`` delivers a cancel request to the server of a handle and then ends it in the relay.

        ``count_servers``: the servers of a route id that live, over all workers; ``connectors`` by storage.
        """
        self._relay = relay
        self._counters = counters
        self._resolver = resolver
        self._logger = logger
        self._cancel = cancel
        self._count_servers = count_servers
        self.broker: Broker | None = None
        self.routes: dict[int, Route] = {}
        self.leases: dict[int, Lease] = {}  # by relay handle
        self.awaited = Awaited()
        self.on_refused: Callable[[int, Route], None] = lambda handle, route: None
        self._opening: set[int] = set()  # ids of Lease objects being opened
        self._opening_leases: dict[int, Lease] = {}
        self._outages = Outages(config.limits.backend_connect_timeout_ms * 1000)
        self._is_ending = False
        self.configure(config, connectors)

    def configure(self, config: Config, connectors: Mapping[str, Connector]) -> None:
        """From now on."""
        self._limits = config.limits
        self._is_session_logged = config.logging.log_session
        self._connectors = connectors
        self._outages.configure(config.limits.backend_connect_timeout_ms * 1000)
        self._secrets = {rule.name: self._secret(rule) for rule in config.served}
        self._group_secrets = {
            (rule.name, group.ldap_storage_username): None
            if group.ldap_storage_password is None
            else Secret(group.ldap_storage_password.get_secret_value())
            for rule in config.served
            for group in rule.ldap_storage_credentials.values()
        }

    def _secret_of(self, route: Route) -> Secret | None:
        """What to prove with who we are at the server."""
        name = route.rule.name
        if route.rule.ldap_storage_credentials:
            return self._group_secrets.get((name, route.user))
        if route.rule.password_passthrough and route.password is not None:
            return route.password
        return self._secrets.get(name) or route.secret

    @staticmethod
    def _secret(rule: Rule) -> Secret | None:
        password = rule.server_password
        return None if password is None else Secret(password.get_secret_value())

    # -- the broker speaks

    def on_grant_open(self, route_id: int, slot: int, generation: int) -> None:
        """A right to open one server."""
        fault_point("grant_received")
        route = self.routes[route_id]
        lease = Lease(route, slot, generation, random.getrandbits(ID_BITS), route.epoch)
        if lease.route.is_replication:
            waiting = self.awaited.take(route_id)
            if waiting is None:
                self._debug(lease, "its client waits no more")
                self._send(messages.Declined(route_id, slot, generation))
                return
            lease.client, lease.startup = waiting
        self._opening_leases[id(lease)] = lease
        self._debug(lease, f"may be opened: slot {slot}, generation {generation}")
        self._count_opening(lease.route, 1)
        gevent.spawn(self._open, lease)

    def on_grant_server(
        self, route_id: int, slot: int, generation: int, state: messages.ServerState, fd: int
    ) -> None:
        """A living server from another worker; ``fd`` is ours now."""
        fault_point("descriptor_received")
        route = self.routes[route_id]
        os.set_blocking(fd, False)
        number = int(state.server_id[1:], 16)
        address = Address.parse(state.endpoint)
        lease = Lease(route, slot, generation, number, state.epoch, fd, address, state)
        self._debug(lease, f"comes from another worker: slot {slot}, generation {generation}")
        initial = _set_of(state.initial_parameters)
        self._adopt(lease, _set_of(state.parameters, state.initial_parameters), initial, is_new=False)

    @property
    def opening(self) -> list[Lease]:
        """Servers that are being opened."""
        return list(self._opening_leases.values())

    def on_recall(self, route_id: int, recall_id: int, count: int, is_eviction: bool) -> int:
        """Give up servers; returns the relay's token of the answer."""
        if self._logger.is_debug or self.routes[route_id].rule.log_debug:
            what = f"the broker wants {count} servers of route {route_id} {'gone' if is_eviction else 'back'}"
            self._logger.debug(what, context="server", is_wanted=True)
        return self._relay.recall(route_id, count, is_eviction)

    def on_keep(self, route_id: int, count: int) -> None:
        """This worker's part of min_pool_size."""
        self._relay.set_keep(route_id, count)

    def report(self) -> list[tuple[Message, list[int]]]:
        """Every slot this worker holds, for a new broker. The descriptors stay ours."""
        result: list[tuple[Message, list[int]]] = []
        for lease in self._opening_leases.values():
            slot = (lease.route.route_id, lease.slot, lease.generation)
            if lease.fd < 0:
                result.append((messages.ReportSlot(*slot), []))
            else:
                result.append((messages.ReportServer(*slot, messages.SlotPhase.OPENING, None), [lease.fd]))
        for lease in self.leases.values():
            slot = (lease.route.route_id, lease.slot, lease.generation)
            phase = messages.SlotPhase.CLOSING if lease.is_closing else messages.SlotPhase.OPEN
            result.append((messages.ReportServer(*slot, phase, lease.state), [lease.fd]))
        return result

    # -- opening

    def _count_opening(self, route: Route, by: int) -> None:
        self._counters.add_route(route.route_id, RouteWord.SERVERS_LOGIN, by)

    def _open(self, lease: Lease) -> None:
        route = lease.route
        slot = (route.route_id, lease.slot, lease.generation)
        began_us = monotonic_us()

        def on_connected(sock: gevent.socket.socket, address: Address) -> None:
            lease.fd = sock.fileno()
            lease.address = address
            self._debug(lease, "connected, logs in")
            self._send(messages.Connected(*slot, address.text), [lease.fd])
            fault_point("server_connected")

        try:
            opened = open_server(
                route,
                self._secret_of(route),
                self._resolver,
                self._limits.backend_connect_timeout_ms,
                on_connected,
                lease.startup or {},
                self._connectors[route.rule.storage],
            )
        except ServerFault as error:
            del self._opening_leases[id(lease)]
            self._count_opening(route, -1)
            self._on_failure(lease, error, began_us)
            return
        del self._opening_leases[id(lease)]
        self._count_opening(route, -1)
        self._counters.observe(route.route_id, Time.CONNECT, monotonic_us() - began_us)
        self._on_opened(lease, opened)

    def _on_failure(self, lease: Lease, error: ServerFault, began_us: int) -> None:
        """Who waits is told, unless waiting may help; the broker gets the slot back.

        While the route has servers a waiting client will get one of them: only with
        ``pool_acquire_fail_fast`` is it told at once.
        """
        route = lease.route
        lasted_us = self._outages.failed(route.route_id, began_us, monotonic_us())
        if route.failure is None or route.failure.log_text() != error.log_text():
            self._logger.error(
                f"server login failed: {error.log_text()}", context="server", who=self._who(lease)
            )
        route.failure = error
        self._counters.add_route(route.route_id, _ERROR_CONNECT)
        if route.is_replication:
            # As on a direct connection: what the next client asks for may well be granted.
            self.on_refused(lease.client, route)
            self._send(messages.OpenFailed(route.route_id, lease.slot, lease.generation, 0))
            return
        code = error.server_sqlstate if isinstance(error, PostgresError) else ""
        retry_ms = self._limits.server_login_retry if code == TOO_MANY_CONNECTIONS else RETRY_MS
        is_final = isinstance(error, PostgresError) and code not in TRANSIENT
        # Without pool_timeout nobody would ever be told: the limit of one connect bounds the wait.
        is_long = not route.rule.pool_timeout and lasted_us >= self._limits.backend_connect_timeout_ms * 1000
        is_busy = code == TOO_MANY_CONNECTIONS and route.rule.pool_timeout
        is_hopeless = (is_final or is_long) and not self._count_servers(route.route_id)
        if is_hopeless or route.rule.pool_acquire_fail_fast:
            self._relay.connect_failed(route.route_id, b"", only_setup=False)
        elif route.parameters is None and not is_busy:
            self._relay.connect_failed(route.route_id, b"", only_setup=True)
        self._send(messages.OpenFailed(route.route_id, lease.slot, lease.generation, retry_ms))

    def _on_opened(self, lease: Lease, opened: OpenServer) -> None:
        route = lease.route
        result = opened.result
        route.failure = None
        self._outages.over(route.route_id)
        now_us = monotonic_us()
        lifetime_us = route.rule.server_lifetime * 1_000_000
        if route.is_replication:
            lifetime_us = 0  # it lives as long as its client
        expires_us = now_us + int(lifetime_us * (1 - LIFETIME_SPREAD * random.random())) if lifetime_us else 0
        lease.state = messages.ServerState(
            server_id=server_id(lease.server_id),
            pid=result.pid,
            secret_hex=result.secret.hex(),
            endpoint=opened.address.text,
            parameters=result.parameters,
            initial_parameters=result.parameters,
            opened_at_us=now_us,
            expires_at_us=expires_us,
            uses=0,
            epoch=lease.epoch,
        )
        lease.fd = opened.stream.socket.detach()
        self._counters.add_route(route.route_id, RouteWord.SERVERS_OPENED)
        if self._is_session_logged:
            session = opened.stream.session
            how = "" if session is None else f", {session.facts}"
            self._logger.info(
                f"server connected, pid {result.pid}{how}", context="server", who=self._who(lease)
            )
        for notice in result.notices:
            self._logger.info(
                f"notice at login: {notice.get('M', '')}", context="server", who=self._who(lease)
            )
        # The relay first: until it has the server its client counts as waiting, and might be given another.
        initial = _set_of(result.parameters)
        self._adopt(lease, initial, initial, is_new=True, tls=opened.stream.session)
        self._send(
            messages.Opened(route.route_id, lease.slot, lease.generation, lease.state),
        )
        if not route.is_replication:
            self.learn(route, result.parameters, is_news=True)

    def _adopt(
        self,
        lease: Lease,
        parameters: ParameterSet,
        initial: ParameterSet,
        *,
        is_new: bool,
        tls: TlsSession | None = None,
    ) -> None:
        state, address = lease.state, lease.address
        assert state is not None
        assert address is not None
        handle = self._relay.adopt_server(
            lease.fd,
            lease.route.route_id,
            lease.server_id,
            parameters,
            initial,
            pid=state.pid,
            secret=bytes.fromhex(state.secret_hex),
            slot=lease.slot,
            generation=lease.generation,
            opened_us=state.opened_at_us,
            expires_us=state.expires_at_us,
            uses=state.uses,
            is_unix=isinstance(address.sockaddr, str),
            is_new=is_new,
            epoch=lease.epoch,
            client=lease.client,
            tls=tls,
        )
        self.leases[handle] = lease
        if self._is_ending:
            self._relay.close_server(handle, Reason.SHUTDOWN)

    def learn(self, route: Route, parameters: dict[str, str], *, is_news: bool) -> None:
        """What logins of this route are told; ``is_news``: from a server, so the broker is told, too."""
        if route.parameters == parameters:
            return
        route.parameters = parameters
        route.version += 1
        if is_news:
            self._send(messages.RouteParameters(route.route_id, parameters))

    # -- the relay speaks

    def on_event(self, handle: int, bits: int) -> None:
        """Events of one server (``relay/engine.pxd: EventBit``)."""
        lease = self.leases[handle]
        slot = (lease.route.route_id, lease.slot, lease.generation)
        if bits & ServerEvent.PINNED:
            record = self._relay.server(handle)
            who = self._who(lease)
            who.client = self._client_id(record["client"])
            self._logger.info(
                f"server pinned to its client by session state ({pin_names(record['pins'])})",
                context="server",
                who=who,
            )
        if bits & ServerEvent.PARAMS and not lease.route.is_replication:
            self._debug(lease, "reports other values than at its login")
            _, initial = self._relay.server_parameters(handle)
            self.learn(lease.route, _texts(initial), is_news=True)
        if bits & ServerEvent.CANCEL_WANTED:
            self._debug(lease, "its client left a query behind: it is cancelled")
            gevent.spawn(self._cancel, handle)
        if bits & ServerEvent.CLOSING:
            lease.is_closing = True
            self._send(messages.Closing(*slot))
        if bits & ServerEvent.STUCK:
            self._logger.error(
                "server was told to go and PostgreSQL has not closed the connection yet",
                context="server",
                who=self._who(lease),
            )
        if bits & ServerEvent.RELEASED:
            self._on_released(handle, lease)
        elif bits & ServerEvent.CLOSED:
            self._on_closed(handle, lease)

    def _on_released(self, handle: int, lease: Lease) -> None:
        fault_point("server_released")
        self._debug(lease, "goes to another worker")
        record = self._relay.server(handle)
        parameters, initial = self._relay.server_parameters(handle)
        assert lease.state is not None
        state = messages.ServerState(
            server_id=lease.state.server_id,
            pid=lease.state.pid,
            secret_hex=lease.state.secret_hex,
            endpoint=lease.state.endpoint,
            parameters=_texts(parameters),
            initial_parameters=_texts(initial),
            opened_at_us=lease.state.opened_at_us,
            expires_at_us=lease.state.expires_at_us,
            uses=record["uses"],
            epoch=lease.epoch,
        )
        del self.leases[handle]
        self._relay.free_server(handle)
        self._send(messages.Returned(lease.route.route_id, lease.slot, lease.generation, state))
        if self.broker is not None and not self.broker.is_attached:
            lease.state = state  # nobody is there to take it, and a successor will want to hear of it
            self._adopt(lease, parameters, initial, is_new=False)
            return
        os.close(lease.fd)

    def _on_closed(self, handle: int, lease: Lease) -> None:
        reason = Reason(self._relay.server(handle)["reason"])
        del self.leases[handle]
        self._relay.free_server(handle)
        os.close(lease.fd)
        self._send(messages.Closed(lease.route.route_id, lease.slot, lease.generation))
        if self._is_session_logged:
            self._logger.info(f"server disconnected: {reason.label}", context="server", who=self._who(lease))

    def whereabouts(self, handle: int) -> tuple[Address, Connector, bool] | None:
        """Where a server is, how to get there, its rule's ``log_debug``; None when the handle is stale."""
        lease = self.leases.get(handle)
        if lease is None or lease.address is None:
            return None
        rule = lease.route.rule
        return lease.address, self._connectors[rule.storage], rule.log_debug

    def close_all(self) -> None:
        """Told to go, all of them and those that are still being opened: the worker ends."""
        self._is_ending = True
        for handle in list(self.leases):
            with contextlib.suppress(KeyError):
                self._relay.close_server(handle, Reason.SHUTDOWN)

    def _send(self, message: Message, fds: Sequence[int] = ()) -> None:
        if self.broker is not None:
            self.broker.send(message, fds)

    def _debug(self, lease: Lease, message: str) -> None:
        if self._logger.is_debug or lease.route.rule.log_debug:
            self._logger.debug(message, context="server", who=self._who(lease), is_wanted=True)

    def _client_id(self, handle: int) -> str:
        """The id of a server's client; empty for none, or one that is gone."""
        try:
            return client_id(self._relay.client(handle)["id"]) if handle else ""
        except KeyError:
            return ""

    def _who(self, lease: Lease) -> LogContext:
        return LogContext(
            server=server_id(lease.server_id),
            user=lease.route.user,
            database=lease.route.database,
            server_host="" if lease.address is None else lease.address.text,
        )


_ERROR_CONNECT: Final = 24 + Reason.SERVER_CONNECT

_PIN_NAMES: Final = (
    (1, "SET"),
    (2, "LISTEN"),
    (4, "PREPARE"),
    (8, "temporary object"),
    (16, "cursor WITH HOLD"),
    (32, "advisory lock"),
    (64, "LOAD"),
    (128, "named prepared statement"),
)


@lru_cache
def pin_names(pins: int) -> str:
    """What binds a server to its client, for people."""
    return ", ".join(name for bit, name in _PIN_NAMES if pins & bit)


def _set_of(parameters: dict[str, str], reported: dict[str, str] | None = None) -> ParameterSet:
    """A relay set; names not in ``reported`` were deployed, not reported."""
    if reported is None:
        reported = parameters
    result = ParameterSet.of(
        {encode(name): encode(value) for name, value in parameters.items() if name in reported},
        True,
        READ_ONLY,
    )
    others = {encode(name): encode(value) for name, value in parameters.items() if name not in reported}
    return result.merged(ParameterSet.of(others, False)) if others else result


def _texts(parameters: ParameterSet) -> dict[str, str]:
    return {decode(name): decode(value) for name, value in parameters.items()}
