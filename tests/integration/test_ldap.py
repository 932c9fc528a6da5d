"""ldap_endpoint: a password checked by a real slapd, by a direct bind or after a search."""

import importlib.util
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.harness import PASSWORD, Gpooler, Postgres, Unavailable, eventually
from tests.harness.client import message, startup, text
from tests.harness.slapd import (
    ADMIN,
    ADMIN_PASSWORD,
    BASE,
    SEARCHER,
    SEARCHER_PASSWORD,
    Slapd,
    person,
    unit,
)

Factory = Callable[..., Gpooler]

FAILED = 'password authentication failed for user "USER"'
ALICE = "open sesame é"
ENTRIES = "".join(
    (
        unit("people"),
        unit("guests"),
        person("ou=people", "alice", ALICE, employeeType="active"),
        person("ou=people", "scram_user", PASSWORD),
        person("ou=people", "bob", "bob-secret", employeeType="gone"),
        person("ou=people", "smith, j +=x", "smith-secret", employeeType="active"),
        person("ou=people", "void", None, employeeType="active"),
        person("ou=people", "twin", "first", employeeType="active"),
        person("ou=guests", "twin", "second", employeeType="active"),
        person("ou=people", "reader", "reader-secret", description="cn=127.0.0.1_app_ro,ou=groups"),
        person(
            "ou=people", "writer", "writer-secret",
            description=["nothing", "127.0.0.1_other_ro", "127.0.0.1_app_rw"],
        ),
        person("ou=people", "stranger", "stranger-secret", description="127.0.0.1_app_rollout"),
    )
)  # fmt: skip


@pytest.fixture(scope="module")
def _slapd() -> Iterator[Slapd]:
    if importlib.util.find_spec("ldap") is None:
        pytest.skip("python-ldap is not installed (Debian: libldap2-dev libsasl2-dev, then scripts/setup)")
    try:
        made = Slapd(ENTRIES)
    except Unavailable as error:
        pytest.skip(str(error))
    with made:
        yield made


@pytest.fixture
def slapd(_slapd: Slapd) -> Iterator[Slapd]:
    yield _slapd
    if not _slapd.is_running:
        _slapd.start()


def direct(slapd: Slapd, **options: Any) -> dict[str, Any]:
    return {
        "ldapserver": slapd.host,
        "ldapport": slapd.port,
        "ldapprefix": "uid=",
        "ldapsuffix": f",ou=people,{BASE}",
        **options,
    }


def search(slapd: Slapd, **options: Any) -> dict[str, Any]:
    return {
        "ldapserver": slapd.host,
        "ldapport": slapd.port,
        "ldapbasedn": BASE,
        "ldapbinddn": SEARCHER,
        "ldapbindpasswd": SEARCHER_PASSWORD,
        **options,
    }


def ldap_rule(endpoint: str = "directory", **options: Any) -> dict[str, Any]:
    return {
        "authentication": "clear_text",
        "ldap_endpoint_name": endpoint,
        "storage": "postgres",
        "storage_db": "app",
        "storage_user": "trust_user",
        "pool": "transaction",
        **options,
    }


