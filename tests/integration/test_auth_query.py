"""Secrets from a query: with every method, of every kind, and with whatever a client calls itself."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest

from tests.harness import PASSWORD, FaultProxy, Gpooler, Postgres, eventually
from tests.harness.client import ServerError, message, startup, text

Factory = Callable[..., Gpooler]

SHADOW = "SELECT usename, passwd, valuntil FROM pg_shadow WHERE usename = $1"
TABLE = "SELECT name, secret FROM secrets WHERE name = $1"
FAILED = 'password authentication failed for user "USER"'


def config(query: str = SHADOW, *, database: str = "postgres", **rule: Any) -> dict[str, Any]:
    """One rule for everybody, with secrets from a query that runs as the superuser."""
    return {
        "database": {
            "default": {
                "user": {
                    "default": {
                        "auth_query": query,
                        "auth_query_db": database,
                        "auth_query_user": "asker",
                        "authentication": "md5",
                        "storage": "postgres",
                        "storage_db": "app",
                        "storage_user": None,
                        "pool": "transaction",
                        **rule,
                    }
                }
            },
            database: {
                "user": {
                    "asker": {
                        "authentication": "block",
                        "storage": "postgres",
                        "storage_user": "postgres",
                        "pool": "session",
                        "pool_routing": "internal",
                    }
                }
            },
        }
    }


@pytest.fixture
def secrets(postgres: Postgres) -> Iterator[Callable[[str, str | None], None]]:
    """A table in the database app, and what puts a secret into it."""
    postgres.query("CREATE TABLE secrets (name text, secret text)", "app")

    def put(name: str, secret: str | None) -> None:
        with postgres.connect("app") as connection:
            connection.execute("DELETE FROM secrets WHERE name = %s", [name])
            connection.execute("INSERT INTO secrets VALUES (%s, %s)", [name, secret])

    yield put
    postgres.query("DROP TABLE secrets", "app")


def refusal(gpooler: Gpooler, user: str, **options: Any) -> str:
    """The text of a refused login, without what differs from client to client."""
    with pytest.raises(psycopg.OperationalError) as caught:
        gpooler.connect(user, **options)
    said = str(caught.value).partition("FATAL:")[2].strip()
    return re.sub(r"\bc[0-9a-f]{12}\b", "ID", said).replace(f'"{user}"', '"USER"')


def test_stored_secrets_let_in_and_open_servers_though_no_password_is_configured(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    """Of a SCRAM user gpooler knows the keys of the client's login, of an MD5 user the hash."""
    gpooler = gpooler_factory(postgres, config={**config(), "logging": {"log_debug": True}})
    for _ in range(3):
        for user, method in (("scram_user", "scram-sha-256"), ("md5_user", "md5")):
            with gpooler.connect(user, require_auth=method) as connection:
                assert connection.execute("SELECT current_user").fetchone() == (user,)
    for user in ("scram_user", "md5_user", "nobody"):
        assert refusal(gpooler, user, password="wrong") == f"gpooler: ID: {FAILED}"
    eventually(lambda: "no password for this user" in gpooler.log())
    stored = [str(row[0]) for row in postgres.query("SELECT passwd FROM pg_shadow WHERE passwd IS NOT NULL")]
    assert not [secret for secret in (*stored, PASSWORD) if secret in gpooler.log()]


@pytest.mark.parametrize(
    ("columns", "cause"),
    [
        ("name, 'x', secret", "the third column, valuntil, is no time"),
        ("name, secret::int", "22P02: a value"),
    ],
    ids=["columns in the wrong order", "a cast"],
)
def test_a_query_that_is_wrong_about_a_secret_does_not_tell_it(
    postgres: Postgres,
    gpooler_factory: Factory,
    secrets: Callable[[str, str | None], None],
    columns: str,
    cause: str,
) -> None:
    secrets("anna", "a-secret-of-anna")
    query = f"SELECT {columns} FROM secrets WHERE name = $1"
    gpooler = gpooler_factory(
        postgres, config={**config(query, database="app"), "logging": {"log_debug": True}}
    )
    refusal(gpooler, "anna", password="not-her-secret")
    eventually(lambda: cause in gpooler.log())
    assert "a-secret" not in gpooler.log()


