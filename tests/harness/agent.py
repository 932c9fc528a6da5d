"""An authentication agent: a process at a Unix socket that says yes or no to tokens, or misbehaves.

``yes:ID`` is accepted with that id, if the user is not ``blocked``. ``hang``, ``cut``, ``huge``, ``early``
and ``bytewise`` are ways to answer.
"""

import socket
import socketserver
import subprocess
import sys
import threading
from pathlib import Path
from typing import Final

from tests.harness.tools import eventually

LENGTH: Final = 8


class Agent:
    """A running agent; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Agent":
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen([sys.executable, "-m", __name__, str(self.path)], cwd=root)
        eventually(self.path.exists, within=20)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self.path.unlink(missing_ok=True)


def message(body: bytes) -> bytes:
    """A message of the protocol."""
    return len(body).to_bytes(LENGTH, "little") + body


class _Talk(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        user, token = self._read(), self._read()
        yes, no = message(b"\x01\0\0\0"), message(b"\0\0\0\0")
        kind, _, name = token.decode().partition(":")
        match kind:
            case "yes" if user != b"blocked":
                self.wfile.write(yes + message(name.encode() + b"\0"))
            case "bytewise":
                for byte in yes + message(name.encode() + b"\0"):
                    self.request.sendall(bytes([byte]))
            case "hang":
                threading.Event().wait()
            case "cut":
                self.wfile.write(yes + message(b"id\0")[:-1])
            case "huge":
                self.wfile.write(yes + (1 << 40).to_bytes(LENGTH, "little"))
            case "early":
                pass
            case _:
                self.wfile.write(no + message(b"\0"))

    def _read(self) -> bytes:
        length = int.from_bytes(self.rfile.read(LENGTH), "little")
        body = self.rfile.read(length)
        assert body.endswith(b"\0")
        return body[:-1]


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = socket.SOMAXCONN


def main() -> None:
    """Serve until killed. The socket appears when it listens."""
    path = Path(sys.argv[1])
    unfinished = path.with_name(path.name + ".new")
    with _Server(str(unfinished), _Talk) as server:
        unfinished.rename(path)
        server.serve_forever()


if __name__ == "__main__":
    main()
