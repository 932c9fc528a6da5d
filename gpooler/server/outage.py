"""How long the servers of a route could not be opened. Pure: the time is an argument."""

from typing import Final

CALM_US: Final = 1_000_000  # clients that wait have servers tried for more often than that


class Outages:
    """Of the routes by id; all times are microseconds of one monotonic clock."""

    def __init__(self, timeout_us: int) -> None:
        """``timeout_us``: the limit of one try."""
        self._spans: dict[int, tuple[int, int]] = {}  # the first try's beginning, the last one's end
        self.configure(timeout_us)

    def configure(self, timeout_us: int) -> None:
        """From now on."""
        self._gap_us = 2 * timeout_us + CALM_US

    def failed(self, route_id: int, began_us: int, now_us: int) -> int:
        """A try that began at ``began_us`` has failed; returns for how long all of them have.

        After a pause in which nobody wanted a server the count begins anew.
        """
        since_us, last_us = self._spans.get(route_id, (began_us, began_us))
        if began_us - last_us > self._gap_us:
            since_us = began_us
        since_us = min(since_us, began_us)
        self._spans[route_id] = (since_us, now_us)
        return now_us - since_us

    def over(self, route_id: int) -> None:
        """A server of the route was opened."""
        self._spans.pop(route_id, None)
