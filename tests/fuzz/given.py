"""What the targets in Python share: taking inputs apart, and how much memory is in use."""

import ctypes
import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
REPEATS = 8
NOISE = 16_384  # bytes: what caches may keep of so many repeats; a TLS session has more


class Given:
    """The bytes of an input, one after another; 0 and nothing behind the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def byte(self) -> int:
        """The next byte."""
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def some(self, count: int) -> bytes:
        """The next bytes, fewer at the end."""
        self._at += count
        return self._data[self._at - count : self._at]

    def rest(self) -> bytes:
        """All that is left."""
        return self.some(max(0, len(self._data) - self._at))

    def choice(self, of: Sequence[T]) -> T:
        """One of these, by the next byte."""
        return of[self.byte() % len(of)]

    def damaged(self, data: bytes) -> bytes:
        """``data``, seldom with a byte changed, put in or taken out."""
        how = self.byte()
        if how < 192 or not data:
            return data
        at, byte = self.byte() * 256 + self.byte(), self.byte()
        at %= len(data)
        if how < 224:
            return data[:at] + bytes([byte]) + data[at + 1 :]
        if how < 240:
            return data[:at] + bytes([byte]) + data[at:]
        return data[:at] + data[at + 1 :] if how < 248 else data[:at]


def allocated() -> int:
    """Bytes of memory in use, as AddressSanitizer counts them."""
    count = ctypes.CDLL(None).__sanitizer_get_current_allocated_bytes
    count.restype = ctypes.c_size_t
    return int(count())


def gives_memory_back(act: Callable[[], None]) -> None:
    """Whatever ``act`` takes it gives back: what is in use does not grow with each time."""
    act()  # caches are filled once
    gc.collect()
    before = allocated()
    for _ in range(REPEATS):
        act()
    gc.collect()
    grown = allocated() - before
    assert grown < NOISE, f"{grown} bytes are in use after {REPEATS} times that were not before"
