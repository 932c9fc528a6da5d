"""What the targets share: taking inputs apart, copies of exact size, an end where something does not hold."""

from libc.stdio cimport fprintf, stderr
from libc.stdlib cimport abort, malloc
from libc.string cimport memcpy


cdef struct Input:
    const unsigned char* p
    const unsigned char* end


cdef inline unsigned char take(Input* self) noexcept nogil:
    """The next byte; 0 when there are no more."""
    cdef unsigned char byte = 0
    if self.p < self.end:
        byte = self.p[0]
        self.p += 1
    return byte


cdef inline unsigned char* copy_of(const unsigned char* data, size_t size) noexcept nogil:
    """In memory of its own, of that size: reading a byte more is seen. The caller frees it."""
    cdef unsigned char* copy = <unsigned char*> malloc(size)
    if size:
        memcpy(copy, data, size)
    return copy


cdef inline void must(bint holds, const char* what) noexcept nogil:
    if not holds:
        fprintf(stderr, "fuzz: it does not hold that %s\n", what)
        abort()
