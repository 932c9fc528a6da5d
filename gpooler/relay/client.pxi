"""What clients send, and how they end."""

from libc.stdint cimport uint16_t, uint32_t, uint8_t
from libc.stdlib cimport free
from libc.string cimport memchr, memcpy

from gpooler.relay cimport counters
from gpooler.relay.frame cimport HEADER, MAX_MESSAGE, MAX_SMALL_MESSAGE, frame_length
from gpooler.relay.io cimport (
    CHUNK, READ_SIZE, RECEIVED_BROKEN, RECEIVED_GOODBYE, RECEIVED_NOTHING, chunk_give, chunk_take, iovec,
    queue_clear, queue_flush,
)
from gpooler.relay.params cimport PARAM_REPORTED
from gpooler.relay.reason cimport (
    REASON_CLIENT_GONE, REASON_CLIENT_PROTOCOL, REASON_CLIENT_TERMINATED, REASON_NONE,
    REASON_SESSION_STATE, REASON_STATEMENT_POOL,
)
from gpooler.relay.prepared cimport copies_clear
from gpooler.relay.scanner cimport (
    EFFECT_BEGIN, EFFECT_FORGET, EFFECT_LISTEN, EFFECT_NAMES, EFFECT_OPAQUE, EFFECT_PREPARE, EFFECT_READ,
    EFFECT_SESSION, EFFECT_SET, EFFECT_STATE, scan_begin, scan_feed,
)
from gpooler.relay.session cimport (
    OWNER_ASK, OWNER_CLIENT, OWNER_DEPLOY, OWNER_RESET, session_awaits_ready, session_frontend,
    session_is_idle, session_needs_sync, session_owner,
)
from gpooler.relay.sql cimport sql_is_begin
from gpooler.relay.system cimport close


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
        gather_end(e, &c.conn)
        return
    # What cannot be sent on must fit a chunk, with what is held already.
    if c.conn.hold != NULL:
        held = c.conn.hold.end - c.conn.hold.start
    if c.server == NULL or c.conn.route.mode == MODE_STATEMENT:
        room = CHUNK - held
    elif c.server.session.is_copy_in:
        room = READ_SIZE
    else:
        # what stands behind this message may have to wait for its answer
        room = c.conn.rx.left + CHUNK - held
        if room > READ_SIZE:
            room = READ_SIZE
    got = conn_recv(e, &c.conn, at, room)
    if got == RECEIVED_NOTHING:
        gather_end(e, &c.conn)
        return
    if got <= 0:
        client_eof(e, c, got == RECEIVED_BROKEN or got == RECEIVED_GOODBYE and c.conn.state != CLIENT_IDLE)
        return
    if c.conn.state == CLIENT_LEAVING:
        make_ready(e, &c.conn)          # discarded; read on to its end
        return
    c.request_us = e.now_us
    if held:
        memcpy(at - held, c.conn.hold.data + c.conn.hold.start, held)
        at -= held
        chunk_give(&e.pool, c.conn.hold)
        c.conn.hold = NULL
    client_feed(e, c, at, held + got)
    gathered(e, &c.conn, got)
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
    if not end_if_stuck(e, c):
        resume_client(e, c)


cdef inline bint is_request(uint8_t kind) noexcept nogil:
    return (kind == c'Q' or kind == c'P' or kind == c'B' or kind == c'D' or kind == c'E' or kind == c'C'
            or kind == c'F')


cdef inline bint is_known(uint8_t kind) noexcept nogil:
    return (is_request(kind) or kind == c'S' or kind == c'H' or kind == c'X' or kind == c'd' or kind == c'c'
            or kind == c'f')


cdef inline uint8_t refusal_of(Route* r, uint16_t effects) noexcept nogil:
    """Why a text with these effects cannot run in this pool, if so."""
    if r.mode == MODE_STATEMENT and effects & EFFECT_BEGIN:
        return REASON_STATEMENT_POOL
    if r.session_state == STATE_REFUSE and effects & EFFECT_STATE:
        return REASON_SESSION_STATE
    return REASON_NONE


