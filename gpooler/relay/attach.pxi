"""Parameters, the queue, and a server for a client."""

from libc.errno cimport EAGAIN, errno
from libc.stdint cimport uint16_t, uint32_t, uint8_t

from gpooler.relay cimport counters
from gpooler.relay.frame cimport HEADER
from gpooler.relay.histogram cimport observe
from gpooler.relay.io cimport CHUNK
from gpooler.relay.params cimport (
    MAX_DEPLOY, PARAM_READ_ONLY, PARAM_REPORTED, ParamSet, params_deploy, params_hold, params_is_same_name,
    params_merge, params_release, params_with,
)
from gpooler.relay.reason cimport REASON_CLIENT_GONE, REASON_SERVER_LOST, REASON_SERVER_PROTOCOL
from gpooler.relay.scanner cimport EFFECT_SET
from gpooler.relay.session cimport OWNER_DEPLOY, session_frontend, session_is_idle
from gpooler.relay.system cimport MSG_DONTWAIT, MSG_PEEK, pthread_mutex_lock, pthread_mutex_unlock, recv


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


cdef void note_parameter(Engine* e, Server* s, const unsigned char* body, uint32_t size,
                         bint is_for_client) noexcept nogil:
    """ParameterStatus: name, NUL, value, NUL. A client that it is not for expects something else."""
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
    if is_for_client and s.client != NULL:
        replace_params(e, &s.client.params,
                       params_with(s.client.params, body, name_size, value, value_size, flags))
        if not s.conn.route.maintain_params:
            pin(e, s.client, EFFECT_SET)
        if s.conn.route.adds_host and params_is_same_name(body, name_size, APPLICATION_NAME, 16):
            note_name(s.client, value, value_size)
    elif is_for_client and s.conn.state == SERVER_PARKED:
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


cdef inline void note_wait(Engine* e, Route* r) noexcept nogil:
    """Somebody waits: the queue is over CALM_US after the last of them."""
    r.last_wait_us = e.now_us
    deadline(e, e.now_us + CALM_US)


cdef void enqueue(Engine* e, Client* c) noexcept nogil:
    """No server is at hand: wait in the queue, and ask for one if nobody asked yet."""
    cdef Route* r = c.conn.route
    if c.wait_us:
        # its server died before it did anything: it keeps its place and its deadline
        list_remove(&c.conn)
        list_prepend(&r.waiting, &c.conn)
        c.conn.state = CLIENT_WAITING
        c.conn.since_us = c.wait_us
        r.unnoticed = &c.conn
    else:
        move(e, &c.conn, &r.waiting, CLIENT_WAITING)
        c.wait_us = e.now_us
        if r.unnoticed == NULL:
            r.unnoticed = &c.conn
    oldest_wait_gauge(r)
    note_wait(e, r)
    if r.has_notices:
        deadline(e, c.conn.since_us + r.notice_after_us)
    if r.pool_timeout_us:
        deadline(e, c.conn.since_us + r.pool_timeout_us)
    if not r.has_demand and r.pause == PAUSE_NONE:
        r.has_demand = 1
        raise_event(e, &r.conn, EVENT_DEMAND)


cdef void leave_queue(Engine* e, Client* c) noexcept nogil:
    cdef Route* r = c.conn.route
    r.words[counters.ROUTE_WAIT_US] += e.now_us - c.conn.since_us
    observe(r.times + counters.TIME_WAIT * counters.HISTOGRAM_WORDS, e.now_us - c.conn.since_us)
    c.is_noticed = 0
    if r.unnoticed == &c.conn:
        r.unnoticed = c.conn.following
    move(e, &c.conn, &r.idle, CLIENT_IDLE)
    oldest_wait_gauge(r)


