"""Prepared statements in passing: Parse, Bind, Describe and Close with a name."""

from libc.stdint cimport uint16_t, uint32_t, uint8_t
from libc.stdlib cimport calloc, free
from libc.string cimport memchr, memcmp, memcpy

from gpooler.relay.frame cimport HEADER
from gpooler.relay.io cimport CHUNK, MAX_PIECES, iovec
from gpooler.relay.params cimport PARAM_READ_ONLY
from gpooler.relay.prepared cimport (
    CHANGE_ALIAS, CHANGE_COPY, CHANGE_DEFINE, CHANGE_EVICT, CHANGE_FORGET, CHANGE_NOTHING, Change, Name,
    Names, STATEMENT_NAME, Statement, changes_add, changes_commit, changes_undo, copies_add, copies_clear,
    copies_has, copies_remove, copies_use, name_free, name_new, names_add, names_clear, names_find,
    names_take, statement_of, statement_release,
)
from gpooler.relay.scanner cimport EFFECT_PREPARE, EFFECT_READ, Scan, scan_begin, scan_feed
from gpooler.relay.session cimport (
    OWNER_CLIENT, OWNER_EXTRA, OWNER_RESET, session_awaits_ready, session_change, session_frontend,
    session_has_sync_point,
)


cdef enum Handling:
    AS_IT_IS = 0
    INCOMPLETE = 1              # more of the message must come first
    REPLACED = 2                # the whole message is dealt with
    BLOCKED = 4                 # not before the answers to earlier groups
    HEADED = 3                  # e.taken bytes of it are dealt with; the rest goes out behind e.out
    ALONE = 5                   # as it is, and nothing behind it before it is answered


# -- pieces for the server -----------------------------------------------------------------------------


cdef inline void out_begin(Engine* e) noexcept nogil:
    e.out_count = 1                     # the first is kept for a deploy
    e.scratch_used = 0


cdef inline bint out_is_full(Engine* e) noexcept nogil:
    return e.out_count > MAX_PIECES - 8 or e.scratch_used > SCRATCH - 2 * CHUNK


cdef inline void out_run(Engine* e, unsigned char* run, unsigned char* p) noexcept nogil:
    """Bytes of the client's that stay where they are."""
    if p > run:
        e.out[e.out_count].iov_base = run
        e.out[e.out_count].iov_len = p - run
        e.out_count += 1


cdef inline void begin_here(Engine* e, unsigned char** run, unsigned char* p) noexcept nogil:
    """Other pieces follow what stands before `p`."""
    out_run(e, run[0], p)
    run[0] = p


cdef inline void out_copy(Engine* e, const unsigned char* data, uint32_t size) noexcept nogil:
    """Bytes in a message of ours, which `out_message` began."""
    memcpy(e.scratch + e.scratch_used, data, size)
    e.scratch_used += size


cdef void out_message(Engine* e, uint8_t kind, uint32_t size) noexcept nogil:
    """The header of a message whose body has so many bytes."""
    cdef unsigned char* at = e.scratch + e.scratch_used
    at[0] = kind
    put_u32(at + 1, size + 4)
    e.scratch_used += HEADER


cdef inline void out_add(Engine* e, uint32_t began) noexcept nogil:
    """What was put into the scratch since then is the next piece."""
    e.out[e.out_count].iov_base = e.scratch + began
    e.out[e.out_count].iov_len = e.scratch_used - began
    e.out_count += 1


cdef void out_parse(Engine* e, Statement* statement) noexcept nogil:
    cdef uint32_t began = e.scratch_used
    out_message(e, c'P', STATEMENT_NAME + statement.size)
    out_copy(e, statement.name, STATEMENT_NAME)
    out_copy(e, statement.body, statement.size)
    out_add(e, began)


cdef void out_close(Engine* e, const unsigned char* name, uint32_t size) noexcept nogil:
    """A Close of a statement; `size` with its NUL."""
    cdef uint32_t began = e.scratch_used
    cdef unsigned char kind = c'S'
    out_message(e, c'C', 1 + size)
    out_copy(e, &kind, 1)
    out_copy(e, name, size)
    out_add(e, began)


# -- what the tables and the server have ---------------------------------------------------------------


