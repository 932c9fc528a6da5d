"""Clients whose token an agent judges, and clients whose password a function of the user's judges."""

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from gpooler.stats.registry import ProcessWord
from tests.harness import Gpooler, Postgres, eventually
from tests.harness.agent import Agent
from tests.harness.client import message, startup, text

Factory = Callable[..., Gpooler]
FAILED = 'gpooler: ID: password authentication failed for user "USER"'


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gpooler-agent-") as name:
        yield Path(name)


def refusal(gpooler: Gpooler, user: str, **options: Any) -> str:
    """The text of a refused login, without what differs from client to client."""
    with pytest.raises(psycopg.OperationalError) as caught:
        gpooler.connect(user, **options)
    said = str(caught.value).partition("FATAL:")[2].strip()
    return re.sub(r"\bc[0-9a-f]{12}\b", "ID", said).replace(f'"{user}"', '"USER"')


def start(postgres: Postgres, gpooler_factory: Factory, path: Path, *, is_iamproxy: bool) -> Gpooler:
    if is_iamproxy:
        rule = {"authentication": "clear_text", "enable_mdb_iamproxy_auth": True}
        rule["mdb_iamproxy_socket_path"] = str(path)
        config: dict[str, Any] = {}
    else:
        rule = {"authentication": "external"}
        config = {"routing": {"external_auth_socket_path": str(path)}}
    config["logging"] = {"log_format": "<%x> [%i] (%c) %m", "log_session": True, "log_debug": True}
    return gpooler_factory(postgres, rule=rule, config=config)


@pytest.mark.parametrize("is_iamproxy", [False, True], ids=["external", "iamproxy"])
def test_an_agent_says_who_comes_in_and_the_log_has_its_id(
    postgres: Postgres, gpooler_factory: Factory, directory: Path, is_iamproxy: bool
) -> None:
    gpooler = start(postgres, gpooler_factory, directory / "agent", is_iamproxy=is_iamproxy)
    with Agent(directory / "agent"):
        for token in ("yes:subject-7", "bytewise:subject-8", "yes:"):
            with gpooler.connect("anna", password=token, require_auth="password") as connection:
                assert connection.execute("SELECT current_user").fetchone() == ("trust_user",)
        for user, token in (("anna", "no"), ("blocked", "yes:x"), ("anna", "huge"), ("anna", "cut")):
            assert refusal(gpooler, user, password=token) == FAILED
        assert refusal(gpooler, "anna", password="early") == FAILED
    assert refusal(gpooler, "anna", password="yes:x") == FAILED
    for line in (
        r"<subject-7> \[c\w+\] \(startup\) client connected",
        r"<subject-7> \[c\w+\] \(main\) client disconnected",
        r"<subject-8> .* client connected",
        r"<none> .* \(the agent refused the token\)",
        r"<none> .* \(the agent at .*: an answer of 1099511627776 bytes\)",
        r"<none> .* \(the agent at .*: closed before its answer was complete\)",
        r"<none> .* \(the agent at .*: No such file or directory\)",
    ):
        eventually(lambda line=line: re.search(line, gpooler.log()))
    assert "yes:" not in gpooler.log()


def test_an_agent_that_hangs_holds_up_nobody_else(
    postgres: Postgres, gpooler_factory: Factory, directory: Path
) -> None:
    gpooler = start(postgres, gpooler_factory, directory / "agent", is_iamproxy=False)
    with Agent(directory / "agent"):
        hanging = [gpooler.raw(timeout=20) for _ in range(8)]
        for number, client in enumerate(hanging):
            client.send(startup("anna", "app"))
            assert client.read().body == b"\0\0\0\3"
            client.send(message(b"p", text("hang")))
            if number == 0:
                client.close()
        gpooler.connect("anna", password="yes:x").close()
        for client in hanging[1:]:
            (error,) = client.read_to_end()
            assert error.fields()["C"] == "28P01"
            client.close()
    eventually(lambda: "no answer within 5000 ms" in gpooler.log())
    eventually(lambda: gpooler.process_count(ProcessWord.CLIENTS) == 0)


def test_an_unknown_user_is_asked_like_one_that_the_agent_judges(
    postgres: Postgres, gpooler_factory: Factory, directory: Path
) -> None:
    body = {"storage": "postgres", "pool": "transaction", "authentication": "external"}
    config = {"database": {"default": None, "shop": {"user": {"anna": body}}}}
    gpooler = gpooler_factory(postgres, config=config)
    for user in ("anna", "mallory"):
        assert refusal(gpooler, user, dbname="shop", password="x") == FAILED


MODULE = """
import threading

def check(user, database, address, password):
    assert isinstance(password, bytes)
    assert threading.current_thread() is not None
    if password == b"raise":
        raise ValueError(f"the password is {password}")
    if password == b"truthy":
        return 1
    if password == b"none":
        return None
    return (user, database, address, password) == ("anna", "app", "127.0.0.1", "größe".encode())
"""


def test_a_function_decides_and_nothing_but_true_lets_in(
    postgres: Postgres, gpooler_factory: Factory, directory: Path
) -> None:
    (directory / "login_of_a_test.py").write_text(MODULE)
    rule = {"authentication": "clear_text", "auth_module": "login_of_a_test:check"}
    gpooler = gpooler_factory(postgres, rule=rule, environment={"PYTHONPATH": str(directory)})
    for _ in range(3):
        with gpooler.connect("anna", password="größe") as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
    for user, password in (
        ("bert", "größe"),
        ("anna", "x"),
        ("anna", "raise"),
        ("anna", "truthy"),
        ("anna", "none"),
    ):
        assert refusal(gpooler, user, password=password) == FAILED
    eventually(lambda: "(auth_module raised ValueError)" in gpooler.log())
    assert "the password is" not in gpooler.log()


def test_a_function_that_hangs_holds_up_no_other_rule(
    postgres: Postgres, gpooler_factory: Factory, directory: Path
) -> None:
    (directory / "hangs_in_a_test.py").write_text("import time\n\ndef check(*_):\n    time.sleep(7)\n")
    body = {"storage": "postgres", "storage_db": "app", "storage_user": "trust_user", "pool": "transaction"}
    users = {
        "slow": {**body, "authentication": "clear_text", "auth_module": "hangs_in_a_test:check"},
        "quick": {**body, "authentication": "none"},
    }
    config = {"database": {"default": None, "app": {"user": users}}}
    gpooler = gpooler_factory(postgres, config=config, environment={"PYTHONPATH": str(directory)})
    with gpooler.raw(timeout=20) as client:
        client.send(startup("slow", "app"))
        client.read()
        client.send(message(b"p", text("x")))
        gpooler.connect("quick").close()
        assert not client.is_closed()
        (error,) = client.read_to_end()
        assert error.fields()["C"] == "28P01"
    eventually(lambda: "no answer within 5000 ms" in gpooler.log())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("no_such_module_here:check", "cannot be loaded"),
        ("os:nothing", "cannot be loaded"),
        ("os:name", "is not a function"),
    ],
)
def test_a_function_that_cannot_be_had_stops_the_start(postgres: Postgres, name: str, part: str) -> None:
    gpooler = Gpooler(postgres, rule={"authentication": "clear_text", "auth_module": name})
    try:
        with pytest.raises(RuntimeError, match="did not start") as caught:
            gpooler.start()
        assert f'auth_module "{name}" {part}' in str(caught.value)
    finally:
        gpooler.destroy()
