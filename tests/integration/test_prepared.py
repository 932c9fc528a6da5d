"""Named prepared statements in transaction pools: every client on every server."""

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager

import pytest

from gpooler.stats.registry import RouteWord
from tests.harness import Gpooler, Postgres, RawClient
from tests.harness.client import SYNC, bind, close, describe, execute, parse, query
from tests.harness.load import Pgbench

Factory = Callable[..., Gpooler]
Program = Callable[[str], str]


def kinds(client: RawClient) -> str:
    """The kinds of the messages up to the next ReadyForQuery."""
    return b"".join(message.kind for message in client.read_until()).decode()


def failure(client: RawClient) -> tuple[str, str]:
    """SQLSTATE and text of the one error up to the next ReadyForQuery."""
    errors = [message for message in client.read_until() if message.kind == b"E"]
    assert len(errors) == 1
    fields = errors[0].fields()
    return fields["C"], fields["M"]


def run(name: str, *values: bytes) -> bytes:
    return bind(name, values) + execute() + SYNC


@pytest.fixture
def pool(postgres: Postgres, gpooler_factory: Factory) -> Gpooler:
    return gpooler_factory(postgres, rule={"pool_size": 2})


@contextmanager
def held(pool: Gpooler) -> Iterator[str]:
    """One of the servers is kept by somebody else."""
    with pool.raw().login() as holder:
        holder.query("BEGIN")
        yield holder.query("SELECT pg_backend_pid()")[0][0]


def unpinned(pool: Gpooler) -> bool:
    return pool.route_count(RouteWord.PINS) == 0


def test_a_statement_goes_with_its_client_from_server_to_server(pool: Gpooler) -> None:
    with pool.raw().login() as one, pool.raw().login() as two:
        for client, text in ((one, "one"), (two, "two")):
            client.send(parse(f"SELECT '{text}' || $1, pg_backend_pid()", "mine") + SYNC)
            assert kinds(client) == "1Z"
        seen = {}
        for turn in range(2):
            with ExitStack() as stack:
                if turn:
                    avoided = stack.enter_context(held(pool))
                for client, text in ((one, "one"), (two, "two")):
                    client.send(run("mine", b"!"))
                    row = client.rows()[0]
                    assert row[0] == text + "!"
                    seen[text, turn] = row[1]
                    if turn:
                        assert row[1] != avoided
        with pool.raw().login() as holder:
            holder.query("BEGIN")
            assert len({*seen.values(), holder.query("SELECT pg_backend_pid()")[0][0]}) == 2
            for client, text in ((one, "one"), (two, "two")):
                client.send(describe("S", "mine") + run("mine", b"?"))
                assert client.rows()[0][0] == text + "?"
    assert unpinned(pool)


def test_the_same_text_is_parsed_once_on_a_server(pool: Gpooler, postgres: Postgres) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(pool.raw()).login() for _ in range(5)]
        for number, client in enumerate(clients):
            client.send(parse("SELECT 42 AS same", f"name {number}") + describe("S", f"name {number}") + SYNC)
            assert kinds(client) == "1tTZ"
        for number, client in enumerate(clients):
            client.send(run(f"name {number}"))
            assert client.rows() == [["42"]]
        own = "SELECT count(*) FROM pg_prepared_statements"
        assert int(clients[0].query(own)[0][0]) == 1


def test_names_that_are_taken_unknown_or_closed(pool: Gpooler) -> None:
    with pool.raw().login() as client:
        client.send(parse("SELECT 1", "mine") + SYNC)
        assert kinds(client) == "1Z"
        client.send(parse("SELECT 2", "mine") + run("mine"))
        assert failure(client) == ("42P05", 'prepared statement "mine" already exists')
        client.send(run("other"))
        assert failure(client) == ("26000", 'prepared statement "other" does not exist')
        client.send(describe("S", "other") + SYNC)
        assert failure(client) == ("26000", 'prepared statement "other" does not exist')
        client.send(close("S", "other") + close("S", "mine") + SYNC)
        assert kinds(client) == "33Z"
        client.send(run("mine"))
        assert failure(client) == ("26000", 'prepared statement "mine" does not exist')
        client.send(parse("SELECT 3", "mine") + run("mine"))
        assert client.rows() == [["3"]]


