"""Drivers over TLS, on both sides of gpooler: in the modes they have, by SCRAM and by certificate.

What they do there is compared with a direct connection; ``tests/security`` has all of libpq's modes.
"""

import asyncio
import gc
import io
import json
import os
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import asyncpg
import pg8000.native
import psycopg
import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from tests.harness import PASSWORD, Gpooler, Postgres, Unavailable, eventually, free_port
from tests.harness.certificates import Certificates
from tests.harness.postgres import find_binaries
from tests.interop.foreign import DriverError, Foreign, jdbc, node
from tests.security.cells import (
    BARE,
    DIRECT,
    SSLMODES,
    TLS_REQUIRED,
    Cell,
    Method,
    Outcome,
    Server,
    expected,
)

DATABASE = "interop"
POOLS = ("transaction", "session")
LISTENERS = ("disable", "prefer", "verify_full")
MODES = SSLMODES[:6]
SLEEP = "SELECT pg_sleep(60)"
HBA = """
local   all all        trust
host    all postgres   127.0.0.1/32 trust
hostssl all scram_user 127.0.0.1/32 scram-sha-256
"""


@dataclass(frozen=True, slots=True)
class House:
    """PostgreSQL with TLS alone, and a gpooler with a listener of each kind before it."""

    postgres: Postgres
    gpooler: Gpooler
    ports: dict[str, int]
    files: Certificates

    @property
    def direct(self) -> int:
        """PostgreSQL's port, where ``scram_user`` comes in over TLS."""
        return self.postgres.port

    def options(self, port: int, user: str, password: str = PASSWORD) -> dict[str, Any]:
        """What most drivers call them; an address, which the certificate has, too."""
        named = {"host": "127.0.0.1", "port": port, "database": DATABASE}
        return {**named, "user": user, "password": password}

    @contextmanager
    def cancelled_by(self, cancel: Callable[[], None]) -> Iterator[None]:
        """``cancel()`` is called as soon as SLEEP runs."""

        def wait() -> None:
            eventually(self.runs, within=20)
            cancel()

        canceller = threading.Thread(target=wait)
        canceller.start()
        yield
        canceller.join()

    def runs(self) -> bool:
        """Whether a server runs SLEEP just now."""
        return any(one.state == "active" and SLEEP in one.query for one in self.postgres.activity())

    def same(self, work: Callable[[int, str], Any], user: str) -> Any:
        """What ``work`` gives, which must be what it gives on a direct connection."""
        found = []
        for port, name in ((self.direct, "scram_user"), (self.ports["prefer"], user)):
            self.postgres.query("TRUNCATE numbers", DATABASE)
            found.append(work(port, name))
        assert found[0] == found[1]
        return found[1]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    files = Certificates(tmp_path_factory.mktemp("certificates"))
    cluster = Postgres(15, hba=HBA)
    cluster.settings |= {
        "ssl": "on",
        "ssl_cert_file": cluster.own(files.pem("server"), "server.pem"),
        "ssl_key_file": cluster.own(files.key("server"), "server.key"),
    }
    ports = {mode: free_port() for mode in LISTENERS}
    with cluster:
        cluster.query(f"CREATE DATABASE {DATABASE}")
        cluster.query("CREATE TABLE numbers (n int PRIMARY KEY, word text)", DATABASE)
        cluster.query("GRANT ALL ON numbers TO PUBLIC", DATABASE)
        with Gpooler(cluster, config=config(files, ports), port=ports["disable"]) as gpooler:
            yield House(cluster, gpooler, ports, files)
            assert gpooler.leaks() == [], gpooler.tail()


