"""Whatever is sent before login or after it ends in an error or a closed socket, and nobody else notices.

Each test runs beside a well-behaved client and ends with a full account: workers, clients, descriptors,
slots, pg_stat_activity.
"""

import json
import os
import random
import re
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import scramp

from gpooler.config.load import ConfigError, load
from gpooler.stats.registry import ProcessWord, RouteWord
from tests.harness import PASSWORD, Gpooler, Postgres, RawClient, eventually, free_port
from tests.harness.bystander import Bystander
from tests.harness.client import (
    COPY_DONE,
    FLUSH,
    GSSENC_REQUEST,
    PROTOCOL_3_0,
    SSL_REQUEST,
    SYNC,
    TERMINATE,
    Message,
    bind,
    cancel_request,
    close,
    copy_data,
    describe,
    execute,
    message,
    parse,
    query,
    startup,
    text,
)
from tests.harness.gpooler import command

Factory = Callable[..., Gpooler]

LOGIN_TIMEOUT_MS = 20_000
SHORT_LOGIN_TIMEOUT_MS = 3000  # where it is to be met, and an honest login beside it is not
END_S = 30  # until a session whose client says no more has ended
POOL_SIZE = 3
WORKERS = 2
# More than come at once. Beyond its backlog the kernel answers with SYN cookies, of which it keeps nothing:
# who then finds the queue full and says nothing is connected for itself alone.
BACKLOG = 1024
CORPUS = Path(__file__).parents[1] / "wire" / "startup"
EXPECTED: dict[str, dict[str, Any]] = json.loads((CORPUS / "expected.json").read_text())
METHODS = {"trust": "none", "clear": "clear_text", "md5": "md5", "scram": "scram-sha-256"}
ROUTES = ("trust_user", *METHODS)
LOCK = 4711
# What gpooler may say to bad input at a login; anything else would be a mistake of ours.
REFUSALS = {"08P01", "0A000", "22023", "28000", "28P01", "3D000", "42601", "42704", "55P02"}
# SQLSTATEs of PostgreSQL for startup parameters that a mutation spoiled.
SETTINGS = {"22023", "42602", "42704", "22021", "42501", "55P02"}
READY = b"Z\0\0\0\5I"
BAD_LENGTHS = [2**31 - 1, -1, -(2**31), 0, 1, 3, 2**30]


def rule(**options: Any) -> dict[str, Any]:
    return {
        "storage": "postgres",
        "storage_db": "app",
        "storage_user": "trust_user",
        "pool": "transaction",
        "pool_size": POOL_SIZE,
        **options,
    }


def users(**options: Any) -> dict[str, Any]:
    """A user for each method, and trust_user for the bystander; nobody else."""
    found: dict[str, Any] = {
        name: rule(authentication=method, password=PASSWORD, **options)
        for name, method in METHODS.items()
        if method != "none"
    }
    found["trust"] = found["trust_user"] = rule(authentication="none", **options)
    return {"database": {"default": {"user": {"default": None, **found}}}}


@pytest.fixture
def pool(postgres: Postgres, gpooler_factory: Factory) -> Gpooler:
    return make_pool(postgres, gpooler_factory)


@pytest.fixture
def impatient_pool(postgres: Postgres, gpooler_factory: Factory) -> Gpooler:
    return make_pool(postgres, gpooler_factory, timeout_ms=SHORT_LOGIN_TIMEOUT_MS)


def make_pool(
    postgres: Postgres, gpooler_factory: Factory, timeout_ms: int = LOGIN_TIMEOUT_MS, **options: Any
) -> Gpooler:
    port = free_port()
    return gpooler_factory(
        postgres,
        port=port,
        config={
            "performance": {"workers": WORKERS},
            "listen": [
                {
                    "host": "127.0.0.1",
                    "port": port,
                    "backlog": BACKLOG,
                    "client_login_timeout": timeout_ms,
                }
            ],
            **users(**options),
        },
    )


# --- the account at the end ---------------------------------------------------------------------


def clients_left(gpooler: Gpooler) -> dict[str, int]:
    """What must be back to zero when nobody is connected."""
    return {
        "counted": gpooler.process_count(ProcessWord.CLIENTS),
        "in login": gpooler.process_count(ProcessWord.CLIENTS_LOGIN),
        "connections": gpooler.client_connections(),
        **{
            word.name: gpooler.route_count(word)
            for word in (
                RouteWord.CLIENTS,
                RouteWord.CLIENTS_ADMITTED,
                RouteWord.CLIENTS_ACTIVE,
                RouteWord.CLIENTS_WAITING,
                RouteWord.SERVERS_ACTIVE,
                RouteWord.SERVERS_LOGIN,
                RouteWord.SERVERS_CLOSING,
            )
        },
    }


def assert_nobody_left(gpooler: Gpooler) -> None:
    def is_empty() -> bool:
        left = {name: count for name, count in clients_left(gpooler).items() if count}
        assert not left, left
        return True

    eventually(is_empty, within=10)


