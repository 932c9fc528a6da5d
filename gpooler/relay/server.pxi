"""What servers send."""

from libc.stdint cimport uint16_t, uint32_t, uint8_t
from libc.string cimport memcpy, strcmp

from gpooler.relay cimport counters
from gpooler.relay.frame cimport HEADER, MAX_MESSAGE, frame_length
from gpooler.relay.histogram cimport observe
from gpooler.relay.io cimport CHUNK, MAX_PIECES, READ_SIZE, RECEIVED_NOTHING, chunk_give, iovec
from gpooler.relay.params cimport Param, ParamSet, params_hold, params_settle
from gpooler.relay.reason cimport (
    REASON_CLIENT_GONE, REASON_CLIENT_TERMINATED, REASON_SERVER_DEPLOY_FAILED, REASON_SERVER_DIRTY_END,
    REASON_SERVER_LOST, REASON_STATEMENT_POOL,
)
from gpooler.relay.session cimport (
    OWNER_ASK, OWNER_CLIENT, OWNER_DEPLOY, OWNER_EXTRA, OWNER_RESET, session_awaits_ready, session_backend,
    session_is_idle, session_owner, session_ready,
)


cdef void server_readable(Engine* e, Server* s) noexcept nogil:
    if s.client != NULL and s.client.conn.out.size:
        gather_end(e, &s.conn)
        return                          # its client reads slowly
    server_read(e, s, e.buffer + CHUNK, READ_SIZE)


cdef void server_read(Engine* e, Server* s, unsigned char* at, size_t room) noexcept nogil:
    """Read once and work on it; the buffer has a chunk of headroom in front."""
    cdef size_t held
    cdef ssize_t got = conn_recv(e, &s.conn, at, room)
    if got == RECEIVED_NOTHING:
        gather_end(e, &s.conn)
        return
    if got <= 0:
        server_lost(e, s)
        return
    if s.conn.state != SERVER_CLOSING:
        held = 0
        if s.conn.hold != NULL:
            held = s.conn.hold.end - s.conn.hold.start
            memcpy(at - held, s.conn.hold.data + s.conn.hold.start, held)
            at -= held
            chunk_give(&e.pool, s.conn.hold)
            s.conn.hold = NULL
        server_feed(e, s, at, held + got)
        gathered(e, &s.conn, got)
    if s.conn.flags & IS_READABLE and s.conn.state < SERVER_RELEASED:
        resume_server(e, s)


cdef inline void count_out(Route* r, iovec* pieces, int count) noexcept nogil:
    cdef int i
    for i in range(count):
        r.words[counters.ROUTE_BYTES_OUT] += pieces[i].iov_len


cdef bint flush_pieces(Engine* e, Client* c, iovec* pieces, int* count) noexcept nogil:
    """Send the pieces, if any. False: the client is gone."""
    cdef int ready = count[0]
    count[0] = 0
    if ready == 0:
        return True
    count_out(c.conn.route, pieces, ready)
    return conn_write(e, &c.conn, pieces, ready)


cdef bint to_client(Engine* e, Client* c, iovec* pieces, int* count, unsigned char* run,
                    unsigned char* p) noexcept nogil:
    """Add a run to the pieces; send them when there are many."""
    if p > run:
        pieces[count[0]].iov_base = run
        pieces[count[0]].iov_len = p - run
        count[0] += 1
    return count[0] < MAX_PIECES or flush_pieces(e, c, pieces, count)


