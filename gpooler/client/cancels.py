"""Cancel requests: found in this worker or another, delivered to the server, exactly once.

A key with bit 30 of the process id set names the worker that owns the client (``relay/relay.pyx:
reserve_pid``); other ids are those of PostgreSQL processes that session pools hand out, and every worker is
asked. The requester's connection stays open until the request is over, as PostgreSQL does.
"""

from collections.abc import Callable
from typing import Final

import gevent
from gevent.event import AsyncResult
from gevent.lock import BoundedSemaphore

from gpooler.client import peers
from gpooler.client.peer_channels import PeerChannels
from gpooler.config.model import Limits
from gpooler.errors import ServerFault
from gpooler.faults import fault_point
from gpooler.log import NOBODY, LogContext, Logger, server_id
from gpooler.net.resolve import Address
from gpooler.net.tls import Connector
from gpooler.process.channels import Channel
from gpooler.relay.relay import Relay
from gpooler.server.cancel import send_cancel
from gpooler.stats.registry import RouteWord
from gpooler.stats.shared import SharedCounters

SYNTHETIC_PID: Final = 1 << 30
WORKER_SHIFT: Final = 22
WORKER_MASK: Final = 0xFF
FOUND_RUNNING: Final = 1
PEER_TIMEOUT_S: Final = 30.0  # another worker's answer; a dead one's channel ends sooner


class Cancels:
    """All cancels of one worker: of clients here, for other workers, and of the relay's own resets."""

    def __init__(
        self,
        worker: int,
        workers: int,
        limits: Limits,
        relay: Relay,
        counters: SharedCounters,
        peer_channels: PeerChannels,
        logger: Logger,
    ) -> None:
        self._worker = worker
        self._workers = workers
        self._relay = relay
        self._counters = counters
        self._logger = logger
        self._replies: dict[int, Callable[[tuple[int, int, int]], None]] = {}
        self._peers = peer_channels
        self._asked: dict[int, tuple[int, AsyncResult]] = {}  # the worker that was asked, by token
        peer_channels.on(peers.Cancel, self._on_peer)
        peer_channels.on(peers.Cancelled, self._on_answer)
        peer_channels.on_gone.append(self._on_peer_gone)
        self.whereabouts: Callable[[int], tuple[Address, Connector, bool] | None] = lambda handle: None

        self.configure(limits)

    def configure(self, limits: Limits) -> None:
        """From now on; those under way are counted apart."""
        self._limits = limits
        self._gate = BoundedSemaphore(max(1, limits.cancel_limit(self._workers) // self._workers))

    # -- requests of clients

    def request(self, pid: int, secret: bytes) -> None:
        """Deal with a CancelRequest. Yields until it is over. What is not found does nothing."""
        self._logger.debug(f"cancel request for process {pid}", context="cancel")
        if pid & SYNTHETIC_PID:
            owner = (pid >> WORKER_SHIFT) & WORKER_MASK
            if owner == self._worker & WORKER_MASK:
                self._local(pid, secret)
                return
            asked = [number for number in self._peers.workers if number & WORKER_MASK == owner]
        else:
            if self._local(pid, secret):
                return
            asked = list(self._peers.workers)
        gevent.wait([self._ask(number, pid, secret) for number in asked], timeout=PEER_TIMEOUT_S)

    def _local(self, pid: int, secret: bytes) -> bool:
        token = self._relay.begin_cancel(pid, secret)
        if not token:
            return False
        answer: AsyncResult = AsyncResult()
        self._replies[token] = answer.set
        found, _, handle = answer.get()
        if found == FOUND_RUNNING:
            self.deliver(handle)
        return bool(found)

    def on_reply(self, token: int, reply: tuple[int, int, int]) -> bool:
        """The relay's answer to ``begin_cancel``; False when the token is not of ours."""
        waiter = self._replies.pop(token, None)
        if waiter is None:
            return False
        waiter(reply)
        return True

    # -- delivery

    def deliver(self, handle: int) -> None:
        """Send the cancel request for a server that the relay has marked, then unmark it. Yields."""
        try:
            found = self.whereabouts(handle)
            if found is not None:
                route_id = self._relay.server(handle)["route"]
                self._counters.add_route(route_id, RouteWord.SERVERS_CANCELLED)
                try:
                    self._deliver(handle, route_id, *found)
                finally:
                    self._counters.add_route(route_id, RouteWord.SERVERS_CANCELLED, -1)
        finally:
            self._relay.end_cancel(handle)

    def _deliver(
        self, handle: int, route_id: int, address: Address, connector: Connector, is_debugged: bool
    ) -> None:
        who = self._who(handle, address)
        queue_s = self._limits.cancel_queue_limit_ms / 1000 or None
        self._counters.add_route(route_id, RouteWord.CANCELS_WAITING)
        gate = self._gate
        has_turn = gate.acquire(timeout=queue_s)
        self._counters.add_route(route_id, RouteWord.CANCELS_WAITING, -1)
        if not has_turn:
            self._logger.error("cancel request dropped: too many are under way", context="cancel", who=who)
            return
        self._counters.add_route(route_id, RouteWord.CANCELS_ACTIVE)
        try:
            fault_point("cancel_sending")
            record = self._relay.server(handle)
            timeout_ms = self._limits.cancel_timeout_ms
            if not send_cancel(address, record["pid"], record["secret"], timeout_ms, connector):
                self._logger.error("cancel request timed out", context="cancel", who=who)
            else:
                what = "cancel request delivered"
                self._logger.debug(what, context="cancel", who=who, is_wanted=is_debugged)
        except KeyError:
            return  # the server is gone, and with it what it ran
        except ServerFault as error:
            self._logger.error(f"cancel request failed: {error.log_text()}", context="cancel", who=who)
        finally:
            self._counters.add_route(route_id, RouteWord.CANCELS_ACTIVE, -1)
            gate.release()

    def _who(self, handle: int, address: Address) -> LogContext:
        try:
            number = self._relay.server(handle)["id"]
        except KeyError:
            return NOBODY
        return LogContext(server=server_id(number), server_host=address.text)

    # -- other workers

    def _ask(self, worker: int, pid: int, secret: bytes) -> AsyncResult:
        token = self._peers.new_token()
        answer: AsyncResult = AsyncResult()
        self._asked[token] = worker, answer
        answer.rawlink(lambda _: self._asked.pop(token, None))
        self._peers.workers[worker].send(peers.Cancel(token, pid, secret.hex()))
        return answer

    def _on_peer(self, worker: int, channel: Channel, message: peers.Cancel) -> None:
        gevent.spawn(self._answer_peer, channel, message)

    def _on_answer(self, worker: int, channel: Channel, message: peers.Cancelled) -> None:
        asked = self._asked.get(message.token)
        if asked is not None:
            asked[1].set(message.is_found)

    def _on_peer_gone(self, worker: int) -> None:
        """What was asked of it is found by nobody any more."""
        for number, answer in list(self._asked.values()):
            if number == worker:
                answer.set(False)

    def _answer_peer(self, channel: Channel, message: peers.Cancel) -> None:
        is_found = self._local(message.pid, bytes.fromhex(message.secret_hex))
        channel.send(peers.Cancelled(message.token, is_found))