cdef void note_change(Engine* e, Server* s, uint8_t kind, uint8_t owner, Statement* statement,
                      Name* name) noexcept nogil:
    """Takes over both references. Without memory the server is not used again."""
    session_change(&s.session, owner)
    if kind == CHANGE_DEFINE or kind == CHANGE_COPY:
        s.conn.route.words[counters.ROUTE_SERVER_PARSES] += 1
    if changes_add(&s.changes, kind, statement, name) == NULL:
        s.session.is_uncertain = 1
        if name != NULL:
            name_free(&e.statements, name)
        statement_release(&e.statements, statement)


cdef void make_room(Engine* e, Server* s) noexcept nogil:
    cdef Statement* oldest
    if s.copies.count < s.conn.route.max_copies:
        return
    oldest = s.copies.oldest.statement
    oldest.references += 1
    out_close(e, oldest.name, STATEMENT_NAME)
    copies_remove(&s.copies, &e.statements, oldest)
    note_change(e, s, CHANGE_EVICT, OWNER_EXTRA, oldest, NULL)


cdef void put_copy(Engine* e, Server* s, Statement* statement) noexcept nogil:
    """A Parse under the hashed name; the caller notes whose it is."""
    make_room(e, s)
    if s.flags & HAS_STRAY_COPIES:
        # it may be there although nothing is known of it
        out_close(e, statement.name, STATEMENT_NAME)
        note_change(e, s, CHANGE_NOTHING, OWNER_EXTRA, NULL, NULL)
    out_parse(e, statement)
    copies_add(&s.copies, statement)


cdef void need_copy(Engine* e, Server* s, Statement* statement) noexcept nogil:
    """Have the server know the statement before the client's next message."""
    if copies_use(&s.copies, statement):
        return
    put_copy(e, s, statement)
    statement.references += 1
    note_change(e, s, CHANGE_COPY, OWNER_EXTRA, statement, NULL)


cdef uint32_t settings_of(Engine* e, Client* c) noexcept nogil:
    """What decides the meaning of a text besides itself, into the end of the scratch: its size.

    A literal of a date is read when its statement is parsed, under the DateStyle of that moment.
    """
    cdef uint32_t size = 0, part, i
    cdef unsigned char* at = e.settings
    for i in range(c.params.count):
        if c.params.items[i].flags & PARAM_READ_ONLY:
            continue
        if c.params.items[i].name_size == 16 and same_bytes(c.params.items[i].text, b"application_name", 16):
            continue
        part = c.params.items[i].name_size + c.params.items[i].value_size + 2
        if size + part > CHUNK:
            break
        memcpy(at + size, c.params.items[i].text, part)
        size += part
    return size


# -- messages ------------------------------------------------------------------------------------------


