"""What must hold at the end of every round. Compiled in by GPOOLER_DEBUG alone; a breach ends the process."""

from libc.stdint cimport uint32_t
from libc.stdio cimport fprintf, stderr
from libc.stdlib cimport abort

from gpooler.relay cimport counters
from gpooler.relay.session cimport session_is_idle

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


cdef void check_list(Route* r, List* lst, uint8_t kind, uint8_t state) noexcept nogil:
    """Being in a state is being in its list."""
    cdef Conn* at = lst.head
    cdef Conn* previous = NULL
    cdef uint32_t count = 0
    while at != NULL:
        check(at.previous == previous and at.list == lst and at.route == r, at, "is not where its list says")
        check(at.kind == kind and at.state == state, at, "is in the list of another state")
        check(at.fd >= 0, at, "is closed and in a list")
        check(at.out.size == 0 or at.flags & IS_OUT_ARMED != 0, at, "has bytes to send and waits for no room")
        if kind == KIND_CLIENT:
            check_client(<Client*> at)
        else:
            check_server(<Server*> at)
        previous = at
        at = at.following
        count += 1
    check(lst.tail == previous and lst.count == count, &r.conn, "has a list that counts wrong")
    check(lst.gauge == NULL or lst.gauge[0] == count, &r.conn, "has a gauge that is not its list's length")


cdef void check_client(Client* c) noexcept nogil:
    cdef Server* s = c.server
    check((s != NULL) == (c.conn.state == CLIENT_ACTIVE), &c.conn, "has a server in a state without one")
    if s != NULL:
        check(s.client == c and s.conn.state == SERVER_ACTIVE, &c.conn, "has a server that is not its own")


cdef void check_server(Server* s) noexcept nogil:
    cdef Client* c = s.client
    check((c != NULL) == (s.conn.state == SERVER_ACTIVE), &s.conn, "has a client in a state without one")
    if c != NULL:
        check(c.server == s and c.conn.state == CLIENT_ACTIVE, &s.conn, "has a client that is not its own")
    if s.conn.state == SERVER_PARKED:
        check(session_is_idle(&s.session) and s.session.status == c'I', &s.conn, "is parked and not idle")
        check(not s.conn.flags & IS_GATHERING, &s.conn, "is parked and gathers")
        check(not s.pins and not s.cancelling and not s.flags & (IS_DIRTY | CLOSE_AT_END), &s.conn,
              "is parked and not clean")


cdef void check_round(Engine* e) noexcept nogil:
    cdef Route* r = e.routes
    while r != NULL:
        if (r.idle.count + r.active_clients.count + r.waiting.count <= CHECKED_MOST
                or e.process_words[counters.PROCESS_RELAY_BEAT] % CHECKED_SELDOM == 0):
            check_list(r, &r.idle, KIND_CLIENT, CLIENT_IDLE)
            check_list(r, &r.waiting, KIND_CLIENT, CLIENT_WAITING)
            check_list(r, &r.active_clients, KIND_CLIENT, CLIENT_ACTIVE)
            check_list(r, &r.leaving, KIND_CLIENT, CLIENT_LEAVING)
            check(r.unnoticed == NULL or r.unnoticed.list == &r.waiting, &r.conn,
                  "is about to tell one that does not wait")
            check_list(r, &r.parked, KIND_SERVER, SERVER_PARKED)
            check_list(r, &r.active, KIND_SERVER, SERVER_ACTIVE)
            check_list(r, &r.resetting, KIND_SERVER, SERVER_RESETTING)
            check_list(r, &r.closing, KIND_SERVER, SERVER_CLOSING)
            check(r.waiting.head == NULL or r.parked.head == NULL, &r.conn,
                  "lets clients wait while a server is parked")
        r = r.next
