"""What clients do to their sessions by SQL: settings that follow them, state that ends, forgotten names.

A setting that PostgreSQL reports needs nothing: ParameterStatus says what it is. The names of others are
noted as their SET passes (`touched`), and at the end of the transaction the server is asked, once, what they
are: neither ROLLBACK nor a savepoint nor a function's doing needs an account of its own. The same question
says whether state that pinned the server is over.

RESET and DISCARD ALL lead a client back to what it began with, not to what the server began with: where these
differ, the difference is deployed before the client's next request, and the client is told its own values.
"""

from libc.stdint cimport int32_t, uint16_t, uint32_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcpy, strlen

from gpooler.relay.frame cimport HEADER
from gpooler.relay.io cimport CHUNK, iovec
from gpooler.relay.params cimport (
    PARAM_READ_ONLY, PARAM_REPORTED, Param, ParamSet, params_find, params_hold, params_is_same_name,
    params_is_same_value, params_literal, params_release, params_with, params_without,
)
from gpooler.relay.scanner cimport (
    EFFECT_HOLD, EFFECT_LISTEN, EFFECT_LOCK, EFFECT_PARSE, EFFECT_PREPARE, EFFECT_READ, EFFECT_SET,
    EFFECT_TEMP,
)
from gpooler.relay.prepared cimport Name, copies_clear, names_find
from gpooler.relay.session cimport OWNER_ASK, session_awaits_ready, session_frontend, session_needs_sync
from gpooler.relay.sql cimport (
    NAME_DEALLOCATE, SETTING_DISCARD_ALL, SETTING_RESET, SETTING_RESET_ALL, SETTING_SET, Reading, sql_read,
)


# -- what was touched ----------------------------------------------------------------------------------


cdef bint is_touched(Server* s, const unsigned char* name, uint32_t size) noexcept nogil:
    """Whether the setting is among those to ask for; behind a question under way it is not."""
    cdef uint32_t at = s.asked_size, length
    while at < s.touched_size:
        length = <uint32_t> strlen(<char*> s.touched + at + 1)
        if params_is_same_name(s.touched + at + 1, length, name, size):
            return True
        at += length + 2
    return False


cdef void touch(Engine* e, Client* c, uint8_t kind, const unsigned char* name, uint32_t size) noexcept nogil:
    """A statement that changes a setting, or all of them, goes to the server."""
    cdef Server* s = c.server
    cdef Param* known
    cdef unsigned char* at
    if kind == SETTING_SET and not s.flags & HAS_RESETS:
        known = params_find(s.params, name, size)
        if known != NULL and known.flags & PARAM_REPORTED or is_touched(s, name, size):
            return
    if s.touched_size + size + 2 <= MAX_TOUCHED and s.touched == NULL:
        s.touched = <unsigned char*> malloc(MAX_TOUCHED)
    if s.touched == NULL or s.touched_size + size + 2 > MAX_TOUCHED:
        pin(e, c, EFFECT_SET)
        return
    at = s.touched + s.touched_size
    at[0] = kind
    if size:
        memcpy(at + 1, name, size)
    at[1 + size] = 0
    s.touched_size += size + 2
    if kind != SETTING_SET:
        s.flags |= HAS_RESETS


cdef void untouch(Server* s) noexcept nogil:
    """Nothing is in doubt any more."""
    free(s.touched)
    s.touched = NULL
    s.touched_size = 0
    s.asked_size = 0
    s.flags &= ~<uint32_t> (HAS_RESETS | TOUCHED_FAILED)


