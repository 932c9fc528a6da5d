"""Binding of listeners: addresses, names, Unix sockets and what stands in their way."""

import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpooler.errors import ConfigurationError
from gpooler.net.listen import Listener, ListenSpec, bind_listeners
from gpooler.net.tcp import TcpSettings
from tests.harness import free_port


@pytest.fixture
def opened() -> Iterator[list[Listener]]:
    listeners: list[Listener] = []
    yield listeners
    for listener in listeners:
        listener.close()


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def unix(directory: Path, mode: int = 0o600) -> list[Listener]:
    return bind_listeners(
        [ListenSpec(0, None, 6432, 5)], unix_socket_dir=str(directory), unix_socket_mode=mode
    )


def test_accepted_sockets_inherit_the_options(opened: list[Listener]) -> None:
    options = TcpSettings(True, 15, 5, 3, -1).options()
    opened += bind_listeners([ListenSpec(4, "127.0.0.1", 0, 5)], options=options)
    (listener,) = opened
    assert (listener.number, listener.name) == (4, f"127.0.0.1:{listener.port}")
    with socket.create_connection(("127.0.0.1", listener.port)):
        listener.socket.setblocking(True)
        accepted, _ = listener.socket.accept()
        with accepted:
            for level, name, value in options:
                assert accepted.getsockopt(level, name) == value
    assert (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 29500) in options


def test_no_keepalive_means_no_option() -> None:
    assert TcpSettings(False, 0, 5, 3, 9).options() == []


def test_star_is_every_address_of_both_families(opened: list[Listener]) -> None:
    port = free_port()
    opened += bind_listeners([ListenSpec(0, "*", port, 5)])
    assert opened[0].name == f"0.0.0.0:{port}"
    socket.create_connection(("127.0.0.1", port)).close()
    if has_ipv6():
        assert opened[1].name == f"[::]:{port}"
        socket.create_connection(("::1", port)).close()


def test_a_name_is_resolved_and_each_address_bound_once(opened: list[Listener]) -> None:
    opened += bind_listeners([ListenSpec(0, "localhost", 0, 5)])
    wanted = {info[4][0] for info in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
    assert {listener.host for listener in opened} == wanted
    assert len(opened) == len(wanted)


def test_a_port_in_use_is_an_error_that_leaves_nothing_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        before = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(ConfigurationError, match=rf"127\.0\.0\.1:{port} .*in use"):
            bind_listeners([ListenSpec(0, "127.0.0.1", 0, 5), ListenSpec(1, "127.0.0.1", port, 5)])
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_two_tables_with_one_address_are_named_as_the_cause() -> None:
    port = free_port()
    with pytest.raises(ConfigurationError, match=r"by another \[\[listen\]\]"):
        bind_listeners([ListenSpec(0, "127.0.0.1", port, 5), ListenSpec(1, "127.0.0.1", port, 5)])


def test_a_name_that_does_not_resolve_is_an_error() -> None:
    for host in ("no-such-host.invalid", "a" * 70 + ".invalid"):
        with pytest.raises(ConfigurationError, match="could not resolve"):
            bind_listeners([ListenSpec(0, host, 6432, 5)])


def test_reuseport_lets_two_generations_overlap(opened: list[Listener]) -> None:
    opened += bind_listeners([ListenSpec(0, "127.0.0.1", 0, 5)], is_reuseport=True)
    opened += bind_listeners([ListenSpec(0, "127.0.0.1", opened[0].port, 5)], is_reuseport=True)
    assert opened[0].port == opened[1].port


@pytest.mark.parametrize("mode", [0o600, 0o777])
def test_unix_socket_has_its_mode_and_its_files_go_with_it(tmp_path: Path, mode: int) -> None:
    (listener,) = unix(tmp_path, mode)
    path = tmp_path / ".s.PGSQL.6432"
    assert listener.name == str(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert (tmp_path / ".s.PGSQL.6432.lock").read_text() == f"{os.getpid()}\n"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    listener.close()
    listener.close()
    assert list(tmp_path.iterdir()) == []


def test_a_stale_socket_is_replaced(tmp_path: Path, opened: list[Listener]) -> None:
    path = tmp_path / ".s.PGSQL.6432"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    (tmp_path / ".s.PGSQL.6432.lock").write_text("999999999\nold\n")
    opened += unix(tmp_path)
    with socket.socket(socket.AF_UNIX) as client:
        assert client.connect_ex(str(path)) == 0


def test_a_living_postgresql_keeps_its_socket_and_its_lock_file(tmp_path: Path) -> None:
    path = tmp_path / ".s.PGSQL.6432"
    lock = tmp_path / ".s.PGSQL.6432.lock"
    lock.write_text("4711\n")
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(path))
        alive.listen(0)
        for backlog in ([], [socket.socket(socket.AF_UNIX) for _ in range(3)]):
            for client in backlog:
                client.setblocking(False)
                assert client.connect_ex(str(path)) in (0, errno.EAGAIN)
            with pytest.raises(ConfigurationError, match="another process listens there"):
                unix(tmp_path)
            for client in backlog:
                client.close()
    assert lock.read_text() == "4711\n"
    assert path.is_socket()


def test_another_gpooler_holds_the_lock(tmp_path: Path, opened: list[Listener]) -> None:
    opened += unix(tmp_path)
    with pytest.raises(ConfigurationError, match="another process holds its lock"):
        unix(tmp_path)
    with socket.socket(socket.AF_UNIX) as client:
        assert client.connect_ex(opened[0].host) == 0


def test_a_file_that_is_no_socket_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / ".s.PGSQL.6432").write_text("precious")
    with pytest.raises(ConfigurationError, match="not a socket"):
        unix(tmp_path)
    assert (tmp_path / ".s.PGSQL.6432").read_text() == "precious"


def test_what_a_unix_socket_lacks_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        unix(tmp_path / "missing")
    with pytest.raises(ConfigurationError, match="longer than 107 bytes"):
        unix(tmp_path / ("d" * 120))
    with pytest.raises(ConfigurationError, match="needs unix_socket_dir"):
        bind_listeners([ListenSpec(0, None, 6432, 5)])
