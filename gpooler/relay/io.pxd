"""The relay's system calls and byte queues: the seam under which another I/O layer can be put.

Chunks are pooled; a queue holds what a peer did not take yet. All of it belongs to the relay thread.
Free of Python objects.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef enum:
    CHUNK = 16384           # what waits for a server, or stays unsent, is kept in pieces of this size
    MAX_FREE_CHUNKS = 256   # 4 MiB kept for reuse
    READ_SIZE = 262144      # one read of a peer that is attached
    MAX_PIECES = 64         # pieces in one sendmsg
    SMALL = 1024            # so many bytes of several pieces are put together first


cdef enum Received:         # where it is no number of bytes
    RECEIVED_END = 0        # of the stream
    RECEIVED_NOTHING = -1   # nothing is there
    RECEIVED_BROKEN = -2
    RECEIVED_GOODBYE = -3   # TLS: a close_notify


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len


cdef struct Chunk:
    Chunk* next
    uint32_t start
    uint32_t end
    unsigned char data[CHUNK]


cdef struct ChunkPool:
    Chunk* free
    uint32_t count          # kept for reuse
    uint32_t made           # those, and those in use


cdef struct Queue:
    Chunk* head
    Chunk* tail
    size_t size             # bytes queued


cdef Chunk* chunk_take(ChunkPool* pool) noexcept nogil
cdef void chunk_give(ChunkPool* pool, Chunk* chunk) noexcept nogil
# Gives the chunks kept for reuse back to the system.
cdef void chunk_drop(ChunkPool* pool) noexcept nogil
cdef bint queue_put(ChunkPool* pool, Queue* queue, const unsigned char* data, size_t size) noexcept nogil
cdef void queue_clear(ChunkPool* pool, Queue* queue) noexcept nogil

# Bytes sent, 0 when the socket is full, -1 when the peer is gone.
cdef ssize_t io_send(int fd, iovec* pieces, int count) noexcept nogil
# Sends what is queued. False: the peer is gone.
cdef bint queue_flush(ChunkPool* pool, Queue* queue, int fd) noexcept nogil
# Bytes read, or a Received.
cdef ssize_t io_recv(int fd, unsigned char* buffer, size_t size) noexcept nogil
# epoll reports a TCP socket from so many bytes on (SO_RCVLOWAT), or from the end of the stream.
cdef void io_wake_from(int fd, int size) noexcept nogil
