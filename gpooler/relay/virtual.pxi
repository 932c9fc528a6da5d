"""What is answered without a server (virtual_processing): target_session_attrs, by texts that Python made.

A simple query of its own is answered, also before a server has seen a deferred BEGIN. Any other form of it
is refused: it would reach a server, which takes every name with a dot for a setting. In a failed transaction
PostgreSQL itself refuses it.
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport malloc
from libc.string cimport memchr, memcpy

from gpooler.relay.frame cimport HEADER
from gpooler.relay.io cimport CHUNK
from gpooler.relay.reason cimport (
    REASON_CLIENT_GONE, REASON_NONE, REASON_TARGET_INVALID, REASON_TARGET_UNBUILT, REASON_VIRTUAL_UNCLEAR,
)
from gpooler.relay.session cimport session_is_idle
from gpooler.relay.sql cimport (
    VIRTUAL_INVALID, VIRTUAL_NONE, VIRTUAL_RESET, VIRTUAL_UNBUILT, VIRTUAL_UNCLEAR, sql_virtual,
)


cdef enum:
    VIRTUAL_MOST = 512              # a longer message is none


cdef uint8_t virtual_kind(Client* c, Server* s, const unsigned char* p, uint32_t length) noexcept nogil:
    """A Virtual: what a whole Query or Parse is, for a client whose transaction has not failed."""
    cdef const unsigned char* text = p + HEADER
    cdef const unsigned char* end = p + length + 1
    cdef uint8_t kind
    if c.flags & HAS_FAILED or s != NULL and (s.session.is_skipping or s.session.status == c'E'):
        return VIRTUAL_NONE
    if p[0] == c'P':
        text = <const unsigned char*> memchr(text, 0, end - text)
        if text == NULL:
            return VIRTUAL_NONE
        text += 1
    kind = sql_virtual(text, <uint32_t> (end - text), c.params.is_conforming, c.params.is_multibyte)
    return VIRTUAL_UNCLEAR if kind and p[0] == c'P' else kind


cdef bint refuse_virtual(Engine* e, Client* c, Server* s, uint8_t kind, unsigned char* p,
                         unsigned char* end) noexcept nogil:
    """Refuse one that has no answer; what stands from `p` on is held. False: it has one."""
    cdef uint8_t reason
    if kind <= VIRTUAL_RESET:
        return False
    reason = REASON_VIRTUAL_UNCLEAR
    if kind == VIRTUAL_UNBUILT:
        reason = REASON_TARGET_UNBUILT
    elif kind == VIRTUAL_INVALID:
        reason = REASON_TARGET_INVALID
    if s != NULL and s.session.status != c'I':
        part_with_text(e, c, reason)        # its transaction could not be made to fail
    elif hold(e, &c.conn, p, end - p):
        refuse_request(e, c, reason)
    else:
        client_leave(e, c, REASON_CLIENT_GONE)
    return True


cdef bint await_answers(Engine* e, Client* c, Server* s, unsigned char* p, unsigned char* end) noexcept nogil:
    """Hold what stands from `p` on while earlier requests run. False: none does."""
    if session_is_idle(&s.session):
        return False
    if not waits_for_answers(s) or end - p > CHUNK:
        part_with_text(e, c, REASON_VIRTUAL_UNCLEAR)
        return True
    c.flags |= IS_BLOCKED
    hold(e, &c.conn, p, end - p)
    return True


cdef bint answer_virtual(Engine* e, Client* c, Server* s, uint8_t kind, unsigned char* p,
                         unsigned char* end) noexcept nogil:
    """Answer one. False: `p` is not to be looked at any more."""
    cdef Text* text = &c.conn.route.virtual_answers[kind - 1]
    if s == NULL or s.conn.rx.left == 0 and s.conn.hold == NULL:
        if conn_send(e, &c.conn, text.data, text.size) and say_ready(e, c):
            return True
        client_leave(e, c, REASON_CLIENT_GONE)
        return False
    # a notice for the client is under way: behind it
    if c.conn.inject == NULL:
        c.conn.inject = <unsigned char*> malloc(text.size)
        if c.conn.inject != NULL:
            memcpy(c.conn.inject, text.data, text.size)
            c.conn.inject_size = text.size
    c.flags |= IS_HELD | TEXT_THEN_SKIP
    c.conn.reason = REASON_NONE
    if c.conn.inject == NULL or not hold(e, &c.conn, p, end - p):
        client_leave(e, c, REASON_CLIENT_GONE)
    return False
