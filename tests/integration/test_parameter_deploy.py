"""The SQL that deploys parameters, run by a real PostgreSQL: each setting becomes what was wanted."""

import random

import psycopg
import pytest

from gpooler.relay.params import ParameterSet
from tests.harness import Postgres

NASTY = [
    b"",
    b"'",
    b"''",
    b"\\",
    b"\\'",
    b"\\\\''",
    b"a\\nb",
    b"line\nbreak\r\ttab",
    b"'; DROP TABLE victim; --",
    b"\\'; DROP TABLE victim; --",
    b"$$; $a$",
    b"/* -- */",
    b'"quoted"',
    b"E'x'",
    b"%s %(a)s",
    "é ソ 表 💡".encode(),
    "ソ'; DROP TABLE victim; --".encode(),
    "表\\'".encode(),
    b"\x7f\x01",
    b"x" * 3000,
]
NAMES = [
    b"myapp.user_id",
    b"MyApp.Role",
    b"a.b.c",
    b"local.x",
    b"transaction.x",
    b"select.from",
    b"_x._y",
    b"n$1.x$y",
    "caf\N{LATIN SMALL LETTER E WITH ACUTE}.crème".encode(),
    b"long." + b"x" * 80,
    b"y" * 70 + b"." + b"z" * 70,
]


def asked(parameters: dict[bytes, bytes]) -> ParameterSet:
    return ParameterSet.of(parameters, False)


def run(connection: psycopg.Connection[object], sql: bytes) -> None:
    """One simple query, byte for byte."""
    result = connection.pgconn.exec_(sql or b";")
    assert result.status in (psycopg.pq.ExecStatus.COMMAND_OK, psycopg.pq.ExecStatus.TUPLES_OK, 0), (
        result.error_message,
        sql,
    )


def value(connection: psycopg.Connection[object], name: bytes) -> bytes:
    """The value as bytes of the database's encoding; b"" also when there is none."""
    result = connection.pgconn.exec_params(
        b"SELECT convert_to(current_setting(convert_from($1, 'UTF8'), true), 'UTF8')",
        [name],
        param_types=[17],
        param_formats=[1],
        result_format=1,
    )
    assert result.status == psycopg.pq.ExecStatus.TUPLES_OK, result.error_message
    return result.get_value(0, 0) or b""


SETTINGS_BEFORE = [
    "",
    "SET standard_conforming_strings = off",
    "SET standard_conforming_strings = off; SET client_encoding = SJIS",
    "SET client_encoding = BIG5; SET escape_string_warning = on; SET backslash_quote = off",
    "SET client_encoding = LATIN1; SET search_path = ''",
]


@pytest.mark.parametrize("before", SETTINGS_BEFORE)
def test_any_value_of_any_name_arrives_as_it_is(postgres: Postgres, before: str) -> None:
    with postgres.connect() as connection:
        run(connection, before.encode())
        for name in NAMES:
            for wanted in NASTY:
                run(connection, asked({}).deploy(asked({name: wanted})))
                assert value(connection, name) == wanted, (name, wanted)
            # and it goes again
            run(connection, asked({name: b"x"}).deploy(asked({})))
            assert value(connection, name) == b"", name


@pytest.mark.parametrize("before", SETTINGS_BEFORE)
def test_random_differences_are_deployed(postgres: Postgres, before: str) -> None:
    chance = random.Random(before)
    with postgres.connect() as connection:
        connection.execute("CREATE TEMP TABLE victim ()")
        run(connection, before.encode())
        has: dict[bytes, bytes] = {}
        for _ in range(40):
            wants = {
                name: chance.choice(NASTY) for name in chance.sample(NAMES, chance.randrange(len(NAMES)))
            }
            run(connection, asked(has).deploy(asked(wants)))
            for name in NAMES:
                assert value(connection, name) == wants.get(name, b""), name
            has = wants
        run(connection, b"TABLE pg_temp.victim")


