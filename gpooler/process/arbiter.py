"""Forks the broker and the workers, keeps them alive, and ends them: the loop of the master.

Signals only enqueue; this loop alone acts. It holds no client, no hub and no second thread. The model is
gunicorn's arbiter: an exit status tells *could not boot*, which ends everything while nothing has served
yet, from *died*, which starts a successor: at once the first time, then with a growing pause.
"""

import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gpooler.auth.failures import FailureTable
from gpooler.broker.codec import ChannelProtocolError
from gpooler.config.effective import effective
from gpooler.log import LogSettings
from gpooler.logs.direct import DirectLog, open_direct
from gpooler.net.listen import Listener
from gpooler.process.admin import TEXT_MOST, AdminSocket
from gpooler.process.changes import Changes, Made
from gpooler.process.context import (
    EXIT_BOOT,
    EXIT_DRAIN_TIMEOUT,
    EXIT_NOW,
    EXIT_OK,
    BrokerContext,
    Phase,
    WorkerContext,
)
from gpooler.process.control import (
    Act,
    Acted,
    AllGone,
    AwaitGone,
    Committed,
    Complaint,
    Drain,
    HeldServer,
    Kill,
    Killed,
    LetServer,
    Prepared,
    Ready,
    ReopenLog,
    Serve,
)
from gpooler.process.datagrams import pair
from gpooler.process.family import BROKER, Child, Family, name_of
from gpooler.process.fork import fork
from gpooler.process.heartbeat import STALL_S, TICK_S
from gpooler.process.link import Link
from gpooler.process.old_master import OldMaster
from gpooler.process.operations import Operations
from gpooler.process.pidfile import PidFile
from gpooler.process.reload import Answer, ReloadRefused
from gpooler.process.restart import Restart
from gpooler.process.settings import log_settings
from gpooler.process.signals import SignalQueue
from gpooler.process.systemd import Manager
from gpooler.process.vault import Vault
from gpooler.stats.registry import ProcessWord
from gpooler.stats.shared import SharedCounters

if TYPE_CHECKING:
    from gpooler.config.model import Config

BOOT_TRIES: Final = 3  # deaths of one child before anything has served: a fault, not an accident
PAUSE_FIRST_S: Final = 0.1
PAUSE_MOST_S: Final = 5.0
STABLE_S: Final = 10.0  # a child that lived so long died of something new
BROKER_END_S: Final = 5.0  # it has nothing left to do when no worker lives
MOCK_KEY_BYTES: Final = 32  # auth/exchange.py: salts of users that do not exist


@dataclass(frozen=True, slots=True)
class EntryPoints:
    """What a child runs after the fork; the return value is its exit status."""

    run_worker: Callable[[WorkerContext], int]
    run_broker: Callable[[BrokerContext], int]


