"""Repeated failures: answers kept back, and bans that hold over all workers."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from gpooler.stats.registry import ProcessWord
from tests.harness import PASSWORD, Gpooler, Postgres, eventually
from tests.harness.client import message, startup, text

Factory = Callable[..., Gpooler]

FAILED = 'password authentication failed for user "USER"'
METHODS = ["clear_text", "md5", "scram-sha-256"]


def refusal(gpooler: Gpooler, user: str, password: str, **options: Any) -> str:
    """The text of a refused login, without what differs from client to client."""
    with pytest.raises(psycopg.OperationalError) as caught:
        gpooler.connect(user, password=password, **options)
    said = str(caught.value).partition("FATAL:")[2].strip()
    return re.sub(r"gpooler: c[0-9a-f]{12}: ", "", said).replace(f'"{user}"', '"USER"')


@pytest.mark.parametrize("method", METHODS)
def test_a_ban_holds_in_every_worker_and_for_its_user_only(
    postgres: Postgres, gpooler_factory: Factory, method: str
) -> None:
    gpooler = gpooler_factory(
        postgres,
        rule={"authentication": method, "password": PASSWORD},
        config={
            "performance": {"workers": 2},
            "limits": {"auth_failure_max": 4, "auth_failure_ban_ms": 600_000},
        },
    )
    for _ in range(3):
        assert refusal(gpooler, "joe", "wrong") == FAILED
    gpooler.connect("joe").close()  # a success: the row begins anew
    for _ in range(3):
        assert refusal(gpooler, "joe", "wrong") == FAILED
    gpooler.connect("joe").close()
    for _ in range(4):
        assert refusal(gpooler, "joe", "wrong") == FAILED
    eventually(lambda: gpooler.log().count("banned for 600000 ms after 4 failed logins") == 1)
    for _ in range(12):  # by both workers
        assert refusal(gpooler, "joe", PASSWORD) == FAILED
    gpooler.connect("jim").close()
    assert gpooler.log().count("banned for") == 1
    assert gpooler.process_count(ProcessWord.LOGIN_ERRORS) == 22


def test_a_ban_holds_where_a_host_based_rule_asks_for_the_password(
    postgres: Postgres, gpooler_factory: Factory, tmp_path: Path
) -> None:
    """The rule itself believes everybody, and who came in before may take the short way."""
    (tmp_path / "hba.conf").write_text("host app joe all md5\nhost app all all allow\n")
    gpooler = gpooler_factory(
        postgres,
        rule={"authentication": "none", "password": PASSWORD},
        config={
            "routing": {"hba_file": str(tmp_path / "hba.conf")},
            "limits": {"auth_failure_max": 2, "auth_failure_ban_ms": 600_000},
        },
    )
    for _ in range(2):
        gpooler.connect("joe").close()
    for _ in range(2):
        assert refusal(gpooler, "joe", "wrong") == FAILED
    for _ in range(2):
        assert refusal(gpooler, "joe", PASSWORD) == FAILED
    gpooler.connect("jim", password="wrong").close()


def test_a_ban_ends(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(
        postgres,
        rule={"authentication": "clear_text", "password": PASSWORD},
        config={"limits": {"auth_failure_max": 1, "auth_failure_ban_ms": 4000}},
    )
    before = time.monotonic()
    assert refusal(gpooler, "joe", "wrong") == FAILED
    assert refusal(gpooler, "joe", PASSWORD) == FAILED

    def comes_in() -> bool:
        try:
            gpooler.connect("joe").close()
        except psycopg.OperationalError:
            return False
        return True

    eventually(comes_in, within=20)
    assert time.monotonic() - before >= 4


def test_a_ban_outlives_the_worker_that_counted(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(
        postgres,
        rule={"authentication": "clear_text", "password": PASSWORD},
        config={"limits": {"auth_failure_max": 2, "auth_failure_ban_ms": 600_000}},
    )
    for _ in range(2):
        refusal(gpooler, "joe", "wrong")
    (worker,) = gpooler.worker_pids()
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: gpooler.worker_pids() not in ([], [worker]), within=20)
    eventually(lambda: gpooler.process_count(ProcessWord.LISTENING) == 1, within=20)
    assert refusal(gpooler, "joe", PASSWORD) == FAILED
    gpooler.connect("jim").close()


def test_trusted_networks_are_never_banned(postgres: Postgres, gpooler_factory: Factory) -> None:
    limits = {
        "auth_failure_max": 1,
        "auth_failure_trusted": ["127.0.0.0/8"],
        "auth_failure_delay_ms": 100_000,
    }
    gpooler = gpooler_factory(
        postgres,
        rule={"authentication": "clear_text", "password": PASSWORD},
        config={"limits": limits},
    )
    for _ in range(3):
        assert refusal(gpooler, "joe", "wrong") == FAILED
    gpooler.connect("joe").close()


def test_the_answer_to_a_failed_login_is_kept_back_and_nobody_else_waits(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(
        postgres,
        rule={"authentication": "clear_text", "password": PASSWORD},
        config={"limits": {"auth_failure_delay_ms": 3000, "client_max": 1}},
    )
    with gpooler.raw() as client:
        client.send(startup("joe", "app"))
        client.read()
        client.send(message(b"p", text("wrong")))
        eventually(lambda: "wrong password" in gpooler.log())
        gpooler.connect("jim").close()  # and it takes no place of client_max
        (error,) = client.read_to_end()
        assert error.fields()["C"] == "28P01"
    eventually(lambda: gpooler.process_count(ProcessWord.CLIENTS) == 0)
