"""password_passthrough: the password that a client sent in clear text opens its servers."""

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.harness import PASSWORD, Gpooler, Postgres, Unavailable, eventually
from tests.harness.agent import Agent
from tests.harness.client import ServerError
from tests.harness.pam import PamService

Factory = Callable[..., Gpooler]
RULE = {"storage_user": None, "password_passthrough": True, "client_fwd_error": True}
TOKEN = "yes:subject-7"
MODULE = "def check(*_):\n    return True\n"


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gpooler-passthrough-") as name:
        yield Path(name)


@pytest.fixture
def trusting(postgres: Postgres, gpooler_factory: Factory, directory: Path) -> Callable[..., Gpooler]:
    """A gpooler whose function believes every password: PostgreSQL is the one that does not."""
    (directory / "believes_in_a_test.py").write_text(MODULE)

    def start(**options: Any) -> Gpooler:
        rule = {"authentication": "clear_text", "auth_module": "believes_in_a_test:check", **RULE}
        config = {"performance": {"workers": options.pop("workers", 1)}}
        return gpooler_factory(
            postgres,
            rule={**rule, **options},
            config=config,
            environment={"PYTHONPATH": str(directory)},
        )

    return start


@pytest.fixture
def roles(postgres: Postgres) -> Iterator[None]:
    """A role with a token for a password."""
    postgres.query(f"ALTER ROLE scram_user PASSWORD '{TOKEN}'")
    yield
    postgres.query(f"ALTER ROLE scram_user PASSWORD '{PASSWORD}'")


def who(gpooler: Gpooler, user: str, password: str) -> str:
    with gpooler.connect(user, password=password) as connection:
        row = connection.execute("SELECT current_user").fetchone()
        assert row is not None
        return str(row[0])


@pytest.mark.parametrize("user", ["password_user", "md5_user", "scram_user"])
def test_every_method_of_the_server_takes_it(trusting: Callable[..., Gpooler], user: str) -> None:
    gpooler = trusting(workers=2)
    with ExitStack() as stack:  # so many that both workers open servers
        for _ in range(6):
            connection = stack.enter_context(gpooler.connect(user))
            assert connection.execute("SELECT current_user").fetchone() == (user,)


def test_without_it_the_server_is_not_shown_what_the_client_typed(trusting: Callable[..., Gpooler]) -> None:
    gpooler = trusting(password_passthrough=False)
    with pytest.raises(psycopg.OperationalError):
        gpooler.connect("scram_user")
    eventually(lambda: "but there is none" in gpooler.log())


def test_the_server_decides_and_its_own_refusal_is_told(trusting: Callable[..., Gpooler]) -> None:
    """Who comes with another password later opens servers with that."""
    gpooler = trusting()
    for _ in range(2):
        with gpooler.raw() as client, pytest.raises(ServerError, match="password auth") as caught:
            client.login("scram_user", "app", password="not-this")
        assert caught.value.sqlstate == "28P01"
    assert who(gpooler, "scram_user", PASSWORD) == "scram_user"
    assert "not-this" not in gpooler.log()


def test_a_password_that_was_changed_on_both_sides(
    trusting: Callable[..., Gpooler], postgres: Postgres
) -> None:
    gpooler = trusting(pool_size=2)
    assert who(gpooler, "scram_user", PASSWORD) == "scram_user"
    postgres.query("ALTER ROLE scram_user PASSWORD 'another'")
    try:
        with gpooler.connect("scram_user", password="another") as first:
            first.execute("BEGIN")
            first.execute("SELECT 1")
            assert who(gpooler, "scram_user", "another") == "scram_user"  # on a second server
    finally:
        postgres.query(f"ALTER ROLE scram_user PASSWORD '{PASSWORD}'")


def test_a_reload_switches_it(trusting: Callable[..., Gpooler]) -> None:
    """What a client has sent before opens nothing once it is off."""
    gpooler = trusting(password_passthrough=False)
    with pytest.raises(psycopg.OperationalError):
        gpooler.connect("scram_user")
    gpooler.reload(rule={"password_passthrough": True})
    assert who(gpooler, "scram_user", PASSWORD) == "scram_user"
    gpooler.reload(rule={"password_passthrough": False, "storage_password": "not-this"})
    with pytest.raises(psycopg.OperationalError), gpooler.connect("scram_user") as connection:
        connection.execute("SELECT 1")


@pytest.mark.parametrize("kind", ["verifier", "external", "pam"])
@pytest.mark.usefixtures("roles")
def test_whoever_judged_the_password(
    postgres: Postgres, gpooler_factory: Factory, directory: Path, kind: str
) -> None:
    rule: dict[str, Any] = {"authentication": "clear_text", **RULE}
    config: dict[str, Any] = {}
    with ExitStack() as stack:
        if kind == "verifier":
            ((rule["password"],),) = postgres.query(
                "SELECT rolpassword FROM pg_authid WHERE rolname = 'scram_user'"
            )
        elif kind == "external":
            rule["authentication"] = "external"
            config["routing"] = {"external_auth_socket_path": str(directory / "agent")}
            stack.enter_context(Agent(directory / "agent"))
        else:
            if importlib.util.find_spec("pamela") is None:
                pytest.skip("pamela is not installed")
            try:
                service = PamService("auth required pam_permit.so", "account required pam_permit.so")
            except Unavailable as error:
                pytest.skip(str(error))
            stack.callback(service.close)
            rule["auth_pam_service"] = service.name
        gpooler = gpooler_factory(postgres, rule=rule, config=config)
        for _ in range(2):
            assert who(gpooler, "scram_user", TOKEN) == "scram_user"
        assert TOKEN not in gpooler.log()


def test_another_name_at_the_server(postgres: Postgres, gpooler_factory: Factory, directory: Path) -> None:
    (directory / "believes_in_a_test.py").write_text(MODULE)
    body = {
        "authentication": "clear_text",
        "auth_module": "believes_in_a_test:check",
        "storage": "postgres",
        "storage_user": "scram_user",
        "password_passthrough": True,
        "pool": "transaction",
    }
    gpooler = gpooler_factory(
        postgres,
        config={"database": {"default": None, "app": {"user": {"anna": body}}}},
        environment={"PYTHONPATH": str(directory)},
    )
    assert who(gpooler, "anna", PASSWORD) == "scram_user"
