"""The options of TCP connections (tcp(7), socket(7)): those of [performance], and a rule's in their place."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from socket import (  # bound before gevent patches: setting an option needs no hub
    AF_INET,
    IPPROTO_TCP,
    SO_KEEPALIVE,
    SO_LINGER,
    SOCK_STREAM,
    SOL_SOCKET,
    TCP_KEEPCNT,
    TCP_KEEPIDLE,
    TCP_KEEPINTVL,
    TCP_NODELAY,
    TCP_USER_TIMEOUT,
    socket,
)
from typing import Final

from gpooler.config.model import Performance, Rule

Option = tuple[int, int, int | bytes]
"""Arguments of setsockopt: level, name, value."""

_LINGER: Final = struct.Struct("ii")  # struct linger


@dataclass(frozen=True, slots=True)
class TcpSettings:
    """What the configuration says about connections. ``keepalive_s`` 0: none, and no user timeout.

    A negative ``user_timeout_ms`` stands for a little less than keepalive would take to give up.
    """

    is_nodelay: bool
    keepalive_s: int
    interval_s: int
    probes: int
    user_timeout_ms: int
    has_reset: bool = False  # SO_LINGER 0: a close resets the connection; for clients alone

    def options(self) -> list[Option]:
        """For a new socket; listeners hand them on to what they accept."""
        options: list[Option] = []
        if self.is_nodelay:
            options.append((IPPROTO_TCP, TCP_NODELAY, 1))
        if self.keepalive_s > 0:
            options += [
                (SOL_SOCKET, SO_KEEPALIVE, 1),
                (IPPROTO_TCP, TCP_KEEPIDLE, self.keepalive_s),
                (IPPROTO_TCP, TCP_KEEPINTVL, self.interval_s),
                (IPPROTO_TCP, TCP_KEEPCNT, self.probes),
            ]
        if timeout_ms := self._timeout_ms():
            options.append((IPPROTO_TCP, TCP_USER_TIMEOUT, timeout_ms))
        return options

    def changes(self, general: "TcpSettings") -> tuple[Option, ...]:
        """For a client's socket that was accepted with ``general``; empty when nothing differs."""
        if self == general:
            return ()
        return (
            (SOL_SOCKET, SO_KEEPALIVE, int(self.keepalive_s > 0)),
            (IPPROTO_TCP, TCP_KEEPIDLE, max(self.keepalive_s, 1)),
            (IPPROTO_TCP, TCP_KEEPINTVL, self.interval_s),
            (IPPROTO_TCP, TCP_KEEPCNT, self.probes),
            (IPPROTO_TCP, TCP_USER_TIMEOUT, self._timeout_ms()),
            (SOL_SOCKET, SO_LINGER, _LINGER.pack(self.has_reset, 0)),
        )

    def _timeout_ms(self) -> int:
        if self.keepalive_s <= 0:
            return 0
        if self.user_timeout_ms >= 0:
            return self.user_timeout_ms
        return max(1000 * (self.keepalive_s + self.interval_s * self.probes) - 500, 0)


def tcp_settings(performance: Performance, rule: Rule | None = None) -> TcpSettings:
    """The settings of [performance]; of a rule's connections where one is given."""

    def of_rule(name: str) -> int:
        value: int | None = None if rule is None else getattr(rule, name)
        general: int = getattr(performance, name)
        return general if value is None else value

    return TcpSettings(
        is_nodelay=performance.nodelay,
        keepalive_s=of_rule("keepalive"),
        interval_s=of_rule("keepalive_keep_interval"),
        probes=of_rule("keepalive_probes"),
        user_timeout_ms=of_rule("keepalive_usr_timeout"),
        has_reset=not of_rule("disable_nolinger"),
    )


def set_options(fd: int, options: Sequence[Option]) -> None:
    """Set the options of a TCP socket, which stays the caller's. Raises OSError."""
    borrowed = socket(AF_INET, SOCK_STREAM, 0, fd)
    try:
        for option in options:
            borrowed.setsockopt(*option)
    finally:
        borrowed.detach()
