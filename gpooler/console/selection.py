"""WHERE, ORDER BY and LIMIT of a SHOW, over rows that are there. Pure.

NULL is as in SQL: a comparison with it is neither true nor false; it sorts behind everything else.
"""

import difflib
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from gpooler.console.statements import (
    All,
    Any,
    Comparison,
    Condition,
    IsNull,
    Not,
    Order,
    Parameter,
    Show,
    Value,
)
from gpooler.console.table import BYTEA, TEXT, Cell, Column, Columns, Row
from gpooler.errors import ConsoleSyntaxError, InvalidText, UndefinedColumn

Test = Callable[[Row], bool | None]  # None: unknown

ANY_TEXT: Final = "\0%"  # two characters long: no character of a text is one of these
ANY_CHARACTER: Final = "\0_"
_OPERATORS: Final[dict[str, Callable[..., bool]]] = {
    "=": operator.eq,
    "<>": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
}


@dataclass(frozen=True, slots=True)
class Selection:
    """What a SHOW wants of its table's rows."""

    keeps: Test | None
    order: tuple[tuple[int, bool], ...]  # column and whether descending, the first key first
    limit: int | None
    offset: int

    @property
    def is_everything(self) -> bool:
        """Whether rows pass as they are."""
        return self.keeps is None and not self.order and self.limit is None and not self.offset

    def apply(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows wanted, in the order wanted."""
        if self.keeps is not None:
            keeps = self.keeps
            rows = (row for row in rows if keeps(row))
        if self.order:
            rows = list(rows)
            for column, is_descending in reversed(self.order):
                rows.sort(key=_sort_key(column), reverse=is_descending)
        end = None if self.limit is None else self.offset + self.limit
        for number, row in enumerate(rows):
            if end is not None and number >= end:
                return
            if number >= self.offset:
                yield row


def compile_show(show: Show, shape: Columns, values: Sequence[str | None] = ()) -> Selection:
    """``show`` over these columns; ``values`` are those of its parameters.

    Raises UndefinedColumn, InvalidText, ConsoleSyntaxError.
    """
    return Selection(
        None if show.where is None else _test(show.where, shape, values),
        tuple(_order(key, shape) for key in show.order),
        _count(show.limit, values),
        _count(show.offset, values) or 0,
    )


def parameters_of(show: Show) -> int:
    """The highest number of a parameter in it."""
    numbers = [value.number for value in (show.limit, show.offset) if isinstance(value, Parameter)]
    if show.where is not None:
        numbers.extend(_numbers(show.where))
    return max(numbers, default=0)


def _numbers(condition: Condition) -> Iterator[int]:
    match condition:
        case Comparison(value=Parameter(number=number)):
            yield number
        case Not(part=part):
            yield from _numbers(part)
        case All(parts=parts) | Any(parts=parts):
            for part in parts:
                yield from _numbers(part)


def _sort_key(column: int) -> Callable[[Row], tuple[bool, Cell]]:
    def key(row: Row) -> tuple[bool, Cell]:
        cell = row[column]
        return cell is None, 0 if cell is None else cell

    return key


def _order(key: Order, shape: Columns) -> tuple[int, bool]:
    if isinstance(key.column, int):
        if not 1 <= key.column <= len(shape):
            raise ConsoleSyntaxError(f"ORDER BY position {key.column} is not in the table")
        return key.column - 1, key.is_descending
    return _find(key.column, shape), key.is_descending


def _find(name: str, shape: Columns) -> int:
    names = [column.name for column in shape]
    if name in names:
        return names.index(name)
    nearest = difflib.get_close_matches(name, names, 1)
    hint = f'Perhaps you meant "{nearest[0]}".' if nearest else f"The columns are: {', '.join(names)}."
    raise UndefinedColumn(name, hint=hint)


def _given(value: Value, values: Sequence[str | None]) -> str | int | None:
    return values[value.number - 1] if isinstance(value, Parameter) else value


def _count(value: Value, values: Sequence[str | None]) -> int | None:
    given = _given(value, values)
    if given is None:
        return None
    try:
        number = int(given)
    except ValueError:
        raise InvalidText(f'invalid input syntax for type bigint: "{given}"') from None
    if number < 0:
        raise ConsoleSyntaxError("LIMIT and OFFSET must not be negative")
    return number


def _test(condition: Condition, shape: Columns, values: Sequence[str | None]) -> Test:
    match condition:
        case Comparison():
            return _comparison(condition, shape, values)
        case IsNull(column=name):
            column = _find(name, shape)
            return lambda row: row[column] is None
        case Not(part=part):
            inner = _test(part, shape, values)
            return lambda row: None if (found := inner(row)) is None else not found
        case All(parts=parts):
            return _joined([_test(part, shape, values) for part in parts], decides=False)
        case Any(parts=parts):
            return _joined([_test(part, shape, values) for part in parts], decides=True)


def _joined(tests: list[Test], *, decides: bool) -> Test:
    """AND, which False decides, or OR, which True does."""

    def test(row: Row) -> bool | None:
        found = [test(row) for test in tests]
        if decides in found:
            return decides
        return None if None in found else not decides

    return test


def _comparison(condition: Comparison, shape: Columns, values: Sequence[str | None]) -> Test:
    number = _find(condition.column, shape)
    given = _given(condition.value, values)
    if given is None:
        return lambda row: None
    if condition.operator in ("like", "ilike"):
        if condition.operator == "ilike":
            folded = _like(str(given).lower())
            return lambda row: None if (cell := row[number]) is None else _is_like(str(cell).lower(), folded)
        pattern = _like(str(given))
        return lambda row: None if (cell := row[number]) is None else _is_like(str(cell), pattern)
    compare = _OPERATORS[condition.operator]
    wanted = _as_type(given, shape[number])
    return lambda row: None if (cell := row[number]) is None else compare(cell, wanted)


def _as_type(given: str | int, column: Column) -> Cell:
    """The constant as the column's cells are. Raises InvalidText."""
    if column.type in (TEXT, BYTEA):
        return str(given)
    if column.type.name == "boolean":
        if str(given).lower() in ("t", "true", "yes", "on", "1"):
            return True
        if str(given).lower() in ("f", "false", "no", "off", "0"):
            return False
    else:
        try:
            text = str(given)
            return int(text) if "." not in text else float(text)
        except ValueError:
            pass
    raise InvalidText(f'invalid input syntax for type {column.type.name}: "{given}"')


def _like(pattern: str) -> list[str]:
    """A LIKE pattern: the characters it wants, ``ANY_TEXT`` for %, ``ANY_CHARACTER`` for _."""
    parts = []
    at = iter(pattern)
    for char in at:
        if char == "\\":
            parts.append(next(at, "\\"))
        else:
            parts.append({"%": ANY_TEXT, "_": ANY_CHARACTER}.get(char, char))
    return parts


def _is_like(text: str, pattern: list[str]) -> bool:
    """Whether the pattern matches; as long as the text times the pattern at most, whatever they are."""
    at = place = 0
    retry: tuple[int, int] | None = None  # behind the last %, and the text it would leave next
    while at < len(text):
        if place < len(pattern) and pattern[place] == ANY_TEXT:
            place += 1
            retry = place, at
        elif place < len(pattern) and pattern[place] in (ANY_CHARACTER, text[at]):
            place += 1
            at += 1
        elif retry is not None:
            place, at = retry[0], retry[1] + 1
            retry = place, at
        else:
            return False
    return all(part == ANY_TEXT for part in pattern[place:])