def test_an_invented_user_meets_the_same_exchange_as_a_real_one(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, config=config(authentication="scram-sha-256"))

    def exchange(user: str) -> tuple[list[tuple[bytes, int]], bytes]:
        """Kind and length of each message up to the refusal, and the salt."""
        with gpooler.raw() as client:
            client.send(startup(user, "app"))
            said = [client.read()]
            first = b"n,,n=,r=clientnonce"
            client.send(message(b"p", text("SCRAM-SHA-256") + len(first).to_bytes(4, "big") + first))
            said.append(client.read())
            nonce, salt, count = said[-1].body[4:].split(b",")
            assert count == b"i=4096"
            client.send(message(b"p", b"c=biws," + nonce + b",p=" + b"A" * 43 + b"="))
            said += client.read_to_end()
            assert said[-1].fields()["C"] == "28P01"
            return [(one.kind, len(one.body)) for one in said], salt

    real, invented = exchange("scram_user"), exchange("peter_user")  # names of one length
    assert real[0] == invented[0]
    assert real[1] != invented[1]
    assert len({exchange("peter_user")[1] for _ in range(4)}) == 1
    assert exchange("paula_user")[1] != invented[1]


@pytest.mark.parametrize("pool", ["session", "transaction"])
def test_every_worker_opens_servers_with_the_keys_of_its_clients(
    postgres: Postgres, gpooler_factory: Factory, pool: str
) -> None:
    two = {"performance": {"workers": 2}, **config(authentication="scram-sha-256", pool=pool)}
    gpooler = gpooler_factory(postgres, config=two)
    connections = [gpooler.connect("scram_user") for _ in range(12)]
    for connection in connections:
        assert connection.execute("SELECT current_user").fetchone() == ("scram_user",)
        connection.close()


