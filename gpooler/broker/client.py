"""The worker's side of the channel to the broker. Survives the broker: a new one is told everything."""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn, Protocol

import gevent
from gevent.event import AsyncResult

from gpooler.broker import messages
from gpooler.broker.codec import ChannelProtocolError, Message
from gpooler.errors import InternalError
from gpooler.log import Logger
from gpooler.process.channels import Channel, ChannelClosed
from gpooler.stats.registry import ProcessWord
from gpooler.stats.shared import SharedCounters

DRAIN_S: Final = 1.0  # the old broker is dead: its channel ends as soon as it is read
CALM_S: Final = 0.2  # a queue that was empty for so long is over

Report = list[tuple[Message, list[int]]]


class Worker(Protocol):
    """Whom the broker speaks to. Descriptors that come along are the worker's."""

    def report(self) -> Report:
        """Routes with their parameters, then slots; sent between Hello and ReportEnd."""

    def on_broker_message(self, message: Message, fds: list[int]) -> None:
        """A message of the broker, ``RouteRefused`` left out. Raises ChannelProtocolError."""

    def on_broker_gone(self) -> None:
        """The broker is dead: what it wanted back is nobody's business any more. May be called twice."""

    def on_broker_nonsense(self, cause: str) -> NoReturn:
        """What the broker says cannot be obeyed: end the process, so that its successor begins anew."""


@dataclass(frozen=True, slots=True)
class OpenedRoute:
    """What the broker says of a route."""

    route_id: int
    parameters: dict[str, str] | None


class BrokerClient:
    """Sends in order and never waits; what is sent while there is no broker is covered by the report."""

    def __init__(
        self,
        hello: Callable[[], messages.Hello],
        worker: Worker,
        counters: SharedCounters,
        logger: Logger,
    ) -> None:
        self._hello: Final = hello
        self._worker = worker
        self._counters = counters
        self._logger = logger
        self._channel: Channel | None = None
        self._reader: gevent.Greenlet | None = None
        self._is_attached = False
        self._next_token = 1
        self._pending: dict[int, tuple[messages.OpenRoute, AsyncResult]] = {}
        self._wants: dict[int, int] = {}
        self._told: dict[int, int] = {}  # the wishes that stand at the broker
        self._withdrawing: set[int] = set()

    def attach(self, channel: Channel) -> None:
        """A fresh channel to a new broker: report, then ask again for what is still open. Yields.

        What the old broker had sent is heard first: a server it passed on is ours and is reported.
        """
        if self._reader is not None:
            self._reader.join(DRAIN_S)
        if self._channel is not None:
            self._channel.close()
        self._worker.on_broker_gone()
        self._channel = channel
        self._is_attached = True
        self.send(self._hello())
        for message, fds in self._worker.report():
            self.send(message, fds)
        self.send(messages.ReportEnd())
        for request, _ in self._pending.values():
            self.send(request)
        self._told = dict(self._wants)
        for route_id, waiting in self._wants.items():
            self.send(messages.Want(route_id, waiting))
        self._reader = gevent.spawn(self._receive, channel)

    @property
    def is_attached(self) -> bool:
        """Whether the broker has got, or can get, what was sent last, as far as we know."""
        return self._is_attached and self._channel is not None and not self._channel.is_broken

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send or queue a message; the descriptors stay the caller's."""
        if self._channel is not None:
            self._channel.send(message, fds)
            self._counters.add_process(ProcessWord.BROKER_SENT)

    def want(self, route_id: int, waiting: int) -> None:
        """So many clients of the route wait; 0 withdraws, after a while, since queues come and go.

        While a wish stands the broker reads the queue's length in the counters: it is told of growth alone.
        """
        if not waiting:
            self._wants.pop(route_id, None)
            if route_id in self._told and route_id not in self._withdrawing:
                self._withdrawing.add(route_id)
                gevent.spawn_later(CALM_S, self._withdraw, route_id)
            return
        self._wants[route_id] = waiting
        if waiting > self._told.get(route_id, 0):
            self._told[route_id] = waiting
            self.send(messages.Want(route_id, waiting))

    def _withdraw(self, route_id: int) -> None:
        self._withdrawing.discard(route_id)
        if route_id not in self._wants and self._told.pop(route_id, 0):
            self.send(messages.Want(route_id, 0))

    def open_route(self, rule: str, database: str, user: str, is_replication: bool) -> OpenedRoute:
        """The id of a route. Yields, also while the broker is being replaced. Raises InternalError."""
        request = messages.OpenRoute(self._next_token, rule, database, user, is_replication)
        self._next_token += 1
        answer: AsyncResult = AsyncResult()
        self._pending[request.token] = (request, answer)
        try:
            self.send(request)
            reply = answer.get()
        finally:
            del self._pending[request.token]
        if isinstance(reply, messages.RouteRefused):
            raise InternalError(cause=f"the broker refused the route: {reply.cause}")
        assert isinstance(reply, messages.RouteOpened)
        return OpenedRoute(reply.route_id, reply.parameters)

    def _receive(self, channel: Channel) -> None:
        try:
            while (item := channel.receive()) is not None:
                self._counters.add_process(ProcessWord.BROKER_RECEIVED)
                self._on_message(*item)
        except ChannelClosed:
            return
        except ChannelProtocolError as error:
            self._worker.on_broker_nonsense(str(error))
        except Exception:  # noqa: BLE001  # a worker that does not listen would hold its servers for ever
            self._worker.on_broker_nonsense(traceback.format_exc())
        self._is_attached = False
        self._worker.on_broker_gone()
        self._logger.info("the broker is gone; servers already leased go on", context="broker")

    def _on_message(self, message: Message, fds: list[int]) -> None:
        # The route exists before whoever asked for it runs: the next message may be about it.
        if not isinstance(message, messages.RouteRefused):
            self._worker.on_broker_message(message, fds)
        if isinstance(message, messages.RouteOpened | messages.RouteRefused):
            waiting = self._pending.get(message.token)
            if waiting is not None:
                waiting[1].set(message)
