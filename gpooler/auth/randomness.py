"""Random bytes for salts, ids and cancel keys, taken from the system a page at a time.

A login needs some three times; one system call each would be a noticeable part of its cost.
"""

import os
from typing import Final

POOL_BYTES: Final = 4096

_pool = b""  # one process, one thread: the hub's
_at = 0


def random_bytes(count: int) -> bytes:
    """Cryptographically random bytes, never given out twice; ``count`` is at most POOL_BYTES."""
    global _pool, _at
    end = _at + count
    if end > len(_pool):
        _pool = os.urandom(POOL_BYTES)
        _at = 0
        end = count
    taken = _pool[_at:end]
    _at = end
    return taken


def _forget() -> None:
    global _pool
    _pool = b""


os.register_at_fork(after_in_child=_forget)  # or two processes would give out the same bytes