@contextmanager
def held_servers(gpooler: Gpooler, postgres: Postgres) -> Iterator[list[RawClient]]:
    """All servers of trust_user run a statement that waits for the end of this context."""
    sql = f"SELECT pg_backend_pid(), pg_advisory_xact_lock_shared({LOCK})"
    with ExitStack() as stack:
        with postgres.locked(LOCK):
            clients = [stack.enter_context(gpooler.raw().login()) for _ in range(POOL_SIZE)]
            for client in clients:
                client.send(query(sql))
            running = (sql, "active")
            eventually(
                lambda: [(row.query, row.state) for row in postgres.activity()].count(running) == POOL_SIZE
            )
            yield clients
        assert len({client.rows()[0][0] for client in clients}) == POOL_SIZE


def every_slot_serves(gpooler: Gpooler, postgres: Postgres) -> None:
    """As many statements at once as there are slots: none of them was lost."""
    with held_servers(gpooler, postgres):
        pass


@contextmanager
def unharmed(gpooler: Gpooler, postgres: Postgres) -> Iterator[None]:
    """Whatever happens inside: the workers live, others are served, and nothing of it is left."""
    with gpooler.raw() as first:  # what is opened once and kept
        first.login()
        first.send(query("SELECT 1"))
        first.rows()
        with gpooler.raw() as other:
            other.send(cancel_request(first.pid, first.key))
            other.read_to_end()
    every_slot_serves(gpooler, postgres)
    assert_nobody_left(gpooler)
    # none is on its way from one worker to the other
    eventually(lambda: gpooler.route_count(RouteWord.SERVERS_IDLE) == len(postgres.activity()))
    # each has a duplicate of each server, which comes by messages
    keepers = (gpooler.pid, gpooler.broker_pid())

    def have_all() -> bool:
        return all(connections_to(pid, postgres.port) == len(postgres.activity()) for pid in keepers)

    eventually(have_all)
    processes = [gpooler.broker_pid(), *gpooler.worker_pids()]
    descriptors = gpooler.descriptors()
    servers = len(postgres.activity())
    with Bystander(gpooler):
        yield
    assert_nobody_left(gpooler)
    assert [gpooler.broker_pid(), *gpooler.worker_pids()] == processes, gpooler.tail()
    every_slot_serves(gpooler, postgres)
    assert_nobody_left(gpooler)

    def all_are_idle() -> int:
        rows = postgres.activity()
        assert len(rows) == gpooler.route_count(RouteWord.SERVERS_IDLE) <= POOL_SIZE * len(ROUTES)
        assert {row.state for row in rows} == {"idle"}
        return len(rows)

    servers_now = eventually(all_are_idle)

    def has_no_more_descriptors() -> bool:
        more = {pid: count - descriptors[pid] for pid, count in gpooler.descriptors().items()}
        allowed = max(0, servers_now - servers)
        for keeper in keepers:
            assert more.pop(keeper) <= allowed, f"{keeper} has too many for {allowed} more servers"
        # a server may have gone from one worker to the other
        assert sum(more.values()) <= allowed, f"{more} for {allowed} more servers"
        return True

    eventually(has_no_more_descriptors)


def connections_to(pid: int, port: int) -> int:
    return sum(each.raddr.port == port for each in psutil.Process(pid).net_connections() if each.raddr)


def read_all(client: RawClient) -> list[Message]:
    """What the server sends until it closes; a cut message or bytes that are none fail the test.

    A client that turns out to be logged in says no more.
    """
    data, client._buffer = client._buffer, b""
    is_done = False
    while True:
        try:
            chunk = client.socket.recv(65536)
        except ConnectionResetError:
            break
        if not chunk:
            break
        data += chunk
        if data.endswith(READY) and not is_done:
            is_done = True
            with suppress(OSError):
                client.half_close()
    found = []
    if data.startswith(b"N") and data[1:2] != b"\0":
        data = data[1:]  # the answer to an SSLRequest; a notice would go on with its length
    while data:
        assert len(data) >= 5, data
        (length,) = struct.unpack_from("!i", data, 1)
        assert 4 <= length < len(data), data[:200]
        found.append(Message(data[:1], data[5 : length + 1]))
        data = data[length + 1 :]
    return found


def assert_refused(messages: list[Message], codes: set[str]) -> None:
    """The last message, if there is any, is a FATAL error with one of these SQLSTATEs."""
    for answer in messages[:-1]:
        assert answer.kind != b"E", answer.fields()
    if messages:
        fields = messages[-1].fields()
        assert (messages[-1].kind, fields["S"]) == (b"E", "FATAL"), messages[-1]
        assert fields["C"] in codes, fields


def send(client: RawClient, data: bytes) -> None:
    """Send what the peer takes: it may close before it has all."""
    with suppress(BrokenPipeError, ConnectionResetError):
        client.send(data)


# --- before login -------------------------------------------------------------------------------


def test_every_bad_startup_packet_is_refused_as_postgres_would(postgres: Postgres, pool: Gpooler) -> None:
    with unharmed(pool, postgres):
        for path, expected in EXPECTED.items():
            if path.startswith("invalid"):
                with pool.raw() as client:
                    client.send((CORPUS / path).read_bytes())
                    (error,) = client.read_to_end()
                    fields = error.fields()
                    assert (fields["S"], fields["C"]) == ("FATAL", expected["sqlstate"]), path


