"""A small choice of the matrix in which whatever two values can matter together do so once."""

from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import combinations
from operator import attrgetter
from random import Random
from typing import Final

from tests.security.cells import Cell, Stage, expected

# How many fields of a cell, in their order, are looked at by the time it is decided.
DECIDING: Final = {Stage.DOOR: 2, Stage.LOGIN: 4, Stage.LINK: 6, Stage.SERVER: 7}
# A cell is taken in one of several passes, if it brings so many new pairs: the best come first.
PASSES: Final = (15, 8, 4, 2, 1)
_values: Final = attrgetter(*(field.name for field in fields(Cell)))


def pairwise(cells: Iterable[Cell]) -> Iterator[Cell]:
    """The choice; the same each time."""
    left = list(cells)
    Random(1).shuffle(left)
    covered = set[object]()
    for least in PASSES:
        rest = []
        for cell in left:
            new = pairs(cell) - covered
            if len(new) >= least:
                covered |= new
                yield cell
            elif new:
                rest.append(cell)
        left = rest


def pairs(cell: Cell) -> set[object]:
    """The pairs of values that had a say in what comes of it."""
    values = list(enumerate(_values(cell)))
    return set(combinations(values[: DECIDING[expected(cell).stage]], 2))
