"""Requests that are sent once more unseen, and those that must not be."""

import os
import signal
from collections.abc import Callable

import psycopg
import pytest

from tests.harness import Gpooler, Postgres, RawClient, eventually, stopped, unread
from tests.harness.client import SYNC, bind, describe, execute, parse, query

Factory = Callable[..., Gpooler]


@pytest.fixture
def pool(postgres: Postgres, gpooler_factory: Factory) -> Gpooler:
    postgres.query("CREATE TABLE IF NOT EXISTS again (n int)", "app")
    postgres.query("TRUNCATE again", "app")
    postgres.query("GRANT ALL ON again TO PUBLIC", "app")
    return gpooler_factory(postgres, rule={"pool_size": 2})


def pid_of(client: RawClient) -> int:
    return int(client.query("SELECT pg_backend_pid()")[0][0] or 0)


REQUESTS = {
    "query": query("INSERT INTO again VALUES (1)"),
    "extended": parse("INSERT INTO again VALUES (1)") + bind() + execute() + SYNC,
    "long": query("INSERT INTO again VALUES (1) -- " + "x" * 10_000),
}


def rows(postgres: Postgres) -> int:
    """How many were inserted; -1 while PostgreSQL recovers."""
    try:
        return int(str(postgres.query("SELECT count(*) FROM again", "app")[0][0]))
    except psycopg.OperationalError:
        return -1


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_server_that_was_shut_down_before_it_read_the_request(
    pool: Gpooler, postgres: Postgres, kind: str
) -> None:
    with pool.raw().login() as client:
        pid = pid_of(client)
        with stopped(pid):
            postgres.terminate(pid)
            client.send(REQUESTS[kind])
            eventually(lambda: unread(pid) > 0)
        tags = [message.tag() for message in client.read_until() if message.kind == b"C"]
        assert tags == ["INSERT 0 1"]
        assert pid_of(client) != pid
    assert postgres.query("SELECT count(*) FROM again", "app") == [(1,)]


def test_not_in_a_transaction(pool: Gpooler, postgres: Postgres) -> None:
    with pool.raw().login() as client:
        client.query("BEGIN")
        pid = pid_of(client)
        with stopped(pid):
            postgres.terminate(pid)
            client.send(query("INSERT INTO again VALUES (1)"))
            eventually(lambda: unread(pid) > 0)
        assert client.read_to_end()[-1].fields()["C"] == "57P01"


def test_not_when_it_is_too_long_to_keep(pool: Gpooler, postgres: Postgres) -> None:
    with pool.raw().login() as client:
        pid = pid_of(client)
        with stopped(pid):
            postgres.terminate(pid)
            client.send(query("INSERT INTO again VALUES (1) -- " + "x" * 100_000))
            eventually(lambda: unread(pid) > 0)
        assert client.read_to_end()[-1].fields()["C"] == "57P01"
    assert postgres.query("SELECT count(*) FROM again", "app") == [(0,)]


def test_never_when_the_server_may_have_done_it(pool: Gpooler, postgres: Postgres) -> None:
    """It commits and dies before it can say so."""
    with pool.raw().login() as client:
        for n in range(3):
            pid = pid_of(client)
            postgres.query("CHECKPOINT")  # what it recovers after being killed stays short
            insert = f"SET synchronous_commit = on; INSERT INTO again VALUES ({n})"
            client.send(query(f"{insert}; COMMIT; SELECT pg_sleep(60)"))
            eventually(lambda count=n + 1: rows(postgres) == count)  # type: ignore[misc]
            os.kill(pid, signal.SIGKILL)  # PostgreSQL restarts all of its processes
            last = client.read_to_end()[-1].fields()
            assert last["C"] == "08006"
            eventually(lambda count=n + 1: rows(postgres) == count, within=30)  # type: ignore[misc]
            client.close()
            client = pool.raw().login()
        client.close()


# --- a cached plan ------------------------------------------------------------------------------------


def use(name: str) -> bytes:
    return bind(name) + describe("P") + execute() + SYNC


def test_an_altered_table_is_seen_by_prepared_statements(pool: Gpooler, postgres: Postgres) -> None:
    with pool.raw().login() as client, pool.raw().login() as other:
        client.query("CREATE TABLE altered (a int); INSERT INTO altered VALUES (1)")
        for one in (client, other):
            one.send(parse("SELECT * FROM altered", "all") + SYNC)
            one.read_until()
        with pool.raw().login() as holder:  # both servers have it
            for turn in range(2):
                for one in (client, other):
                    one.send(use("all"))
                    assert one.rows() == [["1"]]
                holder.query("BEGIN" if not turn else "COMMIT")
        postgres.query("ALTER TABLE altered ADD b int DEFAULT 2", "app")
        for one in (client, other):
            one.send(use("all"))
            assert one.rows() == [["1", "2"]]
        with pool.raw().login() as holder:
            holder.query("BEGIN")
            for one in (client, other):
                one.send(describe("S", "all") + use("all"))
                assert one.rows() == [["1", "2"]]
        postgres.query("ALTER TABLE altered DROP b", "app")
        client.query("BEGIN")
        client.send(use("all"))
        errors = [message.fields() for message in client.read_until() if message.kind == b"E"]
        assert [error["M"] for error in errors] == ["cached plan must not change result type"]
        client.query("ROLLBACK")
        client.query("BEGIN")
        client.send(use("all"))
        assert client.rows() == [["1"]]
        client.query("COMMIT")
        client.query("DROP TABLE altered")
