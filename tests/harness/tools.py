"""Small helps: waiting, free ports, processes held still, programs of the machine, an unprivileged user."""

import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# Below the range the kernel takes for outgoing connections, so that none of those is in the way.
LOWEST_PORT = 10_240
HIGHEST_PORT = 32_000

# pytest-randomly seeds the common generator alike in every xdist worker; ports must differ.
_random = random.SystemRandom()
# The latest ports of this process: whoever asked for an older one has bound it, or needs it no more.
_reserved: deque[int] = deque(maxlen=100)


class Unavailable(Exception):
    """A program that a test needs is not on this machine; the text says which."""


def eventually(check: Callable[[], T], within: float = 20.0) -> T:
    """Return the first true value of ``check()``, asked again and again for ``within`` seconds.

    An AssertionError inside ``check`` counts as not yet, and so does a file that is not there yet.
    Raises AssertionError with what came last.
    """
    deadline = time.monotonic() + within
    pause = 0.001
    while True:
        try:
            value = check()
            if value:
                return value
            problem: object = f"last value: {value!r}"
        except (AssertionError, FileNotFoundError) as error:
            problem = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within} s; {problem}")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


def free_port() -> int:
    """A TCP port that nobody listens on, in IPv4 and IPv6, and that no other test run will pick meanwhile.

    gpooler binds with SO_REUSEPORT: two that are given the same port would both start and share the clients.
    """
    for _ in range(1000):
        port = _random.randint(LOWEST_PORT, HIGHEST_PORT)
        if not reserve(port):
            continue
        try:
            for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
                with socket.socket(family, socket.SOCK_STREAM) as probe:
                    if family == socket.AF_INET6:
                        probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    probe.bind((host, port))
        except OSError:
            continue
        return port
    raise RuntimeError("no free port found")


def reserve(port: int) -> bool:
    """Keep other test runs from picking a port as long as this process lives; False: one of them has it."""
    reservation = socket.socket(socket.AF_UNIX)
    try:
        reservation.bind(f"\0gpooler-test-port-{port}")  # the kernel frees it when this process ends
    except OSError:
        reservation.close()
        return False
    if len(_reserved) == _reserved.maxlen:
        os.close(_reserved[0])
    _reserved.append(reservation.detach())
    return True


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Hold a process still, every thread of it."""
    threads = Path(f"/proc/{pid}/task")
    os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: all("State:\tT" in (one / "status").read_text() for one in threads.iterdir()))
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def unread(pid: int, peer_port: int | None = None) -> int:
    """Bytes that wait for a process in its TCP sockets, or in the one whose other end has that port."""
    shown = subprocess.run(["ss", "-tnpH"], capture_output=True, text=True, check=True).stdout
    mine = [line.split() for line in shown.splitlines() if f"pid={pid}," in line]
    return sum(
        int(size) for _, size, _, _, peer, *_ in mine if peer_port is None or peer.endswith(f":{peer_port}")
    )


def find_program(name: str) -> str:
    """The path of a program; raises Unavailable when the machine has none of that name."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/lib/postgresql/15/bin")
    if path is None:
        raise Unavailable(f"{name} is not installed")
    return path


@dataclass(frozen=True, slots=True)
class Account:
    """A user of the system to run a server as."""

    name: str
    uid: int
    gid: int


def unprivileged_account() -> Account | None:
    """Whom to run PostgreSQL as: None (ourselves), or a system user when we are root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(name, entry.pw_uid, entry.pw_gid)
    raise Unavailable("PostgreSQL does not run as root, and there is no user postgres or nobody")


def as_account(account: Account | None) -> dict[str, Any]:
    """The options of subprocess that run a program as that account."""
    return {} if account is None else {"user": account.uid, "group": account.gid, "extra_groups": ()}


def is_reachable(path: Path, account: Account | None) -> bool:
    """Whether the account may pass every directory on the way to ``path`` (by the permission bits)."""
    if account is None:
        return True
    for parent in path.resolve().parents:
        status = parent.stat()
        if status.st_uid == account.uid:
            wanted = 0o100
        elif status.st_gid == account.gid:
            wanted = 0o010
        else:
            wanted = 0o001
        if not status.st_mode & wanted:
            return False
    return True
