"""The new master's side of an online restart (``process/handover.py``): the process that was there before."""

import os
import socket
from collections.abc import MutableMapping, Sequence
from typing import Final

from gpooler.broker.codec import ChannelProtocolError
from gpooler.config.model import Config
from gpooler.errors import ConfigurationError
from gpooler.process.datagrams import receive
from gpooler.process.family import Child
from gpooler.process.handover import (
    CODEC,
    VARIABLE,
    VERSION,
    Failed,
    Offer,
    OfferEnd,
    OfferListener,
    OfferLock,
    Serving,
    Take,
)
from gpooler.process.link import Link
from gpooler.process.reload import unpack

OFFER_TIMEOUT_S: Final = 30.0


class OldMaster:
    """The one that started this process, and what it offers. Owns the channel and the descriptors."""

    def __init__(self, sock: socket.socket) -> None:
        """Read the offer; waits. Raises ConfigurationError."""
        self.sockets: list[socket.socket] = []  # that listen for clients
        self.metrics_sockets: list[socket.socket] = []
        self.listener_locks: dict[str, int] = {}  # of Unix sockets that we go on with, by path
        self.is_asked = False  # for its workers
        self.has_given = False  # the whole estate
        self.is_told = False  # that we serve
        self._locks: dict[str, int] = {}  # descriptors by the path of a Unix socket, or of the pid file
        self._kept: list[str] = []  # paths whose locks we go on with
        self.link = Link(sock, CODEC)
        try:
            self._read(sock)
        except (OSError, ChannelProtocolError) as error:
            raise ConfigurationError(f"the gpooler that runs makes no offer: {error}") from error
        except ConfigurationError as error:
            self.fail(error.log_text())
            raise

    def _read(self, sock: socket.socket) -> None:
        """Raises ConfigurationError, OSError, ChannelProtocolError."""
        sock.settimeout(OFFER_TIMEOUT_S)
        while (item := receive(sock, CODEC)) is not None:
            message, fds = item
            match message:
                case Offer():
                    self.offer = message
                    if message.version != VERSION:
                        os.close(fds[0])
                        raise ConfigurationError(
                            "this version cannot take over from the one that runs: stop that, start this"
                        )
                    self.config: Config = unpack(fds[0])
                case OfferListener(is_metrics=is_metrics):
                    sockets = self.metrics_sockets if is_metrics else self.sockets
                    sockets.append(socket.socket(fileno=fds[0]))
                case OfferLock(path=path):
                    self._locks[path] = fds[0]
                case OfferEnd():
                    sock.setblocking(False)
                    return
                case _:
                    raise ChannelProtocolError(f"{type(message).__name__} in an offer")
        raise ConnectionResetError("it ended")

    @property
    def mock_key(self) -> bytes:
        """The same in both generations: prepared statements go by names that are made with it."""
        return bytes.fromhex(self.offer.mock_key_hex)

    def first_worker(self, workers: int) -> int:
        """The lowest number of so many workers of ours: none has that of an old one."""
        offer = self.offer
        return 1 if offer.first_worker > workers else offer.first_worker + offer.workers

    def lock(self, path: str) -> int | None:
        """The lock of a file that we go on with, the caller's from now on; None: it has none."""
        lock_fd = self._locks.pop(path, None)
        if lock_fd is not None:
            self._kept.append(path)
        return lock_fd

    def keep_listener(self, path: str) -> None:
        """We go on with that Unix socket."""
        lock_fd = self.lock(path)
        if lock_fd is not None:
            self.listener_locks[path] = lock_fd

    def fail(self, text: str) -> None:
        """We end, for this reason."""
        self.link.send(Failed(text[:10_000]))

    def ask(self, workers: Sequence[Child]) -> None:
        """Our workers could serve: have everything handed over."""
        self.is_asked = True
        names = [number for worker in workers for number in (worker.number, worker.incarnation)]
        self.link.send(Take(tuple(names)))

    def say_serving(self) -> None:
        """Our workers accept."""
        self.is_told = True
        self.link.send(Serving(os.getpid(), tuple(self._kept)))

    def close_spare(self) -> None:
        """What the configuration does not ask for any more."""
        for sock in (*self.sockets, *self.metrics_sockets):
            sock.close()
        for fd in self._locks.values():
            os.close(fd)
        self.sockets, self.metrics_sockets, self._locks = [], [], {}

    def forget(self) -> None:
        """In a child: close what is the master's alone."""
        self.link.close()
        for fd in self.listener_locks.values():
            os.close(fd)


def old_master(environ: MutableMapping[str, str] = os.environ) -> OldMaster | None:
    """The one that started this process to take over, if one did. Raises ConfigurationError."""
    text = environ.pop(VARIABLE, None)
    if text is None:
        return None
    fd = int(text)
    os.set_inheritable(fd, False)
    return OldMaster(socket.socket(fileno=fd))
