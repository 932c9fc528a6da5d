"""What is read of a whole SQL text: which settings, which names of prepared statements, what may be over."""

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpooler.relay.probe import read_sql, read_virtual

if TYPE_CHECKING:
    from gpooler.relay.probe import SqlReading

SET, RESET, RESET_ALL, DISCARD_ALL = 1, 2, 3, 4
PREPARE, EXECUTE, DEALLOCATE = 1, 2, 3
SJIS = 2
PINS = 1  # EFFECT_SET: what it sets cannot be told
LISTEN, PREPARED, TEMP, HOLD, LOCK = 2, 4 | 128, 8, 16, 32


def read(sql: str) -> "SqlReading":
    return read_sql(sql.encode() + b"\0")


def named(sql: str) -> list[tuple[int, str | None]]:
    found = read(sql)
    assert found["effects"] == 0
    return [(kind, None if name is None else name.decode()) for kind, name in found["settings"]]


@pytest.mark.parametrize(
    ("sql", "settings"),
    [
        ("SET work_mem = '5MB'", [(SET, "work_mem")]),
        ("set Work_Mem to 5", [(SET, "Work_Mem")]),
        ("SET SESSION work_mem TO DEFAULT", [(RESET, "work_mem")]),
        ("SET work_mem = DEFAULT;", [(RESET, "work_mem")]),
        ("SET search_path TO default, public", [(SET, "search_path")]),
        ('SET "TimeZone" = 1', [(SET, "TimeZone")]),
        ("SET my.own.thing = 1", [(SET, "my.own.thing")]),
        ("SET /* a */ x -- b\n = 'y'", [(SET, "x")]),
        ("SET LOCAL x = 1", []),
        ("SET LOCAL TIME ZONE 1", []),
        ("SET TIME ZONE 'UTC'", [(SET, "timezone")]),
        ("SET TIME ZONE LOCAL", [(RESET, "timezone")]),
        ("SET TIME ZONE INTERVAL '1' HOUR TO MINUTE", [(SET, "timezone")]),
        ("SET NAMES 'UTF8'", [(SET, "client_encoding")]),
        ("SET NAMES", [(RESET, "client_encoding")]),
        ("SET SCHEMA 'x'", [(SET, "search_path")]),
        ("SET ROLE bob", [(SET, "role")]),
        ("SET ROLE NONE", [(SET, "role")]),
        ("SET XML OPTION DOCUMENT", [(SET, "xmloption")]),
        ("SET TRANSACTION READ ONLY", []),
        ("SET CONSTRAINTS ALL DEFERRED", []),
        ("SET transaction_isolation = serializable", []),
        (
            "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
            [
                (SET, "default_transaction_isolation"),
                (SET, "default_transaction_read_only"),
                (SET, "default_transaction_deferrable"),
            ],
        ),
        ("RESET x", [(RESET, "x")]),
        ("RESET TIME ZONE", [(RESET, "timezone")]),
        ("RESET ALL", [(RESET_ALL, None)]),
        ("RESET TRANSACTION ISOLATION LEVEL", []),
        ("DISCARD ALL", [(DISCARD_ALL, None)]),
        ("DISCARD PLANS; DISCARD SEQUENCES", []),
        ("SET a = 1; SELECT 1; RESET b", [(SET, "a"), (RESET, "b")]),
        ("SELECT 'SET a = 1; SET b = 2'", []),
        ("SELECT E'\\'; SET a = 1; --'", []),
        ("SELECT $$; SET a = 1; $$; SET b = 1", [(SET, "b")]),
        ("SELECT $x$; SET a = 1; $y$ $x$", []),
        ("SELECT 'a' -- b\n ' ; SET a = 1'", []),
        ("SELECT set_config('a', 'b', false)", [(SET, "a")]),
        ("SELECT set_config('a', $1, $2)", [(SET, "a")]),
        ("SELECT set_config('a', 'b', true)", []),
        ("SELECT set_config('a', f(1, true), false), set_config('b', '', true)", [(SET, "a")]),
        ("select pg_catalog.set_config('a', upper('x'), false)", [(SET, "a")]),
        ("UPDATE t SET a = 1", []),
    ],
)
def test_settings(sql: str, settings: list[tuple[int, str | None]]) -> None:
    assert named(sql) == settings


