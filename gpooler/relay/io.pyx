"""The relay's system calls and byte queues; the design is in the .pxd."""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset


cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        void* msg_name
        unsigned int msg_namelen
        iovec* msg_iov
        size_t msg_iovlen
        void* msg_control
        size_t msg_controllen
        int msg_flags
    ssize_t recv(int fd, void* buffer, size_t size, int flags)
    ssize_t send(int fd, const void* buffer, size_t size, int flags)
    ssize_t sendmsg(int fd, const msghdr* message, int flags)
    enum:
        MSG_NOSIGNAL
        MSG_DONTWAIT
        SOL_SOCKET
        SO_RCVLOWAT
    int setsockopt(int fd, int level, int option, const void* value, unsigned int size)


cdef Chunk* chunk_take(ChunkPool* pool) noexcept nogil:
    cdef Chunk* chunk = pool.free
    if chunk != NULL:
        pool.free = chunk.next
        pool.count -= 1
    else:
        chunk = <Chunk*> malloc(sizeof(Chunk))
        if chunk == NULL:
            return NULL
        pool.made += 1
    chunk.next = NULL
    chunk.start = 0
    chunk.end = 0
    return chunk


cdef void chunk_give(ChunkPool* pool, Chunk* chunk) noexcept nogil:
    if pool.count >= MAX_FREE_CHUNKS:
        free(chunk)
        pool.made -= 1
        return
    chunk.next = pool.free
    pool.free = chunk
    pool.count += 1


cdef void chunk_drop(ChunkPool* pool) noexcept nogil:
    cdef Chunk* chunk
    while pool.free != NULL:
        chunk = pool.free
        pool.free = chunk.next
        free(chunk)
    pool.made -= pool.count
    pool.count = 0


cdef bint queue_put(ChunkPool* pool, Queue* queue, const unsigned char* data, size_t size) noexcept nogil:
    cdef Chunk* chunk
    cdef size_t room
    while size:
        chunk = queue.tail
        if chunk == NULL or chunk.end == CHUNK:
            chunk = chunk_take(pool)
            if chunk == NULL:
                return False
            if queue.tail == NULL:
                queue.head = chunk
            else:
                queue.tail.next = chunk
            queue.tail = chunk
        room = CHUNK - chunk.end
        if room > size:
            room = size
        memcpy(chunk.data + chunk.end, data, room)
        chunk.end += <uint32_t> room
        queue.size += room
        data += room
        size -= room
    return True


cdef void queue_clear(ChunkPool* pool, Queue* queue) noexcept nogil:
    cdef Chunk* chunk = queue.head
    cdef Chunk* following
    while chunk != NULL:
        following = chunk.next
        chunk_give(pool, chunk)
        chunk = following
    queue.head = NULL
    queue.tail = NULL
    queue.size = 0


cdef ssize_t io_send(int fd, iovec* pieces, int count) noexcept nogil:
    cdef unsigned char small[SMALL]
    cdef iovec whole
    cdef msghdr message
    cdef ssize_t sent
    cdef int i
    if count > 1:
        # few bytes are copied faster than the kernel reads a list of them
        whole.iov_base = small
        whole.iov_len = 0
        for i in range(count):
            if pieces[i].iov_len > SMALL - whole.iov_len:
                break
            memcpy(small + whole.iov_len, pieces[i].iov_base, pieces[i].iov_len)
            whole.iov_len += pieces[i].iov_len
        else:
            pieces = &whole
            count = 1
    while True:
        if count == 1:
            sent = send(fd, pieces[0].iov_base, pieces[0].iov_len, MSG_NOSIGNAL | MSG_DONTWAIT)
        else:
            memset(&message, 0, sizeof(message))
            message.msg_iov = pieces
            message.msg_iovlen = count
            sent = sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
        if sent >= 0:
            return sent
        if errno == EAGAIN:
            return 0
        if errno != EINTR:
            return -1


cdef bint queue_flush(ChunkPool* pool, Queue* queue, int fd) noexcept nogil:
    cdef iovec pieces[MAX_PIECES]
    cdef Chunk* chunk
    cdef int count
    cdef ssize_t sent
    cdef size_t offered, part
    while queue.size:
        chunk = queue.head
        count = 0
        offered = 0
        while chunk != NULL and count < MAX_PIECES:
            pieces[count].iov_base = chunk.data + chunk.start
            pieces[count].iov_len = chunk.end - chunk.start
            offered += pieces[count].iov_len
            count += 1
            chunk = chunk.next
        sent = io_send(fd, pieces, count)
        if sent < 0:
            return False
        queue.size -= sent
        part = sent
        while part:
            chunk = queue.head
            if part < chunk.end - chunk.start:
                chunk.start += <uint32_t> part
                break
            part -= chunk.end - chunk.start
            queue.head = chunk.next
            chunk_give(pool, chunk)
        if queue.head == NULL:
            queue.tail = NULL
        if <size_t> sent < offered:
            break
    return True


cdef ssize_t io_recv(int fd, unsigned char* buffer, size_t size) noexcept nogil:
    cdef ssize_t got
    while True:
        got = recv(fd, buffer, size, MSG_DONTWAIT)
        if got >= 0:
            return got
        if errno == EAGAIN:
            return RECEIVED_NOTHING
        if errno != EINTR:
            return RECEIVED_BROKEN


cdef void io_wake_from(int fd, int size) noexcept nogil:
    setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &size, sizeof(size))