cdef bint is_reset(Server* s, const unsigned char* name, uint32_t size, uint32_t at = 0) noexcept nogil:
    """Whether the last statement about this setting, from `at` on, led it back to where the session began."""
    cdef uint32_t length
    cdef bint result = False
    cdef uint8_t kind
    while at < s.touched_size:
        kind = s.touched[at]
        length = <uint32_t> strlen(<char*> s.touched + at + 1)
        if kind == SETTING_DISCARD_ALL:
            result = True
        elif kind == SETTING_RESET_ALL:
            if not params_is_same_name(name, size, <const unsigned char*> b"role", 4):
                result = True
        elif params_is_same_name(s.touched + at + 1, length, name, size):
            result = kind == SETTING_RESET
        at += length + 2
    return result


cdef Param* own_value(Client* c, Server* s, const unsigned char* name, uint32_t size) noexcept nogil:
    """What the client began with, where it is not what the server began with."""
    cdef Param* mine
    cdef Param* its
    if c.startup == NULL:
        return NULL
    mine = params_find(c.startup, name, size)
    if mine == NULL or mine.flags & PARAM_READ_ONLY:
        return NULL
    its = params_find(s.initial, name, size)
    return NULL if its != NULL and params_is_same_value(its, mine) else mine


cdef inline void set_param(Engine* e, ParamSet** place, Param* p) noexcept nogil:
    replace_params(e, place, params_with(place[0], p.text, p.name_size, p.text + p.name_size + 1,
                                         p.value_size, p.flags))


cdef Param* own_status(Server* s, Client* c, const unsigned char* body, uint32_t size) noexcept nogil:
    """The client's own value in place of a ParameterStatus (its body) that comes of a reset; else NULL."""
    cdef uint32_t name_size = 0
    while name_size < size and body[name_size]:
        name_size += 1
    if name_size == size or s.flags & TOUCHED_FAILED or not is_reset(s, body, name_size):
        return NULL
    return own_value(c, s, body, name_size)


cdef bint is_news(Client* c, Param* mine) noexcept nogil:
    """Whether the client last heard of another value."""
    cdef Param* now = params_find(c.params, mine.text, mine.name_size)
    return now == NULL or not params_is_same_value(now, mine)


cdef bint tell(Engine* e, Client* c, Param* mine) noexcept nogil:
    """Have the client know the value of a setting. False: it is gone."""
    cdef unsigned char header[5]
    cdef iovec pieces[2]
    header[0] = c'S'
    put_u32(header + 1, mine.name_size + mine.value_size + 6)
    pieces[0].iov_base = header
    pieces[0].iov_len = HEADER
    pieces[1].iov_base = mine.text
    pieces[1].iov_len = mine.name_size + mine.value_size + 2
    set_param(e, &c.params, mine)
    return conn_write(e, &c.conn, pieces, 2)


# -- the application_name with the host behind it ------------------------------------------------------


cdef enum:
    APPLICATION_NAME_MOST = 63          # PostgreSQL cuts it there

cdef const unsigned char* APPLICATION_NAME = <const unsigned char*> b"application_name"


cdef uint32_t host_part(Client* c, const unsigned char** part) noexcept nogil:
    """What the login has put behind the client's application_name, " - host:port"; its size, 0: nothing."""
    cdef Param* name = NULL if c.startup == NULL else params_find(c.startup, APPLICATION_NAME, 16)
    cdef const unsigned char* value
    cdef uint32_t at, end, port = 0, scale = 1
    if name == NULL:
        return 0
    value = name.text + name.name_size + 1
    end = name.value_size
    at = end
    while at and end - at < 5 and c'0' <= value[at - 1] <= c'9':
        at -= 1
        port += (value[at] - c'0') * scale
        scale *= 10
    if at == end or at == 0 or value[at - 1] != c':' or port != c.port:
        return 0                            # it logged in before the rule said so
    while at >= 3:
        at -= 1
        if value[at] == c' ' and value[at - 1] == c'-' and value[at - 2] == c' ':
            part[0] = value + at - 2
            return end - at + 2
    return 0


