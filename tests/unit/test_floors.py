"""The layers in pyproject.toml name every module: none stands outside the house."""

import tomllib
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
CONTRACTS: Final[list[dict[str, Any]]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"][
    "importlinter"
]["contracts"]
PURE_FLOORS: Final = 3  # the lowest ones
MAY_READ_THE_CLOCK: Final = {"clock", "log"}


def modules(*patterns: str) -> list[str]:
    """Every module of the package, without packages themselves; a compiled one by its .pyx."""
    return [
        ".".join(path.relative_to(ROOT / "gpooler").with_suffix("").parts)
        for pattern in patterns or ("*.py", "*.pyx")
        for path in sorted((ROOT / "gpooler").rglob(pattern))
        if path.name != "__init__.py"
    ]


def floors() -> list[list[str]]:
    """The entries of each floor, top first."""
    return [[entry.strip(" ()\\\n") for entry in floor.split(":")] for floor in CONTRACTS[0]["layers"]]


def covers(entry: str, module: str) -> bool:
    """Whether an entry is the module or a package that holds it."""
    return module == entry or module.startswith(entry + ".")


@pytest.mark.parametrize("module", modules())
def test_every_module_stands_on_one_floor(module: str) -> None:
    found = [entry for floor in floors() for entry in floor if covers(entry, module)]
    assert len(found) == 1


@pytest.mark.parametrize("contract", CONTRACTS[1:], ids=lambda contract: contract["name"])
def test_every_pure_module_is_kept_pure(contract: dict[str, Any]) -> None:
    for floor in floors()[-PURE_FLOORS:]:
        for entry in set(floor) - MAY_READ_THE_CLOCK:
            if any(covers(entry, module) for module in modules("*.py")):  # import-linter sees no others
                assert f"gpooler.{entry}" in contract["source_modules"]
