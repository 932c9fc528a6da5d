"""Opens a server connection and logs in: the life of a server until the relay has it."""

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import gevent
import gevent.socket

from gpooler.auth.secrets import Secret
from gpooler.errors import PostgresError, ServerConnectFailed, ServerFault, ServerLost
from gpooler.net.connect import connect
from gpooler.net.resolve import Address, Resolver
from gpooler.net.tls import Connector, Stream, TlsFault
from gpooler.routing.route import Route
from gpooler.wire.session import LoginResult, ServerLogin

# What a server says that is no matter of TLS: asking the other way would not help (reference §4, ``allow``).
_NOT_OF_TLS: Final = frozenset({"57P03", "53300", "3D000", "28P01"})


@dataclass(frozen=True, slots=True)
class OpenServer:
    """A server that is logged in and idle. The socket is the caller's."""

    stream: Stream
    address: Address
    result: LoginResult


def open_server(
    route: Route,
    secret: Secret | None,
    resolver: Resolver,
    timeout_ms: int,
    on_connected: Callable[[gevent.socket.socket, Address], None],
    startup: Mapping[str, str],
    connector: Connector,
) -> OpenServer:
    """Connect and log in within ``timeout_ms``. Yields.

    ``on_connected`` is called between the two, for each connection made; ``startup``: parameters besides
    those of the rule. Raises PostgresError for what the server itself said, other ServerFaults for the rest.
    """
    timeout = gevent.Timeout(timeout_ms / 1000)
    with timeout:
        try:
            *first, last = connector.tries if route.endpoint.unix_path is None else (False,)
            for has_tls in first:
                try:
                    return _open(route, secret, resolver, on_connected, startup, connector, has_tls)
                except PostgresError as error:
                    if error.server_sqlstate in _NOT_OF_TLS:
                        raise
                except _HandshakeFailed:
                    pass
            return _open(route, secret, resolver, on_connected, startup, connector, last)
        except gevent.Timeout as expired:
            if expired is not timeout:
                raise
            raise ServerConnectFailed(cause=f"{route.endpoint}: no answer within {timeout_ms} ms") from None
    raise AssertionError("unreachable")


class _HandshakeFailed(ServerConnectFailed):
    """TLS did not come about: with ``prefer`` the server is asked without."""


def _open(
    route: Route,
    secret: Secret | None,
    resolver: Resolver,
    on_connected: Callable[[gevent.socket.socket, Address], None],
    startup: Mapping[str, str],
    connector: Connector,
    has_tls: bool,
) -> OpenServer:
    """One connection. Raises ServerFault."""
    sock, address = connect(resolver.addresses(route.endpoint), route.socket_options)
    try:
        on_connected(sock, address)
        return OpenServer(
            stream := _secured(sock, address, connector) if has_tls else Stream(sock, None),
            address,
            _login(stream, route, secret, startup),
        )
    except ServerFault:
        _end(sock)
        raise
    except BaseException:
        sock.close()
        raise


def _secured(sock: gevent.socket.socket, address: Address, connector: Connector) -> Stream:
    try:
        return connector.secure(sock)
    except (TlsFault, OSError) as error:
        raise _HandshakeFailed(cause=f"{address.text}: TLS: {error}") from error


def _end(sock: gevent.socket.socket) -> None:
    """Close, and wait for the server to do so: its process counts against its own limits until then."""
    try:
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            pass
    except OSError:
        pass  # it is gone
    finally:
        sock.close()


def _login(stream: Stream, route: Route, secret: Secret | None, startup: Mapping[str, str]) -> LoginResult:
    """Raises ServerFault."""
    login = ServerLogin(
        route.user,
        route.database,
        secret=secret,
        # of the last client that came with the same verifier, where no password is known
        keys=None if secret is not None and secret.plain is not None else route.keys,
        parameters={**route.rule.backend_startup_options, **startup},
        binding=stream.binding,
    )
    try:
        stream.sendall(login.start())
        while login.result is None:
            data = stream.recv()
            if not data:
                raise ServerLost(cause="closed during the login")
            answer = login.receive(data)
            if answer:
                stream.sendall(answer)
    except OSError as error:
        raise ServerConnectFailed(cause=f"during the login: {error}") from error
    if login.result.rest:
        raise ServerConnectFailed(cause="bytes behind the login's ReadyForQuery")
    return login.result
