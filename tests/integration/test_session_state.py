"""What a client changes of its session by SQL is its own, on whichever server it is."""

from collections.abc import Callable
from contextlib import ExitStack

import pytest

from gpooler.stats.registry import RouteWord
from tests.harness import Gpooler, Postgres, RawClient
from tests.harness.client import SYNC, bind, execute, parse, query

Factory = Callable[..., Gpooler]
Send = Callable[[str], bytes]


@pytest.fixture
def pool(postgres: Postgres, gpooler_factory: Factory) -> Gpooler:
    return gpooler_factory(postgres, rule={"pool_size": 2})


def extended(sql: str) -> bytes:
    """The statement as drivers send it that know one way only."""
    return parse(sql) + bind() + execute() + SYNC


@pytest.fixture(params=["simple", "extended"])
def send(request: pytest.FixtureRequest) -> Send:
    return query if request.param == "simple" else extended


def tags(client: RawClient) -> list[str]:
    """The tags of the commands up to the next ReadyForQuery; SQLSTATEs of errors."""
    result = []
    for message in client.read_until():
        if message.kind == b"C":
            result.append(message.tag())
        elif message.kind == b"E":
            result.append(message.fields()["C"])
    return result


def told(client: RawClient) -> dict[str, str]:
    """What ParameterStatus messages say up to the next ReadyForQuery."""
    bodies = [message.body for message in client.read_until() if message.kind == b"S"]
    pairs = [body.decode().split("\0") for body in bodies]
    return {pair[0]: pair[1] for pair in pairs}


