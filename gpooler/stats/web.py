"""Answers HTTP requests about metrics and health: GET and HEAD, one request a connection."""

import socket
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import gevent
from gevent.lock import BoundedSemaphore
from gevent.pool import Pool
from gevent.pywsgi import WSGIHandler, WSGIServer

from gpooler.log import Logger

DEADLINE_S: Final = 10.0  # of a connection: who does not ask, or does not read, is given up
GRACE_S: Final = 0.5  # at the end
MAX_CONNECTIONS: Final = 64  # more of them wait in the kernel's queue
_TEXT: Final = "text/plain; charset=utf-8"

Start = Callable[[str, list[tuple[str, str]]], object]


class Web:
    """Serves ``/metrics``, ``/healthz`` and ``/readyz`` on listening sockets that it takes over."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        render: Callable[[str], tuple[bytes, str]],
        unready: Callable[[], str],
        logger: Logger,
    ) -> None:
        """``render``: the metrics for an Accept header, and their content type; it may yield.

        ``unready``: why no clients should be sent here, "" where they should.
        """
        self._render = render
        self._unready = unready
        self._logger = logger
        self._lock = BoundedSemaphore()  # scrapes one after the other
        pool = Pool(MAX_CONNECTIONS)
        self._servers = [
            WSGIServer(
                sock,
                self._answer,
                log=None,
                error_log=_Errors(logger),
                handler_class=_Handler,
                spawn=pool,
                environ={"SERVER_NAME": "gpooler"},  # else it asks a name server
            )
            for sock in sockets
        ]

    def start(self) -> None:
        """Accept connections from now on."""
        for server in self._servers:
            server.start()

    def close(self) -> None:
        """Close the listening sockets at once, and the others when they have their answers. Yields."""
        for server in self._servers:
            server.stop(timeout=GRACE_S)

    def _answer(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        """The WSGI application."""
        status, content_type, body = self._find(environ)
        headers = [
            ("Content-Type", content_type),
            ("Connection", "close"),
            ("Content-Length", str(len(body))),
        ]
        if status.startswith("405"):
            headers.append(("Allow", "GET, HEAD"))
        start(status, headers)
        return () if environ["REQUEST_METHOD"] == "HEAD" else (body,)

    def _find(self, environ: dict[str, Any]) -> tuple[str, str, bytes]:
        """Status, content type and body."""
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return "405 Method Not Allowed", _TEXT, b"only GET and HEAD\n"
        match environ["PATH_INFO"]:
            case "/metrics":
                return self._metrics(environ.get("HTTP_ACCEPT", ""))
            case "/healthz":
                return "200 OK", _TEXT, b"alive\n"
            case "/readyz":
                why = self._unready()
                status = "503 Service Unavailable" if why else "200 OK"
                return status, _TEXT, f"{why or 'ready'}\n".encode()
        return "404 Not Found", _TEXT, b"there are /metrics, /healthz and /readyz\n"

    def _metrics(self, accept: str) -> tuple[str, str, bytes]:
        with self._lock:
            try:
                body, content_type = self._render(accept)
            except Exception:  # noqa: BLE001  # the top of a greenlet
                self._logger.error(f"metrics failed: {traceback.format_exc()}", context="stats")
                return "500 Internal Server Error", _TEXT, b"metrics failed: see the log\n"
        return "200 OK", content_type, body


class _Handler(WSGIHandler):  # type: ignore[misc]  # the package has no types
    """A connection whose time is limited, however its peer spends it."""

    def handle(self) -> None:
        end = gevent.spawn_later(DEADLINE_S, _shut, self.socket)
        try:
            super().handle()
        finally:
            end.kill(block=False)


def _shut(sock: socket.socket) -> None:
    """Reading ends, writing fails."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # closed already


class _Errors:
    """What the library writes of broken requests."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger

    def write(self, text: str) -> None:
        """Part of a message."""
        if text.strip():
            self._logger.debug(f"metrics: {text.strip()}", context="stats")
