"""BEGIN takes no server (``virtual_transaction``), and nobody can tell."""

from collections.abc import Callable

import pytest

from gpooler.stats.registry import RouteWord
from tests.harness import Gpooler, Postgres, RawClient, eventually
from tests.harness.client import FLUSH, SYNC, bind, cancel_request, describe, execute, parse, query

Factory = Callable[..., Gpooler]


@pytest.fixture
def pool(postgres: Postgres, gpooler_factory: Factory) -> Gpooler:
    rule = {"pool_size": 1, "pool_timeout": 20_000}
    return gpooler_factory(postgres, rule=rule, config={"routing": {"virtual_transaction": True}})


def answers(client: RawClient, *steps: bytes) -> list[tuple[bytes, bytes]]:
    """What comes back, each step up to its last ReadyForQuery."""
    result = []
    for step in steps:
        client.send(step)
        for _ in range(ready_count(step)):
            result += [(message.kind, message.body) for message in client.read_until()]
    return result


def ready_count(step: bytes) -> int:
    """How many of its messages are answered by ReadyForQuery."""
    count, at = 0, 0
    while at < len(step):
        count += step[at : at + 1] in b"QS"
        at += 1 + int.from_bytes(step[at + 1 : at + 5], "big")
    return count


GROUP = parse("SELECT 1") + bind() + describe("P") + execute() + SYNC
BEGINS = ["BEGIN", "begin;", " BEGIN WORK ; ", "/* a */ BEGIN TRANSACTION -- b"]
NEXT = {
    "query": [query("SELECT 1"), query("COMMIT")],
    "extended": [GROUP, query("COMMIT")],
    "commit": [query("COMMIT")],
    "rollback": [query("ROLLBACK"), query("SELECT 1")],
    "end by extended": [parse("COMMIT") + bind() + execute() + SYNC],
    "second begin": [query("BEGIN"), query("COMMIT")],
    "begin with options": [query("BEGIN ISOLATION LEVEL SERIALIZABLE"), query("SHOW transaction_isolation")],
    "syntax error": [query("SELEC 1"), query("SELECT 1"), query("COMMIT")],
    "error with a position": [query("SELECT nothing FROM nowhere"), query("ROLLBACK")],
    "empty": [query(""), query("SELECT 1"), query("COMMIT")],
    "lone sync": [SYNC, SYNC + SYNC, query("COMMIT")],
    "flush": [FLUSH + SYNC, query("COMMIT")],
    "several": [query("SELECT 1; SELECT 2"), query("COMMIT; SELECT 3")],
    "savepoint": [query("SAVEPOINT s"), query("ROLLBACK TO s"), query("COMMIT")],
    "unknown statement": [bind("none") + SYNC, query("ROLLBACK")],
    "close": [parse("SELECT 1", "mine") + SYNC, query("DEALLOCATE mine"), query("COMMIT")],
    "set": [query("SET work_mem = '5MB'"), query("ROLLBACK"), query("SHOW work_mem")],
    "set local": [query("SET LOCAL work_mem = '5MB'"), query("SHOW work_mem"), query("COMMIT")],
    "transaction mode": [query("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"), query("COMMIT")],
}


@pytest.mark.parametrize("is_pipelined", [False, True], ids=["alone", "pipelined"])
@pytest.mark.parametrize("kind", NEXT)
def test_it_is_as_on_a_direct_connection(
    pool: Gpooler, postgres: Postgres, kind: str, is_pipelined: bool
) -> None:
    for begin in BEGINS:
        steps = [query(begin), *NEXT[kind]]
        if is_pipelined:
            steps = [b"".join(steps)]
        with pool.raw().login(database="app") as pooled, RawClient(postgres.port) as direct:
            direct.login(database="app")
            assert answers(pooled, *steps) == answers(direct, *steps), begin
    eventually(lambda: pool.route_count(RouteWord.SERVERS_IDLE) == 1)


def test_it_takes_no_server(pool: Gpooler) -> None:
    with pool.raw().login() as one, pool.raw().login() as two, pool.raw().login() as three:
        for client in (one, two, three):
            assert answers(client, query("BEGIN")) == [(b"C", b"BEGIN\0"), (b"Z", b"T")]
        for client in (one, two, three):
            assert client.query("SELECT 1") == [["1"]]
            assert answers(client, query("COMMIT")) == [(b"C", b"COMMIT\0"), (b"Z", b"I")]


def test_what_it_began_is_one_transaction(pool: Gpooler) -> None:
    with pool.raw().login() as client:
        client.query("CREATE TABLE IF NOT EXISTS begun (n int)")
        for end in ("ROLLBACK", "COMMIT"):
            client.query("BEGIN")
            client.query("INSERT INTO begun VALUES (1)")
            client.query(end)
        assert client.query("SELECT count(*) FROM begun") == [["1"]]
        client.query("DROP TABLE begun")


def test_parameters_go_before_it(pool: Gpooler) -> None:
    with pool.raw() as one, pool.raw() as two:
        one.login(options="-c work_mem=6MB")
        two.login(TimeZone="Asia/Tokyo")
        for _ in range(2):
            one.query("BEGIN")
            assert one.query("SHOW work_mem") == [["6MB"]]
            one.query("ROLLBACK")
            two.query("BEGIN")
            assert two.query("SHOW TimeZone") == [["Asia/Tokyo"]]
            two.query("COMMIT")


def test_a_client_that_leaves_behind_it_leaves_nothing(pool: Gpooler) -> None:
    for _ in range(3):
        with pool.raw().login() as client:
            client.query("BEGIN")
    with pool.raw().login() as client:
        assert client.query("SELECT 1") == [["1"]]


def test_a_cancel_while_it_waits_fails_the_transaction(pool: Gpooler) -> None:
    with pool.raw().login() as holder, pool.raw().login() as client:
        holder.query("BEGIN")
        holder.query("SELECT 1")
        client.query("BEGIN")
        client.send(query("SELECT 1"))
        eventually(lambda: pool.route_count(RouteWord.CLIENTS_WAITING) == 1)
        with RawClient(pool.port) as other:
            other.send(cancel_request(client.pid, client.key))
            assert other.read_to_end() == []
        error, ready = client.read_until()
        assert error.fields()["C"] == "57014"
        assert ready.body == b"E"
        holder.query("COMMIT")
        client.send(query("SELECT 1"))
        error, ready = client.read_until()
        assert (error.fields()["C"], ready.body) == ("25P02", b"E")
        assert answers(client, query("COMMIT")) == [(b"C", b"ROLLBACK\0"), (b"Z", b"I")]


def test_it_can_be_switched_off(postgres: Postgres, gpooler_factory: Factory) -> None:
    routing = {"virtual_transaction": False}
    gpooler = gpooler_factory(postgres, rule={"pool_size": 2}, config={"routing": routing})
    with gpooler.raw().login() as client:
        client.query("BEGIN")
        assert gpooler.route_count(RouteWord.SERVERS_ACTIVE) == 1
