"""Host names to addresses, cached for ``dns_cache_ttl``; resolved in threads, never in the hub."""

import socket
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final

import gevent
from gevent.monkey import get_original

from gpooler.clock import monotonic_us
from gpooler.config.storage import Endpoint
from gpooler.errors import ServerConnectFailed

_getaddrinfo: Final = get_original("socket", "getaddrinfo")  # the patched one would make a hub in the thread


def look_up(host: str, port: int) -> list[Any] | OSError:
    """What getaddrinfo says of TCP; blocks, so in a thread.

    An error is returned: gevent prints the traceback of one that is raised.
    """
    try:
        found: list[Any] = _getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return error
    return found


@dataclass(frozen=True, slots=True)
class Address:
    """Where to connect: ``sockaddr`` as ``socket.connect`` takes it for ``family``."""

    family: socket.AddressFamily
    sockaddr: tuple[str, int] | str

    @property
    def text(self) -> str:
        """``address:port`` (v6 in brackets) or the path of a Unix socket."""
        if isinstance(self.sockaddr, str):
            return self.sockaddr
        host, port = self.sockaddr
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @staticmethod
    def parse(text: str) -> "Address":
        """The reverse of ``text``. Raises ValueError."""
        if text.startswith("/"):
            return Address(socket.AF_UNIX, text)
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        family = socket.AF_INET6 if ip_address(host).version == 6 else socket.AF_INET
        return Address(family, (host, int(port)))


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


class Resolver:
    """Answers are kept for ``ttl_ms``; an answer out of date is better than none."""

    def __init__(self, ttl_ms: int) -> None:
        self.ttl_us = ttl_ms * 1000
        self._cache: dict[tuple[str, int], tuple[int, tuple[Address, ...]]] = {}

    def known(self) -> list[tuple[str, int, tuple[Address, ...]]]:
        """Names that were resolved: until when each is good (monotonic, us), and its addresses."""
        return [
            (host, until_us, found)
            for (host, _), (until_us, found) in self._cache.items()
            if not _is_address(host)
        ]

    def addresses(self, endpoint: Endpoint) -> tuple[Address, ...]:
        """The addresses of an endpoint, to be tried in turn. Yields. Raises ServerConnectFailed."""
        if endpoint.unix_path is not None:
            return (Address(socket.AF_UNIX, endpoint.unix_path),)
        assert endpoint.host is not None
        key = (endpoint.host, endpoint.port)
        cached = self._cache.get(key)
        if cached is not None and monotonic_us() < cached[0]:
            return cached[1]
        found = gevent.get_hub().threadpool.apply(look_up, key)
        if isinstance(found, OSError):
            if cached is not None:
                return cached[1]
            raise ServerConnectFailed(cause=f"cannot resolve {endpoint.host}: {found}") from found
        addresses = tuple(
            dict.fromkeys(
                Address(family, (sockaddr[0], sockaddr[1]))
                for family, _, _, _, sockaddr in found
                if family in (socket.AF_INET, socket.AF_INET6)
            )
        )
        if not addresses:
            raise ServerConnectFailed(cause=f"{endpoint.host} has no address")
        self._cache[key] = (monotonic_us() + self.ttl_us, addresses)
        return addresses
