"""Lists, events for Python, and sending: what clients and servers have in common."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from gpooler.relay cimport counters
from gpooler.relay.io cimport (
    chunk_give, io_recv, io_send, io_wake_from, iovec, queue_clear, queue_put,
)
from gpooler.relay.system cimport (
    CLOCK_MONOTONIC, EPOLLET, EPOLLIN, EPOLLOUT, EPOLLRDHUP, EPOLL_CTL_ADD, EPOLL_CTL_DEL,
    EPOLL_CTL_MOD, SHUT_WR, clock_gettime, epoll_ctl, epoll_event, pthread_mutex_lock, pthread_mutex_unlock,
    shutdown, timespec, write,
)


# -- time and lists ------------------------------------------------------------------------------------


cdef uint64_t clock_us() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t> now.tv_sec * 1000000 + <uint64_t> now.tv_nsec // 1000


cdef inline void deadline(Engine* e, uint64_t at_us) noexcept nogil:
    if at_us < e.next_deadline_us:
        e.next_deadline_us = at_us


cdef inline void list_remove(Conn* conn) noexcept nogil:
    cdef List* lst = conn.list
    if lst == NULL:
        return
    if conn.previous != NULL:
        conn.previous.following = conn.following
    else:
        lst.head = conn.following
    if conn.following != NULL:
        conn.following.previous = conn.previous
    else:
        lst.tail = conn.previous
    conn.previous = NULL
    conn.following = NULL
    conn.list = NULL
    lst.count -= 1
    if lst.gauge != NULL:
        lst.gauge[0] = lst.count


cdef inline void list_append(List* lst, Conn* conn) noexcept nogil:
    conn.previous = lst.tail
    conn.following = NULL
    if lst.tail != NULL:
        lst.tail.following = conn
    else:
        lst.head = conn
    lst.tail = conn
    conn.list = lst
    lst.count += 1
    if lst.gauge != NULL:
        lst.gauge[0] = lst.count


cdef inline void list_prepend(List* lst, Conn* conn) noexcept nogil:
    conn.previous = NULL
    conn.following = lst.head
    if lst.head != NULL:
        lst.head.previous = conn
    else:
        lst.tail = conn
    lst.head = conn
    conn.list = lst
    lst.count += 1
    if lst.gauge != NULL:
        lst.gauge[0] = lst.count


cdef inline void move(Engine* e, Conn* conn, List* lst, uint8_t state) noexcept nogil:
    """Enter a state: leave the old list, join the new one at its end."""
    list_remove(conn)
    list_append(lst, conn)
    conn.state = state
    conn.since_us = e.now_us


cdef inline void servers_active_gauge(Route* r) noexcept nogil:
    r.words[counters.ROUTE_SERVERS_ACTIVE] = r.active.count + r.resetting.count


cdef inline void oldest_wait_gauge(Route* r) noexcept nogil:
    r.words[counters.ROUTE_OLDEST_WAIT_US] = 0 if r.waiting.head == NULL else r.waiting.head.since_us


# -- events --------------------------------------------------------------------------------------------


cdef void wake_python(Engine* e) noexcept nogil:
    cdef uint64_t one = 1
    write(e.event_fd, &one, sizeof(one))


cdef void raise_event(Engine* e, Conn* conn, uint32_t bits) noexcept nogil:
    raise_bits(e, conn, bits, False)


cdef void raise_bits(Engine* e, Conn* conn, uint32_t bits, bint is_quiet) noexcept nogil:
    """Put an event on the list. A quiet one waits QUIET_US for another reason to wake the hub."""
    cdef bint wake = False
    pthread_mutex_lock(&e.lock)
    if conn.event_bits == 0:
        conn.event_next = NULL
        if e.events_tail != NULL:
            e.events_tail.event_next = conn
        else:
            e.events_head = conn
        e.events_tail = conn
    # of two that contradict each other the later one is true
    if bits & EVENT_DEMAND:
        conn.event_bits &= ~<uint32_t> EVENT_CALM
    elif bits & EVENT_CALM:
        conn.event_bits &= ~<uint32_t> EVENT_DEMAND
    conn.event_bits |= bits
    if not e.is_python_woken:
        if is_quiet:
            if e.quiet_since_us == 0:
                e.quiet_since_us = e.now_us
        else:
            e.is_python_woken = True
            wake = True
    pthread_mutex_unlock(&e.lock)
    if wake:
        wake_python(e)


cdef void end_quiet(Engine* e) noexcept nogil:
    """Quiet events have waited long enough."""
    cdef bint wake = False
    pthread_mutex_lock(&e.lock)
    if e.quiet_since_us and e.now_us - e.quiet_since_us >= QUIET_US:
        e.quiet_since_us = 0
        wake = e.events_head != NULL and not e.is_python_woken
        if wake:
            e.is_python_woken = True
    pthread_mutex_unlock(&e.lock)
    if wake:
        wake_python(e)


cdef inline void make_ready(Engine* e, Conn* conn) noexcept nogil:
    if conn.flags & IS_READY:
        return
    conn.flags |= IS_READY
    conn.ready_next = NULL
    if e.ready_tail != NULL:
        e.ready_tail.ready_next = conn
    else:
        e.ready_head = conn
    e.ready_tail = conn


# -- gathering -----------------------------------------------------------------------------------------

# PostgreSQL sends rows by 8 KiB, psql COPY lines as well: a wake-up, a read and a write for each would be
# most of what a large COPY costs. So in the middle of such a stream the kernel gathers them.


cdef void gather_begin(Engine* e, Conn* conn) noexcept nogil:
    if conn.flags & (IS_GATHERING | IS_UNIX) or e.gathering_count == MAX_GATHERING:
        return
    e.gathering[e.gathering_count] = conn
    e.gathering_count += 1
    conn.flags |= IS_GATHERING
    conn.gather_us = e.now_us + GATHER_US
    deadline(e, conn.gather_us)
    io_wake_from(conn.fd, GATHER_SIZE)


cdef void gather_end(Engine* e, Conn* conn) noexcept nogil:
    """Each byte wakes again; what has come in the meantime does so at once."""
    cdef int i
    conn.bulk = 0
    if not conn.flags & IS_GATHERING:
        return
    conn.flags &= ~<uint16_t> IS_GATHERING
    for i in range(e.gathering_count):
        if e.gathering[i] == conn:
            e.gathering_count -= 1
            e.gathering[i] = e.gathering[e.gathering_count]
            break
    if conn.fd >= 0:
        io_wake_from(conn.fd, 1)


cdef inline void gathered(Engine* e, Conn* conn, size_t got) noexcept nogil:
    """After a read was worked on: gather what comes in small pieces, if much has come or much must follow."""
    if conn.flags & IS_GATHERING:
        if got < GATHER_LEAST or (conn.bulk < GATHER_FROM and conn.rx.left < GATHER_SIZE):
            gather_end(e, conn)
        else:
            conn.gather_us = e.now_us + GATHER_US
            deadline(e, conn.gather_us)
    elif conn.rx.left and got < GATHER_SIZE // 2 and conn.fd >= 0:
        conn.bulk += <uint32_t> got
        if conn.bulk >= GATHER_FROM or conn.rx.left >= GATHER_SIZE:
            gather_begin(e, conn)


cdef void gather_timeout(Engine* e) noexcept nogil:
    """Read from those that did not wake the relay for too long."""
    cdef Conn* conn
    cdef int i
    for i in range(e.gathering_count):
        conn = e.gathering[i]
        if e.now_us >= conn.gather_us:
            conn.flags |= IS_READABLE
            make_ready(e, conn)
        else:
            deadline(e, conn.gather_us)


cdef void ready_remove(Engine* e, Conn* conn) noexcept nogil:
    cdef Conn* before = NULL
    cdef Conn* at = e.ready_head
    if not conn.flags & IS_READY:
        return
    while at != conn:
        before = at
        at = at.ready_next
    if before == NULL:
        e.ready_head = conn.ready_next
    else:
        before.ready_next = conn.ready_next
    if e.ready_tail == conn:
        e.ready_tail = before
    conn.flags &= ~<uint16_t> IS_READY


cdef inline size_t min_size(size_t a, size_t b) noexcept nogil:
    return a if a < b else b


cdef void set_note(Conn* conn, const unsigned char* data, size_t size) noexcept nogil:
    if conn.note != NULL:
        free(conn.note)
    conn.note = <unsigned char*> malloc(size)
    conn.note_size = 0
    if conn.note != NULL:
        memcpy(conn.note, data, size)
        conn.note_size = <uint32_t> size


cdef void put_text(Engine* e, Conn* conn, const unsigned char* data, size_t size) noexcept nogil:
    """A query text for the log."""
    put_record(e, conn, TEXT_QUERY, NULL, 0, data, min_size(size, TEXT_MAX))


cdef void put_record(Engine* e, Conn* conn, uint32_t kind, const unsigned char* facts, size_t facts_size,
                     const unsigned char* data, size_t size) noexcept nogil:
    """For the log: [kind u32][size u32][client index u32][generation u32][facts][text]."""
    cdef uint32_t header[4]
    cdef uint64_t at = e.texts_written
    cdef size_t i, total = sizeof(header) + facts_size + size
    if at + total - e.texts_read > TEXT_RING:
        e.process_words[counters.PROCESS_TEXT_EVENTS_LOST] += 1
        return
    header[0] = kind
    header[1] = <uint32_t> (facts_size + size)
    header[2] = conn.index
    header[3] = conn.generation
    for i in range(sizeof(header)):
        e.texts[(at + i) % TEXT_RING] = (<unsigned char*> header)[i]
    at += sizeof(header)
    for i in range(facts_size):
        e.texts[(at + i) % TEXT_RING] = facts[i]
    at += facts_size
    for i in range(size):
        e.texts[(at + i) % TEXT_RING] = data[i]
    pthread_mutex_lock(&e.lock)
    e.texts_written = at + size
    cdef bint wake = not e.is_python_woken
    e.is_python_woken = True
    pthread_mutex_unlock(&e.lock)
    if wake:
        wake_python(e)


# -- sending -------------------------------------------------------------------------------------------


cdef void arm_out(Engine* e, Conn* conn, bint is_wanted) noexcept nogil:
    """Ask for EPOLLOUT only while something is queued.

    A new registration would wake the relay at once with it, and a Unix socket at each read of its peer.
    """
    cdef epoll_event event
    if ((conn.flags & IS_OUT_ARMED) != 0) == is_wanted:
        return
    event.events = EPOLLIN | EPOLLRDHUP | EPOLLET
    if is_wanted:
        event.events |= EPOLLOUT
        conn.flags |= IS_OUT_ARMED
        if conn.kind == KIND_CLIENT and (<Client*> conn).asked != NULL:
            (<Client*> conn).asked.queued_us = e.now_us
    else:
        conn.flags &= ~<uint16_t> IS_OUT_ARMED
    event.data.ptr = conn
    epoll_ctl(e.epoll, EPOLL_CTL_MOD, conn.fd, &event)


cdef bint conn_write(Engine* e, Conn* conn, iovec* pieces, int count) noexcept nogil:
    """Send the pieces; what the socket does not take is queued. False: the peer is gone."""
    if conn.tls != NULL:
        return tls_conn_write(e, conn, pieces, count)
    return conn_put(e, conn, pieces, count)


cdef bint conn_put(Engine* e, Conn* conn, iovec* pieces, int count) noexcept nogil:
    """The same, for bytes as they go over the wire."""
    cdef ssize_t sent = 0
    cdef size_t part
    cdef int i
    if conn.out.size == 0:
        sent = io_send(conn.fd, pieces, count)
        if sent < 0:
            return False
    part = sent
    for i in range(count):
        if part >= pieces[i].iov_len:
            part -= pieces[i].iov_len
            continue
        if not queue_put(&e.pool, &conn.out, <unsigned char*> pieces[i].iov_base + part,
                         pieces[i].iov_len - part):
            return False
        part = 0
    if conn.out.size:
        arm_out(e, conn, True)
    return True


cdef bint conn_send(Engine* e, Conn* conn, const unsigned char* data, size_t size) noexcept nogil:
    cdef iovec piece
    piece.iov_base = <void*> data
    piece.iov_len = size
    return conn_write(e, conn, &piece, 1)


cdef void conn_end(Engine* e, Conn* conn) noexcept nogil:
    """Say no more: close_notify where nothing stands before it, and the end of the stream."""
    conn_bye(e, conn)
    queue_clear(&e.pool, &conn.out)
    shutdown(conn.fd, SHUT_WR)


cdef inline ssize_t conn_recv(Engine* e, Conn* conn, unsigned char* at, size_t room) noexcept nogil:
    """Read once: bytes, or a Received; IS_READABLE goes when nothing is left."""
    cdef ssize_t got
    if conn.tls != NULL:
        return tls_conn_recv(e, conn, at, room)
    got = io_recv(conn.fd, at, room)
    if got <= 0 or <size_t> got < room and not conn.flags & IS_HUNG_UP:
        conn.flags &= ~<uint16_t> IS_READABLE
    return got


cdef bint conn_add(Engine* e, Conn* conn) noexcept nogil:
    cdef epoll_event event
    event.events = EPOLLIN | EPOLLRDHUP | EPOLLET
    event.data.ptr = conn
    return epoll_ctl(e.epoll, EPOLL_CTL_ADD, conn.fd, &event) == 0


cdef bint conn_register(Engine* e, Conn* conn) noexcept nogil:
    if not conn_add(e, conn):
        return False
    conn.flags |= IS_REGISTERED
    return True


cdef void conn_unregister(Engine* e, Conn* conn) noexcept nogil:
    cdef epoll_event event
    if conn.flags & IS_REGISTERED:
        # needed for servers: the broker's duplicate would keep the registration alive
        epoll_ctl(e.epoll, EPOLL_CTL_DEL, conn.fd, &event)
        conn.flags &= ~<uint16_t> IS_REGISTERED


cdef void conn_forget(Engine* e, Conn* conn) noexcept nogil:
    """Give back what a connection holds in the relay; it is on no list after this."""
    list_remove(conn)
    ready_remove(e, conn)
    gather_end(e, conn)
    queue_clear(&e.pool, &conn.out)
    tls_forget(e, conn)
    if conn.hold != NULL:
        chunk_give(&e.pool, conn.hold)
        conn.hold = NULL
    if conn.inject != NULL:
        free(conn.inject)
        conn.inject = NULL


cdef void close_later(Engine* e, Conn* conn) noexcept nogil:
    """Raise EVENT_CLOSED or EVENT_RELEASED at the end of the round, when nothing names it any more."""
    conn.ready_next = e.closed_head
    e.closed_head = conn
