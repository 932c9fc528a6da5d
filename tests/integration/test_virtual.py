"""Requests to gpooler itself (``virtual_processing``) are answered without a server."""

from collections.abc import Callable

import psycopg
import pytest

from gpooler.stats.registry import RouteWord
from tests.harness import Gpooler, Message, Postgres, RawClient, eventually
from tests.harness.client import SYNC, bind, execute, parse, query

Factory = Callable[..., Gpooler]
SHOW = "SHOW odyssey.target_session_attrs"
SET = "SET odyssey.target_session_attrs = "


@pytest.fixture(params=["session", "transaction", "statement"])
def any_pool(postgres: Postgres, gpooler_factory: Factory, request: pytest.FixtureRequest) -> Gpooler:
    config = {"routing": {"virtual_processing": True}}
    return gpooler_factory(postgres, rule={"pool": request.param, "pool_size": 1}, config=config)


@pytest.fixture(params=[False, True], ids=["", "deferred"])
def pool(postgres: Postgres, gpooler_factory: Factory, request: pytest.FixtureRequest) -> Gpooler:
    config = {"routing": {"virtual_processing": True, "virtual_transaction": request.param}}
    return gpooler_factory(postgres, rule={"pool_size": 1}, config=config)


def answers(client: RawClient, *steps: bytes) -> list[Message]:
    client.send(*steps)
    return client.read_until()


def kinds(messages: list[Message]) -> bytes:
    return b"".join(message.kind for message in messages)


def status(messages: list[Message]) -> bytes:
    return messages[-1].body


@pytest.mark.parametrize("name", ["odyssey", "gpooler"])
def test_a_request_to_gpooler_is_answered_with_a_notice(any_pool: Gpooler, name: str) -> None:
    with any_pool.raw() as client:
        client.login()
        before = any_pool.route_count(RouteWord.ASSIGNMENTS)
        notice, columns, row, tag, ready = answers(client, query(f"SHOW {name}.target_session_attrs"))
        assert notice.kind == b"N"
        assert notice.fields()["M"] == "gpooler: answered without a server"
        assert columns.body[2:].startswith(f"{name}.target_session_attrs\0".encode())
        assert row.values() == ["any"]
        assert (tag.tag(), ready.body) == ("SHOW", b"I")
        for sql, word in (
            ("SET {}.target_session_attrs = any", "SET"),
            ("RESET {}.target_session_attrs", "RESET"),
        ):
            notice, tag, ready = answers(client, query(sql.format(name)))
            assert (notice.kind, tag.tag(), ready.body) == (b"N", word, b"I")
        assert any_pool.route_count(RouteWord.ASSIGNMENTS) == before
        assert client.query("SELECT 1") == [["1"]]
        assert client.query(SHOW) == [["any"]]


def test_a_driver_reads_the_answer(any_pool: Gpooler) -> None:
    with any_pool.connect() as connection:
        notices: list[str | None] = []
        connection.add_notice_handler(lambda notice: notices.append(notice.message_primary))
        cursor = connection.execute(SHOW)
        assert cursor.fetchall() == [("any",)]
        assert cursor.description is not None
        assert (cursor.description[0].name, cursor.description[0].type_code) == (
            "odyssey.target_session_attrs",
            25,
        )
        assert notices == ["gpooler: answered without a server"]
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="not built yet"):
            connection.execute(SET + "'read-write'")
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="target_session_attrs"):
            connection.execute(SET + "'nearest'")
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="simple query of its own"):
            connection.execute(SHOW, binary=True)  # by the extended protocol
        assert connection.execute(SHOW).fetchall() == [("any",)]


def test_a_transaction_goes_on_around_it(pool: Gpooler) -> None:
    with pool.raw() as client:
        client.login()
        for before in ([], ["SELECT 1"]):
            assert status(answers(client, query("BEGIN"))) == b"T"
            for sql in before:
                client.query(sql)
            assert status(answers(client, query(SHOW))) == b"T"
            assert status(answers(client, query(SET + "'any'"))) == b"T"
            assert client.query("SELECT 2") == [["2"]]
            assert status(answers(client, query("COMMIT"))) == b"I"


