"""The text of ``cpu_affinity``: which processes run on which cores. Pure.

``off``; ``auto``: each worker on one core of those allowed, in turn; or rules with ``;`` between them,
``worker:0-3,8;worker[2]:1;broker:0;master:0``. ``worker[2]`` is the second worker: its number in the log, but
for gpoolers that an online restart has made. What is said of one worker goes before what is said of all.
"""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, Final

from gpooler.config.values import Kind, plain_text

OFF: Final = "off"
AUTO: Final = "auto"
MASTER: Final = "master"
BROKER: Final = "broker"
WORKER: Final = "worker"
KINDS: Final = (WORKER, BROKER, MASTER)
FOREIGN: Final = ("handshake", "resolver", "resolvers", "system")  # threads of Odyssey that gpooler has not
CORES_MOST: Final = 8192  # more than Linux can be built for: a typing mistake must not take memory
RULE: Final = re.compile(r"\s*([a-z_]+)\s*(?:\[\s*([0-9]{1,4})\s*\])?\s*:\s*([0-9,\s-]+)", re.ASCII)
RANGE: Final = re.compile(r"\s*([0-9]{1,5})\s*(?:-\s*([0-9]{1,5})\s*)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Affinity:
    """What the text says. ``rules`` are by kind and number, None for all of the kind."""

    is_auto: bool
    rules: Mapping[tuple[str, int | None], frozenset[int]]

    @property
    def cores(self) -> frozenset[int]:
        """All that are named for processes of ours."""
        return frozenset().union(*(cores for (kind, _), cores in self.rules.items() if kind in KINDS))

    @property
    def foreign(self) -> list[str]:
        """What is said of threads that there are not."""
        return sorted({kind for kind, _ in self.rules if kind not in KINDS})

    @property
    def last_worker(self) -> int:
        """The highest number of a worker that is named; 0 where none is."""
        return max((number or 0 for kind, number in self.rules if kind == WORKER), default=0)

    def missing(self, allowed: Set[int]) -> str:
        """What is wrong with it where only the cores ``allowed`` may be used; empty: nothing."""
        missing = self.cores - allowed
        noun = "core" if len(missing) == 1 else "cores"
        text = f"{noun} {cores_text(missing)} cannot be used here, only {cores_text(allowed)}"
        return text if missing else ""

    def cores_of(self, kind: str, number: int | None, allowed: Set[int]) -> Set[int]:
        """Where a process is to run; ``number`` is a worker's. ``allowed`` where nothing is said of it."""
        if self.is_auto and kind == WORKER and number is not None:
            return {sorted(allowed)[(number - 1) % len(allowed)]}
        return self.rules.get((kind, number), self.rules.get((kind, None), allowed))


def parse_affinity(text: str) -> Affinity:
    """What ``text`` says. Raises ValueError with a text for the user."""
    if text in (OFF, AUTO):
        return Affinity(text == AUTO, {})
    rules: dict[tuple[str, int | None], frozenset[int]] = {}
    for part in text.split(";"):
        found = RULE.fullmatch(part)
        if found is None:
            raise ValueError(
                f'must be "off", "auto" or rules such as "worker:0-3,8;broker:0"; "{part.strip()}" is none'
            )
        kind, number = found[1], None if found[2] is None else int(found[2])
        if kind not in KINDS + FOREIGN:
            raise ValueError(f'there is no process "{kind}": {", ".join(KINDS)} there are')
        if number is not None and kind in (BROKER, MASTER):
            raise ValueError(f"there is one {kind}: it has no number")
        if number == 0 and kind == WORKER:
            raise ValueError("workers are counted from 1")
        if (kind, number) in rules:
            raise ValueError(f'"{part.split(":")[0].strip()}" is said twice')
        rules[kind, number] = parse_cores(found[3])
    return Affinity(False, rules)


def cores_text(cores: Set[int]) -> str:
    """Cores as the kernel lists them: ``0-3,8``."""
    found = ""
    ordered = sorted(cores)
    for at, core in enumerate(ordered):
        if core - 1 not in cores:
            found += f",{core}"
        elif at + 1 == len(ordered) or core + 1 not in cores:
            found += f"-{core}"
    return found[1:]


def parse_cores(text: str) -> frozenset[int]:
    """Cores as ``cores_text`` writes them. Raises ValueError with a text for the user."""
    return frozenset().union(*map(_cores, text.split(",")))


def _cores(text: str) -> range:
    """Raises ValueError."""
    found = RANGE.fullmatch(text)
    if found is None:
        raise ValueError(f'"{text.strip()}" is no core and no range of cores such as 0-3')
    first, last = int(found[1]), int(found[2] or found[1])
    if not first <= last < CORES_MOST:
        raise ValueError(f'"{text.strip()}" is no range of cores such as 0-3')
    return range(first, last + 1)


@dataclass(frozen=True)
class CpuAffinity(Kind):
    """Such a text, kept as it is written."""

    def parse(self, value: Any) -> str:
        text = plain_text(value)
        parse_affinity(text)
        return text

    def describe(self) -> str:
        return '"off", "auto", or cores of processes such as "worker:0-3,8;broker:0"'

    def short(self) -> str:
        return "off, auto or rules"
