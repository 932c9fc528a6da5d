"""What the console can be asked to do: what ``grammar`` makes of a text. Pure values."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Parameter:
    """``$number``: what Bind gives, as text."""

    number: int


Value = str | int | None | Parameter


@dataclass(frozen=True, slots=True)
class Comparison:
    """``operator`` is one of = <> < > <= >= like ilike."""

    column: str
    operator: str
    value: Value


@dataclass(frozen=True, slots=True)
class IsNull:
    """``column IS NULL``."""

    column: str


@dataclass(frozen=True, slots=True)
class Not:
    """The opposite; unknown stays unknown."""

    part: "Condition"


@dataclass(frozen=True, slots=True)
class All:
    """AND."""

    parts: tuple["Condition", ...]


@dataclass(frozen=True, slots=True)
class Any:
    """OR."""

    parts: tuple["Condition", ...]


Condition = Comparison | IsNull | Not | All | Any


@dataclass(frozen=True, slots=True)
class Order:
    """One key of ORDER BY: a column's name, or its number from 1."""

    column: str | int
    is_descending: bool


@dataclass(frozen=True, slots=True)
class Show:
    """A table of the console."""

    table: str  # in lower case
    where: Condition | None = None
    order: tuple[Order, ...] = ()
    limit: Value = None
    offset: Value = None


@dataclass(frozen=True, slots=True)
class ShowSetting:
    """The value of a session parameter."""

    name: str


@dataclass(frozen=True, slots=True)
class SetSetting:
    """SET, with None for DEFAULT or RESET."""

    name: str
    value: str | None


@dataclass(frozen=True, slots=True)
class Transaction:
    """BEGIN and its kin: ``tag`` is what PostgreSQL answers."""

    tag: str


@dataclass(frozen=True, slots=True)
class Nothing:
    """What is accepted and means nothing here."""

    tag: str


@dataclass(frozen=True, slots=True)
class Item:
    """One value of a SELECT: a constant, or the name of a function with its arguments."""

    name: str
    value: str | int | bool | None = None
    function: str = ""
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Select:
    """A SELECT without FROM."""

    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Catalog:
    """A query of PostgreSQL's catalogs, which has no rows here."""

    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Act:
    """A command that changes something: ``name`` in capitals."""

    name: str
    arguments: tuple[str, ...] = ()


Statement = Show | ShowSetting | SetSetting | Transaction | Nothing | Select | Catalog | Act
