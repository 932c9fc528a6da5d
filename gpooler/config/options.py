"""The one table of options, collected from the fields of the model.

The reference in ``docs/configuration.md`` and ``config.toml.example`` come from it (``config/document.py``).
"""

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic.fields import FieldInfo

from gpooler.config.field import About, Status, about
from gpooler.config.model import Document
from gpooler.config.rule import GroupBody, RuleBody, Section, Watchdog
from gpooler.config.values import Kind, SecretText


@dataclass(frozen=True, slots=True)
class Option:
    """One option: where it stands, what it takes, and what the table says about it."""

    section: str  # as a reader writes it: service.conn_drop_options, database.NAME.user.NAME
    name: str
    kind: Kind
    default: Any  # the one in effect; unset is None, required is PydanticUndefined
    is_required: bool
    about: About


@dataclass(frozen=True, slots=True)
class Table:
    """One section: a table of options."""

    section: str
    model: type[Section]
    about: About | None  # None for the outermost
    is_array: bool


def submodel(field: FieldInfo) -> tuple[type[Section], bool, bool] | None:
    """The model of a field that is a table: (model, is a table of named ones, may be an array); else None."""
    return _submodel(field.annotation)


def _submodel(annotation: Any) -> tuple[type[Section], bool, bool] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False, False
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return next((found for arg in args if (found := _submodel(arg))), None)
    if origin is Mapping and (found := _submodel(args[1])):
        return found[0], True, found[2]
    if origin is tuple and (found := _submodel(args[0])):
        return found[0], found[1], True
    return None


def kind_of(field: FieldInfo) -> Kind:
    """The kind of value of a field that is an option."""
    return next(item for item in field.metadata if isinstance(item, Kind))


def tables(model: type[Section] = Document, section: str = "", row: About | None = None) -> Iterator[Table]:
    """All sections, in the order of the model, outer ones first."""
    if section:
        yield Table(section, model, row, False)
    for name, field in model.model_fields.items():
        if found := submodel(field):
            inner, is_named, is_array = found
            path = f"{section}.{name}" if section else name
            path += ".NAME" if is_named else ""
            for table in tables(inner, path, about(field)):
                yield Table(table.section, table.model, table.about, is_array and table.section == path)


def options_of(table: Table) -> Iterator[Option]:
    """The options of one section, without the sections in it."""
    for name, field in table.model.model_fields.items():
        if submodel(field) is None:
            default = None if field.is_required() else field.default
            yield Option(table.section, name, kind_of(field), default, field.is_required(), about(field))


def _homes() -> dict[str, tuple[str, ...]]:
    """The sections that have an option of a name; a rule's options are at home in rules alone."""
    homes: dict[str, tuple[str, ...]] = {}
    for table in tables():
        for name, field in table.model.model_fields.items():
            is_rules = name in RuleBody.model_fields and table.model in (GroupBody, Watchdog)
            if submodel(field) is None and not is_rules:
                homes[name] = (*homes.get(name, ()), table.section)
    return homes


TABLE: Final[tuple[Option, ...]] = tuple(option for table in tables() for option in options_of(table))
SECRET_KEYS: Final = frozenset(option.name for option in TABLE if isinstance(option.kind, SecretText))
HOMES: Final[Mapping[str, tuple[str, ...]]] = _homes()


def is_refused(row: About, value: Any, default: Any) -> bool:
    """Whether ``value`` asks for something that is not built."""
    return row.status is Status.NOT_BUILT and bool(value != default)
