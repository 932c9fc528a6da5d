"""Messages with descriptors over ``SOCK_SEQPACKET`` Unix pairs: the plain calls, without a hub.

One datagram is one message. Descriptors are duplicated by the kernel: the sender keeps its own, the
receiver owns what it gets, close-on-exec. See unix(7) and ``SCM_RIGHTS``.
"""

import array
import errno
import os
import socket
from collections.abc import Sequence
from typing import Final

from gpooler.broker.codec import MAX_DATAGRAM, ChannelProtocolError, Codec, Message

MAX_DESCRIPTORS: Final = 8  # in one datagram; more than any message of ours carries
_INT_BYTES: Final = array.array("i").itemsize
_ANCILLARY: Final = socket.CMSG_SPACE(MAX_DESCRIPTORS * _INT_BYTES)

# What "try again" looks like beside EAGAIN. ETOOMANYREFS: too many descriptors of this user are in
# flight (unix(7)); neither is followed by an event that says when to try again.
BUSY_ERRORS: Final = frozenset((errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS))


def pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a new channel, blocking, not inherited by an exec. The caller owns them."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, codec: Codec, message: Message, fds: Sequence[int] = ()) -> None:
    """Send ``message`` and copies of ``fds``; waits as ``sock`` does.

    Raises BlockingIOError when a non-blocking socket is full, OSError (BUSY_ERRORS mean "later", the rest
    that the other side is gone), ChannelProtocolError when the message cannot be sent at all.
    """
    send_datagram(sock, pack(codec, message, fds), fds)


def pack(codec: Codec, message: Message, fds: Sequence[int]) -> bytes:
    """The datagram of ``message``, checked against the descriptors. Raises ChannelProtocolError."""
    if len(fds) != message.DESCRIPTORS:
        raise ChannelProtocolError(f"{type(message).__name__} goes with {message.DESCRIPTORS} descriptors")
    return codec.encode(message)


def send_datagram(sock: socket.socket, datagram: bytes, fds: Sequence[int]) -> None:
    """Send what ``pack`` made. Raises OSError as ``send`` does."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([datagram], ancillary, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket, codec: Codec) -> tuple[Message, list[int]] | None:
    """The next message and its descriptors, which the caller owns from now on; None at the end.

    Waits as ``sock`` does. Raises BlockingIOError; ChannelProtocolError with every received
    descriptor closed; OSError.
    """
    datagram, fds, flags = _receive_datagram(sock)
    try:
        if not datagram:
            if fds:
                raise ChannelProtocolError("descriptors without a message")
            return None
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ChannelProtocolError("datagram was cut off")
        message = codec.decode(datagram)
        if len(fds) != message.DESCRIPTORS:
            raise ChannelProtocolError(f"{type(message).__name__} came with {len(fds)} descriptors")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return message, fds


def _receive_datagram(sock: socket.socket) -> tuple[bytes, list[int], int]:
    while True:
        try:
            datagram, ancillary, flags, _ = sock.recvmsg(MAX_DATAGRAM, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
            break
        except ConnectionResetError:
            # The peer died with messages of ours unread. What it had sent is still to be had: Linux
            # reports the error once, before the queue.
            continue
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _INT_BYTES])
    return datagram, list(fds), flags