cdef void server_feed(Engine* e, Server* s, unsigned char* data, size_t size) noexcept nogil:
    """Work on bytes from a server: pass on what is the client's, keep what is ours."""
    cdef iovec pieces[MAX_PIECES]
    cdef int count = 0
    cdef unsigned char* p = data
    cdef unsigned char* end = data + size
    cdef unsigned char* run = data
    cdef Client* c = s.client
    cdef Route* r = s.conn.route
    cdef size_t take
    cdef uint32_t length, whole
    cdef uint8_t kind, owner
    cdef int answered
    cdef Param* mine
    cdef uint32_t renamed
    cdef bint is_ours, in_place, bad = False, settled = False, is_gone = False, is_streaming = False
    while p < end:
        if s.conn.rx.left:
            take = end - p
            if take > s.conn.rx.left:
                take = s.conn.rx.left
            p += take
            s.conn.rx.left -= <uint32_t> take
            if s.flags & IS_SWALLOWING:
                run = p
            continue
        if end - p < HEADER:
            break
        kind = p[0]
        length = frame_length(p)
        if is_streaming and (kind == c'D' or kind == c'd') and length >= 4 and length <= MAX_MESSAGE:
            # Rows of the client's own request: nothing to keep account of, only to pass on.
            s.conn.rx.kind = kind
            if <size_t> (end - p) > length:
                p += length + 1
            else:
                s.conn.rx.left = length - 4
                p += HEADER
            continue
        whole = length + 1
        owner = session_owner(&s.session)
        if length < 4 or length > MAX_MESSAGE:
            bad = True
            break
        if whole <= CHUNK - 64 and (kind == c'Z' or kind == c'S'
                                    or kind == c'E'
                                    or kind == c'D' and owner == OWNER_ASK
                                    or kind == c'C' and s.flags & AWAITS_TAG):
            if <size_t> (end - p) < whole:
                break
        elif kind == c'S':
            s.flags |= CLOSE_AT_END     # a value too long to follow
        elif kind == c'Z':
            bad = True
            break
        in_place = session_backend(&s.session, kind)
        if not in_place:
            if kind == c'E' and c != NULL:
                s.flags |= FATAL_SEEN | CLOSE_AT_END
            elif kind == c'E':
                server_close(e, s, REASON_SERVER_LOST)  # its last words
                return
            else:
                bad = True
                break
        is_ours = (c == NULL or owner == OWNER_DEPLOY or owner == OWNER_RESET or owner == OWNER_ASK
                   or (s.flags & DEPLOY_FAILED) != 0
                   or (owner == OWNER_EXTRA and s.session.has_change and kind != c'E')
                   or (s.flags & PARSES_ANEW) != 0)
        if s.session.has_change and kind != c'E':
            change_answered(e, s, p)
        elif s.session.skipped:
            changes_skipped(e, s)
        if not is_ours and c.flags & (SENT_AGAIN | HAS_NEW_NAMES) | <uint32_t> (c.request != NULL):
            if (kind == c'E' and c.request != NULL and whole <= CHUNK - 64 and owner != OWNER_ASK
                    and is_for_again(e, s, c, p + HEADER, length - 4)):
                is_ours = True
            else:
                drop_request(e, c)
        mine = NULL
        if kind == c'S' and s.flags & HAS_RESETS and not is_ours and whole <= CHUNK - 64:
            mine = own_status(s, c, p + HEADER, length - 4)
            is_ours = mine != NULL
        if is_ours and c != NULL and not is_gone:
            is_gone = not to_client(e, c, pieces, &count, run, p)
        if mine != NULL:
            note_parameter(e, s, p + HEADER, length - 4, False)
            if is_news(c, mine) and not is_gone:
                is_gone = not (flush_pieces(e, c, pieces, &count) and tell(e, c, mine))
        elif kind == c'S':
            if whole <= CHUNK - 64:
                note_parameter(e, s, p + HEADER, length - 4, True)
        elif kind == c'1':
            if not is_ours and c.flags & HAS_UNBOUND:
                c.flags |= HAS_PARSED
        elif kind == c'D' and owner == OWNER_ASK:
            if whole <= CHUNK - 64:
                question_answered(e, s, p + HEADER, length - 4)
        elif kind == c'C' and s.flags & AWAITS_TAG:
            if length == 19 and same_bytes(p + HEADER, b"DEALLOCATE ALL", 15):
                forget_all(e, s)
            elif length == 16 and same_bytes(p + HEADER, b"DISCARD ALL", 12):
                forget_all(e, s)
        elif kind == c'E':
            if owner == OWNER_ASK:
                question_failed(e, s)
            elif owner == OWNER_CLIENT or owner == OWNER_EXTRA:
                if s.touched_size:
                    s.flags |= TOUCHED_FAILED
                if s.flags & HAS_PLACED:
                    s.flags |= IS_DIRTY | HAS_REAL_NAMES
            if (owner == OWNER_DEPLOY and c != NULL
                    and is_shutdown(p + HEADER, min_size(whole, end - p) - HEADER)):
                s.flags |= ENDED_UNSEEN
            elif owner == OWNER_DEPLOY:
                s.flags |= DEPLOY_FAILED
                if c != NULL:
                    set_note(&c.conn, p, min_size(whole, end - p))
            elif owner == OWNER_RESET and s.flags & (HAS_ROLLED_BACK | HAS_DISCARDED):
                s.flags |= RESET_FAILED
            elif c != NULL and is_last_group(&s.session) and not c.flags & HAS_PARSED:
                c.flags &= ~<uint32_t> HAS_UNBOUND  # the Parse failed, or was skipped
            if not is_ours and r.has_prepared and whole <= CHUNK - 64:
                renamed = own_name_error(e, c, p, whole)
                if renamed and not is_gone:
                    is_gone = not (to_client(e, c, pieces, &count, run, p)
                                   and flush_pieces(e, c, pieces, &count)
                                   and conn_send(e, &c.conn, e.question, renamed))
                    is_ours = True          # what follows of it is dropped
            if not s.flags & PARSES_ANEW and is_old_plan(p + HEADER, min_size(whole, end - p) - HEADER):
                r.plans += 1                # what servers have parsed is out of date
                if r.drops_old_plans:
                    s.flags |= CLOSE_AT_END | HAS_OLD_PLAN
        elif kind == c'Z':
            if length != 5:
                bad = True
                break
            answered = session_ready(&s.session, p[HEADER])
            if answered < 0:
                bad = True
                break
            settled = True
            s.cancel_us = 0
            gather_end(e, &s.conn)
            if c != NULL:
                gather_end(e, &c.conn)
            if answered == OWNER_CLIENT and c != NULL and c.flags & HAS_BARE_NAME and p[HEADER] == c'I':
                is_gone = is_gone or not (to_client(e, c, pieces, &count, run, p)
                                          and flush_pieces(e, c, pieces, &count) and add_host(e, c))
                run = p
            if answered == OWNER_CLIENT:
                if r.slow_us and c != NULL and not s.flags & PARSES_ANEW:
                    slow_answered(e, c, s)
                r.words[counters.ROUTE_QUERY_US] += e.now_us - s.query_us
                observe(r.times + counters.TIME_QUERY * counters.HISTOGRAM_WORDS, e.now_us - s.query_us)
                s.query_us = e.now_us
                if p[HEADER] == c'I':
                    r.words[counters.ROUTE_TRANSACTIONS] += 1
                    r.words[counters.ROUTE_TRANSACTION_US] += e.now_us - s.begin_us
                    observe(r.times + counters.TIME_TRANSACTION * counters.HISTOGRAM_WORDS,
                            e.now_us - s.begin_us)
                    s.begin_us = e.now_us
                elif r.mode == MODE_STATEMENT:
                    s.flags |= CLOSE_AT_END
            elif answered == OWNER_DEPLOY:
                if c != NULL and not s.flags & DEPLOY_FAILED:
                    share_params(e, s, c)
                    if s.flags & CANCEL_AFTER_DEPLOY:
                        want_cancel(e, s)
                elif c == NULL and s.flags & CANCEL_AFTER_DEPLOY and not session_is_idle(&s.session):
                    ask_cancel(e, s)
                s.flags &= ~<uint32_t> CANCEL_AFTER_DEPLOY
            elif answered == OWNER_ASK:
                if s.asked_size or s.asked:
                    question_failed(e, s)   # no row came, or one too long
                if s.flags & CANCEL_AFTER_DEPLOY and not session_is_idle(&s.session):
                    want_cancel(e, s)
                s.flags &= ~<uint32_t> CANCEL_AFTER_DEPLOY
            else:
                reset_answered(e, s)
        s.conn.rx.kind = kind
        s.conn.rx.left = length - 4
        p += HEADER
        if is_ours:
            s.flags |= IS_SWALLOWING
            run = p
        else:
            s.flags &= ~<uint32_t> IS_SWALLOWING
        # A row keeps account of nothing as long as the request it answers is the client's.
        is_streaming = (not is_ours and (kind == c'D' or kind == c'd' or kind == c'T' or kind == c'H'
                                         or kind == c'2'))
    if c != NULL and not is_gone:
        if p > run:
            pieces[count].iov_base = run
            pieces[count].iov_len = p - run
            count += 1
        is_gone = not flush_pieces(e, c, pieces, &count)
        if settled and c.asked != NULL:
            slow_handed_over(e, c)
    if bad or not hold(e, &s.conn, p, end - p):
        server_broken(e, s)
        return
    if is_gone:
        client_leave(e, c, REASON_CLIENT_GONE)
        return
    if c == NULL:
        if s.conn.state == SERVER_RESETTING and s.conn.rx.left == 0 and s.conn.hold == NULL:
            settle(e, s)
        return
    if (settled and session_is_idle(&s.session)
            and (s.flags & (HAS_RESETS | AWAITS_TAG | HAS_PLACED | IS_CLEARED) or c.flags & CHANGES_LEXIS)):
        settings_done(e, s, c)
    if s.flags & PARSES_ANEW:
        if settled and session_is_idle(&s.session):
            parse_anew(e, s, c)
        return
    if c.conn.inject != NULL:
        inject_now(e, c)
        if s.client != c:
            return
    if c.flags & (IS_BLOCKED | AWAITS_DEPLOY) == IS_BLOCKED and not session_awaits_ready(&s.session):
        # The answers it waited for are in, or may never come: a COPY has swallowed the Sync, say.
        c.flags &= ~<uint32_t> IS_BLOCKED
        client_work(e, c)
        if s.client != c:
            return
    if c.flags & (IS_TERMINATED | IS_HALF_CLOSED) and end_if_stuck(e, c):
        return
    if not settled:
        # an asynchronous message may have stood in the way
        maybe_detach(e, s)
    elif s.flags & DEPLOY_FAILED:
        deploy_failed(e, s)
    elif c.flags & AWAITS_DEPLOY:
        c.flags &= ~<uint32_t> (AWAITS_DEPLOY | IS_BLOCKED)
        client_work(e, c)
    elif c.flags & IN_SETUP:
        setup_done(e, c)
        if s.conn.state == SERVER_PARKED:
            settle(e, s)
    else:
        maybe_detach(e, s)


