"""Libraries that only some configurations need: one that is missing is said at the start, by name."""

from pathlib import Path
from typing import Any

import pytest

from tests.harness import Gpooler, Postgres

ENDPOINT = {"ldap_endpoint": {"directory": {"ldapserver": "127.0.0.1", "ldapprefix": "uid="}}}


@pytest.mark.parametrize(
    ("module", "option", "config", "said"),
    [
        ("pamela", {"auth_pam_service": "x"}, {}, "auth_pam_service needs the Python package pamela"),
        ("ldap", {"ldap_endpoint_name": "directory"}, ENDPOINT, "ldap_endpoint needs the Python package"),
    ],
)
def test_a_missing_library_ends_the_start(
    postgres: Postgres, tmp_path: Path, module: str, option: dict[str, Any], config: dict[str, Any], said: str
) -> None:
    (tmp_path / f"{module}.py").write_text("raise ImportError('not here')\n")
    gpooler = Gpooler(
        postgres,
        rule={"authentication": "clear_text", **option},
        config=config,
        environment={"PYTHONPATH": str(tmp_path)},
    )
    try:
        with pytest.raises(RuntimeError, match=said):
            gpooler.start()
    finally:
        gpooler.destroy()