CHANGES = {
    "a setting": ("SET statement_timeout = '7s'", "current_setting('statement_timeout')", "7s", "0"),
    "set_config": (
        "SELECT set_config('work_mem', '5MB', false)",
        "current_setting('work_mem')",
        "5MB",
        "4MB",
    ),
    "a list": (
        "SET search_path = a, \"b c\", 'd'",
        "current_setting('search_path')",
        'a, "b c", d',
        '"$user", public',
    ),
    "a role": ("SET ROLE pg_read_all_stats", "current_user::text", "pg_read_all_stats", "trust_user"),
    "one of its own": ("SET my.thing TO 'it''s'", "current_setting('my.thing', true)", "it's", None),
    "a reported one": ("SET TimeZone = 'Asia/Tokyo'", "current_setting('TimeZone')", "Asia/Tokyo", "GMT"),
    "time zone": ("SET TIME ZONE 'Asia/Tokyo'", "current_setting('TimeZone')", "Asia/Tokyo", "GMT"),
    "characteristics": (
        "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",
        "current_setting('transaction_isolation')",
        "serializable",
        "read committed",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_setting_goes_with_its_client_and_to_nobody_else(pool: Gpooler, send: Send, change: str) -> None:
    sql, look, mine, common = CHANGES[change]
    with pool.raw().login() as one, pool.raw().login() as two:
        if look == "current_setting('TimeZone')":
            common = two.query("SHOW TimeZone")[0][0]
        one.send(send(sql))
        assert len(tags(one)) == 1
        with pool.raw().login() as holder:
            for _ in range(2):
                holder.query("BEGIN")
                kept = holder.query("SELECT pg_backend_pid()")[0][0]
                for client, value in ((one, mine), (two, common), (one, mine)):
                    row = client.query(f"SELECT {look}, pg_backend_pid()")[0]
                    assert row[0] == value or not (row[0] or value), change
                    assert row[1] != kept
                with pool.raw().login() as other:  # the other server is held next
                    other.query("BEGIN")
                    holder.query("COMMIT")
                    for client, value in ((two, common), (one, mine)):
                        row = client.query(f"SELECT {look}, pg_backend_pid()")[0]
                        assert row[0] == value or not (row[0] or value), change
                        assert row[1] == kept
                    other.query("COMMIT")
    assert pool.route_count(RouteWord.PINS) == 0


@pytest.mark.parametrize(
    "program",
    [
        ["BEGIN", "SET LOCAL work_mem = '5MB'", "COMMIT"],
        ["BEGIN", "SET work_mem = '5MB'", "ROLLBACK"],
        ["BEGIN", "SAVEPOINT a", "SET work_mem = '5MB'", "ROLLBACK TO a", "COMMIT"],
        ["BEGIN", "SET work_mem = '5MB'", "SELECT 1/0", "COMMIT"],
        ["SET work_mem = '5MB'; SELECT 1/0"],
        ["SET work_mem = '5MB'", "RESET work_mem"],
        ["SET work_mem = '5MB'; RESET ALL"],
        ["SET work_mem = '5MB'", "SET work_mem TO DEFAULT"],
        ["SET work_mem = '5MB'", "DISCARD ALL"],
        ["BEGIN", "SET work_mem = '5MB'", "RESET ALL", "COMMIT"],
        ["SET work_mem = 'nonsense'"],
        ["SELECT set_config('work_mem', '5MB', true)"],
    ],
)
def test_what_does_not_last_is_not_kept(pool: Gpooler, send: Send, program: list[str]) -> None:
    with pool.raw().login() as client, pool.raw().login() as other:
        for sql in program:
            client.send(query(sql) if ";" in sql else send(sql))
            tags(client)
        with pool.raw().login() as holder:
            holder.query("BEGIN")
            assert client.query("SHOW work_mem") == other.query("SHOW work_mem") == [["4MB"]]
        assert client.query("SHOW work_mem") == [["4MB"]]
    assert pool.route_count(RouteWord.PINS) == 0


RESETS = ["RESET ALL", "RESET work_mem", "SET work_mem TO DEFAULT", "DISCARD ALL"]


@pytest.mark.parametrize("mode", ["session", "transaction"])
@pytest.mark.parametrize("sql", RESETS)
def test_a_reset_leads_back_to_the_client_s_own_start(
    postgres: Postgres, gpooler_factory: Factory, send: Send, mode: str, sql: str
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 2, "pool": mode})
    with gpooler.raw() as client:
        client.login(options="-c work_mem=6MB")
        for _ in range(2):
            client.query("SET work_mem = '5MB'")
            client.send(send(sql))
            assert len(tags(client)) == 1
            assert client.query("SHOW work_mem") == [["6MB"]]
    assert gpooler.route_count(RouteWord.PINS) == 0


def test_a_reset_in_a_transaction(pool: Gpooler, send: Send) -> None:
    with pool.raw() as client:
        client.login(options="-c work_mem=6MB")
        client.query("SET work_mem = '5MB'")
        for end, left in (("ROLLBACK", "5MB"), ("COMMIT", "6MB")):
            client.query("BEGIN")
            client.send(send("RESET work_mem"))
            assert tags(client) == ["RESET"]
            assert client.query("SHOW work_mem") == [["6MB"]]
            client.query(end)
            assert client.query("SHOW work_mem") == [[left]]
    assert pool.route_count(RouteWord.PINS) == 0


@pytest.mark.parametrize("mode", ["session", "transaction"])
@pytest.mark.parametrize("sql", ["RESET ALL", "RESET TimeZone", "RESET TIME ZONE", "DISCARD ALL"])
def test_a_reset_tells_the_client_its_own_values(
    postgres: Postgres, gpooler_factory: Factory, send: Send, mode: str, sql: str
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 2, "pool": mode})
    with gpooler.raw() as client:
        client.login(TimeZone="Asia/Tokyo")
        client.send(send("SET TimeZone = 'Europe/Rome'"))
        assert told(client) == {"TimeZone": "Europe/Rome"}
        client.send(send(sql))
        assert told(client) == {"TimeZone": "Asia/Tokyo"}
        assert client.query("SHOW TimeZone") == [["Asia/Tokyo"]]
        client.send(send(sql))
        assert told(client) == {}
        client.send(query("SHOW TimeZone"))
        assert told(client) == {}
        client.send(query("RESET ALL; SET TimeZone = 'Europe/Rome'"))
        assert told(client) == {"TimeZone": "Europe/Rome"}
        assert client.query("SHOW TimeZone") == [["Europe/Rome"]]


