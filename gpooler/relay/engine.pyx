"""The data plane; its design is engine.pxd.

Order of the file: time and lists, events, sending, parameters, queue and attach, clients' bytes,
servers' bytes, release, ends, cancel, timers, commands, the loop, and at last the Python object.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from gpooler.relay cimport counters
from gpooler.relay.frame cimport HEADER, MAX_MESSAGE, frame_length
from gpooler.relay.io cimport (
    CHUNK,
    MAX_PIECES,
    READ_SIZE,
    chunk_give,
    chunk_take,
    io_recv,
    io_send,
    queue_clear,
    queue_flush,
    queue_put,
)
from gpooler.relay.params cimport (
    MAX_DEPLOY,
    PARAM_READ_ONLY,
    PARAM_REPORTED,
    params_deploy,
    params_empty,
    params_global_init,
    params_hold,
    params_merge,
    params_release,
    params_settle,
    params_with,
)
from gpooler.relay.scanner cimport (
    EFFECT_BEGIN,
    EFFECT_SESSION,
    scan_begin,
    scan_feed,
)
from gpooler.relay.session cimport (
    OWNER_CLIENT,
    OWNER_DEPLOY,
    OWNER_RESET,
    session_backend,
    session_free,
    session_frontend,
    session_init,
    session_is_idle,
    session_needs_sync,
    session_owner,
    session_ready,
)

from gpooler.reasons import Reason


cdef extern from "<sys/epoll.h>" nogil:
    union epoll_data:
        void* ptr
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data data
    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int operation, int fd, epoll_event* event)
    int epoll_wait(int epoll, epoll_event* events, int size, int timeout)
    enum:
        EPOLLIN
        EPOLLOUT
        EPOLLRDHUP
        EPOLLHUP
        EPOLLERR
        EPOLLET
        EPOLL_CTL_ADD
        EPOLL_CTL_DEL
        EPOLL_CTL_MOD
        EPOLL_CLOEXEC


cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int value, int flags)
    enum:
        EFD_CLOEXEC
        EFD_NONBLOCK


cdef extern from "<sys/socket.h>" nogil:
    int shutdown(int fd, int how)
    ssize_t recv(int fd, void* buffer, size_t size, int flags)
    enum:
        SHUT_WR
        SHUT_RDWR
        MSG_PEEK
        MSG_DONTWAIT


cdef extern from "<unistd.h>" nogil:
    int close(int fd)
    ssize_t write(int fd, const void* data, size_t size)
    ssize_t read(int fd, void* data, size_t size)


cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec* now)
    enum:
        CLOCK_MONOTONIC


cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    int sigfillset(sigset_t* signals)
    int pthread_sigmask(int how, const sigset_t* signals, sigset_t* old)
    enum:
        SIG_SETMASK


cdef enum:
    MAX_EVENTS = 256
    SLAB = 256                      # records allocated at once
    SWEEP_US = 1000000
    LEAVE_US = 1000000              # a client that got its last bytes has this long to close
    STUCK_US = 5000000              # PostgreSQL has this long to end a process that was told to go
    ATTACH_CHECK_US = 1000000       # a server parked longer than this is looked at before use
    QUIET_US = 2000                 # the end of a client may reach the hub this much later
    TEXT_RING = 1048576             # bytes of query texts on their way to the log
    TEXT_MAX = 8192                 # of one query text
    WORKER_SHIFT = 22               # a synthetic process id: bit 30, eight bits worker, the client's index
    WORKER_MASK = 0xff
    SYNTHETIC_PID = 1 << 30
    INDEX_MASK = (1 << 22) - 1

# Reasons as C constants; the enum in reasons.py is the source, a test compares.
cdef enum:
    REASON_NONE = 0
    REASON_CLIENT_TERMINATED = 1
    REASON_CLIENT_GONE = 2
    REASON_CLIENT_PROTOCOL = 3
    REASON_CLIENT_KILLED = 4
    REASON_CLIENT_POOL_TIMEOUT = 5
    REASON_CLIENT_CANCELLED = 9
    REASON_CLIENT_STALLED = 10
    REASON_SHUTDOWN = 11
    REASON_STATEMENT_POOL = 12
    REASON_SERVER_LOST = 20
    REASON_SERVER_CONNECT = 21
    REASON_SERVER_PROTOCOL = 22
    REASON_SERVER_LIFETIME = 23
    REASON_SERVER_IDLE = 24
    REASON_SERVER_RESET_TIMEOUT = 25
    REASON_SERVER_DIRTY_END = 26
    REASON_SERVER_DEPLOY_FAILED = 27
    REASON_SERVER_RECALLED = 28
    REASON_SERVER_RESET_FAILED = 29
    REASON_SERVER_SURPLUS = 30


# -- time and lists ------------------------------------------------------------------------------------


cdef inline uint64_t clock_us() noexcept nogil:
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
    """A query text for the log: [size u32][client index u32][generation u32][text]."""
    cdef uint32_t header[3]
    cdef uint64_t at = e.texts_written
    cdef size_t i, total
    if size > TEXT_MAX:
        size = TEXT_MAX
    total = sizeof(header) + size
    if at + total - e.texts_read > TEXT_RING:
        e.process_words[counters.PROCESS_TEXT_EVENTS_LOST] += 1
        return
    header[0] = <uint32_t> size
    header[1] = conn.index
    header[2] = conn.generation
    for i in range(sizeof(header)):
        e.texts[(at + i) % TEXT_RING] = (<unsigned char*> header)[i]
    at += sizeof(header)
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
    else:
        conn.flags &= ~<uint16_t> IS_OUT_ARMED
    event.data.ptr = conn
    epoll_ctl(e.epoll, EPOLL_CTL_MOD, conn.fd, &event)


cdef bint conn_write(Engine* e, Conn* conn, iovec* pieces, int count, size_t* accepted) noexcept nogil:
    """Send the pieces; what the socket does not take is queued. False: the peer is gone."""
    cdef ssize_t sent = 0
    cdef size_t part
    cdef int i
    accepted[0] = 0
    if conn.out.size == 0:
        sent = io_send(conn.fd, pieces, count)
        if sent < 0:
            return False
        accepted[0] = sent
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
    cdef size_t accepted
    piece.iov_base = <void*> data
    piece.iov_len = size
    return conn_write(e, conn, &piece, 1, &accepted)


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
    queue_clear(&e.pool, &conn.out)
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


# -- parameters ----------------------------------------------------------------------------------------


cdef void replace_params(Engine* e, ParamSet** place, ParamSet* new) noexcept nogil:
    """Put a held set in place of another; Python reads the place under the same lock."""
    cdef ParamSet* old
    if new == NULL:
        return
    pthread_mutex_lock(&e.lock)
    old = place[0]
    place[0] = new
    pthread_mutex_unlock(&e.lock)
    params_release(old)


cdef void note_parameter(Engine* e, Server* s, const unsigned char* body, uint32_t size) noexcept nogil:
    """ParameterStatus: name, NUL, value, NUL."""
    cdef uint32_t name_size = 0, value_size = 0
    cdef uint8_t flags = PARAM_REPORTED
    cdef const unsigned char* value
    cdef uint32_t i
    while name_size < size and body[name_size]:
        name_size += 1
    if name_size + 1 >= size:
        return
    value = body + name_size + 1
    while name_size + 1 + value_size < size and value[value_size]:
        value_size += 1
    for i in range(s.initial.count):
        if (s.initial.items[i].name_size == name_size and s.initial.items[i].flags & PARAM_READ_ONLY
                and same_bytes(s.initial.items[i].text, body, name_size)):
            flags |= PARAM_READ_ONLY
    if s.client != NULL:
        replace_params(e, &s.client.params,
                       params_with(s.client.params, body, name_size, value, value_size, flags))
    elif s.conn.state == SERVER_PARKED:
        # nobody asked for it: the server's own default changed
        replace_params(e, &s.initial, params_with(s.initial, body, name_size, value, value_size, flags))
        raise_event(e, &s.conn, EVENT_PARAMS)
    replace_params(e, &s.params, params_with(s.params, body, name_size, value, value_size, flags))


cdef bint same_bytes(const unsigned char* a, const unsigned char* b, uint32_t size) noexcept nogil:
    cdef uint32_t i
    for i in range(size):
        if a[i] != b[i]:
            return False
    return True


# -- queue and attach ----------------------------------------------------------------------------------


cdef inline bint can_read_client(Client* c) noexcept nogil:
    """Whether a client's next bytes may be taken now."""
    if c.flags & (IN_SETUP | IS_HELD | IS_TERMINATED | IS_BLOCKED):
        return False
    if c.conn.state == CLIENT_ACTIVE:
        return c.server.conn.out.size == 0
    if c.conn.state == CLIENT_IDLE:
        return c.conn.out.size == 0
    return c.conn.state == CLIENT_LEAVING


cdef inline void resume_client(Engine* e, Client* c) noexcept nogil:
    if c.conn.flags & IS_READABLE and can_read_client(c):
        make_ready(e, &c.conn)


cdef inline void resume_server(Engine* e, Server* s) noexcept nogil:
    if s.conn.flags & IS_READABLE and (s.client == NULL or s.client.conn.out.size == 0):
        make_ready(e, &s.conn)


cdef void enqueue(Engine* e, Client* c) noexcept nogil:
    """No server is at hand: wait in the queue, and ask for one if nobody asked yet."""
    cdef Route* r = c.conn.route
    if c.wait_us:
        # its server died before it did anything: it keeps its place and its deadline
        list_remove(&c.conn)
        list_prepend(&r.waiting, &c.conn)
        c.conn.state = CLIENT_WAITING
        c.conn.since_us = c.wait_us
    else:
        move(e, &c.conn, &r.waiting, CLIENT_WAITING)
        c.wait_us = e.now_us
    oldest_wait_gauge(r)
    r.last_wait_us = e.now_us
    if r.pool_timeout_us:
        deadline(e, c.conn.since_us + r.pool_timeout_us)
    if not r.has_demand:
        r.has_demand = 1
        raise_event(e, &r.conn, EVENT_DEMAND)


cdef void leave_queue(Engine* e, Client* c) noexcept nogil:
    cdef Route* r = c.conn.route
    r.words[counters.ROUTE_WAIT_US] += e.now_us - c.conn.since_us
    move(e, &c.conn, &r.idle, CLIENT_IDLE)
    oldest_wait_gauge(r)


