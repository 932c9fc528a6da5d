"""A queue gives out the bytes that were put into it, in order, however little its socket takes."""

from libc.stdint cimport uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from gpooler.relay.io cimport (
    CHUNK, MAX_FREE_CHUNKS, Chunk, ChunkPool, Queue, chunk_drop, io_recv, queue_clear, queue_flush, queue_put,
)
from tests.fuzz.input cimport Input, must, take

cdef extern from "<sys/socket.h>" nogil:
    enum:
        AF_UNIX
        SOCK_STREAM
        SOL_SOCKET
        SO_SNDBUF
    int socketpair(int domain, int type, int protocol, int* ends)
    int setsockopt(int fd, int level, int option, const void* value, unsigned int size)

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef enum:
    READ_MOST = 65536


cdef struct Stage:
    ChunkPool pool
    Queue queue
    int ends[2]
    size_t put                  # bytes so far
    size_t got


cdef inline unsigned char byte_at(size_t place) noexcept nogil:
    """What stands there: the period fits no size of a chunk."""
    return <unsigned char> (place % 251)


cdef void check(Stage* self) noexcept nogil:
    cdef Chunk* chunk = self.queue.head
    cdef Chunk* last = NULL
    cdef size_t size = 0
    while chunk != NULL:
        must(chunk.start < chunk.end <= CHUNK, "a chunk of the queue has bytes")
        size += chunk.end - chunk.start
        last = chunk
        chunk = chunk.next
    must(size == self.queue.size and last == self.queue.tail, "the queue counts its bytes")
    must(self.pool.count <= MAX_FREE_CHUNKS, "no more chunks are kept than there should be")


cdef void put(Stage* self, size_t size) noexcept nogil:
    cdef unsigned char* data = <unsigned char*> malloc(size)
    cdef size_t i
    for i in range(size):
        data[i] = byte_at(self.put + i)
    must(queue_put(&self.pool, &self.queue, data, size), "there is memory")
    self.put += size
    free(data)


cdef ssize_t get(Stage* self, size_t size) noexcept nogil:
    """Read up to so many bytes from the socket."""
    cdef unsigned char* data = <unsigned char*> malloc(size)
    cdef ssize_t got = io_recv(self.ends[1], data, size)
    cdef ssize_t i
    must(got != 0 and got >= -1, "the connection stands")
    for i in range(got):
        must(data[i] == byte_at(self.got + i), "bytes come in order")
    if got > 0:
        self.got += got
    free(data)
    return got


cdef void act(Stage* self, uint8_t what, uint8_t how) noexcept nogil:
    what %= 8
    if what == 0:
        put(self, how)
    elif what == 1:
        put(self, <size_t> how * 67)
    elif what == 2:
        put(self, CHUNK - 4 + how % 8)
    elif what == 3:
        put(self, <size_t> how * 1021)
    elif what < 6:
        must(queue_flush(&self.pool, &self.queue, self.ends[0]), "the peer is there")
    elif what == 6 or how > 4:
        get(self, 1 + <size_t> how * 257)
    else:
        queue_clear(&self.pool, &self.queue)
        while get(self, READ_MOST) > 0:
            pass
        self.got = self.put             # the rest was thrown away
        if how == 4:
            chunk_drop(&self.pool)


cdef api void run(const unsigned char* data, size_t size) noexcept nogil:
    """How much the socket takes at once in one byte, then two bytes for each act."""
    cdef Input rest = [data, data + size]
    cdef Stage stage
    cdef int room
    cdef uint8_t what
    memset(&stage, 0, sizeof(Stage))
    must(socketpair(AF_UNIX, SOCK_STREAM, 0, stage.ends) == 0, "there is a pair of sockets")
    room = <int> take(&rest) * 512
    setsockopt(stage.ends[0], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room))
    while rest.p < rest.end:
        what = take(&rest)
        act(&stage, what, take(&rest))
        check(&stage)
    while stage.queue.size:
        must(queue_flush(&stage.pool, &stage.queue, stage.ends[0]), "the peer is there")
        check(&stage)
        get(&stage, READ_MOST)
    while get(&stage, READ_MOST) > 0:
        pass
    must(stage.got == stage.put, "every byte came")
    close(stage.ends[1])
    put(&stage, 8)
    must(not queue_flush(&stage.pool, &stage.queue, stage.ends[0]), "a peer that is gone is noticed")
    close(stage.ends[0])
    queue_clear(&stage.pool, &stage.queue)
    chunk_drop(&stage.pool)
