"""Who may come in, and how we log in to servers; secrets stay out of logs and of what clients are told.

The stored secrets are PostgreSQL's own, read from pg_authid.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import psycopg
import pytest

from gpooler.stats.registry import ProcessWord
from tests.harness import PASSWORD, Gpooler, Postgres, eventually
from tests.harness.client import message, startup, text

Factory = Callable[..., Gpooler]

CODES = {"clear_text": 3, "md5": 5, "scram-sha-256": 10}
LIBPQ_NAMES = {"clear_text": "password", "md5": "md5", "scram-sha-256": "scram-sha-256"}
CANNOT = ("scram-sha-256", "md5")  # refused when the configuration is read
FAILED = 'password authentication failed for user "USER"'


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


def databases(**users: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with these databases, each with these users."""
    return {"database": {"default": None, **{name: {"user": user} for name, user in users.items()}}}


def stored_secrets(postgres: Postgres) -> dict[str, str]:
    """The password of md5_user in each form."""
    rows = postgres.query("SELECT rolname, rolpassword FROM pg_authid WHERE rolpassword IS NOT NULL")
    by_name = {str(name): str(secret) for name, secret in rows}
    return {"plain": PASSWORD, "md5": by_name["md5_user"], "scram": by_name["scram_user"]}


def refusal(gpooler: Gpooler, user: str, dbname: str, **options: Any) -> str:
    """The text of a refused login, without what differs from client to client."""
    with pytest.raises(psycopg.OperationalError) as caught:
        gpooler.connect(user, dbname, **options)
    said = str(caught.value).partition("FATAL:")[2].strip()
    return re.sub(r"\bc[0-9a-f]{12}\b", "ID", said).replace(f'"{user}"', '"USER"')


def test_every_method_takes_every_kind_of_secret_it_can(postgres: Postgres, gpooler_factory: Factory) -> None:
    stored = stored_secrets(postgres)
    config = databases(
        **{
            f"{method}/{kind}": {"md5_user": rule(authentication=method, password=secret)}
            for method in CODES
            for kind, secret in stored.items()
            if (method, kind) != CANNOT
        }
    )
    gpooler = gpooler_factory(postgres, config=config)
    for method in CODES:
        for kind in stored:
            dbname = f"{method}/{kind}"
            is_scram = method == "scram-sha-256" or (method == "md5" and kind == "scram")
            asked = "scram-sha-256" if is_scram else LIBPQ_NAMES[method]
            if (method, kind) == CANNOT:
                continue
            with gpooler.connect("md5_user", dbname, require_auth=asked) as connection:
                assert connection.execute("SELECT current_user").fetchone() == ("trust_user",)
            for wrong in ("wrong", PASSWORD + "x", PASSWORD[:-1]):
                said = refusal(gpooler, "md5_user", dbname, password=wrong)
                assert said == f"gpooler: ID: {FAILED}", (dbname, wrong)


def test_a_password_with_characters_beyond_ascii_is_right_by_every_method(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    secret = "open\u2003sesame \u00e9\u2126"
    config = databases(**{m: {"u": rule(authentication=m, password=secret)} for m in CODES})
    gpooler = gpooler_factory(postgres, config=config)
    for method in CODES:
        with gpooler.connect("u", method, password=secret) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
    # SASLprep makes the two alike, the other methods do not
    alike = "open sesame e\u0301\u03a9"
    gpooler.connect("u", "scram-sha-256", password=alike).close()
    for method in ("clear_text", "md5"):
        refusal(gpooler, "u", method, password=alike)


@pytest.mark.parametrize("method", CODES)
def test_a_hundred_right_passwords_open_no_door_to_a_wrong_one(
    postgres: Postgres, gpooler_factory: Factory, method: str
) -> None:
    users = {"md5_user": rule(authentication=method, password=PASSWORD)}
    gpooler = gpooler_factory(postgres, config=databases(app=users))
    first = refusal(gpooler, "md5_user", "app", password="wrong")
    for _ in range(100):
        with gpooler.connect("md5_user", "app") as connection:
            assert connection.execute("SELECT current_database()").fetchone() == ("app",)
    assert refusal(gpooler, "md5_user", "app", password="wrong") == first
    with gpooler.raw() as client:
        client.send(startup("md5_user", "app"))
        client.read()
        client.send(message(b"p", b"no zero at the end"))
        assert client.read().fields()["C"] == "08P01"
    eventually(lambda: gpooler.process_count(ProcessWord.CLIENTS) == 0)
    assert gpooler.process_count(ProcessWord.LOGINS) == 100
    assert gpooler.process_count(ProcessWord.LOGIN_ERRORS) == 3


def test_an_empty_password_never_gets_in(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"authentication": "clear_text", "password": PASSWORD})
    with gpooler.raw() as client:
        client.send(startup("u", "app"))
        assert client.read().body == b"\0\0\0\3"
        client.send(message(b"p", b"\0"))
        (error,) = client.read_to_end()
        assert error.fields()["C"] == "28P01"


