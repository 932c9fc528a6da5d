"""Sessions that were once answered otherwise than by PostgreSQL, or still are: each as short as it went.

Where a server without this or that is needed, others keep the rest: it is certain then which one answers.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.differential.play import play
from tests.differential.program import (
    COPY_DONE,
    SYNC,
    Part,
    Program,
    bind,
    copy_data,
    describe,
    execute,
    parse,
    query,
)
from tests.differential.stage import POOLED, SERVERS, Lane
from tests.harness import Gpooler, Message, Postgres, RawClient
from tests.harness import client as wire


def assert_same(postgres: Postgres, pool: Gpooler, *programs: Program) -> None:
    """Each program in turn."""
    with Lane(postgres, pool, 0) as lane:
        for program in programs:
            found = lane.difference(program, replays=1)
            assert found is None, f"{program}\n{found}"


@contextmanager
def others(pool: Gpooler, count: int = SERVERS - 1) -> Iterator[list[RawClient]]:
    """So many clients that keep a server each."""
    with ExitStack() as stack:
        clients = [stack.enter_context(pool.raw(timeout=20)).login(database=POOLED) for _ in range(count)]
        for client in clients:
            client.query("BEGIN")
            client.query("SELECT 1")  # (BEGIN alone takes no server)
        yield clients


# -- mended ------------------------------------------------------------------------------------------


def test_a_datestyle_without_an_order_takes_the_default_order(postgres: Postgres, pool: Gpooler) -> None:
    with others(pool):
        assert_same(
            postgres,
            pool,
            Program(((query("SHOW DateStyle"),),), {"DateStyle": "ISO, DMY"}),
            Program(((query("SHOW DateStyle"),),), {"DateStyle": "SQL"}),
            Program(((query("SHOW DateStyle"),),), {"options": "-c DateStyle=German"}),
        )


def test_in_a_failed_block_nothing_is_prepared_that_the_server_knows_already(
    postgres: Postgres, pool: Gpooler
) -> None:
    with others(pool):
        known = (parse("SELECT 1", "one"), SYNC)
        for text in ("SELECT 1", "ROLLBACK", ""):
            assert_same(
                postgres,
                pool,
                Program(((parse(text, "one"), SYNC),)),
                Program(
                    (
                        (query("BEGIN"),),
                        (query("nonsense"),),
                        (parse(text, "two"), SYNC),
                        (query("ROLLBACK"),),
                        (bind("two"), execute(), SYNC),
                        known,
                        (bind("one"), execute(), SYNC),
                    )
                ),
                Program(
                    (
                        (query("BEGIN"), query("nonsense"), parse(text, "two"), SYNC, query("ROLLBACK")),
                        (bind("two"), execute(), SYNC),
                    )
                ),
            )


def test_in_a_failed_block_a_name_that_is_taken_is_refused_for_the_block(
    postgres: Postgres, pool: Gpooler
) -> None:
    with others(pool):
        again = (parse("SELECT 2", "day"), SYNC)
        assert_same(
            postgres,
            pool,
            Program(
                (
                    (query("BEGIN"),),
                    (parse("SELECT 1", "day"), SYNC),
                    *[again] * 3,
                    (parse("ROLLBACK", "day"), SYNC),
                    (parse("nonsense", "day"), SYNC),
                    (query("ROLLBACK"),),
                    again,
                    (bind("day"), execute(), SYNC),
                )
            ),
        )


# -- not mended yet ----------------------------------------------------------------------------------


def test_a_bind_with_too_many_values_is_refused_with_the_name_of_the_client(
    postgres: Postgres, pool: Gpooler
) -> None:
    assert_same(postgres, pool, Program(((parse("SELECT $1::int", "one"), bind("one", (b"1", b"2")), SYNC),)))


def in_short(answers: Iterable[Message]) -> list[str]:
    """Kinds of messages, SQLSTATEs of errors."""
    return [one.fields()["C"] if one.kind == b"E" else one.kind.decode() for one in answers]


@pytest.mark.xfail(strict=True, reason="the Parse put before it is refused in a failed block")
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (describe("S", "insert"), ["t", "n", "Z"]),
        (bind("insert", (b"1", b"2")), ["08P01", "Z"]),
    ],
    ids=["described", "bound to too many values"],
)
def test_what_is_prepared_elsewhere_in_a_failed_block(
    postgres: Postgres, pool: Gpooler, asked: Part, expected: list[str]
) -> None:
    described = Program(
        (
            (query("BEGIN"),),
            (query("nonsense"),),
            (asked, SYNC),
        )
    )
    prepare = (parse("INSERT INTO t0 VALUES (1, $1)", "insert"), SYNC)
    direct = play(Program((prepare, *described.steps)), postgres.port, POOLED)
    assert in_short(direct.answers[3]) == expected
    with pool.raw(timeout=20).login(database=POOLED) as client, others(pool, SERVERS - 1) as rest:
        # prepared on the one free server, which is then taken; another becomes free
        client.send(*(part.data for part in prepare))
        client.read_until()
        taker = pool.raw(timeout=20).login(database=POOLED)
        taker.query("BEGIN")
        taker.query("SELECT 1")
        rest[0].query("COMMIT")
        for step in described.steps:
            client.send(*(part.data for part in step))
            said = in_short(client.read_until())
        taker.close()
        assert said == expected


@pytest.mark.xfail(strict=True, reason="behind a bound unnamed statement the server is free for others")
def test_the_unnamed_statement_is_bound_again_in_a_later_transaction(
    postgres: Postgres, pool: Gpooler
) -> None:
    again = (bind(), execute(), SYNC)
    assert_same(postgres, pool, Program(((parse("SELECT 1"), *again), again)))


def test_the_unnamed_statement_outlives_an_error_behind_its_parse(postgres: Postgres, pool: Gpooler) -> None:
    assert_same(
        postgres,
        pool,
        Program(((parse("SELECT 1"), execute("missing"), SYNC), (bind(), execute(), SYNC))),
    )


@pytest.mark.parametrize(
    "texts", [("1", "length('" + "x" * 17_000 + "')"), ("length('" + "x" * 17_000 + "')", "1")]
)
def test_a_name_that_is_taken_is_refused_to_a_long_text(
    postgres: Postgres, pool: Gpooler, texts: tuple[str, str]
) -> None:
    first, second = texts
    assert_same(
        postgres,
        pool,
        Program(
            (
                (parse(f"SELECT {first}", "one"), SYNC),
                (parse(f"SELECT {second}", "one"), SYNC),
                (bind("one"), execute(), SYNC),
            )
        ),
    )


@pytest.mark.xfail(strict=True, reason="nobody can tell whether the Sync is answered")
def test_a_name_that_is_taken_is_refused_behind_a_copy_that_failed_around_a_sync(
    postgres: Postgres, pool: Gpooler
) -> None:
    program = Program(
        (
            (parse("SELECT 1", "one"), SYNC),
            (query("COPY t0 FROM STDIN"), SYNC, copy_data(b"no number\tx\n"), COPY_DONE),
            (parse("SELECT 2", "one"),),
        )
    )
    assert_same(postgres, pool, program)


@pytest.mark.parametrize("sql", ["DEALLOCATE one", "DEALLOCATE ALL", "DISCARD ALL"])
def test_deallocate_forgets_what_parse_has_prepared(postgres: Postgres, pool: Gpooler, sql: str) -> None:
    assert_same(
        postgres,
        pool,
        Program(((parse("SELECT 1", "one"), SYNC), (query(sql),), (bind("one"), execute(), SYNC))),
    )


def test_execute_runs_what_parse_has_prepared(postgres: Postgres, pool: Gpooler) -> None:
    assert_same(postgres, pool, Program(((parse("SELECT 1", "one"), SYNC), (query("EXECUTE one"),))))


def test_a_name_that_prepare_has_taken_is_refused_to_parse(postgres: Postgres, pool: Gpooler) -> None:
    assert_same(
        postgres, pool, Program(((query("PREPARE one AS SELECT 1"),), (parse("SELECT 2", "one"), SYNC)))
    )


@pytest.mark.parametrize(
    "sql", ["RESET IntervalStyle", "RESET ALL", "DISCARD ALL", "SET IntervalStyle TO DEFAULT"]
)
def test_reset_leads_back_to_the_startup_packet(postgres: Postgres, pool: Gpooler, sql: str) -> None:
    steps = ((query("SET IntervalStyle = sql_standard"),), (query(sql),), (query("SHOW IntervalStyle"),))
    assert_same(postgres, pool, Program(steps, {"IntervalStyle": "iso_8601"}))


def test_what_a_do_block_sets_stays_with_its_client(postgres: Postgres, pool: Gpooler) -> None:
    hidden = "DO $$BEGIN PERFORM set_config('work_mem', '6MB', false); END$$"
    assert_same(postgres, pool, Program(((query(hidden),), (query("SHOW work_mem"),))))


@pytest.mark.xfail(
    strict=True, reason="a text is parsed anew on each server, under the settings of that moment"
)
def test_a_prepared_literal_keeps_the_meaning_it_had_when_it_was_parsed(
    postgres: Postgres, pool: Gpooler
) -> None:
    with pool.raw(timeout=20).login(database=POOLED) as client, others(pool, SERVERS - 1) as rest:
        client.send(wire.parse("SELECT '01/02/2020'::date - '2020-01-01'::date", "day"), SYNC.data)
        client.read_until()
        taker = pool.raw(timeout=20).login(database=POOLED)
        taker.query("BEGIN")
        taker.query("SELECT 1")
        rest[0].query("COMMIT")
        client.query("SET DateStyle = 'ISO, DMY'")
        client.send(wire.bind("day"), wire.execute(), wire.SYNC)
        answer = client.rows()
        taker.close()
    assert answer == [["1"]]  # January 2nd, as when it was parsed
