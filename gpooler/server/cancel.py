"""Delivers one cancel request to a server: protocol chapter "Canceling Requests in Progress"."""

import gevent
import gevent.socket

from gpooler.net.connect import connect
from gpooler.net.resolve import Address
from gpooler.wire import messages


def send_cancel(address: Address, pid: int, secret: bytes, timeout_ms: int) -> bool:
    """Send the request and wait until the server has closed: then the signal is on its way. Yields.

    ``timeout_ms`` 0 is without limit. Returns whether it was delivered in time. Raises ServerConnectFailed.
    """
    is_over = False
    with gevent.Timeout(timeout_ms / 1000 or None, False):
        sock, _ = connect((address,), ())
        try:
            sock.sendall(messages.cancel_request(pid, secret))
            while sock.recv(64):
                pass
            is_over = True
        except OSError:
            is_over = True  # a reset is an end as good as EOF
        finally:
            sock.close()
    return is_over
