"""Sends metrics to a statsd server over UDP. A server that is down or unknown costs nothing but a count."""

import socket
import time
from collections.abc import Iterable
from typing import Final

from statsd import StatsClient

from gpooler.stats.metrics import Kind, Metric, safe_prefix

_DATAGRAM: Final = 1432  # fits an Ethernet frame, as statsd's documentation advises
_RESOLVE_AGAIN_S: Final = 60.0
_RESOLVE_RETRY_S: Final = 10.0  # after a failure; a resolver that hangs is not given more to do


class Statsd:
    """One statsd server, found by name again now and then. ``failed`` counts what was lost."""

    def __init__(self, host: str, port: int, prefix: str) -> None:
        """Does no I/O. ``prefix`` may have dots and is made safe."""
        self._host = host
        self._port = port
        self._prefix = safe_prefix(prefix)
        self._client: _Client | None = None
        self._resolve_at_s = 0.0
        self.failed = 0  # datagrams, or whole reports when there was nowhere to send them to

    def send(self, metrics: Iterable[Metric]) -> None:
        """Send all in as few datagrams as they fit in. Yields while the name is resolved; raises nothing."""
        client = self._find()
        if client is None:
            self.failed += 1
            return
        with client.pipeline() as pipeline:
            for metric in metrics:
                value = round(metric.value, 3)
                if metric.kind == Kind.GAUGE:
                    pipeline.gauge(metric.name, value)
                elif metric.kind == Kind.COUNT:
                    pipeline.incr(metric.name, int(value))
                else:
                    pipeline.timing(metric.name, value)
        self.failed += client.take_failed()

    def close(self) -> None:
        """Close the socket."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _find(self) -> "_Client | None":
        """The client for where the name leads now; the last one that worked when that cannot be known."""
        now_s = time.monotonic()
        if now_s < self._resolve_at_s:
            return self._client
        self._resolve_at_s = now_s + _RESOLVE_RETRY_S
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_DGRAM)
            client = _Client(str(found[0][4][0]), self._port, self._prefix, found[0][0] == socket.AF_INET6)
        except (OSError, UnicodeError):
            return self._client
        self._resolve_at_s = now_s + _RESOLVE_AGAIN_S
        self.close()
        self._client = client
        return client


class _Client(StatsClient):  # type: ignore[misc]  # the package has no types
    """The package's client, which would wait for room and forget its failures."""

    def __init__(self, address: str, port: int, prefix: str, is_ipv6: bool) -> None:
        super().__init__(address, port, prefix or None, _DATAGRAM, is_ipv6)
        self._failed = 0
        try:
            self._sock.connect(self._addr)  # so that a closed port is reported at a later send
            self._sock.setblocking(False)
        except BaseException:
            self.close()
            raise

    def _send(self, data: str) -> None:
        try:
            self._sock.send(data.encode("ascii"))
        except OSError:
            self._failed += 1

    def take_failed(self) -> int:
        """Datagrams lost since the last call."""
        failed, self._failed = self._failed, 0
        return failed
