"""Message framing: where a stream of protocol messages stands.

A message is one type byte, four bytes of length (big-endian, counting themselves) and the body:
protocol chapter "Message Formats". The header is always handled whole: incomplete ones are held
back by the caller. Free of Python objects.
"""

from libc.stdint cimport uint8_t, uint32_t


cdef enum:
    HEADER = 5
    MAX_MESSAGE = 0x3ffffffe        # PQ_LARGE_MESSAGE_LIMIT of PostgreSQL; lengths count themselves
    MAX_SMALL_MESSAGE = 10000       # PQ_SMALL_MESSAGE_LIMIT


cdef struct Frame:
    uint32_t left       # bytes of the current body still to come; 0: at a message boundary
    uint8_t kind        # type of the current or last message


cdef inline uint32_t frame_length(const unsigned char* header) noexcept nogil:
    """The length field of a whole header."""
    return ((<uint32_t> header[1] << 24) | (<uint32_t> header[2] << 16)
            | (<uint32_t> header[3] << 8) | <uint32_t> header[4])
