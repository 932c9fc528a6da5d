"""Statement pools: a server for one statement; a transaction block is refused before it reaches a server."""

from collections.abc import Callable

import pytest

from tests.harness import Gpooler, Postgres, RawClient
from tests.harness.client import SYNC, Message, ServerError, bind, execute, parse, query

Factory = Callable[..., Gpooler]

REFUSED = [
    "BEGIN",
    "begin work",
    "  /* block */ BEGIN ISOLATION LEVEL SERIALIZABLE",
    "START TRANSACTION",
    "-- a comment\nStart Transaction READ ONLY",
    "SELECT 1; BEGIN",
    "INSERT INTO stained VALUES (1); BEGIN; SELECT 1",
    "BEGIN; INSERT INTO stained VALUES (1); COMMIT",
    ";;;BEGIN",
]
ALLOWED = [
    ("SELECT 'BEGIN'", "BEGIN"),
    ("SELECT 'x' AS begin", "x"),
    ("SELECT 'a;BEGIN'", "a;BEGIN"),
    ("SELECT $$; BEGIN$$", "; BEGIN"),
    ("SELECT 'y' /* ; BEGIN */", "y"),
]


@pytest.fixture
def pool(postgres: Postgres, gpooler_factory: Factory) -> Gpooler:
    postgres.query("DROP TABLE IF EXISTS stained; CREATE TABLE stained (n int)", "app")
    postgres.query("GRANT ALL ON stained TO PUBLIC", "app")
    return gpooler_factory(postgres, rule={"pool": "statement", "pool_size": 1})


def kinds(messages: list[Message]) -> str:
    return b"".join(message.kind for message in messages).decode()


def assert_unstained(postgres: Postgres) -> None:
    assert postgres.query("SELECT count(*) FROM stained", "app") == [(0,)]


def test_a_block_is_refused_and_the_client_stays_usable(postgres: Postgres, pool: Gpooler) -> None:
    logged = len(postgres.log())
    with pool.raw() as client:
        client.login()
        for sql in REFUSED:
            with pytest.raises(ServerError, match="transaction blocks are not supported") as caught:
                client.query(sql)
            assert caught.value.sqlstate == "0A000"
            assert client.query("SELECT 1") == [["1"]]
        client.terminate()
    assert_unstained(postgres)
    assert "ROLLBACK" not in postgres.log()[logged:]


def test_words_inside_literals_and_comments_are_no_blocks(pool: Gpooler) -> None:
    with pool.raw() as client:
        client.login()
        for sql, value in ALLOWED:
            assert client.query(sql) == [[value]]


def test_a_parse_of_begin_is_refused_up_to_its_sync(postgres: Postgres, pool: Gpooler) -> None:
    with pool.raw() as client:
        client.login()
        client.send(parse("BEGIN"), bind(), execute(), SYNC, query("SELECT 2"))
        assert kinds(client.read_until()) == "EZ"
        assert client.rows() == [["2"]]
        client.send(parse("SELECT 3"), bind(), execute(), SYNC)
        assert client.rows() == [["3"]]


def test_a_refusal_inside_a_pipeline_comes_in_its_place(postgres: Postgres, pool: Gpooler) -> None:
    with pool.raw() as client:
        client.login()
        client.send(query("SELECT 1"), query("BEGIN"), query("SELECT 2"), query("SELECT 3"))
        assert client.rows() == [["1"]]
        with pytest.raises(ServerError) as caught:
            client.rows()
        assert caught.value.sqlstate == "0A000"
        assert client.rows() == [["2"]]
        assert client.rows() == [["3"]]


def test_a_begin_parsed_behind_other_messages_of_a_group_ends_the_client(
    postgres: Postgres, pool: Gpooler
) -> None:
    """Part of the group has reached the server already: nothing of it may stay."""
    with pool.raw() as client:
        client.login()
        client.send(parse("INSERT INTO stained VALUES (1)"), bind(), execute())
        client.send(parse("BEGIN"), bind(), execute(), SYNC)
        errors = [message.fields()["C"] for message in client.read_to_end() if message.kind == b"E"]
        assert errors == ["0A000"]
    assert_unstained(postgres)


def test_the_begin_is_found_byte_by_byte(pool: Gpooler) -> None:
    with pool.raw() as client:
        client.login()
        for byte in query("BEGIN"):
            client.send(bytes([byte]))
        with pytest.raises(ServerError, match="not supported"):
            client.rows()
        assert client.query("SELECT 1") == [["1"]]


def test_each_statement_may_have_another_server(postgres: Postgres, pool: Gpooler) -> None:
    with pool.raw() as one, pool.raw() as two:
        one.login()
        two.login()
        for turn in range(20):
            assert one.query(f"SELECT 'one {turn}'") == [[f"one {turn}"]]
            assert two.query(f"SELECT 'two {turn}'") == [[f"two {turn}"]]
        assert len(postgres.activity()) == 1


def test_a_block_opened_out_of_sight_ends_the_client(postgres: Postgres, pool: Gpooler) -> None:
    """A text longer than is looked into: the server says "in a transaction", and both are closed."""
    with pool.raw() as client:
        client.login()
        client.send(query("SELECT '" + "x" * 100_000 + "'; BEGIN"))
        messages = client.read_to_end()
        errors = [message.fields() for message in messages if message.kind == b"E"]
        assert [fields["C"] for fields in errors] == ["0A000"]
        assert errors[0]["S"] == "FATAL"
    with RawClient(pool.port) as client:
        client.login()
        assert client.query("SELECT 1") == [["1"]]
