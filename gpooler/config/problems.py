"""What is wrong with a configuration, as data: every problem with its place."""

import re
from dataclasses import dataclass
from typing import Final

BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)

KeyPath = tuple[str | int, ...]  # names, and numbers for the elements of arrays


def key_text(path: KeyPath) -> str:
    """A key path as TOML writes it: ``database."a.b".user.default[1].pool``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + quoted_key(part)
    return text


def quoted_key(key: str) -> str:
    """A key as TOML writes it: bare where it may be, else as a basic string without control characters."""
    if BARE_KEY.fullmatch(key):
        return key
    escaped = key.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in escaped) + '"'


@dataclass(frozen=True, slots=True)
class Problem:
    """One error or warning. It never holds the value of a secret."""

    file: str
    line: int | None  # 1 is the first; None when nothing in the file stands for it
    key: str  # key path as TOML writes it; empty for the whole file
    text: str
    suggestion: str = ""  # the nearest known key or value, or empty

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line is not None else self.file
        key = f"{self.key}: " if self.key else ""
        suggestion = f' (did you mean "{self.suggestion}"?)' if self.suggestion else ""
        return f"{place}: {key}{self.text}{suggestion}"


class ConfigError(Exception):
    """The configuration cannot be used. ``problems`` are all of them, in the order of the file."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems
