"""No secret is ever shown: one debug-level run with every kind, and every output it has."""

import base64
import importlib.util
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
import toml

from gpooler.auth.exchange import Done, Later
from gpooler.auth.ldap import Question
from gpooler.auth.scram import ScramKeys, Verifier
from gpooler.auth.secrets import Secret
from gpooler.broker.acts import Entrust
from gpooler.broker.messages import ServerState
from gpooler.broker.slots import RouteKey, SlotName
from gpooler.client import peers
from gpooler.config.options import TABLE
from gpooler.config.values import SecretText
from gpooler.wire.session import LoginResult
from gpooler.wire.startup import CancelRequest
from tests.harness import PASSWORD, Gpooler, Postgres, Unavailable, eventually, free_port
from tests.harness.client import cancel_request, message, startup, text
from tests.harness.gpooler import check
from tests.harness.slapd import BASE, SEARCHER, SEARCHER_PASSWORD, Slapd, person, unit

Factory = Callable[..., Gpooler]

# The secrets of the configuration. Each is a word of its own: found, it can only have come from there.
CLEAR: Final = "clear-Kq1-secret"
STORAGE: Final = "storage-Kq2-secret"
STORAGE_WRONG: Final = "storage-Kq3-secret"
FROM_FILE: Final = "file-Kq4-secret"
FROM_ENV: Final = "env-Kq5-secret"
GROUP_WRONG: Final = "group-Kq6-secret"
BIND_WRONG: Final = "bind-Kq7-secret"
LDAP_USER: Final = "ldap-Kq8-secret"
# What clients say, right or wrong: somebody may have typed the password of another system.
TYPED: Final = ("typed-Kq9-secret", CLEAR, PASSWORD, FROM_FILE, FROM_ENV, LDAP_USER)
# Options with secrets that this test uses; one that is new must be added here, and to the run.
COVERED: Final = {
    "password", "storage_password", "ldapbindpasswd", "ldap_storage_password",
}  # fmt: skip


def rule(**options: Any) -> dict[str, Any]:
    return {
        "authentication": "none",
        "storage": "postgres",
        "storage_db": "app",
        "storage_user": "trust_user",
        "pool": "transaction",
        "pool_size": 2,
        **options,
    }


def group(password: str) -> dict[str, Any]:
    """A rule whose user at the server a directory names."""
    made = rule(
        authentication="clear_text",
        ldap_endpoint_name="right",
        ldap_storage_credentials_attr="description",
        ldap_storage_credentials={
            "ro": {"ldap_storage_username": "scram_user", "ldap_storage_password": password}
        },
    )
    del made["storage_user"], made["storage_db"]
    return made


def forms(secret: str) -> set[str]:
    """What it may look like in a log: as it is, in hexadecimal, in base64."""
    data = secret.encode()
    return {secret, data.hex(), base64.b64encode(data).decode().rstrip("=")[:-1]}


def test_every_option_with_a_secret_is_in_the_run() -> None:
    assert {option.name for option in TABLE if isinstance(option.kind, SecretText)} == COVERED


