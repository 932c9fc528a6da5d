"""A server without its client: brought back to a clean state, parked, given up or closed."""

from libc.stdint cimport uint32_t, uint8_t
from libc.stdlib cimport free, malloc

from gpooler.relay cimport counters
from gpooler.relay.frame cimport HEADER
from gpooler.relay.io cimport iovec
from gpooler.relay.params cimport (
    MAX_DEPLOY, ParamSet, params_deploy, params_empty, params_release, params_settle,
)
from gpooler.relay.reason cimport (
    REASON_SERVER_CLIENT_LEFT, REASON_SERVER_DIRTY_END, REASON_SERVER_LIFETIME, REASON_SERVER_LOST,
    REASON_SERVER_OBSOLETE, REASON_SERVER_OLD_PLAN, REASON_SERVER_PROTOCOL, REASON_SERVER_RECALLED,
    REASON_SERVER_RESET_FAILED,
)
from gpooler.relay.scanner cimport EFFECT_PARSE, EFFECT_PREPARE
from gpooler.relay.session cimport (
    OWNER_ASK, OWNER_DEPLOY, OWNER_RESET, session_free, session_frontend, session_is_idle, session_needs_sync,
    session_owner,
)
from gpooler.relay.system cimport SHUT_RDWR, pthread_mutex_lock, pthread_mutex_unlock, shutdown


cdef void own_query(Engine* e, Server* s, const unsigned char* text, uint32_t size) noexcept nogil:
    """A simple query of ours, `size` bytes with its NUL; the answer is swallowed."""
    cdef unsigned char header[HEADER]
    cdef iovec pieces[2]
    header[0] = c'Q'
    put_u32(header + 1, size + 4)
    pieces[0].iov_base = header
    pieces[0].iov_len = HEADER
    pieces[1].iov_base = <void*> text
    pieces[1].iov_len = size
    session_frontend(&s.session, c'Q', OWNER_RESET)
    if not conn_write(e, &s.conn, pieces, 2):
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
    cdef const char* rollback = b"ROLLBACK"
    cdef const char* all = b"DISCARD ALL"
    # It cannot be trusted any more.
    if (s.flags & (CLOSE_AT_END | RESET_FAILED) or s.session.is_uncertain or s.conn.rx.left
            or s.conn.hold != NULL):
        server_close(e, s, REASON_SERVER_RESET_FAILED if s.flags & RESET_FAILED
                     else REASON_SERVER_OLD_PLAN if s.flags & HAS_OLD_PLAN else REASON_SERVER_DIRTY_END)
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
    # It was one client's alone.
    if r.is_dedicated:
        server_close(e, s, REASON_SERVER_CLIENT_LEFT)
        return
    # A cancel request is under way and might hit the next client.
    if s.cancelling:
        enter_reset(e, s)
        return
    # In a transaction.
    if s.session.status != c'I':
        if s.flags & (HAS_ROLLED_BACK | HAS_DISCARDED) or not r.can_rollback:
            server_close(e, s, REASON_SERVER_RESET_FAILED)
            return
        enter_reset(e, s)
        s.flags |= HAS_ROLLED_BACK
        own_query(e, s, <const unsigned char*> rollback, 9)
        return
    # Dirty.
    if (s.flags & IS_DIRTY or s.pins) and r.discard != DISCARD_NEVER:
        if s.flags & HAS_DISCARDED:
            server_close(e, s, REASON_SERVER_RESET_FAILED)
            return
        enter_reset(e, s)
        s.flags |= HAS_DISCARDED
        r.words[counters.ROUTE_RESETS] += 1
        if r.keeps_copies and (s.flags & HAS_REAL_NAMES or s.pins & (EFFECT_PARSE | EFFECT_PREPARE)):
            copies_clear(&s.copies, &e.statements)
            own_query(e, s, <const unsigned char*> all, 12)
        else:
            own_query(e, s, r.discard_query.data, r.discard_query.size)
        if not r.resets_parameters and s.conn.state == SERVER_RESETTING:
            reset_deployed(e, s)
        return
    if s.touched_size:
        server_close(e, s, REASON_SERVER_DIRTY_END)     # nobody knows any more what its settings are
        return
    s.pins = 0
    s.ends = 0
    s.flags &= ~<uint32_t> (IS_DIRTY | NEEDS_CHECK)
    # PostgreSQL is closing it.
    if s.conn.flags & IS_HUNG_UP:
        server_close(e, s, REASON_SERVER_LOST)
        return
    # Servers of the route are being replaced, or are to be gone.
    if s.epoch < r.epoch or r.pause == PAUSE_CLOSE:
        server_close(e, s, REASON_SERVER_OBSOLETE)
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
        if s.conn.tls != NULL:
            server_close(e, s, REASON_SERVER_RECALLED)  # its session cannot move: the right to open does
        else:
            server_release(e, s)
        return
    # Park; the one parked last is used first.
    list_remove(&s.conn)
    list_prepend(&r.parked, &s.conn)
    s.conn.state = SERVER_PARKED
    s.conn.since_us = e.now_us
    # Somebody waits: more than one may be set up by the same server in turn.
    while r.waiting.head != NULL and s.conn.state == SERVER_PARKED and r.pause == PAUSE_NONE:
        note_wait(e, r)
        serve(e, <Client*> r.waiting.head, s)
    servers_active_gauge(r)


