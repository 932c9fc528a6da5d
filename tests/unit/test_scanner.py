"""The SQL scanner: which effects it sees in which texts, and which not."""

import subprocess

import pytest

from gpooler.relay.probe import ScanProbe
from tests.harness.postgres import PostgresUnavailable, find_binaries

SET, LISTEN, PREPARE, TEMP, HOLD, LOCK, LOAD, PARSE, BEGIN = (1 << bit for bit in range(9))
FORGET = 512
NONE, PAIRS, SJIS = range(3)
END = 15


def effects(
    sql: str | bytes, *, is_conforming: bool = True, is_multibyte: int = NONE, name: bytes | None = None
) -> int:
    """What the scanner sees in a Query, or in a Parse when a name is given; fed whole and byte by byte."""
    text = (sql if isinstance(sql, bytes) else sql.encode()) + b"\0"
    if name is not None:
        text = name + b"\0" + text + b"\0\0"
    scan = ScanProbe()
    scan.begin(is_parse=name is not None, is_conforming=is_conforming, is_multibyte=is_multibyte)
    whole = scan.feed(text)
    assert scan.state == END
    scan.begin(is_parse=name is not None, is_conforming=is_conforming, is_multibyte=is_multibyte)
    for at in range(len(text)):
        scan.feed(text[at : at + 1])
    assert scan.effects == whole
    return whole


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("SET x = 1", SET),
        ("set X to default", SET),
        ("SET SESSION x = 1", SET),
        ("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", SET),
        ("SET SESSION AUTHORIZATION bob", SET),
        ("SET ROLE bob", SET),
        ("SET TIME ZONE 'UTC'", SET),
        ("SET NAMES 'SJIS'", SET),
        ('SET "x" = 1', SET),
        ('SET "Some".thing = 1', SET),
        ("RESET x", SET),
        ("RESET ALL", SET),
        ("DISCARD ALL", SET | FORGET),
        ("DEALLOCATE ALL", FORGET),
        ("SELECT set_config('a.b', 'c', false)", SET),
        ("SELECT pg_catalog.SET_CONFIG('a.b', 'c', false)", SET),
        ("""SELECT "set_config"('a.b', 'c', false)""", SET),
        ("UPDATE pg_settings SET setting = '1' WHERE name = 'x'", SET),
        ("UPDATE ONLY pg_catalog.pg_settings SET setting = '1'", SET),
        ("LISTEN channel", LISTEN),
        ("PREPARE p AS SELECT 1", PREPARE),
        ('PREPARE "p" AS SELECT 1', PREPARE),
        ("CREATE TEMP TABLE t ()", TEMP),
        ("CREATE TEMPORARY TABLE t ()", TEMP),
        ("CREATE LOCAL TEMP TABLE t ()", TEMP),
        ("CREATE GLOBAL TEMPORARY TABLE t ()", TEMP),
        ("CREATE TEMP SEQUENCE s", TEMP),
        ("CREATE TEMP VIEW v AS SELECT 1", TEMP),
        ("CREATE TEMP RECURSIVE VIEW v (a) AS SELECT 1", TEMP),
        ("CREATE OR REPLACE TEMP VIEW v AS SELECT 1", TEMP),
        ("CREATE OR REPLACE LOCAL TEMPORARY VIEW v AS SELECT 1", TEMP),
        ("SELECT 1 INTO TEMP t", TEMP),
        ("SELECT 1 INTO TEMPORARY TABLE t", TEMP),
        ("SELECT 1 INTO LOCAL TEMP TABLE t", TEMP),
        ("EXPLAIN ANALYZE CREATE TEMP TABLE t AS SELECT 1", TEMP),
        ("CREATE TABLE pg_temp.t ()", TEMP),
        ('CREATE FUNCTION "pg_temp".f() RETURNS int RETURN 1', TEMP),
        ("CREATE TABLE pg_temp_3.t ()", TEMP),
        ('CREATE TABLE "pg_temp_3".t ()', TEMP),
        ("DECLARE c CURSOR WITH HOLD FOR SELECT 1", HOLD),
        ("SELECT pg_advisory_lock(1)", LOCK),
        ("SELECT pg_advisory_lock_shared(1)", LOCK),
        ("SELECT pg_try_advisory_lock(1)", LOCK),
        ("SELECT pg_try_advisory_lock_shared(1, 2)", LOCK),
        ("LOAD 'auto_explain'", LOAD),
        ("BEGIN", BEGIN),
        ("begin isolation level serializable", BEGIN),
        ("START TRANSACTION", BEGIN),
        ("BEGIN; SET x = 1; LISTEN a; COMMIT", BEGIN | SET | LISTEN),
    ],
)
def test_effect_is_seen(sql: str, expected: int) -> None:
    assert effects(sql) == expected
    assert effects(f"SELECT 1;{sql}") == expected
    assert effects(f" \n/* a /* b */ c */ -- d\n {sql} ; SELECT 1") == expected
    assert effects(sql.replace(" ", "/**/")) == expected
    assert effects(sql.replace(" ", "--\n")) == expected
    assert effects(sql, name=b"") == expected
    assert effects(sql, name=b"s1") == expected | PARSE


