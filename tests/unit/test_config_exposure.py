"""Files with secrets that others may read are warned about, once each."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpooler.config.load import load
from tests.harness.certificates import Certificates

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


def test_private_keys_are_secrets_of_listeners_and_of_storages(directory: Path) -> None:
    files = Certificates(directory)
    names = {"listen": "server", "storage": "cert_user"}
    options = {
        section: f"tls_cert_file = '{files.pem(name)}'\ntls_key_file = '{files.key(name)}'\n"
        for section, name in names.items()
    }
    text = DEMO.replace('tls = "disable"\n', f'tls = "require"\n{options["listen"]}')
    text = text.replace("port = 5432\n", f'port = 5432\ntls = "require"\n{options["storage"]}')
    write(directory / "config.toml", text, 0o600)
    assert warnings(directory / "config.toml") == []
    for name in names.values():
        Path(files.key(name)).chmod(0o644)
    listener, storage = warnings(directory / "config.toml")
    assert "listen[0].tls_key_file: is a secret in" in listener
    assert f"{files.key('server')}, which every user of this machine may read (mode 0644)" in listener
    assert f"storage.order_storage.tls_key_file: is a secret in {files.key('cert_user')}" in storage
    assert "PRIVATE" not in listener + storage
