"""Binds the listening sockets. Plain sockets: the master, which has no hub, makes them.

Workers inherit and share them. Options of TCP listeners are inherited by what they accept
(Linux: nodelay, keepalive, user timeout), which saves system calls at every login.
"""

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from gpooler.errors import ConfigurationError
from gpooler.net.tcp import Option

_SUN_PATH_MAX: Final = 107  # unix(7): 108 bytes with the final zero
# A client speaks first and is accepted when it has, with no wake-up before; who is silent, a second later.
_DEFERRED: Final = (socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)


@dataclass(frozen=True, slots=True)
class ListenSpec:
    """What one ``[[listen]]`` asks for."""

    number: int  # of the [[listen]] table
    host: str | None  # None: a Unix socket in the directory given to bind_listeners
    port: int
    backlog: int


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening, non-blocking socket. ``close`` ends it, and removes a Unix socket's files."""

    number: int  # of the [[listen]] table it came from
    socket: socket.socket
    host: str  # numeric address, or the path of a Unix socket
    port: int
    is_unix: bool = False
    lock_fd: int = field(default=-1, repr=False)  # of a Unix socket of our own making

    @property
    def name(self) -> str:
        """For log lines: ``127.0.0.1:6432``, ``[::1]:6432`` or a path."""
        if self.is_unix:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def close(self) -> None:
        """Stop listening; for the master, since it also unlinks a Unix socket. May be repeated."""
        if self.socket.fileno() < 0:
            return
        self.socket.close()
        if self.lock_fd >= 0:
            with suppress(PermissionError):  # made as root: the next start finds it stale
                _unlink(self.host)
                _unlink(self.host + ".lock")
            os.close(self.lock_fd)

    def abandon(self) -> None:
        """Close our copies: another process goes on with socket and files."""
        self.socket.close()
        if self.lock_fd >= 0:
            os.close(self.lock_fd)


def bind_listeners(
    specs: Iterable[ListenSpec],
    *,
    unix_socket_dir: str | None = None,
    unix_socket_mode: int | None = None,
    is_reuseport: bool = False,
    options: Sequence[Option] = (),
    given: list[socket.socket] | None = None,
) -> list[Listener]:
    """Bind and listen for every spec; ``*`` is every IPv4 and IPv6 address, a name all it resolves to.

    ``options`` are set on TCP sockets. ``given``: sockets that listen already; those whose address is asked
    for are taken out. Blocks while a name is resolved. All or nothing: raises ConfigurationError that
    names the address, and leaves no socket behind.
    """
    listeners: list[Listener] = []
    ready = {_address(sock): sock for sock in given or ()}
    options = (_DEFERRED, *options)
    try:
        for spec in specs:
            if spec.host is None:
                if unix_socket_dir is None or unix_socket_mode is None:
                    raise ConfigurationError(
                        "a listener without host needs unix_socket_dir and unix_socket_mode"
                    )
                path = str(Path(unix_socket_dir) / f".s.PGSQL.{spec.port}")
                sock = ready.pop(path, None)
                if sock is not None:
                    listeners.append(Listener(spec.number, sock, path, spec.port, is_unix=True))
                else:
                    listeners.append(_bind_unix(spec, path, unix_socket_mode))
            else:
                listeners.extend(_bind_tcp(spec, listeners, is_reuseport, options, ready))
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    if given is not None:
        given[:] = ready.values()
    return listeners


