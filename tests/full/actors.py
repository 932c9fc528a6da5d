"""Clients of the soak, each of a kind of its own: they check every answer and log in again and again.

What a client sees must be right at any time; that a connection ends is right only in a storm, when something
was killed that it depends on.
"""

import random
import select
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from tests.harness import Gpooler, Message, RawClient
from tests.harness.client import (
    COPY_DONE,
    SYNC,
    ServerError,
    bind,
    cancel_request,
    copy_data,
    describe,
    execute,
    parse,
    query,
)

PATIENCE_S: Final = 30.0
TURNS_A_LOGIN: Final = 20
NOTICED_S: Final = 1.0  # a thread that had no turn meanwhile finds its connection broken so much later
LARGE: Final = 1_000_000
SCHEMA: Final = "CREATE TABLE IF NOT EXISTS soak (actor int, n int)"
# What PostgreSQL and gpooler say when a server or the whole system goes.
ENDINGS: Final = frozenset({"57P01", "57P02", "57P03", "08006", "08003", "58000"})

Turn = Callable[[RawClient, random.Random, int], None]


class Weather:
    """When connections may end: between the beginning of a storm and its end."""

    def __init__(self) -> None:
        self._storms: list[tuple[float, float]] = []
        self._began = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def storm(self) -> Iterator[None]:
        """Something is killed and comes back within."""
        with self._lock:
            self._began = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._storms.append((self._began, time.monotonic()))
                self._began = 0.0

    def met(self, since: float) -> bool:
        """Whether there was any storm between that moment and now."""
        with self._lock:
            return bool(self._began) or any(end + NOTICED_S >= since for _, end in self._storms)


