"""The children that live, the channels between them, and what the dead have counted."""

import time
from typing import Final

from gpooler.process.control import AttachBroker, AttachPeer, AttachWorker, DetachPeer, DetachWorker
from gpooler.process.datagrams import pair
from gpooler.process.heartbeat import Watch, look
from gpooler.process.link import Link
from gpooler.stats.registry import ProcessWord
from gpooler.stats.shared import SharedCounters, fold

BROKER: Final = 0  # the broker's number among the children; workers count from 1


class Child:
    """A process that was forked and not reaped yet. Owns its link and its counters.

    ``is_old``: by the master before this one, which will reap it (``process/handover.py``).
    """

    def __init__(
        self,
        number: int,
        incarnation: int,
        pid: int,
        link: Link,
        counters: SharedCounters,
        *,
        is_old: bool = False,
    ) -> None:
        self.number = number
        self.incarnation = incarnation
        self.pid = pid
        self.link = link
        self.counters = counters
        self.started_s = time.monotonic()
        self.is_old = is_old
        self.is_ready = is_old
        self.has_history = is_old  # it was given a channel to a broker, so it may hold leases
        self._watch = Watch()

    @property
    def name(self) -> str:
        """For log lines."""
        return name_of(self.number)

    def is_stalled(self, now_s: float) -> bool:
        """Whether its beats stand still, as heartbeat.py judges; to be asked once a tick."""
        beats = (self.counters.process(ProcessWord.HUB_BEAT), self.counters.process(ProcessWord.RELAY_BEAT))
        state, cpu_ns = look(self.pid)
        return self._watch.is_stalled(now_s, beats, state, cpu_ns)


class Family:
    """All children by number; every two of them that speak to each other get a fresh channel."""

    def __init__(self) -> None:
        self.past = SharedCounters.create()
        self._children: dict[int, Child] = {}

    def __len__(self) -> int:
        return len(self._children)

    @property
    def children(self) -> list[Child]:
        """All that live."""
        return list(self._children.values())

    @property
    def workers(self) -> list[Child]:
        """The workers that live."""
        return [child for child in self._children.values() if child.number != BROKER]

    @property
    def own(self) -> list[Child]:
        """Those that this master has forked."""
        return [child for child in self._children.values() if not child.is_old]

    @property
    def own_workers(self) -> list[Child]:
        """The workers that this master has forked."""
        return [worker for worker in self.workers if not worker.is_old]

    @property
    def old_workers(self) -> list[Child]:
        """Those of the master before this one."""
        return [worker for worker in self.workers if worker.is_old]

    def get(self, number: int) -> Child | None:
        """The child with that number, if it lives."""
        return self._children.get(number)

    def add(self, child: Child) -> None:
        """Take in a child that was just forked, or handed over, and introduce it to the others."""
        broker = self.get(BROKER)
        workers = self.workers
        self._children[child.number] = child
        if child.number == BROKER:
            for worker in workers:
                _introduce_to_broker(child, worker)
            return
        if broker is not None:
            _introduce_to_broker(broker, child)
        for worker in workers:
            if not (worker.is_old and child.is_old):  # those know each other
                _introduce_peers(worker, child)

    def remove(self, child: Child) -> None:
        """Let go of a child that was reaped: keep its counters' sums, tell the others, close its things."""
        del self._children[child.number]
        fold(self.past, child.counters)
        if child.number != BROKER:
            for other in self._children.values():
                gone = DetachWorker if other.number == BROKER else DetachPeer
                other.link.send(gone(child.number, child.incarnation))
        _close(child)

    def forget(self) -> None:
        """In a child: close what belongs to its siblings, so that their deaths show as EOF."""
        for child in self._children.values():
            _close(child)
        self._children.clear()

    def close(self) -> None:
        """Close everything, when all children are reaped."""
        self.forget()
        self.past.close()


def name_of(number: int) -> str:
    """What follows ``gpooler: `` in the title of a child's process."""
    return "broker" if number == BROKER else f"worker {number}"


def _introduce_to_broker(broker: Child, worker: Child) -> None:
    ours, theirs = pair()
    with ours, theirs:
        attach = AttachWorker(worker.number, worker.incarnation, worker.has_history)
        broker.link.send(attach, (ours.fileno(), worker.counters.fd))
        worker.link.send(AttachBroker(broker.incarnation), (theirs.fileno(),))
    worker.has_history = True


def _introduce_peers(one: Child, other: Child) -> None:
    ours, theirs = pair()
    with ours, theirs:
        one.link.send(AttachPeer(other.number, other.incarnation), (ours.fileno(), other.counters.fd))
        other.link.send(AttachPeer(one.number, one.incarnation), (theirs.fileno(), one.counters.fd))


def _close(child: Child) -> None:
    child.link.close()
    child.counters.close()