@pytest.mark.parametrize(
    ("name", "wanted", "shown"),
    [
        (b"search_path", b'"$user", public', b'"$user", public'),
        (b"search_path", b"a, \"B c\", 'd'", None),
        (b"Search_Path", b"", b""),
        (b"search_path", "schön".encode(), "schön".encode()),
        (b"temp_tablespaces", b"", b""),
        (b"DateStyle", b"German, DMY", b"German, DMY"),
        (b"datestyle", b"SQL", b"SQL, MDY"),
        (b"TimeZone", b"Asia/Tokyo", b"Asia/Tokyo"),
        (b"timezone", b"<+03>-03", b"<+03>-03"),
        (b"IntervalStyle", b"iso_8601", b"iso_8601"),
        (b"application_name", b"it's \\ me", b"it's \\ me"),
        (b"client_encoding", b"SJIS", b"SJIS"),
        (b"client_encoding", b"utf-8", b"UTF8"),
        (b"standard_conforming_strings", b"off", b"off"),
        (b"statement_timeout", b"1500", b"1500ms"),
        (b"statement_timeout", b"2min", b"2min"),
        (b"extra_float_digits", b"-3", b"-3"),
        (b"geqo", b"false", b"off"),
        (b"random_page_cost", b"1.25", b"1.25"),
        (b"role", b"trust_user", b"trust_user"),
        (b"default_transaction_isolation", b"repeatable read", b"repeatable read"),
    ],
)
def test_settings_of_postgres_itself(
    postgres: Postgres, name: bytes, wanted: bytes, shown: bytes | None
) -> None:
    with postgres.connect() as connection:
        run(connection, b"SET datestyle = 'ISO, MDY'")
        default = value(connection, name)
        run(connection, asked({}).deploy(asked({name: wanted})))
        assert value(connection, name) == (wanted if shown is None else shown)
        run(connection, asked({name: wanted}).deploy(asked({})))
        if name.lower() != b"datestyle":
            assert value(connection, name) == default


def test_a_startup_value_means_the_same_when_deployed(postgres: Postgres) -> None:
    path = '"$user", "Odd ""Name""", plain'
    escaped = path.replace("\\", "\\\\").replace(" ", "\\ ")
    options = f"-c search_path={escaped}"
    with (
        psycopg.connect(postgres.dsn(options=options), autocommit=True) as direct,
        psycopg.connect(postgres.dsn(), autocommit=True) as deployed,
    ):
        run(deployed, asked({}).deploy(asked({b"search_path": path.encode()})))
        assert value(deployed, b"search_path") == value(direct, b"search_path")


def test_one_bad_value_undoes_all(postgres: Postgres) -> None:
    with postgres.connect() as connection:
        before = value(connection, b"lock_timeout")
        sql = asked({}).deploy(asked({b"lock_timeout": b"7s", b"TimeZone": b"nonsense"}))
        assert connection.pgconn.exec_(sql).status == psycopg.pq.ExecStatus.FATAL_ERROR
        assert value(connection, b"lock_timeout") == before


def test_no_setting_that_quotes_its_list_is_forgotten(any_postgres: Postgres) -> None:
    # SET takes one string for one element of such a list; set_config takes the list
    with any_postgres.connect() as connection:
        names = [
            name
            for (name,) in connection.execute(
                "SELECT name FROM pg_settings "
                "WHERE vartype = 'string' AND context IN ('user', 'superuser') ORDER BY 1"
            ).fetchall()
        ]
        assert len(names) > 20
        found = []
        for name in names:
            sql = f"CREATE FUNCTION pg_temp.f() RETURNS int LANGUAGE sql SET {name} = 'a', 'b' AS 'SELECT 1'"
            connection.execute("BEGIN")
            is_list = connection.pgconn.exec_(sql.encode()).status == psycopg.pq.ExecStatus.COMMAND_OK
            text = ""
            if is_list:
                (text,) = connection.execute(
                    "SELECT pg_get_functiondef('pg_temp.f'::regproc)"
                ).fetchone() or ("",)
            connection.execute("ROLLBACK")
            # PostgreSQL writes lists that quote with each element in quotes of its own
            if f"SET {name} TO 'a', 'b'" in text:
                found.append(name)
                assert b"set_config" in asked({}).deploy(asked({name.encode(): b"a, b"}))
        assert "search_path" in found