cdef inline bint is_small(uint8_t kind) noexcept nogil:
    """Messages that PostgreSQL bounds by MAX_SMALL_MESSAGE; a longer one would cost the server."""
    return (kind == c'S' or kind == c'E' or kind == c'D' or kind == c'C' or kind == c'H' or kind == c'c'
            or kind == c'f')


cdef void refuse_request(Engine* e, Client* c, uint8_t reason) noexcept nogil:
    """Python sends an error; then the request is skipped: a Query, or everything up to a Sync."""
    c.refusal = reason
    c.flags |= IS_HELD | TEXT_THEN_SKIP
    c.conn.reason = reason
    c.conn.route.words[counters.ERROR_BASE + reason] += 1
    raise_event(e, &c.conn, EVENT_TEXT_WANTED)


cdef bint say_ready(Engine* e, Client* c) noexcept nogil:
    cdef const char* ready = b"Z\x00\x00\x00\x05I"
    cdef const char* begun = b"Z\x00\x00\x00\x05T"
    cdef const char* failed = b"Z\x00\x00\x00\x05E"
    if c.flags & HAS_FAILED or c.server != NULL and c.server.session.status == c'E':
        ready = failed
    elif c.flags & HAS_BEGUN or c.server != NULL and c.server.session.status == c'T':
        ready = begun
    if c.conn.state == CLIENT_IDLE:
        move(e, &c.conn, &c.conn.route.idle, CLIENT_IDLE)   # idle from now on
    return conn_send(e, &c.conn, <const unsigned char*> ready, 6)


cdef bint defer_begin(Engine* e, Client* c) noexcept nogil:
    """Answer a BEGIN that no server has seen yet."""
    cdef const char* tag = b"C\x00\x00\x00\x0aBEGIN\x00"
    c.flags |= HAS_BEGUN
    return conn_send(e, &c.conn, <const unsigned char*> tag, 11) and say_ready(e, c)


cdef void begin_deferred(Engine* e, Client* c, Server* s) noexcept nogil:
    """The BEGIN that was answered goes to the server, before what needs it."""
    cdef uint32_t began = e.scratch_used
    out_message(e, c'Q', 6)
    out_copy(e, <const unsigned char*> b"BEGIN\x00", 6)
    session_frontend(&s.session, c'Q', OWNER_RESET)
    e.has_begin = True
    e.had_failed = (c.flags & HAS_FAILED) != 0
    if e.had_failed:
        # one statement of its transaction was refused by us: have it fail there, too
        out_message(e, c'Q', 35)
        out_copy(e, <const unsigned char*> b"ROLLBACK TO gpooler_has_refused_it\x00", 35)
        session_frontend(&s.session, c'Q', OWNER_RESET)
    out_add(e, began)
    c.flags &= ~<uint32_t> (HAS_BEGUN | HAS_FAILED)
    e.copy_from = NULL                  # a transaction is not begun twice


