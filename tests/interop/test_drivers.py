"""Drivers as applications use them, through every kind of pool, against PostgreSQL 15 and 18.

One gpooler a version serves them all; a user name tells the kind of pool and how to log in. What a driver
gets is compared with what the same code gets from a direct connection.
"""

import asyncio
import io
import os
import re
import select
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import pg8000.dbapi
import pg8000.native
import psycopg
import psycopg2
import psycopg2.extras
import pytest

from gpooler.stats.registry import ProcessWord, RouteWord
from tests.harness import PASSWORD, Gpooler, Postgres, eventually, free_port
from tests.harness.postgres import find_binaries

VERSIONS = (15, 18)
MODES = ("transaction", "session", "statement")
METHODS = {"md5": "md5", "scram": "scram-sha-256"}
POOL_SIZE = 4
DATABASE = "interop"
ROWS = 60_000
MANY_ROWS = (
    "SELECT n, md5(n::text), repeat('x', n % 100), n * 1.5, nullif(n % 7, 0), date '2026-01-01' + n"
    f" FROM generate_series(1, {ROWS}) n"
)
SLEEP = "SELECT pg_sleep(60)"
SCHEMA = """
CREATE TABLE numbers (n int PRIMARY KEY, word text);
CREATE TABLE accounts (id int PRIMARY KEY, balance numeric NOT NULL CHECK (balance >= 0));
CREATE FUNCTION told(what text) RETURNS int LANGUAGE plpgsql
    AS $$BEGIN RAISE NOTICE 'told %', what; RETURN length(what); END$$;
GRANT ALL ON SCHEMA public TO PUBLIC;
GRANT ALL ON ALL TABLES IN SCHEMA public TO PUBLIC;
"""
CLEAN = """
TRUNCATE numbers, accounts;
INSERT INTO accounts SELECT n, 100 FROM generate_series(1, 3) n;
"""


