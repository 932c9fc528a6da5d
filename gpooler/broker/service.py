"""The broker at work: runs the ledger over the workers' channels, holds a duplicate of every server's socket.

Crash-only: whatever goes wrong inside ends the process, and its successor learns all from the workers.
"""

import os
import socket
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import gevent
from gevent.event import AsyncResult, Event

from gpooler.broker.acts import Act, Bury, Complain, Disown, Entrust, Hold, Inherit, Release, Send
from gpooler.broker.book import Inherited, RuleLimits
from gpooler.broker.burial import bury
from gpooler.broker.codec import ChannelProtocolError, Message
from gpooler.broker.ledger import Demand, Ledger
from gpooler.broker.messages import (
    CODEC,
    PROTOCOL_VERSION,
    Ask,
    Hello,
    Rows,
    Welcome,
    WorkerId,
    WorkerMessage,
)
from gpooler.broker.slots import SlotName
from gpooler.clock import monotonic_us
from gpooler.faults import fault_point
from gpooler.log import LogContext, Logger
from gpooler.process.channels import Channel, ChannelClosed
from gpooler.stats.registry import RouteWord
from gpooler.stats.shared import SharedCounters

CancelSender = Callable[[str, str, int, bytes, int], None]
"""Sends a cancel request: name of the rule, endpoint, pid, secret, timeout in ms.

Yields, raises GpoolerError.
"""


class Master(Protocol):
    """What is needed of the master."""

    def complain(self, worker: WorkerId, text: str) -> None:
        """Have a worker ended that broke the protocol."""

    def hold(self, server: Entrust, fd: int) -> None:
        """Have a copy of a server's socket kept for a successor; ``fd`` stays the caller's."""

    def let(self, slot: SlotName) -> None:
        """The server of that slot is gone."""

    def rows(self, what: str) -> Iterator[Sequence[tuple[str | int | None, ...]]]:
        """What the broker says of itself for the console, a slice at a time."""