cdef void note_name(Client* c, const unsigned char* value, uint32_t size) noexcept nogil:
    """The client's application_name is this now: whether it has the host behind it."""
    cdef const unsigned char* host
    cdef uint32_t host_size = host_part(c, &host)
    c.flags &= ~<uint32_t> HAS_BARE_NAME
    if host_size and not (size >= host_size and same_bytes(value + size - host_size, host, host_size)):
        c.flags |= HAS_BARE_NAME


cdef bint add_host(Engine* e, Client* c) noexcept nogil:
    """Between transactions: have the client expect, and know, its name with its host. False: it is gone."""
    cdef unsigned char value[APPLICATION_NAME_MOST]
    cdef const unsigned char* host
    cdef uint32_t host_size = host_part(c, &host)
    cdef Param* name = params_find(c.params, APPLICATION_NAME, 16)
    cdef uint32_t size, i
    c.flags &= ~<uint32_t> HAS_BARE_NAME
    if name == NULL or not 0 < host_size <= APPLICATION_NAME_MOST:
        return True
    size = name.value_size
    if size > APPLICATION_NAME_MOST - host_size:
        size = APPLICATION_NAME_MOST - host_size
    for i in range(size):
        value[i] = name.text[name.name_size + 1 + i]
    memcpy(value + size, host, host_size)
    replace_params(e, &c.params, params_with(c.params, name.text, name.name_size, value, size + host_size,
                                             name.flags))
    c.flags |= NEEDS_DEPLOY
    name = params_find(c.params, APPLICATION_NAME, 16)
    return tell(e, c, name)


# -- at the end of a request ---------------------------------------------------------------------------


cdef void forget_resets(Server* s, bint is_over, ParamSet* had) noexcept nogil:
    """Entries that lead back are done with; in a transaction they are asked for at its end, like any SET."""
    cdef uint32_t at = 0, to = 0, length, i
    cdef uint8_t kind
    cdef bint has_all = False
    while at < s.touched_size:
        kind = s.touched[at]
        length = <uint32_t> strlen(<char*> s.touched + at + 1)
        if is_over and kind == SETTING_SET and is_reset(s, s.touched + at + 1, length, at):
            at += length + 2                # what it set is gone again
            continue
        if kind == SETTING_SET or kind == SETTING_RESET and not is_over:
            if to != at:
                for i in range(length + 2):
                    s.touched[to + i] = s.touched[at + i]
            s.touched[to] = SETTING_SET
            to += length + 2
        elif kind != SETTING_RESET:
            has_all = True
        at += length + 2
    s.touched_size = to
    s.flags &= ~<uint32_t> HAS_RESETS
    if has_all and not is_over:
        for i in range(had.count):
            if (not had.items[i].flags & PARAM_REPORTED
                    and s.touched_size + had.items[i].name_size + 2 <= MAX_TOUCHED):
                s.touched[s.touched_size] = SETTING_SET
                memcpy(s.touched + s.touched_size + 1, had.items[i].text, had.items[i].name_size + 1)
                s.touched_size += had.items[i].name_size + 2
    if s.touched_size == 0:
        untouch(s)


cdef void drop_reset(Engine* e, Server* s, ParamSet** place) noexcept nogil:
    """Out of a set, what PostgreSQL has reset and does not report."""
    cdef ParamSet* before = params_hold(place[0])
    cdef uint32_t i
    for i in range(before.count):
        if (not before.items[i].flags & PARAM_REPORTED
                and is_reset(s, before.items[i].text, before.items[i].name_size)):
            replace_params(e, place,
                           params_without(place[0], before.items[i].text, before.items[i].name_size))
    params_release(before)


cdef void apply_resets(Engine* e, Server* s, Client* c) noexcept nogil:
    """What was reset is on the server as the server began, and for the client as the client began."""
    cdef uint32_t i
    cdef Param* mine
    drop_reset(e, s, &s.params)
    drop_reset(e, s, &c.params)
    if c.startup == NULL:
        return
    for i in range(c.startup.count):
        mine = c.startup.items[i]
        if is_reset(s, mine.text, mine.name_size) and own_value(c, s, mine.text, mine.name_size) != NULL:
            set_param(e, &c.params, mine)