def test_no_secret_is_in_any_output(postgres: Postgres, gpooler_factory: Factory, tmp_path: Path) -> None:
    if importlib.util.find_spec("ldap") is None:
        pytest.skip("python-ldap is not installed (Debian: libldap2-dev libsasl2-dev, then scripts/setup)")
    rows = postgres.query("SELECT rolname, rolpassword FROM pg_authid WHERE rolpassword IS NOT NULL")
    stored = {str(name): str(secret) for name, secret in rows}
    md5, scram = stored["md5_user"], stored["scram_user"]
    (tmp_path / "password").write_text(FROM_FILE + "\n")
    entries = unit("people") + person(
        "ou=people", "md5_user", LDAP_USER, description=["127.0.0.1_app_ro", "127.0.0.1_postgres_ro"]
    )
    with ExitStack() as stack:
        try:
            slapd = stack.enter_context(Slapd(entries))
        except Unavailable as error:
            pytest.skip(str(error))
        searching = {
            "ldapserver": slapd.host, "ldapport": slapd.port, "ldapbasedn": BASE, "ldapbinddn": SEARCHER,
        }  # fmt: skip
        ldap = {"authentication": "clear_text"}
        databases = {
            "clear": rule(authentication="clear_text", password=CLEAR),
            "md5": rule(authentication="md5", password=md5),
            "scram": rule(authentication="scram-sha-256", password=scram),
            "plain_scram": rule(authentication="scram-sha-256", password=CLEAR),
            "file": rule(authentication="clear_text", password={"file": str(tmp_path / "password")}),
            "env": rule(authentication="md5", password={"env": "GPOOLER_TEST_SECRET"}),
            "server": rule(storage_user="scram_user", storage_password=PASSWORD),
            "broken": rule(storage_user="scram_user", storage_password=STORAGE_WRONG),
            "absent": rule(storage="nobody", storage_password=STORAGE),
            "passed": rule(
                authentication="clear_text",
                password=CLEAR,
                storage_user="scram_user",
                password_passthrough=True,
            ),
            "ldap": rule(**ldap, ldap_endpoint_name="right"),
            "ldap_wrong": rule(**ldap, ldap_endpoint_name="wrong"),
            "app": group(PASSWORD),
            "postgres": group(GROUP_WRONG),
        }
        config = {
            "logging": {"log_debug": True, "log_query": True, "log_config": True, "log_session": True},
            "limits": {"auth_failure_max": 50, "backend_connect_timeout_ms": 2000},
            "storage": {"nobody": {"type": "remote", "host": "127.0.0.1", "port": free_port()}},
            "ldap_endpoint": {
                "right": {**searching, "ldapbindpasswd": SEARCHER_PASSWORD},
                "wrong": {**searching, "ldapbindpasswd": BIND_WRONG},
            },
            "database": {
                "default": None,
                **{name: {"user": {"md5_user": body}} for name, body in databases.items()},
            },
        }
        environment = {"GPOOLER_TEST_SECRET": FROM_ENV}
        gpooler = gpooler_factory(postgres, config=config, environment=environment)
        came_in = set()
        for dbname in databases:
            for password in TYPED:
                with (
                    suppress(psycopg.OperationalError),
                    gpooler.connect("md5_user", dbname, password=password) as connection,
                ):
                    connection.execute("SELECT 1")
                    came_in.add((dbname, password))
        with gpooler.raw() as client:  # cancel keys are secrets, too
            cancel_key = client.login("md5_user", "server").key.hex()
            with gpooler.raw() as other:
                other.send(cancel_request(client.pid, client.key))
                other.read_to_end()
        for dbname in ("clear", "md5", "scram"):  # passwords where none belongs
            with gpooler.raw() as client:
                client.send(startup("md5_user", dbname))
                client.read()
                client.send(message(b"p", CLEAR.encode()))  # without its end
                client.send(message(b"p", text(CLEAR)))
                client.read_to_end()
        assert {dbname for dbname, _ in came_in} == set(databases) - {
            "broken", "absent", "passed", "ldap_wrong", "postgres",
        }  # fmt: skip
        (worker,) = gpooler.worker_pids()
        os.kill(worker, signal.SIGKILL)
        eventually(lambda: gpooler.worker_pids() not in ([], [worker]), within=20)
        outputs = {"log": gpooler.log()}
        configuration = gpooler.config_file.read_text()
        gpooler.stop()
        outputs["log"] = gpooler.log()
    assert "authentication: the client is asked" in outputs["log"]
    assert "SELECT 1" in outputs["log"]
    assert "********" in outputs["log"]

    # what is said about the configuration, right and wrong
    os.environ.update(environment)
    try:
        for name, options in (("check", ()), ("effective", ("--effective",))):
            found = check(configuration, *options)
            assert found.returncode == 0, found.stderr
            outputs[name] = found.stdout + found.stderr
        values = toml.loads(configuration)
        for name, spoiled in (
            ("number", configuration.replace(f'"{CLEAR}"', f'[["{CLEAR}"]]')),
            ("key", configuration.replace("storage_password", "storage_pasword")),
            ("word", configuration.replace(f'"{STORAGE}"', f'"{STORAGE}" x')),
            ("quote", configuration.replace(f'"{STORAGE}"', f'"{STORAGE}')),
            ("twice", configuration.replace(once := f'password = "{CLEAR}"', f"{once}\n{once}")),
            ("ldap", configuration.replace(f'"{BIND_WRONG}"', f'{{ other = "{BIND_WRONG}" }}')),
            ("value", toml.dumps({**values, "limits": {"client_max": CLEAR}})),
        ):  # fmt: skip
            found = check(spoiled)
            assert found.returncode == 1, name
            outputs[name] = found.stdout + found.stderr
    finally:
        for key in environment:
            del os.environ[key]

    secrets = {
        *TYPED, cancel_key, STORAGE, STORAGE_WRONG, GROUP_WRONG, BIND_WRONG, SEARCHER_PASSWORD,
        md5, md5[3:], scram,
        *scram.split("$")[-1].split(":"),
    }  # fmt: skip
    shown = [
        (name, secret)
        for name, output in outputs.items()
        for secret in sorted(secrets)
        for form in forms(secret)
        if form in output
    ]
    assert shown == []


def test_a_traceback_shows_no_password(postgres: Postgres, gpooler_factory: Factory, tmp_path: Path) -> None:
    # a library that does what a real one cannot be made to do
    (tmp_path / "pamela.py").write_text(
        "def new_simple_password_conv(*_):\n    raise RuntimeError('surprise')\n"
    )
    gpooler = Gpooler(
        postgres,
        rule={"authentication": "clear_text", "auth_pam_service": "x"},
        config={"logging": {"log_debug": True}},
        environment={"PYTHONPATH": str(tmp_path)},
    )
    with gpooler:
        for _ in range(2):
            with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
                gpooler.connect(password=CLEAR)
        eventually(lambda: "uncaught RuntimeError" in gpooler.log())
        assert "surprise" in gpooler.log()
        assert "Traceback" in gpooler.log()
        assert not [form for form in forms(CLEAR) if form in gpooler.log()]


def test_no_secret_is_in_the_text_of_an_object() -> None:
    keys = ScramKeys(CLEAR.encode(), CLEAR.encode())
    values = (
        Done(b"", password=CLEAR.encode(), keys=keys),
        Later(partial(Done, b"", CLEAR.encode())),
        Question("joe", CLEAR.encode(), None),
        Secret(CLEAR),
        keys,
        Verifier.build(CLEAR.encode(), b"salt"),
        Secret.of_password(CLEAR.encode()),
        CancelRequest(1, CLEAR.encode()),
        LoginResult({}, 1, CLEAR.encode(), CLEAR.encode(), ()),
        ServerState("s1", 1, CLEAR, "127.0.0.1:5432", {}, {}, 0, 0, 0),
        Entrust(SlotName(1, 1), RouteKey("rule", "app", "joe", False), "127.0.0.1:5432", 1, CLEAR),
        peers.Cancel(1, 1, CLEAR),
    )
    for value in values:
        assert not [form for form in forms(CLEAR) if form in repr(value)], type(value)