cdef void reset_deployed(Engine* e, Server* s) noexcept nogil:
    """Parameters that we deployed and PostgreSQL does not report: who knows whether the query reset them?"""
    cdef ParamSet* nothing = params_empty()
    cdef ParamSet* reported = NULL if nothing == NULL else params_settle(s.params, nothing)
    cdef unsigned char* text = <unsigned char*> malloc(MAX_DEPLOY)
    cdef int size = -1
    if reported != NULL and text != NULL:
        size = params_deploy(s.params, reported, text, MAX_DEPLOY)
    if size < 0:
        s.flags |= RESET_FAILED
    elif size:
        own_query(e, s, text, <uint32_t> size)
    free(text)
    params_release(reported)
    params_release(nothing)


cdef void reset_answered(Engine* e, Server* s) noexcept nogil:
    """One of our own statements was answered."""
    cdef ParamSet* nothing
    cdef ParamSet* same
    if s.flags & HAS_DISCARDED and not s.flags & RESET_FAILED:
        s.flags &= ~<uint32_t> (IS_DIRTY | NEEDS_CHECK | HAS_REAL_NAMES)
        s.pins = 0
        if s.touched_size and not s.conn.route.resets_parameters:
            s.flags |= CLOSE_AT_END         # nobody knows any more what its settings are
        untouch(s)
        if not s.conn.route.keeps_copies:
            copies_clear(&s.copies, &e.statements)
            s.flags &= ~<uint32_t> HAS_STRAY_COPIES
            if not s.conn.route.resets_parameters:
                s.flags |= HAS_STRAY_COPIES     # a query of the user's own
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
    if r.mode == MODE_SESSION and c.flags & HAS_SPOKEN or r.discard == DISCARD_ALWAYS or s.touched_size \
            or s.flags & NEEDS_CHECK:
        s.flags |= IS_DIRTY
    if session_owner(&s.session) == OWNER_DEPLOY:
        # What the deploy will have done is the client's, and nobody keeps account of it any more.
        s.flags |= CLOSE_AT_END if r.discard == DISCARD_NEVER or not r.resets_parameters else IS_DIRTY
    if c.conn.rx.left:
        s.flags |= HAS_CUT_MESSAGE
    resume_server(e, s)                 # not read while the client was slow
    if r.is_dedicated and (not is_patient or s.session.is_copy_out):
        server_close(e, s, REASON_SERVER_CLIENT_LEFT)
        return
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
        elif session_owner(&s.session) == OWNER_ASK and s.session.length == 1:
            pass                            # nothing of the client's runs
        elif session_owner(&s.session) == OWNER_DEPLOY and s.session.length > 1:
            s.flags |= CANCEL_AFTER_DEPLOY  # or it would hit the deploy, and what stands behind it run on
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
    want_cancel(e, s)


cdef void want_cancel(Engine* e, Server* s) noexcept nogil:
    """One more cancel request; two wishes that Python has not heard of yet are one event, and one request."""
    cdef bint is_wanted
    pthread_mutex_lock(&e.lock)
    is_wanted = (s.conn.event_bits & EVENT_CANCEL_WANTED) != 0
    pthread_mutex_unlock(&e.lock)
    if not is_wanted:
        s.cancelling += 1
        s.cancel_us = e.now_us
        raise_event(e, &s.conn, EVENT_CANCEL_WANTED)


cdef void cancel_again(Engine* e, Server* s) noexcept nogil:
    """PostgreSQL forgets a cancel that comes before it has begun: once more, a second later."""
    if s.cancel_us and not s.cancelling and e.now_us - s.cancel_us >= SWEEP_US:
        want_cancel(e, s)
        s.cancel_us = 0


cdef inline void count_for_recall(Route* r) noexcept nogil:
    """A slot that becomes free serves a recall as well."""
    if r.evict_due:
        r.evict_due -= 1
    elif r.recall_due:
        r.recall_due -= 1


cdef void server_release(Engine* e, Server* s) noexcept nogil:
    """Give a clean server up for another worker."""
    if s.copies.count:
        s.flags |= HAS_STRAY_COPIES     # the other one does not know them
    forget_copies(e, s)
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
        conn_send(e, &s.conn, <const unsigned char*> terminate, HEADER)
    conn_end(e, &s.conn)
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
    forget_copies(e, s)
    conn_unregister(e, &s.conn)
    conn_forget(e, &s.conn)
    shutdown(s.conn.fd, SHUT_RDWR)      # Python closes it: it may be sending it to a broker just now
    s.conn.fd = -1
    s.conn.state = SERVER_CLOSED
    servers_active_gauge(r)
    if c != NULL and c.asked != NULL:
        slow_stop(e, c, s)
    session_free(&s.session)
    untouch(s)
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
    if c.flags & AWAITS_DEPLOY and c.conn.hold != NULL:
        c.flags &= ~<uint32_t> (AWAITS_DEPLOY | IS_BLOCKED)     # nothing of its request went out
        move(e, &c.conn, &r.idle, CLIENT_IDLE)
        client_work(e, c)
        return
    if s.flags & ENDED_UNSEEN and is_boundary and c.request != NULL and put_back(e, c):
        move(e, &c.conn, &r.idle, CLIENT_IDLE)
        client_work(e, c)
        return
    if c.asked != NULL:
        slow_end(e, c)
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