class Arbiter:
    """One run of gpooler. Owns its children and the listeners; log and pid file stay the caller's."""

    def __init__(
        self,
        config: "Config",
        *,
        config_path: Path,
        workers: int,
        listeners: Sequence[Listener],
        log: DirectLog,
        log_settings: LogSettings,
        entries: EntryPoints,
        pid_file: PidFile | None = None,
        is_debug: bool = False,
        metrics_listeners: Sequence[Listener] = (),
        on_serving: Callable[[], None] = lambda: None,
        old: OldMaster | None = None,
    ) -> None:
        """``old``: who runs until we serve; then its workers drain below us (``process/handover.py``)."""
        self.changes = Changes(
            config,
            config_path,
            listeners,
            can_begin=self._can_change,
            on_done=self._on_change,
            logger=log.logger,
            are_given=old is None,
        )
        self._restart = Restart(self, old)
        self._workers = workers
        first = 1 if old is None else old.first_worker(workers)
        self.numbers = range(first, first + workers)
        self._log = log
        self.logger = log.logger
        self._log_settings = log_settings
        self._entries = entries
        self.pid_file = pid_file
        self._is_debug = is_debug
        self.mock_key = os.urandom(MOCK_KEY_BYTES) if old is None else old.mock_key
        self._failures = FailureTable(workers, first)
        self.metrics_listeners = tuple(metrics_listeners)
        self._on_serving = on_serving
        self.phase = Phase.BOOTING
        self._status = EXIT_OK
        self.incarnation = 0 if old is None else old.offer.incarnation
        self._terminations = 0
        self._drain_s: float | None = None  # when the drain is to begin
        self._is_patient = False  # it waits for clients to leave
        self._deadline_s: float | None = None  # of the drain, then of the broker's end
        self._tick_s = 0.0
        self._due_s: dict[int, float] = {}  # when a dead child's successor is to be forked, by number
        self._deaths: dict[int, int] = {}  # in a row, by number

    def run(self) -> int:
        """Run until a signal or a failed boot ends it; no child is left. Returns the exit status.

        Raises RuntimeError when the process has a second thread or a hub.
        """
        self._signals = SignalQueue()
        self.family = Family()
        self.vault = Vault()
        self._admin = AdminSocket()
        self.manager = Manager()
        self._alive_s = None if self.manager.watchdog_s is None else 0.0
        self.operations = Operations(self, self.vault)
        try:
            self._start(BROKER)
            for number in self.numbers:
                self._start(number)
            if not self._restart.is_awaiting_estate:
                self.serve_broker(is_settled=True)
            while self.phase < Phase.ENDED:
                self._wait()
                self._obey_signals()
                self._obey_askers()
                self._listen_to_children()
                self._reap()
                self._restart.listen()
                self._keep_time()
        finally:
            self._restart.close()
            self._kill_all()
            self.family.close()
            self.vault.close()
            self._admin.close()
            self.manager.close()
            self._signals.close()
            self.changes.close_listeners()
        return self._status

    # --- children -------------------------------------------------------------------------------

    def _start(self, number: int) -> None:
        """Fork a child and introduce it to the others."""
        self.incarnation += 1
        incarnation = self.incarnation
        counters = SharedCounters.create()
        ours, theirs = pair()

        def body() -> int:
            ours.close()
            return self._run_child(number, incarnation, theirs, counters)

        try:
            pid = fork(f"gpooler: {name_of(number)}", body, self._log_crash)
        except BaseException:
            ours.close()
            theirs.close()
            counters.close()
            raise
        theirs.close()
        self.family.add(Child(number, incarnation, pid, Link(ours), counters))
        self.logger.debug(f"{name_of(number)} has pid {pid}", context="master")

    def _start_successor(self, number: int) -> None:
        """Fork anew; where the system has no room for it now, try again later."""
        try:
            self._start(number)
        except OSError as error:
            self.logger.error(f"could not start {name_of(number)}: {error}", context="master")
            self._due_s[number] = time.monotonic() + PAUSE_MOST_S
            return
        if number == BROKER and not self._restart.is_awaiting_estate:
            self.serve_broker(is_settled=False)

    def _run_child(
        self, number: int, incarnation: int, control: socket.socket, counters: SharedCounters
    ) -> int:
        """In the child: close what is not its own, run its entry point, return the exit status."""
        self._signals.forget()
        self.family.forget()
        self.vault.close()
        self._admin.close()
        self.manager.close()
        self.changes.forget()
        self._restart.forget()
        self._log.close()
        if self.pid_file is not None:
            os.close(self.pid_file.fd)
        for listener in self.changes.listeners:
            if listener.lock_fd >= 0:
                os.close(listener.lock_fd)
            if number == BROKER:
                listener.socket.close()
        if number != BROKER:
            for listener in self.metrics_listeners:
                listener.socket.close()
        if number == BROKER:
            return self._entries.run_broker(
                BrokerContext(
                    config=self.config,
                    workers=self._workers,
                    incarnation=incarnation,
                    control=control,
                    past=self.family.past,
                    counters=counters,
                    metrics_listeners=self.metrics_listeners,
                    log=self._log_settings,
                    is_debug=self._is_debug,
                )
            )
        return self._entries.run_worker(
            WorkerContext(
                config=self.config,
                worker=number,
                workers=self._workers,
                incarnation=incarnation,
                control=control,
                listeners=self.changes.listeners,
                counters=counters,
                log=self._log_settings,
                is_debug=self._is_debug,
                mock_key=self.mock_key,
                past=self.family.past,
                failures=self._failures,
            )
        )

    def _log_crash(self, text: str) -> None:
        """In the child, whose log may be in any state."""
        log = open_direct(self._log_settings)
        log.logger.fatal(f"uncaught exception: {text}", context="master")
        log.close()

    def serve_broker(self, *, is_settled: bool) -> None:
        """Tell a new broker that it knows every worker there is, and every server (``control.Serve``)."""
        broker = self.family.get(BROKER)
        if broker is not None:
            self.vault.hand_over(broker.link)
            broker.link.send(Serve(is_settled))
            self.operations.tell_new_broker()

    def start_missing(self) -> None:
        """``restart.Master``."""
        for number in (BROKER, *self.numbers):
            if self.family.get(number) is None:
                self._due_s.setdefault(number, 0.0)

    def _reap(self) -> None:
        for child in self.family.own:
            if self.phase == Phase.ENDED:
                return  # the end kills and reaps whoever is left
            pid, wait_status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                self._bury(child, os.waitstatus_to_exitcode(wait_status))

    def _bury(self, child: Child, code: int) -> None:
        """Draw the conclusions from the end of a child; ``code`` is minus the signal where one ended it."""
        how = f"was ended by signal {-code}" if code < 0 else f"exited with status {code}"
        text = f"{child.name} (pid {child.pid}) {how}"
        if not self._restart.is_handed_over:
            with suppress(ChannelProtocolError):
                self._listen_to(child)  # its last words
        is_expected = self._restart.lose(child, text)
        self.changes.miss(self.family, child)
        if is_expected and self.phase < Phase.DRAINING:
            self.logger.info(text, context="master")
        elif self.phase >= Phase.DRAINING and child.number != BROKER:
            is_clean = code == EXIT_OK
            (self.logger.info if is_clean else self.logger.error)(text, context="master")
            if not self.family.workers:
                self.end_broker()
        elif self.phase >= Phase.ENDING:
            self.logger.info(text, context="master")
            self.move(Phase.ENDED)
        elif self._is_failed_boot(child, code):
            self.fail(f"{text}: could not boot")
        else:
            pause_s = self._pause(child)
            after = f" in {pause_s:.1f} s" if pause_s else ""
            self.logger.error(f"{text}; starting another{after}", context="master")
            self._due_s[child.number] = time.monotonic() + pause_s

    def _is_failed_boot(self, child: Child, code: int) -> bool:
        """Whether to give up: only while gpooler has not served yet."""
        if self.phase != Phase.BOOTING or child.is_ready:
            return False
        return code == EXIT_BOOT or self._deaths.get(child.number, 0) + 1 >= BOOT_TRIES

    def _pause(self, child: Child) -> float:
        """Seconds until the successor of a dead child is forked."""
        if time.monotonic() - child.started_s >= STABLE_S:
            self._deaths.pop(child.number, None)
        deaths = self._deaths.get(child.number, 0)
        self._deaths[child.number] = deaths + 1
        return min(PAUSE_FIRST_S * 2 ** (deaths - 1), PAUSE_MOST_S) if deaths else 0.0

    def _kill_all(self) -> None:
        """End every child at once and reap it."""
        for child in self.family.own:
            os.kill(child.pid, signal.SIGKILL)
        for child in self.family.own:
            os.waitpid(child.pid, 0)

    # --- the loop -------------------------------------------------------------------------------

    def move(self, phase: Phase) -> None:
        if phase < self.phase:
            raise AssertionError(f"master cannot go from {self.phase.name} to {phase.name}")
        self.phase = phase
        self.family.past.set_process(ProcessWord.PHASE, phase)
        if phase == Phase.SERVING:
            self.manager.ready(self._serving())
            self._on_serving()
        elif phase in (Phase.LEAVING, Phase.ENDED):
            self.manager.stopping("draining" if phase == Phase.LEAVING else "ending")

    def _serving(self) -> str:
        names = ", ".join([listener.name for listener in self.changes.listeners])
        return f"{self._workers} workers listen on {names}"

    def _wait(self) -> None:
        """Wait for a signal, a message, room in a channel, or the next thing that is due."""
        poll = select.poll()
        for fd in (self._signals.fileno(), *self._admin.filenos()):
            poll.register(fd, select.POLLIN)
        links = [] if self._restart.is_handed_over else [child.link for child in self.family.children]
        for link in links + self._restart.links:
            if not link.is_closed:
                events = select.POLLIN | (select.POLLOUT if link.has_unsent else 0)
                poll.register(link.fileno(), events)
        now_s = time.monotonic()
        times_s = [self._tick_s, *self._due_s.values()]
        others_s = (self._drain_s, self._deadline_s, self._alive_s, self._restart.deadline_s)
        times_s += [due_s for due_s in others_s if due_s is not None]
        poll.poll(max(0, min(times_s) - now_s) * 1000)

    def _obey_signals(self) -> None:
        for number in self._signals.read():
            if number in (signal.SIGTERM, signal.SIGINT):
                self._terminate(number)
            elif number == signal.SIGUSR1:
                self._log.reopen()
                for child in self.family.children:
                    child.link.send(ReopenLog())
                self.logger.info("log reopened", context="master")
            elif number == signal.SIGHUP:
                self.logger.info("got SIGHUP: reloading", context="master")
                self.reload(lambda is_good, text: None)  # the log has it
            elif number == signal.SIGUSR2:
                self.logger.info("got SIGUSR2: restarting", context="master")
                self._restart.start(lambda is_good, text: None)

    def _obey_askers(self) -> None:
        for asker, request in self._admin.read():
            if request.get("do") == "restart":
                self.logger.info("an online restart was asked for", context="master")
                self._restart.start(asker.answer)
            elif request.get("do") != "reload":
                asker.answer(False, f"unknown request {request.get('do')!r}")
            elif request.get("is_dry_run"):
                asker.answer(*self.changes.try_reload())
            else:
                self.logger.info("a reload was asked for", context="master")
                self.reload(asker.answer)

    def _listen_to_children(self) -> None:
        if self._restart.is_handed_over:
            return
        for child in self.family.children:
            child.link.send_queued()
            try:
                self._listen_to(child)
            except ChannelProtocolError as error:
                self._kill(child, f"broke the protocol between processes: {error.log_text()}")

    def _listen_to(self, child: Child) -> None:
        """Raises ChannelProtocolError."""
        for message, fds in child.link.receive():
            match message:
                case Ready():
                    self._note_ready(child)
                case Complaint() if child.number == BROKER:
                    self._heed(message)
                case HeldServer() if child.number == BROKER:
                    self.vault.hold(message, fds[0])
                case LetServer() if child.number == BROKER:
                    self.vault.let(message)
                    self.operations.look()
                case AllGone() if child.number == BROKER:
                    self.operations.gone(message.token)
                case Act() if child.number != BROKER:
                    self.operations.perform(message, self._answerer(child, message))
                case Killed() if child.number != BROKER:
                    self.operations.killed(child, message.serial, message.count)
                case Prepared() | Committed():
                    self.changes.hear(self.family, child, message)
                case _:
                    for fd in fds:
                        os.close(fd)
                    raise ChannelProtocolError(f"{type(message).__name__} from {child.name}")

    def _note_ready(self, child: Child) -> None:
        child.is_ready = True
        if self.phase != Phase.BOOTING:
            return
        workers = self.family.own_workers
        if len(workers) < self._workers or not all(each.is_ready for each in workers):
            return
        self._restart.ready()

    def begin_to_serve(self) -> None:
        """All is ready."""
        self.move(Phase.SERVING)
        self.logger.info(f"ready: {self._serving()}", context="master")
        self.changes.begin(self.family)

    def _heed(self, complaint: Complaint) -> None:
        """End a worker that the broker cannot work with."""
        child = self.family.get(complaint.worker)
        if child is not None and child.number != BROKER and child.incarnation == complaint.incarnation:
            self._kill(child, f"is refused by the broker: {complaint.text}")

    def _kill(self, child: Child, why: str) -> None:
        self.logger.error(f"{child.name} (pid {child.pid}) {why}; killing it", context="master")
        os.kill(child.pid, signal.SIGKILL)

    def _keep_time(self) -> None:
        """Do what is due: successors, deadlines, heartbeats."""
        now_s = time.monotonic()
        for number in [number for number, due_s in self._due_s.items() if due_s <= now_s]:
            del self._due_s[number]
            if number == BROKER or self.phase < Phase.DRAINING:
                self._start_successor(number)
        if self._alive_s is not None and self._alive_s <= now_s and self.manager.watchdog_s is not None:
            self._alive_s = now_s + self.manager.watchdog_s
            self.manager.alive()
        if self._drain_s is not None and self._drain_s <= now_s:
            self._drain_s = None
            self._drain()
        if self._deadline_s is not None and self._deadline_s <= now_s:
            self._deadline_s = None
            self._give_up()
        self._restart.keep_time(now_s)
        if self._tick_s <= now_s:
            self._tick_s = now_s + TICK_S
            for child in self.family.own:
                if child.is_ready and child.is_stalled(now_s):
                    self._kill(child, f"has not worked for {STALL_S:.0f} s")

    # --- what operators ask for -----------------------------------------------------------------

    @property
    def config(self) -> "Config":
        """The one in force."""
        return self.changes.config

    def reload(self, answer: Answer) -> None:
        """``operations.Master``."""
        if self.phase == Phase.SERVING:
            self.manager.reloading()

        def tell(is_good: bool, text: str) -> None:
            if self.phase == Phase.SERVING:
                self.manager.ready(self._serving())
            answer(is_good, text)

        self.changes.reload(self.family, tell)

    def change(self, make: Callable[[], Made], answer: Answer, *, title: str) -> None:
        """``operations.Master``."""
        self.changes.change(self.family, make, answer, title=title)

    def _can_change(self) -> bool:
        if self.phase > Phase.SERVING:
            raise ReloadRefused("gpooler is ending")
        return self._restart.may_change and (self.phase == Phase.SERVING or self._restart.is_opening)

    def _on_change(self, config: "Config", is_reload: bool) -> None:
        settings = log_settings(config)
        if settings != self._log_settings:
            self._log_settings = settings
            self._log.configure(settings)
        if is_reload and config.logging.log_config:
            for line in effective(config).splitlines():
                self.logger.info(line, context="config")

    def _answerer(self, child: Child, act: Act) -> Answer:
        """Tells a worker what became of what it asked for."""
        return lambda is_good, text: child.link.send(Acted(act.token, is_good, text[:TEXT_MOST]))

    def tell_broker(self, message: AwaitGone) -> None:
        """``operations.Master``."""
        broker = self.family.get(BROKER)
        if broker is not None:
            broker.link.send(message)

    def tell_workers(self, message: Kill) -> list[Child]:
        """``operations.Master``."""
        workers = self.family.workers
        for worker in workers:
            worker.link.send(message)
        return workers

    def shut_down(self, *, is_patient: bool, is_now: bool) -> None:
        """``operations.Master``."""
        self.logger.info("a shutdown was asked for", context="master")
        if is_now:
            self.move(Phase.ENDED)
        elif self.phase < Phase.LEAVING:
            self._leave(is_patient=is_patient)

    # --- the end --------------------------------------------------------------------------------

    def fail(self, text: str) -> None:
        """``restart.Master``."""
        self.logger.fatal(text, context="master")
        self._restart.fail(text)
        self._status = EXIT_BOOT
        self.move(Phase.ENDED)

    def drain_until(self, deadline_s: float | None) -> None:
        """``restart.Master``."""
        self.manager.close()
        self._alive_s = None
        self._deadline_s = deadline_s
        self.move(Phase.LEAVING)
        self.move(Phase.DRAINING)
        if not self.family.workers:
            self.end_broker()

    def _terminate(self, number: signal.Signals) -> None:
        """Begin the graceful shutdown; the last of ``max_sigterms_to_die`` ends everything at once."""
        service = self.config.service
        most = service.max_sigterms_to_die
        if self._restart.is_taking_over:
            self.fail(f"got {number.name}")
            return
        self._terminations += 1
        if self._terminations > 1:
            self.logger.info(f"got {number.name} again ({self._terminations} of {most})", context="master")
        if self._terminations >= most:
            self.logger.error("exiting at once", context="master")
            self._status = EXIT_NOW
            self.move(Phase.ENDED)
        elif self.phase < Phase.LEAVING:
            delay_s = service.drain_delay_ms / 1000
            when = f" in {delay_s:.1f} s" if delay_s else ""
            self.logger.info(f"got {number.name}: draining{when}", context="master")
            self._leave(is_patient=False)

    def _leave(self, *, is_patient: bool) -> None:
        """Drain when health checks have had time to see it; ``is_patient``: for as long as clients stay."""
        self._restart.take_back("gpooler is told to end")
        self.move(Phase.LEAVING)
        self._is_patient = is_patient
        self._drain_s = time.monotonic() + self.config.service.drain_delay_ms / 1000

    def _drain(self) -> None:
        """Take no new clients and let the workers finish what runs."""
        self.move(Phase.DRAINING)
        # The workers close theirs: from then on the kernel refuses, rather than queues, clients.
        self.changes.close_listeners()
        for worker in self.family.workers:
            worker.link.send(Drain(self._is_patient, lets_in=False))
        timeout_ms = self.config.service.graceful_shutdown_timeout_ms
        if timeout_ms and not self._is_patient:
            self._deadline_s = time.monotonic() + timeout_ms / 1000
        if not self.family.workers:
            self.end_broker()

    def end_broker(self) -> None:
        """No worker lives: the broker ends at the EOF of its control channel."""
        self.move(Phase.ENDING)
        broker = self.family.get(BROKER)
        if broker is None:
            self.move(Phase.ENDED)
            return
        broker.link.close()
        self._deadline_s = time.monotonic() + BROKER_END_S

    def _give_up(self) -> None:
        """A deadline passed: of the drain, or of the broker's end."""
        if self.phase == Phase.DRAINING:
            self.logger.error("graceful_shutdown_timeout_ms passed: exiting", context="master")
            self._status = EXIT_DRAIN_TIMEOUT
        self.move(Phase.ENDED)
