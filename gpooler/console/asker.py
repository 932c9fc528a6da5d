"""Asks the other workers and the broker for rows, and answers what they ask.

An answer comes in parts, so that thousands of rows neither fill a datagram nor hold up a hub. Who does not
answer in time, or dies meanwhile, is missing; the others' rows are there all the same.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

import gevent
from gevent.event import Event

from gpooler.broker.messages import Ask, Rows
from gpooler.client.peer_channels import PeerChannels
from gpooler.clock import monotonic_us
from gpooler.console.facts import to_cells
from gpooler.process.channels import Channel

BROKER: Final = 0  # among the numbers of workers
SILENCE_US: Final = 2_000_000  # without a part of its answer for so long somebody is missing
PART_MOST: Final = 60_000  # bytes of rows in one message, of the 131,072 that a datagram may have

Cells = tuple[str | int | None, ...]
Source = Callable[[str], Iterator[Sequence[Any]]]
"""Makes facts of a kind, a slice at a time. Yields between them."""


class Broker(Protocol):
    """What is needed of the way to the broker."""

    @property
    def is_attached(self) -> bool:
        """Whether what is sent now may reach it."""

    def send(self, message: Ask) -> None:
        """Send or queue."""


class _Pending:
    """What one ask still waits for."""

    def __init__(self, wanted: set[int]) -> None:
        self.wanted = wanted
        self.rows: list[Cells] = []
        self.missing: list[int] = []
        self.heard_us = monotonic_us()
        self.is_changed = Event()


class Asker:
    """That of one worker."""

    def __init__(self, peers: PeerChannels, broker: Broker, source: Source) -> None:
        """``source`` makes this worker's own facts."""
        self._peers = peers
        self._broker = broker
        self._source = source
        self._pending: dict[int, _Pending] = {}
        peers.on(Ask, self._on_ask)
        peers.on(Rows, lambda worker, channel, message: self.on_rows(worker, message))
        peers.on_gone.append(self.on_gone)

    def workers(self, what: str) -> tuple[list[Cells], list[int]]:
        """The rows of all other workers, and the numbers of those that are missing. Yields."""
        return self._collect(what, set(self._peers.workers))

    def broker(self, what: str) -> tuple[list[Cells], bool]:
        """The broker's rows, and whether they are missing. Yields."""
        rows, missing = self._collect(what, {BROKER})
        return rows, bool(missing)

    def _collect(self, what: str, wanted: set[int]) -> tuple[list[Cells], list[int]]:
        token = self._peers.new_token()
        pending = self._pending[token] = _Pending(set(wanted))
        try:
            for number in wanted:
                if number != BROKER:
                    self._peers.workers[number].send(Ask(token, what))
                elif self._broker.is_attached:
                    self._broker.send(Ask(token, what))
                else:
                    self._lose(pending, BROKER)
            while pending.wanted:
                left_us = pending.heard_us + SILENCE_US - monotonic_us()
                if left_us <= 0:
                    break
                pending.is_changed.clear()
                pending.is_changed.wait(left_us / 1e6)
            return pending.rows, sorted({*pending.missing, *pending.wanted})
        finally:
            del self._pending[token]

    def on_rows(self, worker: int, message: Rows) -> None:
        """A part of an answer; of one that nobody waits for any more it is dropped."""
        pending = self._pending.get(message.token)
        if pending is None:
            return
        pending.rows.extend(message.rows)
        pending.heard_us = monotonic_us()
        if message.is_last:
            pending.wanted.discard(worker)
        pending.is_changed.set()

    def on_gone(self, worker: int) -> None:
        """A worker, or the broker, is dead."""
        for pending in self._pending.values():
            if worker in pending.wanted:
                self._lose(pending, worker)

    @staticmethod
    def _lose(pending: _Pending, worker: int) -> None:
        pending.wanted.discard(worker)
        pending.missing.append(worker)
        pending.is_changed.set()

    def _on_ask(self, worker: int, channel: Channel, message: Ask) -> None:
        gevent.spawn(answer, message, self._source, channel.send)


def answer(ask: Ask, source: Source, send: Callable[[Rows], None]) -> None:
    """Send all facts of a kind in parts, the last one empty. Yields."""
    for facts in source(ask.what):
        for part in _parts(tuple(map(to_cells, facts))):
            send(Rows(ask.token, False, part))
    send(Rows(ask.token, True, ()))


def _parts(rows: tuple[Cells, ...]) -> Iterator[tuple[Cells, ...]]:
    """As few parts as fit into messages."""
    if len(rows) > 1 and len(json.dumps(rows)) > PART_MOST:
        middle = len(rows) // 2
        yield from _parts(rows[:middle])
        yield from _parts(rows[middle:])
    elif rows:
        yield rows
