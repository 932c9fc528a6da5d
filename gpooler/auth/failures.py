"""Failed logins by address and user, over all workers: how long an answer is kept back, who is banned.

The counts lie in memory that the master shares with its workers. Each worker writes its own part alone and
reads those of all, as with the counters (``stats/shared``), so there is no lock and no message; the part of a
worker that died is carried on by its successor. A part has a fixed size: strangers who invent users fill it
and no more.
"""

import hashlib
import mmap
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from gpooler.clock import monotonic_us
from gpooler.config.model import Limits

BUCKETS: Final = 1024
WAYS: Final = 4  # entries of a bucket
# words of an entry; a key of 0: it is free. BANNED_AFTER: failures over all workers that led to the ban
KEY, COUNT, LAST_US, CLEARED_US, BANNED_UNTIL_US, BANNED_AFTER = range(6)
ENTRY: Final = 8
NAMES_MOST: Final = 4096  # of bans, kept for the console
PART: Final = BUCKETS * WAYS * ENTRY
IPV6_PREFIX: Final = 64  # what one customer is given: within it addresses are free to choose


class FailureTable:
    """The shared memory. The master makes it before it forks; each worker has a part, by its number."""

    def __init__(self, workers: int, first: int = 1) -> None:
        """For the workers from number ``first`` on."""
        self._first = first
        self._map = mmap.mmap(-1, workers * PART * 8)
        self._words = memoryview(self._map).cast("Q")
        self._workers = workers

    def is_banned(self, key: int, now_us: int) -> bool:
        """Whether a ban of ``key`` has not ended yet."""
        return any(entry[BANNED_UNTIL_US] > now_us for entry in self._entries(key))

    def bans(self, worker: int, now_us: int) -> list[tuple[int, int, int]]:
        """Bans that a worker, or one before it of its number, has set: key, failures, until when."""
        start = (worker - self._first) * PART
        entries = (self._read(at) for at in range(start, start + PART, ENTRY))
        return [
            (entry[KEY], entry[BANNED_AFTER], entry[BANNED_UNTIL_US])
            for entry in entries
            if entry[KEY] and entry[BANNED_UNTIL_US] > now_us
        ]

    def add(self, worker: int, key: int, now_us: int, *, most: int, ban_us: int) -> bool:
        """One more failure; returns whether it is the last of ``most``, with which a ban begins."""
        at = self._own(worker, key)
        words = self._words
        begin_us = _begin_us(self._entries(key), now_us - ban_us)
        words[at + COUNT] = words[at + COUNT] + 1 if words[at + LAST_US] > begin_us else 1
        words[at + LAST_US] = now_us
        count = sum(entry[COUNT] for entry in self._entries(key) if entry[LAST_US] > begin_us)
        if count >= most:
            words[at + BANNED_AFTER] = count
            words[at + BANNED_UNTIL_US] = now_us + ban_us
        return count >= most

    def clear(self, worker: int, key: int, now_us: int) -> None:
        """A success: what failed before counts no more."""
        entries = self._entries(key)
        if any(entry[LAST_US] > _begin_us(entries, 0) for entry in entries):
            self._words[self._own(worker, key) + CLEARED_US] = now_us

    def _entries(self, key: int) -> list[list[int]]:
        """The entries of ``key`` in all parts."""
        places = (
            at
            for worker in range(self._first, self._first + self._workers)
            for at in self._bucket(worker, key)
        )
        return [entry for at in places if self._words[at] == key and (entry := self._read(at))[KEY] == key]

    def _bucket(self, worker: int, key: int) -> range:
        start = (worker - self._first) * PART + key % BUCKETS * WAYS * ENTRY
        return range(start, start + WAYS * ENTRY, ENTRY)

    def _read(self, at: int) -> list[int]:
        """An entry; its writer may be at it, so it is taken for free when its key changes meanwhile."""
        words = self._words[at : at + ENTRY].tolist()
        if self._words[at + KEY] != words[KEY]:
            words[KEY] = 0
        return words

    def _own(self, worker: int, key: int) -> int:
        """The place of ``key`` in a worker's part; the one that counts least makes room for it."""
        places = self._bucket(worker, key)
        words = self._words
        for at in places:
            if words[at + KEY] == key:
                return at
        at = min(places, key=lambda it: (words[it + BANNED_UNTIL_US], words[it + COUNT], words[it + LAST_US]))
        for word in range(ENTRY):
            words[at + word] = 0
        words[at + KEY] = key
        return at


