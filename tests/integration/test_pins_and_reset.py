"""Session state pins a server to its client, and is gone before the next client comes."""

import select
import struct
from collections.abc import Callable

import pytest

from gpooler.reasons import Reason
from gpooler.routing.route import SMART_DISCARD
from gpooler.stats.registry import ERROR_BASE, RouteWord
from tests.harness import Gpooler, Postgres, RawClient, eventually
from tests.harness.client import SYNC, ServerError, bind, describe, execute, message, parse, query

Factory = Callable[..., Gpooler]

# what a client does, and what the next one on that server must not find
STATES = {
    "setting of any name": (
        "UPDATE pg_settings SET setting = '5MB' WHERE name = 'work_mem'",
        "SELECT setting FROM pg_settings WHERE name = 'work_mem'",
        "4096",
    ),
    "prepare": ("PREPARE p AS SELECT 1", "SELECT count(*) FROM pg_prepared_statements", "0"),
    "listen": ("LISTEN ear", "SELECT count(*) FROM pg_listening_channels()", "0"),
    "table": (
        "CREATE TEMPORARY TABLE tt (n int)",
        "SELECT count(*) FROM pg_class WHERE relname = 'tt'",
        "0",
    ),
    "into": ("SELECT 1 AS n INTO TEMP tt", "SELECT count(*) FROM pg_class WHERE relname = 'tt'", "0"),
    "sequence": ("CREATE TEMP SEQUENCE ts", "SELECT count(*) FROM pg_class WHERE relname = 'ts'", "0"),
    "lock": (
        "SELECT pg_advisory_lock(42)",
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'",
        "0",
    ),
    "cursor": (
        "DECLARE c CURSOR WITH HOLD FOR SELECT 1",
        "SELECT count(*) FROM pg_cursors WHERE name = 'c'",
        "0",
    ),
    "in a block": ("BEGIN; LISTEN ear; COMMIT", "SELECT count(*) FROM pg_listening_channels()", "0"),
    "second": ("SELECT 1; LISTEN ear", "SELECT count(*) FROM pg_listening_channels()", "0"),
}


def pid_of(client: RawClient) -> int:
    return int(client.query("SELECT pg_backend_pid()")[0][0] or 0)


def test_every_kind_of_state_pins_and_is_discarded(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 2})
    with gpooler.raw() as other:
        other.login()
        for pins, (make, look, clean) in enumerate(STATES.values(), 1):
            with gpooler.raw() as client:
                client.login()
                client.query(make)
                pid = pid_of(client)
                assert pid_of(client) == pid
                assert gpooler.route_count(RouteWord.PINS) == pins, make
                assert client.query(look) != [[clean]], make
                # others are not disturbed by a pinned server
                assert pid_of(other) != pid
                client.terminate()
            # the only clean way back is through the pool
            eventually(lambda: gpooler.route_count(RouteWord.SERVERS_IDLE) == 2)
            with gpooler.raw() as one, gpooler.raw() as two:
                one.login()
                two.login()
                one.query("BEGIN")
                two.query("BEGIN")
                assert pid in (pid_of(one), pid_of(two))
                assert one.query(look) == two.query(look) == [[clean]], make


def test_a_named_statement_pins_and_is_gone_afterwards(postgres: Postgres, gpooler_factory: Factory) -> None:
    """Where they do not go with their client (``test_prepared.py``)."""
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1, "pool_reserve_prepared_statement": False})
    with gpooler.raw() as client:
        client.login()
        client.send(parse("SELECT $1::int + 1", "adder"), describe("S", "adder"), SYNC)
        client.read_until()
        for number in range(5):
            client.send(bind("adder", (str(number).encode(),)), execute(), SYNC)
            assert client.rows() == [[str(number + 1)]]
        client.terminate()
    with gpooler.raw() as client:
        client.login()
        assert client.query("SELECT count(*) FROM pg_prepared_statements") == [["0"]]
        # the same name again is no clash
        client.send(parse("SELECT 'mine'", "adder"), bind("adder"), execute(), SYNC)
        assert client.rows() == [["mine"]]