def with_endpoint(endpoint: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {"rule": ldap_rule(), "config": {"ldap_endpoint": {"directory": endpoint}, **sections}}


def refusal(gpooler: Gpooler, user: str, password: str, dbname: str = "app") -> str:
    """The text of a refused login, without what differs from client to client."""
    with pytest.raises(psycopg.OperationalError) as caught:
        gpooler.connect(user, dbname, password=password)
    said = str(caught.value).partition("FATAL:")[2].strip()
    return re.sub(r"gpooler: c[0-9a-f]{12}: ", "", said).replace(f'"{user}"', '"USER"')


def comes_in(gpooler: Gpooler, user: str, password: str, dbname: str = "app") -> str:
    """Who the user is at the server."""
    with gpooler.connect(user, dbname, password=password) as connection:
        row = connection.execute("SELECT current_user").fetchone()
        assert row is not None
        return str(row[0])


@pytest.mark.parametrize("endpoint", [direct, search])
def test_the_password_of_the_directory_opens_the_door_and_no_other(
    postgres: Postgres, gpooler_factory: Factory, slapd: Slapd, endpoint: Callable[..., dict[str, Any]]
) -> None:
    gpooler = gpooler_factory(postgres, **with_endpoint(endpoint(slapd)))
    for _ in range(3):
        assert comes_in(gpooler, "alice", ALICE) == "trust_user"
    assert comes_in(gpooler, "smith, j +=x", "smith-secret") == "trust_user"
    for wrong in (ALICE + "x", ALICE[:-1], "bob-secret", "*"):
        assert refusal(gpooler, "alice", wrong) == FAILED
    assert refusal(gpooler, "mallory", ALICE) == FAILED
    assert refusal(gpooler, "void", "anything") == FAILED
    eventually(lambda: 'LDAP endpoint "directory": Invalid credentials' in gpooler.log())
    for secret in (ALICE, SEARCHER_PASSWORD, "smith-secret"):
        assert secret not in gpooler.log()


@pytest.mark.parametrize("endpoint", [direct, search])
def test_an_empty_password_is_not_asked_about(
    postgres: Postgres, gpooler_factory: Factory, slapd: Slapd, endpoint: Callable[..., dict[str, Any]]
) -> None:
    gpooler = gpooler_factory(postgres, **with_endpoint(endpoint(slapd)))
    before = slapd.binds()
    with gpooler.raw() as client:
        client.send(startup("alice", "app"))
        assert client.read().body == b"\0\0\0\3"
        client.send(message(b"p", b"\0"))
        (error,) = client.read_to_end()
        assert error.fields()["C"] == "28P01"
    assert slapd.binds() == before


def test_the_password_of_the_directory_opens_the_server(
    postgres: Postgres, gpooler_factory: Factory, slapd: Slapd
) -> None:
    """password_passthrough: it is the same on both sides, and no secret of the server is configured."""
    config = with_endpoint(search(slapd))["config"]
    rule = ldap_rule(storage_user=None, password_passthrough=True)
    gpooler = gpooler_factory(postgres, rule=rule, config=config)
    assert comes_in(gpooler, "scram_user", PASSWORD) == "scram_user"


@pytest.mark.parametrize("endpoint", [direct, search])
def test_a_name_that_means_something_to_a_directory_is_not_asked_about(
    postgres: Postgres, gpooler_factory: Factory, slapd: Slapd, endpoint: Callable[..., dict[str, Any]]
) -> None:
    gpooler = gpooler_factory(postgres, **with_endpoint(endpoint(slapd)))
    before = slapd.binds()
    names = ("*", "alic*", "alice)(uid=*", "x)(|(uid=alice)", "a\\6cice", "ali/ce", "alice\x01", "alice)")
    for name in names:
        assert refusal(gpooler, name, ALICE) == FAILED
    assert slapd.binds() == before
    eventually(lambda: gpooler.log().count("LDAP is not asked: the user name holds") == len(names))


def test_a_name_cannot_reach_another_place_of_the_tree(
    postgres: Postgres, gpooler_factory: Factory, slapd: Slapd
) -> None:
    endpoint = direct(slapd, ldapsuffix=f",{BASE}")
    gpooler = gpooler_factory(postgres, **with_endpoint(endpoint))
    # unescaped it would be the name of her entry
    assert refusal(gpooler, "alice,ou=people", ALICE) == FAILED


def test_no_directory_is_asked_about_who_is_banned_and_its_failures_ban_nobody(
    postgres: Postgres, gpooler_factory: Factory, slapd: Slapd
) -> None:
    limits = {"auth_failure_max": 2, "auth_failure_ban_ms": 600_000}
    gpooler = gpooler_factory(postgres, **with_endpoint(search(slapd), limits=limits))
    slapd.stop()
    for _ in range(3):
        assert refusal(gpooler, "alice", ALICE) == FAILED
    slapd.start()
    comes_in(gpooler, "alice", ALICE)
    for _ in range(2):
        assert refusal(gpooler, "alice", "wrong") == FAILED
    before = slapd.binds()
    assert refusal(gpooler, "alice", ALICE) == FAILED
    assert slapd.binds() == before
    eventually(lambda: gpooler.log().count("(banned after too many failed logins)") == 1)
    comes_in(gpooler, "bob", "bob-secret")


def test_a_filter_leaves_users_out(postgres: Postgres, gpooler_factory: Factory, slapd: Slapd) -> None:
    endpoint = search(slapd, ldapsearchfilter="(employeeType=active)", ldapsearchattribute="uid")
    gpooler = gpooler_factory(postgres, **with_endpoint(endpoint))
    comes_in(gpooler, "alice", ALICE)
    assert refusal(gpooler, "bob", "bob-secret") == FAILED
    eventually(lambda: "no entry for this user" in gpooler.log())


def test_a_user_of_two_entries_is_refused(postgres: Postgres, gpooler_factory: Factory, slapd: Slapd) -> None:
    gpooler = gpooler_factory(postgres, **with_endpoint(search(slapd)))
    for password in ("first", "second"):
        assert refusal(gpooler, "twin", password) == FAILED
    eventually(lambda: gpooler.log().count("more than one entry for this user") == 2)


def test_a_search_that_is_not_allowed_lets_nobody_in(
    postgres: Postgres, gpooler_factory: Factory, slapd: Slapd
) -> None:
    anonymous = search(slapd)
    del anonymous["ldapbinddn"], anonymous["ldapbindpasswd"]
    endpoints = {"wrong": search(slapd, ldapbindpasswd="not-the-secret"), "anonymous": anonymous}
    users = {"alice": ldap_rule("wrong")}
    config = {
        "ldap_endpoint": endpoints,
        "database": {
            "default": None,
            "wrong": {"user": users},
            "app": {"user": {"alice": ldap_rule("anonymous")}},
        },
    }
    gpooler = gpooler_factory(postgres, config=config)
    assert refusal(gpooler, "alice", ALICE, "wrong") == FAILED
    assert refusal(gpooler, "alice", ALICE, "app") == FAILED
    eventually(lambda: 'LDAP endpoint "wrong": Invalid credentials' in gpooler.log())
    eventually(lambda: 'LDAP endpoint "anonymous": No such object' in gpooler.log())
    assert "not-the-secret" not in gpooler.log()


def test_a_directory_that_is_down_lets_nobody_in_until_it_is_back(
    postgres: Postgres, gpooler_factory: Factory, slapd: Slapd
) -> None:
    gpooler = gpooler_factory(postgres, **with_endpoint(search(slapd)))
    comes_in(gpooler, "alice", ALICE)
    slapd.stop()
    assert refusal(gpooler, "alice", ALICE) == FAILED
    eventually(lambda: "Can't contact LDAP server" in gpooler.log())
    slapd.start()
    comes_in(gpooler, "alice", ALICE)


@pytest.mark.parametrize("scheme", ["ldap", "ldaps", "StartTLS"])
def test_the_next_server_is_asked_where_the_first_is_down(
    postgres: Postgres, gpooler_factory: Factory, slapd: Slapd, scheme: str
) -> None:
    # nobody listens there: the whole of 127/8 is this machine
    options: dict[str, Any] = {
        "ldapserver": f"127.0.0.77 {slapd.host}",
        "ldapport": slapd.tls_port if scheme == "ldaps" else slapd.port,
    }
    if scheme != "ldap":
        options["tls_ca_file"] = str(slapd.ca_file)
        options |= {"ldaptls": True} if scheme == "StartTLS" else {"ldapscheme": scheme}
    gpooler = gpooler_factory(postgres, **with_endpoint(search(slapd, **options)))
    for _ in range(2):
        comes_in(gpooler, "alice", ALICE)


@pytest.mark.parametrize("scheme", ["ldap", "ldaps", "starttls"])
def test_a_directory_that_hangs_slows_nobody_else_down(
    postgres: Postgres, gpooler_factory: Factory, slapd: Slapd, scheme: str
) -> None:
    options = {"ldaptls": True} if scheme == "starttls" else {"ldapscheme": scheme}
    with socket.create_server(("127.0.0.1", 0)) as silent, ExitStack() as stack:
        endpoints = {
            "silent": direct(slapd, ldapport=silent.getsockname()[1], **options),
            "alive": direct(slapd),
        }
        local = ldap_rule("alive", authentication="scram-sha-256", password=PASSWORD)
        del local["ldap_endpoint_name"]
        users = {"bob": ldap_rule("silent"), "alice": ldap_rule("alive"), "local": local}
        config = {
            "limits": {"auth_threads": 2, "auth_queue_limit": 1, "auth_timeout_ms": 3000},
            "ldap_endpoint": endpoints,
            "database": {"default": None, "app": {"user": users}},
        }
        gpooler = gpooler_factory(postgres, config=config)
        waiting = [stack.enter_context(gpooler.raw()) for _ in range(3)]
        for client in waiting:
            client.send(startup("bob", "app"))
            client.read()
        for client in waiting:
            client.send(message(b"p", text("bob-secret")))
        assert refusal(gpooler, "bob", "bob-secret") == FAILED  # at once: the queue is full
        for _ in range(5):
            comes_in(gpooler, "alice", ALICE)
            comes_in(gpooler, "local", PASSWORD)
        for client in waiting:
            (error,) = client.read_to_end()
            assert error.fields()["C"] == "28P01"
        log = eventually(lambda: gpooler.log() if gpooler.log().count("login refused") == 4 else "")
        assert log.count('LDAP endpoint "silent": 3 logins wait for it already') == 1


@pytest.mark.parametrize("options", [{"ldapscheme": "ldaps"}, {"ldaptls": True}], ids=["ldaps", "StartTLS"])
def test_tls_to_the_directory_is_verified(
    postgres: Postgres, gpooler_factory: Factory, slapd: Slapd, options: dict[str, Any]
) -> None:
    port = slapd.tls_port if "ldapscheme" in options else slapd.port
    known = {"ldapport": port, "tls_ca_file": str(slapd.ca_file), **options}
    endpoints = {
        "right": search(slapd, **known),
        "wrong": search(slapd, **{**known, "tls_ca_file": str(slapd.other_ca_file)}),
        "elsewhere": {**search(slapd, **known), "ldapserver": "localhost"},  # not what the certificate says
        "system": {key: value for key, value in search(slapd, **known).items() if key != "tls_ca_file"},
    }
    config = {
        "ldap_endpoint": endpoints,
        "database": {"default": None, **{name: {"user": {"alice": ldap_rule(name)}} for name in endpoints}},
    }
    gpooler = gpooler_factory(postgres, config=config)
    before = slapd.log()
    for name in ("wrong", "elsewhere", "system"):
        assert refusal(gpooler, "alice", ALICE, name) == FAILED
    assert " BIND dn" not in slapd.log()[len(before) :]  # no password went out
    for _ in range(3):
        comes_in(gpooler, "alice", ALICE, "right")
    assert slapd.log()[len(before) :].count(" BIND dn") >= 3
    assert "TLS established" in slapd.log()[len(before) :]


def group_rule(**options: Any) -> dict[str, Any]:
    rule = ldap_rule(
        ldap_storage_credentials_attr="description",
        ldap_storage_credentials={
            "ro": {"ldap_storage_username": "scram_user", "ldap_storage_password": PASSWORD},
            "rw": {"ldap_storage_username": "md5_user", "ldap_storage_password": PASSWORD},
        },
        **options,
    )
    del rule["storage_user"]
    del rule["storage_db"]
    return rule


@pytest.mark.parametrize("pool", ["transaction", "session"])
def test_the_directory_says_whom_a_user_is_at_the_server(
    postgres: Postgres, gpooler_factory: Factory, slapd: Slapd, pool: str
) -> None:
    gpooler = gpooler_factory(
        postgres,
        config={
            "ldap_endpoint": {"directory": search(slapd)},
            "database": {"default": None, "app": {"user": {"default": group_rule(pool=pool)}}},
        },
    )
    for _ in range(3):
        assert comes_in(gpooler, "reader", "reader-secret") == "scram_user"
        assert comes_in(gpooler, "writer", "writer-secret") == "md5_user"
    assert refusal(gpooler, "reader", "writer-secret") == FAILED
    assert refusal(gpooler, "stranger", "stranger-secret") == FAILED
    assert refusal(gpooler, "alice", ALICE) == FAILED
    log = eventually(lambda: gpooler.log() if gpooler.log().count("login refused") == 3 else "")
    assert "description names none of the rule's groups for 127.0.0.1 and database app" in log


def test_a_user_moved_to_another_group_is_somebody_else_with_the_next_login(
    postgres: Postgres, gpooler_factory: Factory, slapd: Slapd
) -> None:
    import ldap

    gpooler = gpooler_factory(
        postgres,
        config={
            "ldap_endpoint": {"directory": search(slapd)},
            "database": {"default": None, "app": {"user": {"reader": group_rule()}}},
        },
    )
    name = f"uid=reader,ou=people,{BASE}"
    admin = ldap.initialize(f"ldap://{slapd.host}:{slapd.port}")
    try:
        admin.simple_bind_s(ADMIN, ADMIN_PASSWORD)
        assert comes_in(gpooler, "reader", "reader-secret") == "scram_user"
        admin.modify_s(name, [(ldap.MOD_REPLACE, "description", [b"127.0.0.1_app_rw"])])
        assert comes_in(gpooler, "reader", "reader-secret") == "md5_user"
        admin.modify_s(name, [(ldap.MOD_REPLACE, "description", [b"none"])])
        assert refusal(gpooler, "reader", "reader-secret") == FAILED
    finally:
        admin.modify_s(name, [(ldap.MOD_REPLACE, "description", [b"cn=127.0.0.1_app_ro,ou=groups"])])
        admin.unbind_s()


def test_a_host_based_rule_may_ask_for_the_directory_where_the_rule_has_one(
    postgres: Postgres, gpooler_factory: Factory, slapd: Slapd, tmp_path: Path
) -> None:
    (tmp_path / "hba.conf").write_text("host app,other all all ldap\n")
    other = {name: value for name, value in ldap_rule().items() if name != "ldap_endpoint_name"}
    other["authentication"] = "none"
    gpooler = gpooler_factory(
        postgres,
        **with_endpoint(
            direct(slapd),
            routing={"hba_file": str(tmp_path / "hba.conf")},
            database={"other": {"user": {"default": other}}},
        ),
    )
    with gpooler.connect("alice", password=ALICE, require_auth="password") as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    refusal(gpooler, "alice", "wrong")
    refusal(gpooler, "alice", ALICE, "other")
    eventually(lambda: "hba.conf:1 says ldap, and the rule has no ldap_endpoint_name" in gpooler.log())