@dataclass(frozen=True, slots=True)
class Target:
    """Where and as whom to log in, and what works there."""

    port: int
    user: str
    version: int
    can_begin: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of psycopg and psycopg2."""
        return {
            "host": "127.0.0.1",
            "port": self.port,
            "user": self.user,
            "password": PASSWORD,
            "dbname": DATABASE,
        }

    @property
    def others(self) -> dict[str, Any]:
        """Arguments of asyncpg and pg8000."""
        return {
            "host": "127.0.0.1",
            "port": self.port,
            "user": self.user,
            "password": PASSWORD,
            "database": DATABASE,
        }

    @property
    def environment(self) -> dict[str, str]:
        """What psql and pgbench read."""
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("PG")},
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.port),
            "PGUSER": self.user,
            "PGPASSWORD": PASSWORD,
            "PGDATABASE": DATABASE,
        }

    def program(self, name: str) -> str:
        """PostgreSQL's own client of the server's version."""
        return str(find_binaries(self.version) / name)


@dataclass(frozen=True, slots=True)
class House:
    """A PostgreSQL and the gpooler in front of it."""

    postgres: Postgres
    gpooler: Gpooler


@dataclass(frozen=True, slots=True)
class Pair:
    """The same user of the same database, direct and pooled."""

    house: House
    direct: Target
    pooled: Target

    def assert_same(self, work: Callable[[Target], Any]) -> Any:
        """Both give the same result and leave the same tables."""
        results = []
        for target in (self.direct, self.pooled):
            self.house.postgres.query(CLEAN, DATABASE)
            results.append((work(target), tables(self.house.postgres)))
        assert results[0] == results[1]
        return results[1][0]

    def assert_same_async(self, work: Callable[[Target], Awaitable[Any]]) -> Any:
        """As ``assert_same``, of a coroutine function."""

        async def run(target: Target) -> Any:
            return await work(target)

        return self.assert_same(lambda target: asyncio.run(run(target)))

    def runs(self, sql: str = SLEEP) -> bool:
        """Whether a server runs this just now."""
        rows = self.house.postgres.activity()
        return any(row.state == "active" and sql in row.query for row in rows)

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


def tables(postgres: Postgres) -> list[Any]:
    return [
        postgres.query(f"SELECT * FROM {table} ORDER BY 1", DATABASE) for table in ("numbers", "accounts")
    ]


def rules() -> dict[str, Any]:
    return {
        f"{method}_{mode}": {
            "authentication": METHODS[method],
            "password": PASSWORD,
            "storage": "postgres",
            "storage_user": f"{method}_user",
            "storage_password": PASSWORD,
            "pool": mode,
            "pool_size": POOL_SIZE,
        }
        for method in METHODS
        for mode in MODES
    }


@pytest.fixture(scope="module", params=VERSIONS, ids=[f"pg{version}" for version in VERSIONS])
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    postgres: Postgres = request.getfixturevalue(f"_postgres{request.param}")
    postgres.query(f"DROP DATABASE IF EXISTS {DATABASE}")
    postgres.query(f"CREATE DATABASE {DATABASE}")
    postgres.query(SCHEMA, DATABASE)
    port = free_port()
    config = {
        "performance": {"workers": 2},
        "listen": [{"host": "127.0.0.1", "port": port}],
        "database": {"default": {"user": {"default": None, "trust_user": trust_rule(), **rules()}}},
    }
    with Gpooler(postgres, port=port, config=config) as gpooler:
        yield House(postgres, gpooler)
        assert gpooler.leaks() == [], gpooler.tail()
    eventually(lambda: not postgres.activity())
    postgres.query(f"DROP DATABASE {DATABASE}")


def trust_rule() -> dict[str, Any]:
    """For the harness, which asks for a server as trust_user."""
    return {
        "authentication": "none",
        "storage": "postgres",
        "storage_db": "app",
        "storage_user": "trust_user",
        "pool": "transaction",
        "pool_size": 1,
    }


@pytest.fixture
def pair(request: pytest.FixtureRequest, house: House) -> Iterator[Pair]:
    mode, _, method = request.param.partition("/")
    if not method:  # each mode with either method, on one version or the other
        method = "scram" if (house.postgres.version == 18) == (mode != "session") else "md5"
    version = house.postgres.version
    direct = Target(house.postgres.port, f"{method}_user", version, mode != "statement")
    yield Pair(house, direct, replace(direct, port=house.gpooler.port, user=f"{method}_{mode}"))
    gpooler = house.gpooler
    eventually(lambda: gpooler.process_count(ProcessWord.CLIENTS) == 0, within=10)
    eventually(lambda: gpooler.route_count(RouteWord.SERVERS_ACTIVE) == 0, within=10)
    house.postgres.query(CLEAN, DATABASE)


through_all = pytest.mark.parametrize("pair", MODES, indirect=True)
through_blocks = pytest.mark.parametrize("pair", MODES[:2], indirect=True)
through_everything = pytest.mark.parametrize(
    "pair", [f"{mode}/{method}" for mode in MODES for method in METHODS], indirect=True
)


# --- login --------------------------------------------------------------------------------------


@through_everything
def test_every_driver_logs_in_by_every_method(pair: Pair) -> None:
    target = pair.pooled
    sql = "SELECT session_user::text, 7"
    expected = (pair.direct.user, 7)
    with psycopg.connect(**target.options) as three, three.cursor() as cursor:
        three.autocommit = True
        assert cursor.execute(sql).fetchone() == expected
    with closing(psycopg2.connect(**target.options)) as two, two.cursor() as old_cursor:
        two.autocommit = True
        old_cursor.execute(sql)
        assert old_cursor.fetchone() == expected
    with closing(pg8000.native.Connection(**target.others)) as eight:
        assert eight.run(sql) == [list(expected)]

    async def ask() -> Any:
        connection = await asyncpg.connect(**target.others)
        try:
            return tuple(await connection.fetchrow(sql))
        finally:
            await connection.close()

    assert asyncio.run(ask()) == expected
    said = subprocess.run(
        [target.program("psql"), "-XAtc", sql], env=target.environment, capture_output=True, check=True
    )
    assert said.stdout.decode().strip() == "|".join(map(str, expected))


@through_all
def test_a_wrong_password_is_told_as_by_postgres(pair: Pair) -> None:
    wrong = {"password": "wrong"}
    with pytest.raises(psycopg.OperationalError, match="password authentication failed for user"):
        psycopg.connect(**{**pair.pooled.options, **wrong})
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed for user"):
        psycopg2.connect(**{**pair.pooled.options, **wrong})
    with pytest.raises(pg8000.DatabaseError, match="28P01"):
        pg8000.native.Connection(**{**pair.pooled.others, **wrong})

    async def ask() -> None:
        await asyncpg.connect(**{**pair.pooled.others, **wrong})

    with pytest.raises(asyncpg.InvalidPasswordError):
        asyncio.run(ask())


# --- psql ---------------------------------------------------------------------------------------

PSQL_STATEMENTS = r"""
\set VERBOSITY verbose
SELECT 1 AS one, NULL AS nothing, 'text' AS word;
SELECT 1/0;
nonsense;
SELECT told('psql');
INSERT INTO numbers SELECT n, 'word ' || n FROM generate_series(1, 5) n;
COPY numbers FROM STDIN;
10	ten
11	eleven
\.
COPY numbers TO STDOUT;
COPY numbers FROM STDIN;
10	again
\.
\d numbers
PREPARE doubled(int) AS SELECT $1 * 2;
EXECUTE doubled(21);
DEALLOCATE doubled;
SELECT count(*) AS n FROM numbers \gset
\echo :n
SELECT format('SELECT %s', n) FROM generate_series(1, 3) n \gexec
SET application_name = 'psql script';
SHOW application_name;
SELECT 1\; SELECT 2\; SELECT 3;
"""
PSQL_BLOCKS = r"""
BEGIN;
UPDATE accounts SET balance = balance - 60 WHERE id = 1;
SAVEPOINT one;
UPDATE accounts SET balance = balance - 60 WHERE id = 1;
SELECT 'not run';
ROLLBACK TO one;
UPDATE accounts SET balance = balance + 60 WHERE id = 2;
COMMIT;
BEGIN;
DELETE FROM accounts;
ROLLBACK;
\set FETCH_COUNT 100
SELECT n, repeat('x', n % 10) FROM generate_series(1, 1000) n;
\set FETCH_COUNT 0
BEGIN;
DECLARE few CURSOR FOR SELECT generate_series(1, 100);
FETCH 3 FROM few;
MOVE 10 IN few;
FETCH 3 FROM few;
COMMIT;
\set ON_ERROR_ROLLBACK on
BEGIN;
SELECT 1/0;
SELECT 'goes on';
COMMIT;
"""
PSQL_16 = r"""
SELECT $1::int + $2::int \bind 1 2 \g
SELECT $1::int \bind x \g
"""
PSQL_18 = r"""
\startpipeline
SELECT $1::int \bind 1 \sendpipeline
INSERT INTO numbers VALUES ($1, 'piped') \bind 77 \sendpipeline
\syncpipeline
SELECT 1/0 \bind \sendpipeline
SELECT 'skipped' \bind \sendpipeline
\syncpipeline
SELECT 'last' \bind \sendpipeline
\endpipeline
SELECT $1 \parse named
\bind_named named 5 \g
\close_prepared named
"""


def psql(target: Target, script: str) -> str:
    """What psql prints for a script, errors where they come."""
    done = subprocess.run(
        [target.program("psql"), "-X", "-f", "-"],
        input=script.encode(), env=target.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=50, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done
    return done.stdout.decode()


@through_all
def test_psql_runs_a_script(pair: Pair) -> None:
    script = PSQL_STATEMENTS + (PSQL_BLOCKS if pair.pooled.can_begin else "")
    if pair.pooled.version >= 18:
        script += PSQL_16 + PSQL_18
    said = pair.assert_same(lambda target: psql(target, script))
    assert "division by zero" in said
    assert "42" in said


@through_all
def test_psql_prints_60_000_rows(pair: Pair) -> None:
    said = pair.assert_same(lambda target: psql(target, MANY_ROWS + ";"))
    assert f"({ROWS} rows)" in said


@through_all
def test_ctrl_c_in_psql_cancels(pair: Pair) -> None:
    with subprocess.Popen(
        [pair.pooled.program("psql"), "-X", "-c", SLEEP],
        env=pair.pooled.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        eventually(pair.runs)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert b"canceling statement due to user request" in errors
    eventually(lambda: not pair.runs())


@through_all
def test_psql_is_notified(pair: Pair) -> None:
    script = (
        "LISTEN news;\nNOTIFY news, 'first';\nSELECT 1;\nUNLISTEN news;\nNOTIFY news, 'second';\nSELECT 2;\n"
    )
    said = pair.assert_same(lambda target: re.sub(r"PID \d+", "PID", psql(target, script)))
    assert 'notification "news" with payload "first"' in said
    assert "second" not in said


@through_blocks
def test_psql_stores_large_objects(pair: Pair, tmp_path: Path) -> None:
    content = os.urandom(300_000)
    (tmp_path / "in").write_bytes(content)

    def work(target: Target) -> bytes:
        script = f"\\lo_import {tmp_path}/in\n\\lo_export :LASTOID {tmp_path}/out\n\\lo_unlink :LASTOID\n"
        psql(target, script)
        return (tmp_path / "out").read_bytes()

    assert pair.assert_same(work) == content


# --- psycopg2 -----------------------------------------------------------------------------------


def connect2(target: Target) -> Any:
    connection = psycopg2.connect(**target.options)
    connection.autocommit = not target.can_begin
    return closing(connection)


@through_all
def test_psycopg2_works(pair: Pair) -> None:
    def work(target: Target) -> list[Any]:
        found: list[Any] = []
        with connect2(target) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT %s, %s, %s, %s", (1, "it's", None, Decimal("1.50")))
            found.append(cursor.fetchall())
            psycopg2.extras.execute_values(
                cursor, "INSERT INTO numbers VALUES %s", [(n, f"w{n}") for n in range(500)], page_size=50
            )
            cursor.executemany("UPDATE numbers SET word = %s WHERE n = %s", [("x", 1), ("y", 2)])
            cursor.copy_expert(
                "COPY numbers FROM STDIN", io.StringIO("".join(f"{n}\tcopied\n" for n in range(500, 5000)))
            )
            out = io.StringIO()
            cursor.copy_expert("COPY (SELECT * FROM numbers ORDER BY n) TO STDOUT", out)
            found.append(out.getvalue())
            if target.can_begin:
                connection.commit()
            cursor.callproc("told", ["psycopg2"])
            found += [cursor.fetchall(), connection.notices]
            for wrong in ("SELECT 1/0", "nonsense", "INSERT INTO numbers VALUES (1, 'twice')"):
                try:
                    cursor.execute(wrong)
                except psycopg2.Error as error:
                    found.append((error.pgcode, error.pgerror))
                connection.rollback()
            cursor.execute(MANY_ROWS)
            found.append(cursor.fetchall())
        return found

    found = pair.assert_same(work)
    assert len(found[-1]) == ROWS


@through_blocks
def test_psycopg2_transactions(pair: Pair) -> None:
    def work(target: Target) -> list[Any]:
        found: list[Any] = []
        with connect2(target) as connection:
            for amount in (30, 50, 50):  # the last would go below zero
                try:
                    with connection, connection.cursor() as cursor:
                        cursor.execute("UPDATE accounts SET balance = balance + %s WHERE id = 2", (amount,))
                        cursor.execute("UPDATE accounts SET balance = balance - %s WHERE id = 1", (amount,))
                except psycopg2.errors.CheckViolation as error:
                    found.append(error.pgcode)
            connection.set_session(isolation_level="SERIALIZABLE", readonly=True)
            with connection, connection.cursor() as cursor:
                cursor.execute("SHOW transaction_isolation")
                found.append(cursor.fetchone())
            connection.set_session(readonly=False)
            with connection, connection.cursor("few") as named:
                named.itersize = 100
                named.execute("SELECT n, n * n FROM generate_series(1, 1050) n")
                found.append(list(named))
            with connection, connection.cursor("scrolled", scrollable=True) as named:
                named.execute("SELECT generate_series(1, 100)")
                named.scroll(50)
                found.append(named.fetchmany(3))
                named.scroll(-10)
                found.append(named.fetchone())
            with connection:
                large = connection.lobject(mode="wb")
                large.write(b"0123456789" * 30_000)
                large.seek(5)
                oid = large.oid
                large.close()
            with connection:
                large = connection.lobject(oid, "rb")
                large.seek(299_995)
                found.append(large.read())
                large.unlink()
        return found

    assert "23514" in pair.assert_same(work)


@through_all
def test_psycopg2_cancels(pair: Pair) -> None:
    with connect2(pair.pooled) as connection, connection.cursor() as cursor:
        for _ in range(3):
            with pair.cancelled_by(connection.cancel), pytest.raises(psycopg2.errors.QueryCanceled):
                cursor.execute(SLEEP)
            connection.rollback()
            cursor.execute("SELECT 1")
            assert cursor.fetchone() == (1,)
            connection.rollback()


@through_all
def test_psycopg2_is_notified(pair: Pair) -> None:
    with connect2(pair.pooled) as listener, connect2(pair.pooled) as speaker:
        listener.autocommit = speaker.autocommit = True
        with listener.cursor() as ear, speaker.cursor() as mouth:
            ear.execute("LISTEN news")
            for number in range(20):
                mouth.execute(f"NOTIFY news, '{number}'")
            while len(listener.notifies) < 20:
                assert select.select([listener], [], [], 10)[0]
                listener.poll()
        assert [notice.payload for notice in listener.notifies] == [str(number) for number in range(20)]


GREENLETS = """
import sys
from gevent import monkey
monkey.patch_all()
from psycogreen.gevent import patch_psycopg
patch_psycopg()
import gevent, psycopg2
from gevent.pool import Pool