@pytest.mark.parametrize(
    "sql",
    [
        "",
        ";;;",
        "SELECT 1",
        "SET LOCAL x = 1",
        "SET LOCAL x.y TO 'z'",
        'SET LOCAL "x" TO 1',
        "SET LOCAL ROLE bob",
        "SET LOCAL TIME ZONE 'UTC'",
        "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
        "SET TRANSACTION SNAPSHOT '1'",
        "SET CONSTRAINTS ALL DEFERRED",
        'SET CONSTRAINTS "a", b IMMEDIATE',
        "PREPARE TRANSACTION 'x'",
        "PREPARE TRANSACTION E'x'",
        "COMMIT PREPARED 'x'",
        "UPDATE t SET local = 1, x = 2",
        "ALTER TABLE t SET SCHEMA s",
        "ALTER ROLE bob SET x = 1",
        "SELECT * FROM pg_settings WHERE name = 'x'",
        "SHOW ALL",
        "NOTIFY a, 'b'",
        "CREATE TABLE temp (temporary int)",
        "CREATE TABLE t (set int, listen int)",
        "SELECT temp FROM t",
        "DECLARE c CURSOR WITHOUT HOLD FOR SELECT 1",
        "SELECT pg_advisory_xact_lock(1), pg_try_advisory_xact_lock(1)",
        "COMMIT AND CHAIN",
        "SAVEPOINT begin1",
        "SELECT 'SET x = 1; LISTEN a'",
        "SELECT $$; SET x = 1; $$",
        "SELECT $a$; SET x = 1; $b$ $$ $a $ $a$",
        'SELECT "set_config; SET x = 1"',
        "SELECT 1 -- ; SET x = 1",
        "SELECT 1 /* ; SET x = 1 /* */ ; SET x = 1 */",
        "SELECT E'\\'; SET x = 1; --'",
        "SELECT e'a''\\'; SET x = 1; --'",
        "SELECT E'a'\n'\\'; SET x = 1; --'",
        "SELECT E'a' -- b\n -- c\n'\\'; SET x = 1; --'",
        "SELECT 'it''s; SET x = 1'",
        'SELECT "a""; SET x = 1"',
        "SELECT U&'\\'''; SELECT '; SET x = 1'",
        "SELECT a$b$; SELECT '$b$; SET x = 1'",
        "SELECT $1, '; SET x = 1'",
        '"set" x = 1',
        'SELECT 1; "listen" a',
        'CREATE "temp"',
    ],
)
def test_no_effect_is_seen(sql: str) -> None:
    assert effects(sql) == 0
    assert effects(f"{sql}\n; SELECT 1") == 0
    assert effects(sql, name=b"") == 0
    assert effects(sql, name=b"SET x") == PARSE


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        # words that look like SET LOCAL and its kin, and name something
        ("SET local.x = 1", SET),
        ("SET local . x = 1", SET),
        ("SET local/**/.x = 1", SET),
        ("SET LOCAL TO 1", SET),
        ("SET transaction.x TO 1", SET),
        ("SET constraints.x = 1", SET),
        ('SET "local".x = 1', SET),
        ('SET "local""x" = 1', SET),
        ('SET "LOCAL" x', SET),
        ("PREPARE transaction AS SELECT 1", PREPARE),
        ("PREPARE transaction (int) AS SELECT $1", PREPARE),
        ('PREPARE "transaction" AS SELECT 1', PREPARE),
        # what is read otherwise afterwards
        ("SET LOCAL standard_conforming_strings = off", SET),
        ('SET LOCAL "client_encoding" = SJIS', SET),
        ('SET LOCAL "Client_Encoding" = SJIS', SET),
        ("SET LOCAL NAMES 'SJIS'", SET),
        # literals end where PostgreSQL ends them
        ("SELECT '\\'; SET x = 1", SET),
        ("SELECT E'\\\\'; SET x = 1", SET),
        ("SELECT E'a' -- b\n '\\''; SET x = 1; SELECT ''", SET),
        ("SELECT 'a'-'b'; SET x = 1", SET),
        ("SELECT 'a'--'\n; SET x = 1", SET),
        ("SELECT 'a'/*'*/; SET x = 1", SET),
        ("SELECT B'1'; SET x = 1", SET),
        ("SELECT n'\\'; SET x = 1", SET),
        ("SELECT u&'\\'; SET x = 1", SET),
        ("SELECT u & 'a'; SET x = 1", SET),
        ("SELECT u&x; SET x = 1", SET),
        ("SELECT namee'\\'; SET x = 1", SET),
        ("SELECT $a$ $b$ $a$; SET x = 1", SET),
        ("SELECT $a$ $$a$; SET x = 1", SET),
        ("SELECT $é$ $è$ $é$; SET x = 1", SET),
        ("SELECT $1$a$ ' $a$; SET x = 1", SET),
        ("SELECT 1$a$ ' $a$; SET x = 1", SET),
        ("SELECT a$1; SET x = 1", SET),
        ("SELECT 1/2; SET x = 1", SET),
        ("SELECT 1//* ' */2; SET x = 1", SET),
        ("SELECT 1-- '\r; SET x = 1", SET),
        ("SELECT /*/* ' */ */ 1; SET x = 1", SET),
        ("SELECT /*/* */ ; SET x = 1", 0),
        ("SELECT /*/*/ */ ; SET x = 1", 0),
        ("SELECT /*/ ' */ 1; SET x = 1", SET),
        ("SELECT /***/ 1; SET x = 1", SET),
        ("SELECT 1 /* /*/ */ */; SET x = 1", SET),
        ('SELECT "\'"; SET x = 1', SET),
        ('SELECT "a""b"; SET x = 1', SET),
        ("/" + "*" * 3 + "/SET x = 1", SET),
        # any name can be written so
        ('SELECT U&"\\0073et_config"(1)', SET),
        # deeper than it counts
        ("/*" * 300 + "*/" * 300 + "SELECT 1", SET),
        # known false ones
        ("SELECT set_config('a.b', 'c', true)", SET),
        ("SELECT pg_temp.f()", TEMP),
        ("""SELECT "Set_Config"('a.b', 'c', true)""", SET),
    ],
)
def test_lexical_traps(sql: str, expected: int) -> None:
    assert effects(sql) == expected


