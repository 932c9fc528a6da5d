"""A channel of a gevent process: sends without ever waiting, receives by yielding.

Writers queue here and a greenlet empties the queue, so two full channels cannot wait for each
other: each side goes on reading. Order is kept.
"""

import errno
import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import Final

import gevent
from gevent.hub import get_hub
from gevent.socket import wait

from gpooler.broker.codec import Codec, Message
from gpooler.process.datagrams import BUSY_ERRORS, pack, receive, send_datagram

_READ: Final = 1
_WRITE: Final = 2
_BUSY_PAUSE_S: Final = 0.01  # nothing says when descriptors in flight or memory have become fewer


class ChannelClosed(OSError):
    """``receive`` was waiting when ``close`` was called."""

    def __init__(self) -> None:
        super().__init__(errno.EBADF, "channel was closed")


class Channel:
    """One end of a pair and its queue of unsent messages. Owns the socket."""

    def __init__(self, sock: socket.socket, codec: Codec) -> None:
        """Take ``sock`` over; it becomes non-blocking."""
        sock.setblocking(False)
        self._sock = sock
        self._codec = codec
        loop = get_hub().loop
        self._readable = loop.io(sock.fileno(), _READ)
        self._writable = loop.io(sock.fileno(), _WRITE)
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._writer: gevent.Greenlet | None = None
        self._is_broken = False
        self._is_busy = False
        self._is_closed = False
        self.sent = 0  # messages taken by ``send``
        self.received = 0

    @property
    def is_broken(self) -> bool:
        """Whether the other side was found dead when something was sent: that was dropped."""
        return self._is_broken

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._is_closed

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send or queue ``message`` with copies of ``fds``, which stay the caller's. Never waits.

        What is sent after the other side died is dropped: ``receive`` tells of the death. Raises
        ChannelProtocolError for what cannot be sent at all.
        """
        datagram = pack(self._codec, message, fds)
        if self._is_broken or self._is_closed:
            return
        self.sent += 1
        if not self._queue and self._try_send(datagram, fds):
            return
        self._queue.append((datagram, [os.dup(fd) for fd in fds]))
        if self._writer is None:
            self._writer = gevent.spawn(self._empty_queue)

    def receive(self) -> tuple[Message, list[int]] | None:
        """The next message and its descriptors, now the caller's; None when the other side is dead. Yields.

        One greenlet at a time. Raises ChannelClosed, ChannelProtocolError.
        """
        while not self._is_closed:
            try:
                item = receive(self._sock, self._codec)
            except BlockingIOError:
                wait(self._readable)
                continue
            if item is not None:
                self.received += 1
            return item
        raise ChannelClosed

    def close(self) -> None:
        """Close the socket and drop what is unsent; a waiting ``receive`` raises ChannelClosed."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._writer is not None:
            self._writer.kill(block=False)
        self._drop_queue()
        # A descriptor must not be closed under a watcher that waits for it.
        watchers = (self._readable, self._writable)
        get_hub().cancel_waits_close_and_then(watchers, ChannelClosed, self._sock.close)

    def _try_send(self, datagram: bytes, fds: Sequence[int]) -> bool:
        """Whether no more is to be done: the datagram is out, or the other side is dead."""
        self._is_busy = False
        try:
            send_datagram(self._sock, datagram, fds)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in BUSY_ERRORS:
                self._is_busy = True
                return False
            self._is_broken = True
        return True

    def _empty_queue(self) -> None:
        """The writer greenlet: lives while there is a queue."""
        try:
            while self._queue:
                datagram, fds = self._queue[0]
                if self._try_send(datagram, fds):
                    self._queue.popleft()
                    for fd in fds:
                        os.close(fd)
                elif self._is_busy:
                    gevent.sleep(_BUSY_PAUSE_S)
                else:
                    wait(self._writable)
        finally:
            self._writer = None

    def _drop_queue(self) -> None:
        while self._queue:
            for fd in self._queue.popleft()[1]:
                os.close(fd)