def test_a_startup_packet_cut_at_any_place_ends_with_its_client(postgres: Postgres, pool: Gpooler) -> None:
    whole = startup("scram", "app", application_name="x")
    with unharmed(pool, postgres):
        for size in range(len(whole)):
            with pool.raw() as client:
                client.send(whole[:size])
                client.half_close()
                assert read_all(client) == []


def test_what_never_becomes_a_login_is_ended_in_time(postgres: Postgres, impatient_pool: Gpooler) -> None:
    begun = startup("clear", "app")
    beginnings = [
        b"",
        b"\0",
        struct.pack("!i", 10_000),
        struct.pack("!ii", 10_000, PROTOCOL_3_0) + b"user\0",
        begun[:-1],
        SSL_REQUEST[:-1],
        begun + b"p",
        begun + struct.pack("!ci", b"p", 65_535),
        begun + message(b"p", text(PASSWORD))[:-1],
        startup("scram", "app") + message(b"p", text("SCRAM-SHA-256") + struct.pack("!i", -1)),
    ]
    with unharmed(impatient_pool, postgres), ExitStack() as stack:
        clients = [stack.enter_context(impatient_pool.raw()) for _ in range(3 * len(beginnings))]
        for client, beginning in zip(clients, beginnings * 3, strict=True):
            client.send(beginning)
        for client in clients:
            *before, error = client.read_to_end()
            assert {answer.kind for answer in before} <= {b"R"}
            assert (error.fields()["S"], error.fields()["C"]) == ("FATAL", "08P01")


def test_a_login_that_drips_is_ended_in_time(postgres: Postgres, impatient_pool: Gpooler) -> None:
    """Each byte is progress, and yet the time for the whole is bounded."""
    packet = startup("clear", "app", application_name="x" * 9000)
    with unharmed(impatient_pool, postgres), impatient_pool.raw() as client:
        ended = False
        for byte in packet:
            send(client, bytes([byte]))
            try:
                client.socket.settimeout(0.01)
                ended = client.socket.recv(1) == b"E"
                break
            except TimeoutError:
                continue
        assert ended


def test_endless_bytes_behind_a_bad_length_are_not_read(postgres: Postgres, pool: Gpooler) -> None:
    with unharmed(pool, postgres):
        for length in [*BAD_LENGTHS, 7, 10_005]:
            with pool.raw() as client, pytest.raises((BrokenPipeError, ConnectionResetError)):
                client.send(struct.pack("!i", length), b"\0" * 32_000_000)


def test_what_is_no_password_is_refused(postgres: Postgres, pool: Gpooler) -> None:
    chance = random.Random(random.getrandbits(64))
    answers = [
        *(message(bytes([kind]), text(PASSWORD)) for kind in range(256) if kind != ord("p")),
        *(struct.pack("!ci", b"p", length) + b"x" * 100 for length in [*BAD_LENGTHS, 65_536]),
        message(b"p"),
        message(b"p", b"without its end"),
        message(b"p", text(PASSWORD) + text(PASSWORD)),
        message(b"p", b"\0" * 60_000),
        startup("clear", "app"),
        SSL_REQUEST,
        query("SELECT 1"),
        TERMINATE,
        SYNC,
    ]
    with unharmed(pool, postgres):
        for answer in answers:
            for is_at_once in (False, True):
                with pool.raw() as client:
                    begun = startup(chance.choice(["clear", "md5", "scram"]), "app")
                    if is_at_once:
                        client.send(begun, answer)
                    else:
                        client.send(begun)
                        assert client.read().kind == b"R"
                        client.send(answer)
                    said = read_all(client)
                    assert_refused([m for m in said if m.kind != b"R"], {"08P01", "28P01"})


BAD_SASL_RESPONSES = [
    b"",
    b"SCRAM-SHA-256",
    text("SCRAM-SHA-256"),
    text("SCRAM-SHA-256") + struct.pack("!i", 2**31 - 1),
    text("SCRAM-SHA-256") + struct.pack("!i", -2) + b"n,,n=,r=abc",
    text("SCRAM-SHA-256") + struct.pack("!i", 3) + b"n,,n=,r=abc",
    text("SCRAM-SHA-256") + struct.pack("!i", 11) + b"p,,n=,r=abc",
    text("SCRAM-SHA-256") + struct.pack("!i", 11) + b"n,,n=,r=a\0c",
    text("SCRAM-SHA-256-PLUS") + struct.pack("!i", 11) + b"n,,n=,r=abc",
    text("PLAIN") + struct.pack("!i", 11) + b"n,,n=,r=abc",
    text("SCRAM-SHA-256") + struct.pack("!i", 2000) + b"n,,n=,r=" + b"a" * 1992,
    b"\xff" * 300,
    b"n" * 65_531,
]


def test_what_is_no_sasl_response_is_refused(postgres: Postgres, pool: Gpooler) -> None:
    with unharmed(pool, postgres):
        for initial in BAD_SASL_RESPONSES:
            with pool.raw() as client:
                client.send(startup("scram", "app"))
                assert client.read().kind == b"R"
                client.send(message(b"p", initial))
                (error,) = read_all(client)
                assert_refused([error], {"08P01", "0A000"})


