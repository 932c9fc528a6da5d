"""Writes TOML: keys, values and tables, each value read back before it is believed."""

import tomllib
from collections.abc import Mapping
from typing import Any, Final

import toml

from gpooler.config.problems import quoted_key

ENCODER: Final = toml.TomlEncoder()


def value_text(value: Any) -> str:
    """``value`` (text, number, boolean, list of these, inline table of texts) as TOML."""
    if isinstance(value, Mapping):
        return (
            "{ " + ", ".join(f"{quoted_key(key)} = {value_text(item)}" for key, item in value.items()) + " }"
        )
    try:
        text = str(ENCODER.dump_value(value))
        if tomllib.loads(f"value = {text}")["value"] == value:
            return text
    # toml 0.10.2 turns "\x41" into "A" and fails with an IndexError for some control characters.
    except (IndexError, tomllib.TOMLDecodeError):
        pass
    if isinstance(value, list):
        return "[" + ", ".join(value_text(item) for item in value) + "]"
    return basic_string(value)


def basic_string(text: str) -> str:
    """A text as a basic string: quotes, backslashes and everything unprintable escaped."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in escaped) + '"'


def entry(key: str, value: Any, comment: str = "") -> str:
    """One line ``key = value  # comment``."""
    return f"{quoted_key(key)} = {value_text(value)}" + (f"  # {comment}" if comment else "") + "\n"
