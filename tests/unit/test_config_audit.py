"""No option is accepted and does nothing: each is built and read, or warned about, or refused by name."""

import re
from pathlib import Path
from typing import Any, Final

import pytest

from gpooler.config.field import Status
from gpooler.config.load import ConfigError, load_text
from gpooler.config.options import TABLE, Option
from gpooler.config.toml_text import entry
from gpooler.config.values import (
    FreeText,
    Kind,
    Networks,
    Number,
    OneOf,
    Parameters,
    PlainSql,
    Quantiles,
    SecretText,
    Size,
    Text,
    TextList,
    Workers,
    YesNo,
)

ROOT: Final = Path(__file__).parents[2]
DEMO: Final = (Path(__file__).parent / "data" / "demo.toml").read_text()
RULE: Final = "database.order_app.user.default"

# Where an option of the table stands in the demo.
HOMES: Final = {
    "database.NAME.user.NAME": RULE,
    "storage.NAME": "storage.order_storage",
    "storage.NAME.balancing": "storage.order_storage.balancing",
    "ldap_endpoint.NAME": "ldap_endpoint.x",
    "database.NAME.user.NAME.ldap_storage_credentials.NAME": f"{RULE}.ldap_storage_credentials.x",
}
# What a section cannot be without.
COMPANIONS: Final = {"ldap_endpoint.NAME": "ldapserver = 'h'\nldapbasedn = 'x'\n"}
# Read by nobody: it is so in any case, which a warning says.
NOT_READ: Final = {"pool_pin_on_listen"}


def other_value(option: Option) -> Any:
    """A value that is not the default."""
    kind: Kind = option.kind
    match kind:
        case YesNo():
            return not option.default
        case Number():
            return next(number for number in range(max(1, kind.least), 99) if number != option.default)
        case OneOf():
            return next(str(word) for word in kind.words if word != option.default)
        case Parameters():
            return {"jit": "off"}
        case Networks():
            return ["10.0.0.0/8"]
        case Quantiles():
            return [0.5]
        case TextList():
            return ["x"]
        case Size():
            return 77
        case Text() | FreeText() | PlainSql() | SecretText():
            return "x"
        case Workers():
            return 2
    return "x"


def with_option(option: Option, value: Any) -> str:
    """The demo with the option set."""
    header = HOMES.get(option.section, option.section)
    lines = entry(option.name, value)
    if option.section == "listen":
        text = re.sub(rf"(?m)^{option.name} = .*\n", "", DEMO)
        return text.replace("[[listen]]\n", f"[[listen]]\n{lines}")
    for line in DEMO.splitlines():
        if line == f"[{header}]":
            text = re.sub(rf"(?m)^{option.name} = .*\n", "", DEMO)
            return text.replace(f"[{header}]\n", f"[{header}]\n{lines}")
    return f"{DEMO}\n[{header}]\n{COMPANIONS.get(option.section, '')}{lines}"


def of(status: Status) -> list[Option]:
    """Options of that status; sections that are refused as a whole are tested as such."""
    found = []
    for option in TABLE:
        is_inside_refused = re.search(r"watchdog|group", option.section)
        if option.about.status is status and not is_inside_refused:
            found.append(option)
    return found


def label(option: Option) -> str:
    return f"{option.section}.{option.name}"


@pytest.mark.parametrize("option", of(Status.NOT_BUILT), ids=label)
def test_what_is_not_built_is_refused_by_name_with_what_to_do(option: Option) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(with_option(option, other_value(option)))
    told = [problem for problem in caught.value.problems if f".{option.name}" in f".{problem.key}"]
    assert any("not built yet" in problem.text and option.about.advice in problem.text for problem in told), (
        caught.value.problems
    )


@pytest.mark.parametrize("option", of(Status.IGNORED), ids=label)
def test_what_does_nothing_is_warned_about_by_name_with_the_reason(option: Option) -> None:
    loaded = load_text(with_option(option, other_value(option)))
    (warning,) = loaded.warnings
    assert warning.key.endswith(option.name)
    assert "is ignored" in warning.text
    assert option.about.advice in warning.text


@pytest.mark.parametrize(
    "section",
    [
        "storage.order_storage.watchdog",
    ],
)
def test_a_section_that_is_not_built_is_refused(section: str) -> None:
    with pytest.raises(ConfigError, match="not built yet"):
        load_text(f"{DEMO}\n[{section}]\n")


def test_every_option_that_is_built_is_read_by_the_code() -> None:
    code = "\n".join(
        path.read_text()
        for path in (ROOT / "gpooler").rglob("*.py")
        if path.parent.name != "config" or path.name in ("hba.py", "load.py", "storage.py", "model.py")
    )
    read = set(re.findall(r"\.([a-z_0-9]+)", code))
    read |= set(re.findall(r'"([a-z_]+)"', code))
    built = {option.name for option in of(Status.BUILT)}
    assert sorted(built - read - NOT_READ) == []
