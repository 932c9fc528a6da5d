"""The console as clients meet it: rights, both protocols, drivers, what they send of themselves."""

import asyncio
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pg8000.dbapi
import psycopg
import psycopg2
import pytest

from tests.harness import PASSWORD, Gpooler, Postgres, RawClient, eventually
from tests.harness.certificates import Certificates
from tests.harness.client import (
    FLUSH,
    SYNC,
    Message,
    bind,
    close,
    describe,
    execute,
    message,
    parse,
    query,
    startup,
)
from tests.harness.console import CONSOLE

Factory = Callable[..., Gpooler]
Program = Callable[[str], str]


@pytest.fixture(scope="module")
def pool(_postgres15: Postgres) -> Iterator[Gpooler]:
    """For tests that open no server and stop nothing."""
    with Gpooler(_postgres15, config=CONSOLE) as pool:
        yield pool
        assert not pool.leaks()


@pytest.fixture
def raw(pool: Gpooler) -> Any:
    with pool.raw() as client:
        client.login("admin", "pgbouncer")
        yield client


def console(pool: Gpooler, user: str = "admin") -> psycopg.Connection[Any]:
    return pool.connect(user, "pgbouncer")


def kinds(messages: list[Message]) -> bytes:
    return b"".join(message.kind for message in messages)


def answers(client: RawClient, *steps: bytes) -> list[Message]:
    client.send(*steps)
    return client.read_until()


def refused(messages: list[Message]) -> str:
    """The SQLSTATE of the one error in an answer."""
    (error,) = (message for message in messages if message.kind == b"E")
    return error.fields()["C"]


# -- who may


def test_stat_may_show_and_nothing_else(pool: Gpooler) -> None:
    with console(pool, "stat") as client:
        assert client.execute("SHOW VERSION").fetchone() == ("gpooler 0.1.0",)
        for command in ("PAUSE", "RELOAD", "KILL_CLIENT 1", "SET client_max = 3"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for"):
                client.execute(command)
        assert client.execute("SHOW is_superuser").fetchone() == ("off",)


def test_admin_is_told_what_cannot_be_done(pool: Gpooler) -> None:
    with console(pool) as client:
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="options are not set in the console"):
            client.execute("SET client_max = 3")
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="there is no client 7"):
            client.execute("KILL_CLIENT 7")
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="not paused"):
            client.execute("RESUME")
        assert client.execute("SHOW is_superuser").fetchone() == ("on",)


def test_commands_act_on_the_whole_pooler(postgres: Postgres, gpooler_factory: Factory) -> None:
    rule = {
        "authentication": "none",
        "storage": "postgres",
        "pool": "transaction",
        "storage_user": "trust_user",
    }
    databases = CONSOLE["database"] | {"default": None, "app": {"user": {"default": rule}}}
    pool = gpooler_factory(postgres, config=CONSOLE | {"database": databases})
    with pool.connect() as victim, pool.connect() as other, console(pool) as client:
        with pytest.raises(psycopg.errors.InvalidCatalogName, match='database "ap" does not exist'):
            client.execute("PAUSE ap")
        before = other.execute("SELECT pg_backend_pid()").fetchone()
        assert client.execute("PAUSE app").statusmessage == "PAUSE"
        assert client.execute("SHOW SERVERS").fetchall() == []
        row = client.execute("SHOW DATABASES WHERE name = 'app' AND paused = 1").fetchall()
        assert len(row) == 1
        client.execute("RESUME app")
        assert other.execute("SELECT pg_backend_pid()").fetchone() != before
        victim.execute("SELECT 1")
        ids = client.execute("SHOW CLIENTS WHERE database = 'app'").fetchall()
        assert len(ids) == 2
        for row_of in ids:
            client.execute(f"KILL_CLIENT {row_of[-1]}")  # type: ignore[arg-type]
        eventually(lambda: not client.execute("SHOW CLIENTS WHERE database = 'app'").fetchall())
        assert client.execute("SHOW IS_PAUSED").fetchone() == (False,)
        client.execute("RELOAD")


def test_a_role_of_notallow_and_a_wrong_password_do_not_come_in(pool: Gpooler) -> None:
    with pytest.raises(psycopg.OperationalError, match='user "nobody" may not use the console'):
        console(pool, "nobody")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        pool.connect("stat", "pgbouncer", password="wrong")
    with pytest.raises(psycopg.OperationalError, match="the console has no replication"):
        pool.connect("admin", "pgbouncer", replication="database")


