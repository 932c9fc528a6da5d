"""Whoever decides about a password: its no counts as a failed login, and that it cannot be asked does not."""

import importlib.util
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.harness import PASSWORD, Gpooler, Postgres, Unavailable, eventually
from tests.harness.agent import Agent
from tests.harness.client import message, startup, text
from tests.harness.pam import PamService

Factory = Callable[..., Gpooler]
LIMITS = {"auth_failure_max": 2, "auth_failure_ban_ms": 600_000}
BANNED = "banned for 600000 ms after 2 failed logins"


@pytest.fixture
def directory() -> Iterator[Path]:
    """Others may enter it, which a process that is not root needs."""
    made = Path(tempfile.mkdtemp(prefix="gpooler-sources-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def comes_in(gpooler: Gpooler, user: str, password: str) -> bool:
    try:
        gpooler.connect(user, password=password).close()
    except psycopg.OperationalError as error:
        if f'password authentication failed for user "{user}"' not in str(error):
            raise
        return False
    return True


def fails(gpooler: Gpooler, user: str, password: str, times: int = 3) -> None:
    for _ in range(times):
        assert not comes_in(gpooler, user, password)


def test_auth_query(postgres: Postgres, gpooler_factory: Factory) -> None:
    """A wrong password and a user whom the query does not know count, a query that fails does not."""
    asker = {
        "authentication": "block",
        "storage": "postgres",
        "storage_user": "postgres",
        "pool": "session",
        "pool_routing": "internal",
    }
    gpooler = gpooler_factory(
        postgres,
        rule={
            "authentication": "scram-sha-256",
            "auth_query": "SELECT name, secret FROM judged WHERE name = $1",
            "auth_query_db": "app",
            "auth_query_user": "asker",
        },
        config={"limits": LIMITS, "database": {"app": {"user": {"asker": asker}}}},
    )
    fails(gpooler, "anna", PASSWORD)  # there is no such table yet
    secrets = f"SELECT name, '{PASSWORD}' AS secret FROM unnest('{{anna,bert}}'::text[]) name"
    postgres.query(f"CREATE TABLE judged AS {secrets}", "app")
    try:
        assert comes_in(gpooler, "anna", PASSWORD)
        assert BANNED not in gpooler.log()
        fails(gpooler, "anna", "wrong", 2)
        fails(gpooler, "nobody", PASSWORD, 2)
        eventually(lambda: gpooler.log().count(BANNED) == 2)
        fails(gpooler, "anna", PASSWORD, 1)
        assert comes_in(gpooler, "bert", PASSWORD)
    finally:
        postgres.query("DROP TABLE judged", "app")


@pytest.mark.parametrize("is_iamproxy", [False, True], ids=["external", "iamproxy"])
def test_agent(postgres: Postgres, gpooler_factory: Factory, directory: Path, is_iamproxy: bool) -> None:
    path = str(directory / "agent")
    rule: dict[str, Any] = {"authentication": "external"}
    config: dict[str, Any] = {"limits": LIMITS, "routing": {"external_auth_socket_path": path}}
    if is_iamproxy:
        rule = {
            "authentication": "clear_text",
            "enable_mdb_iamproxy_auth": True,
            "mdb_iamproxy_socket_path": path,
        }
    gpooler = gpooler_factory(postgres, rule=rule, config=config)
    fails(gpooler, "anna", "yes:x")  # nobody is there to say so
    with Agent(Path(path)):
        fails(gpooler, "anna", "cut")
        assert comes_in(gpooler, "anna", "yes:x")
        assert BANNED not in gpooler.log()
        fails(gpooler, "anna", "no", 2)
        fails(gpooler, "blocked", "yes:x", 2)
        eventually(lambda: gpooler.log().count(BANNED) == 2)
        fails(gpooler, "anna", "yes:x", 1)
        assert comes_in(gpooler, "bert", "yes:x")


MODULE = """
import socket

def check(user, database, address, password):
    if password == b"raise":
        raise OSError("the directory is down")
    if user == "slow":
        with socket.create_connection(("127.0.0.1", int(password))) as gate:
            gate.recv(1)
    return password == b"right"
"""


def start_module(
    postgres: Postgres, gpooler_factory: Factory, directory: Path, listener: dict[str, Any] | None = None
) -> Gpooler:
    (directory / "judge_of_a_test.py").write_text(MODULE)
    rule = {"authentication": "clear_text", "auth_module": "judge_of_a_test:check"}
    return gpooler_factory(
        postgres,
        rule=rule,
        config={"limits": LIMITS},
        listener=listener or {},
        environment={"PYTHONPATH": str(directory)},
    )


def test_module(postgres: Postgres, gpooler_factory: Factory, directory: Path) -> None:
    gpooler = start_module(postgres, gpooler_factory, directory)
    fails(gpooler, "anna", "raise")
    assert comes_in(gpooler, "anna", "right")
    assert BANNED not in gpooler.log()
    fails(gpooler, "anna", "wrong", 2)
    eventually(lambda: BANNED in gpooler.log())
    fails(gpooler, "anna", "right", 1)
    assert comes_in(gpooler, "bert", "right")


def test_a_guess_counts_though_its_client_is_gone_by_then(
    postgres: Postgres, gpooler_factory: Factory, directory: Path
) -> None:
    """Or a directory that is slower to say no than the login may take could be asked for ever."""
    gpooler = start_module(postgres, gpooler_factory, directory, {"client_login_timeout": 3000})
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        listener.settimeout(20)
        clients = [stack.enter_context(gpooler.raw()) for _ in range(2)]
        for client in clients:
            client.send(startup("slow", "app"))
            assert client.read().kind == b"R"
            client.send(message(b"p", text(str(listener.getsockname()[1]))))
            stack.enter_context(listener.accept()[0])
        for client in clients:
            (error,) = client.read_to_end()
            assert "not completed" in error.fields()["M"]
    eventually(lambda: BANNED in gpooler.log())


def test_pam(postgres: Postgres, gpooler_factory: Factory) -> None:
    """What a module returns decides; the user's name here."""
    if importlib.util.find_spec("pamela") is None:
        pytest.skip("pamela is not installed")
    judgements = ["auth_err", "user_unknown", "authinfo_unavail", "system_err", "success"]
    with ExitStack() as stack:
        users = {}
        for judgement in judgements:
            try:
                service = PamService(
                    f"auth required pam_debug.so auth={judgement}", "account required pam_permit.so"
                )
            except Unavailable as error:
                pytest.skip(str(error))
            stack.callback(service.close)
            users[judgement] = {
                "authentication": "clear_text",
                "auth_pam_service": service.name,
                "storage": "postgres",
                "storage_user": "trust_user",
                "pool": "transaction",
            }
        config = {"limits": LIMITS, "database": {"default": None, "app": {"user": users}}}
        gpooler = gpooler_factory(postgres, config=config)
        for judgement in judgements[:-1]:
            fails(gpooler, judgement, "x")
        assert comes_in(gpooler, "success", "x")
        eventually(lambda: gpooler.log().count(BANNED) == 2)
        causes = eventually(
            lambda: lines if len(lines := _refusals(gpooler)) == 12 else []  # three each
        )
        assert [cause for cause in causes if "banned after" in cause] == [causes[2], causes[5]]


def _refusals(gpooler: Gpooler) -> list[str]:
    return [line for line in gpooler.log().splitlines() if "login refused" in line]
