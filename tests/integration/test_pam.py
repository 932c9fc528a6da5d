"""auth_pam_service: PAM with real service files, modules and a real user of the system."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest

from gpooler.stats.registry import ProcessWord
from tests.harness import Gpooler, Postgres, Unavailable, eventually
from tests.harness.client import message, startup, text
from tests.harness.pam import PamService, SystemUser

Factory = Callable[..., Gpooler]
Make = Callable[..., str]

FAILED = 'password authentication failed for user "USER"'
# What the script of pam_exec is told stands in its environment; the password comes by its standard input.
SCRIPT = """#!/bin/sh
password=$(tr -d '\\0')
echo "$PAM_TYPE $PAM_USER from $PAM_RHOST of $PAM_SERVICE" >> {directory}/calls
case "$PAM_USER:$password" in
    alice:open\\ sesame) exit 0 ;;
    slow:*) read line < {directory}/gate; exit 0 ;;
esac
exit 1
"""


@pytest.fixture
def service() -> Iterator[Make]:
    """Makes PAM services: lines in, name out."""
    with ExitStack() as stack:

        def make(*lines: str) -> str:
            try:
                made = PamService(*lines)
            except Unavailable as error:
                pytest.skip(str(error))
            stack.callback(made.close)
            return made.name

        yield make


@pytest.fixture
def directory() -> Iterator[Path]:
    """With the script that ``pam_exec`` runs, and the gate it waits at for the user "slow"."""
    made = Path(tempfile.mkdtemp(prefix="gpooler-pam-"))
    script = made / "decide"
    script.write_text(SCRIPT.format(directory=made))
    script.chmod(0o755)
    os.mkfifo(made / "gate")
    (made / "calls").touch()
    yield made
    shutil.rmtree(made)


def exec_lines(directory: Path) -> list[str]:
    return [
        f"auth required pam_exec.so expose_authtok quiet {directory}/decide",
        "account required pam_permit.so",
    ]


def pam_rule(name: str, **options: Any) -> dict[str, Any]:
    return {"authentication": "clear_text", "auth_pam_service": name, **options}


def refusal(gpooler: Gpooler, user: str, password: str) -> str:
    """The text of a refused login, without what differs from client to client."""
    with pytest.raises(psycopg.OperationalError) as caught:
        gpooler.connect(user, password=password)
    said = str(caught.value).partition("FATAL:")[2].strip()
    return re.sub(r"gpooler: c[0-9a-f]{12}: ", "", said).replace(f'"{user}"', '"USER"')


def test_a_user_of_the_system_logs_in_with_the_password_of_the_system(
    postgres: Postgres, gpooler_factory: Factory, service: Make
) -> None:
    name = service("auth required pam_unix.so nodelay", "account required pam_unix.so")
    with SystemUser("x7 long and strange é") as user:
        gpooler = gpooler_factory(postgres, rule=pam_rule(name))
        for _ in range(3):
            with gpooler.connect(user.name, password=user.password) as connection:
                assert connection.execute("SELECT current_user").fetchone() == ("trust_user",)
        assert refusal(gpooler, user.name, "wrong") == FAILED
        assert refusal(gpooler, "nobody-of-that-name", user.password) == FAILED
        user.expire()
        assert refusal(gpooler, user.name, user.password) == FAILED
        eventually(lambda: "pam_acct_mgmt: User account has expired" in gpooler.log())
        assert "pam_authenticate: Authentication failure" in gpooler.log()
        assert user.password not in gpooler.log()


def test_pam_is_told_the_user_and_the_address(
    postgres: Postgres, gpooler_factory: Factory, service: Make, directory: Path
) -> None:
    name = service(*exec_lines(directory))
    gpooler = gpooler_factory(postgres, rule=pam_rule(name))
    with gpooler.connect("alice", password="open sesame") as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert refusal(gpooler, "alice", "open  sesame") == FAILED
    assert refusal(gpooler, "bob", "open sesame") == FAILED
    assert (directory / "calls").read_text().splitlines() == [
        f"auth {user} from 127.0.0.1 of {name}" for user in ("alice", "alice", "bob")
    ]


def test_pam_is_asked_by_no_client_without_a_password(
    postgres: Postgres, gpooler_factory: Factory, service: Make, directory: Path
) -> None:
    gpooler = gpooler_factory(postgres, rule=pam_rule(service(*exec_lines(directory))))
    with gpooler.raw() as client:
        client.send(startup("alice", "app"))
        assert client.read().body == b"\0\0\0\3"
        client.send(message(b"p", b"\0"))
        (error,) = client.read_to_end()
        assert error.fields()["C"] == "28P01"
    assert (directory / "calls").read_text() == ""


def test_a_service_without_a_file_lets_nobody_in(
    postgres: Postgres, gpooler_factory: Factory, service: Make, directory: Path
) -> None:
    service()  # skips who is not root, as the others
    gpooler = gpooler_factory(postgres, rule=pam_rule("gpooler-there-is-no-such-service"))
    assert refusal(gpooler, "alice", "open sesame") == FAILED


def test_a_module_that_hangs_holds_up_nobody_else(
    postgres: Postgres, gpooler_factory: Factory, service: Make, directory: Path
) -> None:
    hanging, lively = service(*exec_lines(directory)), service(*exec_lines(directory))
    users = {
        "slow": pam_rule(hanging, storage="postgres", pool="transaction"),
        "alice": pam_rule(
            lively, storage="postgres", pool="transaction", storage_db="app", storage_user="trust_user"
        ),
    }
    gpooler = gpooler_factory(
        postgres,
        config={
            "limits": {"auth_threads": 2, "auth_queue_limit": 1, "auth_timeout_ms": 20_000},
            "database": {"default": None, "app": {"user": users}},
        },
    )
    # open for reading, too: a line waits for its reader, and no reader meets the end of the file
    with open(directory / "gate", "r+b", buffering=0) as gate, ExitStack() as stack:
        for _ in range(3):
            client = stack.enter_context(gpooler.raw())
            client.send(startup("slow", "app"))
            client.read()
            client.send(message(b"p", text("whatever")))
        eventually(lambda: (directory / "calls").read_text().count("slow") == 2)
        # two run, one waits: there is no room for a fourth, and no need to wait to know it
        assert refusal(gpooler, "slow", "whatever") == FAILED
        eventually(lambda: f'PAM service "{hanging}": 3 logins wait for it already' in gpooler.log())
        for _ in range(5):
            with gpooler.connect("alice", password="open sesame") as connection:
                assert connection.execute("SELECT 1").fetchone() == (1,)
        gate.write(b"go\n" * 3)
        eventually(lambda: (directory / "calls").read_text().count("slow") == 3)
        stack.close()
        eventually(lambda: gpooler.process_count(ProcessWord.CLIENTS) == 0)


def test_a_module_that_hangs_is_given_up(
    postgres: Postgres, gpooler_factory: Factory, service: Make, directory: Path
) -> None:
    name = service(*exec_lines(directory))
    limits = {"limits": {"auth_threads": 2, "auth_timeout_ms": 4000}}
    gpooler = gpooler_factory(postgres, rule=pam_rule(name), config=limits)
    assert refusal(gpooler, "slow", "whatever") == FAILED
    eventually(lambda: f'PAM service "{name}": no answer within 4000 ms' in gpooler.log())
    gpooler.connect("alice", password="open sesame").close()  # by the other thread
    with open(directory / "gate", "w") as gate:
        gate.write("go\n")


def test_the_delay_of_a_failure_holds_no_thread(
    postgres: Postgres, gpooler_factory: Factory, service: Make, directory: Path
) -> None:
    name = service("auth optional pam_faildelay.so delay=4000000", *exec_lines(directory))
    gpooler = gpooler_factory(postgres, rule=pam_rule(name), config={"limits": {"auth_threads": 1}})
    with gpooler.raw() as client:
        client.send(startup("bob", "app"))
        client.read()
        client.send(message(b"p", text("wrong")))
        eventually(lambda: "bob" in (directory / "calls").read_text())
        gpooler.connect("alice", password="open sesame").close()
        assert gpooler.process_count(ProcessWord.LOGIN_ERRORS) == 0  # it still waits for its answer
        (error,) = client.read_to_end()
        assert error.fields()["C"] == "28P01"


def test_a_host_based_rule_may_ask_for_pam(
    postgres: Postgres, gpooler_factory: Factory, service: Make, directory: Path
) -> None:
    (directory / "hba.conf").write_text("host app all all pam\n")
    gpooler = gpooler_factory(
        postgres,
        rule=pam_rule(service(*exec_lines(directory))),
        config={"routing": {"hba_file": str(directory / "hba.conf")}},
    )
    with gpooler.connect("alice", password="open sesame", require_auth="password") as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    refusal(gpooler, "alice", "wrong")