def test_backslash_escapes_in_every_literal_when_strings_are_not_conforming() -> None:
    assert effects("SELECT '\\'; SET x = 1; --'", is_conforming=False) == 0
    assert effects("SELECT n'\\'; SET x = 1; --'", is_conforming=False) == 0
    assert effects("SELECT 'a\\\\'; SET x = 1", is_conforming=False) == SET
    # but never in bit strings, nor in identifiers
    assert effects("SELECT B'\\'; SET x = 1", is_conforming=False) == SET
    assert effects("SELECT x'\\'; SET x = 1", is_conforming=False) == SET
    assert effects('SELECT "\\"; SET x = 1', is_conforming=False) == SET


@pytest.mark.parametrize(
    ("encoding", "kind"), [("shift_jis", SJIS), ("big5", PAIRS), ("gbk", PAIRS), ("gb18030", PAIRS)]
)
def test_backslash_inside_a_character_is_no_escape(encoding: str, kind: int) -> None:
    leads = (bytes([byte]) for byte in range(0x81, 0xFF))
    lead = next(lead for lead in leads if len((lead + b"\\").decode(encoding, "ignore")) == 1)
    character = lead + b"\\"
    assert effects(b"SELECT E'" + character + b"'; SET x = 1", is_multibyte=kind) == SET
    assert effects(b"SELECT E'" + character + b"\\'; SET x = 1; --'", is_multibyte=kind) == 0
    assert effects(b"SELECT '" + character + b"'; SET x = 1", is_multibyte=kind, is_conforming=False) == SET
    # without that knowledge it would be taken for one
    assert effects(b"SELECT E'" + character + b"'; SET x = 1; --'") == 0


