"""The session tracker beside a real PostgreSQL: random pipelines, and it must know when the server is quiet.

The property tests check the tracker against a model of PostgreSQL; these check it against the thing itself.
"""

import random
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gpooler.relay.probe import SessionProbe
from tests.harness import Postgres

SQL = [
    "SELECT 1",
    "SELECT generate_series(1, 5)",
    "SELECT 1; SELECT 2",
    "SELECT 1; SELECT 1/0; SELECT 2",
    "",
    "nonsense",
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "COPY numbers FROM STDIN",
    "COPY numbers FROM STDIN; SELECT 1; COPY numbers FROM STDIN",
    "COPY missing FROM STDIN",
    "COPY refusing FROM STDIN",  # its trigger fails before a byte is read
    "COPY numbers TO STDOUT",
    "INSERT INTO late VALUES (1)",  # fails at the end of the transaction
    "DO $$BEGIN RAISE NOTICE 'x'; END$$",
    "SET application_name = 'x'",
]
SCHEMA = """
CREATE TABLE numbers (n int);
CREATE TABLE late (n int UNIQUE DEFERRABLE INITIALLY DEFERRED);
INSERT INTO late VALUES (1);
CREATE TABLE refusing (n int);
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''no''; END';
CREATE TRIGGER refuse BEFORE INSERT ON refusing FOR EACH STATEMENT EXECUTE FUNCTION refuse();
"""
MARK = b"a mark behind everything"


def message(kind: str, body: bytes = b"") -> bytes:
    return kind.encode() + struct.pack("!i", len(body) + 4) + body


def random_message(chance: random.Random, is_copying: bool) -> bytes:
    kind = chance.choice("dddcfHS") if is_copying else chance.choice("QQQPPBBDDEEECSSSSFHdcf")
    if kind == "Q":
        return message(kind, chance.choice(SQL).encode() + b"\0")
    if kind == "P":
        single = [sql for sql in SQL if ";" not in sql or sql.startswith("DO")]
        return message(kind, b"\0" + chance.choice(single).encode() + b"\0\0\0")
    if kind == "B":
        return message(kind, b"\0\0" + b"\0\0" * 3)
    if kind in "DC":
        return message(kind, chance.choice([b"S\0", b"P\0"]))
    if kind == "E":
        return message(kind, b"\0" + struct.pack("!i", chance.choice([0, 0, 1])))
    if kind == "F":  # pg_backend_pid, or none
        return message(kind, struct.pack("!ihhh", chance.choice([2026, 1]), 0, 0, 0))
    if kind == "d":
        return message(kind, chance.choice([b"1\n", b"2\n3\n", b"bad\n", b"\\.\n"]))
    return message(kind, b"gone\0" if kind == "f" else b"")


class Line:
    """A connection to PostgreSQL with a tracker beside it."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.tracker = SessionProbe()
        self.buffer = b""
        self.last: list[bytes] = []
        self.is_over = False

    def send(self, *messages: bytes) -> None:
        for one in messages:
            self.tracker.frontend(one[:1])
        try:
            self.socket.sendall(b"".join(messages))
        except (BrokenPipeError, ConnectionResetError):
            while self.read(is_waiting=True):
                pass  # what it said before it went

    def read(self, is_waiting: bool) -> bool:
        """Take in what is there, at least something if waiting. False: nothing was."""
        if not is_waiting and not select.select([self.socket], [], [], 0)[0]:
            return False
        try:
            data = self.socket.recv(65536)
        except ConnectionResetError:  # Linux reports it once, before what is still to be read
            data = self.socket.recv(65536)
        if not data:
            self.is_over = True
            return False
        self.buffer += data
        while len(self.buffer) >= 5:
            size = struct.unpack("!i", self.buffer[1:5])[0] + 1
            if len(self.buffer) < size:
                break
            one, self.buffer = self.buffer[:size], self.buffer[size:]
            self.take(one)
        return True

    def take(self, one: bytes) -> None:
        self.last.append(one)
        if one[:1] == b"E" and b"SFATAL\0" in one:
            self.is_over = True
            return
        assert self.tracker.backend(one[:1]), self.last[-5:]
        if one[:1] == b"Z":
            assert self.tracker.ready(one[5:]) == 0, self.last[-5:]

    def finish(self, ends_copy: bool = True) -> None:
        """Bring the server to rest as a pooler would, or to where it asks for the data of a COPY."""
        while not self.is_over and not self.tracker.is_uncertain and not self.tracker.is_idle:
            if self.tracker.is_copy_in:
                if not ends_copy:
                    return
                self.send(message("f", b"gone\0"))
            elif self.tracker.needs_sync:
                self.send(message("S"))
            else:
                self.read(is_waiting=True)


@contextmanager
def line(postgres: Postgres) -> Iterator[Line]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(postgres.socket_dir / f".s.PGSQL.{postgres.port}"))
        body = struct.pack("!i", 196608) + b"user\0postgres\0database\0app\0application_name\0harness\0\0"
        connection.sendall(struct.pack("!i", len(body) + 4) + body)
        greeting = b""
        while not greeting.endswith(b"Z\0\0\0\5I"):
            greeting += connection.recv(65536)
        yield Line(connection)


@pytest.fixture
def tables(any_postgres: Postgres) -> Iterator[Postgres]:
    any_postgres.query(SCHEMA, dbname="app")
    yield any_postgres
    any_postgres.query("DROP TABLE numbers, late, refusing; DROP FUNCTION refuse", dbname="app")


def test_tracker_knows_when_postgres_is_quiet(tables: Postgres) -> None:
    certain = copies = 0
    for seed in range(400):
        chance = random.Random(seed)
        with line(tables) as one:
            for _ in range(chance.randrange(3, 30)):
                if one.is_over or one.tracker.is_uncertain:
                    break
                is_copying = one.tracker.is_copy_in
                copies += is_copying
                one.send(random_message(chance, is_copying and chance.random() < 0.95))
                if chance.random() < 0.3:
                    one.read(is_waiting=False)
                elif chance.random() < 0.5:
                    one.finish(ends_copy=chance.random() < 0.2)
            one.finish()
            if one.tracker.is_uncertain:
                continue
            assert not one.is_over, (seed, one.last[-3:])
            certain += 1
            # Whatever the server says next is the answer to this, in the status that the tracker knows.
            assert not one.read(is_waiting=False), (seed, one.last[-3:])
            one.last.clear()
            is_failed = one.tracker.status == b"E"
            one.send(message("Q", b"SELECT '" + MARK + b"'\0"))
            one.finish()
            kinds = b"".join(answer[:1] for answer in one.last)
            assert kinds == (b"EZ" if is_failed else b"TDCZ"), (seed, one.last)
            assert is_failed or MARK in one.last[1]
    assert certain > 200
    assert copies > 50
