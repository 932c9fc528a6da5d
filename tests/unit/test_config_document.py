"""The reference and the example: made from the table of options, complete, and usable."""

import re
from pathlib import Path

import pytest

from gpooler.config.document import EXAMPLE, REFERENCE, example, reference
from gpooler.config.field import Status, about
from gpooler.config.load import load_text
from gpooler.config.model import Config
from gpooler.config.options import TABLE, Option, tables

ROOT = Path(__file__).parents[2]
NAMES = sorted({option.name for option in TABLE})


def uncommented(text: str) -> str:
    return re.sub(r"^#(?=[a-z\[])", "", text, flags=re.MULTILINE)


def test_the_reference_in_docs_is_not_stale() -> None:
    assert (ROOT / REFERENCE).read_text() == reference(), "run `python -m gpooler.config.document`"


def test_the_example_is_not_stale() -> None:
    assert (ROOT / EXAMPLE).read_text() == example(), "run `python -m gpooler.config.document`"


@pytest.mark.parametrize("name", NAMES)
def test_the_example_and_the_reference_name_every_option(name: str) -> None:
    assert re.search(rf"^#   {name}: |^# {name} \(", example(), re.MULTILINE)
    assert f"| `{name}` |" in reference()


def test_the_example_loads_without_a_warning() -> None:
    loaded = load_text(example())
    assert loaded.warnings == ()
    assert [str(endpoint) for endpoint in loaded.config.storage["local_postgres"].endpoints] == [
        "127.0.0.1:5432"
    ]


def test_the_example_loads_with_every_option_taken_in() -> None:
    loaded = load_text(uncommented(example()))
    others = [warning.text for warning in loaded.warnings if "is ignored" not in warning.text]
    assert set(others) == {'has no effect while "tls" is "disable"'}
    assert [rule.group for rule in loaded.config.rules] == [None, "NAME", None, None, None, None, None]
    assert len(loaded.config.listen) == 2


def test_the_commented_values_of_the_example_are_the_defaults() -> None:
    taken_in = load_text(uncommented(example())).config
    plain = load_text(example()).config
    for name in ("performance", "routing", "query_parsing"):
        assert getattr(taken_in, name) == getattr(plain, name)


@pytest.mark.parametrize("option", TABLE, ids=lambda option: f"{option.section}.{option.name}")
def test_every_row_of_the_table_says_what_it_must(option: Option) -> None:
    row = option.about
    assert row.help.endswith((".", ":"))
    assert bool(row.advice) == (row.status is not Status.BUILT)
    assert option.kind.describe()
    assert option.kind.short()


def test_every_default_is_a_value_its_option_takes() -> None:
    for option in TABLE:
        if not option.is_required and option.default is not None:
            value = option.default
            assert option.kind.parse(f"{value:04o}" if option.name == "unix_socket_mode" else value) == value


def test_every_field_of_the_model_is_in_the_table() -> None:
    for table in tables():
        for field in table.model.model_fields.values():
            assert about(field)
    assert set(Config.model_fields) >= {"service", "logging", "rules"}
