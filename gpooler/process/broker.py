"""The broker process: the service of leases, and statistics over all workers."""

import os
import socket
import traceback
from collections.abc import Iterator

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
from gpooler.config.model import Config, Rule
from gpooler.config.words import StorageType
from gpooler.logs.direct import Log
from gpooler.logs.queued import open_log
from gpooler.net.resolve import Address
from gpooler.net.tls import connectors, prepare
from gpooler.process import control
from gpooler.process.channels import Channel, ChannelClosed
from gpooler.process.context import EXIT_BOOT, EXIT_OK, BrokerContext
from gpooler.process.fork import EXIT_CRASH
from gpooler.process.heartbeat import beat
from gpooler.process.patch import patch
from gpooler.server.cancel import send_cancel
from gpooler.stats.registry import MAX_ROUTES, ProcessWord
from gpooler.stats.reporter import Reporter
from gpooler.stats.shared import SharedCounters, Totals
from gpooler.stats.snapshot import Snapshot, take
from gpooler.stats.statsd import Statsd

_READY_PAUSE_S = 0.05
_FIRST_INCARNATION = 1  # the broker is the first child that a master forks


def run_broker(context: BrokerContext) -> int:
    """Body of the broker process; returns its exit status (``process/context.py``)."""
    patch()
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
        rule.name: RuleLimits(
            storage=rule.storage,
            pool_size=rule.pool_size,
            min_pool_size=rule.min_pool_size if _only_route(rule) else 0,
            shared_pool=rule.shared_pool,
            reset_timeout_ms=rule.pool_reset_timeout_ms,
            fixed=_only_route(rule),
        )
        for rule in config.rules
        if config.storage[rule.storage].type is StorageType.REMOTE
    }


def _only_route(rule: Rule) -> tuple[str, str] | None:
    """Database and user on the server, where clients can bring no others."""
    database = rule.storage_db or (None if rule.is_default_database else rule.database)
    user = rule.storage_user or (None if rule.is_default_user else rule.user)
    return None if database is None or user is None else (database, user)


class Broker:
    """Obeys the master and runs the service."""

    def __init__(self, context: BrokerContext, log: Log) -> None:
        self._context = context
        self._log = log
        self._logger = log.logger
        config = context.config
        self._totals = Totals(context.past)
        self._incarnations: dict[int, int] = {}  # whose counters are attached, by worker number
        self._control = Channel(context.control, control.CODEC)
        self._rules = {rule.name: rule for rule in config.rules}
        prepare(config)
        self._connectors = connectors(config)
        shared_pools = {name: pool.pool_size for name, pool in config.shared_pool.items()}
        storages = {name: storage.routing_limit(context.workers) for name, storage in config.storage.items()}
        self._service = BrokerService(
            Ledger(rule_limits(config), shared_pools, storages, MAX_ROUTES),
            self._totals.workers,
            self._cancel,
            self,
            self._logger,
            is_checked=context.is_debug,
            is_session_logged=config.logging.log_session,
        )

    def run(self) -> int:
        """Serve until the master is gone. Yields. Returns the exit status."""
        greenlets = [gevent.spawn(beat, self._context.counters), gevent.spawn(self._obey), *self._reporters()]
        # EOF of the master is the planned end; a failure of the service ends the process for a successor.
        done = gevent.wait([greenlets[1], self._service.failed], count=1)[0]
        gevent.killall(greenlets)
        self._service.close()
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
            case control.Serve():
                self._service.serve(self._context.incarnation == _FIRST_INCARNATION, self._first_new_id())
                self._control.send(control.Ready(os.getpid()))
            case control.ReopenLog():
                self._log.reopen()

    def _first_new_id(self) -> int:
        """Route ids below may have been given out by an earlier broker: something was counted under them."""
        used = [
            route_id
            for counters in (self._context.past, *self._totals.workers.values())
            for route_id in counters.used_routes()
            if any(counters.route_block(route_id))
        ]
        return max(used, default=-1) + 1

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

    def _reporters(self) -> Iterator[gevent.Greenlet]:
        logging, metrics = self._context.config.logging, self._context.config.metrics
        statsd = None
        if metrics.statsd_host is not None:
            statsd = Statsd(metrics.statsd_host, metrics.statsd_port, metrics.statsd_prefix)
        if logging.log_stats or statsd is not None:
            reporter = Reporter(
                self._snapshot,
                interval_s=logging.stats_interval,
                logger=self._logger,
                is_logged=logging.log_stats,
                statsd=statsd,
            )
            yield gevent.spawn(self._report, reporter)

    def _report(self, reporter: Reporter) -> None:
        """Begin when the workers have said which routes there are: what those counted before is no news."""
        while not self._service.ledger.is_ready:
            gevent.sleep(_READY_PAUSE_S)
        reporter.run()

    def _snapshot(self) -> Snapshot:
        routes = self._service.ledger.routes.values()
        return take(monotonic_us(), self._totals, [self._name(route) for route in routes])

    def _cancel(self, rule: str, endpoint: str, pid: int, secret: bytes, timeout_ms: int) -> None:
        """Deliver a cancel request. Yields. Raises ServerConnectFailed, ValueError."""
        known = self._rules.get(rule)
        connector = None if known is None else self._connectors[known.storage]
        send_cancel(Address.parse(endpoint), pid, secret, timeout_ms, connector)

    def _name(self, route: Route) -> tuple[int, str, str]:
        """Route id, database and user as the rule is called; for ``default`` those on the server."""
        rule = self._rules[route.key.rule]
        database = route.key.database if rule.is_default_database else rule.database
        return route.route_id, database, route.key.user if rule.is_default_user else rule.user