cdef bint is_alive(Server* s) noexcept nogil:
    """Whether a parked server may be handed out: nothing arrived that was not looked at."""
    cdef unsigned char byte
    return recv(s.conn.fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 and errno == EAGAIN


cdef inline bint is_alive_now(Engine* e, Client* c, Server* s) noexcept nogil:
    """The look costs a system call: it is for logins and for servers that stood for a while."""
    return (not c.flags & IN_SETUP and e.now_us - s.conn.since_us <= ATTACH_CHECK_US) or is_alive(s)


cdef void look_at_parked(Engine* e, Server* s) noexcept nogil:
    """Something arrived at a parked server: a notice is absorbed, anything else ends it."""
    server_read(e, s, e.parked_buffer + CHUNK, CHUNK)


cdef Server* take_parked(Engine* e, Client* c) noexcept nogil:
    """A parked server, the client's last one if it can be had, else the one parked last."""
    cdef Route* r = c.conn.route
    cdef Server* s = c.last_server
    while r.parked.head != NULL and r.pause == PAUSE_NONE:
        if (s == NULL or s.conn.generation != c.last_generation or s.conn.state != SERVER_PARKED
                or s.conn.route != r):
            s = <Server*> r.parked.head
        if s.conn.rx.left or s.conn.hold != NULL:
            server_close(e, s, REASON_SERVER_PROTOCOL)  # stopped inside a message
            s = NULL
            continue
        if (s.conn.flags & (IS_READABLE | IS_HUNG_UP)
                or (r.attach_check and not is_alive_now(e, c, s))):
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
    if c.conn.state == CLIENT_WAITING:
        leave_queue(e, c)
    else:
        r.times[counters.TIME_WAIT * counters.HISTOGRAM_WORDS] += 1
    move(e, &c.conn, &r.active_clients, CLIENT_ACTIVE)
    move(e, &s.conn, &r.active, SERVER_ACTIVE)
    servers_active_gauge(r)
    r.words[counters.ROUTE_ASSIGNMENTS] += 1
    c.server = s
    s.client = c
    s.uses += 1
    s.begin_us = e.now_us
    s.query_us = e.now_us
    s.flags &= ~<uint32_t> (HAS_ROLLED_BACK | HAS_DISCARDED | SYNC_SENT | CANCEL_ASKED | DEPLOY_FAILED
                            | PARSES_ANEW | ENDED_UNSEEN | AWAITS_TAG | HAS_PLACED | IS_CLEARED)
    c.flags &= ~<uint32_t> (HAS_SPOKEN | HAS_UNBOUND)
    if r.slow_us:
        slow_attached(e, c)
    if r.mode != MODE_SESSION:
        c.flags |= MAY_MEET_UNNAMED
    e.deploy_size = 0
    if not r.maintain_params:
        replace_params(e, &c.params, params_hold(s.params))
    elif c.flags & IN_SETUP:
        wants = params_merge(s.initial, c.params)
        if wants != NULL:
            replace_params(e, &c.params, wants)
    c.flags &= ~<uint32_t> NEEDS_DEPLOY
    if s.plans != r.plans:
        renew_copies(e, s)
    deploy_begin(e, c, s)


cdef void deploy_begin(Engine* e, Client* c, Server* s) noexcept nogil:
    """Leave in e.deploy what gives the server the client's parameters, if there is anything to give."""
    cdef Route* r = s.conn.route
    cdef int size
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
            c.flags &= ~<uint32_t> MAY_MEET_UNNAMED
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
    if c.is_noticed and not notice_served(e, c):
        client_leave(e, c, REASON_CLIENT_GONE)
        return
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
    if c.asked != NULL and not c.asked.is_measured:
        slow_forget(c)
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
    c.flags = (c.flags & ~<uint32_t> IN_SETUP) | IS_HELD
    if c.conn.route.maintain_params:
        c.startup = params_hold(c.params)
    c.wait_us = 0
    if c.conn.route.mode != MODE_SESSION:
        unbind(e, s)
    raise_event(e, &c.conn, EVENT_READY)