@pytest.mark.parametrize(
    "sql",
    [
        "SET SESSION AUTHORIZATION bob",
        "SET LOCAL = 1",
        "SET SESSION = 1",
        "SET TRANSACTION = 1",
        'SET "a"."b" = 1',
        'SET "a""b" = 1',
        "SET \N{LATIN SMALL LETTER U WITH DIAERESIS} = 1",
        "SET seed = 0.5",
        "SET nonsense",
        "SET",
        "RESET SESSION AUTHORIZATION",
        "SELECT set_config($1, 'b', false)",
        "SELECT set_config('a' || 'b', 'c', false)",
        "SELECT set_config('a''b', 'c', false)",
        "SELECT set_config(E'a', 'c', false)",
        "SELECT set_config(setting_name => 'a', new_value => 'c', is_local => false)",
        "SELECT set_config('a', set_config('b', 'c', false), true)",
        "SELECT set_config ",
        "UPDATE pg_settings SET setting = 1",
        'SELECT U&"\\0073et_config"(1)',
        "; ".join(f"SET a{number} = 1" for number in range(40)),
    ],
)
def test_what_cannot_be_told_pins(sql: str) -> None:
    assert read(sql)["effects"] == PINS


@pytest.mark.parametrize(
    ("sql", "names"),
    [
        ("PREPARE a AS SELECT 1", [(PREPARE, b"a")]),
        ('prepare "A b" (int) as select 1', [(PREPARE, b"A b")]),
        ("PREPARE TRANSACTION 'x'", []),
        ("PREPARE transaction AS SELECT 1", [(PREPARE, b"transaction")]),
        ("EXECUTE a(1)", [(EXECUTE, b"a")]),
        ("EXPLAIN ANALYZE EXECUTE a", [(EXECUTE, b"a")]),
        ("CREATE TABLE t AS EXECUTE B", [(EXECUTE, b"b")]),
        ("CREATE TRIGGER t AFTER INSERT ON t EXECUTE FUNCTION f()", []),
        ("GRANT EXECUTE ON FUNCTION f TO x", []),
        ("DEALLOCATE A", [(DEALLOCATE, b"a")]),
        ("DEALLOCATE PREPARE a", [(DEALLOCATE, b"a")]),
        ("DEALLOCATE PREPARE", [(DEALLOCATE, b"prepare")]),
        ("DEALLOCATE ALL", []),
        ('DEALLOCATE "all"', [(DEALLOCATE, b"all")]),
        ("EXECUTE a; EXECUTE b; DEALLOCATE c", [(EXECUTE, b"a"), (EXECUTE, b"b"), (DEALLOCATE, b"c")]),
    ],
)
def test_names_of_prepared_statements(sql: str, names: list[tuple[int, bytes]]) -> None:
    found = read(sql)
    assert found["names"] == names
    assert found["prepares"] == any(kind != DEALLOCATE for kind, _ in names)
    assert found["forgets_all"] == (sql == "DEALLOCATE ALL")
    assert not found["has_other_names"]


@pytest.mark.parametrize(
    "sql",
    [
        "EXECUTE " + "x" * 64,
        'EXECUTE "a""b"',
        "EXECUTE \N{LATIN SMALL LETTER E WITH ACUTE}",
        "EXECUTE a; " * 9,
    ],
)
def test_names_that_cannot_be_told(sql: str) -> None:
    assert read(sql)["has_other_names"]


@pytest.mark.parametrize(
    ("sql", "ends"),
    [
        ("UNLISTEN *", LISTEN),
        ("SELECT pg_advisory_unlock(1)", LOCK),
        ("SELECT pg_catalog.pg_advisory_unlock_all()", LOCK),
        ("CLOSE ALL", HOLD),
        ("DROP TABLE t", TEMP),
        ("DISCARD TEMP", TEMP),
        ("DEALLOCATE a", PREPARED),
        ("SELECT 1", 0),
    ],
)
def test_what_may_be_over(sql: str, ends: int) -> None:
    assert read(sql)["ends"] == ends


WORDS = [
    "SET", "LOCAL", "SESSION", "TO", "DEFAULT", "RESET", "ALL", "DISCARD", "DEALLOCATE", "PREPARE",
    "EXECUTE", "set_config", "(", ")", ",", "'a'", "''", "'", '"', "$$", "$a$", "--", "\n", "/*", "*/", "E'",
    "U&'", 'U&"',
    "\\", ";", "=", ".", "a", "true", "1", "$1", "TIME", "ZONE", "\N{LATIN SMALL LETTER E WITH ACUTE}",
]  # fmt: skip


@given(
    st.lists(st.sampled_from(WORDS), max_size=25), st.booleans(), st.sampled_from([0, 1, 2]), st.booleans()
)
def test_any_text_is_read_to_its_end(words: list[str], is_conforming: bool, kind: int, has_end: bool) -> None:
    text = " ".join(words).encode() + b"\0" * has_end
    found = read_sql(text, is_conforming=is_conforming, is_multibyte=kind)
    assert all(name is None or name in text or name.isascii() for _, name in found["settings"])


