"""What a text asks the console to do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpooler.console.grammar import parse
from gpooler.console.statements import (
    Act,
    All,
    Any,
    Catalog,
    Comparison,
    IsNull,
    Item,
    Not,
    Nothing,
    Order,
    Parameter,
    Select,
    SetSetting,
    Show,
    ShowSetting,
    Statement,
    Transaction,
)
from gpooler.console.tables import NAMES
from gpooler.errors import ConsoleSyntaxError

A_LIKE = Comparison("database", "like", "a%")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", []),
        (" ; -- nothing\n;/* and /* nested */ */", []),
        ("SHOW POOLS", [Show("pools")]),
        ('show "pools" ;', [Show("pools")]),
        ("SHOW STATS; SHOW LISTS", [Show("stats"), Show("lists")]),
        ("SHOW POOLS WHERE cl_waiting > 0", [Show("pools", Comparison("cl_waiting", ">", 0))]),
        ("SHOW POOLS WHERE x != -3", [Show("pools", Comparison("x", "<>", -3))]),
        ("SHOW POOLS WHERE \"user\"='it''s'", [Show("pools", Comparison("user", "=", "it's"))]),
        (
            "SHOW POOLS WHERE a = 1 AND b = 2 OR NOT (c IS NULL)",
            [
                Show(
                    "pools",
                    Any((All((Comparison("a", "=", 1), Comparison("b", "=", 2))), Not(IsNull("c")))),
                )
            ],
        ),
        ("SHOW POOLS WHERE database NOT LIKE 'a%'", [Show("pools", Not(A_LIKE))]),
        ("SHOW POOLS WHERE c IS NOT NULL", [Show("pools", Not(IsNull("c")))]),
        (
            "SHOW POOLS WHERE a IN (1, 'x')",
            [Show("pools", Any((Comparison("a", "=", 1), Comparison("a", "=", "x"))))],
        ),
        (
            "SHOW CLIENTS ORDER BY wait DESC, 2 LIMIT 5 OFFSET $1",
            [Show("clients", None, (Order("wait", True), Order(2, False)), 5, Parameter(1))],
        ),
        ("SHOW server_version", [ShowSetting("server_version")]),
        ("SHOW TRANSACTION ISOLATION LEVEL", [ShowSetting("transaction_isolation")]),
        ("SET extra_float_digits = 3", [SetSetting("extra_float_digits", "3")]),
        ("SET application_name TO 'psql'", [SetSetting("application_name", "psql")]),
        ("SET SESSION datestyle TO ISO, MDY", [SetSetting("datestyle", "ISO, MDY")]),
        ("SET TIME ZONE DEFAULT", [SetSetting("timezone", None)]),
        ("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", [Nothing("SET")]),
        ("RESET ALL", [Nothing("RESET")]),
        ("RESET search_path", [SetSetting("search_path", None)]),
        ("BEGIN ISOLATION LEVEL SERIALIZABLE", [Transaction("BEGIN")]),
        ("START TRANSACTION", [Transaction("START TRANSACTION")]),
        ("END", [Transaction("COMMIT")]),
        ("ROLLBACK TO SAVEPOINT s", [Nothing("ROLLBACK")]),
        ("DISCARD ALL", [Nothing("DISCARD ALL")]),
        ("SELECT 1", [Select((Item("?column?", 1),))]),
        ("SELECT 'a'::text AS \"B\", true", [Select((Item("B", "a"), Item("bool", True)))]),
        ("SELECT pg_catalog.version()", [Select((Item("version", function="version"),))]),
        (
            "SELECT set_config('a', 'b', false) x",
            [Select((Item("x", function="set_config", arguments=("a", "b", "false")),))],
        ),
        (
            'SELECT c.relname, n.nspname AS "Schema", count(*) FROM pg_catalog.pg_class c, pg_namespace n',
            [Catalog(("relname", "Schema", "count"))],
        ),
        ("WITH x AS (SELECT 1 FROM pg_class) SELECT a, b FROM x", [Catalog(("a", "b"))]),
        ("PAUSE", [Act("PAUSE")]),
        ('resume "My Db"', [Act("RESUME", ("My Db",))]),
        ("DISABLE app", [Act("DISABLE", ("app",))]),
        ("KILL_CLIENT c0123456789ab", [Act("KILL_CLIENT", ("c0123456789ab",))]),
        ("KILL_CLIENT 17", [Act("KILL_CLIENT", ("17",))]),
        ("DROP SERVERS", [Act("DROP SERVERS")]),
        ("SHUTDOWN wait_for_clients", [Act("SHUTDOWN", ("WAIT_FOR_CLIENTS",))]),
        ("RELOAD", [Act("RELOAD")]),
    ],
)
def test_what_is_asked_for(text: str, wanted: list[Statement]) -> None:
    assert parse(text, NAMES) == wanted


@pytest.mark.parametrize(
    ("text", "error", "hint"),
    [
        ("SHOOW POOLS", 'at or near "SHOOW"', 'Perhaps you meant "SHOW".'),
        ("PAUZE", 'near "PAUZE"', 'Perhaps you meant "PAUSE".'),
        ("DROP SERVER", 'near "SERVER"', ""),
        ("SHOW", "at end of input", "SHOW HELP lists the tables."),
        ("SHOW POLS LIMIT 1", 'near "POLS"', 'Perhaps you meant "SHOW POOLS".'),
        ("SHOW POOLS x", 'near "x"', ""),
        ("SHOW POOLS WHERE", "at end of input", ""),
        ("SHOW POOLS WHERE a ~ 'x'", 'near "~"', "A condition compares a column"),
        ("SHOW POOLS WHERE a = b", 'near "b"', "A value is a number"),
        ("SHOW POOLS WHERE (a = 1", "at end of input", ""),
        ("SHOW POOLS LIMIT 'x'", "near \"'x'\"", "LIMIT and OFFSET take a whole number."),
        ("SHOW POOLS WHERE " + "(" * 100, "nested too deeply", ""),
        ("PAUSE 3", 'near "3"', "The name of a database is needed."),
        ("DISABLE", "at end of input", "The name of a database is needed."),
        ("KILL_CLIENT", "at end of input", "The id of a client is needed"),
        ("RELOAD now", 'near "now"', ""),
        ("SHUTDOWN WAIT_FOR_SERVER", "near", 'Perhaps you meant "SHUTDOWN WAIT_FOR_SERVERS".'),
        ("SET x", "at end of input", ""),
        ("SELECT * FROM pools", 'near "FROM"', "Try SHOW POOLS."),
        ("SELECT 1 + 1", "computes no expressions", "SHOW HELP"),
        ("'abc", "unterminated quoted string", ""),
        ('"abc', "unterminated quoted identifier", ""),
        ("/* abc", "unterminated comment", ""),
        ("SHOW \\", 'near "\\"', ""),
        ("INSERT INTO x VALUES (1)", 'near "INSERT"', "SHOW HELP lists the commands."),
    ],
)
def test_what_is_no_command_is_told_with_the_nearest(text: str, error: str, hint: str) -> None:
    with pytest.raises(ConsoleSyntaxError) as caught:
        parse(text, NAMES)
    assert error in caught.value.message
    assert caught.value.hint.startswith(hint)


WORDS = st.sampled_from(
    ["SHOW", "POOLS", "WHERE", "a", "=", "'x'", "AND", "OR", "NOT", "(", ")", ",", ";", "SET", "TO", "SELECT",
     "FROM", "pg_class", "::", "1", "$1", '"', "'", "/*", "*/", "--", "LIMIT", ".", "BEGIN", "AS", "ORDER BY"]
)  # fmt: skip


@given(st.lists(WORDS, max_size=12).map(" ".join) | st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        parse(text, NAMES)
    except ConsoleSyntaxError:
        pass