dsn, has_blocks = sys.argv[1], sys.argv[2] == "True"

def work(number):
    connection = psycopg2.connect(dsn)
    connection.autocommit = not has_blocks
    cursor = connection.cursor()
    for turn in range(10):
        cursor.execute("SELECT %s, %s, pg_sleep(0.001)", (number, turn))
        assert cursor.fetchone()[:2] == (number, turn)
        if has_blocks and turn % 3 == 0:
            cursor.execute("UPDATE accounts SET balance = balance + 1 WHERE id = 3")
        if has_blocks:
            connection.commit()
        try:
            cursor.execute("SELECT 1/0")
        except psycopg2.Error as error:
            assert error.pgcode == "22012"
        connection.rollback()
    cursor.execute("SELECT n, repeat('x', 50) FROM generate_series(1, 3000) n")
    assert len(cursor.fetchall()) == 3000
    connection.close()
    return number

ticks = 0
def tick():
    global ticks
    while True:
        gevent.sleep(0.001)
        ticks += 1

gevent.spawn(tick)
assert sorted(Pool(20).map(work, range(20))) == list(range(20))
assert ticks > 3, "the hub stood still"
print("fine")
"""


@through_all
def test_psycopg2_with_gevent(pair: Pair) -> None:
    target = pair.pooled
    dsn = psycopg2.extensions.make_dsn(**target.options)
    done = subprocess.run(
        [sys.executable, "-c", GREENLETS, dsn, str(target.can_begin)],
        capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
    if target.can_begin:
        assert pair.house.postgres.query("SELECT balance FROM accounts WHERE id = 3", DATABASE) == [(180,)]


# --- psycopg 3 ----------------------------------------------------------------------------------


def connect3(target: Target, **options: Any) -> psycopg.Connection[Any]:
    return psycopg.connect(**target.options, autocommit=not target.can_begin, **options)


@pytest.mark.parametrize("threshold", [None, 0, 2], ids=["never", "at-once", "third"])
@through_all
def test_psycopg_works(pair: Pair, threshold: int | None) -> None:
    """With prepared statements and without."""

    def work(target: Target) -> list[Any]:
        found: list[Any] = []
        notices: list[str | None] = []
        with connect3(target, prepare_threshold=threshold) as connection:
            connection.add_notice_handler(lambda said: notices.append(said.message_primary))
            for turn in range(6):
                row = connection.execute("SELECT %s::int, %s::text", (turn, "it's")).fetchone()
                found.append(row)
            with connection.cursor(binary=True) as cursor:
                cursor.execute(
                    "SELECT %s::numeric, %s::date, %s::timestamptz, %s::interval, %s::uuid, %s::int[],"
                    " %s::bytea",
                    (
                        Decimal("3.14"),
                        date(2026, 1, 2),
                        datetime(2026, 1, 2, tzinfo=UTC),
                        timedelta(days=1),
                        uuid.UUID(int=7),
                        [1, 2],
                        b"\0\1",
                    ),
                )
                found.append(cursor.fetchall())
                cursor.executemany(
                    "INSERT INTO numbers VALUES (%s, %s) RETURNING n",
                    [(n, f"w{n}") for n in range(300)],
                    returning=True,
                )
                found.append(sum(len(result.fetchall()) for result in cursor.results()))
                with cursor.copy("COPY numbers FROM STDIN") as copy:
                    for n in range(300, 3000):
                        copy.write_row((n, "copied"))
                with cursor.copy("COPY (SELECT * FROM numbers ORDER BY n) TO STDOUT") as copy:
                    found.append(b"".join(bytes(part) for part in copy))
            if target.can_begin:
                connection.commit()
            connection.execute("SELECT told('psycopg')")
            for wrong in ("SELECT 1/0", "nonsense", "INSERT INTO numbers VALUES (1, 'twice')"):
                for _ in range(3):
                    try:
                        connection.execute(wrong)
                    except psycopg.Error as error:
                        found.append((error.sqlstate, error.diag.message_primary))
                    connection.rollback()
            with connection.cursor() as cursor:
                found.append(list(cursor.stream("SELECT n FROM numbers WHERE n < %s ORDER BY n", (50,))))
            found.append(connection.execute(MANY_ROWS).fetchall())
        return [*found, notices]

    found = pair.assert_same(work)
    assert len(found[-2]) == ROWS


@through_blocks
def test_psycopg_transactions(pair: Pair) -> None:
    def work(target: Target) -> list[Any]:
        found: list[Any] = []
        with connect3(target) as connection:
            connection.autocommit = True
            for amount in (30, 50, 50):
                try:
                    with connection.transaction():
                        connection.execute(
                            "UPDATE accounts SET balance = balance + %s WHERE id = 2", (amount,)
                        )
                        connection.execute(
                            "UPDATE accounts SET balance = balance - %s WHERE id = 1", (amount,)
                        )
                except psycopg.errors.CheckViolation as error:
                    found.append(error.sqlstate)
            with connection.transaction():
                connection.execute("INSERT INTO numbers VALUES (1, 'kept')")
                with connection.transaction(force_rollback=True):
                    connection.execute("INSERT INTO numbers VALUES (2, 'undone')")
                try:
                    with connection.transaction("named"):
                        connection.execute("INSERT INTO numbers VALUES (1, 'twice')")
                except psycopg.errors.UniqueViolation as error:
                    found.append(error.sqlstate)
            with connection.transaction(), connection.cursor("few") as cursor:
                cursor.itersize = 70
                cursor.execute("SELECT n, n * n FROM generate_series(1, 500) n")
                found.append(cursor.fetchmany(3))
                found.append(list(cursor))
            with connection.cursor("held", withhold=True) as cursor:
                cursor.execute("SELECT generate_series(1, 100)")
                found.append(cursor.fetchmany(10))
                connection.execute("INSERT INTO numbers VALUES (3, 'between')")
                found.append(cursor.fetchmany(10))
        return found

    assert pair.assert_same(work)[:2] == ["23514", "23505"]


@through_all
def test_psycopg_pipelines(pair: Pair) -> None:
    def work(target: Target) -> list[Any]:
        found: list[Any] = []
        with psycopg.connect(**target.options, autocommit=True) as connection:
            with connection.pipeline() as pipeline:
                cursors = [connection.execute("SELECT %s::int", (n,)) for n in range(500)]
                pipeline.sync()
                cursors += [
                    connection.execute("INSERT INTO numbers VALUES (%s, 'p')", (n,)) for n in range(9)
                ]
            found += [cursor.fetchone() for cursor in cursors[:500]]
            failed = []
            try:  # the error comes where its answer happens to be read
                with connection.pipeline():
                    for sql in ("SELECT 'first'", "INSERT INTO numbers VALUES (100, 'undone')", "SELECT 1/0"):
                        failed.append(connection.execute(sql))
                    connection.execute("SELECT 'skipped'")
            except psycopg.Error as error:
                found.append(error.sqlstate)
            found.append(failed[0].fetchone())
            with connection.cursor() as cursor:
                cursor.executemany("INSERT INTO numbers VALUES (%s, 'many')", [(n,) for n in range(200, 900)])
            if target.can_begin:
                with connection.pipeline(), connection.transaction():
                    connection.execute("INSERT INTO numbers VALUES (1000, 'block')")
                    connection.execute("UPDATE accounts SET balance = 1 WHERE id = 1")
                try:
                    with connection.pipeline(), connection.transaction():
                        connection.execute("INSERT INTO numbers VALUES (1001, 'undone')")
                        connection.execute("UPDATE accounts SET balance = -1 WHERE id = 1").fetchone()
                except psycopg.errors.CheckViolation as error:
                    found.append(error.sqlstate)
            found.append(connection.execute("SELECT count(*) FROM numbers").fetchone())
        return found

    assert "22012" in pair.assert_same(work)


@through_all
def test_psycopg_cancels(pair: Pair) -> None:
    with connect3(pair.pooled) as connection:
        for cancel in (connection.cancel, connection.cancel_safe) * 2:
            with pair.cancelled_by(cancel), pytest.raises(psycopg.errors.QueryCanceled):
                connection.execute(SLEEP)
            connection.rollback()
            assert connection.execute("SELECT 1").fetchone() == (1,)
            connection.rollback()


@through_all
def test_psycopg_is_notified(pair: Pair) -> None:
    options = pair.pooled.options
    with (
        psycopg.connect(**options, autocommit=True) as listener,
        psycopg.connect(**options, autocommit=True) as speaker,
    ):
        listener.execute("LISTEN news")
        for number in range(20):
            speaker.execute(f"NOTIFY news, '{number}'")
        heard = [notify.payload for notify in listener.notifies(timeout=10, stop_after=20)]
        assert heard == [str(number) for number in range(20)]
        assert listener.execute("SELECT 1").fetchone() == (1,)


@through_all
def test_psycopg_speaks_protocol_3_2(pair: Pair) -> None:
    if psycopg.pq.version() < 180000:
        pytest.skip(f"libpq is {psycopg.pq.version()}, older than 18")
    with connect3(pair.pooled, min_protocol_version="3.2", max_protocol_version="3.2") as connection:
        assert connection.pgconn.full_protocol_version == 30002
        assert len(connection.execute(MANY_ROWS).fetchall()) == ROWS
        with pair.cancelled_by(connection.cancel_safe), pytest.raises(psycopg.errors.QueryCanceled):
            connection.execute(SLEEP)
        connection.rollback()
        with connection.pipeline():
            cursors = [connection.execute("SELECT %s::int", (n,)) for n in range(50)]
        assert [cursor.fetchone() for cursor in cursors] == [(n,) for n in range(50)]


@through_all
def test_psycopg_in_asyncio_with_more_clients_than_servers(pair: Pair) -> None:
    async def one(number: int) -> int:
        connection = await psycopg.AsyncConnection.connect(**pair.pooled.options, autocommit=True)
        async with connection:
            for turn in range(10):
                cursor = await connection.execute("SELECT %s::int, %s::int", (number, turn))
                assert await cursor.fetchone() == (number, turn)
        return number

    async def all_of_them() -> list[int]:
        return list(await asyncio.gather(*(one(number) for number in range(12))))

    assert asyncio.run(all_of_them()) == list(range(12))


# --- asyncpg ------------------------------------------------------------------------------------


async def asyncpg_work(target: Target, cache: int) -> list[Any]:
    found: list[Any] = []
    notices: list[str] = []
    connection = await asyncpg.connect(**target.others, statement_cache_size=cache)
    try:
        connection.add_log_listener(lambda _, said: notices.append(said.message))
        for turn in range(5):
            found.append(tuple(await connection.fetchrow("SELECT $1::int, $2::text", turn, "it's")))
        found.append(
            tuple(
                await connection.fetchrow(
                    "SELECT $1::numeric, $2::date, $3::timestamptz, $4::interval, $5::uuid, $6::int[],"
                    " $7::jsonb",
                    Decimal("3.14"),
                    date(2026, 1, 2),
                    datetime(2026, 1, 2, tzinfo=UTC),
                    timedelta(days=1),
                    uuid.UUID(int=7),
                    [1, 2],
                    '{"a": 1}',
                )
            )
        )
        await connection.executemany(
            "INSERT INTO numbers VALUES ($1, $2)", [(n, f"w{n}") for n in range(2000)]
        )
        await connection.copy_records_to_table("numbers", records=[(n, "r") for n in range(2000, 5000)])
        out = io.BytesIO()
        await connection.copy_from_query("SELECT * FROM numbers ORDER BY n", output=_sink(out))
        found.append(out.getvalue())
        await connection.copy_to_table("numbers", source=io.BytesIO(b"9000\tcopied\n9001\tcopied\n"))
        found.append(await connection.fetchval("SELECT told($1)", "asyncpg"))
        for wrong in ("SELECT 1/0", "nonsense", "INSERT INTO numbers VALUES (1, 'twice')"):
            for _ in range(2):
                try:
                    await connection.fetch(wrong)
                except asyncpg.PostgresError as error:
                    found.append((error.sqlstate, error.message))
        try:
            await connection.executemany("INSERT INTO numbers VALUES ($1, 'x')", [(-1,), (-2,), (1,), (-3,)])
        except asyncpg.UniqueViolationError as error:
            found.append(error.sqlstate)
        found.append(
            await connection.execute("SELECT 1; SELECT 2; UPDATE numbers SET word = 'u' WHERE n < 3")
        )
        found.append([tuple(row) for row in await connection.fetch(MANY_ROWS)])
        return [*found, notices]
    finally:
        await connection.close()


def _sink(out: io.BytesIO) -> Callable[[bytes], Awaitable[None]]:
    async def write(data: bytes) -> None:
        out.write(data)

    return write


@pytest.mark.parametrize("cache", [100, 0], ids=["cached", "not-cached"])
@through_all
def test_asyncpg_works(pair: Pair, cache: int) -> None:
    found = pair.assert_same_async(lambda target: asyncpg_work(target, cache))
    assert len(found[-2]) == ROWS


@pytest.mark.parametrize("cache", [100, 0], ids=["cached", "not-cached"])
@through_blocks
def test_asyncpg_transactions(pair: Pair, cache: int) -> None:
    async def work(target: Target) -> list[Any]:
        found: list[Any] = []
        connection = await asyncpg.connect(**target.others, statement_cache_size=cache)
        try:
            for amount in (30, 50, 50):
                try:
                    async with connection.transaction():
                        await connection.execute(
                            "UPDATE accounts SET balance = balance + $1 WHERE id = 2", amount
                        )
                        await connection.execute(
                            "UPDATE accounts SET balance = balance - $1 WHERE id = 1", amount
                        )
                except asyncpg.CheckViolationError as error:
                    found.append(error.sqlstate)
            async with connection.transaction(isolation="serializable"):
                await connection.execute("INSERT INTO numbers VALUES (1, 'kept')")
                try:
                    async with connection.transaction():
                        await connection.execute("INSERT INTO numbers VALUES (1, 'twice')")
                except asyncpg.UniqueViolationError as error:
                    found.append(error.sqlstate)
                found.append(await connection.fetchval("SHOW transaction_isolation"))
            async with connection.transaction():
                rows = connection.cursor("SELECT n, n * n FROM generate_series(1, 500) n", prefetch=33)
                found.append([tuple(row) async for row in rows])
                cursor = await connection.cursor("SELECT generate_series(1, 100)")
                await cursor.forward(10)
                found.append([tuple(row) for row in await cursor.fetch(5)])
            statement = await connection.prepare("SELECT $1::int * 2")
            found.append([await statement.fetchval(n) for n in range(20)])
            await connection.reset()
            found.append(await connection.fetchval("SELECT 1"))
        finally:
            await connection.close()
        return found

    assert pair.assert_same_async(work)[:2] == ["23514", "23505"]


@through_all
def test_asyncpg_cancels_at_its_timeout(pair: Pair) -> None:
    async def work() -> None:
        connection = await asyncpg.connect(**pair.pooled.others)
        try:
            for turn in range(3):
                with pytest.raises(TimeoutError):
                    await connection.execute(SLEEP, timeout=0.2)
                assert await connection.fetchval("SELECT $1::int", turn) == turn
            task = asyncio.ensure_future(connection.fetch(SLEEP))
            await asyncio.to_thread(eventually, pair.runs)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await connection.fetchval("SELECT 7") == 7
        finally:
            await connection.close()

    asyncio.run(work())
    eventually(lambda: not pair.runs())


@through_all
def test_asyncpg_is_notified(pair: Pair) -> None:
    async def work() -> list[str]:
        heard: list[str] = []
        everything = asyncio.Event()

        def on_news(_: object, pid: int, channel: str, payload: str) -> None:
            heard.append(payload)
            if len(heard) == 20:
                everything.set()

        listener = await asyncpg.connect(**pair.pooled.others)
        speaker = await asyncpg.connect(**pair.pooled.others)
        try:
            await listener.add_listener("news", on_news)
            for number in range(20):
                await speaker.execute(f"NOTIFY news, '{number}'")
            await asyncio.wait_for(everything.wait(), 10)
            await listener.remove_listener("news", on_news)
        finally:
            await listener.close()
            await speaker.close()
        return heard

    assert asyncio.run(work()) == [str(number) for number in range(20)]


@pytest.mark.parametrize("is_reset", [True, False], ids=["reset", "as-they-are"])
@through_all
def test_a_pool_of_asyncpg(pair: Pair, is_reset: bool) -> None:
    """With more connections than there are servers, unless they are reset between uses: RESET ALL pins."""

    async def leave(_: object) -> None:
        pass

    async def work() -> list[int]:
        has_own_servers = is_reset or "session" in pair.pooled.user
        async with asyncpg.create_pool(
            **pair.pooled.others,
            min_size=2,
            max_size=POOL_SIZE if has_own_servers else 3 * POOL_SIZE,
            statement_cache_size=0,
            reset=None if is_reset else leave,
        ) as pool:

            async def one(number: int) -> int:
                async with pool.acquire() as connection:
                    assert await connection.fetchval("SELECT $1::int", number) == number
                    return number

            return list(await asyncio.gather(*(one(number) for number in range(60))))

    assert asyncio.run(work()) == list(range(60))


# --- pg8000 -------------------------------------------------------------------------------------


@through_all
def test_pg8000_works(pair: Pair) -> None:
    def work(target: Target) -> list[Any]:
        found: list[Any] = []
        with closing(pg8000.native.Connection(**target.others)) as connection:
            for turn in range(5):
                found.append(connection.run("SELECT CAST(:n AS int), CAST(:w AS text)", n=turn, w="it's"))
            statement = connection.prepare("SELECT CAST(:n AS int) * 2")
            found += [statement.run(n=n) for n in range(10)]
            statement.close()
            lines = "".join(f"{n}\tcopied\n" for n in range(3000))
            connection.run("COPY numbers FROM STDIN", stream=io.StringIO(lines))
            out = io.BytesIO()
            connection.run("COPY (SELECT * FROM numbers ORDER BY n) TO STDOUT", stream=out)
            found.append(out.getvalue())
            for wrong in ("SELECT 1/0", "nonsense", "INSERT INTO numbers VALUES (1, 'twice')"):
                try:
                    connection.run(wrong)
                except pg8000.DatabaseError as error:
                    found.append((error.args[0]["C"], error.args[0]["M"]))
            if target.can_begin:
                connection.run("START TRANSACTION")
                connection.run("INSERT INTO numbers VALUES (-1, 'undone')")
                connection.run("ROLLBACK")
            found.append(connection.run(MANY_ROWS))
        with closing(pg8000.dbapi.connect(**target.others)) as dbapi:
            dbapi.autocommit = not target.can_begin
            cursor = dbapi.cursor()
            cursor.executemany("INSERT INTO numbers VALUES (%s, %s)", [(n, "d") for n in range(5000, 5050)])
            if target.can_begin:
                dbapi.commit()
                cursor.execute("DELETE FROM numbers")
                dbapi.rollback()
            cursor.execute("SELECT count(*) FROM numbers")
            found.append(list(cursor.fetchone()))
        return found

    found = pair.assert_same(work)
    assert len(found[-2]) == ROWS


@through_all
def test_pg8000_is_notified(pair: Pair) -> None:
    with (
        closing(pg8000.native.Connection(**pair.pooled.others)) as listener,
        closing(pg8000.native.Connection(**pair.pooled.others)) as speaker,
    ):
        listener.run("LISTEN news")
        for number in range(5):
            speaker.run(f"NOTIFY news, '{number}'")

        def has_heard() -> bool:
            listener.run("SELECT 1")  # it reads only when it asks
            return len(listener.notifications) == 5

        eventually(has_heard)
        assert [payload for _, _, payload in listener.notifications] == [str(number) for number in range(5)]


# --- pgbench ------------------------------------------------------------------------------------

PIPELINE = r"""
\set id random(1, 3)
\startpipeline
SELECT balance FROM accounts WHERE id = :id;
SELECT :id + 1;
SELECT balance FROM accounts WHERE id = :id;
\endpipeline
"""


def pgbench(target: Target, *options: str) -> str:
    done = subprocess.run(
        [target.program("pgbench"), *options],
        env=target.environment, capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bench(house: House) -> None:
    """pgbench's tables, made through a pool."""
    target = Target(house.gpooler.port, "scram_transaction", house.postgres.version)
    pgbench(target, "-i", "-s", "1", "-q")
    house.postgres.query(
        "GRANT ALL ON pgbench_accounts, pgbench_branches, pgbench_tellers, pgbench_history TO PUBLIC",
        DATABASE,
    )


