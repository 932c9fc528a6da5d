"""Pipelines over the raw wire: what comes back is what PostgreSQL itself says, byte for byte.

Each stream of messages goes to PostgreSQL and through gpooler. Process ids and keys alone may differ, and
they come at login.
"""

import hashlib
import random
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from gpooler.stats.registry import RouteWord
from tests.harness import Gpooler, Postgres, RawClient, eventually
from tests.harness.bystander import Bystander
from tests.harness.client import (
    COPY_DONE,
    FLUSH,
    SYNC,
    TERMINATE,
    Message,
    bind,
    close,
    copy_data,
    describe,
    execute,
    message,
    parse,
    query,
    text,
)

Factory = Callable[..., Gpooler]

POOLS = ("transaction", "session", "statement")
ESTABLISHED = "01"
# Behind whatever came before (but an aborted transaction) PostgreSQL answers this, and it is the last answer.
END = COPY_DONE + SYNC + query("ROLLBACK") + query("SELECT 'the end'")
LAST_ROW = message(b"D", struct.pack("!hi", 1, 7) + b"the end") + message(b"C", text("SELECT 1"))
READY = message(b"Z", b"I")
MEGABYTE = 1 << 20
SCHEMA = """
DROP TABLE IF EXISTS piped; CREATE TABLE piped (n int CHECK (n < 1000), data text);
DROP TABLE IF EXISTS piped_late; CREATE TABLE piped_late (n int UNIQUE DEFERRABLE INITIALLY DEFERRED);
INSERT INTO piped_late VALUES (1); GRANT ALL ON piped, piped_late TO PUBLIC;
"""


@pytest.fixture
def tables(postgres: Postgres) -> None:
    postgres.query(SCHEMA, "app")


@pytest.fixture(params=POOLS)
def pool(
    request: pytest.FixtureRequest, postgres: Postgres, tables: None, gpooler_factory: Factory
) -> Gpooler:
    rule, routing = {"pool": request.param, "pool_size": 2}, {"virtual_transaction": True}
    return gpooler_factory(postgres, rule=rule, config={"routing": routing})


@pytest.fixture
def transaction_pool(postgres: Postgres, tables: None, gpooler_factory: Factory) -> Gpooler:
    return gpooler_factory(postgres, rule={"pool": "transaction", "pool_size": 2})


@contextmanager
def logged_in(port: int, **options: str) -> Iterator[RawClient]:
    with RawClient(port, timeout=30) as client:
        client.login(**options)
        assert client._buffer == b""
        yield client


