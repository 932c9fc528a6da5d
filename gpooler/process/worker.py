"""A worker process: puts its parts together and obeys the master."""

import hashlib
import os
import socket
from dataclasses import dataclass
from typing import Final, NoReturn

import gevent
from gevent import get_hub
from gevent.event import AsyncResult, Event
from gevent.monkey import get_original

from gpooler import faults
from gpooler.auth.failures import Failures
from gpooler.auth.groups import Groups
from gpooler.auth.query import Queries
from gpooler.broker import messages as broker_messages
from gpooler.broker.client import BrokerClient, Report
from gpooler.broker.codec import ChannelProtocolError, Codec, Message
from gpooler.client import peers
from gpooler.client.admission import Admission
from gpooler.client.agents import Agents
from gpooler.client.cancels import Cancels
from gpooler.client.clients import Clients
from gpooler.client.handshakes import Handshakes
from gpooler.client.login import Login
from gpooler.client.password_checks import missing_libraries
from gpooler.client.peer_channels import PeerChannels
from gpooler.client.refusals import Refusals
from gpooler.client.sources import Sources
from gpooler.clock import monotonic_us
from gpooler.config.model import Config, Rule
from gpooler.config.words import Pause
from gpooler.console.acts import Acts
from gpooler.console.asker import BROKER, Asker
from gpooler.console.clients import ConsoleClients
from gpooler.console.gather import Gatherer
from gpooler.console.sources import Sources as ConsoleSources
from gpooler.errors import ConfigurationError
from gpooler.log import parse_client_id
from gpooler.logs.direct import Log
from gpooler.logs.queued import open_log
from gpooler.net.host_names import HostNames
from gpooler.net.listen import Listener
from gpooler.net.resolve import Resolver
from gpooler.net.tcp import tcp_settings
from gpooler.net.tls import acceptors, connectors, prepare
from gpooler.process import control
from gpooler.process.channels import Channel, ChannelClosed
from gpooler.process.context import EXIT_BOOT, EXIT_OK, WorkerContext
from gpooler.process.fork import EXIT_CRASH
from gpooler.process.heartbeat import beat
from gpooler.process.patch import patch
from gpooler.process.relay_options import has_quiet_ends, route_options
from gpooler.process.reload import Candidate, take_over
from gpooler.process.settings import log_settings
from gpooler.reasons import Reason
from gpooler.relay.events import RouteEvent
from gpooler.relay.relay import Relay
from gpooler.routing.route import Route, RouteKey, endpoint_of, key_of
from gpooler.routing.rules import is_of_database
from gpooler.server.servers import Servers
from gpooler.stats.registry import ProcessWord, RouteWord
from gpooler.stats.shared import SharedCounters

DRAIN_TICK_S: Final = 0.1


def run_worker(context: WorkerContext) -> int:
    """Body of a worker process; returns its exit status (``process/context.py``)."""
    patch()
    if context.is_debug:
        faults.connect(f"worker {context.worker}")
    log = open_log(context.log, lambda total: context.counters.set_process(ProcessWord.LOG_LINES_LOST, total))
    try:
        prepare(context.config)
        worker = Worker(context, log)
    except ConfigurationError as error:
        log.logger.fatal(error.log_text(), context="worker")
        log.close()
        return EXIT_BOOT
    return worker.run()