def test_a_password_that_nobody_asked_for_breaks_the_protocol(postgres: Postgres, pool: Gpooler) -> None:
    with unharmed(pool, postgres):
        for is_at_once in (False, True):
            for is_first in (True, False):  # a route's first startup packet of a kind is tried on a server
                with pool.raw() as client:
                    options = {"application_name": "x"} if is_first else {"DateStyle": f"SQL, {'MDY'}"}
                    begun = startup("trust", "app", **options)
                    password = message(b"p", text(PASSWORD))
                    if is_at_once:
                        client.send(begun, password)
                    else:
                        client.send(begun)
                        client.read_until()
                        client.send(password)
                    said = read_all(client)
                    assert_refused(said, {"08P01"})
                    assert said
        for user in ("clear", "md5"):
            with pool.raw() as client:
                client.login(user, password=PASSWORD)
                client.send(message(b"p", text(PASSWORD)))
                said = read_all(client)
                assert said
                assert_refused(said, {"08P01"})


def test_encryption_requests_do_not_go_round_in_circles(postgres: Postgres, pool: Gpooler) -> None:
    with unharmed(pool, postgres):
        for first, second in ((SSL_REQUEST, GSSENC_REQUEST), (GSSENC_REQUEST, SSL_REQUEST)):
            for loop in ((first, first), (first, second, first), (first, second, second)):
                with pool.raw() as client:
                    for request in loop[:-1]:
                        client.send(request)
                        assert client.receive(1) == b"N"
                    client.send(loop[-1])
                    (error,) = read_all(client)
                    assert_refused([error], {"08P01"})
            with pool.raw() as client:
                client.send(first * 1000)
                assert_refused(read_all(client), {"08P01"})
        with pool.raw() as client:
            client.send(SSL_REQUEST)
            assert client.receive(1) == b"N"
            client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500)  # TLS all the same
            assert_refused(read_all(client), {"08P01"})


def test_500_silent_sockets_keep_nobody_out(postgres: Postgres, gpooler_factory: Factory) -> None:
    """They hold no place of client_max, and each is told that its time is over."""
    pool = make_pool(postgres, gpooler_factory, timeout_ms=3000)
    with unharmed(pool, postgres), ExitStack() as stack:
        silent = [stack.enter_context(pool.raw(timeout=30)) for _ in range(500)]
        for number, client in enumerate(silent):
            client.send(startup("clear", "app")[: number % 5])
        for user in METHODS:
            with pool.connect(user, password=PASSWORD) as connection:
                assert connection.execute("SELECT 1").fetchone() == (1,)
        for client in silent:
            (error,) = client.read_to_end()
            assert_refused([error], {"08P01"})
            assert "3000 ms" in error.fields()["M"]


def test_500_sockets_that_leave_are_forgotten_at_once(postgres: Postgres, gpooler_factory: Factory) -> None:
    pool = make_pool(postgres, gpooler_factory, timeout_ms=60_000)
    chance = random.Random(random.getrandbits(64))
    begun = startup("clear", "app")
    with unharmed(pool, postgres):
        clients = [pool.raw() for _ in range(500)]
        for client in clients:
            client.send(begun[: chance.randrange(len(begun) + 1)])
        for client in clients:
            chance.choice([RawClient.close, RawClient.reset, RawClient.half_close])(client)
        for client in clients:
            client.close()


# --- mutations ----------------------------------------------------------------------------------


def mutated(chance: random.Random, data: bytes) -> bytes:
    """``data`` with one to three of the things that go wrong with bytes."""
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        size = len(data)
        at = chance.randrange(size + 1)
        match chance.randrange(9):
            case 0 if size:
                at = chance.randrange(size)
                data = data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]
            case 1 if size:
                at = chance.randrange(size)
                data = data[:at] + bytes([chance.choice(b"\0\1\x7f\x80\xff") or 0]) + data[at + 1 :]
            case 2:
                data = data[:at]
            case 3:
                data = data[:at] + chance.randbytes(chance.choice([1, 4, 50, 3000])) + data[at:]
            case 4:
                data = data[:at] + data[chance.randrange(size + 1) :]
            case 5:
                data = data[:at] + data
            case 6:
                at = chance.choice([0, 1])
                length = chance.choice([*BAD_LENGTHS, 4, 5, 8, 9999, 65_535, chance.getrandbits(31)])
                data = data[:at] + struct.pack("!i", length) + data[at + 4 :]
            case 7:
                data = data.replace(b"\0", b"", 1)
            case _:
                data = data[:at] + b"\0" + data[at:]
    return data


def in_pieces(chance: random.Random, data: bytes) -> Iterator[bytes]:
    """``data`` cut at random places."""
    cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.choice([0, 0, 1, 2, 5])))
    for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        yield data[start:end]


