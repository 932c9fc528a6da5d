"""The resulting configuration as TOML, defaults included, without secrets (``gpooler check --effective``)."""

import tomllib
from collections.abc import Iterator, Mapping
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Final

from gpooler.config.field import Status, about
from gpooler.config.model import Config, Rule
from gpooler.config.options import kind_of, submodel
from gpooler.config.problems import KeyPath, key_text
from gpooler.config.rule import Section
from gpooler.config.toml_text import entry
from gpooler.config.values import ClientAddress, FileMode, Secret

HIDDEN: Final = "********"
SECTIONS: Final = ("service", "logging", "performance", "limits", "metrics", "routing", "query_parsing")


class EffectiveError(Exception):
    """The text does not read back as the configuration it was made from: a bug of ours."""


def effective(config: Config) -> str:
    """``config`` as TOML. Options that are unset or do nothing are left out.

    Raises ``EffectiveError`` if the text, read back, says something else.
    """
    writer = _Writer()
    for name in SECTIONS:
        writer.table((name,), getattr(config, name))
    if config.soft_oom is not None:
        writer.table(("soft_oom",), config.soft_oom)
    for listen in config.listen:
        writer.table(("listen",), listen, is_array=True)
    for name, storage in config.storage.items():
        writer.table(("storage", name), storage)
    for name, shared_pool in config.shared_pool.items():
        writer.table(("shared_pool", name), shared_pool)
    for name, ldap_endpoint in config.ldap_endpoint.items():
        writer.table(("ldap_endpoint", name), ldap_endpoint)
    for rule in config.rules:
        whom = ("user", rule.user) if rule.group is None else ("group", rule.group)
        writer.table(("database", rule.database, *whom), rule, is_array=is_of_array(rule))
    text = "\n".join(writer.blocks)
    if tomllib.loads(text) != writer.values:
        raise EffectiveError("the effective configuration does not read back as it was written")
    return text


def is_of_array(rule: Rule) -> bool:
    """Whether the rule is an element of an array of tables."""
    return rule.name.endswith("]")


class _Writer:
    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.values: dict[str, Any] = {}  # what the blocks are to read back as

    def table(self, path: KeyPath, table: Section, *, is_array: bool = False) -> None:
        """Add ``table`` and the tables in it."""
        home = self.values
        for part in path[:-1]:
            home = home.setdefault(str(part), {})
        values: dict[str, Any] = {}
        name = str(path[-1])
        if is_array:
            home.setdefault(name, []).append(values)
        else:
            home[name] = values
        self._block(key_text(path), table, values, is_array=is_array)

    def _block(self, header: str, table: Section, values: dict[str, Any], *, is_array: bool = False) -> None:
        lines = f"[[{header}]]\n" if is_array else f"[{header}]\n"
        for name, value, comment in _entries(table):
            values[name] = value
            lines += entry(name, value, comment)
        self.blocks.append(lines)
        for name, inner in _tables(table):
            values[name] = {}
            if isinstance(inner, Section):
                self._block(f"{header}.{name}", inner, values[name])
            elif any(isinstance(item, Section) for item in inner.values()):
                for key, item in inner.items():
                    values[name][key] = {}
                    self._block(f"{header}.{name}.{key_text((key,))}", item, values[name][key])
            else:
                values[name].update(inner)
                self.blocks.append(
                    f"[{header}.{name}]\n" + "".join(entry(key, value) for key, value in inner.items())
                )


def _entries(table: Section) -> Iterator[tuple[str, Any, str]]:
    """Name, value as TOML has it, and comment of each option that says something."""
    for name, field in type(table).model_fields.items():
        if field.json_schema_extra is None or submodel(field):
            continue
        row, value = about(field), getattr(table, name)
        if row.status is Status.IGNORED or (value is None and not isinstance(kind_of(field), ClientAddress)):
            continue
        comment = ""
        secrets = value if isinstance(value, tuple) else (value,)
        if any(isinstance(secret, Secret) and not secret.source for secret in secrets):
            comment = "not shown"
        if not isinstance(value, Mapping):
            yield name, plain_value(value, is_mode=isinstance(kind_of(field), FileMode)), comment


def _tables(table: Section) -> Iterator[tuple[str, Section | Mapping[str, Any]]]:
    for name in type(table).model_fields:
        value = getattr(table, name)
        if isinstance(value, Section) or (isinstance(value, Mapping) and value):
            yield name, value


def plain_value(value: Any, *, is_mode: bool) -> Any:
    """A value of an option as TOML has it; ``is_mode``: permissions. Secrets are hidden."""
    if value is None:
        return "default"
    if is_mode:
        return f"{value:04o}"
    if isinstance(value, Secret):
        return dict([value.source]) if value.source else HIDDEN
    if isinstance(value, StrEnum | IPv4Network | IPv6Network):
        return str(value)
    if isinstance(value, tuple):
        items = [plain_value(item, is_mode=False) for item in value]
        return items[0] if len(items) == 1 and isinstance(value[0], Secret) else items
    return value