def test_a_failed_transaction_refuses_it_as_postgresql_does(pool: Gpooler) -> None:
    with pool.raw() as client:
        client.login()
        client.query("BEGIN")
        assert status(answers(client, query("SELECT 1/0"))) == b"E"
        refused = answers(client, query(SHOW))
        assert (kinds(refused), status(refused)) == (b"EZ", b"E")
        assert refused[0].fields()["C"] == "25P02"
        assert status(answers(client, query("ROLLBACK"))) == b"I"
        assert client.query(SHOW) == [["any"]]


def test_a_value_that_is_not_built_fails_a_transaction_that_no_server_has_seen(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    config = {"routing": {"virtual_processing": True, "virtual_transaction": True}}
    with gpooler_factory(postgres, config=config).raw() as client:
        client.login()
        client.query("BEGIN")
        refused = answers(client, query(SET + "'read-only'"))
        assert (kinds(refused), status(refused)) == (b"EZ", b"E")
        assert refused[0].fields()["C"] == "0A000"
        for sql in (SHOW, "SELECT 1"):
            refused = answers(client, query(sql))
            assert refused[0].fields()["C"] == "25P02"
        assert status(answers(client, query("ROLLBACK"))) == b"I"


def test_a_value_that_is_not_built_ends_the_client_of_an_open_transaction(pool: Gpooler) -> None:
    with pool.raw() as client:
        client.login()
        client.query("BEGIN")
        client.query("SELECT 1")
        client.send(query(SET + "'read-only'"))
        (error,) = client.read_to_end()
        assert (error.fields()["S"], error.fields()["C"]) == ("FATAL", "0A000")
    eventually(lambda: pool.route_count(RouteWord.SERVERS_IDLE) == 1)


@pytest.mark.parametrize("sql", [SHOW + "; SELECT 1", SET + "any, any", SET + "'x' 'y'"])
def test_what_is_not_a_request_of_its_own_is_refused(pool: Gpooler, sql: str) -> None:
    with pool.raw() as client:
        client.login()
        for step in (query(sql), parse(sql, "p") + bind("p") + execute() + SYNC, parse(SHOW) + SYNC):
            refused = answers(client, step)
            assert (kinds(refused), status(refused)) == (b"EZ", b"I")
            assert refused[0].fields()["C"] in ("0A000", "22023")
        assert client.query("SELECT 1") == [["1"]]


def test_it_keeps_its_place_among_requests_sent_together(any_pool: Gpooler) -> None:
    with any_pool.raw() as client:
        client.login()
        client.send(
            query("SELECT 1"), query(SHOW), query("SELECT 2"), query(SHOW), query(SHOW), query(SET + "'bad'"),
            parse("SELECT 3"), bind(), execute(), SYNC, query(SHOW), SYNC,
            query("SELECT pg_sleep(0.01)"), query(SHOW),
        )  # fmt: skip
        found = [kinds(client.read_until()) for _ in range(10)]
    assert found == [
        b"TDCZ", b"NTDCZ", b"TDCZ", b"NTDCZ", b"NTDCZ", b"EZ", b"12DCZ", b"NTDCZ", b"Z", b"TDCZ",
    ]  # fmt: skip


def test_it_works_byte_by_byte_and_for_a_pinned_client(pool: Gpooler) -> None:
    with pool.raw() as client:
        client.login()
        client.query("LISTEN ear")
        for byte in query(SHOW):
            client.send(bytes([byte]))
        assert client.rows() == [["any"]]
        client.query("NOTIFY ear")
        assert client.query(SHOW) == [["any"]]


def test_without_the_option_a_server_is_asked(postgres: Postgres, gpooler_factory: Factory) -> None:
    with gpooler_factory(postgres).raw() as client:
        client.login()
        (error, _) = answers(client, query(SHOW))
        assert error.fields()["C"] == "42704"