cdef int prepared_message(Engine* e, Client* c, Server* s, unsigned char** run, unsigned char* p,
                          unsigned char* end, uint32_t length) noexcept nogil:
    """A Parse, Bind, Describe or Close, header first: a Handling.

    What goes out before or instead of it is in e.out, and so are the bytes from `run` up to it.
    """
    cdef uint8_t kind = p[0]
    cdef unsigned char* last = end if <size_t> (end - p) <= length else p + length + 1
    cdef bint is_whole = <size_t> (end - p) > length
    cdef int missing = INCOMPLETE if not is_whole and length < CHUNK - 64 else AS_IT_IS
    cdef unsigned char* name = p + HEADER
    cdef unsigned char* stop
    cdef uint32_t began, portal = 0
    cdef Name* known
    cdef Statement* statement
    if s.session.is_copy_in or s.session.is_skipping:
        return AS_IT_IS                 # PostgreSQL refuses it, or does not look at it
    if kind == c'B':
        stop = <unsigned char*> memchr(name, 0, last - name)
        if stop == NULL:
            return missing
        portal = <uint32_t> (stop + 1 - name)
        name = stop + 1
    elif kind != c'P':
        if name == last:
            return missing
        if name[0] != c'S':
            return AS_IT_IS
        name += 1
    stop = <unsigned char*> memchr(name, 0, last - name)
    if stop == NULL:
        return missing
    if stop == name:
        if c.flags & MAY_MEET_UNNAMED and kind != c'P':
            # what the client before it left behind must not be found
            c.flags &= ~<uint32_t> MAY_MEET_UNNAMED
            begin_here(e, run, p)
            out_close(e, name, 1)
            note_change(e, s, CHANGE_NOTHING, OWNER_EXTRA, NULL, NULL)
        elif kind == c'P':
            c.flags &= ~<uint32_t> MAY_MEET_UNNAMED
        return AS_IT_IS
    if not c.conn.route.has_prepared:
        return AS_IT_IS
    if kind == c'P' and s.pins & EFFECT_PREPARE and (
            c.prepared == NULL or names_find(c.prepared, name, <uint32_t> (stop - name)) == NULL):
        return AS_IT_IS                 # among names that SQL gave
    if ((s.changes.head != NULL or s.session.has_copy_end) and session_awaits_ready(&s.session)
            and end - p <= CHUNK):
        # Behind a Sync it matters whether what was prepared or closed before it came to pass, and behind a
        # COPY whether the answers can be told apart.
        return BLOCKED
    if s.session.is_uncertain and not is_known_in_doubt(e, c, s, kind, name, <uint32_t> (stop - name)):
        return AS_IT_IS
    if kind == c'P' or kind == c'C':
        c.flags |= HAS_NEW_NAMES
    if kind == c'P':
        if missing == INCOMPLETE:
            return INCOMPLETE
        if not is_whole:
            begin_here(e, run, p)
            keep_long(e, c, s, name, <uint32_t> (stop - name))
            return AS_IT_IS
        begin_here(e, run, p)
        return define(e, c, s, name, stop, last)
    if c.prepared == NULL:
        return AS_IT_IS
    known = names_find(c.prepared, name, <uint32_t> (stop - name))
    if known == NULL:
        return AS_IT_IS                 # PostgreSQL says so itself
    if kind == c'C':
        if not is_whole:
            return missing
        begin_here(e, run, p)
        names_take(c.prepared, known)
        out_run(e, p, last)             # there is no such name: it answers all the same
        note_change(e, s, CHANGE_FORGET, OWNER_CLIENT, NULL, known)
        return REPLACED
    if portal > CHUNK // 2:
        return AS_IT_IS
    begin_here(e, run, p)
    statement = known.statement
    c.prepared.uses += 1
    known.used = c.prepared.uses
    if statement.effects & EFFECT_READ and kind == c'B':
        read_text(e, c, s, run, p, end, statement.body, statement.size, statement.effects)
    else:
        pin(e, c, statement.effects)
    if c.asked != NULL and kind == c'B':
        slow_text(c.asked, statement.body, statement.size, 0)
    need_copy(e, s, statement)
    began = e.scratch_used
    out_message(e, kind, length - 4 - <uint32_t> (stop + 1 - name) + STATEMENT_NAME)
    if kind == c'B':
        out_copy(e, p + HEADER, portal)
    else:
        out_copy(e, p + HEADER, 1)
    out_copy(e, statement.name, STATEMENT_NAME)
    out_add(e, began)
    e.taken = <uint32_t> (stop + 1 - p)
    return HEADED


cdef void keep_long(Engine* e, Client* c, Server* s, const unsigned char* name, uint32_t size) noexcept nogil:
    """A Parse too long to be kept: its statement is this server's, which the client keeps."""
    cdef Name* known = NULL
    if c.prepared != NULL:
        known = names_find(c.prepared, name, size)
    if known != NULL:
        place_name(e, c, s, known, False, False)    # PostgreSQL says that it is taken
    pin(e, c, EFFECT_PREPARE)


cdef bint is_known_in_doubt(Engine* e, Client* c, Server* s, uint8_t kind, unsigned char* name,
                            uint32_t size) noexcept nogil:
    """Whether a name means a statement that this server has.

    Nobody can tell the answers apart any more, and the client keeps this server: nothing may be put between
    its messages, and what it prepares from now on is there under its own name.
    """
    cdef Name* known = NULL
    if c.prepared != NULL:
        known = names_find(c.prepared, name, size)
    if known == NULL:
        return False
    if kind == c'P' or kind == c'C':
        names_take(c.prepared, known)
        name_free(&e.statements, known)
        return False
    return copies_has(&s.copies, known.statement)