cdef void client_feed(Engine* e, Client* c, unsigned char* data, size_t size) noexcept nogil:
    """Work on bytes from a client. They start where its frame stands; what cannot go now is held."""
    cdef unsigned char* p = data
    cdef unsigned char* end = data + size
    cdef unsigned char* run = data      # start of what goes to the server
    cdef unsigned char* fresh = NULL    # where the bytes for a server attached in this call begin
    cdef size_t take = 0, need
    cdef uint32_t length
    cdef uint8_t kind
    cdef Server* s = c.server
    cdef Route* r = c.conn.route
    cdef bint ended = False
    cdef int handling
    cdef uint8_t reason, virtual
    cdef unsigned char* text
    out_begin(e)
    e.has_begin = False
    e.copy_from = NULL
    if s != NULL and can_be_sent_again(c, s):
        e.copy_from = data
    if s == NULL or c.flags & HAS_SPOKEN:
        e.deploy_size = 0               # of another client
    if c.flags & NEEDS_DEPLOY and s != NULL and is_only_asked(c, s):
        c.flags |= IS_BLOCKED           # the deploy goes first, and that behind the answer
        hold(e, &c.conn, data, size)
        return
    if c.flags & NEEDS_DEPLOY and s != NULL and can_deploy(c, s):
        c.flags &= ~<uint32_t> NEEDS_DEPLOY
        deploy_begin(e, c, s)
        if e.deploy_size and e.deploy_waits:
            deploy_first(e, c, s, data, end)
            return
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
                if r.session_state == STATE_REFUSE and c.scan.effects & EFFECT_STATE:
                    part_with_text(e, c, REASON_SESSION_STATE)  # seen too late to refuse the text alone
                    return
                pin_in_passing(e, c, c.scan.effects)
            p += take
            c.conn.rx.left -= <uint32_t> take
            if c.flags & IS_DROPPING:
                run = p
            if c.conn.rx.left == 0:
                c.flags &= ~<uint32_t> (IS_SCANNING | IS_DROPPING)
            continue
        if end - p < HEADER:
            break
        kind = p[0]
        length = frame_length(p)
        if kind == c'd' and s != NULL and length >= 4 and <size_t> (end - p) > length \
                and not c.flags & IS_SKIPPING:
            p += length + 1             # COPY data keeps account of nothing
            continue
        if (length < 4 or length > MAX_MESSAGE or not is_known(kind)
                or length > MAX_SMALL_MESSAGE and is_small(kind)):
            # what stood before it is on the server's account: it goes out
            if s == NULL or send_run(e, c, s, run, p, end, NULL):
                break_protocol(e, c)
            return
        if c.flags & IS_SKIPPING and kind != c'X':
            if kind == c'S' or (kind == c'Q' or kind == c'F') and not c.flags & SKIPS_TO_SYNC:
                c.flags &= ~<uint32_t> (IS_SKIPPING | SKIPS_TO_SYNC)
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
        if r.has_virtual and (kind == c'Q' or kind == c'P') and length < VIRTUAL_MOST:
            if <size_t> (end - p) <= length:
                break
            virtual = virtual_kind(c, s, p, length)
            if virtual:
                if s != NULL:
                    if not send_run(e, c, s, run, p, end, fresh) or await_answers(e, c, s, p, end):
                        return
                    fresh = NULL
                if refuse_virtual(e, c, s, virtual, p, end) or not answer_virtual(e, c, s, virtual, p, end):
                    return
                if r.log_query:
                    put_text(e, &c.conn, p + HEADER, length - 4)
                p += length + 1
                run = p
                if e.copy_from != NULL:
                    e.copy_from = p
                continue
        if (r.mode == MODE_STATEMENT or r.session_state == STATE_REFUSE) and (kind == c'Q' or kind == c'P'):
            # Looked at before a byte goes out: the whole message, up to a chunk.
            need = length + 1
            if need > CHUNK - 64:
                need = CHUNK - 64
            if <size_t> (end - p) < need:
                break
            scan_begin(&c.scan, kind == c'P', c.params.is_conforming, c.params.is_multibyte)
            scan_feed(&c.scan, p + HEADER, need - HEADER)
            reason = refusal_of(r, c.scan.effects)
            # (What PostgreSQL skips up to a Sync does nothing.)
            if reason and not (s != NULL and s.session.is_skipping):
                if s != NULL:
                    if not send_run(e, c, s, run, p, end, fresh):
                        return
                    if not session_is_idle(&s.session):
                        # earlier requests of the pipeline are answered first
                        if not waits_for_answers(s):
                            part_with_text(e, c, reason)
                            return
                        c.flags |= IS_BLOCKED
                        hold(e, &c.conn, p, end - p)
                        return
                    if s.session.status != c'I':
                        part_with_text(e, c, reason)
                        return
                hold(e, &c.conn, p, end - p)
                refuse_request(e, c, reason)
                return
        if s == NULL:
            if r.defers_begin and kind == c'Q' and length < 64 and not c.flags & HAS_BEGUN:
                if <size_t> (end - p) <= length:
                    break
                if sql_is_begin(p + HEADER, length - 4):
                    if not defer_begin(e, c):
                        client_leave(e, c, REASON_CLIENT_GONE)
                        return
                    if r.log_query:
                        put_text(e, &c.conn, p + HEADER, length - 4)
                    p += length + 1
                    run = p
                    continue
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
            e.copy_from = p if can_be_sent_again(c, s) else NULL
            if e.deploy_size and e.deploy_waits:
                deploy_first(e, c, s, p, end)
                return
        if out_is_full(e):
            if not send_run(e, c, s, run, p, end, fresh):
                return
            run = p
            fresh = NULL
        if c.flags & HAS_BEGUN and is_request(kind):
            begin_here(e, &run, p)
            begin_deferred(e, c, s)
        if s.session.length == 0:
            s.query_us = e.now_us
            if s.session.status == c'I' and not s.session.is_open:
                s.begin_us = e.now_us
        if r.slow_us:
            slow_message(e, c, s, p, end, length)
        if r.mode != MODE_SESSION and (kind == c'P' or kind == c'B' or kind == c'D' or kind == c'C'):
            handling = prepared_message(e, c, s, &run, p, end, length)
            if handling == INCOMPLETE:
                break
            if handling == BLOCKED:
                c.flags |= IS_BLOCKED
                break
            if c.asked != NULL and (handling == REPLACED or handling == HEADED):
                slow_counted(c, s, kind)
            if handling == REPLACED:
                if kind == c'P':
                    r.words[counters.ROUTE_CLIENT_PARSES] += 1
                    if r.log_query:
                        put_text(e, &c.conn, p + HEADER, length - 4)
                c.conn.rx.kind = kind
                p += length + 1
                run = p
                continue
            if handling == HEADED:
                session_frontend(&s.session, kind, OWNER_CLIENT)
                if kind == c'B':
                    r.words[counters.ROUTE_BINDS] += 1
                    c.flags &= ~<uint32_t> HAS_UNBOUND
                c.conn.rx.kind = kind
                p += e.taken
                c.conn.rx.left = length + 1 - e.taken
                run = p
                continue
        handling = AS_IT_IS
        if kind == c'Q' or kind == c'P':
            take = end - p - HEADER
            if take > length - 4:
                take = length - 4
            elif take < length - 4 and length < CHUNK - 64:
                break                   # it is looked at as a whole
            scan_begin(&c.scan, kind == c'P', c.params.is_conforming, c.params.is_multibyte)
            scan_feed(&c.scan, p + HEADER, take)
            if take < length - 4:
                c.flags |= IS_SCANNING
                pin_in_passing(e, c, c.scan.effects)
            elif c.scan.effects & EFFECT_READ and not s.session.is_skipping:
                text = p + HEADER
                if kind == c'P':
                    text = <unsigned char*> memchr(text, 0, take)
                    text = p + HEADER + take if text == NULL else text + 1
                handling = read_text(e, c, s, &run, p, end, text, <uint32_t> (p + HEADER + take - text),
                                     c.scan.effects)
                if handling == BLOCKED:
                    c.flags |= IS_BLOCKED
                    break
                if <size_t> (end - p) > length + CHUNK:
                    handling = AS_IT_IS     # (behind a COPY: too much is here already to hold it back)
            elif c.scan.effects:
                pin(e, c, c.scan.effects)
            if c.flags & CHANGES_LEXIS and not c.scan.effects & EFFECT_SET:
                pin(e, c, EFFECT_SET)   # it may be read otherwise than we did
        session_frontend(&s.session, kind, OWNER_CLIENT)
        if c.asked != NULL:
            slow_counted(c, s, kind)
        if kind == c'Q' or kind == c'E' or kind == c'F':
            r.words[counters.ROUTE_QUERIES] += 1
        c.conn.rx.kind = kind
        c.conn.rx.left = length - 4
        if kind == c'Q' or kind == c'P':
            if kind == c'Q':
                c.flags &= ~<uint32_t> (HAS_UNBOUND | MAY_MEET_UNNAMED)
            else:
                r.words[counters.ROUTE_CLIENT_PARSES] += 1
                r.words[counters.ROUTE_SERVER_PARSES] += 1
                if not s.session.is_skipping:
                    c.flags |= HAS_UNBOUND
                    c.flags &= ~<uint32_t> HAS_PARSED
            if r.log_query:
                put_text(e, &c.conn, p + HEADER, take)
            p += take
            c.conn.rx.left -= <uint32_t> take
            if handling == ALONE and session_awaits_ready(&s.session):
                p += HEADER
                c.flags |= IS_BLOCKED
                break
        elif kind == c'B':
            r.words[counters.ROUTE_BINDS] += 1
            c.flags &= ~<uint32_t> HAS_UNBOUND
        elif kind == c'F':
            opaque(s)                       # a function of any kind, called by its number
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
    cdef int first = 1, i
    if e.deploy_size:
        e.out[0].iov_base = e.deploy
        e.out[0].iov_len = e.deploy_size
        first = 0
    out_run(e, run, p)
    if e.copy_from != NULL:
        keep_request(e, c, p)
    for i in range(1, e.out_count):
        c.conn.route.words[counters.ROUTE_BYTES_IN] += e.out[i].iov_len
    i = e.out_count - first
    e.deploy_size = 0
    out_begin(e)
    if i == 0:
        return True
    c.flags |= HAS_SPOKEN | UNCHECKED
    if conn_write(e, &s.conn, &e.out[first], i):
        return True
    if fresh == NULL:
        # read first what PostgreSQL may have said at the end
        s.conn.flags |= IS_READABLE | IS_HUNG_UP
        make_ready(e, &s.conn)
        return False
    forget_copies(e, s)
    drop_request(e, c)
    if e.has_begin:
        c.flags |= HAS_BEGUN | (HAS_FAILED if e.had_failed else 0)
    s.client = NULL
    c.server = NULL
    move(e, &c.conn, &c.conn.route.idle, CLIENT_IDLE)
    c.conn.rx.left = 0
    c.flags &= ~<uint32_t> (IS_SCANNING | IS_DROPPING)
    hold(e, &c.conn, fresh, end - fresh)
    server_lost(e, s)
    client_work(e, c)
    return False