def test_a_verifier_in_the_configuration_opens_servers_with_the_clients_keys(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    ((verifier,),) = postgres.query("SELECT passwd FROM pg_shadow WHERE usename = 'scram_user'")
    rule = {"authentication": "scram-sha-256", "password": verifier, "storage_user": "scram_user"}
    gpooler = gpooler_factory(postgres, rule=rule)
    with gpooler.connect("scram_user") as connection:
        assert connection.execute("SELECT current_user").fetchone() == ("scram_user",)
    refusal(gpooler, "scram_user", password="wrong")


@pytest.mark.parametrize("method", ["clear_text", "md5", "scram-sha-256"])
def test_plain_secrets_serve_every_method(
    postgres: Postgres, gpooler_factory: Factory, secrets: Callable[[str, str | None], None], method: str
) -> None:
    rule = {"authentication": method, "storage_user": "trust_user"}
    gpooler = gpooler_factory(postgres, config=config(TABLE, database="app", **rule))
    secrets("anna", "open sesame")
    secrets("void", None)
    with gpooler.connect("anna", password="open sesame") as connection:
        assert connection.execute("SELECT current_user").fetchone() == ("trust_user",)
    for user in ("anna", "void", "nobody"):
        assert refusal(gpooler, user) == f"gpooler: ID: {FAILED}"
    assert "open sesame" not in gpooler.log()


@pytest.mark.parametrize("mark", ["$1", "%u", "'%u'"])
def test_a_name_is_a_value_whatever_is_in_it(
    postgres: Postgres, gpooler_factory: Factory, secrets: Callable[[str, str | None], None], mark: str
) -> None:
    query = f"SELECT name, secret FROM secrets WHERE name = {mark}"
    rule = {"authentication": "scram-sha-256", "storage_user": "trust_user"}
    gpooler = gpooler_factory(postgres, config=config(query, database="app", **rule))
    names = ["o'brien", "%s", "%(x)s", 'a"b\\', "$1", "x' OR 'a'='a", "'; DROP TABLE secrets; --", "größe"]
    for name in names:
        secrets(name, f"of {name}")
    for name in names:
        with gpooler.connect(name, password=f"of {name}") as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
    for name in ("x' OR 'b'='b", "y' UNION SELECT 'y', 'z", "\\' OR 1=1 --"):
        assert refusal(gpooler, name) == f"gpooler: ID: {FAILED}"
    with gpooler.raw() as client:
        client.send(startup("anna", "app").replace(b"anna", b"ann\xff"))
        assert client.read().body[:4] == b"\0\0\0\x0a"
    assert postgres.query("SELECT count(*) FROM secrets", "app") == [(len(names),)]


def test_the_host_of_a_client_can_be_asked_for(
    postgres: Postgres, gpooler_factory: Factory, secrets: Callable[[str, str | None], None]
) -> None:
    query = "SELECT name, secret || host(%h::inet) FROM secrets WHERE name = %u"
    rule = {"storage_user": "trust_user"}
    gpooler = gpooler_factory(postgres, config=config(query, database="app", **rule))
    secrets("anna", "at ")
    for source in ("127.0.0.1", "127.0.0.2"):
        with gpooler.raw(source=source) as client:
            client.login("anna", password=f"at {source}")
        with gpooler.raw(source="127.0.0.3") as client, pytest.raises(ServerError):
            client.login("anna", password=f"at {source}")


def test_a_password_that_has_expired_is_a_wrong_one(postgres: Postgres, gpooler_factory: Factory) -> None:
    postgres.query(f"""
        CREATE ROLE past LOGIN PASSWORD '{PASSWORD}' VALID UNTIL '2020-01-01';
        CREATE ROLE future LOGIN PASSWORD '{PASSWORD}' VALID UNTIL '2100-01-01 00:00:00.5+05:30';
        CREATE ROLE ever LOGIN PASSWORD '{PASSWORD}' VALID UNTIL 'infinity';
    """)
    try:
        gpooler = gpooler_factory(postgres, config=config(storage_user="trust_user"))
        for user in ("future", "ever"):
            gpooler.connect(user).close()
        assert refusal(gpooler, "past") == refusal(gpooler, "ever", password="wrong")
        eventually(lambda: "(the password has expired)" in gpooler.log())
        gpooler.stop()
    finally:
        postgres.query("DROP ROLE past, future, ever")


@pytest.mark.parametrize(
    ("query", "cause"),
    [
        ("SELECT a, b FROM nowhere WHERE c = $1", 'relation "nowhere" does not exist'),
        ("SELECT usename, passwd, pg_sleep(30) FROM pg_shadow WHERE usename = $1", ""),
        ("SELECT usename FROM pg_shadow WHERE usename = $1", "1 columns"),
        ("SELECT usename, passwd FROM pg_shadow WHERE $1 <> ''", "rows instead of one"),
        ("SELECT 'other', passwd FROM pg_shadow WHERE usename = $1", "of another user"),
    ],
)
def test_a_query_that_fails_lets_nobody_in_and_tells_the_log_alone(
    postgres: Postgres, gpooler_factory: Factory, query: str, cause: str
) -> None:
    gpooler = gpooler_factory(postgres, config=config(query))
    with gpooler.raw() as client:
        client.send(startup("scram_user", "app"))
        (error,) = client.read_to_end()
        assert (error.fields()["S"], error.fields()["C"]) == ("FATAL", "28000")
        assert error.fields()["M"].endswith(': password authentication failed for user "scram_user"')
    eventually(lambda: re.search(rf"28000 .*\(auth_query failed: .*{cause}", gpooler.log()))
    # what ran on is ended by the server itself
    eventually(lambda: not [one for one in postgres.activity() if one.state == "active"])


def test_a_database_that_is_away_is_asked_again_when_it_is_back(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, config=config())
    gpooler.connect("scram_user").close()
    postgres.stop()
    assert refusal(gpooler, "md5_user") == f"gpooler: ID: {FAILED}"
    postgres.start()
    with gpooler.connect("md5_user") as connection:
        assert connection.execute("SELECT current_user").fetchone() == ("md5_user",)


def test_a_database_that_hangs_is_given_up(
    postgres: Postgres, gpooler_factory: Factory, fault_proxy: Callable[[int], FaultProxy]
) -> None:
    proxy = fault_proxy(postgres.port)
    limits = {"storage": {"postgres": {"port": proxy.port}}, "limits": {"auth_timeout_ms": 2000}}
    gpooler = gpooler_factory(postgres, config={**config(), **limits, "performance": {"workers": 1}})
    proxy.stall()
    names = ["scram_user", "md5_user", "trust_user"]  # more than there are connections
    with ExitStack() as stack:
        clients = [stack.enter_context(gpooler.raw()) for _ in names]
        for client, name in zip(clients, names, strict=True):
            client.send(startup(name, "app"))
        for client in clients:
            (error,) = client.read_to_end()
            assert (error.fields()["S"], error.fields()["C"]) == ("FATAL", "28000")
    eventually(lambda: gpooler.log().count("(auth_query failed: no answer within 2000 ms") == len(names))
    proxy.resume()
    gpooler.connect("md5_user").close()
    # one that is open, and whose query gets no answer
    proxy.stall()
    assert refusal(gpooler, "scram_user") == f"gpooler: ID: {FAILED}"
    eventually(lambda: "(auth_query failed: no answer within 500 ms" in gpooler.log())


def test_a_user_made_after_a_refusal_gets_in_soon(
    postgres: Postgres, gpooler_factory: Factory, secrets: Callable[[str, str | None], None]
) -> None:
    rule = {"storage_user": "trust_user"}
    gpooler = gpooler_factory(postgres, config=config(TABLE, database="app", **rule))
    refusal(gpooler, "late", password="x")
    secrets("late", "x")

    def gets_in() -> bool:
        try:
            gpooler.connect("late", password="x").close()
        except psycopg.OperationalError:
            return False
        return True

    eventually(gets_in, within=20)


def test_nothing_of_a_client_reaches_the_query(
    postgres: Postgres, gpooler_factory: Factory, secrets: Callable[[str, str | None], None]
) -> None:
    rule = {"storage_user": "trust_user", "pool_size": 1}
    gpooler = gpooler_factory(postgres, config=config(TABLE, database="app", **rule))
    secrets("anna", "right")
    postgres.query(
        """
        CREATE SCHEMA evil;
        GRANT USAGE ON SCHEMA evil TO trust_user;
        CREATE TABLE evil.secrets AS SELECT 'anna' AS name, 'wrong' AS secret;
        GRANT SELECT ON evil.secrets TO trust_user;
        """,
        "app",
    )
    try:
        for options in ("-c search_path=evil", "-c role=trust_user -c statement_timeout=1"):
            refusal(gpooler, "anna", password="wrong", options=options)
            with gpooler.connect("anna", password="right", options="-c search_path=evil") as connection:
                assert connection.execute("SELECT secret FROM secrets").fetchone() == ("wrong",)
                own = [one for one in postgres.activity() if one.usename == "postgres"]
                assert [(one.application_name, one.datname) for one in own] == [("gpooler", "app")]
    finally:
        postgres.query("DROP SCHEMA evil CASCADE", "app")


def test_many_new_clients_share_one_query_and_few_connections(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, config=config(storage_user="trust_user"))
    clients = [gpooler.raw() for _ in range(40)]
    for number, client in enumerate(clients):
        client.send(startup("scram_user" if number % 2 else f"nobody{number}", "app"))
    for client in clients:
        assert client.read().kind == b"R"
    assert 1 <= len([one for one in postgres.activity() if one.usename == "postgres"]) <= 2
    for client in clients:
        client.close()