def answer_to(user: str, request: bytes, state: dict[str, Any]) -> bytes | None:
    """The right next message to an authentication request; None when nothing is asked."""
    (code,) = struct.unpack_from("!i", request)
    match code:
        case 3:
            return message(b"p", text(PASSWORD))
        case 5:
            catcher = _Catcher()
            RawClient._authenticate(catcher, request, user, PASSWORD)  # type: ignore[arg-type]
            return catcher.sent
        case 10:
            state["scram"] = scramp.ScramClient(["SCRAM-SHA-256"], "x", PASSWORD)
            first = state["scram"].get_client_first().encode()
            return message(b"p", text("SCRAM-SHA-256") + struct.pack("!i", len(first)) + first)
        case 11 if len(request) > 4:
            state["scram"].set_server_first(request[4:].decode())
            return message(b"p", state["scram"].get_client_final().encode())
    return None


class _Catcher:
    """Stands for a RawClient that is asked to send."""

    def __init__(self) -> None:
        self.sent = b""

    def send(self, *data: bytes) -> None:
        self.sent += b"".join(data)


def spoiled_login(pool: Gpooler, seed: int, has_end: bool) -> RawClient:
    """A login in which one message is not as it should be; the client has sent all it ever will."""
    chance = random.Random(seed)
    user = chance.choice(list(METHODS))
    options = chance.choice([{}, {"application_name": "x"}, {"options": "-c geqo=off"}, {"TimeZone": "UTC"}])
    next_message: bytes | None = startup(user, "app", PROTOCOL_3_0 | chance.choice([0, 0, 2, 9]), **options)
    spoil = chance.randrange({"trust": 1, "clear": 2, "md5": 2, "scram": 3}[user])
    state: dict[str, Any] = {}
    client = pool.raw()
    for step in range(spoil + 1):
        assert next_message is not None
        data = mutated(chance, next_message) if step == spoil else next_message
        if step == spoil and chance.random() < 0.2:
            data += chance.choice([query("SELECT 1"), SYNC, TERMINATE, SSL_REQUEST, chance.randbytes(20_000)])
        for piece in in_pieces(chance, data):
            send(client, piece)
        if step < spoil:
            answer = client.read()
            while answer.kind == b"v":
                answer = client.read()
            assert answer.kind == b"R", answer
            next_message = answer_to(user, answer.body, state)
    if has_end:
        with suppress(OSError):
            client.half_close()
    return client


def assert_end_of_spoiled_login(client: RawClient, seed: int) -> None:
    try:
        said = read_all(client)
        kinds = {answer.kind for answer in said}
        if b"Z" in kinds:  # the mutation meant nothing
            return
        assert kinds <= {b"R", b"S", b"K", b"v", b"N", b"E"}, kinds
        rest = [answer for answer in said if answer.kind == b"E"]
        assert said[-1:] == rest[-1:] or not rest
        assert_refused(rest, REFUSALS | SETTINGS)
    except (AssertionError, TimeoutError) as problem:
        raise AssertionError(f"seed {seed}: {problem}") from problem


@pytest.mark.parametrize("pool_mode", ["transaction", "session"])
def test_mutated_logins_that_end_harm_nobody(
    postgres: Postgres, gpooler_factory: Factory, pool_mode: str
) -> None:
    pool = make_pool(postgres, gpooler_factory, pool=pool_mode)
    with unharmed(pool, postgres):
        for _ in range(300):
            seed = random.getrandbits(40)
            with spoiled_login(pool, seed, has_end=True) as client:
                assert_end_of_spoiled_login(client, seed)


def test_mutated_logins_that_do_not_end_are_ended(postgres: Postgres, impatient_pool: Gpooler) -> None:
    with unharmed(impatient_pool, postgres), ExitStack() as stack:
        seeds = [random.getrandbits(40) for _ in range(120)]
        clients = [stack.enter_context(spoiled_login(impatient_pool, seed, has_end=False)) for seed in seeds]
        for client, seed in zip(clients, seeds, strict=True):
            assert_end_of_spoiled_login(client, seed)


# --- after login --------------------------------------------------------------------------------

KINDS = "QPBECDSHFXdcf"
MODES = pytest.mark.parametrize("pool_mode", ["transaction", "session", "statement"])
# What a client has said when the bad bytes come, and whether it holds a server then.
SITUATIONS: dict[str, bytes] = {
    "idle": b"",
    "in a transaction": query("BEGIN") + query("SELECT 1"),
    "in a failed transaction": query("BEGIN") + query("SELECT 1/0"),
    "with answers due": query("SELECT pg_sleep(0.05), repeat('x', 1000) FROM generate_series(1, 20)"),
    "in an open group": parse("SELECT 1") + bind() + execute(),
    "in COPY": query("COPY bad_input FROM STDIN") + copy_data(b"7\n"),
}


def bad_messages() -> dict[str, bytes]:
    """Bytes that are no message, by what is wrong with them."""
    found = {}
    for kind in (*KINDS, "p", "R", "\0", "\xff"):
        for length in [*BAD_LENGTHS[:-1], 2**30]:
            if kind != "X":  # that is a goodbye, whatever stands in it
                found[f"{kind!r} of {length}"] = kind.encode("latin1") + struct.pack("!i", length) + b"x" * 64
    for kind in range(256):
        if chr(kind) not in KINDS:
            found[f"type {kind}"] = message(bytes([kind]), b"x" * 8)
    found["startup"] = startup("trust_user", "app")
    found["SSLRequest"] = SSL_REQUEST
    found["GSSENCRequest"] = GSSENC_REQUEST
    found["CancelRequest"] = cancel_request(1, b"1234")
    found["HTTP"] = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    found["zeros"] = b"\0" * 1000
    return found


