"""The slow-request log (log_slow_ms): where the time of a request went, and the beginning of its text.

A request is what ends with a ReadyForQuery of the client's own: a Query, a FunctionCall, or extended messages
up to their Sync. Times are those of the rounds in which something was seen, no clock is asked:

* wait: from its arrival until it went out, where it waited for a server, or for the server's parameters;
* server: until its ReadyForQuery was read; behind another request of a pipeline from that one's answer on;
* send: as long as bytes of the answer were queued here because the client did not take them.

What a client has asked for is numbered by its sync points. Which of them is answered is known from how many
are left in the session, because those that PostgreSQL skips go without an answer.
"""

from libc.stdint cimport uint32_t, uint64_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcpy, memset

from gpooler.relay.frame cimport HEADER
from gpooler.relay.session cimport (
    OWNER_CLIENT, POINT_CALL, POINT_QUERY, POINT_SYNC, Point, Session, session_is_idle, session_owner,
)


cdef enum:
    COUNTED_RUNS = 32               # of sync points: in a pipeline of more texts are not told apart
    UNKNOWN = 0xffffffff


cdef uint32_t points_left(Session* session) noexcept nogil:
    """How many of the client's sync points are not answered; UNKNOWN where that is not certain."""
    cdef uint32_t i, count = 0
    cdef Point* point
    if session.length > COUNTED_RUNS or session.is_uncertain or session.swallowed:
        return UNKNOWN
    for i in range(session.length):
        point = &session.points[(session.head + i) & (session.capacity - 1)]
        if point.owner == OWNER_CLIENT and (point.kind == POINT_QUERY or point.kind == POINT_SYNC
                                            or point.kind == POINT_CALL):
            count += point.count
    return count


cdef Asked* slow_new(Client* c) noexcept nogil:
    """NULL without memory: then nothing is told."""
    if c.asked == NULL:
        c.asked = <Asked*> malloc(sizeof(Asked))
        slow_clear(c.asked)
    return c.asked


cdef void slow_clear(Asked* asked) noexcept nogil:
    cdef int i
    if asked == NULL:
        return
    memset(asked, 0, sizeof(Asked) - sizeof(asked.texts))
    for i in range(ASKED_TEXTS):
        asked.texts[i].number = 0


cdef void slow_forget(Client* c) noexcept nogil:
    if c.asked != NULL:
        free(c.asked)
        c.asked = NULL


cdef void slow_attached(Engine* e, Client* c) noexcept nogil:
    """The client got a server for a request, which has waited, or waits from now on for a deploy."""
    slow_clear(c.asked)
    if not c.flags & IN_SETUP and slow_new(c) != NULL:
        c.asked.came_us = c.wait_us if c.wait_us else e.now_us


cdef void slow_message(Engine* e, Client* c, Server* s, unsigned char* p, unsigned char* end,
                       uint32_t length) noexcept nogil:
    """A message stands before its way to the server. It may be seen again, if it has to wait."""
    cdef Asked* asked
    cdef uint8_t kind = p[0]
    cdef unsigned char* text = p + HEADER
    cdef size_t size
    cdef bint is_whole = <size_t> (end - p) > length
    if not (is_request(kind) or kind == c'S') or s.session.is_copy_in:
        return
    asked = slow_new(c)
    if asked == NULL:
        return
    if not asked.is_open and (asked.sent_us == 0 or points_left(&s.session) == 0):
        asked.sent_us = e.now_us
    if kind != c'Q' and kind != c'P':
        return
    size = min_size(length - 4, end - text)
    if kind == c'P':
        text = <unsigned char*> memchr(text, 0, size)
        if text == NULL:
            return
        text += 1
        size -= text - (p + HEADER)
    slow_text(asked, text, size, length - 4 - <uint32_t> (text - (p + HEADER)) if not is_whole else 0)


cdef void slow_text(Asked* asked, const unsigned char* text, size_t size, uint32_t whole) noexcept nogil:
    """Note the text, up to a NUL, of the request that goes out: the first of several.

    ``whole``: how long it is where not all of it is here, else 0.
    """
    cdef AskedText* slot = &asked.texts[(asked.count + 1) % ASKED_TEXTS]
    cdef const unsigned char* stop
    if asked.is_open and slot.number == asked.count + 1:
        return
    stop = <const unsigned char*> memchr(text, 0, size)
    if stop != NULL:
        size = stop - text
        whole = 0
    slot.number = asked.count + 1
    slot.whole = whole if whole else <uint32_t> size
    slot.head = <uint32_t> min_size(size, ASKED_TEXT)
    slot.tail = 0
    if size > ASKED_TEXT:
        # a comment with the trace stands at the end
        slot.head = ASKED_TEXT // 2
        slot.tail = 0 if whole else ASKED_TEXT // 2
        memcpy(slot.text + slot.head, text + size - slot.tail, slot.tail)
    memcpy(slot.text, text, slot.head)


