"""From plain values to the model: every wrong or unknown key becomes a problem, none hides another."""

import difflib
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from gpooler.config.field import Status, about
from gpooler.config.model import Document
from gpooler.config.options import HOMES, is_refused, kind_of, submodel
from gpooler.config.problems import KeyPath, Problem
from gpooler.config.rule import Section
from gpooler.config.source import Source
from gpooler.config.values import SecretReader

SECTIONS: Final = ("service", "logging", "performance", "limits", "metrics", "routing")
PASSES_MOST: Final = 8  # repairs that uncover another broken value inside; two are usual


@dataclass(slots=True)
class Validated:
    """The model as far as it could be made; ``broken`` keys hold a default or placeholder in it."""

    document: Document | None
    errors: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    broken: set[KeyPath] = field(default_factory=set)
    single: Set[KeyPath] = frozenset()  # rules that are a table, not an array: see ``as_written``


def validate(source: Source, read_secret: SecretReader) -> Validated:
    """Read ``source.values`` into the model."""
    values, single = _normalise(source.values)
    result = Validated(None, single=single)
    for _ in range(PASSES_MOST):
        try:
            result.document = Document.model_validate(values, context={"read_secret": read_secret})
            break
        except ValidationError as error:
            for detail in error.errors(include_url=False, include_input=False):
                path = detail["loc"]
                place = as_written(path, single)
                result.errors.append(_problem(source, place, path, detail))
                result.broken.add(path)
                _repair(values, path)
    if result.document is not None:
        _judge(result, source, result.document, ())
    return result


def _normalise(values: Mapping[str, Any]) -> tuple[dict[str, Any], set[KeyPath]]:
    """A copy with the missing sections, and each rule a list; with the paths that were no list."""
    copy = _copy(values)
    for name in SECTIONS:
        copy.setdefault(name, {})
    single: set[KeyPath] = set()
    for database, body in _items(copy.get("database")):
        for word in ("user", "group"):
            rules: Any = body.get(word) if isinstance(body, dict) else None
            for name, rule in _items(rules):
                if not isinstance(rule, list):
                    rules[name] = [rule]
                    single.add(("database", database, word, name))
    return copy, single


def _items(table: Any) -> list[tuple[str, Any]]:
    return list(table.items()) if isinstance(table, dict) else []


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def as_written(path: KeyPath, single: Set[KeyPath]) -> KeyPath:
    """``path`` as the file has it: without the number of a rule that is no array."""
    return (*path[:4], *path[5:]) if path[:4] in single else path


def _repair(values: Any, path: KeyPath) -> None:
    """Take the broken value away, or put a placeholder for one that is required, to check the rest."""
    *outer, last = path
    for part in outer:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return  # an earlier repair took the whole table
    known = field_at(path)
    if known is not None and known.is_required():
        values[last] = about(known).placeholder
    elif isinstance(values, list):
        values[int(last)] = {}  # the others keep their numbers
    elif path in {(name,) for name in SECTIONS}:
        values[last] = {}
    else:
        values.pop(last, None)


def field_at(path: KeyPath) -> FieldInfo | None:
    """The field that the key ``path`` sets; None where the model has none."""
    model = model_at(path[:-1])
    return model.model_fields.get(str(path[-1])) if model else None


def model_at(path: KeyPath) -> type[Section] | None:
    """The model of the table at ``path``, where numbers count array elements; None where there is none."""
    model: type[Section] = Document
    parts = list(path)
    while parts:
        known = model.model_fields.get(str(parts.pop(0)))
        found = submodel(known) if known else None
        if found is None:
            return None
        model, is_named, is_array = found
        if is_named:
            if not parts:
                return None
            parts.pop(0)
        if is_array and parts and isinstance(parts[0], int):
            parts.pop(0)
    return model


def _problem(source: Source, place: KeyPath, path: KeyPath, detail: ErrorDetails) -> Problem:
    match detail["type"]:
        case "extra_forbidden":
            return _unknown(source, place, path)
        case "missing":
            return source.problem(place, "is required and missing")
        case "value_error":
            text = str(detail["ctx"]["error"])
        case "model_type" | "model_attributes_type" | "dict_type" | "mapping_type":
            text = "must be a table"
        case "tuple_type" | "list_type":
            text = "must be an array of tables, written [[…]]"
        case _:
            text = "has a value of the wrong kind"
    return source.problem(place, text, _nearest_word(source, place, path))


def _unknown(source: Source, place: KeyPath, path: KeyPath) -> Problem:
    """An unknown key, with the nearest known one here, or where a key of that name belongs."""
    model = model_at(path[:-1])
    name = str(path[-1])
    known = list(model.model_fields) if model else []
    nearest = difflib.get_close_matches(name, known, 1) or difflib.get_close_matches(name.lower(), known, 1)
    what = "unknown section" if len(path) == 1 and name not in HOMES else "unknown key"
    if name in HOMES:
        homes = " or ".join(f"[{home}]" for home in HOMES[name])
        return source.problem(place, f"{what}; it belongs in {homes}")
    if nearest:
        return source.problem(place, what, nearest[0])
    elsewhere = difflib.get_close_matches(name.lower(), HOMES, 1, 0.8)
    return source.problem(place, what, f"[{HOMES[elsewhere[0]][0]}] {elsewhere[0]}" if elsewhere else "")


def _nearest_word(source: Source, place: KeyPath, path: KeyPath) -> str:
    """The nearest word of an enum; only enums suggest, so a secret's value never comes here."""
    known = field_at(path)
    words = kind_of(known).known_words() if known and not submodel(known) else ()
    value: Any = source.values
    for part in place if words else ():
        value = value[part]
    matches = difflib.get_close_matches(value, words, 1) if isinstance(value, str) else []
    return matches[0] if matches else ""


def _judge(result: Validated, source: Source, table: Section, path: KeyPath) -> None:
    """Refuse what is not built, warn of what is ignored, in ``table`` and the tables in it."""
    for name in table.model_fields_set:
        known = type(table).model_fields[name]
        row, value, place = about(known), getattr(table, name), (*path, name)
        written = as_written(place, result.single)
        if is_refused(row, value, known.default):
            result.errors.append(source.problem(written, f"is not built yet; {row.advice}"))
            result.broken.add(place)
        elif row.status is Status.IGNORED:
            result.warnings.append(source.problem(written, f"is ignored: {row.advice}"))
        elif submodel(known):
            for key, item in _tables_in(value):
                _judge(result, source, item, (*place, *key))


def _tables_in(value: Any) -> list[tuple[KeyPath, Section]]:
    """The tables that a field holds, with their paths below it."""
    if isinstance(value, Section):
        return [((), value)]
    items = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, tuple) else ()
    )
    return [((key, *rest), table) for key, item in items for rest, table in _tables_in(item)]
