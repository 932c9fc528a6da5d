"""What must hold at the end of every round. Compiled in by GPOOLER_DEBUG alone; a breach ends the process."""

from libc.stdint cimport uint32_t
from libc.stdio cimport fprintf, stderr
from libc.stdlib cimport abort

from gpooler.relay cimport counters
from gpooler.relay.io cimport CHUNK
from gpooler.relay.scanner cimport EFFECT_SESSION
from gpooler.relay.session cimport OWNER_ASK, session_awaits_ready, session_is_idle, session_owner

cdef extern from *:
    """
    #ifdef GPOOLER_DEBUG
    #define GPOOLER_IS_CHECKED 1
    #else
    #define GPOOLER_IS_CHECKED 0
    #endif
    """
    const bint GPOOLER_IS_CHECKED

cdef enum:
    CHECKED_MOST = 256              # connections of a route that are looked at in every round
    CHECKED_SELDOM = 64             # of these rounds one, where there are more


cdef void check(bint holds, Conn* conn, const char* what) noexcept nogil:
    if not holds:
        fprintf(stderr, "relay: %s (kind %d, state %d, flags %d, id %llx)\n", what, conn.kind, conn.state,
                conn.flags, <unsigned long long> conn.id)
        abort()


cdef void check_list(Engine* e, Route* r, List* lst, uint8_t kind, uint8_t state) noexcept nogil:
    """Being in a state is being in its list."""
    cdef Conn* at = lst.head
    cdef Conn* previous = NULL
    cdef uint32_t count = 0
    while at != NULL:
        check(at.previous == previous and at.list == lst and at.route == r, at, "is not where its list says")
        check(at.kind == kind and at.state == state, at, "is in the list of another state")
        check(at.fd >= 0, at, "is closed and in a list")
        check(at.out.size == 0 or at.flags & IS_OUT_ARMED != 0, at, "has bytes to send and waits for no room")
        check_held(at, at.hold)
        if at.flags & IS_GATHERING:
            check(is_gathering(e, at), at, "gathers and nobody looks after it")
        if kind == KIND_CLIENT:
            check_client(<Client*> at)
        else:
            check_server(<Server*> at)
        previous = at
        at = at.following
        count += 1
    check(lst.tail == previous and lst.count == count, &r.conn, "has a list that counts wrong")
    check(lst.gauge == NULL or lst.gauge[0] == count, &r.conn, "has a gauge that is not its list's length")


cdef void check_held(Conn* conn, Chunk* held) noexcept nogil:
    check(held == NULL or held.start < held.end <= CHUNK, conn, "holds no bytes, or too many")


cdef bint is_gathering(Engine* e, Conn* conn) noexcept nogil:
    cdef int i
    for i in range(e.gathering_count):
        if e.gathering[i] == conn:
            return True
    return False


cdef void check_gathering(Engine* e) noexcept nogil:
    """Those that do not wake the relay for every byte have a time when they are read."""
    cdef Conn* conn
    cdef int i, k
    for i in range(e.gathering_count):
        conn = e.gathering[i]
        check(conn.flags & IS_GATHERING and conn.fd >= 0 and conn.gather_us, conn,
              "is to gather and does not")
        for k in range(i):
            check(e.gathering[k] != conn, conn, "is to gather twice")


cdef void check_unnoticed(Route* r) noexcept nogil:
    """In the queue, who comes before the first that was not told that it waits was told so."""
    cdef Conn* at = r.waiting.head
    check(r.unnoticed == NULL or r.unnoticed.list == &r.waiting, &r.conn,
          "is about to tell one that does not wait")
    while at != r.unnoticed:
        check((<Client*> at).is_noticed or (<Client*> at).flags & IN_SETUP, at,
              "was passed over by the notices")
        at = at.following