def config(files: Certificates, ports: dict[str, int]) -> dict[str, Any]:
    authority = {"tls_ca_file": files.pem("ca")}
    by_password = {"authentication": "scram-sha-256", "password": PASSWORD}
    by_certificate = {"authentication": "cert", "auth_common_name": ["cert_user"]}
    common = {
        "storage": "postgres",
        "storage_user": "scram_user",
        "storage_password": PASSWORD,
        "pool_size": 4,
    }
    return {
        "performance": {"workers": 2},
        "listen": [
            {"host": "127.0.0.1", "port": port}
            | ({} if mode == "disable" else files.options("server", mode, **authority))
            for mode, port in ports.items()
        ],
        "storage": {"postgres": {"tls": "verify_full", **authority}},
        "database": {
            "default": None,
            DATABASE: {
                "user": {
                    "certified": {**common, **by_certificate, "pool": "transaction"},
                    **{pool: {**common, **by_password, "pool": pool} for pool in POOLS},
                }
            },
        },
    }


def wanted(listener: str, sslmode: str, method: Method = Method.SCRAM) -> Outcome:
    """What comes of it where a driver does as libpq."""
    return expected(Cell(listener, sslmode, method, True, "verify_full", "hostssl", Server.SCRAM))


# --- psql ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("listener", LISTENERS)
def test_psql_in_every_mode(house: House, listener: str) -> None:
    """Debian's, whose libpq is older than that of the matrix."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    environment |= {
        "PGHOST": "localhost",
        "PGHOSTADDR": "127.0.0.1",
        "PGPORT": str(house.ports[listener]),
        "PGUSER": "transaction",
        "PGPASSWORD": PASSWORD,
        "PGDATABASE": DATABASE,
        "PGSSLROOTCERT": house.files.pem("ca"),
        "PGSSLCERT": house.files.pem("cert_user"),
        "PGSSLKEY": house.files.key("cert_user"),
    }
    command = [str(find_binaries(15) / "psql"), "-XAt", "-c", r"\conninfo", "-c", "SELECT current_user"]
    for mode, (binding, method) in product(
        MODES, (("disable", Method.SCRAM), ("require", Method.SCRAM_PLUS))
    ):
        done = subprocess.run(
            command,
            env={**environment, "PGSSLMODE": mode, "PGCHANNELBINDING": binding},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        outcome = wanted(listener, mode, method)
        if outcome.refusal is not None:
            assert outcome.refusal.text in done.stderr, (mode, binding)
        else:
            assert done.stdout.endswith("scram_user\n"), (mode, binding, done)
            assert ("SSL connection" in done.stdout) == outcome.has_tls, (mode, binding)


# --- psycopg ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pool", "negotiation"), [("transaction", "direct"), ("session", "postgres")])
def test_psycopg_works(house: House, pool: str, negotiation: str) -> None:
    options = {
        "sslmode": "verify-full",
        "sslrootcert": house.files.pem("ca"),
        "channel_binding": "require",
        "dbname": DATABASE,
        "sslnegotiation": negotiation,
    }

    def connect(port: int, user: str, **others: str) -> psycopg.Connection[Any]:
        named = house.options(port, user)
        del named["database"]
        return psycopg.connect(**{**named, **options, **others})

    def work(port: int, user: str) -> list[Any]:
        found: list[Any] = []
        # PostgreSQL 15 knows no direct TLS
        others = {"sslnegotiation": "postgres"} if port == house.direct else {}
        with connect(port, user, **others) as connection:
            for turn in range(12):
                found.append(connection.execute("SELECT %s::int * 2, %s", (turn, "it's")).fetchone())
            with connection.cursor().copy("COPY numbers FROM STDIN") as copy:
                for number in range(3000):
                    copy.write_row((number, "copied"))
            with pytest.raises(psycopg.errors.UniqueViolation), connection.transaction():
                connection.execute("INSERT INTO numbers VALUES (1, 'twice')")
            connection.commit()
            with connection.pipeline():
                cursors = [connection.execute("SELECT %s::int", (n,)) for n in range(50)]
            found.append([cursor.fetchone() for cursor in cursors])
            rows = connection.execute("SELECT n, repeat(md5(n::text), 10) FROM generate_series(1, 20000) n")
            found.append(rows.fetchall())
            found.append(connection.execute("SELECT count(*) FROM numbers").fetchone())
        return found

    house.same(work, pool)
    with connect(house.ports["prefer"], pool) as connection:
        with house.cancelled_by(connection.cancel_safe), pytest.raises(psycopg.errors.QueryCanceled):
            connection.execute(SLEEP)
        connection.rollback()
        assert connection.execute("SELECT 7").fetchone() == (7,)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        connect(house.ports["prefer"], pool, password="wrong")


# --- asyncpg ------------------------------------------------------------------------------------


def asyncpg_url(house: House, port: int, user: str, password: str = PASSWORD, **options: str) -> str:
    files = house.files
    query = {
        "sslmode": "verify-full",
        "sslrootcert": files.pem("ca"),
        "sslcert": files.pem("cert_user"),
        "sslkey": files.key("cert_user"),
        **options,
    }
    return f"postgresql://{user}:{password}@127.0.0.1:{port}/{DATABASE}?{urlencode(query)}"


# Of a connection that is refused it leaves the transport to the garbage collector, who may come at any time.
LEAVES_TRANSPORTS: Final = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@LEAVES_TRANSPORTS
@pytest.mark.parametrize("listener", LISTENERS)
def test_asyncpg_in_every_mode(house: House, listener: str) -> None:
    async def ask(user: str, mode: str, negotiation: str) -> tuple[str, bool]:
        options = {"sslmode": mode, "sslnegotiation": negotiation}
        connection = await asyncpg.connect(asyncpg_url(house, house.ports[listener], user, **options))
        try:
            has_tls = connection._transport.get_extra_info("ssl_object") is not None
            return await connection.fetchval("SELECT current_user"), has_tls
        finally:
            await connection.close()

    for mode, negotiation in [*((mode, "postgres") for mode in MODES), ("verify-full", "direct")]:
        for user in ("transaction", "certified"):
            outcome = wanted(listener, mode, Method.CERT if user == "certified" else Method.SCRAM)
            if outcome.refusal is None:
                assert asyncio.run(ask(user, mode, negotiation)) == ("scram_user", outcome.has_tls)
                continue
            with pytest.raises((OSError, asyncpg.PostgresError, asyncpg.InterfaceError)) as caught:
                asyncio.run(ask(user, mode, negotiation))
            if outcome.refusal.sqlstate:
                assert getattr(caught.value, "sqlstate", None) == outcome.refusal.sqlstate, (mode, user)
            del caught
    gc.collect()


@LEAVES_TRANSPORTS
@pytest.mark.parametrize("pool", POOLS)
def test_asyncpg_works(house: House, pool: str) -> None:
    async def work(port: int, user: str) -> list[Any]:
        found: list[Any] = []
        connection = await asyncpg.connect(asyncpg_url(house, port, user))
        try:
            for turn in range(12):
                found.append(tuple(await connection.fetchrow("SELECT $1::int * 2, $2::text", turn, "it's")))
            await connection.copy_records_to_table("numbers", records=[(n, "copied") for n in range(3000)])
            for wrong in ("SELECT 1/0", "INSERT INTO numbers VALUES (1, 'twice')"):
                with pytest.raises(asyncpg.PostgresError) as caught:
                    async with connection.transaction():
                        await connection.execute(wrong)
                found.append(caught.value.sqlstate)
            async with connection.transaction():
                rows = connection.cursor("SELECT n, n * n FROM generate_series(1, 500) n", prefetch=33)
                found.append([tuple(row) async for row in rows])
            rows = await connection.fetch(
                "SELECT n, repeat(md5(n::text), 10) FROM generate_series(1, 20000) n"
            )
            found.append([tuple(row) for row in rows])
            if port != house.direct:
                with pytest.raises(TimeoutError):  # it sends a cancel request
                    await connection.execute(SLEEP, timeout=0.2)
            found.append(await connection.fetchval("SELECT count(*) FROM numbers"))
        finally:
            await connection.close()
        return found

    house.same(lambda port, user: asyncio.run(work(port, user)), pool)
    eventually(lambda: not house.runs())
    with pytest.raises(asyncpg.InvalidPasswordError):
        asyncio.run(asyncpg.connect(asyncpg_url(house, house.ports["prefer"], pool, "wrong")))
    gc.collect()


# --- pg8000 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("listener", LISTENERS)
def test_pg8000_in_every_mode(house: House, listener: str) -> None:
    """Without TLS, with it where there is any, in any case, and with certificates looked at on both sides."""
    for context, sslmode in (
        (False, "disable"),
        (None, BARE if listener == "verify_full" else "prefer"),
        (True, BARE),
        (house.files.client("cert_user"), "verify-full"),
    ):
        outcome = wanted(listener, sslmode)
        options = house.options(house.ports[listener], "transaction")
        if outcome.refusal is None:
            with closing(pg8000.native.Connection(**options, ssl_context=context)) as connection:
                assert connection.run("SELECT session_user") == [["scram_user"]]
                assert isinstance(connection._usock, ssl.SSLSocket) == outcome.has_tls, sslmode
        else:
            with pytest.raises((pg8000.DatabaseError, pg8000.InterfaceError, OSError)):
                pg8000.native.Connection(**options, ssl_context=context)


@pytest.mark.parametrize("pool", POOLS)
def test_pg8000_works(house: House, pool: str) -> None:
    context = house.files.client("cert_user")

    def work(port: int, user: str) -> list[Any]:
        found: list[Any] = []
        with closing(
            pg8000.native.Connection(**house.options(port, user), ssl_context=context)
        ) as connection:
            statement = connection.prepare("SELECT CAST(:n AS int) * 2")
            found += [statement.run(n=n) for n in range(12)]
            lines = "".join(f"{n}\tcopied\n" for n in range(3000))
            connection.run("COPY numbers FROM STDIN", stream=io.StringIO(lines))
            connection.run("START TRANSACTION")
            connection.run("DELETE FROM numbers")
            with pytest.raises(pg8000.DatabaseError) as caught:
                connection.run("SELECT 1/0")
            found.append(caught.value.args[0]["C"])
            connection.run("ROLLBACK")
            found.append(connection.run("SELECT repeat(md5(n::text), 10) FROM generate_series(1, 20000) n"))
            found.append(connection.run("SELECT count(*) FROM numbers"))
        return found

    house.same(work, pool)
    wrong = house.options(house.ports["prefer"], pool, "wrong")
    with pytest.raises(pg8000.DatabaseError) as caught:
        pg8000.native.Connection(**wrong, ssl_context=context)
    assert caught.value.args[0]["C"] == "28P01"


# --- Node's pg ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pg() -> Iterator[Foreign]:
    try:
        program = node()
    except Unavailable as error:
        pytest.skip(str(error))
    with program:
        yield program


def pg_options(house: House, port: int, user: str, password: str = PASSWORD, **others: Any) -> str:
    """With certificates looked at on both sides, if ``others`` say nothing else."""
    own = {
        "ca": Path(house.files.pem("ca")).read_text(),
        "cert": Path(house.files.pem("cert_user")).read_text(),
        "key": Path(house.files.key("cert_user")).read_text(),
    }
    return json.dumps({**house.options(port, user, password), "ssl": own, **others})


@pytest.mark.parametrize("listener", LISTENERS)
def test_pg_in_every_mode(house: House, pg: Foreign, listener: str) -> None:
    for others, sslmode in (
        ({"ssl": False}, "disable"),
        ({"ssl": {"rejectUnauthorized": False}}, BARE),
        ({}, "verify-full"),
        ({"sslnegotiation": "direct"}, DIRECT),
        ({"enableChannelBinding": True}, "verify-full"),
    ):
        for user, method in (("transaction", Method.SCRAM), ("certified", Method.CERT)):
            options = pg_options(house, house.ports[listener], user, **others)
            refusal = wanted(listener, sslmode, method).refusal
            if refusal is None:
                assert pg.ask("who", options) == "scram_user", others
                continue
            with pytest.raises(DriverError) as caught:
                pg.ask("who", options)
            if refusal.sqlstate:
                assert caught.value.code == refusal.sqlstate, others


@pytest.mark.parametrize(("pool", "has_binding"), [("transaction", True), ("session", False)])
def test_pg_works(house: House, pg: Foreign, pool: str, has_binding: bool) -> None:
    def options(port: int, user: str, **others: Any) -> str:
        return pg_options(house, port, user, enableChannelBinding=has_binding, **others)

    house.same(lambda port, user: pg.ask("work", options(port, user)), pool)
    port = house.ports["prefer"]
    if pool == "transaction":
        assert pg.ask("pool", options(port, pool)) == str(12 * sum(range(10)) + 10 * sum(range(12)))
    assert pg.ask("cancel", options(port, pool)) == "57014 7"
    assert "timeout" in pg.ask("timeout", options(port, pool))
    eventually(lambda: not house.runs())
    with pytest.raises(DriverError) as caught:
        pg.ask("who", options(port, pool, password="wrong"))
    assert caught.value.code == "28P01"


# --- JDBC ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def java(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Foreign]:
    try:
        program = jdbc(tmp_path_factory.mktemp("jdbc"))
    except Unavailable as error:
        pytest.skip(str(error))
    with program:
        yield program


def jdbc_url(house: House, port: int, user: str, password: str = PASSWORD, **others: str) -> str:
    """With certificates looked at on both sides, if ``others`` say nothing else."""
    der = house.files.directory / "cert_user.der"
    if not der.exists():
        key = load_pem_private_key(Path(house.files.key("cert_user")).read_bytes(), None)
        der.touch(mode=0o600)
        der.write_bytes(key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()))
    query = {
        "user": user,
        "password": password,
        "sslmode": "verify-full",
        "sslrootcert": house.files.pem("ca"),
        "sslcert": house.files.pem("cert_user"),
        "sslkey": str(der),
        **others,
    }
    return f"jdbc:postgresql://127.0.0.1:{port}/{DATABASE}?{urlencode(query)}"


@pytest.mark.parametrize("listener", LISTENERS)
def test_jdbc_in_every_mode(house: House, java: Foreign, listener: str) -> None:
    for mode, user in product(MODES, ("transaction", "certified")):
        method = Method.CERT if user == "certified" else Method.SCRAM
        url = jdbc_url(house, house.ports[listener], user, sslmode=mode)
        refusal = wanted(listener, mode, method).refusal
        if (listener, mode) == ("verify_full", "allow"):
            refusal = TLS_REQUIRED  # it tries TLS only after a 28000
        if refusal is None:
            assert java.ask("who", url) == "scram_user", (mode, user)
            continue
        with pytest.raises(DriverError) as caught:
            java.ask("who", url)
        # its own code, or that of its first try where the second one failed, too
        codes = [refusal.sqlstate] if refusal.sqlstate else ["08004", "28000"]
        assert caught.value.code in codes, (mode, user)


@pytest.mark.parametrize("pool", POOLS)
def test_jdbc_works(house: House, java: Foreign, pool: str) -> None:
    found = house.same(lambda port, user: java.ask("work", jdbc_url(house, port, user)), pool)
    assert "true" in found  # it did prepare at the server
    url = jdbc_url(house, house.ports["prefer"], pool)
    assert java.ask("cancel", url) == "57014 7"
    if pool == "transaction":
        assert java.ask("timeout", url) == "57014 7"
    with pytest.raises(DriverError) as caught:
        java.ask("who", jdbc_url(house, house.ports["prefer"], pool, "wrong"))
    assert caught.value.code == "28P01"