class WorkerTls:
    """What TLS needs of a configuration: all that reads files."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigurationError."""
        self.acceptors = acceptors(config)
        self.connectors = connectors(config)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A configuration that may come into force."""

    config: Config
    tls: WorkerTls
    agents: Agents


class Worker:
    """One worker. Everything but the relay runs in this process' hub."""

    def __init__(self, context: WorkerContext, log: Log) -> None:
        """Raises ConfigurationError."""
        self._context = context
        config, counters = context.config, context.counters
        self._config = config
        self._counters = counters
        self._log = log
        self._logger = self._log.logger
        tls = WorkerTls(config)
        agents = Agents(config, self._logger)
        # the same in every worker: they call the same statements by the same names
        statement_key = hashlib.sha256(b"prepared statements" + context.mock_key).digest()[:16]
        self._relay = Relay(counters.address, context.worker, has_quiet_ends(config), statement_key)
        self._admission = Admission(counters, context.past)
        self._peers = PeerChannels()
        self._cancels = Cancels(
            context.worker, context.workers, config.limits, self._relay, counters, self._peers, self._logger
        )
        self._resolver = Resolver(config.performance.dns_cache_ttl)
        # with connections of their own: a group's query that hangs takes none from a login's
        self._groups = Groups(config, Queries(config, self._resolver), self._logger)
        self._hosts = HostNames(self._logger)
        queries = Queries(config, self._resolver)
        self._sources = Sources(config, agents, queries, context.mock_key, self._logger)
        self._failures = Failures(config.limits, context.failures, context.worker, context.mock_key)
        self._servers = Servers(
            config,
            self._relay,
            counters,
            self._resolver,
            self._logger,
            self._cancels.deliver,
            lambda route_id: self._admission.total(
                route_id, RouteWord.SERVERS_ACTIVE, RouteWord.SERVERS_IDLE
            ),
            tls.connectors,
        )
        self._cancels.whereabouts = self._servers.whereabouts
        self._clients = Clients(
            config,
            self._relay,
            counters,
            self._admission,
            context.listeners,
            self._logger,
            self._servers.routes,
            self._servers.awaited,
        )
        self._servers.on_refused = self._clients.refuse
        refusals = Refusals(config.limits, counters, self._admission, self._failures, self._logger)
        self._login = self._clients.login = Login(
            config,
            tls.acceptors,
            self._relay,
            counters,
            self._admission,
            self,
            self._cancels,
            self._logger,
            context.workers,
            context.mock_key,
            self._sources,
            self._groups,
            self._hosts,
            self._clients.names,
            self._clients.on_adopted,
            refusals,
            Handshakes(refusals, self._logger),
        )
        self._broker = BrokerClient(self._hello, self, counters, self._logger)
        self._servers.broker = self._broker
        self._console_sources = ConsoleSources(
            context.worker,
            self._relay,
            counters,
            self._clients,
            self._servers,
            self._resolver,
            self._hosts,
            self._failures,
            lambda: self._consoles.all,
        )
        facts = self._console_sources.facts
        self._asker = Asker(self._peers, self._broker, facts)
        gatherer = Gatherer(lambda: self._config, self._admission, counters, context.past, facts, self._asker)
        acts = Acts(lambda: self._config, self.act, gatherer.find_client, self._logger)
        self._consoles = ConsoleClients(lambda: self._config, counters, gatherer, acts, self._logger)
        self._login.console = self._consoles
        self._rules = {rule.name: rule for rule in config.served}
        self._routes: dict[RouteKey, Route] = {}
        self._opening: dict[RouteKey, Event] = {}
        self._recalls: dict[int, tuple[int, int]] = {}  # token → (route id, recall id)
        self._drops: dict[int, AsyncResult] = {}
        self._candidate = Candidate(self._make_ready)
        self._opened: list[Listener] = []  # of the configuration that is committed next
        self._acts: dict[int, AsyncResult] = {}  # asked of the master
        self._next_act = 1
        self._is_draining = False
        self._ended = Event()

    def run(self) -> int:
        """Serve until told to stop."""
        self._counters.set_process(ProcessWord.PID, os.getpid())
        # A bare native thread: the hub's pool is for work that ends.
        get_original("_thread", "start_new_thread")(self._relay.run, ())
        watcher = get_hub().loop.io(self._relay.event_fd, 1)
        watcher.start(self._on_relay)
        gevent.spawn(beat, self._counters)
        self._hosts.prepare(self._config)
        self._hosts.configure(self._config)
        self._control = Channel(self._context.control, control.CODEC)
        gevent.spawn(self._obey)
        self._groups.start()
        self._clients.start()
        self._control.send(control.Ready(os.getpid()))
        self._ended.wait()
        self._relay.stop()
        self._log.close()
        return EXIT_OK

    # -- the master speaks

    def _obey(self) -> None:
        try:
            while (item := self._control.receive()) is not None:
                self._on_control(*item)
        except (ChannelClosed, ChannelProtocolError) as error:
            self._logger.fatal(f"the master's channel broke: {error}")
        os._exit(EXIT_OK)  # the master is gone: nothing is left to serve

    def _on_control(self, message: Message, fds: list[int]) -> None:
        match message:
            case control.AttachBroker():
                self._broker.attach(_channel(fds[0], broker_messages.CODEC))
            case control.AttachPeer(worker=worker, incarnation=incarnation):
                self._admission.peers[incarnation] = SharedCounters.attach(fds[1])
                self._peers.attach(worker, _channel(fds[0], peers.CODEC))
            case control.DetachPeer(worker=worker, incarnation=incarnation):
                gone = self._admission.peers.pop(incarnation, None)
                if gone is not None:
                    gone.close()
                self._peers.detach(worker)
            case control.ReopenLog():
                self._log.reopen()
            case control.Prepare(serial=serial):
                self._control.send(control.Prepared(serial, self._candidate.prepare(serial, fds[0])))
            case control.Commit(serial=serial):
                self._commit(self._candidate.take(serial, fds[0], self._log, "worker"))
                self._control.send(control.Committed(serial))
            case control.Listen(number=number, host=host, port=port, is_unix=is_unix):
                listener = Listener(number, socket.socket(fileno=fds[0]), host, port, is_unix)
                self._opened.append(listener)
            case control.Kill(serial=serial, name=name, is_client=is_client):
                count = self._kill_client(name) if is_client else self._kill_database(name)
                self._control.send(control.Killed(serial, count))
            case control.Acted(token=token):
                if token in self._acts:
                    self._acts[token].set(message)
            case control.Drain(is_patient=is_patient, lets_in=lets_in):
                if not self._is_draining:
                    self._is_draining = True
                    gevent.spawn(self._drain, is_patient, lets_in)

    # -- another configuration

    def _make_ready(self, config: Config) -> Prepared:
        """All that can fail. Raises ConfigurationError."""
        config = take_over(config, self._config)
        prepare(config)
        if missing := missing_libraries(config):
            raise ConfigurationError(f"{missing} is used for the first time: that needs a restart")
        agents = Agents(config, self._logger, self._sources.agents)
        tls = WorkerTls(config)
        self._hosts.prepare(config)
        return Prepared(config, tls, agents)

    def _commit(self, prepared: Prepared) -> None:
        """Go on by what was prepared."""
        before, config = self._config, prepared.config
        self._config = config
        if log_settings(config) != log_settings(before):
            self._log.configure(log_settings(config))
        self._relay.set_quiet_ends(has_quiet_ends(config))
        self._resolver.ttl_us = config.performance.dns_cache_ttl * 1000
        self._rules = {rule.name: rule for rule in config.served}
        self._cancels.configure(config.limits)
        self._failures.configure(config.limits)
        self._servers.configure(config, prepared.tls.connectors)
        self._clients.configure(config)
        opened, self._opened = self._opened, []
        for listener in opened:
            if self._is_draining:
                listener.socket.close()
            else:
                self._clients.listen(listener)
        if config != before:
            self._sources.configure(config, prepared.agents, Queries(config, self._resolver))
            self._groups.configure(config, Queries(config, self._resolver))
        self._hosts.configure(config)
        self._login.configure(config, prepared.tls.acceptors)
        for route in self._servers.routes.values():
            self._reconfigure(route)
            self._relay.pause(route.route_id, self._pause_of(route))

    def _reconfigure(self, route: Route) -> None:
        """Go on by the rule as it is now; without one the clients are sent away."""
        rule = self._rules.get(route.key.rule)
        names = None if rule is None else route.names_under(rule)
        if rule is None or names is None:
            self._relay.end_route(route.route_id)
        if rule is None:
            return
        if rule is route.rule:
            self._tell_relay(route)  # of what other sections say
            return
        route.rule = rule
        if names is not None:
            route.database, route.user = names
        route.endpoint = endpoint_of(self._config, rule)
        route.socket_options = tuple(tcp_settings(self._config.performance, rule).options())
        route.version += 1  # who is logging in looks again
        self._tell_relay(route)
        if rule.epoch > route.epoch:
            route.epoch = rule.epoch
            route.failure = None
            self._relay.outdate(route.route_id, route.epoch)

    # -- operators

    def act(self, verb: str, argument: str) -> tuple[bool, str]:
        """Have the master do something (``process/operations.py``); whether it did, and in words. Yields."""
        token = self._next_act
        self._next_act += 1
        self._acts[token] = answer = AsyncResult()
        self._control.send(control.Act(token, verb, argument))
        try:
            acted: control.Acted = answer.get()
        finally:
            del self._acts[token]
        return acted.is_good, acted.text

    def _pause_of(self, route: Route) -> Pause:
        modes = (
            mode
            for name, mode in self._config.pauses.items()
            if not name or is_of_database(route.rule, route.key.database, name)
        )
        return max(modes, default=Pause.NONE)

    def _kill_database(self, name: str) -> int:
        count = 0
        for route in self._servers.routes.values():
            if not name or is_of_database(route.rule, route.key.database, name):
                count += self._counters.route(route.route_id, RouteWord.CLIENTS)
                self._relay.kill_route(route.route_id)
        return count

    def _kill_client(self, name: str) -> int:
        number = parse_client_id(name)
        handle = None if number is None else self._relay.find_client(number)
        if handle is None:
            return 0
        self._relay.end_client(handle, Reason.CLIENT_KILLED)
        return 1

    # -- drain

    def _drain(self, is_patient: bool, lets_in: bool) -> None:
        """Clients are dropped between transactions at the configured rate; then the servers are closed."""
        options = self._config.service.conn_drop_options
        self._clients.drain(lets_in=lets_in)
        self._broker.send(broker_messages.Draining())
        next_drop_us = monotonic_us()
        while True:
            count = 0
            if options.drop_enabled and not is_patient and monotonic_us() >= next_drop_us:
                count = options.rate
                next_drop_us += options.interval_ms * 1000
            answer: AsyncResult = AsyncResult()
            self._drops[self._relay.drop_idle(count)] = answer
            dropped, left = answer.get()
            if not left and not self._clients.has_guests and not self._counters.process(ProcessWord.CLIENTS):
                break
            if dropped and options.rate > dropped:
                continue
            gevent.sleep(min(DRAIN_TICK_S, max(0.001, (next_drop_us - monotonic_us()) / 1e6)))
        self._servers.close_all()
        while self._servers.leases:
            gevent.sleep(DRAIN_TICK_S)
        self._consoles.close()
        self._logger.info("worker drained", context="worker")
        self._ended.set()

    # -- routes

    def known(self, rule: Rule, database: str, user: str, is_replication: bool) -> Route | None:
        """The route of a client, None when it is new here (``client.login.Routes``)."""
        return self._routes.get(key_of(rule, database, user, is_replication))

    def open(self, rule: Rule, database: str, user: str, is_replication: bool) -> Route:
        """The route of a client (``client.login.Routes``). Yields when it is new. Raises GpoolerError."""
        key = key_of(rule, database, user, is_replication)
        if is_replication:
            self._open(key.pool)  # which counts its clients
        return self._open(key)

    def _open(self, key: RouteKey) -> Route:
        route = self._routes.get(key)
        while route is None:
            opening = self._opening.get(key)
            if opening is not None:
                opening.wait()
                route = self._routes.get(key)
                continue
            self._opening[key] = opening = Event()
            try:
                opened = self._broker.open_route(key.rule, key.database, key.user, key.is_replication)
                route = self._make_route(opened.route_id, key, opened.parameters)
            finally:
                del self._opening[key]
                opening.set()
        return route

    def _make_route(self, route_id: int, key: RouteKey, parameters: dict[str, str] | None) -> Route:
        known = self._servers.routes.get(route_id)
        if known is not None:
            return known
        rule = self._rules[key.rule]
        route = Route(
            route_id,
            key,
            rule,
            key.database,
            key.user,
            endpoint_of(self._config, rule),
            tuple(tcp_settings(self._config.performance, rule).options()),
            admission_id=self._routes[key.pool].route_id if key.is_replication else route_id,
        )
        if parameters is not None:
            self._servers.learn(route, parameters, is_news=False)
        self._tell_relay(route)
        self._relay.pause(route_id, self._pause_of(route))
        self._servers.routes[route_id] = route
        self._routes[key] = route
        return route

    def _tell_relay(self, route: Route) -> None:
        """Of a new route, or of what its rule says now."""
        self._relay.open_route(route.route_id, **route_options(self._config, route))

    # -- the broker speaks

    def _hello(self) -> broker_messages.Hello:
        context = self._context
        return broker_messages.Hello(
            broker_messages.PROTOCOL_VERSION, os.getpid(), context.worker, context.incarnation
        )

    def report(self) -> Report:
        """What a new broker must know (``broker.client.Worker``)."""
        result: Report = []
        for route in self._servers.routes.values():
            key = route.key
            report = broker_messages.ReportRoute(
                route.route_id, key.rule, key.database, key.user, key.is_replication
            )
            result.append((report, []))
            if route.parameters is not None:
                result.append((broker_messages.RouteParameters(route.route_id, route.parameters), []))
        result.extend(self._servers.report())
        if self._is_draining:
            result.append((broker_messages.Draining(), []))
        return result

    def on_broker_gone(self) -> None:
        """``broker.client.Worker``."""
        self._asker.on_gone(BROKER)
        self._recalls.clear()
        self._relay.forget_recalls()

    def on_broker_nonsense(self, cause: str) -> NoReturn:
        """``broker.client.Worker``."""
        self._logger.fatal(f"cannot obey the broker: {cause}", context="worker")
        self._log.close()
        os._exit(EXIT_CRASH)

    def on_broker_message(self, message: Message, fds: list[int]) -> None:
        """``broker.client.Worker``."""
        match message:
            case broker_messages.Welcome(version=broker_messages.PROTOCOL_VERSION):
                pass
            case broker_messages.GrantOpen(route_id=route_id, slot=slot, generation=generation):
                self._servers.on_grant_open(route_id, slot, generation)
            case broker_messages.GrantServer(
                route_id=route_id, slot=slot, generation=generation, state=state
            ):
                self._servers.on_grant_server(route_id, slot, generation, state, fds[0])
            case broker_messages.Recall(
                route_id=route_id, recall_id=recall_id, count=count, is_eviction=is_eviction
            ):
                token = self._servers.on_recall(route_id, recall_id, count, is_eviction)
                self._recalls[token] = (route_id, recall_id)
            case broker_messages.Keep(route_id=route_id, count=count):
                self._servers.on_keep(route_id, count)
            case broker_messages.RouteParameters(route_id=route_id, parameters=parameters):
                self._servers.learn(self._servers.routes[route_id], parameters, is_news=False)
            case broker_messages.RouteOpened(
                route_id=route_id,
                rule=rule,
                database=database,
                user=user,
                is_replication=is_replication,
                parameters=known,
            ):
                self._make_route(route_id, RouteKey(rule, database, user, is_replication), known)
            case broker_messages.Rows():
                self._asker.on_rows(BROKER, message)
            case _:
                raise ChannelProtocolError(f"{message} out of place")

    # -- the relay speaks

    def _on_relay(self) -> None:
        """In the hub: nothing here waits."""
        events = self._relay.poll()
        self._clients.log_texts()  # before the records of those who sent them are given back
        for kind, subject, what in events:
            if kind == "c":
                self._clients.on_event(subject, what)
            elif kind == "s":
                self._servers.on_event(subject, what)
            elif kind == "r":
                self._on_route(subject, what)
            elif kind == "l":
                self._console_sources.on_reply(subject, what)
            else:
                self._on_reply(subject, what)

    def _on_route(self, route_id: int, bits: int) -> None:
        if bits & RouteEvent.DEMAND:
            waiting = self._counters.route(route_id, RouteWord.CLIENTS_WAITING)
            self._broker.want(route_id, max(1, waiting))
        elif bits & RouteEvent.CALM:
            self._broker.want(route_id, 0)

    def _on_reply(self, token: int, reply: tuple[int, int, int]) -> None:
        now, later, _ = reply
        recall = self._recalls.pop(token, None)
        if recall is not None:
            self._broker.send(broker_messages.RecallAnswer(*recall, now, later))
            return
        drop = self._drops.pop(token, None)
        if drop is not None:
            drop.set((now, later))
            return
        self._cancels.on_reply(token, reply)


def _channel(fd: int, codec: Codec) -> Channel:
    """A channel over a descriptor that the master sent."""
    return Channel(socket.socket(fileno=fd), codec)
