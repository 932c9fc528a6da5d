"""A client's socket before the relay has it: reads and writes on the bare descriptor.

A gevent socket object a login would cost more than the login itself; one watcher is enough.
"""

import os
from typing import Final

from gevent import get_hub
from gevent.hub import Hub

from gpooler.errors import ProtocolViolation
from gpooler.log import LogContext
from gpooler.wire import messages, startup

_READ_EVENT: Final = 1
_WRITE_EVENT: Final = 2
# One read; a startup packet is at most 10,004 bytes, a SASL message less.
_READ_SIZE: Final = 16384


class ClientGone(Exception):
    """The client closed or broke the connection before its login was complete."""


class Connection:
    """Owns a non-blocking descriptor until ``detach`` or ``close``."""

    __slots__ = ("address", "buffer", "family", "fd", "number", "port", "who")

    def __init__(self, fd: int, family: int, address: bytes, port: int, number: int, who: LogContext) -> None:
        """``family`` 0 Unix, 4 or 6; ``address`` packed; ``number`` the client's id."""
        self.fd = fd
        self.family = family
        self.address = address
        self.port = port
        self.number = number
        self.who = who
        self.buffer = b""

    def _wait(self, event: int) -> None:
        hub: Hub = get_hub()
        watcher = hub.loop.io(self.fd, event)
        try:
            hub.wait(watcher)
        finally:
            watcher.stop()
            watcher.close()

    def read_more(self) -> None:
        """Append what arrives to ``buffer``. Yields. Raises ClientGone."""
        while True:
            try:
                data = os.read(self.fd, _READ_SIZE)
            except BlockingIOError:
                self._wait(_READ_EVENT)
                continue
            except OSError as error:
                raise ClientGone(str(error)) from error
            if not data:
                raise ClientGone("closed")
            self.buffer += data
            return

    def write(self, data: bytes) -> None:
        """Send all of ``data``. Yields. Raises ClientGone."""
        while data:
            try:
                data = data[os.write(self.fd, data) :]
            except BlockingIOError:
                self._wait(_WRITE_EVENT)
            except OSError as error:
                raise ClientGone(str(error)) from error

    def read_startup(self) -> startup.Packet:
        """The next startup packet. Yields. Raises ClientGone, ClientFault."""
        while len(self.buffer) < startup.LENGTH_BYTES:
            self.read_more()
        length = startup.parse_startup_length(self.buffer[: startup.LENGTH_BYTES])
        end = startup.LENGTH_BYTES + length
        while len(self.buffer) < end:
            self.read_more()
        packet = self.buffer[startup.LENGTH_BYTES : end]
        self.buffer = self.buffer[end:]
        return startup.parse_startup(packet)

    def read_password(self) -> bytes:
        """The body of the next message, which must be a password message. Yields. Raises ClientGone, …"""
        while True:
            split = messages.split_password_message(self.buffer)
            if split is not None:
                body, self.buffer = split
                return body
            self.read_more()

    def refuse_rest(self) -> None:
        """Raise ProtocolViolation when the client sent more than it was asked for."""
        if self.buffer:
            raise ProtocolViolation("received unencrypted data after an encryption request")

    def detach(self) -> int:
        """The descriptor, which is the caller's from now on."""
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> None:
        """Close the descriptor, if it is still ours."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
