"""Session pools: a client has its server from login to the end, and gets its real process id."""

from collections.abc import Callable

import pytest

from gpooler.stats.registry import RouteWord
from tests.harness import Gpooler, Postgres, RawClient, eventually, free_port
from tests.harness.client import ServerError, cancel_request, query, startup

Factory = Callable[..., Gpooler]


def session_pool(factory: Factory, postgres: Postgres, workers: int = 1, **rule: object) -> Gpooler:
    return factory(postgres, rule={"pool": "session", **rule}, config={"performance": {"workers": workers}})


def pid_of(client: RawClient) -> int:
    return int(client.query("SELECT pg_backend_pid()")[0][0] or 0)


def test_login_hands_out_the_real_process_id(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = session_pool(gpooler_factory, postgres, pool_size=1)
    with gpooler.raw() as client:
        client.login()
        assert client.pid == pid_of(client)
        assert [row.pid for row in postgres.activity()] == [client.pid]
        client.terminate()
    with gpooler.raw() as client:
        client.login()
        assert client.pid == pid_of(client)


def test_session_state_lasts_for_the_session_and_no_longer(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = session_pool(gpooler_factory, postgres, pool_size=1, pool_reset_timeout_ms=9000)
    with gpooler.raw() as client:
        client.login()
        pid = client.pid
        client.query("SET work_mem = '5MB'")
        client.query("PREPARE p AS SELECT 1")
        client.query("CREATE TEMPORARY TABLE t (n int)")
        client.query("LISTEN ear")
        client.query("SELECT pg_advisory_lock(7)")
        client.query("DECLARE c CURSOR WITH HOLD FOR SELECT 1")
        assert client.query("SHOW work_mem") == [["5MB"]]
        assert client.query("EXECUTE p") == [["1"]]
        client.terminate()
    with gpooler.raw() as client:
        client.login()
        assert client.pid == pid
        assert client.query("SHOW work_mem") == [["4MB"]]
        assert client.query("SELECT count(*) FROM pg_prepared_statements") == [["0"]]
        assert client.query("SELECT count(*) FROM pg_class WHERE relname = 't'") == [["0"]]
        assert client.query("SELECT pg_listening_channels()") == []
        assert client.query("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == [["0"]]
        assert client.query("SELECT count(*) FROM pg_cursors WHERE name = 'c'") == [["0"]]


def test_state_made_inside_a_function_is_discarded_too(postgres: Postgres, gpooler_factory: Factory) -> None:
    """The scanner cannot see it: a session pool discards whatever its client spoke."""
    gpooler = session_pool(gpooler_factory, postgres, pool_size=1)
    with gpooler.raw() as client:
        client.login()
        client.query("DO $$ BEGIN EXECUTE 'SET work_mem = ''6MB'''; END $$")
        assert client.query("SHOW work_mem") == [["6MB"]]
    with gpooler.raw() as client:
        client.login()
        assert client.query("SHOW work_mem") == [["4MB"]]


def test_the_second_client_of_a_full_pool_waits_at_login(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = session_pool(gpooler_factory, postgres, pool_size=1, pool_reset_timeout_ms=9000)
    with gpooler.raw() as first, gpooler.raw() as second:
        first.login()
        second.send(startup("trust_user", "app"))
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
        pid = first.pid
        first.terminate()
        second.read_until()
        assert pid_of(second) == pid


def test_the_wait_at_login_is_bounded_by_pool_timeout(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = session_pool(gpooler_factory, postgres, pool_size=1)
    with gpooler.raw() as first, gpooler.raw() as second:
        first.login()
        gpooler.reload(rule={"pool_timeout": 200})
        with pytest.raises(ServerError, match="pool size") as caught:
            second.login()
        assert caught.value.sqlstate == "53300"
        assert second.read_to_end() == []
        assert first.query("SELECT 1") == [["1"]]


def test_a_long_wait_at_login_is_not_ended_by_the_login_timeout(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    port = free_port()
    gpooler = gpooler_factory(
        postgres,
        rule={"pool": "session", "pool_size": 1},
        config={"listen": [{"host": "127.0.0.1", "port": port, "client_login_timeout": 1000}]},
        port=port,
    )
    with gpooler.raw() as first, gpooler.raw() as second:
        first.login()
        second.send(startup("trust_user", "app"))
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
        first.query("SELECT pg_sleep(1.5)")
        first.terminate()
        assert second.read_until()[-1].kind == b"Z"


@pytest.mark.parametrize("workers", [1, 2])
def test_the_real_key_cancels(postgres: Postgres, gpooler_factory: Factory, workers: int) -> None:
    gpooler = session_pool(gpooler_factory, postgres, workers)
    with gpooler.raw() as client:
        client.login()
        for _ in range(6):
            client.send(query("SELECT pg_sleep(60)"))
            # a busy machine may open a server more than is needed: the client's is looked at
            eventually(
                lambda: [row.state for row in postgres.activity() if row.pid == client.pid] == ["active"]
            )
            with gpooler.raw() as canceller:
                canceller.send(cancel_request(client.pid, client.key))
                assert canceller.read_to_end() == []
            with pytest.raises(ServerError) as caught:
                client.rows()
            assert caught.value.sqlstate == "57014"
            assert client.query("SELECT 1") == [["1"]]


def test_the_key_of_a_session_before_does_nothing(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = session_pool(gpooler_factory, postgres, pool_size=1)
    with gpooler.raw() as client:
        client.login()
        pid, key = client.pid, bytes([client.key[0] ^ 1]) + client.key[1:]
        with postgres.locked():
            client.send(query("SELECT pg_advisory_xact_lock(1), 'whole'"))
            waiting = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            eventually(lambda: postgres.query(waiting) == [(pid,)])
            with gpooler.raw() as canceller:
                canceller.send(cancel_request(pid, key))
                assert canceller.read_to_end() == []
        assert client.rows() == [["", "whole"]]


def test_a_transaction_may_span_everything(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = session_pool(gpooler_factory, postgres)
    with gpooler.connect() as connection:
        connection.execute("BEGIN")
        connection.execute("CREATE TABLE spans (n int)")
        connection.execute("INSERT INTO spans VALUES (1)")
        connection.execute("ROLLBACK")
        row = connection.execute("SELECT to_regclass('spans')").fetchone()
        assert row == (None,)


def test_server_and_client_stay_together_between_transactions(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = session_pool(gpooler_factory, postgres, pool_size=3)
    with gpooler.raw() as one, gpooler.raw() as two, gpooler.raw() as three:
        clients = (one, two, three)
        for client in clients:
            client.login()
        for _ in range(5):
            for client in clients:
                assert pid_of(client) == client.pid
        assert len({client.pid for client in clients}) == 3
