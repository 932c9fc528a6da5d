"""Makes a program that is answered otherwise as short as it goes."""

from collections.abc import Callable
from dataclasses import replace

from tests.differential.program import Program, Step

Differs = Callable[[Program], bool]


def shrink(program: Program, differs: Differs, most: int = 400) -> Program:
    """Leave out steps, then messages, then the odd end, then startup parameters, as long as it differs.

    ``differs`` is asked so many times at most.
    """
    left = most

    def still(candidate: Program) -> bool:
        nonlocal left
        left -= 1
        return left >= 0 and differs(candidate)

    before = None
    while program != before and left > 0:
        before = program
        program = _without_steps(program, still)
        for number in range(len(program.steps)):
            program = _without_parts(program, number, still)
        plain = replace(program, last=(), piece=0, has_end=True, has_terminate=True)
        if plain != program and still(plain):
            program = plain
        for name in program.startup:
            rest = {key: value for key, value in program.startup.items() if key != name}
            candidate = replace(program, startup=rest)
            if still(candidate):
                program = candidate
    return program


def _without_steps(program: Program, still: Differs) -> Program:
    size = max(len(program.steps) // 2, 1)
    while True:
        at = 0
        while at < len(program.steps):
            candidate = replace(program, steps=program.steps[:at] + program.steps[at + size :])
            if candidate.steps and still(candidate):
                program = candidate
            else:
                at += size
        if size == 1:
            return program
        size //= 2


def _without_parts(program: Program, number: int, still: Differs) -> Program:
    at = 0
    while at < len(program.steps[number]) and len(program.steps[number]) > 1:
        step: Step = program.steps[number]
        shorter = step[:at] + step[at + 1 :]
        candidate = replace(program, steps=(*program.steps[:number], shorter, *program.steps[number + 1 :]))
        if still(candidate):
            program = candidate
        else:
            at += 1
    return program