cdef bint is_alive(Server* s) noexcept nogil:
    """Whether a parked server may be handed out: nothing arrived that was not looked at."""
    cdef unsigned char byte
    return recv(s.conn.fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 and errno == EAGAIN


cdef void look_at_parked(Engine* e, Server* s) noexcept nogil:
    """Something arrived at a parked server: a notice is absorbed, anything else ends it."""
    server_read(e, s, e.parked_buffer + CHUNK, CHUNK)


cdef Server* take_parked(Engine* e, Client* c) noexcept nogil:
    """A parked server, the client's last one if it can be had, else the one parked last."""
    cdef Route* r = c.conn.route
    cdef Server* s = c.last_server
    while r.parked.head != NULL:
        if (s == NULL or s.conn.generation != c.last_generation or s.conn.state != SERVER_PARKED
                or s.conn.route != r):
            s = <Server*> r.parked.head
        if s.conn.rx.left or s.conn.hold != NULL:
            server_close(e, s, REASON_SERVER_PROTOCOL)  # stopped inside a message
            s = NULL
            continue
        if (s.conn.flags & (IS_READABLE | IS_HUNG_UP)
                or (r.attach_check and e.now_us - s.conn.since_us > ATTACH_CHECK_US and not is_alive(s))):
            look_at_parked(e, s)
            if s.conn.state != SERVER_PARKED or s.conn.flags & IS_READABLE:
                if s.conn.state == SERVER_PARKED:
                    server_close(e, s, REASON_SERVER_LOST)
                s = NULL
                continue
        return s
    return NULL


cdef void attach(Engine* e, Client* c, Server* s) noexcept nogil:
    """Bind a server to a client. What must be deployed first is left in e.deploy."""
    cdef Route* r = c.conn.route
    cdef ParamSet* wants
    cdef int size
    if c.conn.state == CLIENT_WAITING:
        leave_queue(e, c)
    move(e, &c.conn, &r.active_clients, CLIENT_ACTIVE)
    move(e, &s.conn, &r.active, SERVER_ACTIVE)
    servers_active_gauge(r)
    r.words[counters.ROUTE_ASSIGNMENTS] += 1
    c.server = s
    s.client = c
    s.uses += 1
    s.begin_us = e.now_us
    s.query_us = e.now_us
    s.flags &= ~<uint32_t> (HAS_ROLLED_BACK | HAS_DISCARDED | SYNC_SENT | CANCEL_ASKED | DEPLOY_FAILED)
    c.flags &= ~<uint16_t> HAS_SPOKEN
    e.deploy_size = 0
    if c.flags & IN_SETUP:
        wants = params_merge(s.initial, c.params)
        if wants != NULL:
            replace_params(e, &c.params, wants)
    if c.params != s.params:
        size = params_deploy(s.params, c.params, e.deploy + HEADER, MAX_DEPLOY - HEADER)
        if size < 0:
            s.flags |= CLOSE_AT_END
            size = 0
        if size:
            e.deploy[0] = c'Q'
            put_u32(e.deploy + 1, <uint32_t> size + 4)
            e.deploy_size = <uint32_t> size + HEADER
            e.deploy_waits = has_unreported(s.params) or has_unreported(c.params)
            session_frontend(&s.session, c'Q', OWNER_DEPLOY)
            r.words[counters.ROUTE_DEPLOYS] += 1


cdef bint has_unreported(ParamSet* s) noexcept nogil:
    """Whether a set has parameters that PostgreSQL does not report: role, search_path, timeouts …"""
    cdef uint32_t i
    for i in range(s.count):
        if not s.items[i].flags & PARAM_REPORTED:
            return True
    return False


cdef inline void put_u32(unsigned char* at, uint32_t value) noexcept nogil:
    at[0] = <unsigned char> (value >> 24)
    at[1] = <unsigned char> (value >> 16)
    at[2] = <unsigned char> (value >> 8)
    at[3] = <unsigned char> value


cdef void serve(Engine* e, Client* c, Server* s) noexcept nogil:
    """Give a free server to a client that waited, and work on what the client had sent.

    Afterwards the server is the client's, or lost, or free again (state PARKED).
    """
    attach(e, c, s)
    if c.flags & IN_SETUP:
        if e.deploy_size:
            if not conn_send(e, &s.conn, e.deploy, e.deploy_size):
                server_lost(e, s)
            e.deploy_size = 0
        else:
            setup_done(e, c)
        return
    client_work(e, c)
    if c.server == s and session_is_idle(&s.session):
        unbind(e, s)                    # its request was refused after all


cdef void unbind(Engine* e, Server* s) noexcept nogil:
    """Part client and server between transactions; the server is free, not yet parked in order."""
    cdef Client* c = s.client
    cdef Route* r = s.conn.route
    c.server = NULL
    c.last_server = s
    c.last_generation = s.conn.generation
    c.wait_us = 0
    s.client = NULL
    move(e, &c.conn, &r.idle, CLIENT_IDLE)
    move(e, &s.conn, &r.parked, SERVER_PARKED)


cdef void setup_begin(Engine* e, Client* c) noexcept nogil:
    cdef Server* s = NULL
    if c.conn.route.waiting.head == NULL:
        s = take_parked(e, c)
    if s == NULL:
        enqueue(e, c)
        return
    serve(e, c, s)
    if s.conn.state == SERVER_PARKED:
        settle(e, s)


cdef void setup_done(Engine* e, Client* c) noexcept nogil:
    """The client's parameters are those of its server: Python can tell it that it is logged in."""
    cdef Server* s = c.server
    c.flags = (c.flags & ~<uint16_t> IN_SETUP) | IS_HELD
    if c.conn.route.mode != MODE_SESSION:
        unbind(e, s)
    raise_event(e, &c.conn, EVENT_READY)


# -- what clients send ---------------------------------------------------------------------------------


cdef bint hold(Engine* e, Conn* conn, const unsigned char* data, size_t size) noexcept nogil:
    """Keep bytes that cannot be used yet. Never more than a chunk: reads are sized for it."""
    if size == 0:
        return True
    if conn.hold == NULL:
        conn.hold = chunk_take(&e.pool)
        if conn.hold == NULL:
            return False
    if size > CHUNK:
        return False
    memcpy(conn.hold.data, data, size)
    conn.hold.start = 0
    conn.hold.end = <uint32_t> size
    return True


cdef void client_readable(Engine* e, Client* c) noexcept nogil:
    """Read once and work on it."""
    cdef unsigned char* at = e.buffer + CHUNK
    cdef size_t held = 0, room = CHUNK
    cdef ssize_t got
    if not can_read_client(c):
        return
    # What cannot be sent on must fit a chunk, with what is held already.
    if c.conn.hold != NULL:
        held = c.conn.hold.end - c.conn.hold.start
    if c.server != NULL and c.conn.route.mode != MODE_STATEMENT:
        room = READ_SIZE
    else:
        room = CHUNK - held
    got = io_recv(c.conn.fd, at, room)
    if got == -1:
        c.conn.flags &= ~<uint16_t> IS_READABLE
        return
    if got <= 0:
        c.conn.flags &= ~<uint16_t> IS_READABLE
        client_eof(e, c, got == -2)
        return
    if c.conn.state == CLIENT_LEAVING:
        make_ready(e, &c.conn)          # discarded; read on to its end
        return
    c.request_us = e.now_us
    if <size_t> got < room and not c.conn.flags & IS_HUNG_UP:
        c.conn.flags &= ~<uint16_t> IS_READABLE
    if held:
        memcpy(at - held, c.conn.hold.data + c.conn.hold.start, held)
        at -= held
        chunk_give(&e.pool, c.conn.hold)
        c.conn.hold = NULL
    client_feed(e, c, at, held + got)
    after_feed(e, c)


cdef void client_work(Engine* e, Client* c) noexcept nogil:
    """Work on bytes that were held back; they are copied in front of the read buffer."""
    cdef unsigned char* at
    cdef size_t held
    if c.conn.hold == NULL:
        resume_client(e, c)
        return
    held = c.conn.hold.end - c.conn.hold.start
    at = e.buffer + CHUNK - held
    memcpy(at, c.conn.hold.data + c.conn.hold.start, held)
    chunk_give(&e.pool, c.conn.hold)
    c.conn.hold = NULL
    client_feed(e, c, at, held)
    after_feed(e, c)


cdef inline void after_feed(Engine* e, Client* c) noexcept nogil:
    """The last bytes of late COPY data may come after the answers: nothing else would detach the server."""
    if c.server != NULL and session_is_idle(&c.server.session):
        maybe_detach(e, c.server)
    resume_client(e, c)


cdef inline bint is_request(uint8_t kind) noexcept nogil:
    return (kind == c'Q' or kind == c'P' or kind == c'B' or kind == c'D' or kind == c'E' or kind == c'C'
            or kind == c'F')


cdef inline bint is_known(uint8_t kind) noexcept nogil:
    return (is_request(kind) or kind == c'S' or kind == c'H' or kind == c'X' or kind == c'd' or kind == c'c'
            or kind == c'f')


cdef void refuse_request(Engine* e, Client* c, uint8_t reason) noexcept nogil:
    """Python sends an error; then the request is skipped: a Query, or everything up to a Sync."""
    c.refusal = reason
    c.flags |= IS_HELD | TEXT_THEN_SKIP
    c.conn.reason = reason
    raise_event(e, &c.conn, EVENT_TEXT_WANTED)


cdef bint say_ready(Engine* e, Client* c) noexcept nogil:
    cdef const char* ready = b"Z\x00\x00\x00\x05I"
    return conn_send(e, &c.conn, <const unsigned char*> ready, 6)


cdef void client_feed(Engine* e, Client* c, unsigned char* data, size_t size) noexcept nogil:
    """Work on bytes from a client. They start where its frame stands; what cannot go now is held."""
    cdef unsigned char* p = data
    cdef unsigned char* end = data + size
    cdef unsigned char* run = data      # start of what goes to the server
    cdef unsigned char* fresh = NULL    # where the bytes for a server attached in this call begin
    cdef size_t take, need
    cdef uint32_t length
    cdef uint8_t kind
    cdef Server* s = c.server
    cdef Route* r = c.conn.route
    cdef bint ended = False
    if s == NULL or c.flags & HAS_SPOKEN:
        e.deploy_size = 0               # of another client
    if s != NULL and r.mode != MODE_SESSION and not c.flags & HAS_SPOKEN:
        fresh = data                    # attached for just these bytes
        if e.deploy_size and e.deploy_waits:
            deploy_first(e, c, s, data, end)
            return
    while p < end:
        if c.conn.rx.left:
            take = end - p
            if take > c.conn.rx.left:
                take = c.conn.rx.left
            if c.flags & IS_SCANNING:
                scan_feed(&c.scan, p, take)
                pin(e, c)
            p += take
            c.conn.rx.left -= <uint32_t> take
            if c.flags & IS_DROPPING:
                run = p
            if c.conn.rx.left == 0:
                c.flags &= ~<uint16_t> (IS_SCANNING | IS_DROPPING)
            continue
        if end - p < HEADER:
            break
        kind = p[0]
        length = frame_length(p)
        if kind == c'd' and s != NULL and length >= 4 and <size_t> (end - p) > length \
                and not c.flags & IS_SKIPPING:
            p += length + 1             # COPY data keeps account of nothing
            continue
        if length < 4 or length > MAX_MESSAGE or not is_known(kind):
            # what stood before it is on the server's account: it goes out
            if s == NULL or send_run(e, c, s, run, p, end, NULL):
                break_protocol(e, c)
            return
        if c.flags & IS_SKIPPING and kind != c'X':
            if kind == c'S' or (kind == c'Q' or kind == c'F') and not c.flags & SKIPS_TO_SYNC:
                c.flags &= ~<uint16_t> (IS_SKIPPING | SKIPS_TO_SYNC)
                say_ready(e, c)
            elif is_request(kind):
                c.flags |= SKIPS_TO_SYNC    # of an extended group: nothing but a Sync ends it
            p += HEADER
            run = p
            c.conn.rx.kind = kind
            c.conn.rx.left = length - 4
            if c.conn.rx.left:
                c.flags |= IS_DROPPING
            continue
        if kind == c'X':
            ended = True
            break
        if s == NULL:
            if not is_request(kind):
                # A lone Sync is answered here; Flush and late COPY messages mean nothing without a server.
                if kind == c'S' and not say_ready(e, c):
                    client_leave(e, c, REASON_CLIENT_GONE)
                    return
                p += HEADER
                run = p
                c.conn.rx.left = length - 4
                c.conn.rx.kind = kind
                if c.conn.rx.left:
                    c.flags |= IS_DROPPING
                continue
        if r.mode == MODE_STATEMENT and (kind == c'Q' or kind == c'P'):
            # Looked at before a byte goes out: the whole message, up to a chunk.
            need = length + 1
            if need > CHUNK - 64:
                need = CHUNK - 64
            if <size_t> (end - p) < need:
                break
            scan_begin(&c.scan, kind == c'P', c.params.is_conforming, c.params.is_multibyte)
            scan_feed(&c.scan, p + HEADER, need - HEADER)
            if c.scan.effects & EFFECT_BEGIN:
                if s != NULL:
                    if not send_run(e, c, s, run, p, end, fresh):
                        return
                    if not session_is_idle(&s.session):
                        # earlier requests of the pipeline are answered first
                        if session_needs_sync(&s.session):
                            client_unbind(e, c)
                            want_text(e, c, REASON_STATEMENT_POOL)
                            return
                        c.flags |= IS_BLOCKED
                        hold(e, &c.conn, p, end - p)
                        return
                hold(e, &c.conn, p, end - p)
                refuse_request(e, c, REASON_STATEMENT_POOL)
                return
        if s == NULL:
            if r.waiting.head == NULL:
                s = take_parked(e, c)
            if s == NULL:
                if not hold(e, &c.conn, p, end - p):
                    client_leave(e, c, REASON_CLIENT_GONE)
                    return
                enqueue(e, c)
                return
            attach(e, c, s)
            run = p
            fresh = p
            if e.deploy_size and e.deploy_waits:
                deploy_first(e, c, s, p, end)
                return
        if s.session.length == 0:
            s.query_us = e.now_us
        session_frontend(&s.session, kind, OWNER_CLIENT)
        if kind == c'Q' or kind == c'E' or kind == c'F':
            r.words[counters.ROUTE_QUERIES] += 1
        c.conn.rx.kind = kind
        c.conn.rx.left = length - 4
        if kind == c'Q' or kind == c'P':
            scan_begin(&c.scan, kind == c'P', c.params.is_conforming, c.params.is_multibyte)
            c.flags |= IS_SCANNING
            if r.log_query:
                take = end - p - HEADER
                if take > c.conn.rx.left:
                    take = c.conn.rx.left
                put_text(e, &c.conn, p + HEADER, take)
        p += HEADER
    if s != NULL:
        if not send_run(e, c, s, run, p, end, fresh):
            return
    if ended:
        client_terminate(e, c)
        return
    if p < end and not hold(e, &c.conn, p, end - p):
        client_leave(e, c, REASON_CLIENT_GONE)


cdef void deploy_first(Engine* e, Client* c, Server* s, unsigned char* p, unsigned char* end) noexcept nogil:
    """Parameters that might be refused: the request is held until PostgreSQL has taken them."""
    c.flags |= AWAITS_DEPLOY | IS_BLOCKED
    hold(e, &c.conn, p, end - p)
    send_run(e, c, s, p, p, p, NULL)


cdef bint send_run(Engine* e, Client* c, Server* s, unsigned char* run, unsigned char* p,
                   unsigned char* end, unsigned char* fresh) noexcept nogil:
    """Send what was gathered to the server. False: the client has this server no longer.

    `fresh` is where the bytes for a server attached in this very call begin: if that server turns out
    to be dead before it took a byte, the client gets another one and never knows.
    """
    cdef iovec pieces[2]
    cdef int count = 0
    cdef size_t accepted
    if e.deploy_size:
        pieces[0].iov_base = e.deploy
        pieces[0].iov_len = e.deploy_size
        count = 1
    if p > run:
        pieces[count].iov_base = run
        pieces[count].iov_len = p - run
        count += 1
        c.conn.route.words[counters.ROUTE_BYTES_IN] += p - run
    e.deploy_size = 0
    if count == 0:
        return True
    c.flags |= HAS_SPOKEN
    if conn_write(e, &s.conn, pieces, count, &accepted):
        return True
    if fresh == NULL:
        # read first what PostgreSQL may have said at the end
        s.conn.flags |= IS_READABLE | IS_HUNG_UP
        make_ready(e, &s.conn)
        return False
    s.client = NULL
    c.server = NULL
    move(e, &c.conn, &c.conn.route.idle, CLIENT_IDLE)
    c.conn.rx.left = 0
    c.flags &= ~<uint16_t> (IS_SCANNING | IS_DROPPING)
    hold(e, &c.conn, fresh, end - fresh)
    server_lost(e, s)
    client_work(e, c)
    return False


cdef void pin(Engine* e, Client* c) noexcept nogil:
    """Session state that cannot move yet keeps the server with its client."""
    cdef Server* s = c.server
    cdef uint16_t effects = c.scan.effects & EFFECT_SESSION
    if s == NULL or not effects & ~s.pins:
        return
    if not s.pins and c.conn.route.mode != MODE_SESSION:
        c.conn.route.words[counters.ROUTE_PINS] += 1
    s.pins |= effects
    s.flags |= IS_DIRTY
    if c.conn.route.mode != MODE_SESSION:
        raise_event(e, &s.conn, EVENT_PINNED)


cdef void break_protocol(Engine* e, Client* c) noexcept nogil:
    """A message that is none: the client gets 08P01 and is closed; its server is brought back."""
    client_unbind(e, c)
    c.flags &= ~<uint16_t> (IS_SCANNING | IS_DROPPING)
    want_text(e, c, REASON_CLIENT_PROTOCOL)


cdef void want_text(Engine* e, Client* c, uint8_t reason) noexcept nogil:
    """The client's last message comes from Python; until then it is not read."""
    c.flags |= IS_HELD
    c.conn.reason = reason
    if c.conn.hold != NULL:
        chunk_give(&e.pool, c.conn.hold)
        c.conn.hold = NULL
    move(e, &c.conn, &c.conn.route.leaving, CLIENT_LEAVING)
    raise_event(e, &c.conn, EVENT_TEXT_WANTED)


cdef void client_terminate(Engine* e, Client* c) noexcept nogil:
    """Terminate: what was asked before it is still done, its answers are still sent."""
    cdef Server* s = c.server
    if s != NULL and not session_is_idle(&s.session) and c.conn.rx.left == 0:
        c.flags |= IS_TERMINATED
        if not is_endless(s):
            return
    client_finish(e, c, REASON_CLIENT_TERMINATED)


cdef bint is_endless(Server* s) noexcept nogil:
    """Whether the server waits for something that a client which says no more will never send."""
    return s.session.is_copy_in or s.session.is_uncertain or session_needs_sync(&s.session)


cdef void client_finish(Engine* e, Client* c, uint8_t reason) noexcept nogil:
    """Close a client when the bytes queued for it are out."""
    if c.conn.out.size == 0:
        client_leave(e, c, reason)
        return
    client_unbind(e, c)
    c.flags |= CLOSE_WHEN_SENT | IS_HALF_CLOSED
    c.flags &= ~<uint16_t> (IS_HELD | IS_BLOCKED)
    c.conn.reason = reason
    move(e, &c.conn, &c.conn.route.leaving, CLIENT_LEAVING)
    deadline(e, e.now_us + c.conn.route.login_timeout_us)


cdef void client_eof(Engine* e, Client* c, bint is_broken) noexcept nogil:
    """The client's sending half is closed (or the connection broke)."""
    cdef Server* s = c.server
    if c.conn.state == CLIENT_LEAVING and c.flags & CLOSE_WHEN_SENT and c.conn.out.size and not is_broken:
        c.flags |= IS_HALF_CLOSED       # it may still read what is queued for it
        return
    if c.conn.state == CLIENT_LEAVING and not is_broken and c.conn.out.size:
        c.flags |= IS_HALF_CLOSED       # it may still read what is queued
        return
    if is_broken or c.conn.state == CLIENT_LEAVING:
        client_leave(e, c, c.conn.reason if c.conn.state == CLIENT_LEAVING else REASON_CLIENT_GONE)
        return
    if c.conn.rx.left or c.conn.hold != NULL and c.conn.state != CLIENT_WAITING:
        client_leave(e, c, REASON_CLIENT_GONE)
        return
    if s != NULL and not session_is_idle(&s.session) and is_endless(s):
        client_leave(e, c, REASON_CLIENT_GONE)      # what it began can have no end
        return
    if c.conn.state == CLIENT_IDLE or s == NULL and c.conn.state != CLIENT_WAITING:
        client_leave(e, c, REASON_CLIENT_GONE if c.flags & (IN_SETUP | IS_HELD)
                     else REASON_CLIENT_TERMINATED)
        return
    if s != NULL and session_is_idle(&s.session):
        client_finish(e, c, REASON_CLIENT_TERMINATED if s.session.status == c'I' else REASON_CLIENT_GONE)
        return
    c.flags |= IS_HALF_CLOSED
    probe(e, c)


cdef void probe(Engine* e, Client* c) noexcept nogil:
    """Gone, or only done with sending? A message that changes nothing makes a dead peer answer."""
    cdef unsigned char message[512]
    cdef uint32_t size, i
    cdef Server* s = c.server
    if c.conn.out.size or c.flags & IN_SETUP:
        return
    if s != NULL and (s.conn.rx.left or s.conn.hold != NULL):
        return
    for i in range(c.params.count):
        size = c.params.items[i].name_size + c.params.items[i].value_size + 2
        if c.params.items[i].flags & PARAM_REPORTED and size + HEADER <= sizeof(message):
            message[0] = c'S'
            put_u32(message + 1, size + 4)
            memcpy(message + HEADER, c.params.items[i].text, size)
            if not conn_send(e, &c.conn, message, size + HEADER):
                client_leave(e, c, REASON_CLIENT_GONE)
            return


# -- what servers send ---------------------------------------------------------------------------------


cdef void server_readable(Engine* e, Server* s) noexcept nogil:
    if s.client != NULL and s.client.conn.out.size:
        return                          # its client reads slowly
    server_read(e, s, e.buffer + CHUNK, READ_SIZE)


cdef void server_read(Engine* e, Server* s, unsigned char* at, size_t room) noexcept nogil:
    """Read once and work on it; the buffer has a chunk of headroom in front."""
    cdef size_t held
    cdef ssize_t got = io_recv(s.conn.fd, at, room)
    if got == -1:
        s.conn.flags &= ~<uint16_t> IS_READABLE
        return
    if got <= 0:
        s.conn.flags &= ~<uint16_t> IS_READABLE
        server_lost(e, s)
        return
    if <size_t> got < room and not s.conn.flags & IS_HUNG_UP:
        s.conn.flags &= ~<uint16_t> IS_READABLE
    if s.conn.state != SERVER_CLOSING:
        held = 0
        if s.conn.hold != NULL:
            held = s.conn.hold.end - s.conn.hold.start
            memcpy(at - held, s.conn.hold.data + s.conn.hold.start, held)
            at -= held
            chunk_give(&e.pool, s.conn.hold)
            s.conn.hold = NULL
        server_feed(e, s, at, held + got)
    if s.conn.flags & IS_READABLE and s.conn.state < SERVER_RELEASED:
        resume_server(e, s)


cdef inline void count_out(Route* r, iovec* pieces, int count) noexcept nogil:
    cdef int i
    for i in range(count):
        r.words[counters.ROUTE_BYTES_OUT] += pieces[i].iov_len


cdef bint to_client(Engine* e, Client* c, iovec* pieces, int* count, unsigned char* run,
                    unsigned char* p) noexcept nogil:
    """Add a run to the pieces; send them when there are many."""
    cdef size_t accepted
    if p > run:
        pieces[count[0]].iov_base = run
        pieces[count[0]].iov_len = p - run
        count[0] += 1
    if count[0] == MAX_PIECES:
        count_out(c.conn.route, pieces, MAX_PIECES)
        count[0] = 0
        return conn_write(e, &c.conn, pieces, MAX_PIECES, &accepted)
    return True


cdef void server_feed(Engine* e, Server* s, unsigned char* data, size_t size) noexcept nogil:
    """Work on bytes from a server: pass on what is the client's, keep what is ours."""
    cdef iovec pieces[MAX_PIECES]
    cdef int count = 0
    cdef unsigned char* p = data
    cdef unsigned char* end = data + size
    cdef unsigned char* run = data
    cdef Client* c = s.client
    cdef Route* r = s.conn.route
    cdef size_t take, accepted
    cdef uint32_t length, whole
    cdef uint8_t kind, owner
    cdef int answered
    cdef bint is_ours, in_place, bad = False, settled = False, is_gone = False, is_streaming = False
    while p < end:
        if s.conn.rx.left:
            take = end - p
            if take > s.conn.rx.left:
                take = s.conn.rx.left
            p += take
            s.conn.rx.left -= <uint32_t> take
            if s.flags & IS_SWALLOWING:
                run = p
            continue
        if end - p < HEADER:
            break
        kind = p[0]
        length = frame_length(p)
        if is_streaming and (kind == c'D' or kind == c'd') and length >= 4 and length <= MAX_MESSAGE:
            # Rows of the client's own request: nothing to keep account of, only to pass on.
            s.conn.rx.kind = kind
            if <size_t> (end - p) > length:
                p += length + 1
            else:
                s.conn.rx.left = length - 4
                p += HEADER
            continue
        whole = length + 1
        owner = session_owner(&s.session)
        if length < 4 or length > MAX_MESSAGE:
            bad = True
            break
        if whole <= CHUNK - 64 and (kind == c'Z' or kind == c'S' or (kind == c'E' and owner != OWNER_CLIENT)):
            if <size_t> (end - p) < whole:
                break
        elif kind == c'S':
            s.flags |= CLOSE_AT_END     # a value too long to follow
        elif kind == c'Z':
            bad = True
            break
        in_place = session_backend(&s.session, kind)
        if not in_place:
            if kind == c'E' and c != NULL:
                s.flags |= FATAL_SEEN | CLOSE_AT_END
            else:
                bad = True
                break
        is_ours = c == NULL or owner != OWNER_CLIENT or (s.flags & DEPLOY_FAILED) != 0
        if is_ours and c != NULL and not is_gone:
            is_gone = not to_client(e, c, pieces, &count, run, p)
        if kind == c'S':
            if whole <= CHUNK - 64:
                note_parameter(e, s, p + HEADER, length - 4)
        elif kind == c'E':
            if owner == OWNER_DEPLOY:
                s.flags |= DEPLOY_FAILED
                if c != NULL:
                    set_note(&c.conn, p, min_size(whole, end - p))
            elif owner == OWNER_RESET and s.flags & (HAS_ROLLED_BACK | HAS_DISCARDED):
                s.flags |= RESET_FAILED
        elif kind == c'Z':
            if length != 5:
                bad = True
                break
            answered = session_ready(&s.session, p[HEADER])
            if answered < 0:
                bad = True
                break
            settled = True
            if answered == OWNER_CLIENT:
                r.words[counters.ROUTE_QUERY_US] += e.now_us - s.query_us
                s.query_us = e.now_us
                if p[HEADER] == c'I':
                    r.words[counters.ROUTE_TRANSACTIONS] += 1
                    r.words[counters.ROUTE_TRANSACTION_US] += e.now_us - s.begin_us
                    s.begin_us = e.now_us
                elif r.mode == MODE_STATEMENT:
                    s.flags |= CLOSE_AT_END
            elif answered == OWNER_DEPLOY:
                if c != NULL and not s.flags & DEPLOY_FAILED:
                    share_params(e, s, c)
            else:
                reset_answered(e, s)
        s.conn.rx.kind = kind
        s.conn.rx.left = length - 4
        p += HEADER
        if is_ours:
            s.flags |= IS_SWALLOWING
            run = p
        else:
            s.flags &= ~<uint32_t> IS_SWALLOWING
        # A row keeps account of nothing as long as the request it answers is the client's.
        is_streaming = (not is_ours and (kind == c'D' or kind == c'd' or kind == c'T' or kind == c'H'
                                         or kind == c'2'))
    if c != NULL and not is_gone:
        if p > run:
            pieces[count].iov_base = run
            pieces[count].iov_len = p - run
            count += 1
        if count:
            count_out(r, pieces, count)
            is_gone = not conn_write(e, &c.conn, pieces, count, &accepted)
    if bad or not hold(e, &s.conn, p, end - p):
        server_broken(e, s)
        return
    if is_gone:
        client_leave(e, c, REASON_CLIENT_GONE)
        return
    if c == NULL:
        if s.conn.state == SERVER_RESETTING and s.conn.rx.left == 0 and s.conn.hold == NULL:
            settle(e, s)
        return
    if c.conn.inject != NULL:
        inject_now(e, c)
        if s.client != c:
            return
    if not settled:
        # an asynchronous message may have stood in the way
        maybe_detach(e, s)
    elif s.flags & DEPLOY_FAILED:
        deploy_failed(e, s)
    elif c.flags & AWAITS_DEPLOY:
        c.flags &= ~<uint16_t> (AWAITS_DEPLOY | IS_BLOCKED)
        client_work(e, c)
    elif c.flags & IN_SETUP:
        setup_done(e, c)
        if s.conn.state == SERVER_PARKED:
            settle(e, s)
    else:
        maybe_detach(e, s)


cdef void share_params(Engine* e, Server* s, Client* c) noexcept nogil:
    """Our parameters were accepted: client and server now have the same set."""
    cdef ParamSet* same = params_settle(s.params, c.params)
    if same != NULL:
        replace_params(e, &s.params, params_hold(same))
        replace_params(e, &c.params, same)


cdef void deploy_failed(Engine* e, Server* s) noexcept nogil:
    """PostgreSQL refused the client's parameters (its ErrorResponse is the client's note)."""
    cdef Client* c = s.client
    s.client = NULL
    c.server = NULL
    want_text(e, c, REASON_SERVER_DEPLOY_FAILED)
    if c.flags & IN_SETUP:
        # The statements of one query are undone together: the server is as it was.
        enter_reset(e, s)
        s.flags &= ~<uint32_t> DEPLOY_FAILED
        settle(e, s)
    else:
        # The client's request ran behind the failed one: nobody may see its effects as right.
        server_close(e, s, REASON_SERVER_DEPLOY_FAILED)


cdef void maybe_detach(Engine* e, Server* s) noexcept nogil:
    """The answers to a request are complete: can the server go to another client?"""
    cdef Client* c = s.client
    cdef Route* r = s.conn.route
    if not session_is_idle(&s.session) or s.conn.rx.left or c.flags & IN_SETUP or s.flags & DEPLOY_FAILED:
        return
    if c.flags & IS_TERMINATED:
        client_finish(e, c, REASON_CLIENT_TERMINATED)
        return
    if r.mode == MODE_STATEMENT and s.session.status != c'I':
        s.client = NULL
        c.server = NULL
        want_text(e, c, REASON_STATEMENT_POOL)
        server_close(e, s, REASON_SERVER_DIRTY_END)
        return
    if c.flags & IS_HALF_CLOSED and c.conn.hold == NULL:
        client_finish(e, c, REASON_CLIENT_TERMINATED)
        return
    if s.flags & FATAL_SEEN:
        return
    if r.mode == MODE_SESSION:
        return
    if (s.session.status != c'I' or s.pins or s.cancelling or s.session.is_uncertain
            or c.conn.rx.left or s.conn.hold != NULL or s.conn.out.size):
        if c.flags & IS_BLOCKED and (s.pins or s.session.is_uncertain) and not s.cancelling:
            c.flags &= ~<uint16_t> IS_BLOCKED
            client_work(e, c)
        return
    detach(e, s)


cdef void detach(Engine* e, Server* s) noexcept nogil:
    """Between transactions: client and server part, and the server goes where it is needed."""
    cdef Client* c = s.client
    if s.conn.route.discard == DISCARD_ALWAYS:
        s.flags |= IS_DIRTY
    unbind(e, s)
    settle(e, s)
    if c.flags & IS_BLOCKED and c.conn.state == CLIENT_IDLE:
        c.flags &= ~<uint16_t> IS_BLOCKED
        client_work(e, c)
    else:
        resume_client(e, c)


# -- release -------------------------------------------------------------------------------------------


cdef void own_query(Engine* e, Server* s, const char* text, uint32_t size) noexcept nogil:
    """A simple query of ours, `size` bytes with its NUL; the answer is swallowed."""
    cdef unsigned char message[64]
    message[0] = c'Q'
    put_u32(message + 1, size + 4)
    memcpy(message + HEADER, text, size)
    session_frontend(&s.session, c'Q', OWNER_RESET)
    if not conn_send(e, &s.conn, message, size + HEADER):
        server_lost(e, s)


cdef void enter_reset(Engine* e, Server* s) noexcept nogil:
    cdef Route* r = s.conn.route
    if s.conn.state != SERVER_RESETTING:
        move(e, &s.conn, &r.resetting, SERVER_RESETTING)
        s.deadline_us = e.now_us + r.reset_timeout_us
        deadline(e, s.deadline_us)
        servers_active_gauge(r)


cdef void settle(Engine* e, Server* s) noexcept nogil:
    """A server without a client: one ladder decides what becomes of it."""
    cdef Route* r = s.conn.route
    cdef const char* sync = b"S\x00\x00\x00\x04"
    # It cannot be trusted any more.
    if s.flags & (CLOSE_AT_END | RESET_FAILED) or s.session.is_uncertain or s.conn.rx.left or s.conn.hold != NULL:
        server_close(e, s, REASON_SERVER_RESET_FAILED if s.flags & RESET_FAILED else REASON_SERVER_DIRTY_END)
        return
    # Answers are outstanding.
    if not session_is_idle(&s.session):
        enter_reset(e, s)
        if session_needs_sync(&s.session) and not s.flags & SYNC_SENT:
            s.flags |= SYNC_SENT
            session_frontend(&s.session, c'S', OWNER_RESET)
            if not conn_send(e, &s.conn, <const unsigned char*> sync, HEADER):
                server_lost(e, s)
        return
    # A cancel request is under way and might hit the next client.
    if s.cancelling:
        enter_reset(e, s)
        return
    # In a transaction.
    if s.session.status != c'I':
        if s.flags & HAS_ROLLED_BACK or not r.can_rollback:
            server_close(e, s, REASON_SERVER_RESET_FAILED)
            return
        enter_reset(e, s)
        s.flags |= HAS_ROLLED_BACK
        own_query(e, s, b"ROLLBACK", 9)
        return
    # Dirty.
    if s.flags & IS_DIRTY and r.discard != DISCARD_NEVER:
        if s.flags & HAS_DISCARDED:
            server_close(e, s, REASON_SERVER_RESET_FAILED)
            return
        enter_reset(e, s)
        s.flags |= HAS_DISCARDED
        r.words[counters.ROUTE_RESETS] += 1
        own_query(e, s, b"DISCARD ALL", 12)
        return
    s.pins = 0
    s.flags &= ~<uint32_t> IS_DIRTY
    # PostgreSQL is closing it.
    if s.conn.flags & IS_HUNG_UP:
        server_close(e, s, REASON_SERVER_LOST)
        return
    # Its time is over.
    if s.expires_us and e.now_us >= s.expires_us:
        server_close(e, s, REASON_SERVER_LIFETIME)
        return
    # The broker wants it back: before our own queue.
    if r.evict_due:
        r.evict_due -= 1
        server_close(e, s, REASON_SERVER_RECALLED)
        return
    if r.recall_due:
        r.recall_due -= 1
        server_release(e, s)
        return
    # Park; the one parked last is used first.
    list_remove(&s.conn)
    list_prepend(&r.parked, &s.conn)
    s.conn.state = SERVER_PARKED
    s.conn.since_us = e.now_us
    # Somebody waits: more than one may be set up by the same server in turn.
    while r.waiting.head != NULL and s.conn.state == SERVER_PARKED:
        r.last_wait_us = e.now_us
        serve(e, <Client*> r.waiting.head, s)
    servers_active_gauge(r)


cdef void reset_answered(Engine* e, Server* s) noexcept nogil:
    """One of our own statements was answered."""
    cdef ParamSet* nothing
    cdef ParamSet* same
    if s.flags & HAS_DISCARDED and not s.flags & RESET_FAILED:
        s.flags &= ~<uint32_t> IS_DIRTY
        nothing = params_empty()
        if nothing != NULL:
            same = params_settle(s.params, nothing)
            replace_params(e, &s.params, same)
            params_release(nothing)


cdef void orphan(Engine* e, Server* s, Client* c, bint is_patient) noexcept nogil:
    """The client is gone: cancel what runs, roll back, reset, park; all within pool_reset_timeout_ms."""
    cdef Route* r = s.conn.route
    move(e, &s.conn, &r.resetting, SERVER_RESETTING)
    s.deadline_us = e.now_us + r.reset_timeout_us
    deadline(e, s.deadline_us)
    servers_active_gauge(r)
    if r.mode == MODE_SESSION and c.flags & HAS_SPOKEN or r.discard == DISCARD_ALWAYS:
        s.flags |= IS_DIRTY
    if session_owner(&s.session) == OWNER_DEPLOY:
        # What the deploy will have done is the client's, and nobody keeps account of it any more.
        s.flags |= CLOSE_AT_END if r.discard == DISCARD_NEVER else IS_DIRTY
    if c.conn.rx.left:
        s.flags |= HAS_CUT_MESSAGE
    resume_server(e, s)                 # not read while the client was slow
    if (c.conn.rx.left or s.conn.out.size or s.session.is_copy_in or s.session.is_copy_out
            or s.session.is_uncertain):
        server_close(e, s, REASON_SERVER_DIRTY_END)
        return
    if s.conn.rx.left and not s.flags & IS_SWALLOWING:
        s.flags |= IS_SWALLOWING        # the rest of a message whose beginning the client got
    if session_needs_sync(&s.session) and not s.session.is_skipping:
        # Extended messages without a Sync: their transaction is open and ends with the connection.
        if is_patient:
            s.flags |= CANCEL_ASKED     # Terminate followed: what stands before them is still done
        server_close(e, s, REASON_SERVER_DIRTY_END)
        return
    if not session_is_idle(&s.session):
        if not r.can_cancel:
            server_close(e, s, REASON_SERVER_DIRTY_END)
            return
        if is_patient:
            # Terminate followed its requests: PostgreSQL would have finished them. Cancel only later.
            s.deadline_us = e.now_us + r.reset_timeout_us // 2
            deadline(e, s.deadline_us)
        else:
            ask_cancel(e, s)
    if s.conn.rx.left or s.conn.hold != NULL:
        return                          # settles when the answer is complete
    settle(e, s)


cdef void ask_cancel(Engine* e, Server* s) noexcept nogil:
    """Python sends a cancel request for what this server runs."""
    if s.flags & CANCEL_ASKED:
        return
    s.flags |= CANCEL_ASKED
    s.cancelling += 1
    raise_event(e, &s.conn, EVENT_CANCEL_WANTED)


cdef inline void count_for_recall(Route* r) noexcept nogil:
    """A slot that becomes free serves a recall as well."""
    if r.evict_due:
        r.evict_due -= 1
    elif r.recall_due:
        r.recall_due -= 1


cdef void server_release(Engine* e, Server* s) noexcept nogil:
    """Give a clean server up for another worker."""
    conn_unregister(e, &s.conn)
    conn_forget(e, &s.conn)
    s.conn.state = SERVER_RELEASED
    s.conn.fd = -1
    servers_active_gauge(s.conn.route)
    close_later(e, &s.conn)


cdef void server_close(Engine* e, Server* s, uint8_t reason) noexcept nogil:
    """A planned close: Terminate where the stream allows it, then wait for PostgreSQL to close."""
    cdef const char* terminate = b"X\x00\x00\x00\x04"
    cdef Route* r = s.conn.route
    cdef iovec piece
    if s.conn.state >= SERVER_CLOSING:
        return
    s.conn.reason = reason
    if reason != REASON_SERVER_RECALLED:
        count_for_recall(r)
    if not session_is_idle(&s.session) and r.can_cancel:
        ask_cancel(e, s)
    move(e, &s.conn, &r.closing, SERVER_CLOSING)
    servers_active_gauge(r)
    s.deadline_us = e.now_us + STUCK_US
    if s.conn.out.size == 0 and not s.flags & HAS_CUT_MESSAGE:
        piece.iov_base = <void*> terminate
        piece.iov_len = HEADER
        io_send(s.conn.fd, &piece, 1)
    queue_clear(&e.pool, &s.conn.out)
    shutdown(s.conn.fd, SHUT_WR)
    s.conn.flags |= IS_HUNG_UP
    raise_event(e, &s.conn, EVENT_CLOSING)
    make_ready(e, &s.conn)


cdef void server_lost(Engine* e, Server* s) noexcept nogil:
    """End of the server's stream: its PostgreSQL process is gone, or so is the way to it."""
    cdef Client* c = s.client
    cdef Route* r = s.conn.route
    cdef bint is_boundary = s.conn.rx.left == 0 and s.conn.hold == NULL
    cdef bint was_told = s.flags & FATAL_SEEN or s.session.error_was_last and not s.flags & IS_SWALLOWING
    cdef bint was_planned = s.conn.state == SERVER_CLOSING
    if s.conn.state >= SERVER_RELEASED:
        return
    if not was_planned:
        s.conn.reason = REASON_SERVER_LOST
        s.flags |= IS_LOST
    conn_unregister(e, &s.conn)
    conn_forget(e, &s.conn)
    shutdown(s.conn.fd, SHUT_RDWR)      # Python closes it: it may be sending it to a broker just now
    s.conn.fd = -1
    s.conn.state = SERVER_CLOSED
    servers_active_gauge(r)
    session_free(&s.session)
    r.words[counters.ERROR_BASE + s.conn.reason] += 1
    if not was_planned:
        count_for_recall(r)
    close_later(e, &s.conn)
    if c == NULL:
        return
    s.client = NULL
    c.server = NULL
    e.deploy_size = 0
    if c.flags & IN_SETUP and c.conn.note == NULL and not s.flags & DEPLOY_FAILED:
        setup_begin(e, c)               # nothing was promised yet: take another
        return
    if c.flags & IS_TERMINATED or c.flags & IS_HALF_CLOSED and c.conn.out.size == 0:
        client_leave(e, c, REASON_SERVER_LOST)
        return
    if not is_boundary or was_told:
        leave_when_sent(e, c, REASON_SERVER_LOST)
        return
    want_text(e, c, REASON_SERVER_LOST)


cdef void server_broken(Engine* e, Server* s) noexcept nogil:
    """The server sent what it should not."""
    cdef Client* c = s.client
    if c != NULL:
        s.client = NULL
        c.server = NULL
        if s.conn.rx.left:
            leave_when_sent(e, c, REASON_SERVER_PROTOCOL)
        else:
            want_text(e, c, REASON_SERVER_PROTOCOL)
    server_close(e, s, REASON_SERVER_PROTOCOL)


# -- the end of a client -------------------------------------------------------------------------------


cdef void client_unbind(Engine* e, Client* c) noexcept nogil:
    cdef Server* s = c.server
    if s == NULL:
        return
    s.client = NULL
    c.server = NULL
    orphan(e, s, c, (c.flags & (IS_TERMINATED | IS_HALF_CLOSED)) != 0)


cdef void client_leave(Engine* e, Client* c, uint8_t reason) noexcept nogil:
    """Close a client now; its server, if any, is brought back."""
    cdef Route* r = c.conn.route
    if c.conn.state == CLIENT_CLOSED:
        return
    if c.conn.state == CLIENT_WAITING:
        leave_queue(e, c)
    if c.conn.reason == REASON_NONE or c.conn.state != CLIENT_LEAVING:
        c.conn.reason = reason
    client_unbind(e, c)
    c.conn.flags &= ~<uint16_t> IS_REGISTERED
    conn_forget(e, &c.conn)
    close(c.conn.fd)                    # nobody else has it: this ends its registration as well
    c.conn.fd = -1
    c.conn.state = CLIENT_CLOSED
    clients_gauge(r)
    r.words[counters.ERROR_BASE + c.conn.reason] += 1
    close_later(e, &c.conn)


cdef inline void clients_gauge(Route* r) noexcept nogil:
    r.words[counters.ROUTE_CLIENTS] = (
        r.idle.count + r.waiting.count + r.active_clients.count + r.leaving.count
    )


cdef void leave_when_sent(Engine* e, Client* c, uint8_t reason) noexcept nogil:
    """The client has got, or has queued, its last bytes: shut down, give it a moment to close first.

    A close with unread input would make the kernel reset the connection, and the last error be lost.
    """
    c.conn.reason = reason
    c.flags |= CLOSE_WHEN_SENT
    c.flags &= ~<uint16_t> (IS_HELD | IS_BLOCKED | IN_SETUP | IS_TERMINATED)
    if c.conn.hold != NULL:
        chunk_give(&e.pool, c.conn.hold)
        c.conn.hold = NULL
    if c.conn.state != CLIENT_LEAVING:
        if c.conn.state == CLIENT_WAITING:
            leave_queue(e, c)
        move(e, &c.conn, &c.conn.route.leaving, CLIENT_LEAVING)
    c.conn.since_us = e.now_us
    deadline(e, e.now_us + LEAVE_US)
    if c.conn.out.size == 0:
        shutdown(c.conn.fd, SHUT_WR)
    if c.conn.flags & (IS_READABLE | IS_HUNG_UP):
        c.conn.flags |= IS_READABLE
        make_ready(e, &c.conn)


cdef void inject_now(Engine* e, Client* c) noexcept nogil:
    """Python's bytes for the client, at a boundary of the stream it reads."""
    cdef Server* s = c.server
    cdef bint sent
    if c.conn.inject == NULL:
        return
    if s != NULL and (s.conn.rx.left or s.conn.hold != NULL):
        return
    sent = conn_send(e, &c.conn, c.conn.inject, c.conn.inject_size)
    free(c.conn.inject)
    c.conn.inject = NULL
    if not sent:
        client_leave(e, c, c.conn.reason or REASON_CLIENT_GONE)
        return
    if c.flags & CLOSE_WHEN_SENT:
        client_unbind(e, c)
        leave_when_sent(e, c, c.conn.reason)
        return
    if c.flags & TEXT_THEN_SKIP:
        c.flags &= ~<uint16_t> (TEXT_THEN_SKIP | IS_HELD)
        c.flags |= IS_SKIPPING
        c.conn.reason = REASON_NONE
        client_work(e, c)


cdef void conn_writable(Engine* e, Conn* conn) noexcept nogil:
    cdef Client* c
    cdef Server* s
    if not queue_flush(&e.pool, &conn.out, conn.fd):
        if conn.kind == KIND_CLIENT:
            client_leave(e, <Client*> conn, REASON_CLIENT_GONE)
        else:
            queue_clear(&e.pool, &conn.out)
            conn.flags |= IS_READABLE | IS_HUNG_UP
            make_ready(e, conn)         # read first what PostgreSQL may have said at the end
        return
    if conn.kind == KIND_CLIENT and conn.state == CLIENT_LEAVING:
        conn.since_us = e.now_us        # it reads
        deadline(e, e.now_us + LEAVE_US)
    if conn.out.size:
        return
    arm_out(e, conn, False)
    if conn.kind == KIND_CLIENT:
        c = <Client*> conn
        if c.flags & CLOSE_WHEN_SENT and conn.state == CLIENT_LEAVING:
            if c.flags & IS_HALF_CLOSED:
                client_leave(e, c, conn.reason)
            else:
                shutdown(conn.fd, SHUT_WR)
            return
        if c.server != NULL:
            resume_server(e, c.server)
        resume_client(e, c)
    else:
        s = <Server*> conn
        if s.client != NULL:
            if session_is_idle(&s.session):
                maybe_detach(e, s)
            if s.client != NULL:
                resume_client(e, s.client)


# -- cancel --------------------------------------------------------------------------------------------


cdef bint same_secret(const unsigned char* a, uint32_t a_size, const unsigned char* b,
                      uint32_t b_size) noexcept nogil:
    """Constant time in the content."""
    cdef uint32_t i
    cdef unsigned char difference = 0
    if a_size != b_size or a_size == 0:
        return False
    for i in range(a_size):
        difference |= a[i] ^ b[i]
    return difference == 0


cdef void begin_cancel(Engine* e, Command* command) noexcept nogil:
    """Find the query that a key names. Reply: now = 1 a server is marked, 2 a waiting client was told."""
    cdef Client* c = <Client*> command.conn
    cdef Route* r
    cdef Conn* at
    cdef Server* s
    command.now = 0
    if c != NULL:
        if (c.conn.state == CLIENT_CLOSED or c.conn.fd < 0 or c.pid != command.pid
                or not same_secret(c.secret, c.secret_size, command.secret, command.secret_size)):
            return
    else:
        # the real process id of a session pool's server
        r = e.routes
        while r != NULL and c == NULL:
            at = r.active.head
            while at != NULL:
                s = <Server*> at
                if (s.pid == command.pid and s.client != NULL and s.client.pid == command.pid
                        and same_secret(s.secret, s.secret_size, command.secret, command.secret_size)):
                    c = s.client
                    break
                at = at.following
            r = r.next
        if c == NULL:
            return
    if c.flags & IN_SETUP or c.flags & IS_HELD:
        return
    if c.server != NULL:
        s = c.server
        if session_is_idle(&s.session):
            return
        s.cancelling += 1
        c.conn.route.words[counters.ROUTE_CANCELS] += 1
        command.now = 1
        command.handle = (<uint64_t> s.conn.generation << 32) | s.conn.index
    elif c.conn.state == CLIENT_WAITING:
        c.conn.route.words[counters.ROUTE_CANCELS] += 1
        command.now = 2
        leave_queue(e, c)
        refuse_request(e, c, REASON_CLIENT_CANCELLED)


cdef void end_cancel(Engine* e, Server* s) noexcept nogil:
    if s.cancelling:
        s.cancelling -= 1
    if s.cancelling:
        return
    if s.client != NULL:
        if not s.client.flags & IN_SETUP:
            maybe_detach(e, s)
    elif s.conn.state == SERVER_RESETTING and not s.conn.rx.left and s.conn.hold == NULL:
        settle(e, s)


# -- timers --------------------------------------------------------------------------------------------


cdef void expire(Engine* e) noexcept nogil:
    """What is due now; sets the next deadline."""
    cdef Route* r = e.routes
    cdef Conn* at
    cdef Conn* following
    cdef Server* s
    cdef Client* c
    cdef uint64_t limit
    e.next_deadline_us = e.next_sweep_us
    while r != NULL:
        if r.pool_timeout_us:
            while r.waiting.head != NULL:
                at = r.waiting.head
                if e.now_us < at.since_us + r.pool_timeout_us:
                    deadline(e, at.since_us + r.pool_timeout_us)
                    break
                c = <Client*> at
                set_note_u32(at, r.waiting.count)
                leave_queue(e, c)
                want_text(e, c, REASON_CLIENT_POOL_TIMEOUT)
        at = r.resetting.head
        while at != NULL:
            following = at.following
            s = <Server*> at
            if e.now_us >= s.deadline_us:
                if not s.flags & CANCEL_ASKED and not session_is_idle(&s.session):
                    s.deadline_us = e.now_us + r.reset_timeout_us // 2
                    deadline(e, s.deadline_us)
                    ask_cancel(e, s)
                else:
                    server_close(e, s, REASON_SERVER_RESET_TIMEOUT)
            else:
                deadline(e, s.deadline_us)
            at = following
        at = r.leaving.head
        while at != NULL:
            following = at.following
            c = <Client*> at
            if c.flags & CLOSE_WHEN_SENT:
                limit = at.since_us + (LEAVE_US if at.out.size == 0 else r.login_timeout_us)
                if e.now_us >= limit:
                    client_leave(e, c, at.reason)
                else:
                    deadline(e, limit)
            at = following
        r = r.next


cdef void set_note_u32(Conn* conn, uint32_t value) noexcept nogil:
    set_note(conn, <unsigned char*> &value, sizeof(value))


cdef void sweep(Engine* e) noexcept nogil:
    """Once a second: limits that need no more precision."""
    cdef Route* r = e.routes
    cdef Conn* at
    cdef Conn* following
    cdef Server* s
    cdef Client* c
    e.next_sweep_us = e.now_us + SWEEP_US
    while r != NULL:
        if r.has_demand and r.waiting.head == NULL and e.now_us - r.last_wait_us >= SWEEP_US:
            r.has_demand = 0
            raise_event(e, &r.conn, EVENT_CALM)
        at = r.parked.tail
        while at != NULL:
            following = at.previous
            s = <Server*> at
            if s.expires_us and e.now_us >= s.expires_us:
                server_close(e, s, REASON_SERVER_LIFETIME)
            elif (r.pool_ttl_us and r.parked.count + r.active.count > r.keep
                    and e.now_us - at.since_us >= r.pool_ttl_us):
                server_close(e, s, REASON_SERVER_IDLE)
            at = following
        at = r.active.head
        while at != NULL:
            following = at.following
            s = <Server*> at
            c = s.client
            if c.flags & IS_HALF_CLOSED:
                probe(e, c)
            elif ((c.conn.rx.left or c.conn.hold != NULL) and r.mode != MODE_SESSION
                    and s.session.status == c'I' and not s.session.is_copy_in and not s.pins
                    and s.conn.out.size == 0 and not c.conn.flags & IS_READABLE
                    and r.login_timeout_us and e.now_us - c.request_us >= r.login_timeout_us
                    and (s.session.length == 0
                         or s.session.length == 1 and s.session.points[s.session.head].count == 1)):
                client_leave(e, c, REASON_CLIENT_STALLED)
            at = following
        at = r.waiting.head
        while at != NULL:
            following = at.following
            if (<Client*> at).flags & IS_HALF_CLOSED:
                probe(e, <Client*> at)
            at = following
        at = r.closing.head
        while at != NULL:
            s = <Server*> at
            if s.deadline_us and e.now_us >= s.deadline_us:
                s.deadline_us = 0
                raise_event(e, at, EVENT_STUCK)
            at = at.following
        r = r.next


# -- commands ------------------------------------------------------------------------------------------


cdef void adopt_client(Engine* e, Client* c) noexcept nogil:
    cdef Route* r = c.conn.route
    if c.flags & IN_SETUP:
        list_append(&r.idle, &c.conn)
        c.conn.state = CLIENT_IDLE
    else:
        move(e, &c.conn, &r.idle, CLIENT_IDLE)
    clients_gauge(r)
    if not c.conn.flags & IS_REGISTERED and not conn_register(e, &c.conn):
        client_leave(e, c, REASON_CLIENT_GONE)
        return
    if c.flags & IN_SETUP:
        setup_begin(e, c)
    else:
        client_work(e, c)


cdef void adopt_server(Engine* e, Server* s) noexcept nogil:
    list_append(&s.conn.route.resetting, &s.conn)
    s.conn.state = SERVER_RESETTING
    s.conn.since_us = e.now_us
    s.deadline_us = e.now_us + s.conn.route.reset_timeout_us
    if not conn_register(e, &s.conn):
        server_lost(e, s)
        return
    settle(e, s)


cdef void do_inject(Engine* e, Client* c, Command* command) noexcept nogil:
    if c.conn.inject != NULL:
        free(c.conn.inject)
    c.conn.inject = command.data
    c.conn.inject_size = command.size
    command.data = NULL
    if command.is_close:
        c.flags |= CLOSE_WHEN_SENT
        if command.reason:
            c.conn.reason = command.reason
    inject_now(e, c)


cdef void do_start(Engine* e, Client* c, Command* command) noexcept nogil:
    c.flags &= ~<uint16_t> IS_HELD
    if not conn_send(e, &c.conn, command.data, command.size):
        client_leave(e, c, REASON_CLIENT_GONE)
        return
    c.pid = command.pid
    if command.secret_size:
        memcpy(c.secret, command.secret, command.secret_size)
        c.secret_size = <uint8_t> command.secret_size
    client_work(e, c)
    if c.conn.flags & IS_HUNG_UP and can_read_client(c):
        make_ready(e, &c.conn)


cdef void do_recall(Engine* e, Command* command) noexcept nogil:
    """Give up servers: parked ones now, others at their next release. Reply: how many of each."""
    cdef Route* r = command.route
    cdef uint32_t wanted = command.count
    cdef Server* s
    cdef uint32_t busy, promised
    command.now = 0
    while wanted and r.parked.tail != NULL:
        s = <Server*> r.parked.tail
        if s.conn.flags & (IS_READABLE | IS_HUNG_UP):
            look_at_parked(e, s)
            if s.conn.state != SERVER_PARKED:
                continue
        if command.is_close or s.conn.rx.left or s.conn.hold != NULL:
            server_close(e, s, REASON_SERVER_RECALLED)
        else:
            server_release(e, s)
        wanted -= 1
        command.now += 1
    busy = r.active.count + r.resetting.count
    promised = r.recall_due + r.evict_due
    busy = busy - promised if busy > promised else 0
    command.later = wanted if wanted < busy else busy
    if command.is_close:
        r.evict_due += command.later
    else:
        r.recall_due += command.later


cdef bint is_between(Client* c) noexcept nogil:
    """Whether a client stands between transactions, with nothing asked."""
    if c.flags & (IN_SETUP | IS_HELD) or c.conn.rx.left or c.conn.hold != NULL or c.conn.out.size:
        return False
    if c.conn.state == CLIENT_IDLE:
        return True
    return (c.conn.state == CLIENT_ACTIVE and session_is_idle(&c.server.session)
            and c.server.session.status == c'I')


cdef void do_drop_idle(Engine* e, Command* command) noexcept nogil:
    """Drop up to `count` clients that stand between transactions: Python says goodbye to each."""
    cdef Route* r = e.routes
    cdef Conn* at
    cdef Conn* following
    cdef Client* c
    cdef int which
    command.now = 0
    command.later = 0
    while r != NULL:
        for which in range(2):
            at = r.idle.head if which == 0 else r.active_clients.head
            while at != NULL and command.now < command.count:
                following = at.following
                c = <Client*> at
                if is_between(c):
                    command.now += 1
                    client_unbind(e, c)
                    want_text(e, c, REASON_SHUTDOWN)
                at = following
        command.later += r.idle.count + r.active_clients.count + r.waiting.count + r.leaving.count
        r = r.next


cdef void do_connect_failed(Engine* e, Command* command) noexcept nogil:
    """No server could be opened: those who wait get the error (all, or those still in setup)."""
    cdef Route* r = command.route
    cdef Conn* at = r.waiting.head
    cdef Conn* following
    cdef Client* c
    while at != NULL:
        following = at.following
        c = <Client*> at
        if not command.is_close or c.flags & IN_SETUP:
            leave_queue(e, c)
            set_note(at, command.data, command.size)
            want_text(e, c, REASON_SERVER_CONNECT)
        at = following


cdef void run_command(Engine* e, Command* command) noexcept nogil:
    cdef Conn* conn = command.conn
    cdef Server* s
    cdef Client* c
    if command.kind == COMMAND_STOP:
        e.is_stopping = True
    elif command.kind == COMMAND_ROUTE:
        command.route.next = e.routes
        e.routes = command.route
    elif command.kind == COMMAND_RECALL:
        do_recall(e, command)
    elif command.kind == COMMAND_DROP_IDLE:
        do_drop_idle(e, command)
    elif command.kind == COMMAND_CONNECT_FAILED:
        do_connect_failed(e, command)
    elif command.kind == COMMAND_BEGIN_CANCEL:
        begin_cancel(e, command)
    elif conn.generation != command.generation:
        return
    elif command.kind == COMMAND_ADOPT_CLIENT:
        adopt_client(e, <Client*> conn)
    elif command.kind == COMMAND_ADOPT_SERVER:
        adopt_server(e, <Server*> conn)
    elif conn.fd < 0:
        return
    elif command.kind == COMMAND_START_CLIENT:
        do_start(e, <Client*> conn, command)
    elif command.kind == COMMAND_INJECT:
        do_inject(e, <Client*> conn, command)
    elif command.kind == COMMAND_END_CANCEL:
        if conn.state < SERVER_CLOSING:
            end_cancel(e, <Server*> conn)
    elif command.kind == COMMAND_KILL:
        if conn.kind == KIND_CLIENT:
            client_leave(e, <Client*> conn, command.reason)
        else:
            s = <Server*> conn
            if s.client != NULL:
                c = s.client
                s.client = NULL
                c.server = NULL
                want_text(e, c, command.reason)
            server_close(e, s, command.reason)


cdef void run_commands(Engine* e) noexcept nogil:
    cdef Command* command
    cdef Command* following
    cdef bint wake
    pthread_mutex_lock(&e.lock)
    command = e.commands_head
    e.commands_head = NULL
    e.commands_tail = NULL
    e.is_relay_woken = False
    pthread_mutex_unlock(&e.lock)
    while command != NULL:
        following = command.next
        run_command(e, command)
        command.next = NULL
        if command.data != NULL:
            free(command.data)
            command.data = NULL
        if command.has_reply:
            pthread_mutex_lock(&e.lock)
            if e.replies_tail != NULL:
                e.replies_tail.next = command
            else:
                e.replies_head = command
            e.replies_tail = command
            wake = not e.is_python_woken
            e.is_python_woken = True
            pthread_mutex_unlock(&e.lock)
            if wake:
                wake_python(e)
        else:
            free(command)
        command = following


# -- the loop ------------------------------------------------------------------------------------------


cdef void on_event(Engine* e, Conn* conn, uint32_t events) noexcept nogil:
    if conn.fd < 0 or not conn.flags & IS_REGISTERED:
        return                          # closed earlier in this round
    if events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
        conn.flags |= IS_HUNG_UP
    if events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR):
        conn.flags |= IS_READABLE
    if events & EPOLLOUT and conn.out.size:
        conn_writable(e, conn)
        if conn.fd < 0 or not conn.flags & IS_REGISTERED:
            return
    if conn.kind == KIND_SERVER:
        if conn.flags & IS_READABLE:
            server_readable(e, <Server*> conn)
        return
    if events & (EPOLLHUP | EPOLLERR) and conn.state != CLIENT_LEAVING:
        # both directions are dead: nobody is left to answer
        hung_up(e, <Client*> conn)
        return
    if conn.flags & IS_READABLE:
        if conn.flags & IS_HUNG_UP and not can_read_client(<Client*> conn):
            if not (<Client*> conn).flags & (IS_HALF_CLOSED | IS_TERMINATED):
                (<Client*> conn).flags |= IS_HALF_CLOSED
                probe(e, <Client*> conn)
            return
        client_readable(e, <Client*> conn)


