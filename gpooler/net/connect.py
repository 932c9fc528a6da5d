"""Opens connections to servers: TCP or Unix socket, with the options of the rule."""

import socket
from collections.abc import Sequence

import gevent.socket

from gpooler.errors import ServerConnectFailed
from gpooler.net.resolve import Address
from gpooler.net.tcp import Option


def connect(addresses: Sequence[Address], options: Sequence[Option]) -> tuple[gevent.socket.socket, Address]:
    """A connected, non-blocking socket and the address that answered; tried in turn. Yields.

    Bounded by the caller's ``gevent.Timeout``. Raises ServerConnectFailed.
    """
    causes: list[str] = []
    for address in addresses:
        sock = gevent.socket.socket(address.family, socket.SOCK_STREAM)
        try:
            if address.family != socket.AF_UNIX:
                for option in options:
                    sock.setsockopt(*option)
            sock.connect(address.sockaddr)
            return sock, address
        except OSError as error:
            sock.close()
            causes.append(f"{address.text}: {error.strerror or error}")
        except BaseException:
            sock.close()
            raise
    raise ServerConnectFailed(cause="; ".join(causes))