def test_the_console_is_open_when_client_max_is_reached(postgres: Postgres, gpooler_factory: Factory) -> None:
    pool = gpooler_factory(postgres, config={**CONSOLE, "limits": {"client_max": 1}})
    with pool.connect() as client, console(pool) as other:
        client.execute("SELECT 1")
        assert other.execute("SHOW CLIENTS WHERE database = 'app'").fetchall()
        with pytest.raises(psycopg.OperationalError, match="client_max is 1"):
            pool.connect()


def test_the_console_ends_when_gpooler_does(postgres: Postgres, gpooler_factory: Factory) -> None:
    pool = gpooler_factory(postgres, config=CONSOLE)
    with pool.raw() as client:
        client.login("admin", "pgbouncer")
        pool.stop()
        (end,) = client.read_to_end()
        assert (end.fields()["C"], end.fields()["S"]) == ("57P01", "FATAL")


# -- the simple protocol


def test_several_statements_are_answered_in_order_up_to_the_first_error(raw: RawClient) -> None:
    found = answers(raw, query("SHOW VERSION; SET a.b = 1; SHOW a.b"))
    assert kinds(found) == b"TDCCTDCZ"
    assert found[6 - 1].values() == ["1"]
    found = answers(raw, query("SHOW VERSION; SET client_max = 3; SHOW VERSION"))
    assert kinds(found) == b"TDCEZ"
    assert kinds(answers(raw, query("SHOW VERSION; SHOW POLS WHERE"))) == b"EZ"  # read before anything runs


def test_an_empty_query_is_answered_as_such(raw: RawClient) -> None:
    assert kinds(answers(raw, query(" ; /* */ "))) == b"IZ"


def test_a_text_that_is_no_command_is_told_with_the_nearest_one(raw: RawClient) -> None:
    for text, hint in (("SHOW POLS", "SHOW POOLS"), ("PAUZE", "PAUSE")):
        (error, _) = answers(raw, query(text))
        assert error.fields()["C"] == "42601"
        assert hint in error.fields()["H"]


def test_transactions_have_their_states(raw: RawClient) -> None:
    assert answers(raw, query("BEGIN"))[-1].body == b"T"
    assert answers(raw, query("SHOW VERSION"))[-1].body == b"T"
    assert answers(raw, query("nonsense"))[-1].body == b"E"
    assert refused(answers(raw, query("SHOW VERSION"))) == "25P02"
    found = answers(raw, query("COMMIT"))
    assert (found[0].tag(), found[-1].body) == ("ROLLBACK", b"I")


def test_help_is_a_notice(raw: RawClient) -> None:
    notice, complete, _ = answers(raw, query("SHOW HELP"))
    assert notice.kind == b"N"
    assert "SHOW ACTIVE_SOCKETS | BANS" in notice.fields()["D"]
    assert complete.tag() == "SHOW"


def test_what_is_no_message_ends_the_connection(pool: Gpooler) -> None:
    cases = [
        message(b"y"),
        b"Q" + (2).to_bytes(4, "big"),
        b"Q" + (1 << 16).to_bytes(4, "big"),
        message(b"Q", b"no zero"),
        message(b"P", b"a\0"),
        message(b"D", b"X\0"),
        message(b"B", b"\0\0\0\x01"),
    ]
    for bad in cases:
        with pool.raw() as client:
            client.login("admin", "pgbouncer")
            client.send(bad)
            *_, error = client.read_to_end()
            assert (error.fields()["C"], error.fields()["S"]) == ("08P01", "FATAL"), bad


def test_bytes_of_a_query_may_come_one_by_one(raw: RawClient) -> None:
    for byte in query("SHOW VERSION"):
        raw.send(bytes((byte,)))
    assert kinds(raw.read_until()) == b"TDCZ"


def test_a_query_may_come_with_the_startup_packet(pool: Gpooler) -> None:
    with pool.raw() as client:
        client.send(startup("admin", "pgbouncer") + query("SHOW VERSION"))
        client.read_until()
        assert kinds(client.read_until()) == b"TDCZ"


# -- the extended protocol


def test_a_statement_is_prepared_described_and_run(raw: RawClient) -> None:
    sql = "SHOW LISTS WHERE list = $1"
    found = answers(
        raw, parse(sql, "s"), describe("S", "s"), bind("s", (b"users",)), describe("P"), execute(), SYNC
    )
    assert kinds(found) == b"1tT2TDCZ"
    assert found[1].body == b"\0\x01\0\0\0\x19"
    assert found[5].values()[0] == "users"
    assert kinds(answers(raw, close("S", "s"), SYNC)) == b"3Z"
    assert refused(answers(raw, bind("s"), SYNC)) == "26000"