cdef void pin(Engine* e, Client* c, uint16_t effects) noexcept nogil:
    """Session state that cannot move (Effect bits) keeps the server with its client."""
    cdef Server* s = c.server
    if s == NULL:
        return
    if effects & EFFECT_OPAQUE:
        opaque(s)
    if c.conn.route.session_state == STATE_ALLOW:
        effects &= ~<uint16_t> (EFFECT_STATE & ~EFFECT_LISTEN if c.conn.route.pin_on_listen else EFFECT_STATE)
    effects &= EFFECT_SESSION
    s.newer |= effects                  # than a question under way
    if effects:
        s.flags &= ~<uint32_t> IS_CLEARED
    if not effects & ~s.pins:
        return
    if not s.pins and c.conn.route.mode != MODE_SESSION:
        c.conn.route.words[counters.ROUTE_PINS] += 1
    s.pins |= effects
    if c.conn.route.mode != MODE_SESSION:
        raise_event(e, &s.conn, EVENT_PINNED)


cdef inline void opaque(Server* s) noexcept nogil:
    """Something ran that nobody can see into."""
    if s.conn.route.state_check != CHECK_OFF:
        s.flags |= NEEDS_CHECK
    s.flags &= ~<uint32_t> IS_CLEARED


cdef void pin_in_passing(Engine* e, Client* c, uint16_t effects) noexcept nogil:
    """A text too long to be read as a whole: what it names cannot follow the client."""
    if c.server == NULL:
        return
    if effects & EFFECT_FORGET:
        copies_clear(&c.server.copies, &e.statements)
        c.server.flags |= HAS_STRAY_COPIES
    if effects & (EFFECT_FORGET | EFFECT_NAMES):
        effects |= EFFECT_PREPARE
    pin(e, c, effects)


