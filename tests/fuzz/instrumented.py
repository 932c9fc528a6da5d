"""Finds the modules that the fuzzer's build has made, in place of those of the same names; for its Python."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

MODULES = Path(__file__).resolve().parents[2] / "build" / "fuzz" / "modules"


class Instrumented:
    """A finder: one file a module, under its whole name."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """``importlib.abc.MetaPathFinder``."""
        file = MODULES / f"{name}.so"
        return spec_from_file_location(name, file) if file.exists() else None


sys.meta_path.insert(0, Instrumented)
