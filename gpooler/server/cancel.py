"""Delivers one cancel request to a server: protocol chapter "Canceling Requests in Progress"."""

import socket

import gevent

from gpooler.errors import ServerConnectFailed
from gpooler.net.connect import connect
from gpooler.net.resolve import Address
from gpooler.net.tls import Connector, Stream, TlsFault
from gpooler.wire import messages


def send_cancel(
    address: Address, pid: int, secret: bytes, timeout_ms: int, connector: Connector | None
) -> bool:
    """Send the request and wait until the server has closed: then the signal is on its way. Yields.

    ``timeout_ms`` 0 is without limit; ``connector`` is that of the storage, None: plain. Returns whether it
    was delivered in time. Raises ServerConnectFailed.
    """
    is_over = False
    with gevent.Timeout(timeout_ms / 1000 or None, False):
        sock, _ = connect((address,), ())
        try:
            # (``allow`` begins without: PostgreSQL takes a cancel request from everybody.)
            has_tls = connector is not None and address.family != socket.AF_UNIX and connector.tries[0]
            stream = connector.secure(sock) if connector is not None and has_tls else Stream(sock, None)
            stream.sendall(messages.cancel_request(pid, secret))
            while stream.recv():
                pass
            is_over = True
        except TlsFault as error:
            raise ServerConnectFailed(cause=f"{address.text}: TLS: {error}") from error
        except OSError:
            is_over = True  # a reset is an end as good as EOF
        finally:
            sock.close()
    return is_over
