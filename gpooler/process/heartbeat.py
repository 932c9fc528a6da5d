"""Whether a child that still exists has stopped working: its beats stall though it could have run.

The hub bumps ``ProcessWord.HUB_BEAT`` and the relay ``RELAY_BEAT`` in shared memory, each at least every
BEAT_INTERVAL_S, also when idle. A beat is watched from its first bump on. Beats and looks are seldom: waking
three processes for nothing costs more than the transactions of a quiet hour.
"""

from pathlib import Path
from typing import Final, NoReturn

import gevent

from gpooler import faults
from gpooler.stats.registry import ProcessWord
from gpooler.stats.shared import SharedCounters

BEAT_INTERVAL_S: Final = 10.0  # what a child promises
TICK_S: Final = 10.0  # how often the master looks
STALL_S: Final = 30.0  # of chances to run without a beat
_CREDIT_MOST_S: Final = 2 * TICK_S  # a longer gap between two looks: the master itself did not run

_NO_CHANCE: Final = frozenset("TtDZX")  # stopped, traced, in the kernel's hands, dead


def beat(counters: SharedCounters) -> NoReturn:
    """Bump the hub's beat for ever. Yields. Oftener under a test, whose commands are heard here."""
    while True:
        counters.add_process(ProcessWord.HUB_BEAT)
        faults.fault_point("beat")
        gevent.sleep(faults.BEAT_S if faults.is_connected() else BEAT_INTERVAL_S)


class Watch:
    """The beats of one child as the master has seen them."""

    def __init__(self) -> None:
        self._beats: tuple[int, ...] = ()
        self._seen_at_s = 0.0
        self._cpu_ns = -1
        self._stalled_s: list[float] = []

    def is_stalled(self, now_s: float, beats: tuple[int, ...], state: str, cpu_ns: int) -> bool:
        """Whether a beat stood still for STALL_S during which the child had its chance.

        ``now_s`` is monotonic; ``state`` and ``cpu_ns`` are those of ``look``. No chance: stopped or traced,
        runnable but given no processor, or the master did not run either (a suspended machine).
        """
        if len(beats) != len(self._beats):
            self._beats, self._stalled_s = beats, [0.0] * len(beats)
            self._seen_at_s, self._cpu_ns = now_s, cpu_ns
            return False
        elapsed_s = now_s - self._seen_at_s
        is_starved = state == "R" and cpu_ns == self._cpu_ns
        had_chance = state not in _NO_CHANCE and not is_starved and elapsed_s <= _CREDIT_MOST_S
        for number, (beat, before) in enumerate(zip(beats, self._beats, strict=True)):
            if beat != before or beat == 0:
                self._stalled_s[number] = 0.0
            elif had_chance:
                self._stalled_s[number] += elapsed_s
        self._beats, self._seen_at_s, self._cpu_ns = beats, now_s, cpu_ns
        return any(stalled_s >= STALL_S for stalled_s in self._stalled_s)


def look(pid: int) -> tuple[str, int]:
    """State letter and CPU time in ns of a process' first thread (proc(5)); ``X`` when it is gone.

    A kernel without schedstat gives clock ticks, which serve as well: only changes count.
    """
    process = Path("/proc") / str(pid)
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "X", 0
    try:
        cpu = int((process / "schedstat").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        cpu = int(fields[11]) + int(fields[12])
    return fields[0], cpu
