"""COPY and large results: bytes arrive whole, slow readers cost no memory, failures leave a usable client."""

import hashlib
import socket
from collections.abc import Callable

import psutil
import pytest

from tests.harness import Gpooler, Postgres, RawClient, eventually
from tests.harness.client import (
    COPY_DONE,
    FLUSH,
    SYNC,
    ServerError,
    bind,
    copy_data,
    execute,
    message,
    parse,
    query,
    text,
)

Factory = Callable[..., Gpooler]

MEGABYTE = 1_000_000
# Over what a worker has anyway; kernel buffers are not its memory.
MEMORY_SLACK = 32 * MEGABYTE


@pytest.fixture
def pool(postgres: Postgres, gpooler_factory: Factory) -> Gpooler:
    postgres.query(
        "DROP TABLE IF EXISTS lines; CREATE TABLE lines (n int, data text); GRANT ALL ON lines TO PUBLIC",
        "app",
    )
    return gpooler_factory(postgres, rule={"pool_size": 1})


def memory(gpooler: Gpooler) -> int:
    return sum(psutil.Process(pid).memory_info().rss for pid in gpooler.worker_pids())


def kinds(client: RawClient) -> str:
    return b"".join(answer.kind for answer in client.read_until()).decode()


def test_copy_in_of_50_megabytes_arrives_whole(postgres: Postgres, pool: Gpooler) -> None:
    line = "x" * 990
    digest = hashlib.md5()
    with pool.raw() as client:
        client.login()
        before = memory(pool)
        client.send(query("COPY lines FROM STDIN"))
        client.read_until(b"G")
        for start in range(0, 50_000, 500):
            rows = "".join(f"{n}\t{line}\n" for n in range(start, start + 500)).encode()
            digest.update(rows)
            # cut where it hurts: rows and messages do not end together
            middle = len(rows) // 3
            client.send(copy_data(rows[:middle]), copy_data(rows[middle:]))
        assert memory(pool) < before + MEMORY_SLACK
        client.send(COPY_DONE)
        assert kinds(client) == "CZ"
        assert client.query("SELECT count(*), sum(n), min(length(data)) FROM lines") == [
            ["50000", str(sum(range(50_000))), "990"]
        ]
        received = hashlib.md5()
        client.send(query("COPY (SELECT * FROM lines ORDER BY n) TO STDOUT"))
        while (answer := client.read()).kind != b"Z":
            if answer.kind == b"d":
                received.update(answer.body)
        assert received.hexdigest() == digest.hexdigest()
        client.terminate()


def test_a_slow_reader_of_200_megabytes_costs_no_memory(pool: Gpooler) -> None:
    with pool.raw() as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.login()
        before = memory(pool)
        client.send(query("SELECT n, repeat('x', 1000000) FROM generate_series(1, 200) n"))
        most = 0
        for number in range(1, 201):
            row = client.read_until(b"D")[-1]
            assert row.body[6:].startswith(str(number).encode())
            assert len(row.body) > MEGABYTE
            if number % 10 == 0:
                most = max(most, memory(pool))
        assert most < before + MEMORY_SLACK
        assert kinds(client) == "CZ"
        assert client.query("SELECT 1") == [["1"]]


def test_copy_out_to_a_reader_that_pauses_arrives_whole(pool: Gpooler) -> None:
    with pool.raw() as client, pool.raw() as other:
        client.login()
        other.login()
        before = memory(pool)
        client.send(query("COPY (SELECT n, repeat('y', 990) FROM generate_series(1, 50000) n) TO STDOUT"))
        client.read_until(b"d")
        # nobody reads, and still the worker serves others as far as it has servers
        other.send(query("SELECT 2"))
        assert memory(pool) < before + MEMORY_SLACK
        count = 1 + sum(answer.kind == b"d" for answer in client.read_until())
        assert count == 50_000
        assert other.rows() == [["2"]]


