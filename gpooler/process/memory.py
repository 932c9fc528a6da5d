"""How much memory is in use, of the machine or of processes by name, as /proc says (proc(5))."""

import os
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import Final, NamedTuple

_PROC: Final = Path("/proc")
_KB: Final = 1024  # what /proc calls kB
_PARENT: Final = 1  # fields of stat behind the name, which may have any character
_STARTED: Final = 19


class Consumer(NamedTuple):
    """A process that was measured. ``started``, in clock ticks, tells it from a later one with its pid."""

    pid: int
    name: str
    bytes: int
    parent: int
    started: int


class Measured(NamedTuple):
    """What is in use; by whom is known where processes were asked for."""

    bytes: int
    consumers: tuple[Consumer, ...] = ()
    unread: int = 0  # processes of that name whose memory we may not see: not counted


def measure(name: str) -> Measured:
    """The shares (PSS) of processes with ``name`` in theirs; where it is empty what the machine uses.

    May take long: the kernel walks the pages of each process. Raises OSError, ValueError: no such /proc.
    """
    return _measure_processes(name) if name else Measured(_machine_bytes())


def is_there(consumer: Consumer) -> bool:
    """Whether its process lives, and is no other by now."""
    try:
        return _parent_and_start(consumer.pid)[1] == consumer.started
    except OSError:
        return False


def largest(consumers: Iterable[Consumer], spared: Set[int]) -> list[Consumer]:
    """Those that may be told to go, the largest first.

    Never a process that has children among the others, so that a postmaster stays, nor those with pids in
    ``spared``. Pure.
    """
    known = list(consumers)
    kept = {consumer.parent for consumer in known} | spared
    found = [consumer for consumer in known if consumer.pid not in kept]
    return sorted(found, key=lambda consumer: (-consumer.bytes, consumer.pid))


def _machine_bytes() -> int:
    """All memory, less what is available to programs."""
    values = _values((_PROC / "meminfo").read_text())
    try:
        return values["MemTotal"] - values["MemAvailable"]
    except KeyError as error:
        raise ValueError(f"/proc/meminfo has no {error.args[0]}") from None


def _measure_processes(name: str) -> Measured:
    consumers, unread = [], 0
    for pid in _pids():
        directory = _PROC / str(pid)
        try:
            own = (directory / "comm").read_text(errors="replace").rstrip("\n")
            if name not in own:
                continue
            parent, started = _parent_and_start(pid)
            share = _values((directory / "smaps_rollup").read_text())["Pss"]
        except PermissionError:
            unread += 1
        except (OSError, KeyError):
            pass  # it is gone, or has no memory of its own
        else:
            consumers.append(Consumer(pid, own, share, parent, started))
    return Measured(sum(consumer.bytes for consumer in consumers), tuple(consumers), unread)


def _pids() -> Iterator[int]:
    return (int(entry) for entry in os.listdir(_PROC) if entry.isdigit())


def _parent_and_start(pid: int) -> tuple[int, int]:
    """Raises OSError."""
    fields = (_PROC / str(pid) / "stat").read_bytes().rpartition(b") ")[2].split()
    return int(fields[_PARENT]), int(fields[_STARTED])


def _values(text: str) -> dict[str, int]:
    """The lines ``Name:  123 kB``, in bytes."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            found[name] = int(words[0]) * _KB
    return found
