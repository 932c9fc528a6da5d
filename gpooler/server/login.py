"""Opens a server connection and logs in: the life of a server until the relay has it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import gevent
import gevent.socket

from gpooler.auth.secrets import Secret
from gpooler.errors import ServerConnectFailed, ServerLost
from gpooler.net.connect import connect
from gpooler.net.resolve import Address, Resolver
from gpooler.routing.route import Route
from gpooler.wire.session import LoginResult, ServerLogin

_RECEIVE = 16384


@dataclass(frozen=True, slots=True)
class OpenServer:
    """A server that is logged in and idle. The socket is the caller's."""

    socket: gevent.socket.socket
    address: Address
    result: LoginResult


def open_server(
    route: Route,
    secret: Secret | None,
    resolver: Resolver,
    timeout_ms: int,
    on_connected: Callable[[gevent.socket.socket, Address], None],
    startup: Mapping[str, str],
) -> OpenServer:
    """Connect and log in within ``timeout_ms``. Yields.

    ``on_connected`` is called between the two; ``startup``: parameters besides those of the rule. Raises
    PostgresError for what the server itself said, other ServerFaults for the rest.
    """
    timeout = gevent.Timeout(timeout_ms / 1000)
    with timeout:
        try:
            sock, address = connect(resolver.addresses(route.endpoint), route.socket_options)
            try:
                on_connected(sock, address)
                return OpenServer(sock, address, _login(sock, route, secret, startup))
            except BaseException:
                sock.close()
                raise
        except gevent.Timeout as expired:
            if expired is not timeout:
                raise
            raise ServerConnectFailed(cause=f"{route.endpoint}: no answer within {timeout_ms} ms") from None
    raise AssertionError("unreachable")


def _login(
    sock: gevent.socket.socket, route: Route, secret: Secret | None, startup: Mapping[str, str]
) -> LoginResult:
    """Raises ServerFault."""
    login = ServerLogin(
        route.user,
        route.database,
        secret=secret,
        # of the last client that came with the same verifier, where no password is known
        keys=None if secret is not None and secret.plain is not None else route.keys,
        parameters={**route.rule.backend_startup_options, **startup},
    )
    try:
        sock.sendall(login.start())
        while login.result is None:
            data = sock.recv(_RECEIVE)
            if not data:
                raise ServerLost(cause="closed during the login")
            answer = login.receive(data)
            if answer:
                sock.sendall(answer)
    except OSError as error:
        raise ServerConnectFailed(cause=f"during the login: {error}") from error
    if login.result.rest:
        raise ServerConnectFailed(cause="bytes behind the login's ReadyForQuery")
    return login.result