@given(st.binary(max_size=80), st.booleans(), st.sampled_from([0, 1, 2]))
def test_any_bytes_are_read(text: bytes, is_conforming: bool, kind: int) -> None:
    read_sql(text, is_conforming=is_conforming, is_multibyte=kind)


NOT_VIRTUAL, SHOW_ODYSSEY, SHOW_GPOOLER, VIRTUAL_SET, VIRTUAL_RESET, UNBUILT, INVALID, UNCLEAR = range(8)


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        ("SHOW odyssey.target_session_attrs", SHOW_ODYSSEY),
        ("show Gpooler . Target_Session_Attrs;", SHOW_GPOOLER),
        ('SHOW "odyssey.target_session_attrs"', SHOW_ODYSSEY),
        ('/* a */ SHOW "gpooler"."target_session_attrs" ; -- b', SHOW_GPOOLER),
        ("SET odyssey.target_session_attrs = any", VIRTUAL_SET),
        ("SET SESSION odyssey.target_session_attrs TO 'any';;", VIRTUAL_SET),
        ("SET LOCAL gpooler.target_session_attrs = DEFAULT", VIRTUAL_SET),
        ("RESET odyssey.target_session_attrs", VIRTUAL_RESET),
        ("SET odyssey.target_session_attrs = 'read-write'", UNBUILT),
        ("SET odyssey.target_session_attrs = $$prefer-standby$$", UNBUILT),
        ("SET odyssey.target_session_attrs = read-write", INVALID),
        ("SET odyssey.target_session_attrs = 'standby'", INVALID),
        ("SET odyssey.target_session_attrs = 'default'", INVALID),
        ("SET odyssey.target_session_attrs = E'any'", INVALID),
        ("SET odyssey.target_session_attrs =", INVALID),
        ("SET odyssey.target_session_attrs = 1", INVALID),
        ("SET odyssey.target_session_attrs", UNCLEAR),
        ("SET odyssey.target_session_attrs = any, any", UNCLEAR),
        ("SHOW odyssey.target_session_attrs; SELECT 1", UNCLEAR),
        ("SELECT 1; SHOW odyssey.target_session_attrs", NOT_VIRTUAL),
        ("SHOW target_session_attrs", NOT_VIRTUAL),
        ("SHOW odyssey", NOT_VIRTUAL),
        ("SHOW odyssey.target_session_attrs_x", NOT_VIRTUAL),
        ("SHOW 'odyssey.target_session_attrs'", NOT_VIRTUAL),
        ("SET work_mem = '5MB'", NOT_VIRTUAL),
        ("SET", NOT_VIRTUAL),
        ("", NOT_VIRTUAL),
    ],
)
def test_what_is_asked_of_gpooler_itself_is_found(sql: str, kind: int) -> None:
    assert read_virtual(sql.encode() + b"\0") == kind


@given(st.binary(max_size=80))
def test_any_bytes_are_looked_at_for_a_request_to_gpooler(text: bytes) -> None:
    assert read_virtual(b"SET odyssey.target_session_attrs " + text) in range(NOT_VIRTUAL, UNCLEAR + 1)
    assert read_virtual(text) in range(NOT_VIRTUAL, UNCLEAR + 1)


def test_dollar_tag_with_a_character_that_ends_in_a_backslash() -> None:
    text = "SELECT $ソ$ ' $ソ$; SET x = 1".encode("shift_jis")
    assert b"\x83\\$" in text
    assert read_sql(text, is_multibyte=SJIS)["settings"] == [(SET, b"x")]


def test_nothing_is_read_behind_the_nul() -> None:
    # the types of a Parse stand there
    assert read_sql(b"SELECT 1 -- \0\n; SET x = 1")["settings"] == []
    assert read_sql(b"/* \0 */ SET x = 1")["settings"] == []
    assert read_sql(b"SELECT '\0'; SET x = 1")["settings"] == []


def test_name_with_a_doubled_quote_is_another_one() -> None:
    assert read('SELECT "pg_advisory_unlock""2"(1)')["ends"] == 0
    assert named("""SELECT "set_config""2"('a.b', 'c', false)""") == []
    assert named("""UPDATE "pg_settings""2" SET setting = 1""") == []


def test_prepare_transaction_without_more_names_nothing() -> None:
    assert read("PREPARE transaction")["names"] == []
    assert read("PREPARE transaction; SELECT 1")["names"] == []
    assert read("PREPARE transaction (int) AS SELECT 1")["names"] == [(PREPARE, b"transaction")]
