"""The configuration as a list of options with values and defaults, without secrets (``SHOW CONFIG``)."""

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from gpooler.config.effective import HIDDEN, SECTIONS, is_of_array, plain_value
from gpooler.config.field import Reload, Status, about
from gpooler.config.model import Config
from gpooler.config.options import kind_of, submodel
from gpooler.config.problems import KeyPath, key_text
from gpooler.config.rule import Section
from gpooler.config.values import FileMode, Secret

NAMED: Final = ("storage", "shared_pool", "ldap_endpoint")


class Option(NamedTuple):
    """One option; None as a value or default means that it is unset."""

    key: str
    value: str | None
    default: str | None
    is_changeable: bool  # without a restart


def options(config: Config) -> Iterator[Option]:
    """Every option of ``config`` that does something, in the order of the file format's sections."""
    for name in SECTIONS:
        yield from _of_table((name,), getattr(config, name))
    if config.soft_oom is not None:
        yield from _of_table(("soft_oom",), config.soft_oom)
    for number, listen in enumerate(config.listen):
        yield from _of_table(("listen", number), listen)
    for section in NAMED:
        for name, table in getattr(config, section).items():
            yield from _of_table((section, name), table)
    for number, rule in enumerate(config.rules):
        whom = ("user", rule.user) if rule.group is None else ("group", rule.group)
        # rules of an array are told apart by their place among all
        path: KeyPath = ("database", rule.database, *whom)
        yield from _of_table((*path, number) if is_of_array(rule) else path, rule)


def _of_table(path: KeyPath, table: Section) -> Iterator[Option]:
    for name, field in type(table).model_fields.items():
        if field.json_schema_extra is None:
            continue  # what the whole document says about a section
        value = getattr(table, name)
        if submodel(field):
            if isinstance(value, Section):
                yield from _of_table((*path, name), value)
            elif isinstance(value, Mapping):
                for key, inner in value.items():
                    yield from _of_table((*path, name, key), inner)
        elif about(field).status is not Status.IGNORED:
            is_changeable = about(field).reload is not Reload.RESTART
            yield Option(key_text((*path, name)), _text(field, value), _default(field), is_changeable)


def _default(field: FieldInfo) -> str | None:
    return None if field.default is PydanticUndefined else _text(field, field.default)


def _text(field: FieldInfo, value: Any) -> str | None:
    """As the file would have it, with every secret hidden, wherever it comes from."""
    if value is None:
        return None
    if _has_secret(value):
        return HIDDEN
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    found = plain_value(value, is_mode=isinstance(kind_of(field), FileMode))
    if isinstance(found, bool):
        return "yes" if found else "no"
    return ", ".join(str(item) for item in found) if isinstance(found, list) else str(found)


def _has_secret(value: Any) -> bool:
    return isinstance(value, Secret) or (
        isinstance(value, tuple) and any(isinstance(item, Secret) for item in value)
    )
