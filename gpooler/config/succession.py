"""What comes into force when a configuration follows another without a restart. Pure.

Rules go on under their names, so that routes, servers and clients find themselves in the new one. Where a
rule's clients could not go on as they are (``Reload.SESSION``: another kind of pool), the new rule gets a
name of its own, ``order_app.default#2``, and the old one stays for those that are connected: *retired*.
What needs a restart stays as it was, unless it is one (``process/handover.py``).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from typing import Any, Final

from gpooler.config.field import Reload, about
from gpooler.config.model import Config, Listen, Rule, Storage
from gpooler.config.options import submodel
from gpooler.config.rule import Section

SECTIONS: Final = ("service", "logging", "performance", "limits", "metrics", "routing", "query_parsing")
_EDITION: Final = re.compile(r"#(\d+)$")  # a key that has one in the file is quoted, and ends with the quote


def succeed(old: Config, new: Config, *, is_restart: bool = False) -> Config:
    """``new`` as it comes into force behind ``old``; in new processes, if ``is_restart``."""
    sections: dict[str, Any] = {
        name: getattr(new, name) if is_restart else _keep_fixed(getattr(old, name), getattr(new, name))
        for name in SECTIONS
    }
    known: dict[str, list[Rule]] = {}
    for rule in (*old.rules, *old.retired, *old.removed):
        known.setdefault(base_name(rule), []).append(rule)
    is_other_kind = any(
        getattr(old.routing, name) != getattr(new.routing, name)
        for name in options_of(type(new.routing), Reload.SESSION)
    )
    rules, retired = [], []
    for rule in new.rules:
        now, past = _succeed_rule(known.pop(rule.name, []), rule, old, new, is_other_kind)
        rules.append(now)
        retired += past
    removed = tuple(rule for left in known.values() for rule in left)
    storages = {**{rule.storage: old.storage[rule.storage] for rule in removed}, **new.storage}
    return new.model_copy(
        update={
            **sections,
            "listen": tuple(_listeners(old.listen, new.listen)),
            "storage": storages,
            "rules": tuple(rules),
            "retired": tuple(retired),
            "removed": removed,
            "pauses": old.pauses,
            "disabled": old.disabled,
        }
    )


def renew_servers(config: Config, is_chosen: Callable[[Rule], bool]) -> Config:
    """The same with other servers for some rules, retired ones included."""

    def renewed(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        return tuple(
            rule.model_copy(update={"epoch": rule.epoch + 1}) if is_chosen(rule) else rule for rule in rules
        )

    return config.model_copy(update={"rules": renewed(config.rules), "retired": renewed(config.retired)})


def base_name(rule: Rule) -> str:
    """The rule's name in the file."""
    return _EDITION.sub("", rule.name)


def options_of(section: type[Section], *effects: Reload) -> list[str]:
    """The options of a section whose changes take effect so."""
    return [
        name
        for name, field in section.model_fields.items()
        if field.json_schema_extra is not None and not submodel(field) and about(field).reload in effects
    ]


def listen_key(listen: Listen) -> tuple[str | None, int]:
    """What tells listeners apart."""
    return listen.host or listen.unix_path, listen.port


def _keep_fixed(old: Section, new: Section) -> Section:
    fixed = {name: getattr(old, name) for name in options_of(type(new), Reload.RESTART)}
    return new.model_copy(update=fixed)


def _listeners(old: tuple[Listen, ...], new: tuple[Listen, ...]) -> Iterable[Listen]:
    """Those that were there keep their numbers, others have none that was used before."""
    numbers = {listen_key(listen): listen.number for listen in old}
    unused = count(max(numbers.values(), default=-1) + 1)
    for listen in new:
        number = numbers.get(listen_key(listen))
        yield listen.model_copy(update={"number": next(unused) if number is None else number})


def _succeed_rule(
    past: list[Rule], rule: Rule, old: Config, new: Config, is_other_kind: bool
) -> tuple[Rule, list[Rule]]:
    """The rule as it comes into force, and what is retired. ``past``: of that name, in force first."""
    if not past:
        return rule, []
    kind = options_of(type(rule), Reload.SESSION)
    same = [
        each
        for each in (past if not is_other_kind else past[:0])
        if all(getattr(each, name) == getattr(rule, name) for name in kind)
    ]
    epoch = _epoch(past[0], rule, old, new)
    name = same[0].name if same else f"{rule.name}#{max(map(_edition, past)) + 1}"
    now = _as(rule, {"name": name, "epoch": epoch}, same)
    retired = [
        _as(
            rule,
            {**{option: getattr(each, option) for option in kind}, "name": each.name, "epoch": epoch},
            past,
        )
        for each in past
        if each.name != name
    ]
    return now, retired


def _as(rule: Rule, update: Mapping[str, Any], known: list[Rule]) -> Rule:
    """``rule`` with changes; one that is known already if it is the same."""
    made = rule.model_copy(update=update)
    return next((each for each in known if each == made), made)


def _edition(rule: Rule) -> int:
    found = _EDITION.search(rule.name)
    return int(found[1]) if found else 1


def _epoch(past: Rule, rule: Rule, old: Config, new: Config) -> int:
    """One more where servers would be opened otherwise now."""
    is_same = (
        _server_of(past, old.storage) == _server_of(rule, new.storage)
        and past.server_password == rule.server_password
    )
    return past.epoch + (not is_same)


def _server_of(rule: Rule, storages: Mapping[str, Storage]) -> tuple[object, ...]:
    storage = storages[rule.storage]
    options = [getattr(storage, name) for name in options_of(type(storage), Reload.SERVER)]
    own = [
        getattr(rule, name) for name in (*options_of(type(rule), Reload.SERVER), "ldap_storage_credentials")
    ]
    return (*options, *own, storage.endpoints)
