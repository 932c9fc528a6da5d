"""TLS in front of a PostgreSQL, by the machine's libssl: it asks for new keys, cuts records, and breaks off.

PostgreSQL never sends a KeyUpdate, and ``ssl`` has no way to: libssl is called by ctypes, over memory BIOs.
"""

import ctypes
import ctypes.util
import select
import socket
import threading
from contextlib import suppress
from typing import Any, Final

from tests.harness.client import SSL_REQUEST

CHUNK: Final = 65_536
PEM: Final = 1  # SSL_FILETYPE_PEM
UPDATE_REQUESTED: Final = 1  # SSL_KEY_UPDATE_REQUESTED: the other side is to take new keys, too
SET_MIN_VERSION: Final = 123  # SSL_CTRL_SET_MIN_PROTO_VERSION
TLS_1_3: Final = 0x0304
HANDSHAKE: Final = 22  # content type of a record
KEY_UPDATE: Final = 24  # type of a handshake message
PATIENCE_S: Final = 30
POLL_S: Final = 0.01

_pointer, _int, _text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
_MESSAGE = ctypes.CFUNCTYPE(
    None, _int, _int, _int, ctypes.POINTER(ctypes.c_ubyte), ctypes.c_size_t, _pointer, _pointer
)


def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(ctypes.util.find_library("ssl"))
    for name, result, arguments in (
        ("TLS_server_method", _pointer, ()),
        ("SSL_CTX_new", _pointer, (_pointer,)),
        ("SSL_CTX_free", None, (_pointer,)),
        ("SSL_CTX_ctrl", ctypes.c_long, (_pointer, _int, ctypes.c_long, _pointer)),
        ("SSL_CTX_use_certificate_chain_file", _int, (_pointer, _text)),
        ("SSL_CTX_use_PrivateKey_file", _int, (_pointer, _text, _int)),
        ("SSL_new", _pointer, (_pointer,)),
        ("SSL_free", None, (_pointer,)),
        ("SSL_set_bio", None, (_pointer, _pointer, _pointer)),
        ("SSL_set_accept_state", None, (_pointer,)),
        ("SSL_set_msg_callback", None, (_pointer, _MESSAGE)),
        ("SSL_do_handshake", _int, (_pointer,)),
        ("SSL_read", _int, (_pointer, _pointer, _int)),
        ("SSL_write", _int, (_pointer, _text, _int)),
        ("SSL_key_update", _int, (_pointer, _int)),
        ("BIO_s_mem", _pointer, ()),
        ("BIO_new", _pointer, (_pointer,)),
        ("BIO_read", _int, (_pointer, _pointer, _int)),
        ("BIO_write", _int, (_pointer, _text, _int)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class _Session:
    """One TLS session of a server, sans I/O."""

    def __init__(self, libssl: Any, context: int, on_key_update: Any) -> None:
        self._libssl = libssl
        self._in, self._out = (libssl.BIO_new(libssl.BIO_s_mem()) for _ in range(2))
        self._ssl = libssl.SSL_new(context)
        libssl.SSL_set_bio(self._ssl, self._in, self._out)
        libssl.SSL_set_accept_state(self._ssl)
        self._buffer = ctypes.create_string_buffer(CHUNK)

        def on_message(sent: int, _version: int, kind: int, body: Any, length: int, *_: object) -> None:
            if not sent and kind == HANDSHAKE and length and body[0] == KEY_UPDATE:
                on_key_update()

        self._callback = _MESSAGE(on_message)
        libssl.SSL_set_msg_callback(self._ssl, self._callback)

    def feed(self, data: bytes) -> bytes:
        """Ciphertext in, plain bytes out; shakes hands, too."""
        self._libssl.BIO_write(self._in, data, len(data))
        plain = b""
        while (count := self._libssl.SSL_read(self._ssl, self._buffer, CHUNK)) > 0:
            plain += self._buffer.raw[:count]
        return plain

    def write(self, data: bytes) -> None:
        assert self._libssl.SSL_write(self._ssl, data, len(data)) == len(data)

    def update_keys(self) -> None:
        assert self._libssl.SSL_key_update(self._ssl, UPDATE_REQUESTED) == 1
        assert self._libssl.SSL_do_handshake(self._ssl) == 1

    def take(self) -> bytes:
        """Ciphertext to send."""
        data = b""
        while (count := self._libssl.BIO_read(self._out, self._buffer, CHUNK)) > 0:
            data += self._buffer.raw[:count]
        return data

    def free(self) -> None:
        self._libssl.SSL_free(self._ssl)


class TlsProxy:
    """Listens on 127.0.0.1, speaks TLS there and plainly with the server. A context manager.

    Asks for new keys behind each ``every`` bytes, of either direction; sends in pieces of ``cut`` bytes.
    """

    def __init__(
        self, upstream_port: int, certificate: str, key: str, *, every: int = 0, cut: int = 0
    ) -> None:
        self._libssl = _load()
        context = self._context = self._libssl.SSL_CTX_new(self._libssl.TLS_server_method())
        assert self._libssl.SSL_CTX_use_certificate_chain_file(context, certificate.encode()) == 1
        assert self._libssl.SSL_CTX_use_PrivateKey_file(context, key.encode(), PEM) == 1
        assert self._libssl.SSL_CTX_ctrl(context, SET_MIN_VERSION, TLS_1_3, None) == 1
        self._upstream = ("127.0.0.1", upstream_port)
        self._every = every
        self.cut = cut
        self.updates = 0  # that were asked for
        self.answers = 0  # KeyUpdates of the other side
        self.failures: list[BaseException] = []
        self._wanted = 0  # counted up: each connection is to ask for new keys
        self._is_torn = False
        self._is_over = False
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._start(self._accept)

    def __enter__(self) -> "TlsProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self.drop()
        for thread in self._threads:
            thread.join()
        self._listener.close()
        self._libssl.SSL_CTX_free(self._context)
        assert not self.failures, self.failures

    def update_keys(self) -> None:
        """All connections ask for new keys, whatever is going on there."""
        self._wanted += 1

    def drop(self) -> None:
        """Break all connections off, without a close_notify."""
        for sock in list(self._sockets):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def tear(self) -> None:
        """Send one half of what each connection would send next, then break off."""
        self._is_torn = True

    def mend(self) -> None:
        """What is connected from now on stays."""
        self._is_torn = False

    def _start(self, target: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=self._guarded, args=(target, *arguments))
        self._threads.append(thread)
        thread.start()

    def _guarded(self, target: Any, *arguments: Any) -> None:
        try:
            target(*arguments)
        except OSError:
            pass  # it was broken off
        except BaseException as error:  # noqa: BLE001  # told at the end
            self.failures.append(error)

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._upstream, PATIENCE_S) as server:
            self._sockets += [client, server]
            client.settimeout(PATIENCE_S)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            session = _Session(self._libssl, self._context, self._on_key_update)
            try:
                if client.recv(len(SSL_REQUEST), socket.MSG_WAITALL) == SSL_REQUEST:
                    client.sendall(b"S")
                    self._pass_on(client, server, session)
            finally:
                session.free()
                self._sockets.remove(client)
                self._sockets.remove(server)

    def _pass_on(self, client: socket.socket, server: socket.socket, session: _Session) -> None:
        has_begun = False
        passed, seen = 0, self._wanted
        while not self._is_over:
            ready, _, _ = select.select([client, server], [], [], POLL_S)
            if client in ready:
                if not (data := client.recv(CHUNK)):
                    return
                if plain := session.feed(data):
                    has_begun = True
                    passed += len(plain)
                    server.sendall(plain)
            if server in ready:
                if not (data := server.recv(CHUNK)):
                    return
                passed += len(data)
                session.write(data)
            is_due = has_begun and (seen != self._wanted or (self._every > 0 and passed >= self._every))
            if is_due:
                passed, seen = 0, self._wanted
                session.update_keys()
            if not self._send(client, session.take()):
                return
            self.updates += is_due  # only now: what is said after this comes behind it

    def _send(self, client: socket.socket, data: bytes) -> bool:
        if self._is_torn and data:
            client.sendall(data[: len(data) // 2])
            return False
        step = self.cut or len(data) or 1
        for start in range(0, len(data), step):
            client.sendall(data[start : start + step])
        return True

    def _on_key_update(self) -> None:
        self.answers += 1
