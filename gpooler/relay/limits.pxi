"""What clients may take: limits that are looked at once a second, and notices for those who wait."""

from libc.stdint cimport uint32_t, uint64_t, uint8_t

from gpooler.relay.frame cimport HEADER
from gpooler.relay.io cimport iovec
from gpooler.relay.reason cimport (
    REASON_CLIENT_GONE, REASON_CLIENT_IDLE, REASON_CLIENT_IDLE_IN_TRANSACTION, REASON_CLIENT_QUERY_TIMEOUT,
    REASON_CLIENT_TRANSACTION_TIMEOUT, REASON_NONE,
)
from gpooler.relay.session cimport session_is_idle
from gpooler.relay.system cimport SIOCOUTQ, ioctl


# -- limits --------------------------------------------------------------------------------------------


cdef void limit_clients(Engine* e, Route* r) noexcept nogil:
    cdef Conn* at
    cdef Conn* following
    cdef Client* c
    cdef uint8_t reason
    if r.idle_timeout_us:
        limit_idle(e, r)
    elif not (r.idle_in_transaction_us or r.query_timeout_us or r.transaction_timeout_us):
        return
    at = r.active.head
    while at != NULL:
        following = at.following
        c = (<Server*> at).client
        reason = passed_limit(e, r, <Server*> at, c)
        if reason != REASON_NONE:
            part_with_text(e, c, reason)
        at = following


cdef void limit_idle(Engine* e, Route* r) noexcept nogil:
    """Clients without a server: the list is in order of time, the first young one ends the search."""
    cdef Conn* at = r.idle.head
    cdef Conn* following
    cdef Client* c
    while at != NULL and e.now_us - at.since_us >= r.idle_timeout_us:
        following = at.following
        c = <Client*> at
        if is_resting(c) and e.now_us - c.request_us >= r.idle_timeout_us:
            if is_unread(at):
                move(e, at, &r.idle, CLIENT_IDLE)
            else:
                want_text(e, c, REASON_CLIENT_IDLE)
        at = following


cdef uint8_t passed_limit(Engine* e, Route* r, Server* s, Client* c) noexcept nogil:
    """The limit that a client with a server has passed, as a Reason; REASON_NONE is none."""
    cdef bint is_idle = session_is_idle(&s.session)
    cdef bint is_outside = s.session.status == c'I'
    cdef uint64_t limit, since
    if c.flags & (IN_SETUP | IS_HELD):
        return REASON_NONE
    if (r.query_timeout_us and (s.session.length or s.session.due or s.session.is_copy_in)
            and e.now_us - s.query_us >= r.query_timeout_us):
        return REASON_CLIENT_QUERY_TIMEOUT
    if (r.transaction_timeout_us and not (is_idle and is_outside)
            and e.now_us - s.begin_us >= r.transaction_timeout_us):
        return REASON_CLIENT_TRANSACTION_TIMEOUT
    if not is_idle or not is_resting(c) or s.conn.rx.left or s.conn.hold != NULL:
        return REASON_NONE
    limit = r.idle_timeout_us if is_outside else r.idle_in_transaction_us
    if not is_outside and (c.conn.rx.left or c.conn.hold != NULL):
        return REASON_NONE                  # a request is on its way
    since = s.query_us if s.query_us > c.request_us else c.request_us
    if limit == 0 or e.now_us - since < limit:
        return REASON_NONE
    if is_unread(&c.conn):
        c.request_us = e.now_us
        return REASON_NONE
    return REASON_CLIENT_IDLE if is_outside else REASON_CLIENT_IDLE_IN_TRANSACTION


cdef inline bint is_resting(Client* c) noexcept nogil:
    """Nothing is under way to it or from it, as far as the relay knows."""
    return not (c.flags & (IN_SETUP | IS_HELD | IS_BLOCKED | IS_TERMINATED | IS_HALF_CLOSED)
                or c.conn.flags & IS_READABLE or c.conn.out.size)


cdef bint is_unread(Conn* conn) noexcept nogil:
    """Whether the kernel still has bytes for it: it reads slowly. For those alone who are to be closed."""
    cdef int size = 0
    return ioctl(conn.fd, SIOCOUTQ, &size) == 0 and size > 0


# -- notices -------------------------------------------------------------------------------------------

# Who waits for a server stands at a message boundary: nothing is sent to it by anybody else. A client in its
# login gets none: libpq may take a notice there for an answer that it does not expect.


cdef void notice_waiting(Engine* e, Route* r) noexcept nogil:
    """Tell those who wait for long, each once."""
    cdef Client* c = <Client*> r.unnoticed
    while c != NULL:
        if not (c.is_noticed or c.flags & IN_SETUP):
            if e.now_us < c.conn.since_us + r.notice_after_us:
                deadline(e, c.conn.since_us + r.notice_after_us)
                return
            c.is_noticed = 1
            r.unnoticed = c.conn.following
            if not conn_send(e, &c.conn, r.notice_waiting.data, r.notice_waiting.size):
                client_leave(e, c, REASON_CLIENT_GONE)
        else:
            r.unnoticed = c.conn.following
        c = <Client*> r.unnoticed


cdef bint notice_served(Engine* e, Client* c) noexcept nogil:
    """Tell a client that was told of its wait how long it was. False: it is gone."""
    cdef Route* r = c.conn.route
    cdef unsigned char header[HEADER]
    cdef unsigned char digits[20]
    cdef iovec pieces[4]
    cdef uint32_t first = sizeof(digits)
    cdef uint64_t rest = (e.now_us - c.conn.since_us) // 1000
    while True:
        first -= 1
        digits[first] = <unsigned char> (c'0' + rest % 10)
        rest //= 10
        if rest == 0:
            break
    pieces[0].iov_base = header
    pieces[0].iov_len = HEADER
    pieces[1].iov_base = r.notice_served.data
    pieces[1].iov_len = r.notice_served.size
    pieces[2].iov_base = digits + first
    pieces[2].iov_len = sizeof(digits) - first
    pieces[3].iov_base = r.notice_served_end.data
    pieces[3].iov_len = r.notice_served_end.size
    header[0] = c'N'
    put_u32(header + 1, <uint32_t> (4 + pieces[1].iov_len + pieces[2].iov_len + pieces[3].iov_len))
    return conn_write(e, &c.conn, pieces, 4)