@pytest.mark.parametrize("method", list(CODES))
def test_an_unknown_user_looks_like_a_wrong_password(
    postgres: Postgres, gpooler_factory: Factory, method: str
) -> None:
    known = rule(authentication=method, password=PASSWORD)
    gpooler = gpooler_factory(postgres, config=databases(shop={"known": known}))

    def conversation(user: str) -> list[tuple[bytes, bytes]]:
        """Kinds and codes of all that is said until the end, with a password that is wrong."""
        said = []
        with gpooler.raw() as client:
            client.send(startup(user, "shop"))
            said.append(client.read())
            if method == "scram-sha-256":
                first = b"n,,n=,r=clientnonce"
                client.send(message(b"p", text("SCRAM-SHA-256") + len(first).to_bytes(4, "big") + first))
                said.append(client.read())
                nonce = said[-1].body[4:].split(b",")[0]
                client.send(message(b"p", b"c=biws," + nonce + b",p=" + b"A" * 43 + b"="))
            elif method == "md5":
                client.send(message(b"p", text("md5" + "0" * 32)))
            else:
                client.send(message(b"p", text("wrong")))
            said += client.read_to_end()
        shapes = []
        for answer in said:
            if answer.kind == b"E":
                fields = answer.fields()
                words = re.sub(r"\bc[0-9a-f]{12}\b", "ID", fields.pop("M")).replace(user, "USER")
                shapes.append((b"E", repr((sorted(fields.items()), words)).encode()))
            else:
                shape = re.sub(rb"[rs]=[^,]*", lambda m: b"%d" % len(m[0]), answer.body[4:])
                shapes.append((answer.kind, answer.body[:4] + (shape if method != "md5" else b"")))
        return shapes

    assert conversation("known") == conversation("mallory")
    assert refusal(gpooler, "mallory", "shop") == f"gpooler: ID: {FAILED}"
    eventually(lambda: 'no rule for database "shop" and user "mallory"' in gpooler.log())
    assert "wrong password" in gpooler.log()


def test_an_unknown_user_gets_the_same_salt_each_time_from_every_worker(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    known = rule(authentication="scram-sha-256", password=PASSWORD)
    config = {**databases(shop={"known": known}), "performance": {"workers": 2}}
    gpooler = gpooler_factory(postgres, config=config)

    def salt(user: str) -> bytes:
        with gpooler.raw() as client:
            client.send(startup(user, "shop"))
            client.read()
            first = b"n,,n=,r=clientnonce"
            client.send(message(b"p", text("SCRAM-SHA-256") + len(first).to_bytes(4, "big") + first))
            return client.read().body[4:].split(b",")[1]

    assert len({salt("mallory") for _ in range(8)}) == 1
    assert len({salt("known") for _ in range(8)}) == 1
    assert salt("mallory") != salt("known")


def test_an_unknown_database_is_told_so(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, config=databases(shop={"known": rule()}))
    with gpooler.raw() as client:
        client.send(startup("known", "elsewhere"))
        (error,) = client.read_to_end()
        assert (error.fields()["S"], error.fields()["C"]) == ("FATAL", "3D000")


def test_a_blocked_user_is_refused_before_any_password(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"authentication": "block"})
    with gpooler.raw() as client:
        client.send(startup("u", "app"))
        (error,) = client.read_to_end()
        assert (error.fields()["S"], error.fields()["C"]) == ("FATAL", "28000")
    assert postgres.activity() == []


def test_the_id_is_shown_only_where_the_rule_says_so(postgres: Postgres, gpooler_factory: Factory) -> None:
    config = databases(
        shown={"u": rule(authentication="block")},
        hidden={"u": rule(authentication="block", client_show_id=False)},
    )
    gpooler = gpooler_factory(postgres, config=config)
    assert refusal(gpooler, "u", "hidden") == 'user "USER" is blocked for database "hidden"'
    with pytest.raises(psycopg.OperationalError) as caught:
        gpooler.connect("u", "shown")
    found = re.search(r"gpooler: (c[0-9a-f]{12}): ", str(caught.value))
    assert found is not None
    eventually(lambda: f"[{found[1]} none]" in gpooler.log())