def _begin_us(entries: list[list[int]], oldest_us: int) -> int:
    """Failures until then count no more: there was a success, a ban that is over, or they are too old."""
    return max(0, oldest_us, *(max(entry[CLEARED_US], entry[BANNED_UNTIL_US]) for entry in entries))


class Failures:
    """What ``[limits]`` says about failed logins, for one worker."""

    def __init__(self, limits: Limits, table: FailureTable, worker: int, secret: bytes) -> None:
        """``secret``: the same in all workers, so that they agree."""
        self._shared = table
        self._worker = worker
        self._secret = secret[: hashlib.blake2b.MAX_KEY_SIZE]
        self.configure(limits)

    def configure(self, limits: Limits) -> None:
        """From now on."""
        self._limits = limits
        self._table = self._shared if limits.auth_failure_max else None
        self._ban_us = limits.auth_failure_ban_ms * 1000
        self._names: dict[int, tuple[str, str]] = {}  # address and user of bans, by key

    def bans(self) -> list[tuple[str | None, str | None, int, int]]:
        """Bans of this worker's part: address, user, failures, until when (monotonic, us).

        Address and user are None where a worker that is dead has set it: the table has no names.
        """
        if self._table is None:
            return []
        found = self._table.bans(self._worker, monotonic_us())
        self._names = {key: self._names[key] for key, _, _ in found if key in self._names}
        return [(*self._names.get(key, (None, None)), count, until_us) for key, count, until_us in found]

    def is_banned(self, address: bytes, user: bytes) -> bool:
        """Whether a client of this address may not log in as ``user`` now; a Unix socket has none."""
        if self._table is None or self._is_trusted(address):
            return False
        return self._table.is_banned(self._key(address, user), monotonic_us())

    def add(self, address: bytes, user: bytes) -> bool:
        """A login failed. Returns whether a ban begins with it; in a ban nothing makes it longer."""
        if self._table is None or self._is_trusted(address):
            return False
        key, now_us = self._key(address, user), monotonic_us()
        if self._table.is_banned(key, now_us):
            return False
        most = self._limits.auth_failure_max
        is_last = self._table.add(self._worker, key, now_us, most=most, ban_us=self._ban_us)
        if is_last:
            if len(self._names) >= NAMES_MOST:
                self._names.clear()
            self._names[key] = str(_plain(address)), user.decode("utf-8", "replace")
        return is_last

    def clear(self, address: bytes, user: bytes) -> None:
        """A login succeeded."""
        if self._table is not None and not self._is_trusted(address):
            self._table.clear(self._worker, self._key(address, user), monotonic_us())

    def delay_s(self, address: bytes) -> float:
        """How long the answer to a failed login is kept back."""
        delay_ms = self._limits.auth_failure_delay_ms
        return 0.0 if not delay_ms or self._is_trusted(address) else delay_ms / 1000

    def _is_trusted(self, address: bytes) -> bool:
        if not address:
            return True
        plain = _plain(address)
        return any(plain in network for network in self._limits.auth_failure_trusted)

    def _key(self, address: bytes, user: bytes) -> int:
        plain = _plain(address)
        place = plain.packed if plain.version == 4 else plain.packed[: IPV6_PREFIX // 8]
        data = bytes((len(place),)) + place + user
        digest = hashlib.blake2b(data, digest_size=8, key=self._secret).digest()
        return int.from_bytes(digest, "big") or 1


def _plain(address: bytes) -> IPv4Address | IPv6Address:
    """The address; an IPv4 one as such also where an IPv6 socket brought it."""
    found = ip_address(address)
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return mapped or found