cdef void settings_done(Engine* e, Server* s, Client* c) noexcept nogil:
    """Everything asked was answered: do what resets lead to."""
    cdef ParamSet* had
    cdef bint is_over = s.session.status == c'I'
    s.flags &= ~<uint32_t> (AWAITS_TAG | HAS_PLACED)
    c.flags &= ~<uint32_t> CHANGES_LEXIS
    if s.session.status == c'E' or not s.flags & HAS_RESETS:
        return
    had = params_hold(s.params)
    if not s.flags & TOUCHED_FAILED:
        apply_resets(e, s, c)
        if s.flags & IS_CLEARED and is_over:
            s.pins = 0
            s.ends = 0
            s.flags &= ~<uint32_t> IS_DIRTY
        s.flags &= ~<uint32_t> IS_CLEARED
        forget_resets(s, is_over, had)
        if c.params != s.params:
            c.flags |= NEEDS_DEPLOY
    else:
        forget_resets(s, False, had)
    params_release(had)


# -- the question --------------------------------------------------------------------------------------


cdef enum:
    ASKED_KINDS = 5


# Its last column, if any: of the settings that the session changed, all that are shown.
cdef const char* SETTINGS_QUESTION = (
    b"(SELECT pg_catalog.string_agg(name||E'\\x01'||pg_catalog.current_setting(name)||E'\\x02','')"
    b" FROM pg_catalog.pg_settings WHERE source='session' AND name NOT LIKE 'transaction\\_%'),"
)


cdef uint16_t asked_kind(int i) noexcept nogil:
    if i == 0:
        return EFFECT_LISTEN
    if i == 1:
        return EFFECT_LOCK
    if i == 2:
        return EFFECT_HOLD
    if i == 3:
        return EFFECT_PREPARE | EFFECT_PARSE
    return EFFECT_TEMP


cdef const char* asked_text(int i) noexcept nogil:
    """An expression that is true while the session has such state."""
    if i == 0:
        return b"EXISTS(SELECT FROM pg_catalog.pg_listening_channels())"
    if i == 1:
        return (b"EXISTS(SELECT FROM pg_catalog.pg_locks WHERE locktype='advisory'"
                b" AND pid=pg_catalog.pg_backend_pid())")
    if i == 2:
        return b"EXISTS(SELECT FROM pg_catalog.pg_cursors WHERE is_holdable)"
    if i == 3:
        return b"EXISTS(SELECT FROM pg_catalog.pg_prepared_statements WHERE name!~'^gp_[0-9a-f]{32}$')"
    return (b"EXISTS(SELECT FROM pg_catalog.pg_class WHERE relnamespace=pg_catalog.pg_my_temp_schema())"
            b"OR EXISTS(SELECT FROM pg_catalog.pg_proc WHERE pronamespace=pg_catalog.pg_my_temp_schema())"
            b"OR EXISTS(SELECT FROM pg_catalog.pg_type WHERE typnamespace=pg_catalog.pg_my_temp_schema())")


cdef inline uint32_t put_text_at(unsigned char* at, const char* text) noexcept nogil:
    cdef uint32_t size = <uint32_t> strlen(text)
    memcpy(at, text, size)
    return size


cdef inline bint has_question(Server* s) noexcept nogil:
    return (s.touched_size != 0 or (s.pins & s.ends) != 0 or s.flags & NEEDS_CHECK
            or s.conn.route.state_check == CHECK_ALWAYS and s.client.flags & UNCHECKED)


cdef inline bint is_listed(const unsigned char* name, uint32_t size) noexcept nogil:
    """Whether pg_settings shows it: neither the role nor names of the session's own."""
    return (memchr(name, c'.', size) == NULL
            and not params_is_same_name(name, size, <const unsigned char*> b"role", 4))