cdef void slow_counted(Client* c, Server* s, uint8_t kind) noexcept nogil:
    """A message went to the server: ``session_frontend`` has seen it."""
    cdef Asked* asked = c.asked
    if s.session.is_copy_in:
        return
    if kind == c'S' or (kind == c'Q' or kind == c'F') and not s.session.is_skipping:
        asked.count += 1
        asked.is_open = False
    elif is_request(kind):
        asked.is_open = True


cdef void slow_measured(Engine* e, Client* c, Server* s, uint32_t number, bint is_answered) noexcept nogil:
    """The oldest request is over: keep what is known of it, until its answer is sent."""
    cdef Asked* asked = c.asked
    cdef SlowRecord* record = &asked.record
    record.server_us = e.now_us - asked.sent_us
    record.wait_us = asked.sent_us - asked.came_us if asked.came_us else 0
    record.send_us = asked.held_us if asked.held_us < record.server_us else record.server_us
    record.server_us -= record.send_us
    record.server_id = s.conn.id
    record.pid = s.pid
    record.is_answered = is_answered
    asked.number = number
    asked.is_measured = True
    asked.came_us = 0
    asked.held_us = 0


cdef void slow_answered(Engine* e, Client* c, Server* s) noexcept nogil:
    """ReadyForQuery came for a request of the client."""
    cdef Asked* asked = c.asked
    cdef uint32_t left = points_left(&s.session)
    if asked == NULL or asked.sent_us == 0:
        return                              # asked before the option was there
    if asked.is_measured:
        slow_log(e, c)                      # several answers in one read
    slow_measured(e, c, s, asked.count - left if left != UNKNOWN else 0, True)
    asked.sent_us = e.now_us


cdef void slow_handed_over(Engine* e, Client* c) noexcept nogil:
    """What was read of answers is sent, or queued for the client."""
    cdef Asked* asked = c.asked
    if c.conn.out.size:
        return                              # slow_drained
    if asked.is_measured:
        slow_log(e, c)
    if c.server == NULL or session_is_idle(&c.server.session):
        slow_forget(c)


cdef void slow_drained(Engine* e, Client* c) noexcept nogil:
    """The client took the last byte queued for it."""
    slow_held(e, c)
    slow_handed_over(e, c)


cdef void slow_held(Engine* e, Client* c) noexcept nogil:
    """Bytes were queued for the client up to now."""
    cdef Asked* asked = c.asked
    cdef uint64_t since = asked.queued_us if asked.queued_us else asked.sent_us
    if asked.is_measured:
        asked.record.send_us += e.now_us - since
    if asked.sent_us:
        # the answer to the next request of a pipeline was not read meanwhile
        asked.held_us += e.now_us - (since if since > asked.sent_us else asked.sent_us)
    asked.queued_us = e.now_us


cdef void slow_stop(Engine* e, Client* c, Server* s) noexcept nogil:
    """Client and server part, maybe in the middle of a request: measure that, too."""
    cdef Asked* asked = c.asked
    cdef uint32_t left
    if c.conn.out.size:
        slow_held(e, c)
    if asked.is_measured:
        slow_log(e, c)
    if (asked.sent_us and (s.session.length or s.session.due)
            and session_owner(&s.session) == OWNER_CLIENT and not s.session.is_copy_both):
        left = points_left(&s.session)
        # an open group has no number yet: that of its texts is the next one
        slow_measured(e, c, s, 0 if left == UNKNOWN else asked.count + 1 - left, False)


cdef void slow_end(Engine* e, Client* c) noexcept nogil:
    """Nothing more is told of what the client has asked."""
    if c.asked.is_measured:
        if c.conn.out.size:
            slow_held(e, c)
        slow_log(e, c)
    slow_forget(c)


cdef void slow_log(Engine* e, Client* c) noexcept nogil:
    """Put what was measured into the ring for the log, if it took long enough."""
    cdef Asked* asked = c.asked
    cdef SlowRecord* record = &asked.record
    cdef AskedText* slot = &asked.texts[asked.number % ASKED_TEXTS]
    cdef uint64_t took_us = record.wait_us + record.server_us + record.send_us
    asked.is_measured = False
    if c.conn.route.slow_us == 0 or took_us < c.conn.route.slow_us:
        return
    record.head = 0
    record.tail = 0
    record.whole = 0
    if asked.number and slot.number == asked.number:
        record.head = slot.head
        record.tail = slot.tail
        record.whole = slot.whole
    put_record(e, &c.conn, TEXT_SLOW, <unsigned char*> record, sizeof(SlowRecord), slot.text,
               record.head + record.tail)