class BrokerService:
    """Owns the channels and the held descriptors. ``failed`` is set when it cannot go on."""

    def __init__(
        self,
        ledger: Ledger,
        counters: Mapping[int, SharedCounters],
        cancel: CancelSender,
        master: Master,
        logger: Logger,
        *,
        is_checked: bool,
        is_session_logged: bool,
    ) -> None:
        """``counters`` by worker number, kept by the caller.

        ``is_checked``: check the ledger's invariant after every event; ``is_session_logged`` is
        ``log_session``.
        """
        self.ledger = ledger
        self.failed: AsyncResult[None] = AsyncResult()
        self._counters = counters
        self._cancel = cancel
        self._master = master
        self._logger = logger
        self._is_checked = is_checked
        self._is_session_logged = is_session_logged
        self._channels: dict[WorkerId, Channel] = {}
        self._greeted: set[WorkerId] = set()
        self._held: dict[SlotName, int] = {}
        self._inherited: dict[SlotName, int] = {}
        self._due_us = 0
        self._wake = Event()
        self._greenlets: set[gevent.Greenlet] = set()
        self._spawn(self._tick)

    # --- workers come and go ----------------------------------------------------------------------

    def attach(self, worker: WorkerId, has_history: bool, sock: socket.socket) -> None:
        """A worker lives, at the other end of ``sock``, which is ours from now on."""
        channel = Channel(sock, CODEC)
        self._channels[worker] = channel
        self.ledger.attach(worker, has_history)
        self._spawn(self._read, worker, channel)

    def detach(self, worker: WorkerId) -> None:
        """The worker was reaped. Usually its channel has told, or is about to when all it sent is read."""
        if worker not in self._channels:
            self._gone(worker)

    def inherit(self, name: SlotName, server: Inherited, fd: int) -> None:
        """A server that an earlier broker had; before ``serve``. ``fd`` is ours from now on."""
        self._inherited[name] = fd
        self.ledger.inherit(name, server)

    def serve(self, is_settled: bool, first_new_id: int = 0) -> None:
        """Every worker that lives has been attached; the arguments are those of ``Ledger.serve``."""
        self._apply(self.ledger.serve(monotonic_us(), is_settled, first_new_id), [])

    def configure(
        self,
        rules: Mapping[str, RuleLimits],
        shared_pools: Mapping[str, int],
        storages: Mapping[str, int],
        *,
        is_session_logged: bool,
    ) -> None:
        """New limits (``Ledger.configure``)."""
        self._is_session_logged = is_session_logged
        self._apply(self.ledger.configure(monotonic_us(), rules, shared_pools, storages), [])

    def close(self) -> None:
        """Stop, close every channel and descriptor."""
        for greenlet in list(self._greenlets):
            greenlet.kill()
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        for fd in (*self._held.values(), *self._inherited.values()):
            os.close(fd)
        self._held.clear()
        self._inherited.clear()

    @property
    def held(self) -> int:
        """How many servers' descriptors are held."""
        return len(self._held)

    # --- channels -----------------------------------------------------------------------------------

    def _read(self, worker: WorkerId, channel: Channel) -> None:
        """A worker's reader: until EOF, which is its death, or until it says what it must not say."""
        try:
            while (item := channel.receive()) is not None:
                message, fds = item
                self._handle(worker, message, fds)
        except ChannelClosed:
            return
        except ChannelProtocolError as error:
            # Its slots stay taken until the master has ended it: then ``detach`` is called.
            self._object(worker, str(error))
            return
        del self._channels[worker]
        channel.close()
        self._gone(worker)

    def _handle(self, worker: WorkerId, message: Message, fds: list[int]) -> None:
        """One message. Owns ``fds``."""
        try:
            if isinstance(message, Hello):
                self._greet(worker, message)
            elif isinstance(message, Ask) and worker in self._greeted:
                self._spawn(self._answer, message, self._channels[worker])
            elif not isinstance(message, WorkerMessage) or worker not in self._greeted:
                raise ChannelProtocolError(f"{type(message).__name__} out of place")
            else:
                self._apply(self.ledger.handle(monotonic_us(), worker, message), fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _greet(self, worker: WorkerId, hello: Hello) -> None:
        if hello.version != PROTOCOL_VERSION:
            raise ChannelProtocolError(f"protocol version {hello.version}, not {PROTOCOL_VERSION}")
        if (hello.worker, hello.incarnation) != worker:
            raise ChannelProtocolError(f"says that it is worker {hello.worker}.{hello.incarnation}")
        self._greeted.add(worker)
        self._channels[worker].send(Welcome(PROTOCOL_VERSION, os.getpid()))

    def _answer(self, ask: Ask, channel: Channel) -> None:
        """Rows for the console, in parts. Yields."""
        for rows in self._master.rows(ask.what):
            channel.send(Rows(ask.token, False, tuple(rows)))
            gevent.sleep(0)
        channel.send(Rows(ask.token, True, ()))

    def _object(self, worker: WorkerId, text: str) -> None:
        """Have a worker ended that broke the protocol; nothing it says is heard any more."""
        channel = self._channels.pop(worker, None)
        if channel is not None:
            channel.close()
            self._logger.error(f"worker {worker.worker} broke the protocol: {text}", context="broker")
            self._master.complain(worker, text)

    def _gone(self, worker: WorkerId) -> None:
        self._greeted.discard(worker)
        self._apply(self.ledger.worker_gone(monotonic_us(), worker), [])

    # --- acts ------------------------------------------------------------------------------------------

    def _apply(self, acts: Iterable[Act], fds: list[int]) -> None:
        """Do what the ledger wants. A Hold takes its descriptor out of ``fds``."""
        if self._is_checked:
            self.ledger.check()
        for act in acts:
            if isinstance(act, Send):
                fault_point("broker_sends", type(act.message).__name__)
                channel = self._channels.get(act.worker)
                if channel is not None:  # else its end is about to be told
                    channel.send(act.message, () if act.slot is None else (self._held[act.slot],))
            elif isinstance(act, Hold):
                if act.slot in self._held:
                    os.close(self._held[act.slot])
                self._held[act.slot] = fds.pop()
            elif isinstance(act, Entrust):
                self._master.hold(act, self._held[act.slot])
            elif isinstance(act, Inherit):
                self._held[act.slot] = self._inherited.pop(act.slot)
            elif isinstance(act, Disown):
                os.close(self._inherited.pop(act.slot))
                if act.slot not in self._held:
                    self._master.let(act.slot)
            elif isinstance(act, Release):
                os.close(self._held.pop(act.slot))
                self._master.let(act.slot)
            elif isinstance(act, Bury):
                self._spawn(self._bury, act)
            else:
                self._object_to(act)
        due_us = self.ledger.next_due_us()
        if due_us < self._due_us:
            self._due_us = due_us
            self._wake.set()

    def _object_to(self, act: Complain) -> None:
        self._object(act.worker, act.text)

    def _bury(self, act: Bury) -> None:
        """Close a server that has no worker any more, then free its slot. Yields."""
        bury(act, self._held[act.slot], self._cancel, self._logger)
        if self._is_session_logged and act.server_id:
            who = LogContext(server=act.server_id, server_host=act.endpoint)
            self._logger.info("server disconnected: closed by the broker", context="server", who=who)
        self._apply(self.ledger.gone(monotonic_us(), act.slot, act.generation), [])

    # --- ticks -----------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Ticks when the ledger wants to, and sooner when an event brings the time forward.

        Half of the time at most, however many routes have waiting clients: messages come first.
        """
        while True:
            now_us = monotonic_us()
            if now_us < self._due_us:
                self._wake.clear()
                self._wake.wait((self._due_us - now_us) / 1_000_000)
                continue
            acts = self.ledger.tick(now_us, self._observe(self.ledger.due(now_us)))
            self._due_us = self.ledger.next_due_us()
            self._apply(acts, [])
            gevent.sleep((monotonic_us() - now_us) / 1_000_000)

    def _observe(self, route_ids: Iterable[int]) -> dict[tuple[WorkerId, int], Demand]:
        """What the workers' counters say of these routes."""
        demand = {}
        for route_id in route_ids:
            for worker in self.ledger.routes[route_id].holdings:
                counters = self._counters.get(worker.worker)
                if counters is not None:
                    # a server that comes between these looks is to be missed rather than its client be seen
                    servers = counters.route(route_id, RouteWord.SERVERS_ACTIVE)
                    servers += counters.route(route_id, RouteWord.SERVERS_IDLE)
                    active = counters.route(route_id, RouteWord.CLIENTS_ACTIVE)
                    waiting = counters.route(route_id, RouteWord.CLIENTS_WAITING)
                    demand[worker, route_id] = Demand(waiting, active, servers)
        return demand

    # --- greenlets --------------------------------------------------------------------------------------

    def _spawn(self, function: Callable[..., None], *args: object) -> None:
        greenlet = gevent.spawn(self._guard, function, *args)
        self._greenlets.add(greenlet)
        greenlet.rawlink(self._greenlets.discard)

    def _guard(self, function: Callable[..., None], *args: object) -> None:
        """The top of every greenlet: what it does not foresee ends the broker."""
        try:
            function(*args)
        except Exception as error:  # noqa: BLE001
            self._logger.error(f"broker failed: {traceback.format_exc()}", context="broker")
            self.failed.set_exception(error)