cdef void touch_hidden(Server* s) noexcept nogil:
    """Settings that the session has and pg_settings does not show: of their own names, and the role."""
    cdef uint32_t i
    cdef Param* p
    if s.touched == NULL:
        s.touched = <unsigned char*> malloc(MAX_TOUCHED)
    if s.touched == NULL:
        return
    for i in range(s.params.count):
        p = s.params.items[i]
        if not is_listed(p.text, p.name_size) and s.touched_size + p.name_size + 2 <= MAX_TOUCHED:
            s.touched[s.touched_size] = SETTING_SET
            memcpy(s.touched + s.touched_size + 1, p.text, p.name_size + 1)
            s.touched_size += p.name_size + 2


cdef bint ask(Engine* e, Server* s) noexcept nogil:
    """Ask the server what its session has. False: there was no way to."""
    cdef unsigned char* text = e.question
    cdef uint32_t size = HEADER, at = 0, length
    cdef int i, written
    cdef bint is_full = s.flags & NEEDS_CHECK or s.conn.route.state_check == CHECK_ALWAYS
    s.asked = s.pins & s.ends
    if is_full:
        s.asked = EFFECT_LISTEN | EFFECT_LOCK | EFFECT_HOLD | EFFECT_PREPARE | EFFECT_TEMP
    s.newer = 0
    if is_full:
        touch_hidden(s)
    s.flags &= ~<uint32_t> NEEDS_CHECK
    s.client.flags &= ~<uint32_t> UNCHECKED
    s.asked_size = s.touched_size
    # A SET that failed may name what no session can set: of those only what the session did set counts.
    s.asked_list = is_full or (s.flags & TOUCHED_FAILED) != 0
    s.ends = 0
    size += put_text_at(text + size, b"SELECT ")
    while at < s.touched_size:
        length = <uint32_t> strlen(<char*> s.touched + at + 1)
        if s.asked_list and is_listed(s.touched + at + 1, length):
            at += length + 2
            continue
        size += put_text_at(text + size, b"pg_catalog.current_setting(")
        written = params_literal(s.touched + at + 1, length, text + size, CHUNK - 1024 - size)
        if written < 0:
            return False
        size += <uint32_t> written
        size += put_text_at(text + size, b",true),")
        if size > CHUNK - 1024:
            return False
        at += length + 2
    for i in range(ASKED_KINDS):
        if s.asked & asked_kind(i):
            size += put_text_at(text + size, asked_text(i))
            text[size] = c','
            size += 1
    if s.asked_list:
        size += put_text_at(text + size, SETTINGS_QUESTION)
    text[size - 1] = 0
    text[0] = c'Q'
    put_u32(text + 1, size - 1)
    session_frontend(&s.session, c'Q', OWNER_ASK)
    if not conn_send(e, &s.conn, text, size):
        server_lost(e, s)
    return True


cdef void question_answered(Engine* e, Server* s, const unsigned char* body, uint32_t size) noexcept nogil:
    """The one row of the answer: a DataRow's body."""
    cdef const unsigned char* at = body + 2
    cdef const unsigned char* end = body + size
    cdef uint32_t touched = 0, length
    cdef int32_t value_size
    cdef int i = 0
    while at + 4 <= end:
        value_size = <int32_t> get_u32(at)
        at += 4
        if value_size > 0 and end - at < value_size:
            break
        while touched < s.asked_size and s.asked_list and is_listed(
                s.touched + touched + 1, <uint32_t> strlen(<char*> s.touched + touched + 1)):
            touched += <uint32_t> strlen(<char*> s.touched + touched + 1) + 2
        if touched < s.asked_size:
            length = <uint32_t> strlen(<char*> s.touched + touched + 1)
            learn(e, s, s.touched + touched + 1, length, at, value_size)
            touched += length + 2
        else:
            while i < ASKED_KINDS and not s.asked & asked_kind(i):
                i += 1
            if i == ASKED_KINDS:
                learn_all(e, s, at, value_size)
            elif value_size == 1 and at[0] == c'f':
                s.pins &= ~(asked_kind(i) & ~s.newer)
            elif s.client != NULL:
                pin(e, s.client, asked_kind(i) & ~<uint16_t> EFFECT_PARSE)
            i += 1
        if value_size > 0:
            at += value_size
    s.asked = 0
    forget_asked(s)


