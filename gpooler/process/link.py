"""The master's end of a channel to a child or to another master: never waits, queues what is not read."""

import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence

from gpooler.broker.codec import Codec, Message
from gpooler.process import control
from gpooler.process.datagrams import BUSY_ERRORS, pack, receive, send_datagram


class Link:
    """One end of a control pair. Owns the socket and the copies of queued descriptors."""

    def __init__(self, sock: socket.socket, codec: Codec = control.CODEC) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._codec = codec
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self.is_closed = False

    def fileno(self) -> int:
        """For poll."""
        return self._sock.fileno()

    @property
    def has_unsent(self) -> bool:
        """Whether ``send_queued`` should be called when the socket is writable."""
        return bool(self._queue)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send or queue ``message`` with copies of ``fds``, which stay the caller's."""
        if not self.is_closed:
            self._queue.append((pack(self._codec, message, fds), [os.dup(fd) for fd in fds]))
            self.send_queued()

    def send_queued(self) -> None:
        """Send as much of the queue as there is room for."""
        while self._queue:
            datagram, fds = self._queue[0]
            try:
                send_datagram(self._sock, datagram, fds)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in BUSY_ERRORS:
                    return  # the loop comes by again
                self._drop_queue()  # dead; the reaping tells
                return
            self._queue.popleft()
            _close(fds)

    def receive(self) -> Iterator[tuple[Message, list[int]]]:
        """The messages that have come, with their descriptors, the caller's. Raises ChannelProtocolError."""
        while not self.is_closed:
            try:
                item = receive(self._sock, self._codec)
            except BlockingIOError:
                return
            except ConnectionError:
                item = None
            if item is None:
                self.close()  # EOF would be readable for ever; the death itself comes as SIGCHLD
                return
            yield item

    def close(self) -> None:
        """Close everything: the child sees EOF once no other process holds this end."""
        if not self.is_closed:
            self.is_closed = True
            self._drop_queue()
            self._sock.close()

    def _drop_queue(self) -> None:
        while self._queue:
            _close(self._queue.popleft()[1])


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
