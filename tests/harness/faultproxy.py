"""A TCP proxy between two real parts that stalls, cuts, delays or resets at a chosen moment."""

import math
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import Final, Literal

from tests.harness.tools import free_port

Direction = Literal["up", "down"]  # from client to server, from server to client
CHUNK: Final = 65_536
RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)
SEND_PATIENCE: Final = struct.pack("ll", 0, 50_000)  # how long a full socket keeps us from seeing a break


@dataclass(eq=False)
class _Lane:
    """The faults of one direction; guarded by the proxy's condition."""

    stalled: bool = False
    delay_s: float = 0.0
    bytes_left: int | None = None  # None: no cut planned
    passed: int = 0


@dataclass(eq=False)
class _Link:
    """One proxied connection; guarded by the proxy's condition."""

    client: socket.socket
    server: socket.socket
    broken: bool = False
    threads: list[threading.Thread] = field(default_factory=list)

    def sever(self, reset: bool) -> None:
        """Wake both pumps; the last one closes the sockets, with RST or FIN."""
        self.broken = True
        for side in (self.client, self.server):
            if reset:
                side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            try:
                side.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)
            except OSError:
                pass  # gone already


class FaultProxy:
    """Listens on 127.0.0.1 and forwards; faults hold for all its connections. A context manager."""

    def __init__(self, upstream_port: int, upstream_host: str = "127.0.0.1") -> None:
        self.host = "127.0.0.1"
        self.port = free_port()
        self._upstream = (upstream_host, upstream_port)
        self._changed = threading.Condition()
        self._lanes: dict[Direction, _Lane] = {"up": _Lane(), "down": _Lane()}
        self._links: list[_Link] = []
        self._closed = False
        self._refusals = 0.0
        self._listener = socket.create_server((self.host, self.port))
        self._acceptor = threading.Thread(target=self._accept, daemon=True, name="fault-proxy")
        self._acceptor.start()

    def __enter__(self) -> "FaultProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stall(self, direction: Direction | None = None) -> None:
        """Hold bytes back, in one direction or both."""
        self._set(direction, stalled=True)

    def resume(self, direction: Direction | None = None) -> None:
        """Let them pass again."""
        self._set(direction, stalled=False)

    def delay(self, seconds: float, direction: Direction | None = None) -> None:
        """Wait before each chunk."""
        self._set(direction, delay_s=seconds)

    def cut_after(self, count: int, direction: Direction) -> None:
        """Close every connection once ``count`` more bytes went in that direction."""
        self._set(direction, bytes_left=count)

    def insert(self, data: bytes, direction: Direction) -> None:
        """Send bytes of our own into every connection, which should be quiet meanwhile."""
        with self._changed:
            for link in self._links:
                (link.server if direction == "up" else link.client).sendall(data)

    def refuse(self, count: float = math.inf) -> None:
        """Close the next so many connections at once."""
        with self._changed:
            self._refusals = count

    def reset(self) -> None:
        """Break all connections with RST."""
        self._break(reset=True)

    def cut(self) -> None:
        """Close all connections with FIN."""
        self._break(reset=False)

    def passed(self, direction: Direction) -> int:
        """Bytes forwarded so far."""
        with self._changed:
            return self._lanes[direction].passed

    def connections(self) -> int:
        """Connections open now."""
        with self._changed:
            return len(self._links)

    def close(self) -> None:
        """End everything."""
        with self._changed:
            self._closed = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        with self._changed:
            threads = [thread for link in self._links for thread in link.threads]
        self._break(reset=False)
        for thread in threads:
            thread.join()

    def _set(self, direction: Direction | None, **values: float | bool | None) -> None:
        with self._changed:
            for name, lane in self._lanes.items():
                if direction in (None, name):
                    for key, value in values.items():
                        setattr(lane, key, value)
            self._changed.notify_all()

    def _break(self, reset: bool) -> None:
        with self._changed:
            for link in self._links:
                link.sever(reset)
            self._changed.notify_all()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._changed:
                is_refused = self._refusals > 0 or self._closed
                self._refusals -= is_refused
            if is_refused:
                client.close()
                continue
            try:
                server = socket.create_connection(self._upstream)
            except OSError:
                client.close()
                continue
            for side in (client, server):
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                side.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, SEND_PATIENCE)
            link = _Link(client, server)
            for name, source, target in (("up", client, server), ("down", server, client)):
                pump = threading.Thread(target=self._pump, args=(link, name, source, target), daemon=True)
                link.threads.append(pump)
            with self._changed:
                self._links.append(link)
                for pump in link.threads:
                    pump.start()

    def _pump(self, link: _Link, name: Direction, source: socket.socket, target: socket.socket) -> None:
        try:
            while chunk := source.recv(CHUNK):
                chunk, is_last = self._admit(link, self._lanes[name], chunk)
                self._send(link, target, chunk)
                if is_last:
                    with self._changed:
                        link.sever(reset=False)
            if not link.broken:
                target.shutdown(socket.SHUT_WR)  # a half-close passes through
        except OSError:
            with self._changed:
                link.sever(reset=False)
        finally:
            with self._changed:
                link.threads.remove(threading.current_thread())
                if not link.threads:
                    self._links.remove(link)
                    link.client.close()
                    link.server.close()

    def _send(self, link: _Link, target: socket.socket, chunk: bytes) -> None:
        rest = memoryview(chunk)
        while rest and not link.broken:
            try:
                rest = rest[target.send(rest) :]
            except BlockingIOError:
                continue

    def _admit(self, link: _Link, lane: _Lane, chunk: bytes) -> tuple[bytes, bool]:
        """Wait as the faults say; what may pass of the chunk, and whether it is the last."""
        with self._changed:
            if lane.delay_s:
                self._changed.wait_for(lambda: link.broken, timeout=lane.delay_s)
            self._changed.wait_for(lambda: link.broken or not lane.stalled)
            is_last = False
            if lane.bytes_left is not None:
                is_last = len(chunk) >= lane.bytes_left
                chunk = chunk[: lane.bytes_left]
                lane.bytes_left -= len(chunk)
            lane.passed += len(chunk)
            return chunk, is_last
