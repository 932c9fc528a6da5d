"""A client that speaks the protocol by hand: sends any bytes, reads message by message.

Its framing is its own, so that a mistake in gpooler's cannot hide here. Follows PostgreSQL's documentation,
chapter "Frontend/Backend Protocol".
"""

import hashlib
import math
import socket
import ssl
import struct
import time
from dataclasses import dataclass
from typing import Final

import scramp

PROTOCOL_3_0: Final = 3 << 16
SSL_REQUEST: Final = struct.pack("!ii", 8, 80877103)
GSSENC_REQUEST: Final = struct.pack("!ii", 8, 80877104)
CANCEL_CODE: Final = 80877102
SYNC: Final = b"S\0\0\0\4"
FLUSH: Final = b"H\0\0\0\4"
TERMINATE: Final = b"X\0\0\0\4"
COPY_DONE: Final = b"c\0\0\0\4"


def message(kind: bytes, body: bytes = b"") -> bytes:
    """One message: type, length, body."""
    return kind + struct.pack("!i", len(body) + 4) + body


def text(value: str) -> bytes:
    """A string of the protocol, with its closing zero."""
    return value.encode() + b"\0"


def startup(user: str, database: str, version: int = PROTOCOL_3_0, **parameters: str) -> bytes:
    """A startup packet."""
    pairs = {"user": user, "database": database, **parameters}
    body = struct.pack("!i", version) + b"".join(text(k) + text(v) for k, v in pairs.items()) + b"\0"
    return struct.pack("!i", len(body) + 4) + body


def cancel_request(pid: int, key: bytes) -> bytes:
    """A CancelRequest packet."""
    return struct.pack("!iii", 12 + len(key), CANCEL_CODE, pid) + key


def query(sql: str) -> bytes:
    """Query."""
    return message(b"Q", text(sql))


def parse(sql: str, name: str = "", types: tuple[int, ...] = ()) -> bytes:
    """Parse."""
    return message(b"P", text(name) + text(sql) + struct.pack(f"!h{len(types)}i", len(types), *types))


def bind(name: str = "", values: tuple[bytes | None, ...] = (), portal: str = "") -> bytes:
    """Bind with parameters and results as text."""
    parts = [struct.pack("!i", -1) if v is None else struct.pack("!i", len(v)) + v for v in values]
    return message(
        b"B",
        text(portal)
        + text(name)
        + struct.pack("!hh", 0, len(values))
        + b"".join(parts)
        + struct.pack("!h", 0),
    )


def execute(portal: str = "", rows: int = 0) -> bytes:
    """Execute; 0 rows means all."""
    return message(b"E", text(portal) + struct.pack("!i", rows))


def describe(kind: str, name: str = "") -> bytes:
    """Describe a statement (``S``) or portal (``P``)."""
    return message(b"D", kind.encode() + text(name))


def close(kind: str, name: str = "") -> bytes:
    """Close a statement (``S``) or portal (``P``)."""
    return message(b"C", kind.encode() + text(name))


def copy_data(data: bytes) -> bytes:
    """CopyData."""
    return message(b"d", data)


@dataclass(frozen=True, slots=True)
class Message:
    """One message from the server."""

    kind: bytes
    body: bytes

    def fields(self) -> dict[str, str]:
        """The fields of an ErrorResponse or NoticeResponse by their letters."""
        parts = self.body.rstrip(b"\0").split(b"\0")
        return {part[:1].decode(): part[1:].decode(errors="backslashreplace") for part in parts if part}

    def values(self) -> list[str | None]:
        """The columns of a DataRow as text."""
        (count,) = struct.unpack_from("!h", self.body)
        offset, columns = 2, []
        for _ in range(count):
            (length,) = struct.unpack_from("!i", self.body, offset)
            offset += 4
            columns.append(None if length < 0 else self.body[offset : offset + length].decode())
            offset += max(length, 0)
        return columns

    def tag(self) -> str:
        """The command tag of a CommandComplete."""
        return self.body.rstrip(b"\0").decode()


class ServerError(AssertionError):
    """The server answered ErrorResponse where the test did not expect one."""

    def __init__(self, fields: dict[str, str]) -> None:
        super().__init__(f"{fields.get('S')} {fields.get('C')}: {fields.get('M')}")
        self.fields = fields
        self.sqlstate = fields.get("C", "")
        self.text = fields.get("M", "")