cdef void learn_all(Engine* e, Server* s, const unsigned char* list, int32_t size) noexcept nogil:
    """Every setting that the session changed and PostgreSQL shows: name, 1, value, 2."""
    cdef const unsigned char* end = list + size if size > 0 else list
    cdef const unsigned char* at = list
    cdef const unsigned char* name
    cdef const unsigned char* value
    cdef ParamSet* before = params_hold(s.params)
    cdef Param* p
    cdef bint is_changed
    cdef uint32_t i
    # what the session had and has no more; a name with a dot is not shown, nor is the role
    for i in range(before.count):
        p = before.items[i]
        if p.flags & PARAM_REPORTED or not is_listed(p.text, p.name_size):
            continue
        is_changed = False
        at = list
        while at < end and not is_changed:
            name = at
            value = <const unsigned char*> memchr(at, 1, end - at)
            if value == NULL:
                break
            is_changed = params_is_same_name(name, <uint32_t> (value - name), p.text, p.name_size)
            at = <const unsigned char*> memchr(value, 2, end - value)
            at = end if at == NULL else at + 1
        if not is_changed:
            learn(e, s, p.text, p.name_size, NULL, -1)
    at = list
    while at < end:
        name = at
        value = <const unsigned char*> memchr(at, 1, end - at)
        if value == NULL:
            break
        at = <const unsigned char*> memchr(value, 2, end - value)
        if at == NULL:
            break
        learn(e, s, name, <uint32_t> (value - name), value + 1, <int32_t> (at - value - 1))
        at += 1
    params_release(before)


cdef void forget_asked(Server* s) noexcept nogil:
    """What the question was about is known; what was sent behind it is not."""
    cdef uint32_t i
    s.touched_size -= s.asked_size
    for i in range(s.touched_size):
        s.touched[i] = s.touched[s.asked_size + i]
    s.asked_size = 0
    if s.touched_size == 0:
        untouch(s)


cdef void question_failed(Engine* e, Server* s) noexcept nogil:
    """The server is kept, and discarded after its client."""
    s.asked = 0
    s.flags |= IS_DIRTY
    untouch(s)
    if s.client != NULL:
        pin(e, s.client, EFFECT_SET)


cdef inline uint32_t get_u32(const unsigned char* at) noexcept nogil:
    return (<uint32_t> at[0] << 24) | (<uint32_t> at[1] << 16) | (<uint32_t> at[2] << 8) | at[3]


cdef void learn(Engine* e, Server* s, const unsigned char* name, uint32_t size, const unsigned char* value,
                int32_t value_size) noexcept nogil:
    """A setting has this value now; a negative size: there is none of that name."""
    cdef Param* known = params_find(s.params, name, size)
    cdef bint is_gone = value_size < 0 or (
        value_size == 4 and same_bytes(value, b"none", 4)
        and params_is_same_name(name, size, <const unsigned char*> b"role", 4))
    if known != NULL and known.flags & PARAM_REPORTED:
        return                          # as ParameterStatus said
    if is_gone:
        replace_params(e, &s.params, params_without(s.params, name, size))
        if s.client != NULL:
            replace_params(e, &s.client.params, params_without(s.client.params, name, size))
        return
    replace_params(e, &s.params, params_with(s.params, name, size, value, <uint32_t> value_size, 0))
    if s.client != NULL:
        replace_params(e, &s.client.params,
                       params_with(s.client.params, name, size, value, <uint32_t> value_size, 0))


