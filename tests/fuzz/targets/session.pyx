"""The session tracker agrees with a list of every message, and survives any order of messages."""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memset

from gpooler.relay.session cimport (
    OWNER_ASK, OWNER_CLIENT, OWNER_EXTRA, POINT_CHANGE, POINT_QUERY, Session, session_backend,
    session_change, session_free, session_frontend, session_has_sync_point, session_init, session_is_idle,
    session_needs_sync, session_owner, session_ready,
)
from tests.fuzz.input cimport Input, must, take

cdef enum:
    MOST = 4096                 # messages; an input has fewer bytes


cdef struct Message:
    uint8_t kind                # 'Q', 'F', 'S', 'P' for any extended one, 'X' for a change
    uint8_t owner


cdef struct Model:              # PostgreSQL without COPY IN
    Message sent[MOST]          # in the order of sending; those before `read` are answered
    uint32_t count
    uint32_t read
    uint32_t skipped            # changes
    bint is_ignoring            # up to the next Sync
    bint is_open                # extended messages were sent since the last sync point


cdef void check_form(Session* self) noexcept nogil:
    """What holds after any messages whatever."""
    cdef uint32_t i, at
    must(self.capacity and not self.capacity & (self.capacity - 1), "the ring's size is a power of two")
    must(self.length <= self.capacity and self.head < self.capacity, "the ring holds what it counts")
    for i in range(self.length):
        at = (self.head + i) & (self.capacity - 1)
        must(0 < self.points[at].count <= MOST, "a run is of at least one point")
        must(self.points[at].extended <= MOST, "no run has more answers than messages")
        must(POINT_QUERY <= self.points[at].kind <= POINT_CHANGE, "a point is of a known kind")
    must(self.due <= MOST and self.tail <= MOST and self.skipped <= MOST, "no number is below zero")
    must(self.length or not self.tail, "without points all answers are due")
    must(self.swallowed <= 1 and self.is_open <= 1 and self.is_skipping <= 1, "a flag is a flag")


cdef uint8_t owner_at(Model* model, uint32_t at) noexcept nogil:
    """Whose the answers to a message are: those of the next sync point or change at or behind it."""
    cdef uint32_t i
    for i in range(at, model.count):
        if model.sent[i].kind == c'X' and i > at and model.sent[at].kind != c'X':
            return OWNER_CLIENT
        if model.sent[i].kind != c'P':
            return model.sent[i].owner
    return OWNER_CLIENT


cdef void check(Session* self, Model* model) noexcept nogil:
    """What the list of all messages says."""
    cdef bint has_sync_point = False
    cdef uint32_t i
    check_form(self)
    must(not self.is_uncertain, "without a COPY nothing is uncertain")
    for i in range(model.read, model.count):
        has_sync_point = has_sync_point or (model.sent[i].kind != c'X' and model.sent[i].kind != c'P')
    must(session_has_sync_point(self) == has_sync_point, "it knows whether a ReadyForQuery will come")
    must(session_is_idle(self) == (model.read == model.count and not model.is_open and not model.is_ignoring),
         "it is idle when nothing is owed or open")
    must(session_needs_sync(self) == (model.is_open or model.is_ignoring), "it knows when a Sync is missing")
    must(self.skipped == model.skipped, "it counts skipped changes")
    if model.read < model.count:
        must(session_owner(self) == owner_at(model, model.read), "it knows whose answer comes next")


cdef void send(Session* self, Model* model, uint8_t kind, uint8_t owner) noexcept nogil:
    cdef bint is_extended = kind == c'P' or kind == c'X'
    if kind == c'X':
        if self.is_skipping:            # nobody has it followed then
            return
        session_change(self, owner)
    else:
        session_frontend(self, kind, owner)
    if model.is_ignoring and kind != c'S':
        return
    model.is_ignoring = False
    model.is_open = is_extended
    model.sent[model.count].kind = kind
    model.sent[model.count].owner = owner
    model.count += 1