def test_more_changes_in_one_write_than_fit_one_send(pool: Gpooler, send: Send) -> None:
    with pool.raw().login() as client:
        client.send(b"".join(send(f"SET my.thing = '{n}'") for n in range(300)))
        assert [tags(client) for _ in range(300)] == [["SET"]] * 300
        with pool.raw().login() as holder:
            holder.query("BEGIN")
            assert client.query("SHOW my.thing") == [["299"]]
        assert pool.route_count(RouteWord.PINS) == 0
        client.send(b"".join(send(f"SET my.thing{n} = '{n}'") for n in range(300)))
        assert [tags(client) for _ in range(300)] == [["SET"]] * 300
        assert pool.route_count(RouteWord.PINS) == 1  # too many to follow
        assert client.query("SHOW my.thing7") == [["7"]]


def test_a_client_that_leaves_in_the_middle_harms_nobody(pool: Gpooler, postgres: Postgres) -> None:
    with pool.raw().login() as client:
        client.query("CREATE TABLE IF NOT EXISTS left_behind (a int)")
    for n in range(20):
        with pool.raw().login() as client, pool.raw().login() as other:
            client.send(parse("SELECT * FROM left_behind", "all") + bind("all") + execute() + SYNC)
            client.read_until()
            other.query(f"ALTER TABLE left_behind ADD b{n} int")
            client.send(bind("all") + execute() + SYNC + query("SET work_mem = '5MB'; RESET ALL") * (n % 3))
            client.reset() if n % 2 else client.close()
            for _ in range(3):
                assert other.query("SELECT 'mine', current_setting('work_mem')") == [["mine", "4MB"]]
    with pool.raw().login() as client:
        client.query("DROP TABLE left_behind")


# --- prepared statements by SQL -----------------------------------------------------------------------


def define(client: RawClient, *names: str) -> None:
    client.send(b"".join(parse(f"SELECT '{name}'", name) for name in names) + SYNC)
    tags(client)


def value(client: RawClient, name: str) -> str | None:
    """What a statement of the protocol gives, or the SQLSTATE."""
    client.send(bind(name) + execute() + SYNC)
    for message in client.read_until():
        if message.kind == b"D":
            result = message.values()[0]
        elif message.kind == b"E":
            result = message.fields()["C"]
    return result


def test_deallocate_of_a_protocol_statement(pool: Gpooler, send: Send) -> None:
    with pool.raw().login() as client, pool.raw().login() as other:
        define(client, "a", "B c")
        define(other, "a")
        client.send(send("DEALLOCATE A"))
        assert tags(client) == ["DEALLOCATE"]
        assert value(client, "a") == "26000"
        assert value(client, "B c") == "B c"
        assert value(other, "a") == "a"
        client.send(send('DEALLOCATE PREPARE "B c"'))
        assert tags(client) == ["DEALLOCATE"]
        assert value(client, "B c") == "26000"
        client.send(send("DEALLOCATE a"))
        assert tags(client) == ["26000"]
        define(client, "a")
        assert value(client, "a") == "a"
    assert pool.route_count(RouteWord.PINS) == 0


@pytest.mark.parametrize("sql", ["DEALLOCATE ALL", "DISCARD ALL"])
def test_deallocate_all(pool: Gpooler, send: Send, sql: str) -> None:
    with pool.raw().login() as client, pool.raw().login() as other:
        define(client, "a", "b")
        define(other, "a")
        client.send(send(sql))
        assert tags(client) == [sql]
        assert value(client, "a") == value(client, "b") == "26000"
        assert value(other, "a") == "a"
        define(client, "a")
        assert value(client, "a") == "a"
    assert pool.route_count(RouteWord.PINS) == 0


@pytest.mark.parametrize("sql", ["DEALLOCATE a", "DEALLOCATE ALL"])
def test_a_deallocate_that_fails_forgets_nothing(pool: Gpooler, send: Send, sql: str) -> None:
    with pool.raw().login() as client:
        define(client, "a")
        client.query("BEGIN")
        client.send(query("SELECT 1/0"))
        assert tags(client) == ["22012"]
        client.send(send(sql))
        assert tags(client) == ["25P02"]
        client.query("ROLLBACK")
        assert value(client, "a") == "a"


