"""Files with secrets that others may read are warned about, once each."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpooler.config.load import load

DEMO = (Path(__file__).parent / "data" / "demo.toml").read_text()


@pytest.fixture
def directory() -> Iterator[Path]:
    """Below the system's own temporary directory, which others may enter; pytest's they may not."""
    made = Path(tempfile.mkdtemp(prefix="gpooler-exposure-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def write(path: Path, text: str, mode: int) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def warnings(path: Path) -> list[str]:
    return [str(warning) for warning in load(path, {"ONE": "x", "TWO": "y"}).warnings]


def test_a_configuration_with_secrets_that_others_may_read(directory: Path) -> None:
    file = directory / "config.toml"
    name = write(file, DEMO, 0o644)
    (said,) = warnings(file)
    assert said == (
        f"{name}:18: database.order_app.user.default.password: is a secret in {name}, "
        "which every user of this machine may read (mode 0644)"
    )
    assert "client-secret" not in said
    for mode in (0o640, 0o600):
        write(file, DEMO, mode)
        assert warnings(file) == []


def test_a_directory_that_others_may_not_enter_is_enough(directory: Path) -> None:
    write(directory / "config.toml", DEMO, 0o644)
    directory.chmod(0o700)
    assert warnings(directory / "config.toml") == []


def test_a_configuration_without_secrets_may_be_read_by_all(directory: Path) -> None:
    text = DEMO.replace('"client-secret"', '{ env = "ONE" }').replace('"server-secret"', '{ env = "TWO" }')
    write(directory / "config.toml", text, 0o644)
    assert warnings(directory / "config.toml") == []


def test_files_of_secrets_and_included_files_are_looked_at_too(directory: Path) -> None:
    text = DEMO.replace('"client-secret"', '{ file = "one" }').replace('"server-secret"', '{ file = "two" }')
    more = (
        '[database.b.user.c]\nauthentication = "clear_text"\npassword = "x"\n'
        'storage = "order_storage"\npool = "session"\n'
    )
    write(directory / "config.toml", f'include = ["more.toml"]\n{text}', 0o644)
    write(directory / "more.toml", more, 0o604)
    write(directory / "one", "secret-one", 0o644)
    write(directory / "two", "secret-two", 0o600)
    found = warnings(directory / "config.toml")
    assert len(found) == 2
    assert any("b.user.c.password" in said and "more.toml, " in said and "0604" in said for said in found)
    assert any("order_app.user.default.password" in said and "/one, " in said for said in found)
    assert "secret-one" not in "".join(found)