@pytest.fixture
def table(postgres: Postgres) -> None:
    postgres.query(
        "DROP TABLE IF EXISTS bad_input; CREATE TABLE bad_input (n int); GRANT ALL ON bad_input TO PUBLIC",
        "app",
    )


@MODES
def test_bytes_that_are_no_message_end_their_client_alone(
    postgres: Postgres, gpooler_factory: Factory, table: None, pool_mode: str
) -> None:
    pool = make_pool(postgres, gpooler_factory, pool=pool_mode)
    bad = bad_messages()
    chance = random.Random(random.getrandbits(64))
    with unharmed(pool, postgres):
        for situation, said in SITUATIONS.items():
            if pool_mode == "statement" and "transaction" in situation:
                continue
            is_whole = situation == "idle" and pool_mode == "transaction"
            for name in bad if is_whole else chance.sample(sorted(bad), 12):
                with pool.raw() as client:
                    client.login()
                    client.send(said, bad[name])
                    answers = read_all(client)
                    errors = [answer.fields() for answer in answers if answer.kind == b"E"]
                    assert [(e["S"], e["C"]) for e in errors[-1:]] == [("FATAL", "08P01")], (situation, name)
    assert postgres.query("SELECT count(*) FROM bad_input", "app") == [(0,)]


def test_no_error_is_put_into_the_middle_of_a_row(postgres: Postgres, gpooler_factory: Factory) -> None:
    """A client that breaks the protocol while it reads slowly: what it still gets is right, or nothing."""
    pool = make_pool(postgres, gpooler_factory)
    size = 20_000_000
    with unharmed(pool, postgres), pool.raw() as client:
        client.login()
        client.send(query(f"SELECT repeat('x', {size})"))
        assert client.read().kind == b"T"
        client.receive(11)  # type, length, number of columns, length of the first
        client.send(message(b"p", b"x"))
        rest = client._buffer
        while chunk := client.socket.recv(1 << 20):
            rest += chunk
        assert set(rest) == {ord("x")}
        assert len(rest) < size


# What PostgreSQL waits for more after, at once or when it has come to it.
UNFINISHED = [
    [execute("missing"), query("SELECT 1")],  # skips to a Sync
    [parse("SELECT 1/0"), bind(), execute(), FLUSH],
    [parse("SELECT 1"), bind(), execute()],
    [query("COPY bad_input FROM STDIN")],
    [query("COPY bad_input FROM STDIN"), copy_data(b"1\n"), SYNC],
]
CUT = [
    [query("SELECT pg_sleep(0.05)"), query("SELECT 'cut'")[:-3]],
    [query("SELECT pg_sleep(0.05)"), query("SELECT 'cut'")[:3]],
]


@MODES
@pytest.mark.parametrize("is_goodbye", [False, True], ids=["half-closed", "terminated"])
def test_who_says_no_more_keeps_no_server_that_waits_for_more(
    postgres: Postgres, gpooler_factory: Factory, table: None, pool_mode: str, is_goodbye: bool
) -> None:
    pool = make_pool(postgres, gpooler_factory, pool=pool_mode)

    def leave_behind(client: RawClient, begun: list[bytes]) -> None:
        client.send(*begun, TERMINATE if is_goodbye else b"")
        if not is_goodbye:
            client.half_close()

    with unharmed(pool, postgres):
        for begun in UNFINISHED if is_goodbye else UNFINISHED + CUT:
            with pool.raw() as client:
                client.login()
                leave_behind(client, begun)
                client.read_to_end()
            if pool_mode == "session":
                continue
            with pool.raw() as client:  # the same of one that has to wait for its server
                client.login()
                with held_servers(pool, postgres):
                    leave_behind(client, begun)
                    eventually(lambda: pool.route_count(RouteWord.CLIENTS_WAITING) >= 1)
                client.read_to_end()


def test_messages_in_places_they_do_not_belong_are_answered_as_by_postgres(
    postgres: Postgres, pool: Gpooler, table: None
) -> None:
    """Well-formed, and yet nonsense: both must give the same answers, and the session goes on."""
    strays = [
        COPY_DONE + query("SELECT 1"),
        copy_data(b"x" * 100_000) + message(b"f", text("no")) + query("SELECT 1"),
        FLUSH * 5 + SYNC,
        SYNC * 20,
        execute() + SYNC,
        execute("missing") + describe("P", "missing") + SYNC,
        bind("missing") + execute() + SYNC + query("SELECT 2"),
        describe("S", "missing") + SYNC,
        describe("Q", "x") + SYNC,
        close("S", "missing") + close("P", "missing") + SYNC,
        close("Q", "missing") + SYNC,
        message(b"Q") + query("SELECT 3"),
        message(b"Q", b"SELECT 1") + query("SELECT 4"),
        message(b"P") + SYNC,
        message(b"P", b"\0\0") + query("SELECT 5") + SYNC,
        message(b"B") + SYNC,
        message(b"B", b"\0\0\0\1") + SYNC,
        message(b"E") + SYNC,
        message(b"F") + query("SELECT 6"),
        message(b"F", struct.pack("!ihhh", 1, 0, 0, 0)) + query("SELECT 7"),
        query("SELECT 8") + message(b"S", b"more") + query("SELECT 9"),
        query("SELECT 10") + message(b"H", b"more") + SYNC,
        parse("SELECT 1; SELECT 2") + bind() + SYNC,
        parse("SELECT $1::int") + bind(values=(b"x",)) + execute() + SYNC,
        parse("SELECT $1::int") + bind() + execute() + SYNC,
        query("COPY bad_input FROM STDIN") + SYNC + FLUSH + copy_data(b"x\n") + COPY_DONE + query("SELECT 1"),
        query("\xff\xfe"),
    ]
    with unharmed(pool, postgres):
        for stray in strays:
            said = []
            for port in (postgres.port, pool.port):
                with RawClient(port) as client:
                    client.login()
                    client.send(stray, query("SELECT 'the end'"))
                    answers = [client.read()]
                    while answers[-1].kind != b"D" or answers[-1].values() != ["the end"]:
                        answers.append(client.read())
                    said.append([*answers, *client.read_until()])
                    client.terminate()
            assert said[0] == said[1], stray