def test_a_copy_that_fails_leaves_a_usable_client(postgres: Postgres, pool: Gpooler) -> None:
    with pool.raw() as client:
        client.login()
        for ending in (COPY_DONE, message(b"f", text("never mind"))):
            client.send(query("COPY lines FROM STDIN"))
            client.read_until(b"G")
            client.send(copy_data(b"not a number\tx\n"), copy_data(b"1\tx\n" * 1000), ending)
            with pytest.raises(ServerError) as caught:
                client.rows()
            assert caught.value.sqlstate in ("22P02", "57014")
            assert client.query("SELECT 1") == [["1"]]
        assert client.query("SELECT count(*) FROM lines") == [["0"]]
        pid = client.query("SELECT pg_backend_pid()")
    with pool.raw() as client:
        client.login()
        assert client.query("SELECT pg_backend_pid()") == pid


def test_copy_fail_undoes_the_copy(pool: Gpooler) -> None:
    with pool.raw() as client:
        client.login()
        client.send(query("COPY lines FROM STDIN"))
        client.read_until(b"G")
        client.send(copy_data(b"1\tx\n"), message(b"f", text("the client's reason")))
        with pytest.raises(ServerError, match="the client's reason") as caught:
            client.rows()
        assert caught.value.sqlstate == "57014"
        assert client.query("SELECT count(*) FROM lines") == [["0"]]


def test_copy_in_a_transaction(pool: Gpooler) -> None:
    with pool.raw() as client, pool.raw() as other:
        client.login()
        other.login()
        client.query("BEGIN")
        client.send(query("COPY lines FROM STDIN"))
        client.read_until(b"G")
        client.send(copy_data(b"1\tx\n2\ty\n"), COPY_DONE)
        assert kinds(client) == "CZ"
        client.query("ROLLBACK")
        assert other.query("SELECT count(*) FROM lines") == [["0"]]


def test_copy_by_the_extended_protocol(pool: Gpooler) -> None:
    """As drivers do it: Execute, then data, CopyDone, Sync; also everything in one write."""
    with pool.raw() as client:
        client.login()
        client.send(parse("COPY lines FROM STDIN"), bind(), execute(), FLUSH)
        assert b"".join(answer.kind for answer in client.read_until(b"G")) == b"12G"
        client.send(copy_data(b"1\tx\n"), COPY_DONE, SYNC)
        assert kinds(client) == "CZ"
        client.send(query("COPY lines FROM STDIN"), copy_data(b"2\ty\n"), COPY_DONE, query("SELECT 'behind'"))
        assert kinds(client) == "GCZ"
        assert client.rows() == [["behind"]]
        client.send(
            parse("COPY lines FROM STDIN"),
            bind(),
            execute(),
            copy_data(b"3\tz\n"),
            COPY_DONE,
            SYNC,
            query("SELECT 4"),
        )
        assert kinds(client) == "12GCZ"
        assert client.rows() == [["4"]]
        # libpq's way: a Sync before the data, swallowed by the server
        client.send(parse("COPY lines FROM STDIN"), bind(), execute(), SYNC)
        assert b"".join(answer.kind for answer in client.read_until(b"G")) == b"12G"
        client.send(copy_data(b"4\tz\n"), COPY_DONE, SYNC)
        assert kinds(client) == "CZ"
        assert client.query("SELECT string_agg(data, '' ORDER BY n) FROM lines") == [["xyzz"]]


def test_stray_copy_messages_mean_nothing(pool: Gpooler) -> None:
    with pool.raw() as client:
        client.login()
        client.send(copy_data(b"late"), COPY_DONE, message(b"f", text("late")), query("SELECT 1"))
        assert client.rows() == [["1"]]
        client.query("BEGIN")
        client.send(copy_data(b"late" * 10_000), COPY_DONE, query("SELECT 2"))
        assert client.rows() == [["2"]]
        client.query("COMMIT")
        assert client.query("SELECT 3") == [["3"]]


