"""The counters of routes as they were some time ago: what rates are measured against. Pure.

Two are kept, and a third begins each interval: what is measured against is one to two intervals old, as in
PgBouncer.
"""

from collections.abc import Mapping, Sequence

Words = tuple[int, ...]


class History:
    """Snapshots of some words of every route."""

    def __init__(self) -> None:
        self._older: tuple[int, Mapping[int, Words]] = (0, {})
        self._newer: tuple[int, Mapping[int, Words]] = (0, {})

    def add(self, at_us: int, words: Mapping[int, Words]) -> None:
        """An interval begins."""
        self._older = self._newer
        self._newer = at_us, words

    def before(self, route_id: int, zeros: Sequence[int]) -> tuple[int, Words]:
        """When the older snapshot was taken, and what it has of a route; 0 when there is none yet.

        A route that began since then had ``zeros``.
        """
        at_us, words = self._older if self._older[0] else self._newer
        return at_us, words.get(route_id, tuple(zeros))
