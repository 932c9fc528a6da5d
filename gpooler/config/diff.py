"""What a reload changes, and whom that touches, for people: the answer of RELOAD and of its dry run. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gpooler.config.effective import plain_value
from gpooler.config.field import Reload, Status, about
from gpooler.config.model import Config, Listen, Rule
from gpooler.config.options import kind_of, submodel
from gpooler.config.problems import KeyPath, key_text, quoted_key
from gpooler.config.rule import Section
from gpooler.config.succession import SECTIONS, base_name, listen_key
from gpooler.config.toml_text import value_text
from gpooler.config.values import FileMode, Secret

EFFECTS: Final[Mapping[Reload, str]] = {
    Reload.RELOAD: "now",
    Reload.LOGIN: "for new logins; who is connected goes on",
    Reload.SESSION: "for new clients; who is connected keeps the old",
    Reload.SERVER: "its servers are replaced as they become free",
    Reload.RESTART: "needs a restart; the old value stays until then",
}
UNSET: Final = "unset"


@dataclass(frozen=True, slots=True)
class Change:
    """One option, or a whole table, that is not as it was."""

    key: str  # key path as TOML writes it
    what: str  # "10 → 20", "added", "removed"
    effect: str

    def __str__(self) -> str:
        return f"{self.key}: {self.what}: {self.effect}"


def changes(old: Config, new: Config) -> list[Change]:
    """``new`` is as the file says, not as ``succession`` leaves it."""
    return list(_changes(old, new))


def _changes(old: Config, new: Config) -> Iterator[Change]:
    for name in SECTIONS:
        yield from _section((name,), getattr(old, name), getattr(new, name))
    yield from _optional("soft_oom", old.soft_oom, new.soft_oom)
    if old.hba != new.hba and old.routing.hba_file == new.routing.hba_file:
        yield Change("routing.hba_file", "its lines changed", EFFECTS[Reload.LOGIN])
    yield from _listeners(old.listen, new.listen)
    used = {rule.storage for rule in old.rules}
    yield from _tables(
        "storage",
        {name: each for name, each in old.storage.items() if name in used or name in new.storage},
        new.storage,
    )
    yield from _tables("shared_pool", old.shared_pool, new.shared_pool)
    yield from _tables("ldap_endpoint", old.ldap_endpoint, new.ldap_endpoint)
    yield from _rules(old.rules, new.rules)


def _rules(old: tuple[Rule, ...], new: tuple[Rule, ...]) -> Iterator[Change]:
    before = {base_name(rule): rule for rule in old}
    for rule in new:
        known = before.pop(rule.name, None)
        key = f"database.{rule.name}"
        if known is None:
            yield Change(key, "added", "for new logins")
            continue
        if (known.database, known.user, known.group) != (rule.database, rule.user, rule.group):
            yield Change(key, "takes other clients", EFFECTS[Reload.LOGIN])
        for change in _options(key, known, rule):
            if change.key == f"{key}.password" and known.server_password != rule.server_password:
                effect = f"{change.effect}; {EFFECTS[Reload.SERVER]}"
                yield Change(change.key, change.what, effect)
            elif change.key == f"{key}.pool_size" and _is_lower(rule.pool_size, known.pool_size):
                yield Change(change.key, change.what, "now; servers beyond it are closed as they become free")
            else:
                yield change
    for name in before:
        yield Change(f"database.{name}", "removed", "its clients get 57P01 between transactions")


def _is_lower(size: int, before: int) -> bool:
    return size != 0 and (before == 0 or size < before)


def _listeners(old: tuple[Listen, ...], new: tuple[Listen, ...]) -> Iterator[Change]:
    before = {listen_key(listen): listen for listen in old}
    for listen in new:
        known = before.pop(listen_key(listen), None)
        key = f"listen {_address(listen)}"
        if known is None:
            yield Change(key, "added", "now")
        else:
            yield from _options(key, known, listen)
    for listen in before.values():
        yield Change(f"listen {_address(listen)}", "removed", EFFECTS[Reload.LOGIN])


def _address(listen: Listen) -> str:
    return listen.unix_path or f"{listen.host}:{listen.port}"


def _optional(name: str, old: Section | None, new: Section | None) -> Iterator[Change]:
    """A section that need not be there."""
    if old is not None and new is not None:
        yield from _options(name, old, new)
    elif old is not new:
        yield Change(name, "added" if old is None else "removed", EFFECTS[Reload.RELOAD])


def _tables(word: str, old: Mapping[str, Section], new: Mapping[str, Section]) -> Iterator[Change]:
    for name, section in new.items():
        known = old.get(name)
        if known is None:
            yield Change(f"{word}.{quoted_key(name)}", "added", "now")
        else:
            yield from _options(f"{word}.{quoted_key(name)}", known, section)
    for name in old.keys() - new.keys():
        yield Change(f"{word}.{quoted_key(name)}", "removed", "now")


def _section(path: KeyPath, old: Section, new: Section) -> Iterator[Change]:
    yield from _options(key_text(path), old, new)


def _options(key: str, old: Section, new: Section) -> Iterator[Change]:
    for name, field in type(new).model_fields.items():
        before, after = getattr(old, name, None), getattr(new, name)
        if before == after or field.json_schema_extra is None:
            continue
        if submodel(field) and isinstance(before, Section) and isinstance(after, Section):
            yield from _options(f"{key}.{name}", before, after)
            continue
        row = about(field)
        if row.status is Status.IGNORED:
            continue
        if _is_secret(before) or _is_secret(after) or submodel(field):
            what = "changed"
        else:
            is_mode = isinstance(kind_of(field), FileMode)
            what = f"{_text(before, is_mode)} → {_text(after, is_mode)}"
        yield Change(f"{key}.{name}", what, EFFECTS[row.reload])


def _is_secret(value: Any) -> bool:
    return isinstance(value, Secret) or (isinstance(value, tuple) and any(map(_is_secret, value)))


def _text(value: Any, is_mode: bool) -> str:
    if value is None:
        return UNSET
    return value_text(plain_value(value, is_mode=is_mode))