cdef void answer(Session* self, Model* model, uint8_t how) noexcept nogil:
    """PostgreSQL's answer to the oldest message."""
    cdef Message* message = &model.sent[model.read]
    cdef bint is_error = how & 7 == 0
    cdef uint8_t status = b"ITE"[how % 3]
    if message.kind == c'P' or message.kind == c'X':
        if is_error:
            must(session_backend(self, c'E') and self.error_was_last, "an error is in place")
            while model.read < model.count and model.sent[model.read].kind != c'S':
                if model.sent[model.read].kind == c'X':
                    model.skipped += 1
                model.read += 1
            if model.read == model.count:
                model.is_ignoring = True
                model.is_open = False
            return
        if message.kind == c'X' or how & 8:
            must(session_backend(self, c'3' if how & 16 else c'1'), "the answer to a Parse is in place")
        else:
            if how & 16:
                must(session_backend(self, c'D'), "a row is in place")
            if how & 32:
                must(session_backend(self, c'H') and session_backend(self, c'd')
                     and session_backend(self, c'c'), "COPY OUT is in place")
            must(session_backend(self, c's' if how & 64 else c'C'), "the end of an Execute is in place")
            must(not self.is_copy_out or how & 64, "a COPY ends with its command")
        must(self.has_change == (message.kind == c'X'), "it tells answers to changes from others")
        model.read += 1
        return
    if is_error:
        must(session_backend(self, c'E'), "an error is in place")
    elif message.kind == c'Q':
        must(session_backend(self, c'T') and session_backend(self, c'D') and session_backend(self, c'C'),
             "a result is in place")
    elif message.kind == c'F':
        must(session_backend(self, c'V'), "a function's result is in place")
    must(session_backend(self, c'Z') and session_ready(self, status) == message.owner,
         "a ReadyForQuery is its owner's")
    must(self.status == status, "the status is the last one's")
    model.read += 1


cdef void play(Input* rest) noexcept nogil:
    """Messages without COPY IN, answered as PostgreSQL does."""
    cdef Session session
    cdef Model model
    cdef uint8_t byte, owner
    memset(&model, 0, sizeof(Model))
    session_init(&session, c'I')
    while rest.p < rest.end:
        byte = take(rest)
        owner = (byte >> 4) % (OWNER_ASK + 1)
        if byte & 15 < 8:
            if byte & 15 > 4 and owner != OWNER_CLIENT and owner != OWNER_EXTRA:
                owner = OWNER_EXTRA
            send(&session, &model, b"QFSSPPXX"[byte & 7], owner if byte & 7 != 4 and byte & 7 != 5 else 0)
        elif byte & 15 == 8:
            must(session_backend(&session, c'N') and session_backend(&session, c'A')
                 and session_backend(&session, c'S'), "what PostgreSQL says of itself is always in place")
        elif byte & 15 == 9:
            session.skipped = 0
            model.skipped = 0
        elif model.read < model.count:
            answer(&session, &model, take(rest))
        check(&session, &model)
    while model.read < model.count:
        answer(&session, &model, 4)
        check(&session, &model)
    if not session_is_idle(&session):
        send(&session, &model, c'S', OWNER_CLIENT)
        answer(&session, &model, 1)
        check(&session, &model)
    must(session_is_idle(&session) and not session.due and not session.tail, "at the end nothing is owed")
    session_free(&session)


cdef void pelt(Input* rest) noexcept nogil:
    """Any messages of both sides in any order."""
    cdef Session session
    cdef uint8_t byte, kind
    session_init(&session, c'I')
    while rest.p < rest.end:
        byte = take(rest)
        if byte < 128:
            kind = b"QFSPBEDCcfdHX"[byte % 13]
            if kind != c'X':
                session_frontend(&session, kind, (byte // 13) % (OWNER_ASK + 1))
            elif not session.is_copy_in and not session.is_skipping:
                session_change(&session, (byte // 13) % (OWNER_ASK + 1))
        elif byte < 250:
            session_backend(&session, b"NASEDdcCTI123nstGHWV"[byte % 20])
        else:
            session_ready(&session, b"ITEX"[byte % 4])
        check_form(&session)
        session_is_idle(&session)
        must(session_owner(&session) <= OWNER_ASK, "an owner is a known one")
        must(session_has_sync_point(&session) == 0 or session.length, "no point, no sync point")
    session_free(&session)


cdef api void run(const unsigned char* data, size_t size) noexcept nogil:
    """The kind of play in one byte, then a byte or two for each message."""
    cdef Input rest = [data, data + size]
    if size > MOST:
        return
    if take(&rest) & 1:
        pelt(&rest)
    else:
        play(&rest)