class RawClient:
    """A blocking socket with the protocol on top; every read gives up after ``timeout`` seconds.

    A context manager. After login() ``parameters``, ``pid`` and ``key`` hold what the server said.
    """

    def __init__(
        self, port: int, host: str = "127.0.0.1", timeout: float = 10.0, source: str | None = None
    ) -> None:
        if host.startswith("/"):
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.socket.settimeout(timeout)
            self.socket.connect(f"{host}/.s.PGSQL.{port}")
        else:
            self.socket = socket.create_connection((host, port), timeout, (source, 0) if source else None)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.parameters: dict[str, str] = {}
        self.pid = 0
        self.key = b""
        self._buffer = b""
        self._scram: scramp.ScramClient | None = None

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close without Terminate."""
        self.socket.close()

    def reset(self) -> None:
        """Close with RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def start_tls(self, context: ssl.SSLContext, host: str = "localhost") -> "RawClient":
        """Ask for TLS and shake hands; AssertionError when the answer is not S."""
        self.send(SSL_REQUEST)
        answer = self.receive(1)
        assert answer == b"S", f"answered {answer!r}"
        return self.direct_tls(context, host)

    def direct_tls(self, context: ssl.SSLContext, host: str = "localhost") -> "RawClient":
        """Shake hands without asking."""
        self.socket = context.wrap_socket(self.socket, server_hostname=host)
        return self

    def half_close(self) -> None:
        """Send FIN and go on reading."""
        self.socket.shutdown(socket.SHUT_WR)

    def terminate(self) -> None:
        """Say goodbye and close."""
        self.send(TERMINATE)
        self.close()

    def send(self, *data: bytes) -> None:
        """Send bytes as they are, in one call."""
        self.socket.sendall(b"".join(data))

    def receive(self, count: int) -> bytes:
        """Exactly that many bytes; raises EOFError when the server closes before."""
        while len(self._buffer) < count:
            chunk = self.socket.recv(65536)
            if not chunk:
                raise EOFError(f"closed after {len(self._buffer)} of {count} bytes: {self._buffer[:200]!r}")
            self._buffer += chunk
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    def read(self) -> Message:
        """The next message, of any kind."""
        kind, length = struct.unpack("!ci", self.receive(5))
        assert length >= 4, f"length {length} in message {kind!r}"
        return Message(kind, self.receive(length - 4))

    def read_until(self, kind: bytes = b"Z") -> list[Message]:
        """All messages up to and with the first of that kind (ReadyForQuery)."""
        messages = [self.read()]
        while messages[-1].kind != kind:
            messages.append(self.read())
        return messages

    def read_to_end(self, within: float = math.inf) -> list[Message]:
        """All messages until the server closes, cleanly or with a reset.

        Raises TimeoutError if messages come beyond ``within`` seconds: who is probed gets one each second.
        """
        messages = []
        ends_s = time.monotonic() + within
        while time.monotonic() < ends_s:
            try:
                messages.append(self.read())
            except (EOFError, ConnectionResetError):
                return messages
        raise TimeoutError(f"no end within {within} s")

    def is_closed(self) -> bool:
        """Whether the server has closed, with nothing left to read. Does not wait."""
        timeout = self.socket.gettimeout()
        self.socket.settimeout(0)
        try:
            return not self._buffer and self.socket.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True
        finally:
            self.socket.settimeout(timeout)

    def login(
        self, user: str = "trust_user", database: str = "app", password: str = "s3cret", **parameters: str
    ) -> "RawClient":
        """Log in, with whatever password is asked for, up to the first ReadyForQuery; raises ServerError."""
        self.send(startup(user, database, **parameters))
        while True:
            answer = self.read()
            match answer.kind:
                case b"R":
                    self._authenticate(answer.body, user, password)
                case b"S":
                    name, value, _ = answer.body.decode().split("\0")
                    self.parameters[name] = value
                case b"K":
                    self.pid, self.key = struct.unpack("!i", answer.body[:4])[0], answer.body[4:]
                case b"E":
                    raise ServerError(answer.fields())
                case b"Z":
                    return self
                case b"N":
                    pass
                case _:
                    raise AssertionError(f"unexpected during login: {answer}")

    def query(self, sql: str) -> list[list[str | None]]:
        """The rows of a simple query; raises ServerError after its ReadyForQuery."""
        self.send(query(sql))
        return self.rows()

    def rows(self) -> list[list[str | None]]:
        """The rows up to the next ReadyForQuery; raises ServerError if there was an error among them."""
        messages = self.read_until()
        for answer in messages:
            if answer.kind == b"E":
                raise ServerError(answer.fields())
        return [answer.values() for answer in messages if answer.kind == b"D"]

    def _authenticate(self, body: bytes, user: str, password: str) -> None:
        (code,) = struct.unpack_from("!i", body)
        if code == 0:
            return
        if code == 3:
            self.send(message(b"p", text(password)))
        elif code == 5:
            inner = hashlib.md5(password.encode() + user.encode()).hexdigest()
            outer = hashlib.md5(inner.encode() + body[4:8]).hexdigest()
            self.send(message(b"p", text("md5" + outer)))
        elif code == 10:
            self._scram = scramp.ScramClient(["SCRAM-SHA-256"], user, password)
            first = self._scram.get_client_first().encode()
            self.send(message(b"p", text("SCRAM-SHA-256") + struct.pack("!i", len(first)) + first))
        elif code == 11:
            assert self._scram is not None
            self._scram.set_server_first(body[4:].decode())
            self.send(message(b"p", self._scram.get_client_final().encode()))
        elif code == 12:
            assert self._scram is not None
            self._scram.set_server_final(body[4:].decode())
        else:
            raise AssertionError(f"this client cannot answer authentication request {code}")
