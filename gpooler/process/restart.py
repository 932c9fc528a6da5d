"""Online restart in the master's loop: both sides of ``process/handover.py``, for a new master grows old."""

import os
import socket
import time
from collections.abc import Sequence
from typing import Protocol

from gpooler.broker.codec import ChannelProtocolError
from gpooler.config.model import Config
from gpooler.log import Logger
from gpooler.net.listen import Listener
from gpooler.process.changes import Changes
from gpooler.process.context import Phase
from gpooler.process.control import Drain, HeldServer
from gpooler.process.family import BROKER, Child, Family
from gpooler.process.handover import Estate, Failed, Gone, OldWorker, OldWorkerEnded, Serving, Take
from gpooler.process.link import Link
from gpooler.process.new_master import RESTART_S, NewMaster
from gpooler.process.old_master import OldMaster
from gpooler.process.operations import Operations
from gpooler.process.pidfile import PidFile
from gpooler.process.reload import Answer
from gpooler.process.systemd import Manager
from gpooler.process.vault import Vault
from gpooler.stats.shared import SharedCounters, fold


class Master(Protocol):
    """What is needed of the arbiter."""

    family: Family
    vault: Vault
    changes: Changes
    operations: Operations
    manager: Manager
    logger: Logger
    phase: Phase
    pid_file: PidFile | None
    metrics_listeners: Sequence[Listener]
    mock_key: bytes
    incarnation: int
    numbers: range  # of its workers

    @property
    def config(self) -> Config:
        """The one in force."""

    def move(self, phase: Phase) -> None:
        """Go on to that phase."""

    def begin_to_serve(self) -> None:
        """All is ready."""

    def serve_broker(self, *, is_settled: bool) -> None:
        """Tell a new broker that it knows every worker there is."""

    def start_missing(self) -> None:
        """Fork whoever is not there."""

    def drain_until(self, deadline_s: float | None) -> None:
        """The workers drain by somebody else's word; until then they have time."""

    def fail(self, text: str) -> None:
        """End: it could not boot."""

    def end_broker(self) -> None:
        """No worker lives any more."""


