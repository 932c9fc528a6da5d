"""Clients that wait for a server of their own, and what it is to be opened with. No I/O."""

from collections.abc import Mapping

Parameters = Mapping[str, str]


class Awaited:
    """The startup parameters of servers to be opened for one client each, by route and relay handle."""

    def __init__(self) -> None:
        self._routes: dict[int, dict[int, Parameters]] = {}

    def add(self, route_id: int, handle: int, parameters: Parameters) -> None:
        """A client waits: the last in turn."""
        self._routes.setdefault(route_id, {})[handle] = parameters

    def take(self, route_id: int) -> tuple[int, Parameters] | None:
        """The client whose turn it is; None when nobody waits."""
        waiting = self._routes.get(route_id)
        if not waiting:
            return None
        handle = next(iter(waiting))
        return handle, waiting.pop(handle)

    def forget(self, route_id: int, handle: int) -> None:
        """The client waits no more, or never did."""
        waiting = self._routes.get(route_id)
        if waiting is not None:
            waiting.pop(handle, None)
