"""Ends a server whose worker is dead: cancel what runs, shut the socket down, wait for EOF.

DESIGN §3: a slot is free when its PostgreSQL process is gone.
"""

import os
import socket
from collections.abc import Callable
from typing import Final

import gevent
import gevent.socket

from gpooler.broker.acts import Bury
from gpooler.errors import GpoolerError
from gpooler.log import Logger

_SHORT_S: Final = 0.02  # an idle server sees the shutdown and is gone: no cancel is needed
_TIMEOUT_LEAST_S: Final = 1.0
_CHUNK: Final = 65_536


def bury(act: Bury, fd: int, cancel: Callable[[str, str, int, bytes, int], None], logger: Logger) -> None:
    """Return when the server's process is gone, however long that takes. Yields. ``fd`` stays the caller's.

    ``cancel`` as in ``broker.service``. A process that stays beyond the act's timeout is logged once.
    """
    sock = socket.socket(fileno=os.dup(fd))
    sock.setblocking(False)
    try:
        try:
            # Not the receiving half: then our own shutdown would look like the server's end.
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # not connected any more
        timeout_s = max(_TIMEOUT_LEAST_S, act.timeout_us / 1_000_000)
        if _reaches_eof(sock, _SHORT_S):
            return
        if act.pid:
            try:
                cancel(act.rule, act.endpoint, act.pid, bytes.fromhex(act.secret_hex), int(timeout_s * 1000))
            except (GpoolerError, ValueError) as error:
                logger.error(f"cancel at {act.endpoint} failed: {error}", context="broker")
        if _reaches_eof(sock, timeout_s):
            return
        logger.error(
            f"server process {act.pid or 'in login'} at {act.endpoint} stays after its worker died;"
            " its slot stays taken",
            context="broker",
        )
        _reaches_eof(sock, None)
    finally:
        sock.close()


def _reaches_eof(sock: socket.socket, timeout_s: float | None) -> bool:
    """Read and forget until EOF or a reset; False when ``timeout_s`` has passed. Yields."""
    timeout = gevent.Timeout.start_new(timeout_s)
    try:
        while True:
            try:
                if not sock.recv(_CHUNK):
                    return True
            except BlockingIOError:
                gevent.socket.wait_read(sock.fileno())
            except OSError:
                return True
    except gevent.Timeout as error:
        if error is not timeout:
            raise
        return False
    finally:
        timeout.close()
