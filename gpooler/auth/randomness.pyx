"""Random bytes for salts, nonces, ids and cancel keys, taken from the system a page at a time.

A login needs some four times; one system call each would be a noticeable part of its cost.
"""

import os


cdef enum:
    POOL_BYTES = 4096

cdef bytes pool = b""       # one process, one thread: the hub's
cdef Py_ssize_t used = 0


cpdef bytes random_bytes(Py_ssize_t count):
    """Cryptographically random bytes, never given out twice; ``count`` is at most 4096."""
    global pool, used
    cdef Py_ssize_t start = used
    if not 0 <= count <= POOL_BYTES:
        raise ValueError("too many")
    if start + count > len(pool):
        pool = os.urandom(POOL_BYTES)
        start = 0
    used = start + count
    return pool[start:used]


def forget():
    global pool
    pool = b""


os.register_at_fork(after_in_child=forget)      # or two processes would give out the same bytes
