"""The ``host`` of a storage: a list of endpoints in one text."""

import re
from dataclasses import dataclass
from typing import Final

ENDPOINTS_MOST: Final = 128
ZONE_MOST: Final = 15
SOCKET_PATH_MOST: Final = 107  # sun_path of sockaddr_un, less the closing zero


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server is reached: a host and port, or a Unix socket."""

    host: str | None  # name or address for TCP, None for a Unix socket
    port: int
    unix_path: str | None = None
    zone: str = ""

    def __str__(self) -> str:
        if self.unix_path is not None:
            return self.unix_path
        return f"[{self.host}]:{self.port}" if ":" in (self.host or "") else f"{self.host}:{self.port}"


def socket_path(directory: str, port: int) -> str:
    """The socket of ``port`` in ``directory``, as PostgreSQL names it; raises ``ValueError`` if too long."""
    path = f"{directory.rstrip('/')}/.s.PGSQL.{port}"
    if len(path.encode()) > SOCKET_PATH_MOST:
        raise ValueError(f"the path of the Unix socket is longer than {SOCKET_PATH_MOST} bytes")
    return path


def parse_endpoints(text: str | None, port: int, unix_socket_dir: str | None) -> tuple[Endpoint, ...]:
    """The endpoints of a storage's ``host`` (reference §4); or ``ValueError`` for the user."""
    if text is None:
        if unix_socket_dir is None:
            raise ValueError('a storage without "host" needs "unix_socket_dir" in [service]')
        return (Endpoint(None, port, socket_path(unix_socket_dir, port)),)
    endpoints = tuple(_parse_endpoint(item.strip(), port) for item in text.split(","))
    if len(endpoints) > ENDPOINTS_MOST:
        raise ValueError(f"a storage has at most {ENDPOINTS_MOST} hosts")
    return endpoints


def _parse_endpoint(text: str, default_port: int) -> Endpoint:
    scheme, rest = "tcp", text
    if "://" in text:
        scheme, rest = text.split("://", 1)
        if scheme not in ("tcp", "unix"):
            raise ValueError(f'has the unknown scheme "{scheme}"; known are tcp and unix')
    host, tail = _split_host(rest)
    if not host:
        raise ValueError("holds an empty host; an IPv6 address stands in brackets")
    port, zone = _parse_tail(tail)
    if scheme == "tcp" and not host.startswith("/"):
        return Endpoint(host, port or default_port, None, zone)
    if not host.startswith("/"):
        raise ValueError("a unix:// host must be an absolute path")
    if re.fullmatch(r"\.s\.PGSQL\.[0-9]+", host.rsplit("/", 1)[1], re.ASCII):
        directory, name = host.rsplit("/", 1)
        port = port or int(name.rsplit(".", 1)[1])
        host = directory or "/"
    port = port or default_port
    return Endpoint(None, port, socket_path(host, port), zone)


def _split_host(text: str) -> tuple[str, list[str]]:
    """The host and the parts behind it; an IPv6 address stands in brackets."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError('has a "[" without its "]", or text behind it')
        return host, rest[1:].split(":") if rest else []
    host, *tail = text.split(":")
    if len(tail) > 2:
        raise ValueError("has too many colons; an IPv6 address stands in brackets")
    return host, tail


def _parse_tail(parts: list[str]) -> tuple[int | None, str]:
    """Port and zone, in either order."""
    port, zone = None, ""
    for part in parts:
        if part.isascii() and part.isdigit():
            if port is not None:
                raise ValueError("has two ports; an IPv6 address stands in brackets")
            port = int(part[:10])
            if not 1 <= port <= 65_535:
                raise ValueError("has a port out of range")
        elif not part or zone:
            raise ValueError("has an empty part or two zones; an IPv6 address stands in brackets")
        elif len(part) > ZONE_MOST:
            raise ValueError(f"has a zone of more than {ZONE_MOST} characters")
        else:
            zone = part
    return port, zone
