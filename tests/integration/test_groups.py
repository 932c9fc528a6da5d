"""Rules for the members of a group that a query names."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from gpooler.auth import md5
from tests.harness import PASSWORD, Gpooler, Postgres, eventually
from tests.harness.client import ServerError, message, startup

Factory = Callable[..., Gpooler]
QUERY = "SELECT name FROM staff"
BODY = {"authentication": "md5", "storage": "postgres", "storage_db": "app", "pool": "transaction"}


def config(query: str = QUERY, interval_ms: int = 50) -> dict[str, Any]:
    """A rule for a group, one for a member of it by name, one for everybody, one for the query."""
    group = {"group_query": query, "group_query_db": "app", "group_query_user": "asker"}
    return {
        "routing": {"group_checker_interval": interval_ms},
        "database": {
            "default": None,
            "shop": {
                "user": {
                    "chief": {**BODY, "password": "of the chief", "storage_user": "trust_user"},
                    "default": {**BODY, "authentication": "block"},
                },
                "group": {"staff": {**BODY, **group, "password": PASSWORD, "storage_user": "trust_user"}},
            },
            "app": {
                "user": {
                    "asker": {
                        **BODY,
                        "authentication": "block",
                        "storage_user": "postgres",
                        "pool_routing": "internal",
                    }
                }
            },
        },
    }


@pytest.fixture
def staff(postgres: Postgres) -> Iterator[None]:
    postgres.query("CREATE TABLE staff (name text)", "app")
    postgres.query("INSERT INTO staff VALUES ('anna'), ('bert'), ('chief'), (NULL)", "app")
    yield
    postgres.query("DROP TABLE IF EXISTS staff", "app")


def get_in(gpooler: Gpooler, user: str, password: str = PASSWORD) -> str:
    """Empty after a login, else the code and text of its refusal."""
    try:
        with gpooler.connect(user, "shop", password=password) as connection:
            assert connection.execute("SELECT current_user").fetchone() == ("trust_user",)
    except psycopg.OperationalError as error:
        return str(error).partition("FATAL:")[2]
    return ""


def test_members_come_in_by_the_groups_rule_from_the_first_login_on(
    postgres: Postgres, gpooler_factory: Factory, staff: None
) -> None:
    gpooler = gpooler_factory(postgres, config={**config(), "performance": {"workers": 2}})
    for _ in range(6):
        assert get_in(gpooler, "anna") == get_in(gpooler, "bert") == ""
    assert "authentication failed" in get_in(gpooler, "anna", "wrong")
    assert get_in(gpooler, "chief", "of the chief") == ""
    assert "authentication failed" in get_in(gpooler, "chief")
    assert "is blocked" in get_in(gpooler, "carl")


def test_who_joins_gets_in_and_who_leaves_does_not(
    postgres: Postgres, gpooler_factory: Factory, staff: None
) -> None:
    gpooler = gpooler_factory(postgres, config=config())
    assert get_in(gpooler, "anna") == ""
    assert "is blocked" in get_in(gpooler, "carl")
    postgres.query("INSERT INTO staff VALUES ('carl'); DELETE FROM staff WHERE name = 'anna'", "app")
    eventually(lambda: get_in(gpooler, "carl") == "")
    assert "is blocked" in get_in(gpooler, "anna")
    eventually(lambda: "group shop.group.staff has 3 members" in gpooler.log())


def test_a_query_that_fails_leaves_the_members_as_they_are(
    postgres: Postgres, gpooler_factory: Factory, staff: None
) -> None:
    gpooler = gpooler_factory(postgres, config=config())
    assert get_in(gpooler, "anna") == ""
    postgres.query("DROP TABLE staff", "app")
    eventually(lambda: 'relation "staff" does not exist' in gpooler.log())
    assert get_in(gpooler, "anna") == ""
    postgres.query("CREATE TABLE staff AS SELECT 'bert'::text AS name", "app")
    eventually(lambda: "is blocked" in get_in(gpooler, "anna"))
    assert get_in(gpooler, "bert") == ""
    failures = re.findall("group_query of shop.group.staff failed", gpooler.log())
    assert len(failures) == 1


def test_a_query_that_hangs_holds_up_no_login_after_the_first(
    postgres: Postgres, gpooler_factory: Factory, staff: None
) -> None:
    with postgres.connect("app") as locker:
        gpooler = gpooler_factory(postgres, config=config())
        assert get_in(gpooler, "anna") == ""
        locker.execute("BEGIN")
        locker.execute("LOCK TABLE staff")
        eventually(
            lambda: [one for one in postgres.activity() if one.query == QUERY and one.state == "active"]
        )
        for _ in range(5):
            assert get_in(gpooler, "bert") == ""
        locker.execute("ROLLBACK")


def test_a_client_that_leaves_while_it_waits_for_the_first_answer_leaves_nothing(
    postgres: Postgres, gpooler_factory: Factory, staff: None
) -> None:
    gpooler = gpooler_factory(postgres, config=config("SELECT name FROM staff, pg_sleep(1)"))
    with gpooler.raw() as client:
        client.send(startup("anna", "shop"))
    assert get_in(gpooler, "bert") == ""


def test_a_login_under_way_when_its_user_leaves_opens_no_door_to_the_next(
    postgres: Postgres, gpooler_factory: Factory, staff: None
) -> None:
    gpooler = gpooler_factory(postgres, config=config())
    assert get_in(gpooler, "bert") == ""  # the parameters of the route are known: logins are short
    with gpooler.raw() as client:
        client.send(startup("anna", "shop"))
        salt = client.read().body[4:]
        postgres.query("DELETE FROM staff WHERE name = 'anna'", "app")
        eventually(lambda: "group shop.group.staff has 2 members" in gpooler.log())
        stored = md5.hash_password(PASSWORD.encode(), b"anna")
        client.send(message(b"p", md5.response(stored, salt) + b"\0"))
        client.read_until()
        with gpooler.raw() as other, pytest.raises(ServerError, match="is blocked"):
            other.login("anna", "shop", PASSWORD)