def answer(port: int, pieces: list[bytes]) -> bytes:
    """All that comes back when these bytes are sent, up to the last row or the end of the connection."""
    with logged_in(port) as client:
        reader = threading.Thread(target=lambda: received.append(read_to_end(client)))
        received: list[bytes] = []
        reader.start()
        try:
            for piece in pieces:
                client.send(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the answer says why
        reader.join()
        with suppress(BrokenPipeError, ConnectionResetError):
            client.send(TERMINATE)
        return received[0]


def read_to_end(client: RawClient) -> bytes:
    data = bytearray()
    while not data.endswith(LAST_ROW + READY):
        try:
            chunk = client.socket.recv(1 << 16)
        except ConnectionResetError:
            break
        if not chunk:
            break
        data += chunk
    return bytes(data)


def split(data: bytes) -> list[Message]:
    """The messages of a stream, which must be whole."""
    found = []
    while data:
        kind, length = struct.unpack_from("!ci", data)
        assert len(data) > length, data[:200]
        found.append(Message(kind, data[5 : length + 1]))
        data = data[length + 1 :]
    return found


def rows_of(postgres: Postgres) -> list[tuple[int, str]]:
    return postgres.query("SELECT n, data FROM piped ORDER BY n, data", "app")


def assert_same(
    postgres: Postgres, pool: Gpooler, *messages: bytes, pieces: list[bytes] | None = None
) -> bytes:
    """PostgreSQL and gpooler say the same to these messages, and do the same."""
    stream = b"".join(messages) + END
    said, done = [], []
    for port in (postgres.port, pool.port):
        postgres.query("TRUNCATE piped", "app")
        said.append(answer(port, [*pieces, END] if pieces and port == pool.port else [stream]))
        done.append(rows_of(postgres))
    if said[0] != said[1]:
        assert split(said[0]) == split(said[1])
    assert done[0] == done[1]
    return said[1]


def group(sql: str, *values: bytes | None, name: str = "", rows: int = 0, portal: str = "") -> bytes:
    """What a driver sends for one query, without its Sync."""
    return parse(sql, name) + bind(name, values, portal) + describe("P", portal) + execute(portal, rows)


# --- groups -------------------------------------------------------------------------------------


def test_thousands_of_groups_in_one_write(postgres: Postgres, pool: Gpooler) -> None:
    groups = [
        group("SELECT $1::int, repeat('x', $1::int % 50)", b"%d" % number) + SYNC for number in range(2000)
    ]
    with Bystander(pool):
        said = assert_same(postgres, pool, *groups)
    values = [found.values()[0] for found in split(said) if found.kind == b"D"]
    assert values == [*map(str, range(2000)), "the end"]


def test_thousands_of_groups_of_all_kinds(postgres: Postgres, pool: Gpooler) -> None:
    with Bystander(pool):
        assert_same(
            postgres,
            pool,
            *(
                [query("SELECT 1"), SYNC, group("SELECT 2") + SYNC, query(""), group("nonsense") + SYNC][
                    n % 5
                ]
                for n in range(3000)
            ),
        )


def test_an_error_spoils_its_group_alone(postgres: Postgres, pool: Gpooler) -> None:
    """Everything behind it, a Query too, is skipped up to the Sync; what came before it is undone."""
    insert = group("INSERT INTO piped VALUES ($1, 'x')", b"1")
    for wrong in (
        group("nonsense"),
        group("SELECT 1/0"),
        group("INSERT INTO piped VALUES (1000)"),
        bind("missing"),
        execute("missing"),
        describe("S", "missing"),
        group("SELECT $1::int", b"x"),
        message(b"P"),
        message(b"B", b"\0"),
        close("X"),
        group("INSERT INTO piped_late VALUES (1)"),  # fails at the Sync
    ):
        assert_same(
            postgres,
            pool,
            insert + SYNC,
            insert + wrong + insert + query("INSERT INTO piped VALUES (2)") + FLUSH + insert + SYNC,
            insert + SYNC + wrong + SYNC + wrong + SYNC + insert + SYNC,
            query("INSERT INTO piped VALUES (3)"),
            wrong + wrong + query("SELECT 4") + SYNC,
        )


def test_a_group_that_ends_in_a_query(postgres: Postgres, pool: Gpooler) -> None:
    """A Query ends an open group, too, and its transaction."""
    assert_same(
        postgres,
        pool,
        group("INSERT INTO piped VALUES (1)") + query("INSERT INTO piped VALUES (2)"),
        group("INSERT INTO piped VALUES (3)") + query("SELECT 1/0") + SYNC,
        group("INSERT INTO piped VALUES (4)") + query("") + group("SELECT 5") + query("SELECT 6; SELECT 7"),
    )


def test_syncs_and_flushes_at_odd_places(postgres: Postgres, pool: Gpooler) -> None:
    for stream in (
        SYNC,
        SYNC * 100,
        FLUSH * 100 + SYNC,
        FLUSH + query("SELECT 1") + FLUSH + SYNC + FLUSH,
        SYNC + query("SELECT 1") + SYNC + SYNC + query("SELECT 2"),
        parse("SELECT 1") + FLUSH + bind() + FLUSH + describe("P") + FLUSH + execute() + FLUSH + SYNC,
        parse("SELECT 1") + parse("SELECT 2") + bind() + execute() + execute() + SYNC,
        close("S") + close("P") + SYNC + close("S", "none") + SYNC,
        group("nonsense") + FLUSH * 5 + SYNC * 5 + group("SELECT 1") + SYNC,
        query("") + SYNC + parse("") + bind() + describe("S") + describe("P") + execute() + SYNC,
    ):
        assert_same(postgres, pool, stream)
        assert_same(postgres, pool, stream * 30)


def test_answers_come_as_soon_as_a_flush_asks_for_them(pool: Gpooler) -> None:
    with logged_in(pool.port) as client:
        for number in range(20):
            client.send(group("SELECT $1::int", b"%d" % number), FLUSH)
            kinds = [client.read().kind for _ in range(5)]
            assert kinds == [b"1", b"2", b"T", b"D", b"C"]
        client.send(SYNC)
        assert client.read().kind == b"Z"
        client.terminate()


# --- portals ------------------------------------------------------------------------------------


def test_rows_come_by_the_portion(postgres: Postgres, pool: Gpooler) -> None:
    numbers = "SELECT n, repeat('x', n) FROM generate_series(1, 100) n"
    for rows in (1, 7, 99, 100, 101):
        assert_same(
            postgres, pool, group(numbers, rows=rows), *[execute(rows=rows)] * (110 // rows + 1), SYNC
        )
    assert_same(
        postgres,
        pool,
        group(numbers, rows=10),
        group("SELECT 1"),
        execute("", 10),
        SYNC,
        execute("", 10),
        SYNC,
    )


def test_portals_live_to_the_end_of_their_transaction(postgres: Postgres, transaction_pool: Gpooler) -> None:
    numbers = "SELECT generate_series(1, 100)"
    fetch = execute("p", 10) + SYNC
    with Bystander(transaction_pool):
        for end in ("COMMIT", "ROLLBACK"):
            assert_same(
                postgres,
                transaction_pool,
                query("BEGIN"),
                group(numbers, portal="p", rows=10) + SYNC,
                group(numbers, portal="q", rows=3) + SYNC,
                fetch,
                query("SAVEPOINT s"),
                fetch + execute("q") + SYNC,
                query("DECLARE c CURSOR FOR SELECT generate_series(1, 10); FETCH 3 FROM c"),
                describe("P", "c") + execute("c", 2) + SYNC,
                close("P", "q") + execute("q") + SYNC,
                query("ROLLBACK TO s"),
                fetch + fetch,
                query(end),
                fetch,
                query("SELECT 1"),
            )


def test_a_transaction_by_messages_of_both_kinds(postgres: Postgres, transaction_pool: Gpooler) -> None:
    insert = group("INSERT INTO piped VALUES ($1, 'x')", b"5") + SYNC
    with Bystander(transaction_pool):
        for begin in (query("BEGIN"), group("BEGIN") + SYNC, group("BEGIN")):
            for end in (
                query("COMMIT"),
                group("COMMIT") + SYNC,
                group("ROLLBACK") + SYNC,
                group("SELECT 1/0"),
            ):
                assert_same(postgres, transaction_pool, begin, insert, insert, end, SYNC, insert)
                assert_same(
                    postgres, transaction_pool, begin, insert, query("nonsense"), insert, end, SYNC, insert
                )


def test_an_unnamed_statement_outlives_its_sync(postgres: Postgres, pool: Gpooler) -> None:
    """Drivers that describe first and bind later: Parse, Describe, Sync; then Bind, Execute, Sync."""
    with logged_in(pool.port) as client, Bystander(pool):
        for number in range(200):
            client.send(parse(f"SELECT {number}, $1::int"), describe("S"), SYNC)
            assert [found.kind for found in client.read_until()] == [b"1", b"t", b"T", b"Z"]
            client.send(bind(values=(b"7",)), execute(), SYNC)
            assert client.rows() == [[str(number), "7"]]
        client.terminate()


@pytest.mark.parametrize("inside", ["", "data", "a second Sync"])
@pytest.mark.parametrize(
    "behind",
    [
        pytest.param(parse("SELECT 7", "a") + bind("a") + execute() + SYNC, id="Parse"),
        pytest.param(close("S", "a") + SYNC, id="Close"),
        pytest.param(query("RESET ALL"), id="RESET ALL"),
        pytest.param(query("SELECT 7"), id="Query"),
    ],
)
def test_what_stands_behind_a_copy_that_swallowed_its_sync(
    postgres: Postgres, pool: Gpooler, inside: str, behind: bytes
) -> None:
    """Sent at once it waits for a ReadyForQuery, as long as nobody knows that the Sync will have none."""
    middle = {"": b"", "data": copy_data(b"1\tx\n"), "a second Sync": SYNC}[inside]
    copy = parse("COPY piped FROM STDIN") + bind() + execute() + SYNC + middle + COPY_DONE
    assert_same(postgres, pool, copy + behind)


@pytest.mark.parametrize("mode", ["transaction", "statement"])
def test_an_unnamed_statement_is_never_that_of_another(
    postgres: Postgres, gpooler_factory: Factory, mode: str
) -> None:
    pool = gpooler_factory(postgres, rule={"pool": mode, "pool_size": 1})
    with logged_in(pool.port) as one, logged_in(pool.port) as two, logged_in(pool.port) as three:
        for client in (one, two):
            client.send(group("SELECT 'secret'"), SYNC)
            assert client.rows() == [["secret"]]
        for stream in (bind() + execute() + SYNC, describe("S") + SYNC):
            three.send(stream)
            *_, error, ready = three.read_until()
            assert (error.kind, ready.kind) == (b"E", b"Z")
            assert error.fields()["C"] == "26000"
            three.query("SELECT 1")
        for client in (one, two, three):
            client.terminate()


def test_a_server_is_kept_for_a_parse_that_was_not_bound_and_no_longer(
    transaction_pool: Gpooler,
) -> None:
    def active() -> int:
        return transaction_pool.route_count(RouteWord.SERVERS_ACTIVE)

    with logged_in(transaction_pool.port) as client:
        for stream, kept in (
            (parse("SELECT 1") + describe("S") + SYNC, 1),
            (bind() + execute() + SYNC, 0),
            (parse("SELECT 1") + SYNC, 1),
            (query("SELECT 2"), 0),
            (parse("SELECT 1") + SYNC, 1),
            (parse("nonsense") + describe("S") + SYNC, 0),
            (group("SELECT 1") + SYNC, 0),
        ):
            client.send(stream)
            client.read_until()
            eventually(lambda kept=kept: active() == kept)  # type: ignore[misc]
        client.terminate()


# --- cuts and sizes -----------------------------------------------------------------------------


class Unread:
    """Says whether all that a client sent was read, as the kernel counts it."""

    def __init__(self, client: RawClient) -> None:
        _, ours = client.socket.getsockname()
        _, theirs = client.socket.getpeername()
        self._ends = (f":{theirs:04X}", f":{ours:04X}")

    def __bool__(self) -> bool:
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if (fields[1][-5:], fields[2][-5:]) == self._ends and fields[3] == ESTABLISHED:
                return fields[4].split(":")[1] != "00000000"
        raise AssertionError("the connection is gone")


def test_a_message_may_be_cut_at_every_byte(postgres: Postgres, pool: Gpooler) -> None:
    stream = (
        group("SELECT $1::int, 'abc'", b"7") + SYNC + query("SELECT 1; SELECT 2") + group("nonsense") + SYNC
        + query("COPY piped FROM STDIN") + copy_data(b"1\tone\n") + copy_data(b"2\ttwo\n") + COPY_DONE
        + group("INSERT INTO piped VALUES (3, 'three')") + FLUSH + SYNC + SYNC
    )  # fmt: skip
    expected = split(answer(postgres.port, [stream + END]))[:-6]  # without the end
    for at in range(1, len(stream)):
        with logged_in(pool.port) as client:
            unread = Unread(client)
            client.send(stream[:at])
            eventually(lambda unread=unread: not unread)  # type: ignore[misc]
            client.send(stream[at:], END)
            assert split(read_to_end(client))[:-6] == expected, at


def test_a_message_may_come_byte_by_byte(postgres: Postgres, pool: Gpooler) -> None:
    stream = group("SELECT $1::int", b"7") + SYNC + query("SELECT 'BEGIN'") + group("nonsense") + SYNC
    assert_same(postgres, pool, stream, pieces=[bytes([byte]) for byte in stream])


@pytest.mark.parametrize("kind", ["query", "parse", "bind", "copy", "row", "row by portal"])
def test_messages_of_64_megabytes(postgres: Postgres, pool: Gpooler, kind: str) -> None:
    size = 64 * MEGABYTE
    load = b"0123456789abcdef" * (size // 16)
    match kind:
        case "query":
            stream = [message(b"Q", b"SELECT md5('" + load + b"')\0"), query("SELECT 'behind'")]
        case "parse":
            stream = [message(b"P", b"\0SELECT md5('" + load + b"')\0\0\0"), bind(), execute(), SYNC]
        case "bind":
            stream = [group("SELECT md5($1::text)", load), SYNC]
        case "copy":
            stream = [query("COPY piped FROM STDIN"), copy_data(b"1\t" + load + b"\n"), COPY_DONE]
            stream.append(query("SELECT n, md5(data) FROM piped"))
        case "row":
            stream = [query(f"SELECT repeat('0123456789abcdef', {size // 16}), 1"), query("SELECT 'behind'")]
        case _:
            stream = [group(f"SELECT repeat('0123456789abcdef', {size // 16}), 1", rows=1), SYNC]
    said = []
    for port in (postgres.port, pool.port):
        postgres.query("TRUNCATE piped", "app")
        said.append(answer(port, [*stream, END]))
    assert len(said[0]) == len(said[1])
    assert hashlib.sha256(said[0]).digest() == hashlib.sha256(said[1]).digest()
    if "row" not in kind:
        assert hashlib.md5(load).hexdigest().encode() in said[1]


# --- random -------------------------------------------------------------------------------------


STATEMENTS = (
    "SELECT 1", "SELECT generate_series(1, 30)", "SELECT repeat('z', 20000) FROM generate_series(1, 10)",
    "nonsense", "SELECT 1/0", "", "INSERT INTO piped VALUES (1, 'x')",
    "INSERT INTO piped VALUES (2, 'y') RETURNING n",
    "INSERT INTO piped VALUES (1000, 'x')", "INSERT INTO piped_late VALUES (1)", "DELETE FROM piped",
    "SET application_name = 'x'", "RESET ALL", "SHOW application_name",
    "DO $$BEGIN RAISE NOTICE 'x'; END$$", "SELECT 'BEGIN'",
)  # fmt: skip
SIMPLE = (
    "SELECT 1; SELECT 2",
    "SELECT 1; SELECT 1/0; SELECT 2",
    "INSERT INTO piped VALUES (3, 'z'); nonsense",
)
BLOCKS = ("BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT s", "ROLLBACK TO s", "COMMIT; BEGIN")
COPIES = ("COPY piped FROM STDIN", "COPY missing FROM STDIN")
SWALLOWED = (b"", SYNC, SYNC * 2, copy_data(b"4\tu\n") + SYNC)


def random_stream(chance: random.Random, has_blocks: bool) -> list[bytes]:
    statements = STATEMENTS + (BLOCKS if has_blocks else ())
    stream = []
    # Behind a COPY that failed around a Sync the relay cannot tell answers apart: a name that is taken is
    # not found to be so there (docs/design.md, "Known").
    has_names = chance.random() < 0.5
    for _ in range(chance.randrange(2, 25)):
        match chance.randrange(10 if has_names else 8):
            case 0 | 1:
                stream.append(query(chance.choice(statements + SIMPLE)))
            case 2 | 3:
                rows = chance.choice([0, 0, 1, 10])
                stream.append(group(chance.choice(statements), rows=rows) + chance.choice([SYNC, SYNC, b""]))
            case 4:
                one, two = chance.choice(STATEMENTS), chance.choice(statements)
                stream.append(group(one) + chance.choice([b"", FLUSH, execute()]) + group(two) + SYNC)
            case 5:
                lines = chance.choice([b"1\tx\n", b"x\n", b"1000\tx\n", b"5\tz\n" * 30_000])
                middle = chance.choice([b"", b"", FLUSH if has_names else SYNC, FLUSH])
                stream.append(query(chance.choice(COPIES)) + copy_data(lines) + middle + copy_data(b"2\ty\n"))
                stream.append(chance.choice([COPY_DONE, COPY_DONE, message(b"f", text("no"))]))
            case 6:
                stream.append(query("COPY (SELECT generate_series(1, 500)) TO STDOUT"))
            case 7:
                stream.append(chance.choice([SYNC, FLUSH, SYNC * 3, COPY_DONE, close("P"), copy_data(b"x")]))
            case 8:
                # (data that is taken: if the COPY fails, nobody can tell which Syncs it has swallowed)
                copy = parse(COPIES[0]) + bind() + execute() + chance.choice(SWALLOWED) + copy_data(b"3\tw\n")
                stream.append(copy + COPY_DONE + chance.choice([SYNC, SYNC, b""]))
            case _:
                name = chance.choice("ab")
                stream.append(group(chance.choice(STATEMENTS), name=name) + SYNC)
                stream.append(bind(name) + execute() + chance.choice([close("S", name), b""]) + SYNC)
    return stream


def test_random_pipelines_are_answered_as_by_postgres(postgres: Postgres, pool: Gpooler) -> None:
    has_blocks = 'pool = "statement"' not in pool.config_file.read_text()
    with Bystander(pool):
        for _ in range(60):
            seed = random.getrandbits(40)
            chance = random.Random(seed)
            stream = random_stream(chance, has_blocks)
            whole = b"".join(stream)
            cuts = sorted(chance.randrange(len(whole) + 1) for _ in range(chance.choice([0, 1, 5])))
            pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
            try:
                assert_same(postgres, pool, whole, pieces=pieces)
            except Exception as error:
                raise AssertionError(f"seed {seed}: {stream}") from error