cdef void hung_up(Engine* e, Client* c) noexcept nogil:
    """The connection is dead, but a Terminate may still stand unread before its end."""
    if can_read_client(c):
        client_readable(e, c)
        if c.conn.state == CLIENT_CLOSED:
            return
        if c.flags & IS_TERMINATED:
            client_leave(e, c, REASON_CLIENT_TERMINATED)
            return
    c.flags &= ~<uint16_t> IS_HALF_CLOSED
    client_leave(e, c, REASON_CLIENT_GONE)


cdef void run_ready(Engine* e) noexcept nogil:
    """One turn for those on the list; what puts itself there again may get several, up to a bound."""
    cdef Conn* conn
    cdef int turns = 0
    while e.ready_head != NULL and turns < MAX_EVENTS:
        turns += 1
        conn = e.ready_head
        e.ready_head = conn.ready_next
        if e.ready_head == NULL:
            e.ready_tail = NULL
        conn.flags &= ~<uint16_t> IS_READY
        conn.ready_next = NULL
        if conn.kind == KIND_SERVER:
            server_readable(e, <Server*> conn)
        else:
            client_readable(e, <Client*> conn)


cdef void finish_round(Engine* e) noexcept nogil:
    """Now nothing names the closed ones any more: Python may have them."""
    cdef Conn* conn
    cdef bint is_released
    while e.closed_head != NULL:
        conn = e.closed_head
        e.closed_head = conn.ready_next
        conn.ready_next = NULL
        is_released = conn.kind == KIND_SERVER and conn.state == SERVER_RELEASED
        raise_bits(e, conn, EVENT_RELEASED if is_released else EVENT_CLOSED, conn.kind == KIND_CLIENT)