def test_a_portal_gives_its_rows_in_portions(raw: RawClient) -> None:
    found = answers(raw, parse("SHOW LISTS"), bind(portal="p"), execute("p", 10), execute("p", 10), SYNC)
    assert kinds(found) == b"12" + b"D" * 10 + b"s" + b"D" * 4 + b"CZ"


def test_an_error_is_followed_by_nothing_up_to_the_sync(raw: RawClient) -> None:
    found = answers(raw, parse("SHOW NONSENSE WHERE"), bind(), execute(), SYNC)
    assert kinds(found) == b"EZ"
    assert kinds(answers(raw, parse("SHOW VERSION"), bind(), execute(), SYNC)) == b"12DCZ"


@pytest.mark.parametrize(
    ("steps", "sqlstate"),
    [
        ((parse("SHOW VERSION; SHOW LISTS"),), "42601"),
        ((parse("SHOW VERSION", "a"), parse("SHOW VERSION", "a")), "42P05"),
        ((execute("nothing"),), "34000"),
        ((describe("S", "nothing"),), "26000"),
        ((parse("SHOW VERSION"), bind(values=(b"1",))), "08P01"),
        ((parse("SHOW LISTS WHERE items = $1"), bind(values=(b"x",)), execute()), "22P02"),
        ((message(b"F", b"\0\0\0\0"),), "0A000"),
    ],
)
def test_what_does_not_fit_is_refused(raw: RawClient, steps: tuple[bytes, ...], sqlstate: str) -> None:
    assert refused(answers(raw, *steps, SYNC)) == sqlstate
    assert kinds(answers(raw, query("SHOW VERSION"))) == b"TDCZ"


def test_a_query_behind_an_error_waits_for_the_sync_too(raw: RawClient) -> None:
    found = answers(raw, parse("nonsense"), query("SHOW VERSION"), SYNC)
    assert kinds(found) == b"EZ"


def test_an_empty_statement_a_flush_and_what_has_no_rows(raw: RawClient) -> None:
    found = answers(raw, parse(""), bind(), describe("P"), execute(), SYNC)
    assert kinds(found) == b"12nIZ"
    raw.send(parse("SET x.y = 1"), bind(), describe("P"), execute(), FLUSH)
    assert [raw.read().kind for _ in range(4)] == [b"1", b"2", b"n", b"C"]
    raw.send(SYNC)
    assert raw.read_until()[-1].body == b"I"


# -- drivers


def test_psycopg_reads_tables_in_both_formats(pool: Gpooler) -> None:
    with psycopg.connect(pool.dsn("admin", "pgbouncer")) as client:  # which begins transactions
        for is_binary in (False, True):
            cursor = client.cursor(binary=is_binary)
            rows = cursor.execute("SHOW LISTS WHERE items >= %s ORDER BY list LIMIT 3", ("0",)).fetchall()
            assert [row[0] for row in rows] == ["databases", "dns_names", "dns_pending"]
            assert cursor.description is not None
            assert [column.type_code for column in cursor.description] == [25, 23]
            assert isinstance(rows[0][1], int)
            assert cursor.execute("SHOW IS_PAUSED").fetchone() == (False,)
        client.execute("SHOW VERSION", prepare=True)


def test_asyncpg_reads_tables_and_resets_its_connections(pool: Gpooler) -> None:
    async def run() -> None:
        url = f"postgresql://admin@{pool.host}:{pool.port}/pgbouncer"
        async with asyncpg.create_pool(url, min_size=1, max_size=1) as connections:
            for _ in range(2):
                async with connections.acquire() as client:
                    assert await client.fetchval("SHOW VERSION") == "gpooler 0.1.0"
                    (row,) = await client.fetch("SHOW STATS WHERE database = $1", "pgbouncer")
                    assert row["total_query_count"] == 0
                    (cpu_and_memory,) = await client.fetch("SHOW HOST_UTILIZATION")
                    assert 0 < cpu_and_memory["mem"] < 100
                    with pytest.raises(asyncpg.PostgresSyntaxError, match="POLS"):
                        await client.fetch("SHOW POLS WHERE a = 1")

    asyncio.run(run())


def test_psycopg2_and_pg8000_read_tables(pool: Gpooler) -> None:
    second = psycopg2.connect(pool.dsn("stat", "pgbouncer"))
    try:
        second.set_session(autocommit=True)
        with second.cursor() as cursor:
            cursor.execute("SHOW STATS;")
            assert cursor.fetchall()[0][0] == "pgbouncer"
    finally:
        second.close()
    third = pg8000.dbapi.connect(
        user="stat", password=PASSWORD, host=pool.host, port=pool.port, database="pgbouncer"
    )
    try:
        third.autocommit = True
        cursor = third.cursor()
        cursor.execute("SHOW VERSION")
        assert cursor.fetchone() == ["gpooler 0.1.0"]
    finally:
        third.close()