cdef bint is_old_plan(const unsigned char* body, size_t size) noexcept nogil:
    """Whether an ErrorResponse says that a cached plan must not change its result type.

    The text may be in any language; the name of PostgreSQL's function, where it is told, is not.
    """
    cdef const char* value
    cdef uint8_t field
    cdef bint is_unsupported = False
    while size > 1 and body[0]:
        field = body[0]
        value = <const char*> body + 1
        while size and body[0]:
            body += 1
            size -= 1
        if size == 0:
            break                           # cut off
        body += 1
        size -= 1
        if field == c'C':
            if strcmp(value, b"0A000") != 0:
                return False
            is_unsupported = True
        elif (field == c'M' and strcmp(value, b"cached plan must not change result type") == 0
              or field == c'R' and strcmp(value, b"RevalidateCachedQuery") == 0):
            return is_unsupported           # the SQLSTATE comes before both
    return False


cdef inline bint is_last_group(Session* session) noexcept nogil:
    """Whether nothing was sent behind the group that is being answered."""
    return session.length == 0 or (session.length == 1 and session.tail == 0
                                   and session.points[session.head].count == 1)


cdef void share_params(Engine* e, Server* s, Client* c) noexcept nogil:
    """Our parameters were accepted: client and server now have the same set."""
    cdef ParamSet* same = params_settle(s.params, c.params)
    if same != NULL:
        replace_params(e, &s.params, params_hold(same))
        replace_params(e, &c.params, same)


