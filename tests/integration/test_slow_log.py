"""The slow-request log: which requests it tells of, where their time went, and what they asked for."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Final

import pytest

from gpooler.stats.registry import RouteWord
from tests.harness import Gpooler, Postgres, RawClient, eventually, unread
from tests.harness.client import SYNC, bind, execute, message, parse, query

Factory = Callable[..., Gpooler]
Line = dict[str, Any]

LIMIT_MS: Final = 1000  # far from what a busy machine makes of a quick request
SLEEP: Final = "SELECT pg_sleep(1.3)"
SLOW: Final = {"logging": {"log_format": "json", "log_slow_ms": LIMIT_MS}}
FLUSH: Final = message(b"H", b"")
TRACE: Final = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
LARGE: Final = "SELECT repeat('x', 1000000) FROM generate_series(1, 20)"


def lines(gpooler: Gpooler) -> list[Line]:
    """What its slow log says."""
    records = (json.loads(line) for line in gpooler.log().splitlines() if line.startswith("{"))
    return [line for line in records if line["context"] == "slow"]


def wait_for(gpooler: Gpooler, count: int = 1) -> list[Line]:
    """Its slow log, as soon as that has so many lines."""
    eventually(lambda: len(lines(gpooler)) >= count)
    found = lines(gpooler)
    assert len(found) == count, found
    return found


def extended(sql: str) -> bytes:
    return parse(sql) + bind() + execute() + SYNC


@pytest.fixture(params=["simple", "extended"])
def ask(request: pytest.FixtureRequest) -> Callable[[str], bytes]:
    """Makes a request of a text."""
    return query if request.param == "simple" else extended


@pytest.fixture(params=["transaction", "session"])
def pool(request: pytest.FixtureRequest, postgres: Postgres, gpooler_factory: Factory) -> Gpooler:
    """One server, and the log on."""
    return gpooler_factory(postgres, config=SLOW, rule={"pool": request.param, "pool_size": 1})


@pytest.fixture
def client(pool: Gpooler) -> Iterator[RawClient]:
    with pool.raw() as client:
        yield client.login()


def test_a_slow_request_is_told_of_with_where_and_what(
    postgres: Postgres, pool: Gpooler, client: RawClient, ask: Callable[[str], bytes]
) -> None:
    client.send(ask(f"{SLEEP} /*traceparent='{TRACE}',tracestate='a%3D1'*/"))
    client.read_until()
    client.send(ask("SELECT 1"))
    client.read_until()
    (line,) = wait_for(pool)
    (backend,) = postgres.activity()
    assert line["level"] == "info"
    assert line["route"] == "app.trust_user"
    assert line["client"]["id"].startswith("c")
    assert line["server"]["id"].startswith("s")
    assert line["server_pid"] == backend.pid
    assert line["answered"] is True
    assert line["server_ms"] >= 1300
    assert line["send_ms"] == 0
    assert line["duration_ms"] == pytest.approx(line["wait_ms"] + line["server_ms"])
    assert line["traceparent"] == TRACE
    assert line["query"].startswith(SLEEP)
    assert line["message"].startswith("[app.trust_user] ")
    assert line["message"].endswith(f"traceparent {TRACE}: {line['query']}")
    assert f"; pid {backend.pid}, " in line["message"]


def test_a_wait_for_a_server_is_wait(
    postgres: Postgres, gpooler_factory: Factory, ask: Callable[[str], bytes]
) -> None:
    pool = gpooler_factory(postgres, config=SLOW, rule={"pool_size": 1})
    with ExitStack() as stack:
        blocker = stack.enter_context(pool.raw()).login()
        waiter = stack.enter_context(pool.raw()).login()
        blocker.query("BEGIN")
        waiter.send(ask("SELECT 'waited'"))
        blocker.query(SLEEP)
        blocker.query("COMMIT")
        waiter.read_until()
        waiter.send(ask("SELECT 'not any more'"))
        waiter.read_until()
        waiter.query(SLEEP)
        own, waited, last = wait_for(pool, 3)
    assert own["query"] == SLEEP
    assert waited["query"] == "SELECT 'waited'"
    assert waited["wait_ms"] >= 1000 > waited["server_ms"]
    assert (last["query"], last["wait_ms"]) == (SLEEP, 0)


@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_what_a_client_does_not_take_is_send(
    postgres: Postgres, gpooler_factory: Factory, ask: Callable[[str], bytes], mode: str
) -> None:
    pool = gpooler_factory(postgres, config=SLOW, rule={"pool": mode, "pool_size": 2})
    with pool.raw() as client, pool.raw() as other:
        client.login()
        other.login()
        client.send(ask(LARGE))
        wait_until_blocked(postgres)
        other.query(SLEEP)
        client.read_until()
        client.query("SELECT 1")
        client.query(SLEEP)
        slept, large, last = wait_for(pool, 3)
    assert slept["query"] == SLEEP
    assert large["query"] == LARGE
    assert large["answered"] is True
    assert large["send_ms"] >= 1300
    assert (last["query"], last["send_ms"]) == (SLEEP, 0)


def wait_until_blocked(postgres: Postgres) -> None:
    """Until PostgreSQL cannot get rid of what it has to say."""
    with postgres.connect() as watch:
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'ClientWrite'"
        eventually(lambda: watch.execute(waiting).fetchone() == (1,), within=20)


def test_a_client_that_never_takes_its_answer_is_told_of_at_its_end(
    postgres: Postgres, pool: Gpooler, client: RawClient, ask: Callable[[str], bytes]
) -> None:
    client.send(ask(LARGE))
    wait_until_blocked(postgres)
    with postgres.connect() as watch:
        watch.execute(SLEEP)
    client.reset()
    (line,) = wait_for(pool)
    assert line["answered"] is False
    assert line["query"] == LARGE
    assert line["send_ms"] >= 1300
    assert ", not answered: " in line["message"]


def test_send_goes_on_when_the_server_is_with_another_client(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    pool = gpooler_factory(postgres, config=SLOW, rule={"pool_size": 1})
    text = "SELECT repeat('x', 7000)"  # one read of the relay's
    with pool.raw() as client, pool.raw() as other:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.login()
        other.login()
        (worker,), port = pool.worker_pids(), client.socket.getsockname()[1]
        asked, is_read = 0, True
        while is_read:  # at last the answer before stands in the relay
            asked += 1
            assert asked < 3000
            client.send(query(text))
            other.query("SELECT 1")  # whatever can be read of the client has been
            is_read = pool.route_count(RouteWord.TRANSACTIONS) >= 2 * asked or not unread(worker, port)
        other.query(SLEEP)
        for _ in range(asked):
            client.read_until()

        def are_told() -> bool:
            found = lines(pool)  # others may be slow, too, on a busy machine
            slept = [line for line in found if line["query"] == SLEEP]
            sent = [line["query"] for line in found if line["send_ms"] >= 1300]
            return len(slept) == 1 and sent == [text]

        eventually(are_told)


def test_requests_of_a_pipeline_are_told_of_one_by_one(pool: Gpooler, client: RawClient) -> None:
    quick = [extended(f"SELECT {number}") for number in range(3)]
    client.send(*quick, extended("SELECT pg_sleep(2)"), *quick, query("SELECT pg_sleep(2.1)"), *quick)
    for _ in range(11):
        client.read_until()
    first, second = wait_for(pool, 2)
    assert (first["query"], second["query"]) == ("SELECT pg_sleep(2)", "SELECT pg_sleep(2.1)")
    # a busy machine sees the end of what stands before them late, and so their beginning
    assert first["server_ms"] >= LIMIT_MS
    assert second["server_ms"] >= LIMIT_MS
    assert first["wait_ms"] == second["wait_ms"] == 0


def test_texts_stay_with_their_requests_when_some_are_skipped(pool: Gpooler, client: RawClient) -> None:
    client.send(
        parse("SELECT 1/0"), bind(), execute(), query("SELECT 'skipped'"), parse("SELECT 'too'"), SYNC,
        extended("SELECT 'quick'"), extended("SELECT pg_sleep(2.1)"),
    )  # fmt: skip
    for _ in range(3):
        client.read_until()
    assert wait_for(pool)[0]["query"] == "SELECT pg_sleep(2.1)"


def test_a_group_with_flushes_is_one_request(pool: Gpooler, client: RawClient) -> None:
    client.send(parse("SELECT pg_sleep(0.6)") + bind() + execute() + FLUSH)
    client.read_until(b"C")
    client.send(parse("SELECT pg_sleep(0.7)") + bind() + execute() + SYNC)
    client.read_until()
    (line,) = wait_for(pool)
    assert line["server_ms"] >= 1300
    assert line["query"] == "SELECT pg_sleep(0.6)"


def test_a_prepared_statement_is_told_of_by_its_text(pool: Gpooler, client: RawClient) -> None:
    client.send(parse("SELECT pg_sleep($1::text::float)", name="nap"), SYNC)
    client.read_until()
    client.send(bind("nap", (b"1.3",)), execute(), SYNC)
    client.read_until()
    (line,) = wait_for(pool)
    if 'pool = "session"' in pool.config_file.read_text():
        assert line["query"] is None  # there the relay knows nothing of names
    else:
        assert line["query"] == "SELECT pg_sleep($1::text::float)"
    assert "1.3" not in line["message"].partition("; pid")[2]


def test_each_request_of_a_transaction_is_one(pool: Gpooler, client: RawClient) -> None:
    client.query("BEGIN")
    client.query("SELECT 1")
    client.query(SLEEP)
    client.query("SELECT 2")
    client.query("COMMIT")
    client.query("SELECT pg_sleep(1.2)")
    assert [line["query"] for line in wait_for(pool, 2)] == [SLEEP, "SELECT pg_sleep(1.2)"]


def test_copy_is_a_request(pool: Gpooler, client: RawClient) -> None:
    client.query("CREATE TEMP TABLE copied (a text)")
    client.send(query("COPY copied FROM STDIN"))
    client.read_until(b"G")
    client.send(message(b"d", b"one\n"), message(b"c", b""))
    client.read_until()
    client.query(f"COPY (SELECT 1 FROM ({SLEEP}) AS nap) TO STDOUT")
    assert [line["query"][:12] for line in wait_for(pool)] == ["COPY (SELECT"]
    client.query("DROP TABLE copied")


def test_a_request_whose_server_dies_is_not_answered(
    postgres: Postgres, pool: Gpooler, client: RawClient, ask: Callable[[str], bytes]
) -> None:
    client.query("BEGIN")
    client.send(ask("SELECT pg_sleep(60)"))
    eventually(lambda: any(each.state == "active" for each in postgres.activity()))
    with postgres.connect() as watch:
        watch.execute(SLEEP)
    (backend,) = postgres.activity()
    postgres.terminate(backend.pid)
    client.read_to_end()
    (line,) = wait_for(pool)
    assert line["answered"] is False
    assert line["query"] == "SELECT pg_sleep(60)"
    assert line["server_pid"] == backend.pid


def test_of_a_long_text_the_beginning_is_told_and_the_end_is_looked_at(
    pool: Gpooler, client: RawClient, ask: Callable[[str], bytes]
) -> None:
    text = f"{SLEEP}, '{'x' * 5000}' /*action='a',traceparent='{TRACE.replace('-', '%2D')}'*/"
    client.send(ask(text))
    client.read_until()
    (line,) = wait_for(pool)
    assert line["query"] == text[:1000] + "..."
    assert line["traceparent"] == TRACE


def test_a_text_of_several_chunks_is_told_of_by_its_beginning(pool: Gpooler, client: RawClient) -> None:
    text = f"{SLEEP}, '{'x' * 600_000}'"
    client.query(text)
    assert wait_for(pool)[0]["query"] == text[:1000] + "..."


def test_it_is_off_by_default(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, config={"logging": {"log_format": "json"}})
    with gpooler.raw() as client:
        client.login().query(SLEEP)
        client.terminate()
    eventually(lambda: "client disconnected" in gpooler.log())
    assert not lines(gpooler)


def test_a_rule_goes_before_the_general_option_and_a_reload_changes_both(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    common = {
        "authentication": "none",
        "storage": "postgres",
        "storage_db": "app",
        "storage_user": "trust_user",
        "pool": "transaction",
    }
    limits: dict[str, Any] = {"own": {"log_slow_ms": "1000ms"}, "never": {"log_slow_ms": 0}, "general": {}}
    rules = {name: {"user": {"default": {**common, **limit}}} for name, limit in limits.items()}
    gpooler = gpooler_factory(postgres, config={"logging": {"log_format": "json"}, "database": rules})
    with ExitStack() as stack:
        clients = {name: stack.enter_context(gpooler.raw()).login(database=name) for name in rules}

        def told() -> list[str]:
            before = len(lines(gpooler))
            for client in clients.values():
                client.send(query(SLEEP))
            for client in clients.values():
                client.read_until()
            clients["own"].query("SELECT pg_sleep(1.2)")  # the last line: those before it are there
            *found, _ = wait_for(gpooler, before + len(expected) + 1)[before:]
            return sorted(line["route"].partition(".")[0] for line in found)

        expected = ["own"]
        assert told() == expected
        gpooler.reload(config={"logging": {"log_slow_ms": LIMIT_MS}})
        expected = ["general", "own"]
        assert told() == expected
        gpooler.reload(config={"logging": {"log_slow_ms": 60_000}})
        expected = ["own"]
        assert told() == expected
        gpooler.reload(config={"database": {"never": {"user": {"default": {"log_slow_ms": 1100}}}}})
        expected = ["never", "own"]
        assert told() == expected


@pytest.mark.parametrize("value", [-1, "soon", 1.5, True])
def test_what_is_no_time_is_refused(postgres: Postgres, gpooler_factory: Factory, value: object) -> None:
    gpooler = gpooler_factory(postgres)
    for change in ({"config": {"logging": {"log_slow_ms": value}}}, {"rule": {"log_slow_ms": value}}):
        assert "log_slow_ms" in gpooler.reload(**change, is_refused=True)


def test_each_request_of_a_pipeline_has_its_own_text(pool: Gpooler, client: RawClient) -> None:
    texts = [f"SELECT {number}" + (", pg_sleep(2)" if number % 4 == 2 else "") for number in range(12)]
    for first in (0, 7):  # of seven, then of five, of both kinds
        requests = [(query, extended)[at % 3 == 0](texts[at]) for at in range(first, min(first + 7, 12))]
        client.send(*requests)
        for _ in requests:
            client.read_until()
    assert [line["query"] for line in wait_for(pool, 3)] == [texts[2], texts[6], texts[10]]


def test_the_line_of_another_format_has_all_of_it(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(
        postgres, config={"logging": {"log_format": "%i %s (%c) %m", "log_slow_ms": LIMIT_MS}}
    )
    with gpooler.raw() as client:
        client.login().query(f"{SLEEP}\n/*traceparent='{TRACE}'*/")
    eventually(lambda: "(slow)" in gpooler.log())
    (line,) = [line for line in gpooler.log().splitlines() if "(slow)" in line]
    assert line.startswith("c")
    assert " s" in line
    assert line.endswith(f"traceparent {TRACE}: {SLEEP}\\n/*traceparent='{TRACE}'*/")
