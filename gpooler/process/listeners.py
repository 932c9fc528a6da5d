"""The listening sockets that the configuration asks for."""

import socket
from collections.abc import Iterable
from typing import Final

from gpooler.config.model import Config, Listen
from gpooler.net.listen import Listener, ListenSpec, bind_listeners
from gpooler.net.tcp import tcp_settings


def bind(
    config: Config, listens: Iterable[Listen], given: list[socket.socket] | None = None
) -> list[Listener]:
    """The listeners of these tables of the configuration. Raises ConfigurationError.

    ``given``: sockets that listen already; those that are used are taken out.
    """
    service = config.service
    return bind_listeners(
        [ListenSpec(listen.number, listen.host, listen.port, listen.backlog) for listen in listens],
        unix_socket_dir=service.unix_socket_dir,
        unix_socket_mode=service.unix_socket_mode,
        is_reuseport=service.bindwith_reuseport,
        options=tcp_settings(config.performance).options(),
        given=given,
    )


METRICS_BACKLOG: Final = 16


def bind_metrics(config: Config, given: list[socket.socket] | None = None) -> list[Listener]:
    """Those of prometheus_port, ``given`` as for ``bind``. Raises ConfigurationError."""
    metrics = config.metrics
    if metrics.http_port is None:
        return []
    spec = ListenSpec(0, metrics.prometheus_host, metrics.http_port, METRICS_BACKLOG)
    return bind_listeners([spec], given=given)
