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

from gpooler.broker.codec import ChannelProtocolError
from gpooler.client import peers
from gpooler.config.model import Limits
from gpooler.errors import ServerFault
from gpooler.faults import fault_point
from gpooler.log import NOBODY, LogContext, Logger, server_id
from gpooler.net.resolve import Address
from gpooler.net.tls import Connector
from gpooler.process.channels import Channel, ChannelClosed
from gpooler.relay.relay import Relay
from gpooler.server.cancel import send_cancel

SYNTHETIC_PID: Final = 1 << 30
WORKER_SHIFT: Final = 22
WORKER_MASK: Final = 0xFF
FOUND_RUNNING: Final = 1
PEER_TIMEOUT_S: Final = 30.0  # another worker's answer; a dead one's channel ends sooner


class Cancels:
    """All cancels of one worker: of clients here, for other workers, and of the relay's own resets."""

    def __init__(self, worker: int, workers: int, limits: Limits, relay: Relay, logger: Logger) -> None:
        self._worker = worker
        self._limits = limits
        self._relay = relay
        self._logger = logger
        self._gate = BoundedSemaphore(max(1, limits.cancel_limit(workers) // workers))
        self._replies: dict[int, Callable[[tuple[int, int, int]], None]] = {}
        self._peers: dict[int, Channel] = {}  # by worker number
        self._asked: dict[int, AsyncResult] = {}
        self._next_token = 1
        self.whereabouts: Callable[[int], tuple[Address, Connector] | None] = lambda handle: None

    # -- requests of clients

    def request(self, pid: int, secret: bytes) -> None:
        """Deal with a CancelRequest. Yields until it is over. What is not found does nothing."""
        self._logger.debug(f"cancel request for process {pid}", context="cancel")
        if pid & SYNTHETIC_PID:
            owner = (pid >> WORKER_SHIFT) & WORKER_MASK
            if owner == self._worker & WORKER_MASK:
                self._local(pid, secret)
                return
            channels = [channel for number, channel in self._peers.items() if number & WORKER_MASK == owner]
        else:
            if self._local(pid, secret):
                return
            channels = list(self._peers.values())
        asked = [self._ask(channel, pid, secret) for channel in channels]
        gevent.wait(asked, timeout=PEER_TIMEOUT_S)

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
            self._deliver(handle)
        finally:
            self._relay.end_cancel(handle)

    def _deliver(self, handle: int) -> None:
        found = self.whereabouts(handle)
        if found is None:
            return
        address, connector = found
        who = self._who(handle, address)
        queue_s = self._limits.cancel_queue_limit_ms / 1000 or None
        if not self._gate.acquire(timeout=queue_s):
            self._logger.error("cancel request dropped: too many are under way", context="cancel", who=who)
            return
        try:
            fault_point("cancel_sending")
            record = self._relay.server(handle)
            timeout_ms = self._limits.cancel_timeout_ms
            if not send_cancel(address, record["pid"], record["secret"], timeout_ms, connector):
                self._logger.error("cancel request timed out", context="cancel", who=who)
            else:
                self._logger.debug("cancel request delivered", context="cancel", who=who)
        except KeyError:
            return  # the server is gone, and with it what it ran
        except ServerFault as error:
            self._logger.error(f"cancel request failed: {error.log_text()}", context="cancel", who=who)
        finally:
            self._gate.release()

    def _who(self, handle: int, address: Address) -> LogContext:
        try:
            number = self._relay.server(handle)["id"]
        except KeyError:
            return NOBODY
        return LogContext(server=server_id(number), server_host=address.text)

    # -- other workers

    def attach_peer(self, worker: int, channel: Channel) -> None:
        """A fresh channel to another worker; replaces the last one."""
        old = self._peers.pop(worker, None)
        if old is not None:
            old.close()
        self._peers[worker] = channel
        gevent.spawn(self._serve_peer, worker, channel)

    def detach_peer(self, worker: int) -> None:
        """That worker is dead."""
        channel = self._peers.pop(worker, None)
        if channel is not None:
            channel.close()

    def _ask(self, channel: Channel, pid: int, secret: bytes) -> AsyncResult:
        token = self._next_token
        self._next_token += 1
        answer: AsyncResult = AsyncResult()
        self._asked[token] = answer
        answer.rawlink(lambda _: self._asked.pop(token, None))
        channel.send(peers.Cancel(token, pid, secret.hex()))
        return answer

    def _serve_peer(self, worker: int, channel: Channel) -> None:
        try:
            while (item := channel.receive()) is not None:
                message, _ = item
                if isinstance(message, peers.Cancel):
                    gevent.spawn(self._answer_peer, channel, message)
                elif isinstance(message, peers.Cancelled):
                    waiter = self._asked.get(message.token)
                    if waiter is not None:
                        waiter.set(message.is_found)
        except (ChannelClosed, ChannelProtocolError):
            pass
        if self._peers.get(worker) is channel:
            self.detach_peer(worker)

    def _answer_peer(self, channel: Channel, message: peers.Cancel) -> None:
        is_found = self._local(message.pid, bytes.fromhex(message.secret_hex))
        channel.send(peers.Cancelled(message.token, is_found))