@pytest.mark.parametrize("mode", ["simple", "extended", "prepared"])
@through_all
def test_pgbench_runs_without_an_error(pair: Pair, bench: None, mode: str, tmp_path: Path) -> None:
    pair.house.postgres.query("TRUNCATE pgbench_history", DATABASE)
    clients = ["-n", "-c", "4", "-t", "50", "-M", mode]
    said = pgbench(pair.pooled, *clients, "-S")
    assert "number of transactions actually processed: 200/200" in said
    if pair.pooled.can_begin:
        # a client with prepared statements is pinned, and pgbench waits for one in the place of all
        has_own_servers = mode == "prepared" or "session" in pair.pooled.user
        more = clients if has_own_servers else ["-n", "-c", "12", "-t", "20", "-M", mode]
        said = pgbench(pair.pooled, *more)
        count = int(more[2]) * int(more[4])
        assert f"number of transactions actually processed: {count}/{count}" in said
        assert "number of failed transactions: 0" in said
        assert pair.house.postgres.query("SELECT count(*) FROM pgbench_history", DATABASE) == [(count,)]
    if mode != "simple":
        script = tmp_path / "pipeline.sql"
        script.write_text(PIPELINE)
        said = pgbench(pair.pooled, *clients, "-f", str(script))
        assert "number of transactions actually processed: 200/200" in said
