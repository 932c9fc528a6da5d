"""Plays a program on a port, and compares what two servers said.

What is *not* compared, and why:

* at login the process id and the key (BackendKeyData), which are gpooler's own, and the *order* of the
  ParameterStatus messages: the same names with the same values must have come;
* the process id in a NotificationResponse: PostgreSQL's own, and another one for each server;
* the number of a table in a RowDescription: temporary tables get one when they are made. Tables are counted
  in the order in which they appear instead; the number of a column stays as it is;
* file, line and routine of "current transaction is aborted" (25P02): on a server that lacks a prepared
  statement the Parse that gpooler puts before a Bind is refused in place of the Bind, with the same words.

Everything else is compared byte by byte and in order: rows, command tags, SQLSTATE, text, position, file and
line of errors and notices, ParameterStatus at its place, and the status of the transaction.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Final

from tests.differential.program import CLOSES, END, LAST_ROW, MARKER, Program, Step, ends_in_flush, readies
from tests.harness.client import TERMINATE, Message, RawClient, ServerError

FIRST_OWN_OID: Final = 16384
ASYNCHRONOUS: Final = (b"S", b"N", b"A")
MOST_PIECES: Final = 100  # of one step
NO_ANSWER: Final = b"?"  # a message of ours: nothing came within the time
END_OF_STREAM: Final = b"!"


@dataclass(slots=True)
class Transcript:
    """What a server said: at login, and step by step; the last entry answers the end of the program."""

    parameters: Mapping[str, str] = field(default_factory=dict)
    answers: list[list[Message]] = field(default_factory=list)

    @property
    def has_hung(self) -> bool:
        """Whether an answer did not come."""
        return bool(self.answers and self.answers[-1] and self.answers[-1][-1].kind == NO_ANSWER)

    @property
    def count(self) -> int:
        """Of messages."""
        return sum(map(len, self.answers))


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two transcripts part."""

    step: int  # from 0; -1 is the login
    expected: list[str]
    got: list[str]
    kind: tuple[str, str]  # what the first two messages that differ are, to tell one difference from another

    def __str__(self) -> str:
        where = f"in the answer to step {self.step + 1}" if self.step >= 0 else "at login"
        return "\n".join(
            [
                f"{where} PostgreSQL says",
                *(f"    {line}" for line in self.expected),
                "and gpooler",
                *(f"    {line}" for line in self.got),
            ]
        )


class _Normal:
    """Messages of one session without what must differ."""

    def __init__(self) -> None:
        self._tables: dict[int, int] = {}

    def of(self, message: Message) -> Message:
        if message.kind == b"A":
            return Message(b"A", b"\0\0\0\0" + message.body[4:])
        if message.kind == b"T":
            return Message(b"T", self._description(message.body))
        if message.kind == b"E" and b"\0C25P02\0" in message.body:
            kept = [field for field in message.body.split(b"\0") if field[:1] not in (b"F", b"L", b"R")]
            return Message(b"E", b"\0".join(kept))
        return message

    def _description(self, body: bytes) -> bytes:
        (count,) = struct.unpack_from("!h", body)
        parts, offset = [body[:2]], 2
        for _ in range(count):
            end = body.index(b"\0", offset) + 1
            (table,) = struct.unpack_from("!I", body, end)
            if table >= FIRST_OWN_OID:
                table = self._tables.setdefault(table, len(self._tables) + 1)
            parts += [body[offset:end], struct.pack("!I", table), body[end + 4 : end + 18]]
            offset = end + 18
        return b"".join(parts)