def test_a_protocol_statement_executed_by_sql(pool: Gpooler, send: Send) -> None:
    with pool.raw().login() as client, pool.raw().login() as other:
        define(client, "a", "b")
        define(other, "a")
        client.send(send("EXECUTE a"))
        assert tags(client) == ["SELECT 1"]
        client.send(send("PREPARE b AS SELECT 1"))
        assert tags(client) == ["42P05"]
        assert value(client, "a") == "a"
        assert value(client, "b") == "b"
        client.send(send("EXPLAIN EXECUTE b"))
        assert tags(client) == ["EXPLAIN"]
        assert value(other, "a") == "a"
        assert pool.route_count(RouteWord.PINS) == 1
        client.send(send("DEALLOCATE ALL"))
        assert tags(client) == ["DEALLOCATE ALL"]
        assert value(client, "a") == "26000"
        with pool.raw().login() as one, pool.raw().login() as two:  # it keeps its server no longer
            one.query("BEGIN")
            two.query("BEGIN")


def test_statements_of_sql(pool: Gpooler, send: Send) -> None:
    with pool.raw().login() as client, pool.raw().login() as other:
        client.send(send("PREPARE a (int) AS SELECT $1 + 1"))
        assert tags(client) == ["PREPARE"]
        client.send(bind("a", (b"1",)) + execute() + SYNC)
        assert client.rows() == [["2"]]
        client.send(parse("SELECT 1", "a") + SYNC)
        assert tags(client) == ["42P05"]
        define(other, "a")
        assert value(other, "a") == "a"
        assert client.query("EXECUTE a(2)") == [["3"]]


# --- the end of what pins -----------------------------------------------------------------------------


ENDS = [
    ("LISTEN ear", "UNLISTEN *"),
    ("LISTEN ear", "UNLISTEN ear"),
    ("SELECT pg_advisory_lock(1)", "SELECT pg_advisory_unlock(1)"),
    ("SELECT pg_advisory_lock(1)", "SELECT pg_advisory_unlock_all()"),
    ("CREATE TEMP TABLE t (n int)", "DROP TABLE t"),
    ("CREATE TEMP TABLE t (n int)", "DISCARD TEMP"),
    ("DECLARE c CURSOR WITH HOLD FOR SELECT 1", "CLOSE c"),
    ("DECLARE c CURSOR WITH HOLD FOR SELECT 1", "CLOSE ALL"),
    ("PREPARE p AS SELECT 1", "DEALLOCATE p"),
    ("PREPARE p AS SELECT 1", "DEALLOCATE ALL"),
    ("LISTEN ear", "DISCARD ALL"),
    ("UPDATE pg_settings SET setting = '5MB' WHERE name = 'work_mem'", "DISCARD ALL"),
    (
        "LISTEN ear; SELECT pg_advisory_lock(1)",
        "SELECT pg_advisory_unlock_all(); CLOSE ALL; UNLISTEN *; RESET ALL",
    ),
]


@pytest.mark.parametrize(("begin", "end"), ENDS)
def test_a_pin_ends_with_its_state(
    postgres: Postgres, gpooler_factory: Factory, send: Send, begin: str, end: str
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1, "pool_timeout": 20_000})
    with gpooler.raw().login() as client, gpooler.raw().login() as other:
        client.send(query(begin) if ";" in begin else send(begin))
        assert len(tags(client)) == 1 + begin.count(";")
        assert gpooler.route_count(RouteWord.PINS) == 1
        client.send(query(end) if ";" in end else send(end))
        assert len(tags(client)) == 1 + end.count(";")
        assert other.query("SELECT 1") == [["1"]]
        assert gpooler.route_count(RouteWord.RESETS) == 0