cdef inline bint can_deploy(Client* c, Server* s) noexcept nogil:
    """Whether the client's parameters can go to its server before what it sends now."""
    return session_is_idle(&s.session) and s.session.status != c'E' and c.conn.rx.left == 0


cdef inline bint is_only_asked(Client* c, Server* s) noexcept nogil:
    """Whether all that runs is our question, and the client begins a message."""
    return (session_owner(&s.session) == OWNER_ASK and s.session.length == 1 and s.session.tail == 0
            and c.conn.rx.left == 0)


cdef void break_protocol(Engine* e, Client* c) noexcept nogil:
    """A message that is none: the client gets 08P01 and is closed; its server is brought back."""
    c.flags &= ~<uint32_t> (IS_SCANNING | IS_DROPPING)
    part_with_text(e, c, REASON_CLIENT_PROTOCOL)


cdef void part_with_text(Engine* e, Client* c, uint8_t reason) noexcept nogil:
    """Bring the client's server back and tell the client why; nothing fits into a message it got in part."""
    cdef bint is_cut = c.server != NULL and c.server.conn.rx.left and not c.server.flags & IS_SWALLOWING
    client_unbind(e, c)
    if is_cut:
        leave_when_sent(e, c, reason)
    else:
        want_text(e, c, reason)


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
    return (s.session.is_copy_in or s.session.is_copy_both or s.session.is_uncertain
            or session_needs_sync(&s.session))