# -- texts ---------------------------------------------------------------------------------------------


cdef bint waits_for_answers(Server* s) noexcept nogil:
    """Whether a text must not go out before it is known what was done before it, and can wait for that."""
    return session_awaits_ready(&s.session) and not session_needs_sync(&s.session)


cdef bint may_change_lexis(Client* c, Server* s, Reading* reading) noexcept nogil:
    """Whether texts may be read otherwise after this one."""
    return reading.changes_lexis or reading.has_resets and (
        s.initial.is_conforming != c.params.is_conforming or s.initial.is_multibyte != c.params.is_multibyte)


cdef int read_text(Engine* e, Client* c, Server* s, unsigned char** run, unsigned char* p,
                   unsigned char* end, const unsigned char* text, uint32_t size,
                   uint16_t effects) noexcept nogil:
    """A whole Query or Parse with an effect worth a second look is about to go to the server: a Handling.

    What must go out before it is in e.out, and so are the bytes from `run` up to `p`; what it does is noted.
    """
    cdef bint is_query = p[0] == c'Q'
    cdef bint is_alone
    cdef Reading reading
    sql_read(&reading, text, size, c.params.is_conforming, c.params.is_multibyte)
    if c.conn.route.mode == MODE_SESSION:
        reading.prepares = 0
        reading.forgets_all = 0
        reading.name_count = 0
    is_alone = is_query and (reading.has_resets or reading.name_count or may_change_lexis(c, s, &reading))
    if is_alone and waits_for_answers(s) and end - p <= CHUNK:
        return BLOCKED
    if not is_query and may_change_lexis(c, s, &reading):
        c.flags |= CHANGES_LEXIS
    effects = (effects & ~<uint16_t> EFFECT_READ) | reading.effects
    if reading.name_count or reading.has_other_names:
        begin_here(e, run, p)
    effects |= note_names(e, c, s, &reading, is_query)
    effects |= note_settings(e, c, s, &reading)
    s.ends |= reading.ends
    pin(e, c, effects)
    return ALONE if is_alone else AS_IT_IS


cdef uint16_t note_settings(Engine* e, Client* c, Server* s, Reading* reading) noexcept nogil:
    """Settings that the text changes; returns Effect bits."""
    cdef Route* r = c.conn.route
    cdef uint32_t i
    cdef uint16_t effects = 0
    cdef uint8_t kind
    for i in range(reading.count):
        kind = reading.settings[i].kind
        if not r.maintain_params and kind != SETTING_DISCARD_ALL:
            effects |= EFFECT_SET
        elif r.mode != MODE_SESSION or kind != SETTING_SET or s.flags & HAS_RESETS:
            touch(e, c, kind, reading.settings[i].name, reading.settings[i].size)
        if kind == SETTING_DISCARD_ALL:
            s.flags |= IS_CLEARED
    return effects


cdef uint16_t note_names(Engine* e, Client* c, Server* s, Reading* reading, bint is_query) noexcept nogil:
    """Prepared statements that the text names; returns Effect bits.

    What it executes, or prepares once more, must be there under the client's own name. What it deallocates
    must be there under that name too, and an empty statement will do.
    """
    cdef Name* known
    cdef uint32_t i
    if reading.forgets_all:
        copies_clear(&s.copies, &e.statements)
        s.flags |= HAS_STRAY_COPIES | AWAITS_TAG
    if c.prepared != NULL and s.session.status != c'E':
        for i in range(reading.name_count):
            known = names_find(c.prepared, reading.names[i].text, reading.names[i].size)
            if known != NULL:
                place_name(e, c, s, known, is_query, reading.names[i].kind == NAME_DEALLOCATE)
        if reading.has_other_names and reading.prepares:
            place_all_names(e, c, s, is_query)
    return EFFECT_PREPARE if reading.prepares else 0
