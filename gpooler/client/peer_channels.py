"""The channels of one worker to the others: who is there, and who hears what they say."""

from collections.abc import Callable
from typing import Any

import gevent

from gpooler.broker.codec import ChannelProtocolError, Message
from gpooler.process.channels import Channel, ChannelClosed

Handler = Callable[[int, Channel, Any], None]
"""Takes the number of a worker, its channel, and a message. Does not wait."""


class PeerChannels:
    """Messages go to the handler of their class; what is to be answered carries a token of ``new_token``."""

    def __init__(self) -> None:
        self.workers: dict[int, Channel] = {}  # by number; not to be changed by others
        self.on_gone: list[Callable[[int], None]] = []  # told of a worker whose channel has ended
        self._handlers: dict[type[Message], Handler] = {}
        self._next_token = 1

    def on(self, kind: type[Message], handler: Handler) -> None:
        """From now on ``handler`` takes messages of that class."""
        self._handlers[kind] = handler

    def new_token(self) -> int:
        """For an answer to be known by."""
        self._next_token += 1
        return self._next_token

    def attach(self, worker: int, channel: Channel) -> None:
        """A fresh channel to another worker; replaces the last one."""
        self.detach(worker)
        self.workers[worker] = channel
        gevent.spawn(self._listen, worker, channel)

    def detach(self, worker: int) -> None:
        """That worker is dead."""
        channel = self.workers.pop(worker, None)
        if channel is not None:
            channel.close()
            for tell in self.on_gone:
                tell(worker)

    def _listen(self, worker: int, channel: Channel) -> None:
        try:
            while (item := channel.receive()) is not None:
                message, _ = item
                self._handlers[type(message)](worker, channel, message)
        except (ChannelClosed, ChannelProtocolError):
            pass
        if self.workers.get(worker) is channel:
            self.detach(worker)