cdef void deploy_failed(Engine* e, Server* s) noexcept nogil:
    """PostgreSQL refused the client's parameters (its ErrorResponse is the client's note)."""
    cdef Client* c = s.client
    s.client = NULL
    c.server = NULL
    want_text(e, c, REASON_SERVER_DEPLOY_FAILED)
    if c.flags & IN_SETUP:
        # The statements of one query are undone together: the server is as it was.
        enter_reset(e, s)
        s.flags &= ~<uint32_t> DEPLOY_FAILED
        settle(e, s)
    else:
        # The client's request ran behind the failed one: nobody may see its effects as right.
        server_close(e, s, REASON_SERVER_DEPLOY_FAILED)


cdef void maybe_detach(Engine* e, Server* s) noexcept nogil:
    """The answers to a request are complete: can the server go to another client?"""
    cdef Client* c = s.client
    cdef Route* r = s.conn.route
    cdef bint is_open
    if not session_is_idle(&s.session) or s.conn.rx.left or c.flags & IN_SETUP or s.flags & DEPLOY_FAILED:
        return
    if c.flags & IS_TERMINATED:
        client_finish(e, c, REASON_CLIENT_TERMINATED)
        return
    if r.mode == MODE_STATEMENT and s.session.status != c'I':
        s.client = NULL
        c.server = NULL
        want_text(e, c, REASON_STATEMENT_POOL)
        server_close(e, s, REASON_SERVER_DIRTY_END)
        return
    if c.flags & IS_HALF_CLOSED and c.conn.hold == NULL:
        if not c.conn.flags & IS_READABLE:
            client_finish(e, c, REASON_CLIENT_TERMINATED)
            return
        resume_client(e, c)             # its end was seen before all that it sent was read
    if s.flags & FATAL_SEEN:
        return
    if (e.drops_due or c.conn.born_us < r.ended_us) and is_between(c):
        if e.drops_due:
            e.drops_due -= 1
        drop(e, c)
        return
    if r.mode == MODE_SESSION:
        return
    is_open = (s.session.status != c'I' or s.cancelling or s.session.is_uncertain or c.flags & HAS_UNBOUND
               or c.conn.rx.left or s.conn.hold != NULL or s.conn.out.size)
    if not is_open and has_question(s):
        if ask(e, s):
            return
        question_failed(e, s)
    if is_open or s.pins:
        if (c.flags & IS_BLOCKED and (s.pins or s.session.is_uncertain or c.flags & HAS_UNBOUND)
                and not s.cancelling):
            c.flags &= ~<uint32_t> IS_BLOCKED
            client_work(e, c)
        return
    detach(e, s)


cdef void detach(Engine* e, Server* s) noexcept nogil:
    """Between transactions: client and server part, and the server goes where it is needed."""
    cdef Client* c = s.client
    if s.conn.route.discard == DISCARD_ALWAYS:
        s.flags |= IS_DIRTY
    unbind(e, s)
    settle(e, s)
    if c.flags & IS_BLOCKED and c.conn.state == CLIENT_IDLE:
        c.flags &= ~<uint32_t> IS_BLOCKED
        client_work(e, c)
    else:
        resume_client(e, c)