def test_a_query_of_20_megabytes_arrives_whole(pool: Gpooler) -> None:
    with pool.raw(timeout=30) as client:
        client.login()
        before = memory(pool)
        value = "x" * (20 * MEGABYTE)
        assert client.query(f"SELECT length('{value}')") == [[str(len(value))]]
        client.send(parse("SELECT length($1::text)"), bind(values=(value.encode(),)), execute(), SYNC)
        assert client.rows() == [[str(len(value))]]
        assert memory(pool) < before + MEMORY_SLACK
        assert client.query("SELECT 1") == [["1"]]


def test_large_rows_of_many_clients_do_not_mix(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 2})
    clients = [gpooler.raw().login() for _ in range(6)]
    for number, client in enumerate(clients):
        client.send(query(f"SELECT repeat('{number}', 1000000) FROM generate_series(1, 5)"))
    for number, client in enumerate(clients):
        rows = client.rows()
        assert rows == [[str(number) * MEGABYTE]] * 5
        client.terminate()
    eventually(lambda: [row.state for row in postgres.activity()] == ["idle"] * len(postgres.activity()))


# --- long streams of small pieces, which the relay lets the kernel gather (relay/engine.pxd: GATHER_FROM)

ROWS = 300_000
STREAM = f"SELECT n, repeat('z', 50) FROM generate_series(1, {ROWS}) n"
READY = message(b"Z", b"I")


def taken(client: RawClient, size: int = 1 << 40) -> bytes:
    """What arrives, up to a ReadyForQuery or at least ``size`` bytes; faster than PostgreSQL makes it."""
    data = bytearray()
    while len(data) < size and not data.endswith(READY):
        chunk = client.socket.recv(1 << 20)
        assert chunk
        data += chunk
    return bytes(data)


def test_what_follows_a_long_stream_of_small_rows_is_not_held_back(postgres: Postgres, pool: Gpooler) -> None:
    with RawClient(postgres.port) as direct:
        direct.login()
        direct.send(query(STREAM))
        expected = taken(direct)
    with pool.raw() as client, pool.raw() as other:
        client.login()
        other.login()
        for _ in range(3):
            client.send(query(STREAM))
            assert taken(client) == expected
            for number in range(100):
                assert other.query(f"SELECT {number}") == [[str(number)]]
                assert client.query(f"SELECT {number}") == [[str(number)]]


def test_a_stream_that_pauses_has_been_passed_on_by_then(postgres: Postgres, pool: Gpooler) -> None:
    with pool.raw() as client:
        client.login()
        client.send(query(STREAM))
        size = len(taken(client))
        client.send(query(f"{STREAM}; SELECT pg_sleep(60)"))
        taken(client, size - 16384)  # PostgreSQL itself keeps the last of them
        sleeping = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        eventually(lambda: postgres.query(sleeping) == [(1,)])
        client.reset()
    with pool.raw() as other:
        other.login()
        assert other.query("SELECT 1") == [["1"]]


def test_copy_data_of_a_client_that_pauses_has_been_passed_on_by_then(
    postgres: Postgres, pool: Gpooler
) -> None:
    line = b"1\t" + b"x" * 2000 + b"\n"
    count = 5000
    with pool.raw() as client:
        client.login()
        client.send(query("COPY lines FROM STDIN"))
        client.read_until(b"G")
        for _ in range(count):
            client.send(copy_data(line))
        progress = "SELECT bytes_processed FROM pg_stat_progress_copy"
        eventually(lambda: postgres.query(progress, "app") == [(count * len(line),)])
        client.send(COPY_DONE)
        assert kinds(client) == "CZ"
        assert client.query("SELECT count(*) FROM lines") == [[str(count)]]


def test_a_client_that_vanishes_in_a_long_stream_leaves_its_server_usable(pool: Gpooler) -> None:
    for _ in range(5):
        with pool.raw() as client:
            client.login()
            client.send(query(f"{STREAM}; {STREAM}"))
            taken(client, ROWS * 60)
            client.reset()
        with pool.raw() as other:
            other.login()
            assert other.query("SELECT 1") == [["1"]]