@pytest.mark.parametrize("pool", ["session", "transaction"])
def test_every_method_of_a_server_is_spoken(
    any_postgres: Postgres, gpooler_factory: Factory, pool: str
) -> None:
    names = ["trust_user", "password_user", "md5_user", "scram_user"]
    own = {name: rule(storage_user=name, storage_password=PASSWORD, pool=pool) for name in names}
    # without storage_user and storage_password: the client's name and the rule's password
    same = {name: rule(storage_user=None, password=PASSWORD, pool=pool) for name in names}
    del own["trust_user"]["storage_password"]
    for name in names:
        del same[name]["storage_user"]
    gpooler = gpooler_factory(any_postgres, config=databases(own=own, same=same))
    for dbname in ("own", "same"):
        for name in names:
            with gpooler.connect(name, dbname) as connection:
                assert connection.execute("SELECT current_user").fetchone() == (name,)


def test_a_server_that_refuses_our_password_is_told_to_the_log_alone(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    wrong = {"storage_user": "scram_user", "storage_password": "not-the-password"}
    config = databases(
        shop={"kept": rule(**wrong), "told": rule(**wrong, client_fwd_error=True)},
        session={"kept": rule(**wrong, pool="session")},
        missing={"u": rule(storage_user="scram_user")},
        hashed={"u": rule(storage_user="scram_user", storage_password="md5" + "0" * 32)},
    )
    gpooler = gpooler_factory(postgres, config=config)
    for user, dbname in (("kept", "shop"), ("kept", "session"), ("u", "missing"), ("u", "hashed")):
        with gpooler.raw() as client:
            client.send(startup(user, dbname))
            error = client.read_to_end()[-1].fields()
            assert (error["S"], error["C"]) == ("FATAL", "08006")
            assert error["M"].endswith(": could not connect to the server")
            assert "scram_user" not in str(error)
    with gpooler.raw() as client:
        client.send(startup("told", "shop"))
        error = client.read_to_end()[-1].fields()
        assert (error["S"], error["C"]) == ("FATAL", "28P01")
        assert error["M"].endswith('password authentication failed for user "scram_user"')
    eventually(lambda: 'password authentication failed for user "scram_user"' in gpooler.log())
    assert "not-the-password" not in gpooler.log()


def test_no_secret_is_ever_in_the_log(postgres: Postgres, gpooler_factory: Factory) -> None:
    stored = stored_secrets(postgres)
    secrets = {"clear-secret", "storage-secret", "typed-wrong", stored["md5"], stored["scram"], PASSWORD}
    config = databases(
        clear={"md5_user": rule(authentication="clear_text", password="clear-secret")},
        md5={"md5_user": rule(authentication="md5", password=stored["md5"])},
        scram={"md5_user": rule(authentication="scram-sha-256", password=stored["scram"])},
        server={"md5_user": rule(storage_user="scram_user", storage_password=PASSWORD)},
        broken={"md5_user": rule(storage_user="scram_user", storage_password="storage-secret")},
    )
    config["logging"] = {"log_debug": True, "log_session": True, "log_query": True, "log_stats": True}
    gpooler = gpooler_factory(postgres, config=config)
    for dbname in ("clear", "md5", "scram", "server", "broken"):
        for password in ("clear-secret", PASSWORD, "typed-wrong"):
            with (
                suppress(psycopg.OperationalError),
                gpooler.connect("md5_user", dbname, password=password) as connection,
            ):
                connection.execute("SELECT 1")
    gpooler.stop()
    log = gpooler.log()
    assert "SELECT 1" in log
    assert "authentication failed" in log
    assert not [secret for secret in secrets if secret in log]


def test_a_hashed_md5_secret_logs_in_to_a_server_that_asks_for_md5(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    stored = stored_secrets(postgres)
    user = rule(authentication="md5", password=stored["md5"])
    del user["storage_user"]
    gpooler = gpooler_factory(postgres, config=databases(shop={"md5_user": user}))
    with gpooler.connect("md5_user", "shop") as connection:
        assert connection.execute("SELECT current_user").fetchone() == ("md5_user",)


def test_an_old_and_a_new_password_are_both_right_and_the_first_opens_servers(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    users = {}
    for method in CODES:
        users[method] = rule(authentication=method, password=[PASSWORD, "old-one"])
        del users[method]["storage_user"]
    gpooler = gpooler_factory(
        postgres, config=databases(**{method: {"scram_user": users[method]} for method in CODES})
    )
    for method in CODES:
        for password in (PASSWORD, "old-one") * 2:
            with gpooler.connect("scram_user", method, password=password) as connection:
                assert connection.execute("SELECT current_user").fetchone() == ("scram_user",)
        refusal(gpooler, "scram_user", method, password="other")