def test_a_parse_that_failed_or_was_skipped_is_not_remembered(pool: Gpooler) -> None:
    with pool.raw().login() as client:
        client.send(parse("SELECT nonsense", "mine") + parse("SELECT 1", "next") + SYNC)
        assert failure(client)[0] == "42703"
        for name in ("mine", "next"):
            client.send(run(name))
            assert failure(client)[0] == "26000"
        client.send(parse("SELECT 1", "mine") + parse("SELECT 2", "next") + run("mine") + run("next"))
        assert client.rows() == [["1"]]
        assert client.rows() == [["2"]]
        client.send(parse("SELECT 1/0", "zero") + SYNC)
        assert kinds(client) == "1Z"
        client.send(run("zero")[:-5] + close("S", "mine") + parse("SELECT 4", "four") + SYNC)
        assert failure(client)[0] == "22012"
        client.send(run("mine"))
        assert client.rows() == [["1"]]
        client.send(run("four"))
        assert failure(client)[0] == "26000"


def test_in_a_failed_transaction(pool: Gpooler) -> None:
    with pool.raw().login() as client:
        client.send(parse("SELECT 1", "mine") + SYNC)
        assert kinds(client) == "1Z"
        client.query("BEGIN")
        client.send(query("SELECT 1/0"))
        assert failure(client)[0] == "22012"
        client.send(run("mine"))
        assert failure(client)[0] == "25P02"
        client.send(parse("SELECT 2", "late") + SYNC)
        assert failure(client)[0] == "25P02"
        client.query("ROLLBACK")
        client.send(run("late"))
        assert failure(client)[0] == "26000"
        client.send(run("mine"))
        assert client.rows() == [["1"]]


def test_an_unnamed_statement_of_a_stranger_is_never_met(pool: Gpooler) -> None:
    with pool.raw().login() as one, pool.raw().login() as two, held(pool):
        two.send(parse("SELECT 'two'", "mine") + SYNC)
        assert kinds(two) == "1Z"
        one.send(parse("SELECT 'one'") + bind() + execute() + SYNC)
        assert one.rows() == [["one"]]
        two.send(bind("mine") + execute() + bind() + execute() + SYNC)
        assert failure(two) == ("26000", "unnamed prepared statement does not exist")


def test_a_meaning_that_depends_on_settings_is_not_shared(pool: Gpooler) -> None:
    with pool.raw() as one, pool.raw() as two, held(pool):
        one.login(DateStyle="ISO, DMY")
        two.login(DateStyle="ISO, MDY")
        for client in (one, two):
            client.send(parse("SELECT '01/02/2020'::date", "day") + SYNC)
            assert kinds(client) == "1Z"
        for _ in range(2):
            one.send(run("day"))
            assert one.rows() == [["2020-02-01"]]
            two.send(run("day"))
            assert two.rows() == [["2020-01-02"]]


def test_what_a_prepared_set_leaves_behind_goes_with_its_client(pool: Gpooler) -> None:
    with pool.raw().login() as one, pool.raw().login() as two, held(pool):
        one.send(parse("SET search_path = nowhere", "set") + SYNC)
        assert kinds(one) == "1Z"
        assert two.query("SHOW search_path") != [["nowhere"]]
    with pool.raw().login() as one, pool.raw().login() as two:
        one.send(parse("SET search_path = nowhere", "set") + run("set"))
        assert kinds(one) == "12CZ"
        assert one.query("SHOW search_path") == [["nowhere"]]
        assert two.query("SHOW search_path") != [["nowhere"]]
    assert unpinned(pool)


