"""The effective configuration: it reads back as the configuration it was made from, without secrets."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpooler.config.effective import EffectiveError, effective
from gpooler.config.listing import options
from gpooler.config.load import load, load_text
from gpooler.config.toml_text import basic_string, entry, value_text

DEMO = Path(__file__).parent / "data" / "demo.toml"
DEMO_TEXT = DEMO.read_text()
TEXTS = st.text(
    st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1, max_size=12
)
NASTY = st.sampled_from(
    ["\\x41", "\x7f", "\x80\\x", "\\", '"""', "'''", "a#b", "\u2028", "default", "[x]", "a.b"]
)


@given(TEXTS | NASTY | st.integers() | st.booleans() | st.lists(TEXTS | NASTY, max_size=3))
def test_a_value_reads_back_as_it_was(value: Any) -> None:
    assert tomllib.loads(f"x = {value_text(value)}") == {"x": value}
    assert tomllib.loads(entry("a b", value, "a comment")) == {"a b": value}


@given(st.dictionaries(TEXTS | NASTY, TEXTS | NASTY, max_size=3))
def test_an_inline_table_reads_back_as_it_was(value: dict[str, str]) -> None:
    assert tomllib.loads(f"x = {value_text(value)}") == {"x": value}


@given(TEXTS | NASTY, TEXTS | NASTY, TEXTS | NASTY, st.booleans(), st.integers(0, 100))
def test_the_effective_configuration_loads_as_the_same_configuration(
    database: str, user: str, text: str, is_array: bool, size: int
) -> None:
    header = f"database.{basic_string(database)}.user.{basic_string(user)}"
    source = (
        f"[service]\npid_file = {basic_string(text)}\nunix_socket_dir = '/s'\nunix_socket_mode = '0640'\n"
        + DEMO_TEXT.replace('"client-secret"', '{ env = "ONE" }').replace(
            '"server-secret"', '{ env = "TWO" }'
        )
        + "[[listen]]\nport = 7\n"
        + (f"[[{header}]]\naddress = '::/0'\n" if is_array else f"[{header}]\n")
        + f"authentication = 'none'\nstorage = 'order_storage'\npool = 'session'\npool_size = {size}\n"
        + f"options = {{ {basic_string(text[:63])} = {basic_string(text)} }}\n"
    )
    environ = {"ONE": "s3cret", "TWO": "p4ss"}
    config = load_text(source, environ).config
    printed = effective(config)
    assert "s3cret" not in printed
    assert load_text(printed, environ).config == config
    assert effective(load_text(printed, environ).config) == printed


def test_a_secret_of_the_file_itself_is_not_shown() -> None:
    printed = effective(load(DEMO).config)
    assert "secret" not in printed.replace("not shown", "")
    assert 'password = "********"  # not shown\n' in printed


def test_what_does_not_read_back_is_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpooler.config.effective.entry", lambda key, value, comment="": f"{key} = 1\n")
    with pytest.raises(EffectiveError):
        effective(load(DEMO).config)


@pytest.mark.parametrize("is_array", [False, True])
def test_groups_and_several_passwords_read_back_as_they_were(is_array: bool) -> None:
    header = "database.order_app.group.staff"
    source = (
        DEMO_TEXT
        + (f"[[{header}]]\naddress = '::/0'\n" if is_array else f"[{header}]\n")
        + (
            "authentication = 'md5'\nstorage = 'order_storage'\npool = 'session'\n"
            "password = [{ env = 'ONE' }, { env = 'TWO' }]\ngroup_query = 'SELECT 1'\n"
            "group_query_db = 'order_app'\ngroup_query_user = 'x'\n"
        )
    )
    environ = {"ONE": "s3cret", "TWO": "p4ss"}
    config = load_text(source, environ).config
    assert config.rules[-1].group == "staff"
    printed = effective(config)
    assert "s3cret" not in printed
    assert effective(load_text(printed, environ).config) == printed
    assert load_text(printed, environ).config.rules[-1] == config.rules[-1]


def test_a_host_name_reads_back() -> None:
    printed = effective(load_text(DEMO_TEXT + "address = 'db.example.com'\n").config)
    assert 'address = "db.example.com"\n' in printed
    assert load_text(printed).config.rules[-1].address == "db.example.com"


def test_of_several_passwords_none_that_stands_in_the_file_is_shown() -> None:
    printed = effective(
        load_text(DEMO_TEXT.replace('"client-secret"', "['topsecret', { env = 'ONE' }]"), {"ONE": "x"}).config
    )
    assert "topsecret" not in printed
    assert 'password = ["********", { env = "ONE" }]  # not shown\n' in printed


def test_what_is_said_of_memory_reads_back_and_is_listed() -> None:
    written = (
        f'{DEMO_TEXT}\n[soft_oom]\nlimit = "750MB"\nprocess = "postgres"\n[soft_oom.drop]\nsignal = "int"\n'
    )
    config = load_text(written).config
    again = load_text(effective(config)).config
    assert config.soft_oom == again.soft_oom
    assert config.soft_oom is not None
    assert config.soft_oom.drop is not None
    assert (config.soft_oom.limit, config.soft_oom.drop.signal) == (750 << 20, "SIGINT")
    listed = {option.key: option.value for option in options(config)}
    assert listed["soft_oom.limit"] == str(750 << 20)
    assert (listed["soft_oom.drop.signal"], listed["soft_oom.drop.max_rate"]) == ("SIGINT", "3")
    assert "soft_oom" not in effective(load_text(DEMO_TEXT).config)
