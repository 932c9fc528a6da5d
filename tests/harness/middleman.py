"""A man in the middle of TLS: ends it on one side with a certificate of his own, begins it on the other.

He is trusted by who looks at certificates alone; SCRAM with channel binding finds him out.
"""

import select
import socket
import ssl
import threading
from contextlib import suppress
from types import TracebackType
from typing import Final

from tests.harness.client import SSL_REQUEST

TIMEOUT_S: Final = 10


class Middleman:
    """Listens on ``port`` of 127.0.0.1; a context manager. ``certificate`` and ``key`` are paths of files."""

    def __init__(self, target: int, certificate: str, key: str) -> None:
        """``target`` is the port of who is behind him."""
        self._target = target
        self._as_server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._as_server.load_cert_chain(certificate, key)
        self._as_client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._as_client.check_hostname = False
        self._as_client.verify_mode = ssl.CERT_NONE
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> "Middleman":
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                thread = threading.Thread(target=self._stand_between, args=(self._listener.accept()[0],))
                self._threads.append(thread)
                thread.start()

    def _stand_between(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._target), TIMEOUT_S) as server:
            client.settimeout(TIMEOUT_S)
            with suppress(OSError):  # of whoever goes first
                if client.recv(len(SSL_REQUEST)) != SSL_REQUEST:
                    return
                client.sendall(b"S")
                server.sendall(SSL_REQUEST)
                if server.recv(1) != b"S":
                    return
                with (
                    self._as_server.wrap_socket(client, server_side=True) as one,
                    self._as_client.wrap_socket(server) as other,
                ):
                    _pass_on(one, other)


def _pass_on(one: ssl.SSLSocket, other: ssl.SSLSocket) -> None:
    """Bytes both ways, small messages, until one side ends."""
    peers = {one: other, other: one}
    for end in peers:
        end.setblocking(False)
    while True:
        ready = [end for end in peers if end.pending()] or select.select(peers, [], [], TIMEOUT_S)[0]
        if not ready:
            return
        for end in ready:
            try:
                data = end.recv(65536)
            except ssl.SSLWantReadError:
                continue  # a session ticket
            if not data:
                return
            peers[end].sendall(data)
