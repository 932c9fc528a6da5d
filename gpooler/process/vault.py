"""The master's copies of all servers' sockets: all that is left of one when worker and broker both die.

A PostgreSQL process that runs a query does not notice that its client is gone. As long as one copy of its
socket is known its end can be waited for, and until then its slot is taken (DESIGN §3). The master never
reads or writes one.
"""

import os

from gpooler.process.control import HeldServer, LetServer
from gpooler.process.link import Link


class Vault:
    """Copies by route and slot, each with what a broker must know to end the server. Owns them."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], tuple[HeldServer, int]] = {}

    def hold(self, server: HeldServer, fd: int) -> None:
        """Keep ``fd``, ours from now on, instead of an older one of the slot."""
        self._close(server.route_id, server.slot)
        self._held[server.route_id, server.slot] = (server, fd)

    def let(self, server: LetServer) -> None:
        """The PostgreSQL process is gone."""
        self._close(server.route_id, server.slot)

    def servers(self) -> list[HeldServer]:
        """All that live, those in login included."""
        return [server for server, _ in self._held.values()]

    def hand_over(self, broker: Link) -> None:
        """Send everything to a new broker; the copies stay until it says what became of them."""
        for server, fd in self._held.values():
            broker.send(server, (fd,))

    def close(self) -> None:
        """Close every copy: in a child, or at the end."""
        for _, fd in self._held.values():
            os.close(fd)
        self._held.clear()

    def _close(self, route_id: int, slot: int) -> None:
        held = self._held.pop((route_id, slot), None)
        if held is not None:
            os.close(held[1])