cdef void check_client(Client* c) noexcept nogil:
    cdef Server* s = c.server
    cdef Route* r = c.conn.route
    cdef bint has_startup = c.startup != NULL
    cdef bint is_logged_in
    check((s != NULL) == (c.conn.state == CLIENT_ACTIVE), &c.conn, "has a server in a state without one")
    if s != NULL:
        check(s.client == c and s.conn.state == SERVER_ACTIVE, &c.conn, "has a server that is not its own")
    check(not c.is_noticed or c.conn.state == CLIENT_WAITING, &c.conn, "was told that it waits and does not")
    check(c.prepared == NULL or r.has_prepared, &c.conn, "has names that cannot go with it")
    check(not c.flags & CLOSE_WHEN_SENT or c.conn.state == CLIENT_LEAVING or c.conn.inject != NULL, &c.conn,
          "is about to be closed and goes on")
    if c.conn.state == CLIENT_LEAVING:
        return
    check(c.params != NULL, &c.conn, "has no parameters")
    is_logged_in = not c.flags & IN_SETUP
    check(has_startup == (is_logged_in and r.maintain_params != 0), &c.conn,
          "has not the parameters that it began with")
    check(c.conn.state != CLIENT_WAITING or c.wait_us and (c.conn.hold != NULL or c.flags & IN_SETUP),
          &c.conn, "waits for nothing")
    check(not c.flags & TEXT_THEN_SKIP or c.flags & IS_HELD, &c.conn, "is refused a request and read on")
    check(not c.flags & AWAITS_DEPLOY or s != NULL and c.flags & IS_BLOCKED and c.conn.hold != NULL, &c.conn,
          "awaits a deploy that is not under way")
    check(not c.flags & IS_BLOCKED or c.flags & AWAITS_DEPLOY
          or s != NULL and (session_awaits_ready(&s.session) or s.cancelling), &c.conn,
          "waits for answers that may never come")
    check(not c.flags & (IS_SCANNING | IS_DROPPING) or c.conn.rx.left, &c.conn, "is inside of no message")
    check(not c.flags & HAS_FAILED or c.flags & HAS_BEGUN, &c.conn, "failed without a BEGIN")
    check(not c.flags & HAS_BEGUN or r.defers_begin and (s == NULL or c.flags & AWAITS_DEPLOY), &c.conn,
          "has a server that does not know of its BEGIN")
    check(not c.flags & HAS_BARE_NAME or r.adds_host, &c.conn, "is to get its host where none is added")
    check_held(&c.conn, c.request)
    check(c.request == NULL or s != NULL and r.mode != MODE_SESSION, &c.conn,
          "has a request to be sent again, and no server that has it")


cdef void check_server(Server* s) noexcept nogil:
    cdef Client* c = s.client
    check((c != NULL) == (s.conn.state == SERVER_ACTIVE), &s.conn, "has a client in a state without one")
    if c != NULL:
        check(c.server == s and c.conn.state == CLIENT_ACTIVE, &s.conn, "has a client that is not its own")
        check(not s.flags & PARSES_ANEW or c.request != NULL and c.flags & IS_BLOCKED, &s.conn,
              "is to parse anew what nobody sends again")
    if s.conn.state == SERVER_CLOSING:
        return
    check(s.asked_size <= s.touched_size <= MAX_TOUCHED and (s.touched != NULL or not s.touched_size),
          &s.conn, "has settings in doubt that are not there")
    check(not s.flags & (HAS_RESETS | TOUCHED_FAILED) or s.touched_size, &s.conn, "is in doubt about nothing")
    check(not (s.asked or s.asked_size) or session_owner(&s.session) == OWNER_ASK, &s.conn,
          "has no question under way and expects an answer")
    check(not (s.pins | s.ends | s.asked) & ~EFFECT_SESSION, &s.conn, "is pinned by what does not pin")
    check(s.conn.route.has_prepared or not s.copies.count and s.changes.head == NULL, &s.conn,
          "has copies of statements that do not go with clients")
    check(s.conn.state != SERVER_RESETTING or s.deadline_us, &s.conn, "may reset for ever")
    if s.conn.state == SERVER_PARKED:
        check(not s.touched_size and s.changes.head == NULL and not s.flags & NEEDS_CHECK, &s.conn,
              "is parked and not known")
        check(session_is_idle(&s.session) and s.session.status == c'I', &s.conn, "is parked and not idle")
        check(not s.conn.flags & IS_GATHERING, &s.conn, "is parked and gathers")
        check(not s.pins and not s.cancelling and not s.flags & (IS_DIRTY | CLOSE_AT_END), &s.conn,
              "is parked and not clean")


cdef void check_round(Engine* e) noexcept nogil:
    cdef Route* r = e.routes
    check_gathering(e)
    while r != NULL:
        if (r.idle.count + r.active_clients.count + r.waiting.count <= CHECKED_MOST
                or e.process_words[counters.PROCESS_RELAY_BEAT] % CHECKED_SELDOM == 0):
            check_list(e, r, &r.idle, KIND_CLIENT, CLIENT_IDLE)
            check_list(e, r, &r.waiting, KIND_CLIENT, CLIENT_WAITING)
            check_list(e, r, &r.active_clients, KIND_CLIENT, CLIENT_ACTIVE)
            check_list(e, r, &r.leaving, KIND_CLIENT, CLIENT_LEAVING)
            check_unnoticed(r)
            check_list(e, r, &r.parked, KIND_SERVER, SERVER_PARKED)
            check_list(e, r, &r.active, KIND_SERVER, SERVER_ACTIVE)
            check_list(e, r, &r.resetting, KIND_SERVER, SERVER_RESETTING)
            check_list(e, r, &r.closing, KIND_SERVER, SERVER_CLOSING)
            check(r.waiting.head == NULL or r.parked.head == NULL or r.pause != PAUSE_NONE, &r.conn,
                  "lets clients wait while a server is parked")
        r = r.next