cdef void run(Engine* e) noexcept nogil:
    cdef epoll_event events[MAX_EVENTS]
    cdef sigset_t signals
    cdef Conn* conn
    cdef int count, i, timeout
    sigfillset(&signals)
    pthread_sigmask(SIG_SETMASK, &signals, NULL)
    e.now_us = clock_us()
    e.next_sweep_us = e.now_us + SWEEP_US
    e.next_deadline_us = e.next_sweep_us
    while not e.is_stopping:
        timeout = 0
        if e.ready_head == NULL and e.next_deadline_us > e.now_us:
            timeout = <int> ((e.next_deadline_us - e.now_us) // 1000) + 1
        if e.quiet_since_us and timeout > QUIET_US // 1000:
            timeout = QUIET_US // 1000
        count = epoll_wait(e.epoll, events, MAX_EVENTS, timeout)
        e.now_us = clock_us()
        e.process_words[counters.PROCESS_RELAY_BEAT] += 1
        # Commands first: a client whose first bytes came in this round may still have to be adopted.
        if e.commands_head != NULL:
            run_commands(e)
        # Then servers: they free what clients of the same round need, and say who is dead.
        for i in range(count):
            conn = <Conn*> events[i].data.ptr
            if conn.kind == KIND_SERVER:
                on_event(e, conn, events[i].events)
        for i in range(count):
            conn = <Conn*> events[i].data.ptr
            if conn.kind == KIND_CLIENT:
                on_event(e, conn, events[i].events)
        if e.ready_head != NULL:
            run_ready(e)
        if e.now_us >= e.next_sweep_us:
            sweep(e)
        if e.now_us >= e.next_deadline_us:
            expire(e)
        if e.closed_head != NULL:
            finish_round(e)
        if e.quiet_since_us:
            end_quiet(e)


# -- Python's side -------------------------------------------------------------------------------------


cdef class ParameterSet:
    """Session parameters, interned and immutable. Equal content is the same object underneath."""

    cdef ParamSet* _set

    def __cinit__(self):
        params_global_init()
        self._set = NULL

    def __dealloc__(self):
        params_release(self._set)

    @staticmethod
    def of(parameters, bint is_reported, read_only=frozenset()):
        """A set from a mapping of names to values (bytes to bytes).

        ``is_reported``: they came by ParameterStatus; names in ``read_only`` are never deployed.
        Raises ValueError when there are too many.
        """
        cdef ParameterSet self = ParameterSet()
        cdef ParamSet* s = params_empty()
        cdef ParamSet* t
        cdef bytes name, value
        cdef uint8_t flags
        for name, value in parameters.items():
            flags = PARAM_REPORTED if is_reported else 0
            if name in read_only:
                flags |= PARAM_READ_ONLY
            t = params_with(s, <const unsigned char*> PyBytes_AS_STRING(name), <uint32_t> len(name),
                            <const unsigned char*> PyBytes_AS_STRING(value), <uint32_t> len(value), flags)
            params_release(s)
            if t == NULL:
                raise ValueError("too many parameters")
            s = t
        self._set = s
        return self

    def merged(self, ParameterSet over not None):
        """This set with the values of ``over`` on top; read-only names keep theirs."""
        cdef ParameterSet result = ParameterSet()
        result._set = params_merge(self._set, over._set)
        if result._set == NULL:
            raise ValueError("too many parameters")
        return result

    def items(self, bint is_reported=False):
        """Pairs of name and value as bytes, sorted by name; with ``is_reported`` only the reported."""
        cdef uint32_t i
        cdef list result = []
        for i in range(self._set.count):
            if is_reported and not self._set.items[i].flags & PARAM_REPORTED:
                continue
            result.append((
                (<char*> self._set.items[i].text)[:self._set.items[i].name_size],
                (<char*> self._set.items[i].text + self._set.items[i].name_size + 1)
                [:self._set.items[i].value_size],
            ))
        return result

    def deploy(self, ParameterSet wants not None):
        """The SQL that turns a server with this set into one with ``wants``; empty if nothing differs."""
        cdef unsigned char* out = <unsigned char*> malloc(MAX_DEPLOY)
        cdef int size
        if out == NULL:
            raise MemoryError
        try:
            size = params_deploy(self._set, wants._set, out, MAX_DEPLOY)
            if size < 0:
                raise ValueError("the difference is too large")
            return (<char*> out)[:size - 1] if size else b""
        finally:
            free(out)

    def __eq__(self, other):
        return isinstance(other, ParameterSet) and self._set == (<ParameterSet> other)._set

    def __hash__(self):
        return hash(<uintptr_t> self._set)


cdef ParameterSet wrap(Engine* e, ParamSet** place):
    cdef ParameterSet result = ParameterSet()
    pthread_mutex_lock(&e.lock)
    result._set = params_hold(place[0])
    pthread_mutex_unlock(&e.lock)
    return result


cdef class Relay:
    """The relay of one worker, as the hub sees it. Called by the hub's thread only.

    ``run`` is the body of the relay's thread. ``event_fd`` becomes readable when ``poll`` has something.
    """

    cdef Engine* e
    cdef uint32_t worker
    cdef list clients               # addresses of the slabs
    cdef list servers
    cdef list free_clients          # indices
    cdef list free_servers
    cdef dict routes                # id → address
    cdef uint64_t next_token

    def __cinit__(self, uintptr_t counters_address, uint32_t worker):
        cdef epoll_event event
        params_global_init()
        self.e = <Engine*> calloc(1, sizeof(Engine))
        if self.e == NULL:
            raise MemoryError
        self.e.buffer = <unsigned char*> malloc(CHUNK + READ_SIZE)
        self.e.parked_buffer = <unsigned char*> malloc(2 * CHUNK)
        self.e.deploy = <unsigned char*> malloc(MAX_DEPLOY)
        self.e.texts = <unsigned char*> malloc(TEXT_RING)
        self.e.process_words = <uint64_t*> counters_address
        self.e.epoll = epoll_create1(EPOLL_CLOEXEC)
        self.e.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        self.e.event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if (self.e.buffer == NULL or self.e.parked_buffer == NULL or self.e.deploy == NULL
                or self.e.texts == NULL or self.e.epoll < 0 or self.e.wake < 0 or self.e.event_fd < 0):
            raise OSError(errno, "the relay cannot start")
        pthread_mutex_init(&self.e.lock, NULL)
        self.e.wake_conn.kind = KIND_WAKE
        self.e.wake_conn.fd = self.e.wake
        event.events = EPOLLIN | EPOLLET    # never read: each write is an edge
        event.data.ptr = &self.e.wake_conn
        epoll_ctl(self.e.epoll, EPOLL_CTL_ADD, self.e.wake, &event)
        self.worker = worker & WORKER_MASK
        self.clients = []
        self.servers = []
        self.free_clients = []
        self.free_servers = []
        self.routes = {}
        self.next_token = 1

    @property
    def event_fd(self):
        """Readable when ``poll`` has something to say."""
        return self.e.event_fd

    def run(self):
        """Body of the relay's thread: blocks all signals, returns after ``stop``."""
        with nogil:
            run(self.e)

    def now_us(self):
        """Microseconds of the monotonic clock."""
        return clock_us()

    # -- records

    cdef Client* client_at(self, uint32_t index):
        cdef uint32_t slab = index // SLAB
        if slab >= <uint32_t> len(self.clients):
            return NULL
        return <Client*> <uintptr_t> self.clients[slab] + index % SLAB

    cdef Server* server_at(self, uint32_t index):
        cdef uint32_t slab = index // SLAB
        if slab >= <uint32_t> len(self.servers):
            return NULL
        return <Server*> <uintptr_t> self.servers[slab] + index % SLAB

    cdef Client* client_of(self, uint64_t handle) except NULL:
        cdef Client* c = self.client_at(<uint32_t> handle)
        if c == NULL or c.conn.generation != handle >> 32:
            raise KeyError(handle)
        return c

    cdef Server* server_of(self, uint64_t handle) except NULL:
        cdef Server* s = self.server_at(<uint32_t> handle)
        if s == NULL or s.conn.generation != handle >> 32:
            raise KeyError(handle)
        return s

    cdef Route* route_of(self, uint32_t route_id) except NULL:
        return <Route*> <uintptr_t> self.routes[route_id]

    cdef Client* new_client(self) except NULL:
        cdef Client* slab
        cdef uint32_t i, base, generation
        if not self.free_clients:
            slab = <Client*> calloc(SLAB, sizeof(Client))
            if slab == NULL:
                raise MemoryError
            base = <uint32_t> len(self.clients) * SLAB
            if base + SLAB > INDEX_MASK:
                free(slab)
                raise MemoryError
            self.clients.append(<uintptr_t> slab)
            for i in range(<uint32_t> SLAB):
                slab[i].conn.index = base + i
                slab[i].conn.generation = 1
                slab[i].conn.fd = -1
            self.free_clients.extend(reversed(range(base, base + SLAB)))
        cdef Client* c = self.client_at(self.free_clients.pop())
        i = c.conn.index
        generation = c.conn.generation
        memset(c, 0, sizeof(Client))
        c.conn.index = i
        c.conn.generation = generation
        c.conn.kind = KIND_CLIENT
        return c

    cdef Server* new_server(self) except NULL:
        cdef Server* slab
        cdef uint32_t i, base, generation
        if not self.free_servers:
            slab = <Server*> calloc(SLAB, sizeof(Server))
            if slab == NULL:
                raise MemoryError
            base = <uint32_t> len(self.servers) * SLAB
            self.servers.append(<uintptr_t> slab)
            for i in range(<uint32_t> SLAB):
                slab[i].conn.index = base + i
                slab[i].conn.generation = 1
                slab[i].conn.fd = -1
            self.free_servers.extend(reversed(range(base, base + SLAB)))
        cdef Server* s = self.server_at(self.free_servers.pop())
        i = s.conn.index
        generation = s.conn.generation
        memset(s, 0, sizeof(Server))
        s.conn.index = i
        s.conn.generation = generation
        s.conn.kind = KIND_SERVER
        return s

    # -- commands

    cdef Command* command(self, uint8_t kind) except NULL:
        cdef Command* command = <Command*> calloc(1, sizeof(Command))
        if command == NULL:
            raise MemoryError
        command.kind = kind
        return command

    cdef void attach_data(self, Command* command, bytes data):
        command.size = <uint32_t> PyBytes_GET_SIZE(data)
        command.data = <unsigned char*> malloc(command.size + 1)
        memcpy(command.data, PyBytes_AS_STRING(data), command.size)

    cdef void post(self, Command* command, bint is_quiet=False):
        cdef bint wake
        cdef uint64_t one = 1
        pthread_mutex_lock(&self.e.lock)
        if self.e.commands_tail != NULL:
            self.e.commands_tail.next = command
        else:
            self.e.commands_head = command
        self.e.commands_tail = command
        wake = not is_quiet and not self.e.is_relay_woken
        if wake:
            self.e.is_relay_woken = True
        pthread_mutex_unlock(&self.e.lock)
        if wake:
            write(self.e.wake, &one, sizeof(one))

    def stop(self):
        """Make ``run`` return."""
        self.post(self.command(COMMAND_STOP))

    def open_route(self, uint32_t route_id, *, uint8_t mode, discard, bint can_cancel, bint can_rollback,
                   bint attach_check, bint log_query, uint64_t pool_timeout_ms, uint64_t pool_ttl_s,
                   uint64_t reset_timeout_ms, uint64_t login_timeout_ms, uint32_t keep):
        """Make a route known. ``discard``: None resets what is dirty, True always, False never."""
        cdef Route* r
        cdef Command* command
        if route_id in self.routes:
            return
        r = <Route*> calloc(1, sizeof(Route))
        if r == NULL:
            raise MemoryError
        r.conn.kind = KIND_ROUTE
        r.conn.fd = -1
        r.conn.index = route_id
        r.id = route_id
        r.mode = mode
        r.discard = DISCARD_DIRTY if discard is None else DISCARD_ALWAYS if discard else DISCARD_NEVER
        r.can_cancel = can_cancel
        r.can_rollback = can_rollback
        r.attach_check = attach_check
        r.log_query = log_query
        r.pool_timeout_us = pool_timeout_ms * 1000
        r.pool_ttl_us = pool_ttl_s * 1000000
        r.reset_timeout_us = reset_timeout_ms * 1000
        r.login_timeout_us = login_timeout_ms * 1000
        r.keep = keep
        r.words = self.e.process_words + counters.WORDS_PER_BLOCK * (1 + <uint64_t> route_id)
        r.waiting.gauge = r.words + counters.ROUTE_CLIENTS_WAITING
        r.active_clients.gauge = r.words + counters.ROUTE_CLIENTS_ACTIVE
        r.parked.gauge = r.words + counters.ROUTE_SERVERS_IDLE
        r.closing.gauge = r.words + counters.ROUTE_SERVERS_CLOSING
        self.routes[route_id] = <uintptr_t> r
        command = self.command(COMMAND_ROUTE)
        command.route = r
        self.post(command)

    def set_keep(self, uint32_t route_id, uint32_t count):
        """How many parked servers of the route pool_ttl spares."""
        self.route_of(route_id).keep = count

    def adopt_client(self, int fd, uint32_t route_id, uint64_t client_id, ParameterSet parameters not None, *,
                     bytes secret, bytes address, uint8_t family, uint16_t port, uint32_t names,
                     bint needs_setup, bytes pending):
        """Hand a client's socket over. Returns its handle.

        ``secret``: its cancel key, empty if the server's own is handed out later; ``address``: 4 or 16
        bytes, empty for a Unix socket; ``names``: what ``client`` gives back; ``pending``: bytes read
        beyond its login.
        """
        cdef Client* c
        cdef Command* command
        cdef Route* r = self.route_of(route_id)
        if len(secret) > 32 or len(address) > 16 or len(pending) > CHUNK:
            raise ValueError("too long")
        c = self.new_client()
        c.conn.fd = fd
        c.conn.route = r
        c.conn.id = client_id
        c.conn.flags = IS_UNIX if family == 0 else 0
        c.params = params_hold(parameters._set)
        c.pid = SYNTHETIC_PID | (self.worker << WORKER_SHIFT) | c.conn.index
        c.secret_size = <uint8_t> len(secret)
        memcpy(c.secret, PyBytes_AS_STRING(secret), len(secret))
        memcpy(c.address, PyBytes_AS_STRING(address), len(address))
        c.address_family = family
        c.port = port
        c.names = names
        if needs_setup:
            c.flags = IN_SETUP
        if pending:
            c.conn.hold = <Chunk*> malloc(sizeof(Chunk))
            if c.conn.hold == NULL:
                raise MemoryError
            memset(c.conn.hold, 0, 16)
            memcpy(c.conn.hold.data, PyBytes_AS_STRING(pending), len(pending))
            c.conn.hold.start = 0
            c.conn.hold.end = <uint32_t> len(pending)
        c.conn.born_us = clock_us()
        command = self.command(COMMAND_ADOPT_CLIENT)
        command.conn = &c.conn
        command.generation = c.conn.generation
        if needs_setup or pending:
            self.post(command)
        else:
            # Nothing to do before it speaks: its first bytes wake the relay, which looks at commands first.
            # The command must be there before the registration; the flag is the relay's from then on.
            c.conn.flags |= IS_REGISTERED
            self.post(command, is_quiet=True)
            if not conn_add(self.e, &c.conn):
                self.kill_client((<uint64_t> c.conn.generation << 32) | c.conn.index, REASON_CLIENT_GONE)
        return (<uint64_t> c.conn.generation << 32) | c.conn.index

    def reserve_pid(self):
        """The process id that the next adopted client will have."""
        cdef Client* c
        if not self.free_clients:
            c = self.new_client()
            self.free_clients.append(c.conn.index)
        return SYNTHETIC_PID | (self.worker << WORKER_SHIFT) | <uint32_t> self.free_clients[len(self.free_clients) - 1]

    def adopt_server(self, int fd, uint32_t route_id, uint64_t server_id, ParameterSet parameters not None,
                     ParameterSet initial not None, *, uint32_t pid, bytes secret, uint32_t slot,
                     uint32_t generation, uint64_t opened_us, uint64_t expires_us, uint64_t uses,
                     bint is_unix):
        """Hand a logged-in, idle server over; it serves whoever waits, or parks. Returns its handle.

        The caller keeps ``fd`` and closes it after EVENT_CLOSED or EVENT_RELEASED.
        """
        cdef Server* s
        cdef Command* command
        cdef Route* r = self.route_of(route_id)
        if len(secret) > 32:
            raise ValueError("cancel key too long")
        s = self.new_server()
        s.conn.fd = fd
        s.conn.route = r
        s.conn.id = server_id
        s.conn.flags = IS_UNIX if is_unix else 0
        s.conn.born_us = opened_us
        session_init(&s.session, c'I')
        s.params = params_hold(parameters._set)
        s.initial = params_hold(initial._set)
        s.pid = pid
        s.secret_size = <uint8_t> len(secret)
        memcpy(s.secret, PyBytes_AS_STRING(secret), len(secret))
        s.slot = slot
        s.slot_generation = generation
        s.expires_us = expires_us
        s.uses = uses
        command = self.command(COMMAND_ADOPT_SERVER)
        command.conn = &s.conn
        command.generation = s.conn.generation
        self.post(command)
        return (<uint64_t> s.conn.generation << 32) | s.conn.index

    def start_client(self, uint64_t handle, bytes greeting, uint32_t pid, bytes secret):
        """After setup: send the end of the login and begin to read the client."""
        cdef Client* c = self.client_of(handle)
        cdef Command* command = self.command(COMMAND_START_CLIENT)
        command.conn = &c.conn
        command.generation = c.conn.generation
        command.pid = pid
        command.secret_size = <uint32_t> min(len(secret), 32)
        memcpy(command.secret, PyBytes_AS_STRING(secret), command.secret_size)
        self.attach_data(command, greeting)
        self.post(command)

    def inject(self, uint64_t handle, bytes data, bint close_after, uint8_t reason=0):
        """Send a client bytes at the next boundary of its stream; then close it, if asked."""
        cdef Client* c = self.client_of(handle)
        cdef Command* command = self.command(COMMAND_INJECT)
        command.conn = &c.conn
        command.generation = c.conn.generation
        command.is_close = close_after
        command.reason = reason
        self.attach_data(command, data)
        self.post(command)

    def begin_cancel(self, uint32_t pid, bytes secret):
        """Ask whose query a key names. The answer comes by ``poll`` under the token returned."""
        cdef Command* command
        cdef Client* c = NULL
        if len(secret) > 32 or not secret:
            return 0
        if pid & SYNTHETIC_PID:
            if (pid >> WORKER_SHIFT) & WORKER_MASK != self.worker:
                return 0
            c = self.client_at(pid & INDEX_MASK)
            if c == NULL:
                return 0
        command = self.command(COMMAND_BEGIN_CANCEL)
        command.conn = &c.conn if c != NULL else NULL
        command.pid = pid
        command.secret_size = <uint32_t> len(secret)
        memcpy(command.secret, PyBytes_AS_STRING(secret), len(secret))
        return self.post_for_reply(command)

    cdef uint64_t post_for_reply(self, Command* command):
        command.token = self.next_token
        command.has_reply = 1
        self.next_token += 1
        self.post(command)
        return self.next_token - 1

    def end_cancel(self, uint64_t handle):
        """A cancel request for this server is over (its connection has ended)."""
        cdef Server* s = self.server_at(<uint32_t> handle)
        cdef Command* command
        if s == NULL or s.conn.generation != handle >> 32:
            return
        command = self.command(COMMAND_END_CANCEL)
        command.conn = &s.conn
        command.generation = s.conn.generation
        self.post(command)

    def recall(self, uint32_t route_id, uint32_t count, bint is_eviction):
        """Give up servers of a route. The answer (now, later) comes by ``poll`` under the token."""
        cdef Command* command = self.command(COMMAND_RECALL)
        command.route = self.route_of(route_id)
        command.count = count
        command.is_close = is_eviction
        return self.post_for_reply(command)

    def drop_idle(self, uint32_t count):
        """Drop up to ``count`` clients between transactions: EVENT_TEXT_WANTED; the answer is (dropped, left)."""
        cdef Command* command = self.command(COMMAND_DROP_IDLE)
        command.count = count
        return self.post_for_reply(command)

    def connect_failed(self, uint32_t route_id, bytes error, bint only_setup):
        """Those who wait on the route (or only those not yet logged in) get EVENT_TEXT_WANTED with this note."""
        cdef Command* command = self.command(COMMAND_CONNECT_FAILED)
        command.route = self.route_of(route_id)
        command.is_close = only_setup
        self.attach_data(command, error)
        self.post(command)

    def kill_client(self, uint64_t handle, uint8_t reason):
        """Close a client at once."""
        cdef Client* c = self.client_of(handle)
        cdef Command* command = self.command(COMMAND_KILL)
        command.conn = &c.conn
        command.generation = c.conn.generation
        command.reason = reason
        self.post(command)

    def close_server(self, uint64_t handle, uint8_t reason):
        """End a server: Terminate, wait for PostgreSQL, EVENT_CLOSED."""
        cdef Server* s = self.server_of(handle)
        cdef Command* command = self.command(COMMAND_KILL)
        command.conn = &s.conn
        command.generation = s.conn.generation
        command.reason = reason
        self.post(command)

    # -- events

    def poll(self):
        """What happened: a list of (kind, handle or route id or token, bits or reply).

        Kinds: ``"c"`` client, ``"s"`` server, ``"r"`` route with event bits; ``"="`` the reply to a
        command: (now, later, server handle). An object's events are merged since the last call.
        """
        cdef list result = []
        cdef Conn* conns[512]
        cdef uint32_t bits[512]
        cdef Conn* conn
        cdef Command* reply
        cdef Command* following
        cdef int count, i
        cdef uint64_t value
        cdef bint was_woken = False
        while True:
            count = 0
            pthread_mutex_lock(&self.e.lock)
            was_woken = was_woken or self.e.is_python_woken
            self.e.quiet_since_us = 0
            conn = self.e.events_head
            while conn != NULL and count < 512:
                conns[count] = conn
                bits[count] = conn.event_bits
                conn.event_bits = 0
                count += 1
                conn = conn.event_next
            self.e.events_head = conn
            if conn == NULL:
                self.e.events_tail = NULL
                self.e.is_python_woken = False
            reply = self.e.replies_head
            self.e.replies_head = NULL
            self.e.replies_tail = NULL
            pthread_mutex_unlock(&self.e.lock)
            for i in range(count):
                if conns[i].kind == KIND_ROUTE:
                    result.append(("r", conns[i].index, bits[i]))
                else:
                    result.append((
                        "c" if conns[i].kind == KIND_CLIENT else "s",
                        (<uint64_t> conns[i].generation << 32) | conns[i].index,
                        bits[i],
                    ))
            while reply != NULL:
                following = reply.next
                result.append(("=", reply.token, (reply.now, reply.later, reply.handle)))
                free(reply)
                reply = following
            if conn == NULL:
                if was_woken:
                    read(self.e.event_fd, &value, sizeof(value))
                return result

    @property
    def has_events(self):
        """Whether ``poll`` would return anything, maybe without the descriptor saying so yet."""
        return self.e.events_head != NULL

    def texts(self):
        """Query texts for the log since the last call: pairs of client handle and bytes."""
        cdef list result = []
        cdef uint32_t header[3]
        cdef uint64_t at = self.e.texts_read, end
        cdef size_t i
        cdef bytearray text
        pthread_mutex_lock(&self.e.lock)
        end = self.e.texts_written
        pthread_mutex_unlock(&self.e.lock)
        while at < end:
            for i in range(sizeof(header)):
                (<unsigned char*> header)[i] = self.e.texts[(at + i) % TEXT_RING]
            at += sizeof(header)
            text = bytearray(header[0])
            for i in range(header[0]):
                text[i] = self.e.texts[(at + i) % TEXT_RING]
            at += header[0]
            result.append(((<uint64_t> header[2] << 32) | header[1], bytes(text)))
        self.e.texts_read = at
        return result

    # -- what records say

    def client(self, uint64_t handle):
        """A client's record as a dictionary. Raises KeyError for a stale handle."""
        cdef Client* c = self.client_of(handle)
        cdef Server* s = c.server
        return {
            "id": c.conn.id,
            "route": c.conn.route.id,
            "state": c.conn.state,
            "reason": c.conn.reason,
            "pid": c.pid,
            "names": c.names,
            "family": c.address_family,
            "address": (<char*> c.address)[:4 if c.address_family == 4 else 16 if c.address_family else 0],
            "port": c.port,
            "born_us": c.conn.born_us,
            "note": b"" if c.conn.note == NULL else (<char*> c.conn.note)[:c.conn.note_size],
            "secret": (<char*> c.secret)[:c.secret_size],
            "server": 0 if s == NULL else (<uint64_t> s.conn.generation << 32) | s.conn.index,
            "in_setup": bool(c.flags & IN_SETUP),
        }

    def client_parameters(self, uint64_t handle):
        """The parameters a client's session expects."""
        return wrap(self.e, &self.client_of(handle).params)

    def server(self, uint64_t handle):
        """A server's record as a dictionary. Raises KeyError for a stale handle."""
        cdef Server* s = self.server_of(handle)
        return {
            "id": s.conn.id,
            "route": s.conn.route.id,
            "state": s.conn.state,
            "reason": s.conn.reason,
            "pid": s.pid,
            "secret": (<char*> s.secret)[:s.secret_size],
            "slot": s.slot,
            "generation": s.slot_generation,
            "pins": s.pins,
            "opened_us": s.conn.born_us,
            "expires_us": s.expires_us,
            "uses": s.uses,
        }

    def server_parameters(self, uint64_t handle):
        """(parameters now, parameters after its login)."""
        cdef Server* s = self.server_of(handle)
        return wrap(self.e, &s.params), wrap(self.e, &s.initial)

    def free_client(self, uint64_t handle):
        """Give a closed client's record back; its handle is stale from now on."""
        cdef Client* c = self.client_of(handle)
        params_release(c.params)
        c.params = NULL
        if c.conn.note != NULL:
            free(c.conn.note)
            c.conn.note = NULL
        c.conn.generation += 1
        c.conn.state = 0
        self.free_clients.append(c.conn.index)

    def free_server(self, uint64_t handle):
        """Give a closed or released server's record back."""
        cdef Server* s = self.server_of(handle)
        params_release(s.params)
        params_release(s.initial)
        session_free(&s.session)
        if s.conn.note != NULL:
            free(s.conn.note)
            s.conn.note = NULL
        s.conn.generation += 1
        s.conn.state = 0
        self.free_servers.append(s.conn.index)
