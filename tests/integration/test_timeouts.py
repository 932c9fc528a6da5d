"""Limits of clients: how long idle, in a query, in a transaction; and notices for those who wait."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final

import pytest

from gpooler.reasons import Reason
from gpooler.stats.registry import ERROR_BASE, RouteWord
from tests.harness import Gpooler, Postgres, RawClient, eventually
from tests.harness.client import SYNC, Message, ServerError, bind, execute, parse, query, startup

Factory = Callable[..., Gpooler]

POOLS = ("transaction", "session", "statement")
# a server that is slow to become clean is kept all the same
PATIENT: Final = {"pool_reset_timeout_ms": 9000}


def pid_of(client: RawClient) -> int:
    return int(client.query("SELECT pg_backend_pid()")[0][0] or 0)


def assert_ended(gpooler: Gpooler, count: int, reason: Reason) -> None:
    """Clients are gone when they have closed, too."""
    eventually(lambda: gpooler.route_count(ERROR_BASE + reason) == count)


def last_words(client: RawClient) -> dict[str, str]:
    """What a client is told before it is closed; nothing but that comes."""
    (answer,) = client.read_to_end()
    assert answer.kind == b"E"
    fields = answer.fields()
    assert fields["S"] == fields["V"] == "FATAL"
    return fields


def until_closed(client: RawClient, act: Callable[[], object]) -> None:
    """Do something again and again until that client is told goodbye."""

    def is_told() -> bool:
        act()
        client.socket.settimeout(0)
        try:
            return bool(client.read().kind == b"E")
        except BlockingIOError:
            return False
        finally:
            client.socket.settimeout(10)

    eventually(is_told, within=20)


class Late(Exception):
    """The test itself was held up for as long as the limit that it is not to reach."""


@contextmanager
def in_time(since: float, limit_s: float) -> Iterator[None]:
    """What fails here counts only if it was over ``limit_s`` after ``since``; else raises Late."""
    try:
        yield
    except (AssertionError, EOFError, OSError) as error:
        if time.monotonic() - since >= limit_s:
            raise Late from error
        raise


def undisturbed(attempt: Callable[[], None]) -> None:
    """Do it again as long as it is Late."""
    while True:
        try:
            return attempt()
        except Late:
            continue


@contextmanager
def servers_kept(gpooler: Gpooler, postgres: Postgres) -> Iterator[None]:
    """What ends a client does not end its server: there is the same one afterwards, free and clean."""
    before = [row.pid for row in postgres.activity()]
    yield
    eventually(lambda: gpooler.route_count(RouteWord.SERVERS_IDLE) == len(before))
    assert [row.pid for row in postgres.activity()] == before
    assert all(row.state == "idle" for row in postgres.activity())


# --- idle outside a transaction ---------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
def test_client_idle_timeout_closes_idle_clients_of_any_pool(
    postgres: Postgres, gpooler_factory: Factory, pool: str
) -> None:
    size = 2 if pool == "session" else 1
    gpooler = gpooler_factory(postgres, rule={"pool": pool, "pool_size": size, **PATIENT})
    with gpooler.raw() as client, gpooler.raw() as silent:
        client.login()
        client.query("SELECT 1")
        silent.login()
        gpooler.reload(rule={"client_idle_timeout": 1})
        with servers_kept(gpooler, postgres):
            for each in (client, silent):
                told = last_words(each)
                assert told["C"] == "57P05"
                assert "terminating connection due to idle-session timeout" in told["M"]
    assert_ended(gpooler, 2, Reason.CLIENT_IDLE)
    eventually(lambda: gpooler.log().count("client disconnected: client_idle,") == 2)


def test_pool_client_idle_timeout_closes_idle_clients_of_a_session_pool(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(
        postgres, rule={"pool": "session", "pool_size": 1, "client_idle_timeout": 60, **PATIENT}
    )
    with gpooler.raw() as client:
        client.login()
        client.query("SET work_mem = '5MB'")
        gpooler.reload(rule={"pool_client_idle_timeout": 1})
        with servers_kept(gpooler, postgres):
            told = last_words(client)
            assert told["C"] == "08006"
            assert "terminating connection due to client idle timeout" in told["M"]
    gpooler.reload(rule={"pool_client_idle_timeout": 0})
    with gpooler.raw() as client:
        client.login()
        assert client.query("SHOW work_mem") == [["4MB"]]


def test_a_pinned_client_may_be_idle_no_longer_than_others(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1, **PATIENT})
    with gpooler.raw() as client:
        client.login()
        client.query("LISTEN ear")
        gpooler.reload(rule={"client_idle_timeout": 1})
        with servers_kept(gpooler, postgres):
            assert last_words(client)["C"] == "57P05"


@pytest.mark.parametrize("pool", POOLS)
def test_one_that_asks_is_not_idle_whatever_it_asks(
    postgres: Postgres, gpooler_factory: Factory, pool: str
) -> None:
    """A lone Sync, which gpooler answers itself, counts as much as a query."""
    gpooler = gpooler_factory(postgres, rule={"pool": pool, "client_idle_timeout": 1})

    def ask() -> None:
        with gpooler.raw() as syncing, gpooler.raw() as asking:
            since = time.monotonic()
            syncing.login()
            asking.login()

            def act() -> None:
                nonlocal since
                began = time.monotonic()
                with in_time(since, 1):
                    syncing.send(SYNC)
                    assert syncing.read().kind == b"Z"
                    assert asking.query("SELECT 1") == [["1"]]
                since = began

            for _ in range(2):
                with gpooler.raw() as idle:
                    idle.login()
                    until_closed(idle, act)

    undisturbed(ask)


def test_who_runs_a_query_or_waits_for_a_server_is_not_idle(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(
        postgres, rule={"pool_size": 1, "client_idle_timeout": 1, "pool_idle_in_transaction_timeout": 1}
    )
    with gpooler.raw() as one, gpooler.raw() as two, gpooler.raw() as three:
        for client in (one, two, three):
            client.login()
        one.send(query("SELECT pg_sleep(3), 'done'"))
        two.send(query("BEGIN; SELECT pg_sleep(3), 'waited'"))
        three.send(parse("SELECT 'last'"), bind(), execute(), SYNC)
        assert one.rows() == [["", "done"]]
        assert two.rows() == [["", "waited"]]
        two.send(query("COMMIT"))
        two.read_until()
        assert three.rows() == [["last"]]
        for client in (one, two, three):
            last_words(client)


# --- idle in a transaction --------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["transaction", "session"])
@pytest.mark.parametrize("is_failed", [False, True], ids=["T", "E"])
def test_idle_in_transaction_is_rolled_back_and_its_server_used_again(
    postgres: Postgres, gpooler_factory: Factory, pool: str, is_failed: bool
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool": pool, "pool_size": 1, **PATIENT})
    with gpooler.raw() as client:
        client.login()
        client.query("BEGIN")
        client.query("CREATE TABLE never (n int)")
        if is_failed:
            with pytest.raises(ServerError, match="division by zero"):
                client.query("SELECT 1/0")
        gpooler.reload(rule={"pool_idle_in_transaction_timeout": 1})
        with servers_kept(gpooler, postgres):
            told = last_words(client)
            assert told["C"] == "25P03"
            assert "terminating connection due to idle-in-transaction timeout" in told["M"]
    with gpooler.raw() as client:
        client.login()
        assert client.query("SELECT to_regclass('never')") == [[None]]
    assert_ended(gpooler, 1, Reason.CLIENT_IDLE_IN_TRANSACTION)


def test_idle_in_transaction_with_pool_rollback_no_closes_the_server(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(
        postgres, rule={"pool_size": 1, "pool_rollback": False, "pool_idle_in_transaction_timeout": 1}
    )
    with gpooler.raw() as client, gpooler.raw() as other:
        client.login()
        client.query("BEGIN")
        pid = pid_of(client)
        assert last_words(client)["C"] == "25P03"
        assert pid_of(other.login()) != pid


def test_a_request_on_its_way_is_not_idle_in_transaction(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_idle_in_transaction_timeout": 1})
    request = query("SELECT 'whole'")
    with gpooler.raw() as client, gpooler.raw() as header, gpooler.raw() as idle, gpooler.raw() as later:
        for each, part in ((client, request[:9]), (header, request[:3]), (idle, b""), (later, b"")):
            each.login()
            each.send(query("BEGIN"), part)
            each.read_until()
        assert last_words(idle)["C"] == "25P03"
        assert last_words(later)["C"] == "25P03"
        with gpooler.raw() as last:
            last.login()
            last.query("BEGIN")
            assert last_words(last)["C"] == "25P03"
        client.send(request[9:])
        assert client.rows() == [["whole"]]
        header.send(request[3:])
        assert header.rows() == [["whole"]]


def test_idle_between_transactions_is_not_idle_in_one(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool": "session", "pool_idle_in_transaction_timeout": 1})
    with gpooler.raw() as client, gpooler.raw() as idle:
        client.login()
        client.query("BEGIN")
        client.query("COMMIT")
        idle.login()
        idle.query("BEGIN")
        assert last_words(idle)["C"] == "25P03"
        assert client.query("SELECT 1") == [["1"]]


# --- query_timeout ----------------------------------------------------------------------------

SIMPLE = (query("SELECT pg_sleep(60)"),)
EXTENDED = (parse("SELECT pg_sleep(60)"), bind(), execute(), SYNC)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("request_", [SIMPLE, EXTENDED], ids=["simple", "extended"])
def test_query_timeout_cancels_the_query_and_closes_the_client(
    postgres: Postgres, gpooler_factory: Factory, pool: str, request_: tuple[bytes, ...]
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool": pool, "pool_size": 1, "query_timeout": 1, **PATIENT})
    start = len(postgres.log())
    with gpooler.raw() as client:
        client.login()
        client.query("SELECT 1")
        client.send(*request_)
        with servers_kept(gpooler, postgres):
            told = [answer for answer in client.read_to_end() if answer.kind == b"E"]
            assert [each.fields()["C"] for each in told] == ["57014"]
            assert told[0].fields()["S"] == "FATAL"
            assert "terminating connection due to query timeout" in told[0].fields()["M"]
    assert "canceling statement due to user request" in postgres.log()[start:]
    assert_ended(gpooler, 1, Reason.CLIENT_QUERY_TIMEOUT)


def test_query_timeout_ends_a_copy_that_gets_no_data(postgres: Postgres, gpooler_factory: Factory) -> None:
    """It is no idle client that keeps a COPY waiting; the server cannot be used again."""
    gpooler = gpooler_factory(
        postgres,
        rule={"pool_size": 1, "query_timeout": 2},
    )
    with gpooler.raw() as client:
        client.login()
        client.query("BEGIN; CREATE TEMP TABLE t (n int)")
        client.send(query("COPY t FROM STDIN"))
        assert client.read().kind == b"G"
        gpooler.reload(rule={"pool_idle_in_transaction_timeout": 1, "client_idle_timeout": 1})
        assert last_words(client)["C"] == "57014"
    eventually(lambda: not postgres.activity())


def test_query_timeout_is_for_each_query_of_a_pipeline(postgres: Postgres, gpooler_factory: Factory) -> None:
    """All together they take longer than that, and one more look at the limits."""
    gpooler = gpooler_factory(postgres, rule={"query_timeout": 2})
    with gpooler.raw() as client:
        client.login()
        count = 35
        client.send(query("SELECT pg_sleep(0.1)") * count)
        for _ in range(count):
            assert client.rows() == [[""]]


def test_query_timeout_inside_a_long_answer_ends_the_client_and_keeps_the_others_whole(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    """A client that does not read: its answer is cut, wherever it stands, and its server comes back."""
    gpooler = gpooler_factory(
        postgres, rule={"pool_size": 1, "query_timeout": 1, "pool_reset_timeout_ms": 9000}
    )
    with gpooler.raw() as client, gpooler.raw() as other:
        client.login()
        client.send(query("SELECT repeat('x', 1000000) FROM generate_series(1, 100)"))
        assert client.read().kind == b"T"
        other.login()
        assert other.query("SELECT 'mine'") == [["mine"]]
        answers = client.read_to_end()
        assert b"Z" not in {answer.kind for answer in answers}
    assert_ended(gpooler, 1, Reason.CLIENT_QUERY_TIMEOUT)


def test_query_timeout_is_not_for_what_is_idle(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool": "session", "query_timeout": 1})
    with gpooler.raw() as client, gpooler.raw() as open_, gpooler.raw() as running:
        client.login()
        client.query("SELECT 1")
        open_.login()
        open_.query("BEGIN")
        open_.query("SELECT 1")
        for _ in range(2):
            with gpooler.raw() as running:
                running.login()
                running.send(*SIMPLE)
                assert last_words(running)["C"] == "57014"
        assert client.query("SELECT 2") == [["2"]]
        assert open_.query("SELECT 2") == [["2"]]


# --- transaction_timeout ----------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["transaction", "session"])
def test_transaction_timeout_ends_idle_running_and_busy_transactions(
    postgres: Postgres, gpooler_factory: Factory, pool: str
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool": pool, "pool_size": 3, **PATIENT})
    with gpooler.raw() as idle, gpooler.raw() as running, gpooler.raw() as busy:
        for client in (idle, running, busy):
            client.login()
            client.query("BEGIN")
        idle.query("CREATE TABLE never (n int)")
        running.send(query("SELECT pg_sleep(60)"))
        gpooler.reload(rule={"transaction_timeout": 2})
        with servers_kept(gpooler, postgres):
            last = b"Z"
            while last == b"Z":
                busy.send(query("SELECT 1"))
                last = next(kind for kind in iter(lambda: busy.read().kind, b"") if kind in b"ZE")
            assert last_words(idle)["C"] == "25P04"
            told = [answer for answer in running.read_to_end() if answer.kind == b"E"]
            assert [each.fields()["C"] for each in told] == ["25P04"]
            assert "terminating connection due to transaction timeout" in told[0].fields()["M"]
    assert_ended(gpooler, 3, Reason.CLIENT_TRANSACTION_TIMEOUT)
    assert postgres.query("SELECT to_regclass('never')", "app") == [(None,)]


def test_transaction_timeout_is_for_a_single_statement_too(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1, "transaction_timeout": 1, **PATIENT})
    with gpooler.raw() as client:
        client.login()
        client.query("SELECT 1")
        client.send(query("SELECT pg_sleep(60)"))
        with servers_kept(gpooler, postgres):
            told = [answer for answer in client.read_to_end() if answer.kind == b"E"]
            assert [each.fields()["C"] for each in told] == ["25P04"]


@pytest.mark.parametrize("pool", ["transaction", "session"])
def test_many_short_transactions_are_not_a_long_one(
    postgres: Postgres, gpooler_factory: Factory, pool: str
) -> None:
    """Nor is a transaction older than it is because its client was idle before."""
    gpooler = gpooler_factory(postgres, rule={"pool": pool, "transaction_timeout": 2})

    def work() -> None:
        with gpooler.raw() as client, gpooler.raw() as resting:
            client.login()
            resting.login()
            resting.query("LISTEN ear")

            def act() -> None:
                with in_time(time.monotonic(), 2):
                    client.query("BEGIN")
                    client.query("SELECT 1")
                    client.query("COMMIT")

            for _ in range(2):
                with gpooler.raw() as long:
                    long.login()
                    long.query("BEGIN")
                    until_closed(long, act)
            with in_time(time.monotonic(), 2):
                resting.query("BEGIN")
                with gpooler.raw() as long:
                    long.login()
                    long.send(query("SELECT pg_sleep(1.2)"))
                    long.read_until()
                assert resting.query("SELECT 1") == [["1"]]

    undisturbed(work)


# --- notices for those who wait ---------------------------------------------------------------


def kinds(answers: list[Message]) -> list[bytes]:
    return [answer.kind for answer in answers]


def busy_pool(factory: Factory, postgres: Postgres, **rule: Any) -> Gpooler:
    return factory(postgres, rule={"pool_size": 1, "pool_notice_after_waiting_ms": 100, **rule})


def test_one_that_waits_for_long_is_told_so_and_how_long_it_was(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = busy_pool(gpooler_factory, postgres)
    with gpooler.raw() as one, gpooler.raw() as two, gpooler.raw() as three:
        for client in (one, two, three):
            client.login()
        one.query("BEGIN")
        two.send(query("SELECT 'two'"))
        three.send(parse("SELECT 'three'"), bind(), execute(), SYNC)
        for client in (two, three):
            notice = client.read()
            assert notice.kind == b"N"
            fields = notice.fields()
            assert (fields["S"], fields["V"], fields["C"]) == ("NOTICE", "NOTICE", "00000")
            assert fields["M"] == "gpooler: waiting for a server"
        one.send(query("COMMIT"))
        assert kinds(one.read_until()) == [b"C", b"Z"]
        for client, expected in ((two, b"TDCZ"), (three, b"12DCZ")):
            first, *answers = client.read_until()
            assert first.kind == b"N"
            words = first.fields()["M"].split()
            assert words[:2] + words[3:] == ["gpooler:", "waited", "ms", "for", "a", "server"]
            assert int(words[2]) >= 100
            assert b"".join(kinds(answers)) == expected
        # at once, so without a word
        two.send(query("SELECT 1"))
        assert kinds(two.read_until()) == [b"T", b"D", b"C", b"Z"]


def test_libpq_takes_the_notices(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = busy_pool(gpooler_factory, postgres, pool_notice_after_waiting_ms=0)
    heard: list[str] = []
    with gpooler.raw() as one, gpooler.connect() as connection:
        one.login()
        connection.add_notice_handler(lambda diagnostic: heard.append(diagnostic.message_primary or ""))
        one.query("BEGIN")
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(connection.execute, "SELECT 'mine'")
            try:
                eventually(lambda: heard)
            finally:
                one.query("COMMIT")
            assert asked.result().fetchone() == ("mine",)
    assert len(heard) == 2
    assert heard[0] == "gpooler: waiting for a server"
    assert heard[1].startswith("gpooler: waited ")


def test_a_client_in_its_login_waits_without_a_notice(postgres: Postgres, gpooler_factory: Factory) -> None:
    """Its startup parameters have to be tried on a server first, and there is none for it yet."""
    gpooler = busy_pool(gpooler_factory, postgres)
    with gpooler.raw() as one, gpooler.raw() as new, gpooler.raw() as witness:
        one.login()
        witness.login()
        one.query("BEGIN")
        new.send(startup("trust_user", "app", TimeZone="Asia/Tokyo"))
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
        witness.send(query("SELECT 1"))
        assert witness.read().kind == b"N"
        one.query("COMMIT")
        answers = new.read_until()
        assert answers[0].kind == b"R"
        assert b"N" not in kinds(answers)
        assert new.query("SHOW TimeZone") == [["Asia/Tokyo"]]


def test_one_that_gives_up_or_is_cancelled_is_not_told_that_it_has_a_server(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = busy_pool(gpooler_factory, postgres)
    with gpooler.raw() as one, gpooler.raw() as two:
        one.login()
        two.login()
        one.query("BEGIN")
        gpooler.reload(rule={"pool_timeout": 400})
        two.send(query("SELECT 2"))
        notice, error = two.read_to_end()
        assert notice.fields()["M"] == "gpooler: waiting for a server"
        assert error.fields()["C"] == "53300"
    gpooler = busy_pool(gpooler_factory, postgres)
    with gpooler.connect() as connection, gpooler.raw() as one:
        heard: list[str] = []
        connection.add_notice_handler(lambda diagnostic: heard.append(diagnostic.message_primary or ""))
        one.login()
        with gpooler.raw() as two:
            two.login()
            one.query("BEGIN")
            two.send(query("SELECT 2"))
            assert two.read().kind == b"N"
            two.terminate()
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 0)
        one.query("COMMIT")
        assert connection.execute("SELECT 1").fetchone() == (1,)
        assert heard == []
