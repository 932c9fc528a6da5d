"""The broker process: the service of leases, and statistics over all workers."""

import os
import socket
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence

import gevent

from gpooler import faults
from gpooler.broker.acts import Entrust
from gpooler.broker.book import Inherited, RuleLimits
from gpooler.broker.codec import ChannelProtocolError, Message
from gpooler.broker.ledger import Ledger
from gpooler.broker.messages import WorkerId
from gpooler.broker.service import BrokerService
from gpooler.broker.slots import Route, RouteKey, SlotName
from gpooler.clock import monotonic_us
from gpooler.config.certificates import expiries, expiry_warnings
from gpooler.config.model import Config, Rule
from gpooler.config.succession import base_name
from gpooler.config.words import StorageType
from gpooler.console.facts import AVERAGED, QuantileFact, RouteFact, quantile_text, to_cells
from gpooler.console.spec import Need
from gpooler.log import Logger
from gpooler.logs.direct import Log
from gpooler.logs.queued import open_log
from gpooler.net.resolve import Address
from gpooler.net.tls import Connector, connectors, prepare
from gpooler.process import control
from gpooler.process.channels import Channel, ChannelClosed
from gpooler.process.context import EXIT_BOOT, EXIT_OK, BrokerContext, Phase
from gpooler.process.fork import EXIT_CRASH
from gpooler.process.heartbeat import beat
from gpooler.process.patch import patch
from gpooler.process.reload import Candidate
from gpooler.process.settings import log_settings
from gpooler.process.soft_oom import MemoryWatch
from gpooler.routing.rules import is_of_database
from gpooler.server.cancel import send_cancel
from gpooler.stats.history import History
from gpooler.stats.quantiles import asked_for
from gpooler.stats.registry import MAX_ROUTES, ProcessWord
from gpooler.stats.shared import SharedCounters, Totals
from gpooler.stats.snapshot import NamedRoute, RouteName
from gpooler.stats.telemetry import Telemetry
from gpooler.stats.web import Web

_READY_PAUSE_S = 0.05
_DAY_S = 86_400
FACTS_AT_ONCE = 100  # in one message for the console


def run_broker(context: BrokerContext) -> int:
    """Body of the broker process; returns its exit status (``process/context.py``)."""
    patch()
    context.counters.set_process(ProcessWord.PID, os.getpid())
    if context.is_debug:
        faults.connect("broker")
    try:
        log = open_log(
            context.log, lambda total: context.counters.set_process(ProcessWord.LOG_LINES_LOST, total)
        )
    except (OSError, ValueError, KeyError):
        traceback.print_exc()
        return EXIT_BOOT
    try:
        return Broker(context, log).run()
    finally:
        log.close()


def rule_limits(config: Config) -> dict[str, RuleLimits]:
    """What the ledger must know of the rules whose routes have servers, by name."""
    return {
        rule.name: _limits(config, rule)
        for rule in config.served
        if config.storage[rule.storage].type is StorageType.REMOTE
    }


def _limits(config: Config, rule: Rule) -> RuleLimits:
    database = rule.storage_db or (None if rule.is_default_database else rule.database)
    user = rule.storage_user or (None if rule.is_default_user else rule.user)
    if rule.ldap_storage_credentials:
        user = None  # as the directory says
    has_one = database is not None and user is not None and rule in config.rules
    is_paused = any(not name or is_of_database(rule, "", name) for name in config.pauses)
    return RuleLimits(
        storage=rule.storage,
        pool_size=rule.pool_size or None,
        min_pool_size=rule.min_pool_size if has_one and not is_paused else 0,
        shared_pool=rule.shared_pool,
        reset_timeout_ms=rule.pool_reset_timeout_ms,
        database=database,
        user=user,
        pool=base_name(rule),
        epoch=rule.epoch,
    )


def login_limits(config: Config, workers: int) -> dict[str, int]:
    """Server logins at once by storage."""
    return {name: storage.routing_limit(workers) for name, storage in config.storage.items()}


