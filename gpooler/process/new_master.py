"""The old master's side of an online restart (``process/handover.py``): the process that is to take over."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Final

from gpooler.config.model import Config
from gpooler.net.listen import Listener
from gpooler.process.control import DetachPeer
from gpooler.process.datagrams import pair
from gpooler.process.family import Child, Family
from gpooler.process.handover import (
    CODEC,
    VARIABLE,
    VERSION,
    Estate,
    Gone,
    Offer,
    OfferEnd,
    OfferListener,
    OfferLock,
    OldWorker,
    OldWorkerEnded,
    Serving,
    Take,
)
from gpooler.process.link import Link
from gpooler.process.pidfile import PidFile
from gpooler.process.reload import Answer, pack
from gpooler.process.vault import Vault
from gpooler.stats.registry import ProcessWord

RESTART_S: Final = 60.0  # from its start until it serves
# What a service manager has said to this process alone: sd_listen_fds(3), sd_watchdog_enabled(3).
_OURS_ALONE: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID")


class NewMaster:
    """One that was started. Owns the process and our end of the channel to it."""

    def __init__(self, answer: Answer) -> None:
        """Start the same command anew; ``answer`` is told how it ends. Raises OSError."""
        ours, theirs = pair()
        environment = {name: value for name, value in os.environ.items() if name not in _OURS_ALONE}
        environment[VARIABLE] = str(theirs.fileno())
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, *sys.orig_argv[1:]], env=environment, pass_fds=[theirs.fileno()]
                )
            except BaseException:
                ours.close()
                raise
        self.link = Link(ours, CODEC)
        self.answer = answer
        self.fault = "it ended"  # why it does not serve
        self.take: Take | None = None  # it waits for what we have
        self.has_all = False  # it has it
        self.is_serving = False
        self.deadline_s = time.monotonic() + RESTART_S

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def offer(
        self,
        config: Config,
        *,
        incarnation: int,
        numbers: range,
        mock_key: bytes,
        listeners: Iterable[Listener],
        metrics_listeners: Iterable[Listener],
        pid_file: PidFile | None,
    ) -> None:
        """Tell it all that it needs to start."""
        fd = pack(config)
        offer = Offer(VERSION, os.getpid(), incarnation, numbers.start, len(numbers), mock_key.hex())
        self.link.send(offer, [fd])
        os.close(fd)
        for listener in listeners:
            self.link.send(OfferListener(is_metrics=False), [listener.socket.fileno()])
            if listener.lock_fd >= 0:
                self.link.send(OfferLock(listener.host), [listener.lock_fd])
        for listener in metrics_listeners:
            self.link.send(OfferListener(is_metrics=True), [listener.socket.fileno()])
        if pid_file is not None:
            self.link.send(OfferLock(pid_file.path), [pid_file.fd])
        self.link.send(OfferEnd())

    def hand_over(self, family: Family, vault: Vault) -> None:
        """All workers, every server's socket, all counts; the broker is gone. From now on we only bury."""
        self.has_all = True
        for worker in family.workers:
            message = OldWorker(worker.number, worker.incarnation, worker.pid)
            self.link.send(message, [worker.link.fileno(), worker.counters.fd])
        vault.hand_over(self.link)
        self.link.send(Estate(), [family.past.fd])

    def bury(self, child: Child, how: str) -> None:
        """A worker that it has was reaped."""
        self.link.send(OldWorkerEnded(child.number, child.incarnation, how))

    def succeed(self, message: Serving, listeners: Sequence[Listener], pid_file: PidFile | None) -> None:
        """It serves: let go of what it has, close the rest."""
        self.is_serving = True
        for listener in listeners:
            if listener.host in message.kept:
                listener.abandon()
            else:
                listener.close()
        if pid_file is not None and pid_file.path in message.kept:
            pid_file.abandon()
        self.link.send(Gone())

    def end(self, family: Family) -> None:
        """It has failed: end what is left of it, and have the workers forget those of its own."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)  # its children go with it
        self._process.wait()
        self.link.close()
        if self.has_all and self.take is not None:
            family.past.set_process(ProcessWord.FOLDED, 0)
            for worker in family.workers:
                for at in range(0, len(self.take.workers), 2):
                    worker.link.send(DetachPeer(*self.take.workers[at : at + 2]))