def test_more_statements_than_a_server_keeps(pool: Gpooler) -> None:
    chance = random.Random(1)
    with pool.raw().login() as client, held(pool):
        for start in range(0, 1200, 100):
            client.send(b"".join(parse(f"SELECT {n}", f"n{n}") for n in range(start, start + 100)) + SYNC)
            assert kinds(client) == "1" * 100 + "Z"
        for _ in range(300):
            picked = [chance.randrange(1200) for _ in range(5)]
            client.send(b"".join(bind(f"n{n}") + execute() for n in picked) + SYNC)
            assert [row[0] for row in client.rows()] == [str(n) for n in picked]
        count = int(client.query("SELECT count(*) FROM pg_prepared_statements")[0][0])
        assert 400 < count <= 500


def test_a_text_longer_than_the_relay_keeps(pool: Gpooler) -> None:
    text = "x" * 100_000
    with pool.raw().login() as client:
        client.send(parse(f"SELECT '{text}'", "long") + SYNC)
        assert kinds(client) == "1Z"
        client.send(run("long"))
        assert client.rows() == [[text]]


def test_deallocate_and_discard_are_noticed(pool: Gpooler) -> None:
    for forget in ("DEALLOCATE ALL", "DISCARD ALL"):
        with pool.raw().login() as one, pool.raw().login() as two, held(pool):
            two.send(parse("SELECT 'two'", "mine") + SYNC)
            assert kinds(two) == "1Z"
            one.query(forget)
            one.terminate()
            two.send(run("mine"))
            assert two.rows() == [["two"]]


def test_random_clients_and_statements(pool: Gpooler) -> None:
    texts = [f"SELECT {n}, $1::int" for n in range(20)]

    def work(seed: int) -> None:
        chance = random.Random(seed)
        mine: dict[str, int] = {}
        with pool.raw(timeout=30).login() as client:
            for _ in range(150):
                name = f"s{chance.randrange(8)}"
                if name not in mine:
                    mine[name] = chance.randrange(20)
                    client.send(parse(texts[mine[name]], name))
                    if chance.random() < 0.3:
                        client.send(SYNC)
                        assert kinds(client) == "1Z"
                        client.send(run(name, b"7"))
                        assert kinds(client) == "2DCZ"
                    else:
                        client.send(run(name, b"7"))
                        assert kinds(client) == "12DCZ"
                elif chance.random() < 0.15:
                    client.send(close("S", name) + SYNC)
                    assert kinds(client) == "3Z"
                    del mine[name]
                elif chance.random() < 0.15:
                    client.send(run(name, b"no number"))
                    assert failure(client)[0] == "22P02"
                else:
                    client.send(run(name, b"5"))
                    assert client.rows() == [[str(mine[name]), "5"]]

    with ThreadPoolExecutor(8) as workers:
        for job in [workers.submit(work, seed) for seed in range(8)]:
            job.result()
    assert unpinned(pool)


def test_pgbench_prepared_with_more_clients_than_servers(pool: Gpooler, program: Program) -> None:
    with Pgbench(program("pgbench"), pool, "SELECT :client_id + 1;", 10, 2, "-M", "prepared") as bench:
        assert bench.wait() == 0, bench.output()
    assert unpinned(pool)


def test_a_server_from_another_worker_may_have_statements(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    pool = gpooler_factory(postgres, rule={"pool_size": 2}, config={"performance": {"workers": 2}})
    stop = threading.Event()

    def work(seed: int) -> int:
        done = 0
        with pool.raw(timeout=30).login() as client:
            client.send(parse("SELECT 'all'", "all") + parse(f"SELECT '{seed}'", "own") + SYNC)
            assert kinds(client) == "11Z"
            while not done or not stop.is_set():
                client.send(run("all") + run("own"))
                assert client.rows() == [["all"]]
                assert client.rows() == [[str(seed)]]
                done += 1
        return done

    with ThreadPoolExecutor(8) as workers:
        jobs = [workers.submit(work, seed) for seed in range(8)]
        wait(jobs, timeout=3, return_when=FIRST_EXCEPTION)
        stop.set()
        assert all(job.result() for job in jobs)
