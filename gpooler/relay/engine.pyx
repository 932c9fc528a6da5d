"""The data plane; its design is engine.pxd.

One module in several files, so that the compiler sees all of it: each ``.pxi`` is a part, here are the
timers and the loop.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, malloc
from libc.string cimport memset

from gpooler.relay cimport counters
from gpooler.relay.io cimport CHUNK, READ_SIZE
from gpooler.relay.params cimport MAX_DEPLOY
from gpooler.relay.reason cimport (
    REASON_CLIENT_GONE, REASON_CLIENT_POOL_TIMEOUT, REASON_CLIENT_STALLED, REASON_CLIENT_TERMINATED,
    REASON_SERVER_IDLE, REASON_SERVER_LIFETIME, REASON_SERVER_RESET_TIMEOUT,
)
from gpooler.relay.session cimport OWNER_CLIENT, session_is_idle, session_owner
from gpooler.relay.system cimport (
    CLOCK_MONOTONIC, EFD_CLOEXEC, EFD_NONBLOCK, EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP,
    EPOLL_CLOEXEC, EPOLL_CTL_ADD, SIG_SETMASK, TFD_CLOEXEC, TFD_NONBLOCK, TFD_TIMER_ABSTIME, epoll_create1,
    epoll_ctl, epoll_event, epoll_wait, eventfd, itimerspec, pthread_mutex_init, pthread_sigmask, sigfillset,
    sigset_t, timerfd_create, timerfd_settime,
)

include "connection.pxi"
include "tls.pxi"
include "attach.pxi"
include "prepared.pxi"
include "settings.pxi"
include "again.pxi"
include "slow.pxi"
include "virtual.pxi"
include "client.pxi"
include "server.pxi"
include "release.pxi"
include "limits.pxi"
include "listing.pxi"
include "commands.pxi"
include "check.pxi"


cdef Engine* engine_new(uint64_t* process_words) noexcept:
    """NULL, with errno, when something cannot be had."""
    cdef epoll_event event
    cdef Engine* e = <Engine*> calloc(1, sizeof(Engine))
    if e == NULL:
        return NULL
    e.buffer = <unsigned char*> malloc(CHUNK + READ_SIZE)
    e.parked_buffer = <unsigned char*> malloc(2 * CHUNK)
    e.deploy = <unsigned char*> malloc(MAX_DEPLOY)
    e.texts = <unsigned char*> malloc(TEXT_RING)
    e.scratch = <unsigned char*> malloc(SCRATCH)
    e.settings = <unsigned char*> malloc(CHUNK)
    e.question = <unsigned char*> malloc(CHUNK)
    e.cipher = <unsigned char*> malloc(CIPHER)
    e.plain = <unsigned char*> malloc(RECORD)
    e.process_words = process_words
    e.epoll = epoll_create1(EPOLL_CLOEXEC)
    e.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    e.event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    e.timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)
    if (e.buffer == NULL or e.parked_buffer == NULL or e.deploy == NULL or e.texts == NULL
            or e.cipher == NULL or e.plain == NULL or e.scratch == NULL or e.settings == NULL
            or e.question == NULL
            or e.epoll < 0 or e.wake < 0 or e.event_fd < 0 or e.timer < 0):
        return NULL
    pthread_mutex_init(&e.lock, NULL)
    e.wake_conn.kind = KIND_WAKE
    e.wake_conn.fd = e.wake
    event.events = EPOLLIN | EPOLLET    # never read: each write, each expiry is an edge
    event.data.ptr = &e.wake_conn
    epoll_ctl(e.epoll, EPOLL_CTL_ADD, e.wake, &event)
    epoll_ctl(e.epoll, EPOLL_CTL_ADD, e.timer, &event)
    return e


# -- timers --------------------------------------------------------------------------------------------


cdef void set_timer(Engine* e) noexcept nogil:
    """Wake at the next deadline. A timeout of epoll_wait would be set up and taken down at each call."""
    cdef itimerspec at
    e.timer_us = e.next_deadline_us
    memset(&at, 0, sizeof(at))
    at.it_value.tv_sec = <long> (e.timer_us // 1000000)
    at.it_value.tv_nsec = <long> (e.timer_us % 1000000 * 1000)
    timerfd_settime(e.timer, TFD_TIMER_ABSTIME, &at, NULL)


cdef void expire(Engine* e) noexcept nogil:
    """What is due now; sets the next deadline."""
    cdef Route* r = e.routes
    cdef Conn* at
    cdef Conn* following
    cdef Server* s
    cdef Client* c
    cdef uint64_t limit
    e.next_deadline_us = e.next_sweep_us
    gather_timeout(e)
    while r != NULL:
        if r.has_demand and r.waiting.head == NULL:
            limit = r.last_wait_us + CALM_US
            if e.now_us >= limit:
                r.has_demand = 0
                raise_event(e, &r.conn, EVENT_CALM)
            else:
                deadline(e, limit)
        if r.has_notices:
            notice_waiting(e, r)
        if r.pool_timeout_us and r.pause == PAUSE_NONE:
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
                if (not s.flags & CANCEL_ASKED and not session_is_idle(&s.session)
                        and session_owner(&s.session) == OWNER_CLIENT):
                    # what its client asked for before it said goodbye: half of the time is left
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
    tls_slim_quiet(e)
    while r != NULL:
        if r.ended_us:
            drop_all(e, r)
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
            cancel_again(e, s)
            if has_ended(c):
                probe(e, c)
            elif ((c.conn.rx.left or c.conn.hold != NULL) and r.mode != MODE_SESSION
                    and s.session.status == c'I' and not s.session.is_copy_in and not s.pins
                    and s.conn.out.size == 0 and not c.conn.flags & IS_READABLE
                    and r.login_timeout_us and e.now_us - c.request_us >= r.login_timeout_us
                    and (s.session.length == 0
                         or s.session.length == 1 and s.session.points[s.session.head].count == 1)):
                client_leave(e, c, REASON_CLIENT_STALLED)
            at = following
        at = r.resetting.head
        while at != NULL:
            cancel_again(e, <Server*> at)
            at = at.following
        at = r.waiting.head
        while at != NULL:
            following = at.following
            if has_ended(<Client*> at):
                probe(e, <Client*> at)
            at = following
        at = r.closing.head
        while at != NULL:
            s = <Server*> at
            if s.deadline_us and e.now_us >= s.deadline_us:
                s.deadline_us = 0
                s.flags &= ~<uint32_t> CANCEL_ASKED     # once more, or for the first time after a Terminate
                if not session_is_idle(&s.session) and r.can_cancel:
                    ask_cancel(e, s)
                raise_event(e, at, EVENT_STUCK)
            at = at.following
        limit_clients(e, r)
        r = r.next


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


cdef bint has_ended(Client* c) noexcept nogil:
    """Whether a client has said all, as far as it can be known before it is read to its end."""
    if c.conn.flags & IS_HUNG_UP and not c.flags & IS_TERMINATED and not can_read_client(c):
        c.flags |= IS_HALF_CLOSED
    return (c.flags & (IS_HALF_CLOSED | IS_TERMINATED)) != 0


cdef void hung_up(Engine* e, Client* c) noexcept nogil:
    """The connection is dead, but a Terminate may still stand unread before its end."""
    if can_read_client(c):
        client_readable(e, c)
        if c.conn.state == CLIENT_CLOSED:
            return
        if c.flags & IS_TERMINATED:
            client_leave(e, c, REASON_CLIENT_TERMINATED)
            return
    c.flags &= ~<uint32_t> IS_HALF_CLOSED
    client_leave(e, c, REASON_CLIENT_GONE)


cdef void run_ready(Engine* e) noexcept nogil:
    """One turn for those on the list; who puts itself there again waits for a look at the others."""
    cdef Conn* conn = NULL
    cdef Conn* last = e.ready_tail
    cdef int turns = 0
    while e.ready_head != NULL and conn != last and turns < MAX_EVENTS:
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
        conn.since_us = e.now_us
        is_released = conn.kind == KIND_SERVER and conn.state == SERVER_RELEASED
        raise_bits(e, conn, EVENT_RELEASED if is_released else EVENT_CLOSED,
                   conn.kind == KIND_CLIENT and e.has_quiet_ends)


cdef void engine_run(Engine* e) noexcept nogil:
    cdef epoll_event events[MAX_EVENTS]
    cdef sigset_t signals
    cdef Conn* conn
    cdef int count, i
    cdef bint is_idle
    sigfillset(&signals)
    pthread_sigmask(SIG_SETMASK, &signals, NULL)
    e.now_us = clock_us()
    e.next_sweep_us = e.now_us + SWEEP_US
    e.next_deadline_us = e.next_sweep_us
    while not e.is_stopping:
        if e.quiet_since_us:
            deadline(e, e.now_us + QUIET_US)
        is_idle = e.ready_head == NULL
        if is_idle and (e.next_deadline_us < e.timer_us or e.timer_us <= e.now_us):
            set_timer(e)
        count = epoll_wait(e.epoll, events, MAX_EVENTS, -1 if is_idle else 0)
        e.now_us = clock_us()
        e.process_words[counters.PROCESS_RELAY_BEAT] += 1
        # Servers first: they free what clients of the same round need, and say who is dead.
        for i in range(count):
            conn = <Conn*> events[i].data.ptr
            if conn.kind == KIND_SERVER:
                on_event(e, conn, events[i].events)
        # Then commands: a client whose first bytes came in this round may still have to be adopted.
        if e.commands_head != NULL:
            run_commands(e)
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
        if GPOOLER_IS_CHECKED:
            check_round(e)
        if e.closed_head != NULL:
            finish_round(e)
        if e.quiet_since_us:
            end_quiet(e)