def random_session(chance: random.Random, pool_mode: str) -> list[bytes]:
    """Messages of a client: mostly sensible, in any order."""
    session: list[bytes] = []
    statements = [
        "SELECT 1",
        "SELECT repeat('y', 30000) FROM generate_series(1, 20)",
        "SELECT 1/0",
        "nonsense",
        "",
        "SELECT 1; SELECT 2; SELECT 3",
        "SET application_name = 'somebody else'",
        "SET IntervalStyle = 'sql_standard'",
        "RESET ALL",
        "BEGIN",
        "COMMIT",
        "ROLLBACK",
        "INSERT INTO bad_input VALUES (1); ROLLBACK",
        "COPY bad_input FROM STDIN",
        "COPY (SELECT generate_series(1, 1000)) TO STDOUT",
        "PREPARE p AS SELECT 1",
        "DEALLOCATE ALL",
        "LISTEN fuzz",
        "NOTIFY fuzz",
        "CREATE TEMP TABLE t (n int)",
        "DECLARE c CURSOR WITH HOLD FOR SELECT generate_series(1, 100)",
        "FETCH 10 FROM c",
        "SELECT pg_advisory_lock_shared(1)",
        "DO $$BEGIN RAISE NOTICE 'x'; END$$",
    ]
    for _ in range(chance.randrange(1, 12)):
        sql = chance.choice(statements)
        match chance.randrange(7):
            case 0 | 1:
                session.append(query(sql))
            case 2:
                name = chance.choice(["", "", "a"])
                session += [parse(sql, name), bind(name), describe("P"), execute(rows=chance.choice([0, 1]))]
                session.append(chance.choice([SYNC, SYNC, FLUSH, b""]))
            case 3:
                session += [query("COPY bad_input FROM STDIN"), copy_data(b"1\n2\n"), copy_data(b"3\n")]
                session.append(chance.choice([COPY_DONE, message(b"f", text("no")), SYNC]))
            case 4:
                session.append(chance.choice([SYNC, FLUSH, COPY_DONE, execute(), close("S", "a"), TERMINATE]))
            case 5:
                # Syncs that a COPY swallows, or does not
                name = chance.choice(["", "a"])
                session += [parse("COPY bad_input FROM STDIN", name), bind(name), execute(), SYNC]
                session += chance.choice([[], [SYNC], [copy_data(b"x\n")], [copy_data(b"1\n"), COPY_DONE]])
                session.append(chance.choice([COPY_DONE, SYNC]))
            case _:
                session.append(query("SELECT 'between'"))
    return session


@MODES
def test_mutated_sessions_harm_nobody(
    postgres: Postgres, gpooler_factory: Factory, table: None, pool_mode: str
) -> None:
    pool = make_pool(postgres, gpooler_factory, pool=pool_mode)
    with unharmed(pool, postgres):
        for _ in range(150):
            seed = random.getrandbits(40)
            chance = random.Random(seed)
            session = random_session(chance, pool_mode)
            for _ in range(chance.choice([0, 1, 1, 2])):
                at = chance.randrange(len(session))
                session[at] = mutated(chance, session[at])
            with pool.raw() as client:
                client.login(application_name="fuzz")
                for piece in in_pieces(chance, b"".join(session)):
                    send(client, piece)
                match chance.randrange(4):
                    case 0:
                        client.reset()
                        continue
                    case 1:
                        send(client, TERMINATE)
                with suppress(OSError):
                    client.half_close()
                try:
                    assert_well_formed(client)
                except (AssertionError, TimeoutError) as problem:
                    raise AssertionError(f"seed {seed}: {problem}\n{session}") from problem


def assert_well_formed(client: RawClient) -> None:
    """The stream up to its end is one of messages that a server sends; it may be cut."""
    for answer in client.read_to_end(END_S):
        assert answer.kind in b"RSKZNETDCI123nstGHWdcAV", answer
        if answer.kind == b"E":
            assert answer.fields()["C"] != "XX000", answer.fields()


