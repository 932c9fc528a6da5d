"""TCP options of client and server connections: those of [performance], and those of a rule in their place.

Seen on gpooler's own sockets: their descriptors are fetched from the worker (pidfd_getfd).
"""

import ctypes
import os
import socket
import struct
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Final

import psutil
import pytest

from tests.harness import Gpooler, Postgres

Factory = Callable[..., Gpooler]

PIDFD_GETFD: Final = 438  # asm-generic/unistd.h; the standard library has no function for it
NAMES: Final[Mapping[str, tuple[int, int]]] = {
    "nodelay": (socket.IPPROTO_TCP, socket.TCP_NODELAY),
    "keepalive": (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    "idle": (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
    "interval": (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
    "probes": (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
    "user_timeout": (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
}
ONE: Final = {"pool_size": 1}  # a busy machine may open a server more than is needed


def socket_of(pid: int, fd: int) -> socket.socket:
    """A duplicate of another process's socket."""
    with os.fdopen(os.pidfd_open(pid), closefd=True) as process:
        got = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, process.fileno(), fd, 0)
    if got < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return socket.socket(fileno=got)


def options_of(gpooler: Gpooler, port: int, *, is_client: bool) -> dict[str, int]:
    """The options of the one connection that a worker has with this port, theirs or ours."""
    found = []
    for pid in gpooler.worker_pids():
        for connection in psutil.Process(pid).net_connections(kind="tcp"):
            if connection.raddr and (connection.laddr if is_client else connection.raddr).port == port:
                found.append((pid, connection.fd))
    assert len(found) == 1, found
    with closing(socket_of(*found[0])) as duplicate:
        shown = {name: duplicate.getsockopt(*option) for name, option in NAMES.items()}
        onoff, seconds = struct.unpack(
            "ii", duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.calcsize("ii"))
        )
    return {**shown, "resets": int(onoff == 1 and seconds == 0)}


def both(gpooler: Gpooler, postgres: Postgres) -> tuple[dict[str, int], dict[str, int]]:
    """The options on the client's side and on the server's, of a client that is the only one."""
    with gpooler.raw() as client:
        client.login()
        client.query("SELECT 1")
        return (
            options_of(gpooler, gpooler.port, is_client=True),
            options_of(gpooler, postgres.port, is_client=False),
        )


def some(shown: Mapping[str, int], *names: str) -> dict[str, int]:
    return {name: shown[name] for name in names}


def test_the_defaults_are_odysseys_with_a_close_that_keeps_the_last_error(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    for options in both(gpooler_factory(postgres, rule=ONE), postgres):
        assert options == {
            "nodelay": 1, "keepalive": 1, "idle": 15, "interval": 5, "probes": 3, "user_timeout": 0,
            "resets": 0,
        }  # fmt: skip


def test_performance_sets_both_sides(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(
        postgres,
        rule=ONE,
        config={
            "performance": {
                "nodelay": "no",
                "disable_nolinger": "no",
                "keepalive": 20,
                "keepalive_keep_interval": 7,
                "keepalive_probes": 2,
                "keepalive_usr_timeout": -1,
            }
        },
    )
    client, server = both(gpooler, postgres)
    expected = {"nodelay": 0, "keepalive": 1, "idle": 20, "interval": 7, "probes": 2, "user_timeout": 33_500}
    assert client == {**expected, "resets": 1}
    assert server == {**expected, "resets": 0}


@pytest.mark.parametrize(
    ("rule", "options", "resets"),
    [
        (
            {
                "keepalive": 40,
                "keepalive_keep_interval": 9,
                "keepalive_probes": 4,
                "keepalive_usr_timeout": 1234,
                "disable_nolinger": "no",
            },
            {"nodelay": 1, "keepalive": 1, "idle": 40, "interval": 9, "probes": 4, "user_timeout": 1234},
            1,
        ),
        (
            {"keepalive_probes": 6, "pool": "session"},
            {"keepalive": 1, "idle": 20, "interval": 5, "probes": 6, "user_timeout": 5000},
            0,
        ),
        ({"keepalive": 0}, {"keepalive": 0, "user_timeout": 0}, 0),
    ],
    ids=["all of them", "one of them", "off"],
)
def test_a_rule_has_options_of_its_own_on_both_sides(
    postgres: Postgres,
    gpooler_factory: Factory,
    rule: dict[str, object],
    options: dict[str, int],
    resets: int,
) -> None:
    gpooler = gpooler_factory(
        postgres,
        rule={**ONE, **rule},
        config={"performance": {"keepalive": 20, "keepalive_usr_timeout": 5000}},
    )
    client, server = both(gpooler, postgres)
    assert some(client, *options, "resets") == {**options, "resets": resets}
    assert some(server, *options, "resets") == {**options, "resets": 0}


def test_a_rule_takes_the_reset_back(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(
        postgres,
        rule={**ONE, "disable_nolinger": "yes"},
        config={"performance": {"disable_nolinger": "no"}},
    )
    assert both(gpooler, postgres)[0]["resets"] == 0