cdef bint end_if_stuck(Engine* e, Client* c) noexcept nogil:
    """End a client that says no more when it has begun, or turns out to have begun, what can have no end.

    True when it was ended.
    """
    cdef Server* s = c.server
    if s == NULL or not c.flags & (IS_TERMINATED | IS_HALF_CLOSED) or c.flags & IS_BLOCKED:
        return False
    if c.flags & IS_TERMINATED:
        if session_is_idle(&s.session) or not is_endless(s):
            return False
        client_finish(e, c, REASON_CLIENT_TERMINATED)
        return True
    if c.conn.flags & IS_READABLE:
        return False                    # its end may have been seen before all that it sent was read
    if c.conn.rx.left == 0 and c.conn.hold == NULL and (session_is_idle(&s.session) or not is_endless(s)):
        return False
    client_finish(e, c, REASON_CLIENT_GONE)
    return True


cdef void client_finish(Engine* e, Client* c, uint8_t reason) noexcept nogil:
    """Close a client when the bytes queued for it are out."""
    if c.conn.out.size == 0:
        client_leave(e, c, reason)
        return
    client_unbind(e, c)
    c.flags |= CLOSE_WHEN_SENT | IS_HALF_CLOSED
    c.flags &= ~<uint32_t> (IS_HELD | IS_BLOCKED)
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
    if c.flags & IN_SETUP:
        client_leave(e, c, REASON_CLIENT_GONE)      # not logged in, it has nothing more to wait for
        return
    if c.conn.out.size:
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


# -- the end of a client -------------------------------------------------------------------------------


cdef void client_unbind(Engine* e, Client* c) noexcept nogil:
    cdef Server* s = c.server
    if c.asked != NULL:
        if s != NULL:
            slow_stop(e, c, s)
        slow_end(e, c)
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
    forget_names(e, c)
    drop_request(e, c)
    c.conn.flags &= ~<uint16_t> IS_REGISTERED
    conn_bye(e, &c.conn)
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
    c.flags &= ~<uint32_t> (IS_HELD | IS_BLOCKED | IN_SETUP | IS_TERMINATED)
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
        conn_end(e, &c.conn)
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
        c.flags &= ~<uint32_t> (TEXT_THEN_SKIP | IS_HELD)
        c.flags |= IS_SKIPPING
        if c.flags & HAS_BEGUN and c.conn.reason != REASON_NONE:
            c.flags |= HAS_FAILED
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
        c.request_us = e.now_us
        if c.asked != NULL:
            slow_drained(e, c)
        if c.flags & CLOSE_WHEN_SENT and conn.state == CLIENT_LEAVING:
            if c.flags & IS_HALF_CLOSED:
                client_leave(e, c, conn.reason)
            else:
                conn_end(e, conn)
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
