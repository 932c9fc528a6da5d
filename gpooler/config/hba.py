"""Reads the files of host-based rules for ``[routing] hba_file``."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from gpooler.auth.hba import Hba
from gpooler.auth.hba_file import parse
from gpooler.config.model import Document
from gpooler.config.problems import KeyPath, Problem
from gpooler.config.source import FILE_BYTES_MOST, Source, read_regular

HBA_FILE: Final[KeyPath] = ("routing", "hba_file")


class _Files:
    """The real ones (``auth.hba.Files``)."""

    def read(self, path: str) -> str:
        if not os.path.lexists(path):
            raise FileNotFoundError(path)
        return read_regular(Path(path), FILE_BYTES_MOST)

    def names(self, path: str) -> Sequence[str]:
        try:
            found = sorted(os.listdir(path))
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from None
        return [
            os.path.join(path, name) for name in found if name.endswith(".conf") and not name.startswith(".")
        ]

    def join(self, file: str, name: str) -> str:
        return os.path.join(os.path.dirname(file), name)


def read_hba(source: Source, document: Document) -> tuple[Hba | None, tuple[Problem, ...]]:
    """The rules of the file that ``document`` names, None when it names none, and all that is wrong.

    A relative name is sought where the configuration file stands that has it.
    """
    name = document.routing.hba_file
    if name is None:
        return None, ()
    origin = source.origin(HBA_FILE)
    path = os.path.join(os.path.dirname(origin.file) if origin else "", name)
    hba, problems = parse(path, _Files())
    return hba, tuple(
        source.problem(HBA_FILE, problem.text)
        if problem.line is None
        else Problem(problem.file, problem.line, "", problem.text)
        for problem in problems
    )