def test_a_pin_stays_while_something_is_left(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 2})
    with ExitStack() as stack:
        client, one, two = (stack.enter_context(gpooler.raw().login()) for _ in range(3))
        client.query("LISTEN a; LISTEN b; SELECT pg_advisory_lock(1)")
        client.query("UNLISTEN a")
        client.query("SELECT pg_advisory_unlock(1)")
        one.query("BEGIN")
        assert client.query("SELECT pg_listening_channels()") == [["b"]]
        two.send(query("SELECT 1"))
        client.query("UNLISTEN b")
        assert two.rows() == [["1"]]


# --- session_state ------------------------------------------------------------------------------------


STATES = [
    "LISTEN ear",
    "SELECT pg_advisory_lock(1)",
    "CREATE TEMP TABLE t (n int)",
    "DECLARE c CURSOR WITH HOLD FOR SELECT 1",
    "LOAD 'plpgsql'",
]


@pytest.mark.parametrize("sql", STATES)
def test_session_state_refused(postgres: Postgres, gpooler_factory: Factory, send: Send, sql: str) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1, "session_state": "refuse"})
    with gpooler.raw().login() as client:
        for _ in range(2):
            client.send(query("SELECT 1") + send(sql))
            assert tags(client) == ["SELECT 1"]
            assert tags(client) == ["0A000"]
        assert client.query("SELECT 2") == [["2"]]
        with gpooler.raw().login() as other:
            assert other.query("SELECT 3") == [["3"]]
        client.query("BEGIN")
        client.send(send(sql))
        last = client.read_to_end()[-1].fields()
        assert (last["S"], last["C"]) == ("FATAL", "0A000")
    with gpooler.raw().login() as client:
        client.send(query("SELECT 1 /* " + "x" * 300_000 + " */; " + sql))
        last = client.read_to_end()[-1].fields()
        assert (last["S"], last["C"]) == ("FATAL", "0A000")
        with gpooler.raw().login() as other:
            assert other.query("SELECT 3") == [["3"]]


@pytest.mark.parametrize("sql", STATES[:4])
def test_session_state_allowed(postgres: Postgres, gpooler_factory: Factory, send: Send, sql: str) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1, "session_state": "allow"})
    gpooler.may_be_dirty = "state is allowed to stay"
    with gpooler.raw().login() as client, gpooler.raw().login() as other:
        client.send(send(sql))
        tags(client)
        assert other.query("SELECT 1") == [["1"]]
        assert gpooler.route_count(RouteWord.PINS) == 0


def test_listen_pins_where_it_shall(postgres: Postgres, gpooler_factory: Factory) -> None:
    rule = {"pool_size": 2, "session_state": "allow", "pool_pin_on_listen": True}
    gpooler = gpooler_factory(postgres, rule=rule)
    with gpooler.raw().login() as client:
        client.query("LISTEN ear")
        assert gpooler.route_count(RouteWord.PINS) == 1


OPAQUE = {
    "lock": ("PERFORM pg_advisory_lock(7)", 1),
    "temp": ("CREATE TEMP TABLE hidden (n int)", 1),
    "listen": ("LISTEN ear", 1),
    "nothing": ("PERFORM 1", 0),
    "setting": ("PERFORM set_config('work_mem', '5MB', false)", 0),
}


@pytest.mark.parametrize("kind", OPAQUE)
def test_what_a_block_does_is_asked_for(pool: Gpooler, send: Send, kind: str) -> None:
    body, pins = OPAQUE[kind]
    with pool.raw().login() as client, pool.raw().login() as other:
        client.send(send(f"DO $$BEGIN {body}; END$$"))
        assert tags(client) == ["DO"]
        assert other.query("SHOW work_mem") == [["4MB"]]
        assert client.query("SHOW work_mem") == [["5MB" if kind == "setting" else "4MB"]]
        with pool.raw().login() as holder:
            holder.query("BEGIN")
            assert client.query("SHOW work_mem") == [["5MB" if kind == "setting" else "4MB"]]
        assert pool.route_count(RouteWord.PINS) == pins
        assert pool.route_count(RouteWord.RESETS) == 0