def test_half_width_katakana_stands_alone_in_sjis() -> None:
    for kana in ("ｱ", "｡", "ﾟ"):
        text = f"SELECT '{kana}'; SET x = 1".encode("shift_jis")
        assert effects(text, is_multibyte=SJIS) == SET


def test_four_byte_character_of_gb18030_is_two_pairs() -> None:
    text = "SELECT '\N{LATIN SMALL LETTER E WITH DIAERESIS}'; SET x = 1".encode("gb18030")
    assert b"\x81" in text
    assert effects(text, is_multibyte=PAIRS) == SET


def test_dollar_tag_with_characters_of_two_bytes() -> None:
    text = "SELECT $表$ $裏$ $表$; SET x = 1".encode("shift_jis")
    assert effects(text, is_multibyte=SJIS) == SET
    text = "SELECT $ソ$ ' $ソ$; SET x = 1".encode("shift_jis")
    assert effects(text, is_multibyte=SJIS) == SET
    # the same lead byte, another character
    assert effects(b"SELECT $\x83a$ $\x83b$; SET x = 1; $\x83a$", is_multibyte=SJIS) == 0


def test_nul_ends_the_text_even_behind_a_lead_byte() -> None:
    scan = ScanProbe()
    scan.begin(is_multibyte=SJIS)
    scan.feed(b"SELECT \x81\0SET x = 1")
    assert scan.state == END
    assert scan.effects == 0


def test_parameter_types_behind_a_parse_are_not_read() -> None:
    scan = ScanProbe()
    scan.begin(is_parse=True)
    scan.feed(b"\0SELECT $1\0\0\1LISTEN a;")
    assert scan.effects == 0


def test_state_is_small() -> None:
    assert ScanProbe().size <= 32


def test_no_setting_or_keyword_is_mistaken_for_an_exception_of_set() -> None:
    try:
        postgres = find_binaries(15) / "postgres"
    except PostgresUnavailable as error:
        pytest.skip(str(error))
    described = subprocess.run([postgres, "--describe-config"], capture_output=True, text=True, check=True)
    names = {line.split("\t")[0].lower() for line in described.stdout.splitlines() if line}
    assert len(names) > 300
    names |= {"names", "time", "role", "session", "schema", "xml", "catalog", "seed"}
    for name in names:
        assert effects(f"SET {name} = 1") == SET, name
        assert effects(f"PREPARE {name} AS SELECT 1") == PREPARE, name