def test_an_unnamed_statement_pins_nothing(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    with gpooler.raw() as one, gpooler.raw() as two:
        one.login()
        two.login()
        for number in range(5):
            for client in (one, two):
                client.send(parse("SELECT $1::int"), bind(values=(str(number).encode(),)), execute(), SYNC)
                assert client.rows() == [[str(number)]]
    assert gpooler.route_count(RouteWord.PINS) == 0
    assert gpooler.route_count(RouteWord.RESETS) == 0


def test_pins_are_logged(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    with gpooler.raw() as client:
        client.login()
        client.query("LISTEN ear")
        eventually(lambda: "server pinned to its client by session state (LISTEN)" in gpooler.log())


def test_a_listening_client_hears_at_once(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 2})
    with gpooler.raw() as listener, gpooler.raw() as speaker:
        listener.login()
        speaker.login()
        listener.query("LISTEN ear")
        pid = pid_of(listener)
        for number in range(5):
            speaker.query(f"NOTIFY ear, 'call {number}'")
            answer = listener.read()
            assert answer.kind == b"A"
            assert answer.body[4:] == f"ear\0call {number}\0".encode()
        assert pid_of(listener) == pid
        assert not select.select([speaker.socket], [], [], 0)[0]


def test_a_notification_is_no_business_of_the_next_client(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    with gpooler.raw() as listener:
        listener.login()
        listener.query("LISTEN ear")
        listener.terminate()
    with gpooler.raw() as client:
        client.login()
        client.query("SELECT 1")
        postgres.query("NOTIFY ear", "app")
        client.send(query("SELECT 2"))
        assert [answer.kind for answer in client.read_until()] == [b"T", b"D", b"C", b"Z"]


def test_a_rolled_back_set_is_not_seen_by_others(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    with gpooler.raw() as client:
        client.login()
        client.query("BEGIN")
        client.query("SET work_mem = '5MB'")
        client.query("ROLLBACK")
        assert client.query("SHOW work_mem") == [["4MB"]]
    with gpooler.raw() as client:
        client.login()
        assert client.query("SHOW work_mem") == [["4MB"]]


def log_of(postgres: Postgres, action: Callable[[], None]) -> str:
    """What PostgreSQL logs of the statements while ``action`` runs."""
    postgres.query("ALTER SYSTEM SET log_statement = 'all'")
    postgres.query("SELECT pg_reload_conf()")
    eventually(lambda: postgres.query("SHOW log_statement") == [("all",)])
    start = len(postgres.log())
    try:
        action()
    finally:
        postgres.query("ALTER SYSTEM RESET log_statement")
        postgres.query("SELECT pg_reload_conf()")
    return postgres.log()[start:]


@pytest.mark.parametrize(("discard", "clean", "dirty"), [(None, 0, 1), (True, 1, 1), (False, 0, 0)])
def test_pool_discard_says_when_to_discard(
    postgres: Postgres, gpooler_factory: Factory, discard: bool | None, clean: int, dirty: int
) -> None:
    rule = {"pool_size": 1} if discard is None else {"pool_size": 1, "pool_discard": discard}
    gpooler = gpooler_factory(postgres, rule=rule)
    if discard is False:
        gpooler.may_be_dirty = "nothing is discarded"

    def act() -> None:
        with gpooler.raw() as client:
            client.login()
            assert client.query("SELECT 'clean'") == [["clean"]]
            eventually(lambda: gpooler.route_count(RouteWord.SERVERS_IDLE) == 1)
            before = gpooler.route_count(RouteWord.RESETS)
            client.query("SELECT 'clean'")
            eventually(lambda: gpooler.route_count(RouteWord.RESETS) - before == clean)
            eventually(lambda: gpooler.route_count(RouteWord.SERVERS_IDLE) == 1)
            before = gpooler.route_count(RouteWord.RESETS)
            client.query("LISTEN ear")
            client.terminate()
            eventually(lambda: gpooler.route_count(RouteWord.SERVERS_IDLE) == 1)
            assert gpooler.route_count(RouteWord.RESETS) - before == dirty

    log = log_of(postgres, act)
    assert ("DISCARD ALL" in log) == bool(clean or dirty)
    with gpooler.raw() as client:
        client.login()
        heard = [["ear"]] if discard is False else []
        assert client.query("SELECT pg_listening_channels()") == heard


def test_pool_cancel_no_lets_the_query_end_and_closes_the_server(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    """The slot is free when PostgreSQL's process is gone, not when we closed."""
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1, "pool_cancel": False})
    start = len(postgres.log())
    with postgres.locked():
        with gpooler.raw() as client:
            client.login()
            client.send(query("SELECT pg_advisory_xact_lock(1)"))
            eventually(lambda: [row.state for row in postgres.activity()] == ["active"])
            (row,) = postgres.activity()
        eventually(lambda: gpooler.route_count(RouteWord.SERVERS_CLOSING) == 1)
    with gpooler.raw() as client:
        client.login()
        assert pid_of(client) != row.pid
        assert len(postgres.activity()) == 1
    assert "canceling statement" not in postgres.log()[start:]


def test_pool_rollback_no_closes_the_server(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1, "pool_rollback": False})
    with gpooler.raw() as client:
        client.login()
        client.query("BEGIN")
        pid = pid_of(client)
    with gpooler.raw() as client:
        client.login()
        assert pid_of(client) != pid
        assert len(postgres.activity()) == 1


def test_a_reset_that_takes_too_long_ends_the_server(postgres: Postgres, gpooler_factory: Factory) -> None:
    """PostgreSQL is frozen in the middle: the server is closed and counted until its process is gone."""
    gpooler = gpooler_factory(
        postgres, rule={"pool_size": 1, "pool_reset_timeout_ms": 200, "pool_timeout": 10_000}
    )
    with gpooler.raw() as client:
        client.login()
        client.query("BEGIN")
        pid = pid_of(client)
        postgres.freeze(pid)
        client.close()
    with gpooler.raw() as client:
        try:
            eventually(lambda: gpooler.route_count(RouteWord.SERVERS_CLOSING) == 1)
            client.login()
            client.send(query("SELECT pg_backend_pid()"))
            eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
            assert [row.pid for row in postgres.activity()] == [pid]
        finally:
            postgres.thaw(pid)
        assert client.rows() != [[str(pid)]]


def test_what_code_does_inside_the_server_is_discarded(postgres: Postgres, gpooler_factory: Factory) -> None:
    """Nobody sees into DO, CALL or a function called by its number: the server is cleaned after them."""
    oid = int(postgres.query("SELECT 'set_config'::regproc::oid")[0][0])
    arguments = b"".join(struct.pack("!i", len(part)) + part for part in (b"work_mem", b"9MB", b"f"))
    call = message(b"F", struct.pack("!ihh", oid, 0, 3) + arguments + struct.pack("!h", 0))
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    postgres.query(
        "CREATE PROCEDURE fill() LANGUAGE plpgsql AS $$BEGIN SET work_mem = '9MB'; END$$", dbname="app"
    )
    requests = [query("DO $$BEGIN SET work_mem = '9MB'; END$$"), query("CALL fill()"), call]
    requests.append(parse("CALL fill()") + bind() + execute() + SYNC)
    try:
        with gpooler.raw().login() as one, gpooler.raw().login() as two:
            for request in requests:
                one.send(request)
                one.read_until()
                assert two.query("SHOW work_mem") == [["4MB"]]
            assert gpooler.route_count(RouteWord.PINS) == 0
    finally:
        postgres.query("DROP PROCEDURE fill", dbname="app")


# --- what else a server can be reset with -----------------------------------------------------


def resetting(factory: Factory, postgres: Postgres, sql: str, **rule: object) -> Gpooler:
    """One server, which is reset with that query."""
    return factory(postgres, rule={"pool_size": 1, "pool_discard_query": sql, **rule})


def leave(gpooler: Gpooler, *statements: str, **login: str) -> int:
    """A client that does so and goes; the process id of its server, which is parked again or gone."""
    with gpooler.raw() as client:
        client.login(**login)
        pid = pid_of(client)
        for sql in statements:
            client.query(sql)
        client.terminate()
    return pid


def test_smart_discard_undoes_all_but_prepared_statements(
    any_postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = resetting(gpooler_factory, any_postgres, SMART_DISCARD)
    pids = set()
    for make, look, clean in STATES.values():  # (SQL's own statements are no client's in common)
        # the reset has to work whatever the session is made to be
        pids.add(leave(gpooler, "SET default_transaction_read_only = on", "LISTEN x"))
        pids.add(leave(gpooler, make))
        with gpooler.raw() as client:
            client.login()
            pids.add(pid_of(client))
            assert client.query(look) == [[clean]], make
            assert client.query("SELECT count(*) FROM pg_listening_channels()") == [["0"]]
            assert client.query("SHOW default_transaction_read_only") == [["off"]]
    assert len(pids) == 1


def test_smart_discard_forgets_sequences_and_who_the_session_was(
    any_postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = resetting(gpooler_factory, any_postgres, SMART_DISCARD, storage_user="postgres")
    any_postgres.query("CREATE SEQUENCE counted", "app")
    try:
        make = (
            "SELECT nextval('counted')",
            "SET SESSION AUTHORIZATION trust_user",
            "SET ROLE pg_read_all_stats",
        )
        pid = leave(gpooler, make[0], "LISTEN x")
        with gpooler.raw() as client:
            client.login()
            with pytest.raises(ServerError, match="lastval is not yet defined"):
                client.query("SELECT lastval()")
            client.terminate()
        leave(gpooler, *make[1:])
        with gpooler.raw() as client:
            client.login()
            sql = "SELECT session_user, current_user, current_setting('role')"
            assert client.query(sql) == [["postgres", "postgres", "none"]]
            assert pid_of(client) == pid
    finally:
        any_postgres.query("DROP SEQUENCE counted", "app")


def test_smart_discard_calls_postgresqls_function_and_no_other(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    """One of the same name before it in search_path, where a role has such a default, is not called."""
    gpooler = resetting(gpooler_factory, postgres, SMART_DISCARD)
    postgres.query(
        "CREATE SCHEMA trap; CREATE FUNCTION trap.pg_advisory_unlock_all() RETURNS void LANGUAGE plpgsql "
        "AS $$BEGIN RAISE EXCEPTION 'trapped'; END$$; GRANT USAGE ON SCHEMA trap TO PUBLIC; "
        "ALTER ROLE trust_user SET search_path = trap, pg_catalog",
        "app",
    )
    try:
        pid = leave(gpooler, "SELECT pg_catalog.pg_advisory_lock(42)")
        with gpooler.raw() as client:
            client.login()
            assert pid_of(client) == pid
            assert client.query("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == [["0"]]
    finally:
        postgres.query("ALTER ROLE trust_user RESET search_path; DROP SCHEMA trap CASCADE", "app")


@pytest.mark.parametrize("pool", ["transaction", "session"])
@pytest.mark.parametrize("discard", [None, True, False])
def test_pool_discard_query_takes_the_place_of_discard_all(
    postgres: Postgres, gpooler_factory: Factory, discard: bool | None, pool: str
) -> None:
    sql = f"UNLISTEN *; /* {'long' * 15_000} */ SELECT 'own reset'"
    rule: dict[str, object] = {"pool": pool} if discard is None else {"pool": pool, "pool_discard": discard}
    gpooler = resetting(gpooler_factory, postgres, sql, **rule)
    gpooler.may_be_dirty = "the query leaves a lock"

    def act() -> None:
        pid = leave(gpooler, "LISTEN ear", "SELECT pg_advisory_lock(7)")
        with gpooler.raw() as client:
            client.login()
            assert pid_of(client) == pid
            assert client.query("SELECT count(*) FROM pg_listening_channels()") == [["0"]]
            # what the query leaves stays
            assert client.query("SELECT objid FROM pg_locks WHERE locktype = 'advisory'") == [["7"]]
            client.terminate()
        eventually(lambda: gpooler.route_count(RouteWord.SERVERS_IDLE) == 1)

    log = log_of(postgres, act)
    assert "own reset" in log
    assert "DISCARD ALL" not in log


@pytest.mark.parametrize("sql", ["SELECT 1/0", "UNLISTEN *; BEGIN", "no sql"])
def test_a_discard_query_that_fails_or_leaves_a_transaction_open_ends_the_server(
    postgres: Postgres, gpooler_factory: Factory, sql: str
) -> None:
    gpooler = resetting(gpooler_factory, postgres, sql)
    pid = leave(gpooler, "LISTEN ear")
    with gpooler.raw() as client:
        client.login()
        assert pid_of(client) != pid
        assert client.query("SELECT count(*) FROM pg_listening_channels()") == [["0"]]
    assert gpooler.route_count(ERROR_BASE + Reason.SERVER_RESET_FAILED) == 1


def test_a_discard_query_that_never_ends_ends_the_server(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = resetting(gpooler_factory, postgres, "COPY pg_temp.t FROM STDIN", pool_reset_timeout_ms=300)
    pid = leave(gpooler, "CREATE TEMP TABLE t (n int)")
    with gpooler.raw() as client:
        client.login()
        assert pid_of(client) != pid
    assert gpooler.route_count(ERROR_BASE + Reason.SERVER_RESET_TIMEOUT) == 1


@pytest.mark.parametrize("sql", ["SELECT 1", "RESET ALL", "DISCARD ALL"])
def test_startup_parameters_follow_the_client_whatever_the_discard_query_does(
    postgres: Postgres, gpooler_factory: Factory, sql: str
) -> None:
    """PostgreSQL does not report search_path: nobody can know whether the query has reset it."""
    gpooler = resetting(gpooler_factory, postgres, sql, pool_reserve_prepared_statement=sql != "DISCARD ALL")
    gpooler.may_be_dirty = "" if sql == "DISCARD ALL" else "the query leaves channels"
    pid = leave(gpooler, "LISTEN ear", search_path="elsewhere", TimeZone="Asia/Tokyo")
    for search_path, zone in (("", ""), ("elsewhere", "Asia/Tokyo"), ("other", "UTC"), ("", "")):
        given = {"search_path": search_path, "TimeZone": zone} if search_path else {}
        with gpooler.raw() as client:
            client.login(**given)
            assert pid_of(client) == pid
            assert client.query("SHOW search_path") == [[search_path or '"$user", public']]
            assert client.query("SHOW TimeZone") == [[zone or "UTC"]]
            client.query("LISTEN ear")
            client.terminate()


# --- cached plans -----------------------------------------------------------------------------


@pytest.mark.parametrize("drops", [None, True, False])
@pytest.mark.parametrize("pool", ["transaction", "session"])
def test_a_server_with_an_old_plan_is_closed_when_its_client_leaves_it(
    any_postgres: Postgres, gpooler_factory: Factory, drops: bool | None, pool: str
) -> None:
    rule = {
        "pool": pool,
        "pool_size": 1,
        "server_drop_on_cached_plan_error": drops,
        "pool_reserve_prepared_statement": False,
    }
    gpooler = gpooler_factory(any_postgres, rule=rule)
    any_postgres.query("CREATE TABLE planned (n int); GRANT ALL ON planned TO PUBLIC", "app")
    try:
        with gpooler.raw() as client:
            client.login()
            pid = pid_of(client)
            client.send(parse("SELECT * FROM planned", "p"), bind("p"), execute(), SYNC)
            assert client.rows() == []
            any_postgres.query("ALTER TABLE planned ADD COLUMN m int", "app")
            client.send(bind("p"), execute(), SYNC)
            with pytest.raises(ServerError, match="cached plan must not change result type"):
                client.rows()
            # not before
            assert pid_of(client) == pid
            client.terminate()
        with gpooler.raw() as client:
            client.login()
            assert (pid_of(client) == pid) == (drops is False)
    finally:
        any_postgres.query("DROP TABLE planned", "app")
    assert gpooler.route_count(ERROR_BASE + Reason.SERVER_OLD_PLAN) == (drops is not False)


def test_other_errors_do_not_close_the_server(postgres: Postgres, gpooler_factory: Factory) -> None:
    """Neither another 0A000, nor the same words with another SQLSTATE or elsewhere."""
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    text = "cached plan must not change result type"
    failing = [
        "SELECT count(*) FOR UPDATE",
        f"DO $$BEGIN RAISE EXCEPTION '{text}'; END$$",
        f"DO $$BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '0A000', DETAIL = '{text}'; END$$",
        "SELECT 1/0",
    ]
    with gpooler.raw() as client:
        client.login()
        pid = pid_of(client)
        for sql in failing:
            with pytest.raises(ServerError):
                client.query(sql)
            eventually(lambda: gpooler.route_count(RouteWord.SERVERS_IDLE) == 1)
        assert pid_of(client) == pid


@pytest.mark.parametrize("size", [100, 20_000, 500_000])
def test_an_error_of_any_length_is_passed_on_whole(
    postgres: Postgres, gpooler_factory: Factory, size: int
) -> None:
    """One that fits is looked at before it is passed on, one that does not as far as it has come."""
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    with gpooler.raw() as client:
        client.login()
        sql = "DO $$BEGIN RAISE EXCEPTION '%', repeat('x', {}) USING ERRCODE = '0A000'; END$$"
        for _ in range(2):
            with pytest.raises(ServerError) as caught:
                client.query(sql.format(size))
            assert caught.value.text == "x" * size
            assert client.query("SELECT 1") == [["1"]]