# --- configuration ------------------------------------------------------------------------------

EXAMPLE = Path(__file__).parents[2] / "config.toml.example"
WHOLE_CONFIG = """\
include = ["more.toml"]
[service]
pid_file = "{directory}/pid"
[logging]
log_format = "%p %t %e %l [%i %s] (%c) %m\\n"
log_to_stdout = true
[performance]
workers = 2
[[listen]]
host = "127.0.0.1"
port = {port}
[storage.pg]
type = "remote"
host = "127.0.0.1"
port = 5432
[database.default.user.default]
authentication = "scram-sha-256"
password = "secret"
storage = "pg"
pool = "transaction"
pool_size = 20
"""


def run_to_end(file: Path) -> tuple[int, str]:
    """Run gpooler, which must end by itself; its exit status and what it said."""
    process = subprocess.run(
        [*command(), "run", "-c", str(file)], capture_output=True, text=True, timeout=20, check=False
    )
    return process.returncode, process.stdout + process.stderr


def test_a_broken_configuration_says_so_and_ends(tmp_path: Path) -> None:
    port = free_port()
    good = WHOLE_CONFIG.format(directory=tmp_path, port=port)
    (tmp_path / "more.toml").write_text("[limits]\nclient_max = 100\n")
    (tmp_path / "loop.toml").write_text('include = ["loop.toml"]\n')
    (tmp_path / "cut.toml").write_text("[limits\n")
    os.mkfifo(tmp_path / "pipe.toml")  # nobody will ever write to it
    texts: dict[str, str | bytes] = {
        "empty": "",
        "cut in the middle": good[: len(good) // 2],
        "not text": bytes(range(256)) * 50,
        "zeros": b"\0" * 10_000,
        "an open string": good + 'x = """never closed',
        "a thousand brackets": good + "x = " + "[" * 100_000,
        "a number without end": good.replace("5432", "5" * 10_000),
        "a key twice": good + 'pool = "session"\n',
        "an unknown section": good + "[lmits]\nclient_max = 1\n",
        "no listener": good.replace("[[listen]]", "[[lissten]]"),
        "a port out of range": good.replace(f"port = {port}", "port = 70000"),
        "a storage that is none": good.replace('storage = "pg"', 'storage = "gp"'),
        "an include that is none": good.replace("more.toml", "less.toml"),
        "an include that is broken": good.replace("more.toml", "cut.toml"),
        "an include of itself": good.replace("more.toml", "loop.toml"),
        "an include of a directory": good.replace("more.toml", "."),
        "an include that never ends": good.replace("more.toml", "/dev/zero"),
        "an include that never begins": good.replace("more.toml", "pipe.toml"),
        "a secret that never begins": good.replace('"secret"', '{ file = "pipe.toml" }'),
        "a secret that is nowhere": good.replace('"secret"', '{ env = "GPOOLER_NO_SUCH_THING" }'),
        "minus one worker": good.replace("workers = 2", "workers = -1"),
    }
    file = tmp_path / "config.toml"
    for name, broken in texts.items():
        file.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
        with pytest.raises(ConfigError) as caught:
            load(file, {})
        problems = [str(problem) for problem in caught.value.problems]
        assert problems, name
        assert all(problems), name
        assert "secret" not in "".join(problems) or "secret" in name, (name, problems)
    for name in ("not text", "a thousand brackets", "an include of itself", "an include that never ends"):
        broken = texts[name]
        file.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
        status, said = run_to_end(file)
        assert (status, said[:7]) == (1, "error: "), (name, said)
        assert "Traceback" not in said, (name, said)
    for path in (tmp_path / "pipe.toml", Path("/dev/zero")):
        assert run_to_end(path)[0] == 1
    with socket.create_server(("127.0.0.1", port)):  # everything right, but the port is taken
        file.write_text(good)
        status, said = run_to_end(file)
        assert (status, "could not listen" in said) == (3, True), said
    assert not (tmp_path / "pid").exists()


@pytest.mark.parametrize("source", ["whole", "example"])
def test_a_mutated_configuration_is_good_or_refused(tmp_path: Path, source: str) -> None:
    whole = (
        WHOLE_CONFIG.replace('include = ["more.toml"]\n', "").format(directory=tmp_path, port=6432).encode()
    )
    if source == "example":  # each option, at its default or a sensible value
        whole = re.sub(rb"(?m)^#(?=[a-z_]+ = |\[)", b"", EXAMPLE.read_bytes())
    words = re.findall(rb"[\w.\[\]\"]+", whole)
    file = tmp_path / "config.toml"
    for _ in range(300 if source == "whole" else 40):
        seed = random.getrandbits(40)
        chance = random.Random(seed)
        data = whole
        for _ in range(chance.choice([1, 1, 2, 5])):
            if chance.random() < 0.5:
                data = mutated(chance, data)
            else:
                data = data.replace(chance.choice(words), chance.choice(words), 1)
        file.write_bytes(data)
        try:
            load(file, {})
        except ConfigError as error:
            problems = [str(problem).strip() for problem in error.problems]
        except Exception as error:
            raise AssertionError(f"seed {seed}: {data!r}") from error
        else:
            continue
        assert problems, seed
        assert all(problems), seed