def _bind_tcp(
    spec: ListenSpec,
    bound: Sequence[Listener],
    is_reuseport: bool,
    options: Sequence[Option],
    ready: "dict[_Address, socket.socket]",
) -> list[Listener]:
    """One listener for each address of ``spec`` not bound by ``bound`` yet for the same spec."""
    assert spec.host is not None
    listeners: list[Listener] = []
    try:
        for family, address in _resolve(spec):
            try:
                taken_over = ready.pop(address[:2], None)
                if taken_over is not None:
                    for level, name, value in options:
                        taken_over.setsockopt(level, name, value)
                    taken_over.listen(spec.backlog)
                sock = taken_over or _listen_tcp(family, address, spec.backlog, is_reuseport, options)
            except OSError as error:
                # A kernel or container without IPv6: "*" is then IPv4 alone.
                if spec.host == "*" and family == socket.AF_INET6 and _is_no_ipv6(error):
                    continue
                taken = " by another [[listen]]" if _is_bound(address, bound) else ""
                raise ConfigurationError(
                    f"could not listen on {spec.host}:{spec.port} ({address[0]}){taken}: {error.strerror}"
                ) from error
            name = sock.getsockname()
            listeners.append(Listener(spec.number, sock, name[0], name[1]))
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _resolve(spec: ListenSpec) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
    """The addresses of a spec, each once. Raises ConfigurationError."""
    if spec.host == "*":
        return [(socket.AF_INET, ("0.0.0.0", spec.port)), (socket.AF_INET6, ("::", spec.port))]
    try:
        found = socket.getaddrinfo(
            spec.host, spec.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f'could not resolve listen host "{spec.host}": {error}') from error
    unique = {(family, address): None for family, _, _, _, address in found}
    return [(family, address) for family, address in unique]  # type: ignore[misc]  # IPv6: with its scope


def _listen_tcp(
    family: socket.AddressFamily,
    address: tuple[str, int],
    backlog: int,
    is_reuseport: bool,
    options: Sequence[Option],
) -> socket.socket:
    """A listening socket. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_reuseport:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        for level, name, value in options:
            sock.setsockopt(level, name, value)
        sock.bind(address)
        sock.listen(backlog)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _is_no_ipv6(error: OSError) -> bool:
    return error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT)


def _is_bound(address: tuple[str, int], bound: Sequence[Listener]) -> bool:
    return any((listener.host, listener.port) == address[:2] for listener in bound)


_Address = str | tuple[str, int]


def _address(sock: socket.socket) -> _Address:
    name = sock.getsockname()
    return name if isinstance(name, str) else (name[0], name[1])


def _bind_unix(spec: ListenSpec, path: str, mode: int) -> Listener:
    """Listen on ``.s.PGSQL.<port>``, where libpq looks. Raises ConfigurationError."""
    if len(os.fsencode(path)) > _SUN_PATH_MAX:
        raise ConfigurationError(f'the path of the Unix socket "{path}" is longer than {_SUN_PATH_MAX} bytes')
    try:
        lock_fd = _lock(path + ".lock")
    except OSError as error:
        text = "another process holds its lock" if error.errno == errno.EWOULDBLOCK else error.strerror
        raise ConfigurationError(f'could not listen on "{path}": {text}') from error
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        # Only now: until here the lock file may be that of a living PostgreSQL, which reads its pid.
        os.ftruncate(lock_fd, 0)
        os.pwrite(lock_fd, b"%d\n" % os.getpid(), 0)
        before = os.umask(0o777 & ~mode)  # never wider than asked for, not even for a moment
        try:
            sock.bind(path)
        finally:
            os.umask(before)
        Path(path).chmod(mode)
        sock.listen(spec.backlog)
        sock.setblocking(False)
    except BaseException as error:
        sock.close()
        os.close(lock_fd)
        if isinstance(error, OSError):
            raise ConfigurationError(f'could not listen on "{path}": {error.strerror}') from error
        raise
    return Listener(spec.number, sock, path, spec.port, is_unix=True, lock_fd=lock_fd)


def _lock(path: str) -> int:
    """Open and lock ``path``, its content as it was. Raises OSError (EWOULDBLOCK: held)."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same_file(fd, path):  # else its last owner removed it between our open and our lock
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _is_same_file(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), Path(path).stat())
    except FileNotFoundError:
        return False


def _remove_stale(path: str) -> None:
    """Remove a socket nobody listens on. Raises ConfigurationError when it is alive or not a socket."""
    try:
        found = Path(path).lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigurationError(f'could not listen on "{path}": a file that is not a socket is in the way')
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # EAGAIN is a full backlog, so alive
        refused = probe.connect_ex(path) == errno.ECONNREFUSED
    if not refused:
        raise ConfigurationError(f'could not listen on "{path}": another process listens there')
    _unlink(path)


def _unlink(path: str) -> None:
    Path(path).unlink(missing_ok=True)
