"""A request that is sent once more, unseen, where it provably did nothing.

While nothing of the answer has reached the client, a copy of what it sent outside of a transaction is kept, a
chunk at most. It goes out again in two cases, and only once:

* the server's only answer is FATAL 57P01, 57P02 or 57P03 (it was shut down, crashed, or starts): to another
  server. A connection that ends without that may have done everything, and is told to the client;
* "cached plan must not change result type" about statements of the protocol: to the same server, which parses
  them anew. Where that cannot be, the error is the client's; the copies on all servers are parsed anew.
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcmp, memcpy

from gpooler.relay.io cimport CHUNK, chunk_give, chunk_take
from gpooler.relay.prepared cimport copies_clear
from gpooler.relay.session cimport POINT_SYNC, session_is_idle


cdef inline bint can_be_sent_again(Client* c, Server* s) noexcept nogil:
    """Whether what the client sends now is the beginning, or more, of a request outside of a transaction."""
    if c.conn.route.mode == MODE_SESSION or c.flags & SENT_AGAIN:
        return False
    if c.request != NULL:
        return True
    return session_is_idle(&s.session) and s.session.status == c'I' and c.conn.rx.left == 0


cdef void drop_request(Engine* e, Client* c) noexcept nogil:
    """The answer has begun, or the request is too long: it will not be sent again."""
    if c.request != NULL:
        chunk_give(&e.pool, c.request)
        c.request = NULL
    c.flags &= ~<uint32_t> (SENT_AGAIN | HAS_NEW_NAMES)


cdef void keep_request(Engine* e, Client* c, unsigned char* p) noexcept nogil:
    """The client's bytes up to `p` go to its server now."""
    cdef size_t size = p - e.copy_from
    if size == 0:
        return
    if c.request == NULL:
        c.request = chunk_take(&e.pool)
        if c.request == NULL:
            e.copy_from = NULL
            return
        c.request.start = 0
        c.request.end = 0
    if size > CHUNK - c.request.end:
        drop_request(e, c)
        e.copy_from = NULL
        return
    memcpy(c.request.data + c.request.end, e.copy_from, size)
    c.request.end += <uint32_t> size
    e.copy_from = p


cdef bint is_shutdown(const unsigned char* body, size_t size) noexcept nogil:
    """Whether an ErrorResponse says that the server ends by command, crash or because it is not ready."""
    cdef size_t at = 0
    cdef bint is_fatal = False
    while at < size and body[at]:
        if body[at] == c'V' and size - at > 6 and memcmp(body + at + 1, b"FATAL", 6) == 0:
            is_fatal = True
        elif body[at] == c'C' and size - at > 6 and memcmp(body + at + 1, b"57P0", 4) == 0:
            return is_fatal and c'1' <= body[at + 5] <= c'3'
        while at < size and body[at]:
            at += 1
        at += 1
    return False


cdef bint is_for_again(Engine* e, Server* s, Client* c, const unsigned char* body,
                       size_t size) noexcept nogil:
    """An ErrorResponse is the first answer to the client's request: whether it is sent again instead."""
    if is_shutdown(body, size):
        s.flags |= ENDED_UNSEEN
        return True
    if not c.conn.route.has_prepared or not is_old_plan(body, size):
        return False
    if (c.flags & (HAS_NEW_NAMES | IS_BLOCKED) or c.conn.hold != NULL or c.conn.rx.left
            or s.session.length != 1 or s.session.points[s.session.head].kind != POINT_SYNC
            or s.session.points[s.session.head].count != 1 or s.session.tail):
        return False
    s.flags |= PARSES_ANEW
    s.conn.route.plans += 1                 # what other servers have parsed is out of date, too
    c.flags |= IS_BLOCKED                   # nothing may overtake it
    return True


cdef void renew_copies(Engine* e, Server* s) noexcept nogil:
    """Its statements are parsed anew as they are needed."""
    copies_clear(&s.copies, &e.statements)
    s.flags |= HAS_STRAY_COPIES
    s.plans = s.conn.route.plans


cdef bint put_back(Engine* e, Client* c) noexcept nogil:
    """The request stands before what the client's next bytes are. False: there is no room."""
    cdef uint32_t size = c.request.end, held
    if c.conn.hold != NULL:
        if size + c.conn.hold.end - c.conn.hold.start > CHUNK:
            return False
        held = c.conn.hold.end - c.conn.hold.start
        memcpy(c.request.data + size, c.conn.hold.data + c.conn.hold.start, held)
        c.request.end += held
        chunk_give(&e.pool, c.conn.hold)
    c.conn.hold = c.request
    c.request = NULL
    c.conn.rx.left = 0
    c.flags &= ~<uint32_t> (IS_SCANNING | IS_DROPPING | IS_BLOCKED | AWAITS_DEPLOY | HAS_NEW_NAMES
                            | HAS_UNBOUND)
    c.flags |= SENT_AGAIN
    return True


cdef void parse_anew(Engine* e, Server* s, Client* c) noexcept nogil:
    """The answer to what ran into an old plan was swallowed up to its end."""
    s.flags &= ~<uint32_t> PARSES_ANEW
    renew_copies(e, s)
    put_back(e, c)                          # (nothing is held)
    client_work(e, c)