def shared_pools(config: Config) -> dict[str, int]:
    """Sizes by name."""
    return {name: pool.pool_size for name, pool in config.shared_pool.items()}


def _sleep_a_day() -> None:
    gevent.sleep(_DAY_S)


def warn_daily(
    warnings: Callable[[], Iterable[str]], logger: Logger, pause: Callable[[], None] = _sleep_a_day
) -> None:
    """Log ``warnings`` after each ``pause``, for ever; those of the start are the configuration's own."""
    while True:
        pause()
        for text in warnings():
            logger.info(f"warning: {text}", context="config")


def _has_console(config: Config) -> bool:
    return any(storage.type is StorageType.LOCAL for storage in config.storage.values())


def _reported(config: Config) -> tuple[object, ...]:
    """What says who is told of statistics, and how often."""
    has_quantiles = any(rule.quantiles for rule in config.rules)
    return config.logging, config.metrics, _has_console(config), has_quantiles


class Broker:
    """Obeys the master and runs the service."""

    def __init__(self, context: BrokerContext, log: Log) -> None:
        self._context = context
        self._log = log
        self._logger = log.logger
        config = context.config
        self._totals = Totals(context.past)
        self._history = History()
        self._incarnations: dict[int, int] = {}  # whose counters are attached, by worker number
        self._control = Channel(context.control, control.CODEC)
        self._config = config
        self._candidate = Candidate(self._make_ready)
        self._reporters: list[gevent.Greenlet] = []
        prepare(config)
        self._use(config, connectors(config))
        logins = login_limits(config, context.workers)
        self._service = BrokerService(
            Ledger(rule_limits(config), shared_pools(config), logins, MAX_ROUTES),
            self._totals.workers,
            self._cancel,
            self,
            self._logger,
            is_checked=context.is_debug,
            is_session_logged=config.logging.log_session,
        )
        self._telemetry = self._make_telemetry()
        self._memory = MemoryWatch(context.past, self._logger)
        self._web: Web | None = None
        if context.metrics_listeners:
            sockets = [listener.socket for listener in context.metrics_listeners]
            self._web = Web(sockets, self._render, self._unready, self._logger)

    def run(self) -> int:
        """Serve until the master is gone. Yields. Returns the exit status."""
        greenlets = [
            gevent.spawn(beat, self._context.counters),
            gevent.spawn(self._obey),
            gevent.spawn(warn_daily, lambda: expiry_warnings(self._config), self._logger),
        ]
        self._reporters = list(self._start_reporters())
        # EOF of the master is the planned end; a failure of the service ends the process for a successor.
        done = gevent.wait([greenlets[1], self._service.failed], count=1)[0]
        gevent.killall(greenlets + self._reporters)
        self._memory.close()
        self._service.close()
        if self._web is not None:
            self._web.close()
        return EXIT_CRASH if done is self._service.failed else EXIT_OK

    def _obey(self) -> None:
        try:
            while (item := self._control.receive()) is not None:
                self._on_control(*item)
        except (ChannelClosed, ChannelProtocolError) as error:
            self._logger.fatal(f"the master's channel broke: {error}", context="broker")

    def _on_control(self, message: Message, fds: list[int]) -> None:
        match message:
            case control.AttachWorker(worker=worker, incarnation=incarnation, has_history=has_history):
                self._totals.attach(worker, SharedCounters.attach(fds[1]))
                self._incarnations[worker] = incarnation
                self._service.attach(WorkerId(worker, incarnation), has_history, socket.socket(fileno=fds[0]))
            case control.DetachWorker(worker=worker, incarnation=incarnation):
                if self._incarnations.get(worker) == incarnation:
                    self._totals.detach(worker)
                self._service.detach(WorkerId(worker, incarnation))
            case control.HeldServer(route_id=route_id, slot=slot) as held:
                key = RouteKey(held.rule, held.database, held.user, held.is_replication)
                server = Inherited(key, held.endpoint, held.pid, held.secret_hex)
                self._service.inherit(SlotName(route_id, slot), server, fds[0])
            case control.Serve(is_settled=is_settled):
                self._service.serve(is_settled, self._first_new_id())
                self._memory.configure(self._config.soft_oom)  # no other broker does by now
                if self._web is not None:  # not before all workers are known that make us ready
                    self._web.start()
                self._control.send(control.Ready(os.getpid()))
            case control.AwaitGone(token=token, name=name):
                gevent.spawn(self._await_gone, token, name)
            case control.ReopenLog():
                self._log.reopen()
            case control.Prepare(serial=serial):
                self._control.send(control.Prepared(serial, self._candidate.prepare(serial, fds[0])))
            case control.Commit(serial=serial):
                self._commit(*self._candidate.take(serial, fds[0], self._log, "broker"))
                self._control.send(control.Committed(serial))

    def _use(self, config: Config, connectors: dict[str, Connector]) -> None:
        self._config = config
        self._rules = {rule.name: rule for rule in (*config.served, *config.removed)}
        self._connectors = connectors

    @staticmethod
    def _make_ready(config: Config) -> tuple[Config, dict[str, Connector]]:
        """All that can fail. Raises ConfigurationError."""
        prepare(config)
        return config, connectors(config)

    def _commit(self, config: Config, connectors: dict[str, Connector]) -> None:
        """Go on by what was prepared."""
        before = self._config
        self._use(config, connectors)
        if log_settings(config) != log_settings(before):
            self._log.configure(log_settings(config))
        self._memory.configure(config.soft_oom)
        if _reported(config) != _reported(before):
            gevent.killall(self._reporters)
            self._telemetry = self._make_telemetry()
            self._reporters = list(self._start_reporters())
        logins = login_limits(config, self._context.workers)
        self._service.configure(
            rule_limits(config),
            shared_pools(config),
            logins,
            is_session_logged=config.logging.log_session,
        )

    def _first_new_id(self) -> int:
        """Route ids below may have been given out by an earlier broker: something was counted under them."""
        used = [
            route_id
            for counters in (self._context.past, *self._totals.workers.values())
            for route_id in counters.used_routes()
            if any(counters.route_block(route_id))
        ]
        return max(used, default=-1) + 1

    def _await_gone(self, token: int, name: str) -> None:
        """Servers are given to none whose route is paused, but a wish may be on its way: look twice."""
        looks = 0
        while looks < 2:
            if name not in self._config.pauses:
                return  # resumed
            looks = 0 if self._has_slots(name) else looks + 1
            gevent.sleep(_READY_PAUSE_S)
        self._control.send(control.AllGone(token))

    def _has_slots(self, name: str) -> bool:
        """Whether a database has a server, or may have one soon."""
        if not self._service.ledger.is_ready:
            return True
        return any(
            route.slots and not route.key.is_replication and self._is_of_database(route, name)
            for route in self._service.ledger.routes.values()
        )

    def _is_of_database(self, route: Route, name: str) -> bool:
        rule = self._rules.get(route.key.rule)
        return not name or (rule is not None and is_of_database(rule, route.key.database, name))

    def complain(self, worker: WorkerId, text: str) -> None:
        """``broker.service.Master``."""
        self._control.send(control.Complaint(worker.worker, worker.incarnation, text))

    def hold(self, server: Entrust, fd: int) -> None:
        """``broker.service.Master``."""
        rule, database, user, is_replication = server.key
        held = control.HeldServer(
            *server.slot,
            rule,
            database,
            user,
            is_replication,
            server.endpoint,
            server.pid,
            server.secret_hex,
        )
        self._control.send(held, [fd])

    def let(self, slot: SlotName) -> None:
        """``broker.service.Master``."""
        self._control.send(control.LetServer(*slot))

    def rows(self, what: str) -> Iterator[Sequence[tuple[str | int | None, ...]]]:
        """``broker.service.Master``."""
        facts: list[RouteFact | QuantileFact] = []
        if what == Need.ROUTES.value:
            facts.extend(self._route_fact(route) for route in self._service.ledger.routes.values())
        elif what == Need.QUANTILES.value:
            facts.extend(self._quantiles())
        for at in range(0, len(facts), FACTS_AT_ONCE):
            yield [to_cells(fact) for fact in facts[at : at + FACTS_AT_ONCE]]

    def _route_fact(self, route: Route) -> RouteFact:
        key = route.key
        before = self._history.before(route.route_id, [0] * len(AVERAGED))
        return RouteFact(route.route_id, key.rule, key.database, key.user, int(key.is_replication), *before)

    def _quantiles(self) -> Iterator[QuantileFact]:
        each, all_of_them = self._telemetry.quantiles(asked_for(self._config.rules))
        for route, time, q, us in each:
            yield QuantileFact(*route, time.name.lower(), quantile_text(q), int(us))
        for time, q, us in all_of_them:
            yield QuantileFact(None, None, time.name.lower(), quantile_text(q), int(us))

    def _remember(self) -> None:
        """What the console's averages are made of, each ``stats_interval``; without a console nothing."""
        if not _has_console(self._config):
            return
        while True:
            words = {}
            for route_id in list(self._service.ledger.routes):
                block = self._totals.route(route_id)
                words[route_id] = tuple(block[word] for word in AVERAGED)
            self._history.add(monotonic_us(), words)
            gevent.sleep(self._config.logging.stats_interval)

    def _start_reporters(self) -> Iterator[gevent.Greenlet]:
        yield gevent.spawn(self._remember)
        if self._telemetry.has_reports:
            yield gevent.spawn(self._report)

    def _make_telemetry(self) -> Telemetry:
        return Telemetry(
            self._config,
            self._totals,
            self._named_routes,
            is_draining=lambda: self._context.past.process(ProcessWord.PHASE) > Phase.SERVING,
            expiries=lambda: expiries(self._config),
            logger=self._logger,
        )

    def _report(self) -> None:
        """Begin when the workers have said which routes there are: what those counted before is no news."""
        self._await_routes()
        self._telemetry.run()

    def _render(self, accept: str) -> tuple[bytes, str]:
        """The metrics for Prometheus. Yields."""
        self._await_routes()
        return self._telemetry.render(accept)

    def _await_routes(self) -> None:
        while not self._service.ledger.is_ready:
            gevent.sleep(_READY_PAUSE_S)

    def _named_routes(self) -> list[NamedRoute]:
        return [self._name(route) for route in self._service.ledger.routes.values()]

    def _unready(self) -> str:
        """Why load balancers should send nobody here; the broker itself may be new and still learn."""
        phase = Phase(self._context.past.process(ProcessWord.PHASE))
        if phase > Phase.SERVING:
            return "draining"
        # old workers accept until the new ones do (process/handover.py)
        if not any(counters.process(ProcessWord.LISTENING) for counters in self._totals.workers.values()):
            return "starting" if phase is Phase.BOOTING else "no worker accepts clients"
        return ""

    def _cancel(self, rule: str, endpoint: str, pid: int, secret: bytes, timeout_ms: int) -> None:
        """Deliver a cancel request. Yields. Raises ServerConnectFailed, ValueError."""
        known = self._rules.get(rule)
        connector = None if known is None else self._connectors[known.storage]
        send_cancel(Address.parse(endpoint), pid, secret, timeout_ms, connector)

    def _name(self, route: Route) -> NamedRoute:
        """A route as the rule is called; for ``default`` by the names on the server."""
        rule = self._rules[route.key.rule]
        database = route.key.database if rule.is_default_database else rule.database
        user = route.key.user if rule.is_default_user else rule.user
        return NamedRoute(route.route_id, RouteName(database, user), rule.quantiles)