class Restart:
    """Of one master: whom it takes over from, and who takes over from it."""

    def __init__(self, master: Master, old: OldMaster | None) -> None:
        self._master = master
        self._old = old
        self._new: NewMaster | None = None
        self.is_opening = False  # our workers are given the listeners that the old ones have, too

    # --- for the loop ---------------------------------------------------------------------------

    @property
    def is_taking_over(self) -> bool:
        """Whether the old master still serves."""
        return self._old is not None and self._is_booting

    @property
    def is_awaiting_estate(self) -> bool:
        """Whether the old master's workers and servers are still to come."""
        return self._old is not None and not self._old.has_given

    @property
    def is_handed_over(self) -> bool:
        """Whether another master speaks to our workers."""
        return self._new is not None and self._new.has_all

    @property
    def may_change(self) -> bool:
        """Whether another configuration may come into force as far as this goes."""
        return self._new is None

    @property
    def links(self) -> list[Link]:
        """To other masters."""
        return [other.link for other in (self._old, self._new) if other is not None]

    @property
    def deadline_s(self) -> float | None:
        """When ``keep_time`` has something to do."""
        return None if self._new is None or self._new.is_serving else self._new.deadline_s

    def keep_time(self, now_s: float) -> None:
        """Give up a new master that does not serve in time."""
        if self.deadline_s is not None and self.deadline_s <= now_s:
            self.take_back(f"it did not serve within {RESTART_S:.0f} s")

    def listen(self) -> None:
        """Obey what other masters say; at our end nothing counts any more."""
        if self._master.phase == Phase.ENDED:
            return
        if self._new is not None:
            self._listen_to_new(self._new)
        if self._old is not None:
            self._listen_to_old(self._old)

    def ready(self) -> None:
        """All of our workers are ready, and so is the broker, if it could be."""
        broker = self._master.family.get(BROKER)
        if self._old is not None and not self._old.is_asked:
            self._old.ask(self._master.family.own_workers)
        elif broker is not None and broker.is_ready and not self.is_opening:
            if self._master.changes.keeps_listeners_back:
                self._open()
            elif self._old is None:
                self._master.begin_to_serve()

    def fail(self, text: str) -> None:
        """Our start has failed: the old master goes on."""
        if self._old is not None:
            self._old.fail(text)

    def forget(self) -> None:
        """In a child: close what is the master's alone."""
        if self._old is not None:
            self._old.forget()
        if self._new is not None:
            self._new.link.close()

    def close(self) -> None:
        """At the end."""
        if self._new is not None and not self._new.is_serving:
            self._new.end(self._master.family)
        for link in self.links:
            link.close()

    @property
    def _is_booting(self) -> bool:
        return self._master.phase == Phase.BOOTING

    # --- this is the old master ------------------------------------------------------------------

    def start(self, answer: Answer) -> None:
        """Start a new master; ``answer`` is told when it serves, or why it does not."""
        master = self._master
        fault = self._hindrance()
        if not fault:
            try:
                self._new = NewMaster(answer)
            except OSError as error:
                fault = f"could not start it: {error.strerror}"
        if self._new is None or fault:
            master.logger.error(f"no online restart: {fault}", context="master")
            answer(False, f"error: {fault}")
            return
        master.logger.info(f"the new master has pid {self._new.pid}", context="master")
        self._new.offer(
            master.config,
            incarnation=master.incarnation,
            numbers=master.numbers,
            mock_key=master.mock_key,
            listeners=master.changes.listeners,
            metrics_listeners=master.metrics_listeners,
            pid_file=master.pid_file,
        )

    def _hindrance(self) -> str:
        """Why there cannot be one now."""
        left = len(self._master.family.old_workers)
        if not self._master.config.service.enable_online_restart:
            return "enable_online_restart is off"
        if self._master.phase != Phase.SERVING:
            return f"gpooler is {'starting' if self._is_booting else 'ending'}"
        if self._new is not None:
            return "another online restart is under way"
        if left:
            return f"{left} {'worker' if left == 1 else 'workers'} of the one before still drain"
        if self._master.changes.is_under_way:
            return "a reload is under way"
        if os.getpid() == 1:
            return "the end of process 1 is that of its container: start gpooler by an init program"
        return ""

    def _listen_to_new(self, new: NewMaster) -> None:
        new.link.send_queued()
        try:
            for message, _ in new.link.receive():
                match message:
                    case Failed(text=text):
                        new.fault = text
                    case Take():
                        new.take = message
                    case Serving():
                        self._leave_to(new, message)
        except ChannelProtocolError as error:
            new.fault = f"it broke the protocol between masters: {error.log_text()}"
            new.link.close()
        if not new.link.is_closed:
            if new.take is not None and not new.has_all:
                self._hand_over(new)
        elif not new.is_serving:
            self.take_back(new.fault)
        elif self._master.phase < Phase.ENDED:
            self._master.logger.fatal("the new master is dead, and everything ends", context="master")
            self._master.move(Phase.ENDED)

    def _hand_over(self, new: NewMaster) -> None:
        """Once nothing is under way between us and our workers, and none is missing."""
        master = self._master
        workers = master.family.workers
        if len(workers) < len(master.numbers) or not all(worker.is_ready for worker in workers):
            return
        if any(worker.link.has_unsent for worker in workers):
            return
        master.operations.give_up("gpooler is being restarted: ask again")
        broker = master.family.get(BROKER)
        if broker is None:
            new.hand_over(master.family, master.vault)
        else:
            broker.link.close()  # it ends; then we go on

    def lose(self, child: Child, how: str) -> bool:
        """Let a dead child of ours go; whether that is as it should be, or another master's to judge."""
        self._master.family.remove(child)
        self._master.operations.miss(child)
        if self._new is None:
            return False
        if self._new.has_all:
            self._new.bury(child, how)
        return self._new.has_all or (self._new.take is not None and child.number == BROKER)

    def _leave_to(self, new: NewMaster, message: Serving) -> None:
        """It serves: what is left to do here is to bury our workers, which it drains."""
        master = self._master
        text = f"process {message.pid} serves"
        master.logger.info(f"{text}: this one ends with its workers", context="master")
        master.manager.replaced(message.pid)
        new.succeed(message, (*master.changes.listeners, *master.metrics_listeners), master.pid_file)
        master.changes.refuse_all("error: gpooler has been restarted")
        timeout_ms = master.config.service.graceful_shutdown_timeout_ms
        master.drain_until(time.monotonic() + timeout_ms / 1000 if timeout_ms else None)
        new.answer(True, f"{text}; what the old one has begun goes on to its end")

    def take_back(self, fault: str) -> None:
        """Go on as before the new master was started, which has failed; without one nothing is done."""
        new, self._new = self._new, None
        if new is None:
            return
        master = self._master
        new.end(master.family)
        for line in (*fault.splitlines(), "no online restart: all stays as it was"):
            master.logger.error(line, context="master")
        master.start_missing()
        new.answer(False, fault)
        master.changes.begin(master.family)

    # --- this is the new master ------------------------------------------------------------------

    def _listen_to_old(self, old: OldMaster) -> None:
        old.link.send_queued()
        family = self._master.family
        try:
            for message, fds in old.link.receive():
                match message:
                    case OldWorker(number=number, incarnation=incarnation, pid=pid):
                        link, counters = Link(socket.socket(fileno=fds[0])), SharedCounters.attach(fds[1])
                        family.add(Child(number, incarnation, pid, link, counters, is_old=True))
                    case HeldServer():
                        self._master.vault.hold(message, fds[0])
                    case Estate():
                        self._inherit(old, SharedCounters.attach(fds[0]))
                    case OldWorkerEnded(number=number, incarnation=incarnation, how=how):
                        child = family.get(number)
                        if child is not None and child.incarnation == incarnation:
                            self._bury(child, how)
                    case Gone():
                        self._own(old)
                        self._master.begin_to_serve()
        except ChannelProtocolError as error:
            self._master.logger.fatal(f"the old master: {error.log_text()}", context="master")
            old.link.close()
        if old.link.is_closed:
            self._miss(old)

    def _inherit(self, old: OldMaster, past: SharedCounters) -> None:
        """We have all workers there are: begin with their servers."""
        old.has_given = True
        fold(self._master.family.past, past)
        past.close()
        self._master.serve_broker(is_settled=True)

    def _open(self) -> None:
        """Have our workers accept, beside the old ones for a moment."""
        self.is_opening = True
        master = self._master
        master.changes.change(
            master.family, lambda: (master.config, [], []), self._on_open, title="listeners taken over"
        )

    def _on_open(self, is_good: bool, text: str) -> None:
        self.is_opening = False
        if not is_good:
            self._master.fail(text)
        elif self._old is not None:
            self._old.say_serving()
        else:
            self._master.begin_to_serve()

    def _own(self, old: OldMaster) -> None:
        """What the old master has let go of is ours; its workers drain."""
        self._master.changes.own(old.listener_locks)
        old.listener_locks = {}
        if self._master.pid_file is not None:
            self._master.pid_file.claim()
        for worker in self._master.family.old_workers:
            worker.link.send(Drain(is_patient=False, lets_in=True))

    def _bury(self, child: Child, how: str) -> None:
        family = self._master.family
        family.remove(child)
        self._master.operations.miss(child)
        left = len(family.old_workers)
        self._master.logger.info(f"{how}; old workers left: {left}", context="master")
        if self._master.phase >= Phase.DRAINING and not family.workers:
            self._master.end_broker()

    def _miss(self, old: OldMaster) -> None:
        """The old master is gone, and its workers with it."""
        self._old = None
        for child in self._master.family.old_workers:
            self._bury(child, f"{child.name} (pid {child.pid}) is gone with the old master")
        if not self._is_booting:
            return
        self._master.logger.error("the old master died: going on without it", context="master")
        self._own(old)
        if not old.has_given:
            self._master.serve_broker(is_settled=False)
        elif old.is_told:
            self._master.begin_to_serve()
