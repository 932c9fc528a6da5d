"""Finds the files with secrets that other users of the machine may read."""

import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from gpooler.config.problems import KeyPath
from gpooler.config.rule import Section
from gpooler.config.values import Secret

KEY_FILE: Final = "tls_key_file"  # a private key is a secret, too


def files_with_secrets(table: Section) -> Iterator[tuple[KeyPath, str | None]]:
    """The key of each secret, and the file it is read from; None where it stands in the configuration."""
    for path, name, value in _leaves(table, ()):
        if isinstance(value, Secret):
            if isinstance(path[-1], int):
                path = path[:-1]  # one of a list, which may be written as one alone
            if value.source is None:
                yield path, None
            elif value.source[0] == "file":
                yield path, value.source[1]
        elif name == KEY_FILE and isinstance(value, str):
            yield path, value


def mode_for_others(file: str) -> str:
    """The mode of a file that others may read, every directory on the way included; else an empty text."""
    path = Path(file)
    try:
        mode = path.stat().st_mode
        above = path.resolve().parents
        if mode & stat.S_IROTH and all(each.stat().st_mode & stat.S_IXOTH for each in above):
            return f"{stat.S_IMODE(mode):04o}"
    except OSError:
        pass  # not there, or not for us to look at: told where it is read
    return ""


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str, Any]]:
    """Every value of an option: its key path, its name, itself."""
    if isinstance(value, Section):
        for name in type(value).model_fields:
            yield from _leaves(getattr(value, name), (*path, name))
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, (*path, name))
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            yield from _leaves(item, (*path, number))
    elif path:
        yield path, str(path[-1]), value