def test_a_reset_is_followed_by_the_clients_own_values_while_the_server_is_asked(
    pool: Gpooler, send: Send
) -> None:
    """The request that comes before the answer to the question waits for it, and for the deploy."""
    with pool.raw().login(options="-c work_mem=7MB") as client:
        for sql in ("SET my.thing = 'x'; RESET work_mem", "RESET work_mem; DO $$BEGIN PERFORM 1; END$$"):
            client.query(sql)
            client.send(send("SHOW work_mem"))
            assert client.rows() == [["7MB"]], sql
            assert client.query("SHOW work_mem") == [["7MB"]]


def test_what_is_set_and_reset_at_once_is_the_clients_own_again(pool: Gpooler, send: Send) -> None:
    with pool.raw().login(options="-c work_mem=7MB") as client, pool.raw().login() as other:
        for sql in (
            "SET work_mem = '5MB'; RESET work_mem",
            "SET work_mem = '5MB'; SET my.thing = 'x'; RESET ALL",
            "BEGIN; SET work_mem = '5MB'; RESET work_mem; COMMIT",
        ):
            client.query(sql)
            for _ in range(2):
                client.send(send("SHOW work_mem"))
                assert client.rows() == [["7MB"]], sql
                assert other.query("SHOW work_mem") == [["4MB"]]
        client.query("RESET work_mem; SET work_mem = '5MB'")
        assert client.query("SHOW work_mem") == [["5MB"]]


def test_what_a_block_resets_is_gone(pool: Gpooler) -> None:
    with pool.raw().login() as client:
        client.query("SET work_mem = '5MB'; SET my.thing = 'x'")
        client.query("DO $$BEGIN RESET work_mem; PERFORM set_config('my.thing', 'y', false); END$$")
        with pool.raw().login() as holder:
            holder.query("BEGIN")
            assert client.query("SHOW work_mem") == [["4MB"]]
            assert client.query("SHOW my.thing") == [["y"]]


def test_every_transaction_can_be_asked_about(
    postgres: Postgres, gpooler_factory: Factory, send: Send
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 2, "session_state_check": "always"})
    with gpooler.raw().login() as client:
        client.query(
            "CREATE OR REPLACE FUNCTION hides() RETURNS void LANGUAGE sql AS 'SELECT pg_advisory_lock(9)'"
        )
        assert gpooler.route_count(RouteWord.PINS) == 0
        client.send(send("SELECT hides()"))
        assert tags(client) == ["SELECT 1"]
        client.query("DROP FUNCTION hides()")
        assert gpooler.route_count(RouteWord.PINS) == 1
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1, "session_state_check": "off"})
    gpooler.may_be_dirty = "nobody asks what a block does"
    with gpooler.raw().login() as client, gpooler.raw().login() as other:
        client.query("DO $$BEGIN PERFORM set_config('work_mem', '5MB', false); END$$")
        assert other.query("SHOW work_mem") == [["5MB"]]


@pytest.mark.parametrize("option", ["max_prepared_statements", "max_client_prepared_bytes"])
def test_the_limits_of_prepared_statements(postgres: Postgres, gpooler_factory: Factory, option: str) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1, option: 5})
    with gpooler.raw().login() as client:
        define(client, *(f"n{n}" for n in range(12)))
        for n in (0, 11, 5, 0):
            assert value(client, f"n{n}") == f"n{n}"
        count = int(client.query("SELECT count(*) FROM pg_prepared_statements")[0][0] or 0)
        assert count == (5 if option == "max_prepared_statements" else 12)
        assert gpooler.route_count(RouteWord.PINS) == (option == "max_client_prepared_bytes")


def test_smart_discard_spares_prepared_statements(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1, "pool_smart_discard": True})
    with gpooler.raw().login() as client:
        define(client, "a")
        for sql, count in (("LISTEN ear", "1"), ("PREPARE p AS SELECT 1", "0")):
            with gpooler.raw().login() as other:
                other.query(sql)
            kept = client.query("SELECT count(*) FROM pg_prepared_statements")
            assert kept == [[count]]
            assert client.query("SELECT pg_listening_channels()") == []
            assert value(client, "a") == "a"