def test_psql_shows_tables_and_lists_nothing_of_a_catalog(pool: Gpooler, program: Program) -> None:
    def psql(*commands: str) -> str:
        arguments = [program("psql"), "-X", "-A", "-t", pool.dsn("admin", "pgbouncer")]
        for command in commands:
            arguments += ["-c", command]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout + done.stderr

    assert psql("SHOW VERSION", "SELECT version()", "SHOW server_version").split("\n")[:2] == [
        "gpooler 0.1.0",
        "gpooler 0.1.0",
    ]
    assert "Did not find any relations" in psql("\\d")
    assert psql("\\l", "\\du", "\\dn").strip() == ""
    assert psql("SELECT current_database(), current_user, pg_is_in_recovery()") == "pgbouncer|admin|f\n"


def test_what_pgcli_asks_at_its_start_is_answered(pool: Gpooler) -> None:
    """The queries of pgcli's completion refresher, in the forms it sends them."""
    with console(pool) as client:
        assert client.execute("SELECT 1").fetchone() == (1,)
        cursor = client.execute("SELECT * FROM unnest(current_schemas(true))")
        assert cursor.fetchall() == []
        cursor = client.execute(
            "SELECT n.nspname schema_name, c.relname table_name FROM pg_catalog.pg_class c "
            "LEFT JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
            "WHERE c.relkind = ANY('{r,p,f}') ORDER BY 1,2;"
        )
        assert cursor.description is not None
        assert [column.name for column in cursor.description] == ["schema_name", "table_name"]


def test_startup_parameters_and_set_are_taken(pool: Gpooler) -> None:
    asked = {"application_name": "mine", "options": "-c extra_float_digits=3"}
    with pool.connect("admin", "pgbouncer", **asked) as client:
        assert client.execute("SHOW application_name").fetchone() == ("mine",)
        assert client.execute("SHOW extra_float_digits").fetchone() == ("3",)
        client.execute("SET application_name = 'yours'")
        assert client.info.parameter_status("application_name") == "yours"
        found = client.execute("SHOW CLIENTS WHERE application_name = 'yours'").fetchall()
        assert len(found) == 1
        client.execute("RESET application_name")
        assert client.info.parameter_status("application_name") == "mine"
        client.execute("SET client_encoding = 'LATIN1'")
        assert client.execute("SHOW client_encoding").fetchone() == ("UTF8",)
        assert client.info.server_version == 150000


def test_tls_clients_use_the_console_too(
    postgres: Postgres, gpooler_factory: Factory, tmp_path: Path
) -> None:
    listener = Certificates(tmp_path).options("server", "require")
    pool = gpooler_factory(postgres, config=CONSOLE, listener=listener)
    with pool.connect("stat", "pgbouncer", sslmode="require") as client:
        assert len(client.execute("SHOW CONFIG").fetchall()) > 100
        (own,) = client.execute("SHOW CLIENTS").fetchall()
        assert "TLSv1.3/" in str(own)
        with pool.connect(sslmode="require") as other:
            other.execute("SELECT 1")
            (shown,) = client.execute("SHOW CLIENTS WHERE database = 'app'").fetchall()
            assert "TLSv1.3/" in str(shown)


def test_legacy_columns_stand_behind_the_others_for_who_asks(pool: Gpooler) -> None:
    with console(pool, "legacy") as legacy, console(pool) as client:
        for table, name in (("STATS", "total_requests"), ("DATABASES", "reserve_pool")):
            old, new = legacy.execute(f"SHOW {table}"), client.execute(f"SHOW {table}")
            assert old.description is not None
            assert new.description is not None
            names = [column.name for column in old.description]
            assert names == [*(column.name for column in new.description), name]
        client.execute("SET gpooler.legacy_columns = on")
        assert len(client.execute("SHOW STATS").description or ()) == 26


def test_clients_of_the_console_are_counted_and_gone(pool: Gpooler) -> None:
    def counted(client: psycopg.Connection[Any]) -> int:
        (row,) = client.execute("SHOW POOLS WHERE database = 'pgbouncer'").fetchall()
        return int(row[2])

    with console(pool) as client, console(pool):
        eventually(lambda: counted(client) == 2)  # those of other tests may still be going
    with console(pool) as client:
        eventually(lambda: counted(client) == 1)
