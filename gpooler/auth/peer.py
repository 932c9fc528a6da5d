"""Who is at the other end of a Unix socket, as the kernel says: ``SO_PEERCRED`` of unix(7)."""

import _socket
import pwd
import struct
from typing import Final

_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid


def peer_uid(fd: int) -> int:
    """The user id of the process that connected. Raises OSError."""
    # a bare socket: gevent's would change the descriptor, which stays the caller's
    sock = _socket.socket(fileno=fd)
    try:
        data = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _CREDENTIALS.size)
    finally:
        sock.detach()
    uid: int = _CREDENTIALS.unpack(data)[1]
    return uid


def name_of(uid: int) -> str | None:
    """The name of a user id, None when it has none. May ask a directory: to be called in a thread."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None