def play(
    program: Program, port: int, database: str, timeout: float = 10.0, host: str = "127.0.0.1"
) -> Transcript:
    """Run a program to its end, or until the server closes or does not answer for so many seconds."""
    transcript = Transcript()
    with RawClient(port, host, timeout=timeout) as client:
        try:
            client.login(database=database, **program.startup)
        except ServerError as error:
            transcript.parameters = {"error": f"{error.sqlstate} {error.text}"}
            return transcript
        transcript.parameters = dict(client.parameters)
        normal = _Normal()
        for number in range(len(program.steps) + 1):
            said: list[Message] = []
            transcript.answers.append(said)
            try:
                if number == len(program.steps):
                    if program.has_end:
                        client.send(END)
                        _read_to_end(client, said)
                else:
                    _one_step(client, program.steps[number], said, program.piece)
            except TimeoutError:
                said.append(Message(NO_ANSWER, b"no answer"))
            except (EOFError, ConnectionError) as error:
                said.append(Message(END_OF_STREAM, type(error).__name__.encode()))
            said[:] = map(normal.of, said)
            if said and said[-1].kind in (NO_ANSWER, END_OF_STREAM):
                return transcript
        try:
            client.send(*(part.data for part in program.last), TERMINATE if program.has_terminate else b"")
        except ConnectionError:
            pass
        return transcript


def _send(client: RawClient, data: bytes, piece: int) -> None:
    size = max(piece, len(data) // MOST_PIECES + 1) if piece else len(data)
    for start in range(0, len(data), size):
        client.send(data[start : start + size])


def _one_step(client: RawClient, step: Step, said: list[Message], piece: int) -> None:
    data = b"".join(part.data for part in step)
    count = readies(step)
    if count is not None:
        _send(client, data, piece)
        while count:
            said.append(client.read())
            count -= said[-1].kind == b"Z"
    elif ends_in_flush(step):
        _send(client, data, piece)
        while not said or said[-1].kind not in (b"C", b"I", b"s", b"E"):
            said.append(client.read())
    else:
        _send(client, data + MARKER, piece)
        closes = 0
        while True:
            said.append(client.read())
            kind = said[-1].kind
            if kind == b"Z" and closes == CLOSES:
                break
            if kind not in ASYNCHRONOUS:
                closes = closes + 1 if kind == b"3" else 0


def _read_to_end(client: RawClient, said: list[Message]) -> None:
    while not (said and said[-1] == Message(b"D", LAST_ROW)):
        said.append(client.read())
    while said[-1].kind != b"Z":
        said.append(client.read())


def compare(direct: Transcript, pooled: Transcript) -> Difference | None:
    """The first step that was answered in another way, None if all was the same."""
    if direct.parameters != pooled.parameters:
        names = sorted(direct.parameters.keys() | pooled.parameters.keys())
        names = [name for name in names if direct.parameters.get(name) != pooled.parameters.get(name)]
        return Difference(
            -1,
            [f"{name} = {direct.parameters.get(name)!r}" for name in names],
            [f"{name} = {pooled.parameters.get(name)!r}" for name in names],
            ("login", names[0]),
        )
    for number, expected in enumerate(direct.answers):
        got = pooled.answers[number] if number < len(pooled.answers) else []
        if got != expected:
            pairs = enumerate(zip_longest(expected, got))
            at, first = next((at, pair) for at, pair in pairs if pair[0] != pair[1])
            kind = (_kind(first[0]), _kind(first[1]))
            return Difference(number, _shown(expected, at), _shown(got, at), kind)
    return None


def _kind(message: Message | None) -> str:
    if message is None:
        return ""
    return message.kind.decode() + (message.fields().get("C", "") if message.kind in (b"E", b"N") else "")


def _shown(messages: list[Message], at: int, around: int = 8) -> list[str]:
    """The messages about that one, a line each."""
    start = max(at - around, 0)
    lines = [_line(message) for message in messages[start : at + around]]
    before = [f"… {start} before"] if start else []
    return before + lines + (["…"] if len(messages) > at + around else [])


def _line(message: Message) -> str:
    kind = message.kind.decode()
    try:
        if kind in "EN":
            fields = message.fields()
            return f"{kind} {fields}"
        if kind == "D":
            return f"D {message.values()}"
    except (UnicodeDecodeError, struct.error):
        pass
    return f"{kind} {message.body[:200]!r}"