cdef int define(Engine* e, Client* c, Server* s, unsigned char* name, unsigned char* stop,
                unsigned char* last) noexcept nogil:
    """A whole Parse with a name."""
    cdef uint32_t size = <uint32_t> (stop - name)
    cdef uint32_t began
    cdef bint may_be_failed = s.session.status == c'E' or session_has_sync_point(&s.session)
    cdef Statement* statement
    cdef Name* mine
    cdef Scan scan
    if c.prepared == NULL:
        c.prepared = <Names*> calloc(1, sizeof(Names))
        if c.prepared == NULL:
            return AS_IT_IS
    mine = name_new(name, size, NULL)
    if mine == NULL or c.prepared.bytes > c.conn.route.max_names_bytes:
        if mine != NULL:
            name_free(&e.statements, mine)
        return AS_IT_IS
    if names_find(c.prepared, name, size) != NULL:
        # Have PostgreSQL refuse it in its own words; what that leaves behind is discarded.
        name_free(&e.statements, mine)
        out_close(e, name, size + 1)
        note_change(e, s, CHANGE_NOTHING, OWNER_EXTRA, NULL, NULL)
        began = e.scratch_used
        out_message(e, c'P', size + 4)
        out_copy(e, name, size + 1)
        out_copy(e, <const unsigned char*> b"\x00\x00\x00", 3)
        out_add(e, began)
        note_change(e, s, CHANGE_NOTHING, OWNER_EXTRA, NULL, NULL)
        s.flags |= IS_DIRTY | HAS_REAL_NAMES
        out_run(e, name - HEADER, last)
        session_frontend(&s.session, c'P', OWNER_CLIENT)
        return REPLACED
    statement = statement_of(&e.statements, stop + 1, <uint32_t> (last - stop - 1), e.settings,
                             settings_of(e, c))
    if statement == NULL or names_add(c.prepared, name, size, statement) == NULL:
        statement_release(&e.statements, statement)
        name_free(&e.statements, mine)
        return AS_IT_IS
    scan_begin(&scan, False, c.params.is_conforming, c.params.is_multibyte)
    scan_feed(&scan, stop + 1, last - stop - 1)
    statement.effects = scan.effects
    statement.references += 1
    if may_be_failed and copies_has(&s.copies, statement):
        # In a failed block PostgreSQL refuses most texts: it is asked once more.
        statement.references += 1
        out_close(e, statement.name, STATEMENT_NAME)
        copies_remove(&s.copies, &e.statements, statement)
        note_change(e, s, CHANGE_EVICT, OWNER_EXTRA, statement, NULL)
    elif copies_use(&s.copies, statement):
        out_close(e, b"gp_", 4)
        note_change(e, s, CHANGE_ALIAS, OWNER_CLIENT, statement, mine)
        return REPLACED
    put_copy(e, s, statement)
    note_change(e, s, CHANGE_DEFINE, OWNER_CLIENT, statement, mine)
    return REPLACED


cdef void place_name(Engine* e, Client* c, Server* s, Name* name, bint is_query,
                     bint is_empty) noexcept nogil:
    """Put a client's statement, or an empty one, on its server under the client's own name, for SQL to find.

    In front of a Query it has a Sync of its own: its failure must not make PostgreSQL skip the Query.
    """
    cdef uint32_t began = e.scratch_used
    cdef uint32_t size = 3 if is_empty else name.statement.size
    cdef uint8_t owner = OWNER_RESET if is_query else OWNER_EXTRA
    if e.out_count > MAX_PIECES - 4 or e.scratch_used > SCRATCH - 2 * CHUNK:
        return
    out_message(e, c'P', name.size + 1 + size)
    out_copy(e, name.text, name.size)
    out_copy(e, <const unsigned char*> b"\x00\x00\x00\x00", 4 if is_empty else 1)
    out_add(e, began)
    if not is_empty:
        e.out[e.out_count].iov_base = name.statement.body   # (it lives as long as its name)
        e.out[e.out_count].iov_len = size
        e.out_count += 1
    names_take(c.prepared, name)
    note_change(e, s, CHANGE_FORGET, owner, NULL, name)
    if is_query:
        began = e.scratch_used
        out_message(e, c'S', 0)
        out_add(e, began)
        session_frontend(&s.session, c'S', OWNER_RESET)
    if is_empty:
        s.flags |= HAS_PLACED


cdef void place_all_names(Engine* e, Client* c, Server* s, bint is_query) noexcept nogil:
    cdef uint32_t i = 0
    while i < c.prepared.capacity and not out_is_full(e):
        if c.prepared.buckets[i] == NULL:
            i += 1
        else:
            place_name(e, c, s, c.prepared.buckets[i], is_query, False)