class Actor:
    """One thread that logs in and takes turns until it is told to stop."""

    def __init__(
        self, gpooler: Gpooler, weather: Weather, kind: str, turn: Turn, number: int, user: str = "trust_user"
    ) -> None:
        self.kind = kind
        self.turns = self.breaks = 0
        self.failures: list[str] = []
        self._gpooler, self._weather, self._user = gpooler, weather, user
        self._turn, self._number = turn, number
        self._random = random.Random(number)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=kind)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Let the turn that runs be the last."""
        self._stop.set()

    def join(self) -> None:
        self._thread.join(PATIENCE_S * 2)
        assert not self._thread.is_alive(), f"{self.kind} hangs"

    def _run(self) -> None:
        while not self._stop.is_set() and len(self.failures) < 10:
            since = time.monotonic()
            try:
                with self._gpooler.raw(timeout=PATIENCE_S) as client:
                    client.login(self._user)
                    for _ in range(TURNS_A_LOGIN):
                        since = time.monotonic()
                        self._turn(client, self._random, self._number)
                        self.turns += 1
                        if self._stop.is_set():
                            break
                    client.terminate()
            except Left:
                self.turns += 1
            except (OSError, EOFError, ServerError) as error:
                is_ending = not isinstance(error, ServerError) or error.sqlstate in ENDINGS
                if is_ending and not isinstance(error, TimeoutError) and self._weather.met(since):
                    self.breaks += 1
                    self._stop.wait(0.05)
                else:
                    self._fail()
            except Exception:  # noqa: BLE001  # told at the end
                self._fail()

    def _fail(self) -> None:
        self.failures.append(f"{self.kind} {self._number}: {traceback.format_exc()}")


class Left(Exception):
    """The actor has left without a goodbye, as it meant to."""


def simple(client: RawClient, chance: random.Random, number: int) -> None:
    n = chance.randrange(1 << 30)
    assert client.query(f"SELECT {n}") == [[str(n)]]


def extended(client: RawClient, chance: random.Random, number: int) -> None:
    n = chance.randrange(1 << 30)
    client.send(parse("SELECT $1::int"), bind(values=(b"%d" % n,)), describe("P"), execute(), SYNC)
    assert client.rows() == [[str(n)]]


def pipelined(client: RawClient, chance: random.Random, number: int) -> None:
    first, count = chance.randrange(1 << 20), chance.randrange(2, 20)
    for n in range(first, first + count):
        client.send(parse("SELECT $1::int"), bind(values=(b"%d" % n,)), execute(), SYNC)
    for n in range(first, first + count):
        assert client.rows() == [[str(n)]]


def prepared(client: RawClient, chance: random.Random, number: int) -> None:
    n = chance.randrange(1 << 20)
    client.send(parse("SELECT $1::int * 2", name=f"s{n}"), SYNC)
    client.rows()
    client.send(bind(f"s{n}", (b"%d" % n,)), execute(), SYNC)
    assert client.rows() == [[str(2 * n)]]
    raise_if(client, chance, 0.2)  # what it prepared must not be met by anybody else
    client.terminate()
    raise Left


def transaction(client: RawClient, chance: random.Random, number: int) -> None:
    client.query("BEGIN")
    (first,) = client.query("SELECT pg_backend_pid(), txid_current()")
    raise_if(client, chance, 0.03)
    if chance.random() < 0.2:
        with suppress(ServerError):
            client.query("SELECT 1/0")
            raise AssertionError("a division by zero went well")
        client.query("ROLLBACK")
        return
    assert client.query("SELECT pg_backend_pid(), txid_current()") == [first]
    client.query("COMMIT")


def state(client: RawClient, chance: random.Random, number: int) -> None:
    """Session state stays with its session: nobody starts with what another one has left."""
    assert client.query("SELECT current_setting('soak.mark', true)") in ([[None]], [[""]])
    assert client.query("SELECT count(*) FROM pg_prepared_statements") == [["0"]]
    mark = f"{number}-{chance.randrange(1 << 30)}"
    client.query(f"SET soak.mark = '{mark}'")
    assert client.query("SELECT current_setting('soak.mark')") == [[mark]]
    raise_if(client, chance, 0.5)
    client.terminate()
    raise Left


def copy_in(client: RawClient, chance: random.Random, number: int) -> None:
    client.query("BEGIN")
    rows = chance.randrange(1, 2000)
    client.send(query("COPY soak FROM STDIN"))
    read_up_to(client, b"G")
    for n in range(rows):
        client.send(copy_data(b"%d\t%d\n" % (number, n)))
        if n == 100:
            raise_if(client, chance, 0.1)
    client.send(COPY_DONE)
    client.rows()
    found = client.query(f"SELECT count(*), sum(n) FROM soak WHERE actor = {number}")
    assert found == [[str(rows), str(rows * (rows - 1) // 2)]]
    client.query("ROLLBACK")


def copy_out(client: RawClient, chance: random.Random, number: int) -> None:
    rows = chance.randrange(1, 20_000)
    client.send(query(f"COPY (SELECT generate_series(1, {rows})) TO STDOUT"))
    raise_if(client, chance, 0.1)
    lines = [message.body for message in read_up_to(client, b"Z") if message.kind == b"d"]
    assert lines == [b"%d\n" % n for n in range(1, rows + 1)]


def large(client: RawClient, chance: random.Random, number: int) -> None:
    letter = chance.choice("abc")
    client.send(query(f"SELECT repeat('{letter}', {LARGE})"))
    raise_if(client, chance, 0.1)
    assert client.rows() == [[letter * LARGE]]


def cancelled(client: RawClient, chance: random.Random, number: int) -> None:
    client.send(query("SELECT pg_sleep(20)"))
    time.sleep(chance.random() * 0.1)  # at any moment: waiting, attached, running
    while True:  # a request that overtakes its query hits nothing, as with PostgreSQL
        with client_of(client) as other:
            other.send(cancel_request(client.pid, client.key))
            other.read_to_end()
        if select.select([client.socket], [], [], 0.5)[0]:
            break
    try:
        client.rows()
    except ServerError as error:
        if error.sqlstate != "57014":
            raise
    else:
        raise AssertionError("the query was not cancelled")
    simple(client, chance, number)


def leaving(client: RawClient, chance: random.Random, number: int) -> None:
    """Gone at any moment, politely or not."""
    client.send(
        chance.choice(
            [
                query("SELECT pg_sleep(0.05)"),
                query("SELECT pg_sleep(30)"),
                query("BEGIN; SELECT 1"),
                query("SELECT 1")[:-3],
                parse("SELECT 1") + bind() + execute(),
                parse("SELECT pg_sleep(30)") + bind() + execute() + SYNC,
                b"",
            ]
        )
    )
    time.sleep(chance.random() * 0.05)
    chance.choice([client.reset, client.close, client.terminate])()
    raise Left


def raise_if(client: RawClient, chance: random.Random, likely: float) -> None:
    """With that likelihood the client is gone in the middle of what it does."""
    if chance.random() < likely:
        chance.choice([client.reset, client.close])()
        raise Left


def read_up_to(client: RawClient, kind: bytes) -> list[Message]:
    """All messages up to one of that kind; raises ServerError at an ErrorResponse."""
    messages = [client.read()]
    while messages[-1].kind != kind:
        if messages[-1].kind == b"E":
            raise ServerError(messages[-1].fields())
        messages.append(client.read())
    return messages


def client_of(client: RawClient) -> RawClient:
    """Another connection to where this one goes."""
    host, port = client.socket.getpeername()[:2]
    return RawClient(port, host, timeout=PATIENCE_S)


TURNS: Final[dict[str, Turn]] = {
    turn.__name__: turn
    for turn in (
        simple, extended, pipelined, prepared, transaction, state, copy_in, copy_out, large, cancelled,
        leaving,
    )
}  # fmt: skip


IN_SESSIONS: Final = ("simple", "extended", "transaction", "copy_out", "cancelled", "leaving")


@contextmanager
def cast(gpooler: Gpooler, weather: Weather) -> Iterator[list[Actor]]:
    """One actor of each kind in the transaction pool, and of some in the session pool, until the end."""
    actors = [
        Actor(gpooler, weather, kind, turn, number)
        for number, (kind, turn) in enumerate([*TURNS.items(), *TURNS.items()])
    ]
    actors += [
        Actor(gpooler, weather, f"{kind} (session)", TURNS[kind], 100 + number, "session_user")
        for number, kind in enumerate(
            ["simple", "extended", "transaction", "copy_out", "cancelled", "leaving"]
        )
    ]
    for actor in actors:
        actor.start()
    try:
        yield actors
    finally:
        for actor in actors:
            actor.stop()
        for actor in actors:
            actor.join()


def told(actors: list[Actor]) -> str:
    """What each kind has done, for the output of the test."""
    turns, breaks = Counter[str](), Counter[str]()
    for actor in actors:
        turns[actor.kind] += actor.turns
        breaks[actor.kind] += actor.breaks
    return ", ".join(f"{kind} {turns[kind]} ({breaks[kind]} cut)" for kind in turns)
