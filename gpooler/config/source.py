"""Reads the files of a configuration: TOML, includes, and the place of every key."""

import os
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from gpooler.config.problems import KeyPath, Problem, key_text
from gpooler.config.scan import Places, find_places
from gpooler.config.values import Secret

INCLUDE_DEPTH_MOST: Final = 16
FILE_BYTES_MOST: Final = 16 << 20  # thousands of rules are a megabyte
SECRET_BYTES_MOST: Final = 64 << 10
ERROR_PLACE: Final = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


@dataclass(frozen=True, slots=True, order=True)
class Origin:
    """Where a key stands: ``rank`` grows in the order in which files are read."""

    rank: int
    offset: int
    line: int
    file: str


@dataclass(slots=True)
class Source:
    """A whole configuration as plain values, with the origin of each key path."""

    file: str  # the outermost
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def origin(self, path: KeyPath) -> Origin | None:
        """The origin of ``path`` or of the nearest table around it; None when there is neither."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path)

    def problem(self, path: KeyPath, text: str, suggestion: str = "") -> Problem:
        """A problem at the place of ``path``."""
        origin = self.origin(path)
        file, line = (origin.file, origin.line) if origin else (self.file, None)
        return Problem(file, line, key_text(path), text, suggestion)


def read_text(text: str, file: str, directory: Path, secret_keys: Set[str]) -> Source:
    """A configuration that is not in a file; ``include`` and secret files are sought in ``directory``."""
    source = Source(file)
    _Reader(source, secret_keys).add_text(text, file, directory, ())
    return source


def read_file(path: Path, secret_keys: Set[str]) -> Source:
    """The configuration in ``path`` with everything it includes. Never raises: see ``problems``."""
    source = Source(str(path))
    _Reader(source, secret_keys).add_file(path, (), None)
    return source


def read_secret(kind: str, name: str, environ: Mapping[str, str]) -> Secret:
    """The secret in a file, less the line end at its end, or in the environment; or ``ValueError``."""
    if kind == "env":
        if name not in environ:
            raise ValueError(f'the environment variable "{name}" is not set')
        return Secret(environ[name], (kind, name))
    text = read_regular(Path(name), SECRET_BYTES_MOST)
    return Secret(text.removesuffix("\n").removesuffix("\r"), (kind, name))


def read_regular(path: Path, most: int) -> str:
    """The text of a regular file; raises ``ValueError`` with a text for the user."""
    try:
        # O_NONBLOCK: opening a pipe nobody writes to must not hang.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError(f"{path} is not a regular file")
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(most + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > most:
        raise ValueError(f"{path} is longer than {most} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} is not UTF-8 in line {line}") from None


class _Reader:
    def __init__(self, source: Source, secret_keys: Set[str]) -> None:
        self.source = source
        self.secret_keys = secret_keys
        self.rank = 0

    def add_file(self, path: Path, outer: tuple[Path, ...], at: Origin | None) -> None:
        """Read ``path`` and what it includes; ``outer`` are the files around it, ``at`` names it there."""
        file, line = (at.file, at.line) if at else (str(path), None)
        key = "include" if at else ""
        if path.resolve() in outer:
            self._problem(file, line, key, f"{path} includes itself")
        elif len(outer) > INCLUDE_DEPTH_MOST:
            self._problem(file, line, key, f"includes are nested deeper than {INCLUDE_DEPTH_MOST}")
        else:
            try:
                text = read_regular(path, FILE_BYTES_MOST)
            except ValueError as error:
                self._problem(file, line, key, str(error))
            else:
                self.add_text(text, str(path), path.parent, (*outer, path.resolve()))

    def add_text(self, text: str, file: str, directory: Path, outer: tuple[Path, ...]) -> None:
        places = find_places(text)
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            self._syntax_error(file, str(error), places)
            return
        except (ValueError, RecursionError):  # a number of thousands of digits; thousands of brackets
            self._problem(file, None, "", "a value is too long or nested too deep")
            return
        self._add_includes(values.pop("include", []), file, directory, outer, places)
        _absolute_secret_files(values, directory, self.secret_keys)
        self.rank += 1
        origins = {
            path: Origin(self.rank, place.offset, place.line, file) for path, place in places.keys.items()
        }
        self._merge(self.source.values, values, (), (), origins)

    def _add_includes(
        self, includes: object, file: str, directory: Path, outer: tuple[Path, ...], places: Places
    ) -> None:
        names = includes if isinstance(includes, list) else [includes]
        for number, name in enumerate(names):
            place = places.keys.get(("include", number)) or places.keys[("include",)]
            if not isinstance(name, str) or not name or "\0" in name:
                self._problem(file, place.line, "include", "must be a list of file names")
            else:
                self.add_file(directory / name, outer, Origin(0, place.offset, place.line, file))

    def _syntax_error(self, file: str, message: str, places: Places) -> None:
        if places.twice:
            path, first, second = places.twice[0]
            what = "table" if path in places.tables else "key"
            text = f"this {what} stands twice, first in line {first.line}"
            self._problem(file, second.line, key_text(path), text)
            return
        match = ERROR_PLACE.search(message)
        line = int(match[1]) if match and match[1] else None
        text = message[: match.start()] if match else message
        end = " at the end of the file" if match and line is None else ""
        self._problem(file, line, "", f"not valid TOML: {text[:1].lower()}{text[1:]}{end}")

    def _problem(self, file: str, line: int | None, key: str, text: str) -> None:
        self.source.problems.append(Problem(file, line, key, text))

    def _merge(
        self,
        into: dict[str, Any],
        values: dict[str, Any],
        path: KeyPath,
        own: KeyPath,
        origins: dict[KeyPath, Origin],
    ) -> None:
        """Add one file's ``values`` to what earlier files gave; ``own`` is ``path`` in this file."""
        for key, value in values.items():
            there, here = (*path, key), (*own, key)
            if key not in into:
                into[key] = value
                self._add_origins(value, there, here, origins)
                continue
            old = into[key]
            if isinstance(old, dict) and isinstance(value, dict) and not _is_named(there):
                self._merge(old, value, there, here, origins)
            elif there == ("listen",) and isinstance(old, list) and isinstance(value, list):
                for number, item in enumerate(value):
                    self._add_origins(item, (*there, len(old)), (*here, number), origins)
                    old.append(item)
            else:
                first = self.source.origins[there]
                second = origins[here]
                text = f"stands twice, first in {first.file}:{first.line}"
                self._problem(second.file, second.line, key_text(there), text)

    def _add_origins(
        self, value: object, path: KeyPath, own: KeyPath, origins: dict[KeyPath, Origin]
    ) -> None:
        """Note the origins of ``value`` and all in it."""
        if own in origins:
            self.source.origins[path] = origins[own]
        items: Iterable[tuple[str | int, object]] = ()
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list):
            items = enumerate(value)
        for key, item in items:
            self._add_origins(item, (*path, key), (*own, key), origins)


def _is_named(path: KeyPath) -> bool:
    """Whether ``path`` is a thing with a name, which two files may not both define."""
    if path[0] == "database":
        return len(path) >= 4  # database.NAME.user.NAME
    return path[0] in ("storage", "shared_pool", "ldap_endpoint") and len(path) >= 2


def _absolute_secret_files(values: object, directory: Path, secret_keys: Set[str]) -> None:
    """Make the file of each ``{ file = "…" }`` of a secret relative to the file it stands in."""
    if isinstance(values, list):
        for value in values:
            _absolute_secret_files(value, directory, secret_keys)
    elif isinstance(values, dict):
        for key, value in values.items():
            for secret in value if isinstance(value, list) else (value,):
                is_secret = key in secret_keys and isinstance(secret, dict)
                if is_secret and isinstance(name := secret.get("file"), str):
                    secret["file"] = str(directory / name)
            _absolute_secret_files(value, directory, secret_keys)