cdef void forget_all(Engine* e, Server* s) noexcept nogil:
    """DEALLOCATE ALL or DISCARD ALL was done: what is there came behind it, and is not answered yet."""
    cdef Client* c = s.client
    cdef Change* change
    cdef Name* at
    cdef Name* following
    cdef uint32_t i
    s.flags &= ~<uint32_t> HAS_STRAY_COPIES
    if c == NULL or c.prepared == NULL:
        return
    change = s.changes.head
    while change != NULL:
        if change.kind == CHANGE_FORGET and change.name != NULL:
            name_free(&e.statements, change.name)
            change.name = NULL
            change.kind = CHANGE_NOTHING
        change = change.next
    for i in range(c.prepared.capacity):
        at = c.prepared.buckets[i]
        while at != NULL:
            following = at.next
            change = s.changes.head
            while change != NULL and not (
                    (change.kind == CHANGE_DEFINE or change.kind == CHANGE_ALIAS)
                    and change.name.size == at.size and memcmp(change.name.text, at.text, at.size) == 0):
                change = change.next
            if change == NULL:
                names_take(c.prepared, at)
                name_free(&e.statements, at)
            at = following


cdef Name* find_by_hash(Names* self, const unsigned char* hashed) noexcept nogil:
    """A client's name, the latest used, of the statement that has this name on the server."""
    cdef uint32_t i
    cdef Name* at
    cdef Name* found = NULL
    for i in range(self.capacity):
        at = self.buckets[i]
        while at != NULL:
            if (memcmp(at.statement.name, hashed, STATEMENT_NAME - 1) == 0
                    and (found == NULL or at.used > found.used)):
                found = at
            at = at.next
    return found


cdef uint32_t own_name_error(Engine* e, Client* c, const unsigned char* message,
                             uint32_t whole) noexcept nogil:
    """An ErrorResponse that names a statement as on the server, with the client's name, into e.question.

    Returns its size, 0 when it names none.
    """
    cdef const unsigned char* at = message + HEADER
    cdef const unsigned char* end = message + whole
    cdef Name* name
    cdef uint32_t before, size
    if c.prepared == NULL:
        return 0
    while True:
        at = <const unsigned char*> memchr(at, c'"', end - at)
        if at == NULL or end - at < STATEMENT_NAME + 1:
            return 0
        at += 1
        if memcmp(at, b"gp_", 3) == 0 and at[STATEMENT_NAME - 1] == c'"':
            break
    name = find_by_hash(c.prepared, at)
    if name == NULL or whole + name.size > CHUNK:
        return 0
    before = <uint32_t> (at - message)
    size = whole - (STATEMENT_NAME - 1) + name.size
    memcpy(e.question, message, before)
    memcpy(e.question + before, name.text, name.size)
    memcpy(e.question + before + name.size, at + STATEMENT_NAME - 1, end - at - (STATEMENT_NAME - 1))
    put_u32(e.question + 1, size - 1)
    return size


# -- answers -------------------------------------------------------------------------------------------


cdef void change_answered(Engine* e, Server* s, unsigned char* p) noexcept nogil:
    """The answer to the oldest change came, no error; it may become another for the client."""
    cdef Change* change = s.changes.head
    if change == NULL:
        return
    if change.kind == CHANGE_ALIAS and p[0] == c'3':
        p[0] = c'1'
    changes_commit(&s.changes, &e.statements)


cdef void changes_skipped(Engine* e, Server* s) noexcept nogil:
    """PostgreSQL skips up to a Sync: what was to be done there is not done."""
    cdef uint32_t count = s.session.skipped
    s.session.skipped = 0
    changes_undo(&s.changes, &e.statements, count, s.client.prepared if s.client != NULL else NULL, &s.copies)


# -- ends ----------------------------------------------------------------------------------------------


cdef void forget_names(Engine* e, Client* c) noexcept nogil:
    if c.prepared != NULL:
        names_clear(c.prepared, &e.statements)
        free(c.prepared)
        c.prepared = NULL


cdef void forget_copies(Engine* e, Server* s) noexcept nogil:
    """The server is gone, or has none any more."""
    changes_undo(&s.changes, &e.statements, 0xffffffff,
                 s.client.prepared if s.client != NULL else NULL, &s.copies)
    copies_clear(&s.copies, &e.statements)
