"""The configuration as a user meets it: the demo everybody copies, the example, ``gpooler check``."""

import fcntl
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import psycopg
import pytest
import toml

from gpooler.stats.registry import RouteWord
from tests.harness import PASSWORD, Gpooler, Postgres, eventually
from tests.harness.client import query
from tests.harness.gpooler import check

Factory = Callable[..., Gpooler]

ROOT: Final = Path(__file__).parents[2]
DEMO: Final = ROOT / "tests/unit/data/demo.toml"
DEMO_PORT: Final = 6401
SECRET: Final = "hunter2"

BROKEN: Final = f"""\
[logging]
log_fromat = "%m"
stats_interval = "soon"
[[listen]]
host = "127.0.0.1"
port = 70000
[storage.pg]
type = "remot"
host = "127.0.0.1"
[database.order_app.user.default]
authentication = "md5"
storage = "pgg"
pool = "transaktion"
pool_sise = 30
storage_password = ["{SECRET}"]
[perfomance]
workers = 2
"""


@pytest.fixture
def demo_port() -> Iterator[int]:
    """The port of the demo, for one test run at a time: asked for before gpooler_factory, let go after it."""
    with (Path(tempfile.gettempdir()) / f"gpooler-test-{DEMO_PORT}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield DEMO_PORT


# --- what everybody starts with ---------------------------------------------------------------


def demo(postgres: Postgres) -> str:
    """The demo as it is written, but for where PostgreSQL is and who may log in there."""
    text = DEMO.read_text()
    for before, after in (
        ('host = "db.example.com"', f'host = "{postgres.host}"'),
        ("port = 5432", f"port = {postgres.port}"),
        ('storage_db = "order"', 'storage_db = "app"'),
        ('storage_user = "order_app"', 'storage_user = "scram_user"'),
        ("server-secret", PASSWORD),
    ):
        assert text.count(before) == 1
        text = text.replace(before, after)
    return text


def test_the_demo_everybody_copies_runs_as_it_is_written(
    postgres: Postgres, demo_port: int, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, text=demo(postgres), port=demo_port)
    with psycopg.connect(
        gpooler.dsn("anybody", "order_app", password="client-secret"), autocommit=True, prepare_threshold=None
    ) as client:
        row = client.execute("SELECT current_user, current_database()").fetchone()
        assert row == ("scram_user", "app")
    with pytest.raises(psycopg.OperationalError, match=r"gpooler: c\w{12}: password authentication failed"):
        psycopg.connect(gpooler.dsn("anybody", "order_app", password="guess"))
    with pytest.raises(psycopg.OperationalError, match="no rule"):
        psycopg.connect(gpooler.dsn("anybody", "elsewhere"))
    line = r"^\d+ \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \d{3} info \[c\w{12} none\] \(startup\) client connected$"
    eventually(lambda: re.search(line, gpooler.log(), re.MULTILINE))
    assert all(re.match(r"\d+ \d{4}-", each) for each in gpooler.log().splitlines())


def test_the_demo_has_30_servers_and_a_wait_of_4_seconds(
    postgres: Postgres, demo_port: int, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, text=demo(postgres), port=demo_port)
    clients = [gpooler.raw() for _ in range(31)]
    try:
        for client in clients:
            client.login("anybody", "order_app", "client-secret")
        for client in clients[:30]:
            client.query("BEGIN; SELECT 1")  # one opening at a time: the 4 seconds hold for it, too
        clients[30].send(query("SELECT 1"))
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
        assert len(postgres.activity()) == 30
        fields = clients[30].read().fields()
        assert fields["C"] == "53300"
        assert "4000 ms" in fields["M"]
        for client in clients[:30]:
            client.query("COMMIT")
    finally:
        for client in clients:
            client.close()


def test_the_uncommented_part_of_the_example_runs(postgres: Postgres, gpooler_factory: Factory) -> None:
    text = (ROOT / "config.toml.example").read_text()
    assert len(re.findall(r"^port = 6432$", text, re.MULTILINE)) == 1
    assert len(re.findall(r"^port = 5432$", text, re.MULTILINE)) == 1
    text = text.replace("\nport = 6432\n", "\nport = {port}\n")
    text = text.replace("\nport = 5432\n", f"\nport = {postgres.port}\n")
    gpooler = gpooler_factory(postgres, text=text)
    with gpooler.connect() as client:
        assert client.execute("SELECT 1").fetchone() == (1,)


def test_the_effective_configuration_runs_as_well(
    postgres: Postgres, gpooler_factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THERE", PASSWORD)
    printed = check(demo(postgres).replace(f'"{PASSWORD}"', '{ env = "THERE" }'), "--effective")
    assert printed.returncode == 0
    text = printed.stdout.replace(f"port = {DEMO_PORT}", "port = {port}").replace("********", "client-secret")
    gpooler = gpooler_factory(postgres, text=text)
    with gpooler.raw() as client:
        client.login("anybody", "order_app", "client-secret")
        assert client.query("SELECT current_user") == [["scram_user"]]


# --- gpooler check ----------------------------------------------------------------------------


def test_check_prints_every_error_with_file_key_line_and_nearest_key_and_fails() -> None:
    result = check(BROKEN)
    assert result.returncode == 1
    assert result.stdout == ""
    *errors, last = result.stderr.splitlines()
    found = {}
    for error in errors:
        shown = re.fullmatch(r"error: (\S+/config\.toml)(?::(\d+))?: ([^:]*): (.*)", error)
        assert shown, error
        found[shown[3]] = (int(shown[2] or 0), shown[4])
    rule = "database.order_app.user.default"
    assert {key: line for key, (line, _) in found.items()} == {
        "logging.log_format": 1,
        "logging.log_fromat": 2,
        "logging.stats_interval": 3,
        "listen[0].port": 6,
        "storage.pg.type": 8,
        f"{rule}.storage": 12,
        f"{rule}.authentication": 11,
        f"{rule}.pool": 13,
        f"{rule}.pool_sise": 14,
        f"{rule}.storage_password": 15,
        "perfomance": 16,
    }
    for key, nearest in (
        ("logging.log_fromat", "log_format"),
        ("storage.pg.type", "remote"),
        (f"{rule}.storage", "pg"),
        (f"{rule}.pool", "transaction"),
        (f"{rule}.pool_sise", "pool_size"),
        ("perfomance", "performance"),
    ):
        assert found[key][1].endswith(f'(did you mean "{nearest}"?)')
    assert last.endswith("config.toml: 11 errors")
    assert SECRET not in result.stderr


def test_an_error_in_an_included_file_is_told_with_that_file(tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text("\n\n[database.x.user.y]\npool_sise = 1\n")
    result = check(f'include = ["{tmp_path}/rules.toml"]\n' + DEMO.read_text())
    assert result.returncode == 1
    assert f"error: {tmp_path}/rules.toml:4: database.x.user.y.pool_sise: unknown key" in result.stderr


@pytest.mark.parametrize(
    "line",
    [
        f'password = "{SECRET}',
        f"password = {SECRET}",
        f'password = [["{SECRET}"]]',
        f'password = {{ file = "{SECRET}", env = "{SECRET}" }}',
        f'password = "{SECRET}"\npassword = "{SECRET}"',
        f'passwort = "{SECRET}"',
        f'ldap_storage_password = "{SECRET}"',
        f'[ldap_endpoint.x]\nldapserver = "h"\nldapbindpasswd = "{SECRET}"',
        f'password = "{SECRET}\\u0000"',
        f'storage_password = "{SECRET}"\npool_size = -1',
    ],
)
def test_no_error_shows_a_secret(line: str) -> None:
    text = DEMO.read_text().replace('password = "client-secret"', line, 1)
    result = check(text)
    assert result.returncode == 1
    assert "error: " in result.stderr
    assert SECRET not in result.stdout + result.stderr


def test_effective_shows_no_secret_wherever_it_comes_from(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    text = DEMO.read_text().replace('"client-secret"', f'{{ file = "{tmp_path}/secret" }}')
    text = text.replace("server-secret", SECRET)
    result = check(text, "--effective")
    assert result.returncode == 0
    assert SECRET not in result.stdout + result.stderr
    rule = toml.loads(result.stdout)["database"]["order_app"]["user"]["default"]
    assert rule["password"] == {"file": f"{tmp_path}/secret"}
    assert rule["storage_password"] == "********"


def test_check_without_effective_says_which_defaults_are_not_odysseys() -> None:
    result = check(DEMO.read_text())
    assert result.returncode == 0
    assert result.stderr == ""
    for name in ("pool_discard", "workers", "disable_nolinger"):
        assert re.search(rf"^  {name}: \S", result.stdout, re.MULTILINE)
