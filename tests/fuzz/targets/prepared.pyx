"""Prepared statements: the tables run ahead of PostgreSQL as a model does and give every reference back."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcmp, memset

from gpooler.relay.prepared cimport (
    CHANGE_ALIAS, CHANGE_COPY, CHANGE_DEFINE, CHANGE_EVICT, CHANGE_FORGET, CHANGE_NOTHING, STATEMENT_NAME,
    Change, Changes, Copies, Copy, Name, Names, Statement, Statements, changes_add, changes_commit,
    changes_undo, copies_add, copies_clear, copies_has, copies_remove, copies_use, name_new,
    names_add, names_clear, names_find, names_take, statement_of, statements_free,
)
from tests.fuzz.input cimport Input, copy_of, must, take

cdef enum:
    NAMES = 24
    TEXTS = 32
    NONE = 255
    CHANGES = 4096              # an input has fewer bytes


cdef struct Entry:              # a change, as the model sees it
    uint8_t kind
    uint8_t name
    uint8_t text


cdef struct View:               # what exists, of one point of view
    uint8_t names[NAMES]        # to texts, or NONE
    bint copies[TEXTS]


cdef struct Stage:
    Statements statements
    Names names
    Copies copies
    Changes changes
    View ahead                  # everything sent was done
    View done                   # as PostgreSQL has it
    Entry entries[CHANGES]
    uint32_t first              # of the entries that are not answered
    uint32_t last
    uint32_t most               # copies on a server
    uint8_t order[TEXTS]        # texts by last use, the latest last
    uint32_t ordered
    Statement* of[TEXTS]        # where the model has met it, no reference


cdef void apply(View* view, Entry* entry) noexcept nogil:
    if entry.kind == CHANGE_DEFINE or entry.kind == CHANGE_ALIAS:
        view.names[entry.name] = entry.text
    elif entry.kind == CHANGE_FORGET:
        view.names[entry.name] = NONE
    if entry.kind == CHANGE_DEFINE or entry.kind == CHANGE_COPY:
        view.copies[entry.text] = True
    elif entry.kind == CHANGE_EVICT:
        view.copies[entry.text] = False


# -- the model's order of use --------------------------------------------------------------------------


cdef void order_drop(Stage* self, uint8_t text) noexcept nogil:
    cdef uint32_t i, kept = 0
    for i in range(self.ordered):
        if self.order[i] != text:
            self.order[kept] = self.order[i]
            kept += 1
    self.ordered = kept


cdef void order_use(Stage* self, uint8_t text) noexcept nogil:
    order_drop(self, text)
    self.order[self.ordered] = text
    self.ordered += 1


# -- acts, as relay/prepared.pxi does them -------------------------------------------------------------


cdef uint32_t name_of(uint8_t name, unsigned char* out) noexcept nogil:
    """The text of a name, of its own size: some are the beginning of others."""
    cdef uint32_t i, size = 1 + name % 7
    for i in range(size):
        out[i] = c'a' + (name // 7 if i == size - 1 else 0)
    return size


cdef Statement* statement(Stage* self, uint8_t text) noexcept nogil:
    """The statement of a text and settings, held."""
    cdef unsigned char body[64]
    cdef uint32_t i, size = 1 + text // 2
    cdef unsigned char* copy
    cdef unsigned char* settings
    cdef Statement* found
    for i in range(size):
        body[i] = c'a' + i
    memset(body + size, 0, 3)           # the end of the text, no types
    copy = copy_of(body, size + 3)
    settings = copy_of(<const unsigned char*> b"TimeZone\0UTC\0", 13 if text & 1 else 0)
    found = statement_of(&self.statements, copy, size + 3, settings, 13 if text & 1 else 0)
    must(found != NULL, "there is memory")
    must(found.size == size + 3 and found.whole == found.size + (13 if text & 1 else 0)
         and memcmp(found.body, copy, found.size) == 0
         and memcmp(found.body + found.size, settings, found.whole - found.size) == 0,
         "a statement is that of its text and settings")
    if self.of[text] != NULL:
        must(found == self.of[text], "a statement that is in use is found again")
    self.of[text] = found
    free(copy)
    free(settings)
    return found


cdef void change(Stage* self, uint8_t kind, uint8_t name, uint8_t text, Statement* statement,
                 Name* mine) noexcept nogil:
    cdef Entry* entry = &self.entries[self.last]
    must(changes_add(&self.changes, kind, statement, mine) != NULL, "there is memory")
    entry.kind = kind
    entry.name = name
    entry.text = text
    self.last += 1
    apply(&self.ahead, entry)


cdef uint8_t text_of(Stage* self, Statement* statement) noexcept nogil:
    cdef uint8_t text
    for text in range(TEXTS):
        if self.of[text] == statement:
            return text
    must(False, "a statement is one that was made")
    return NONE


cdef void put_copy(Stage* self, uint8_t text, Statement* statement) noexcept nogil:
    cdef Statement* oldest
    cdef uint8_t evicted
    if self.copies.count >= self.most:
        oldest = self.copies.oldest.statement
        evicted = text_of(self, oldest)
        must(self.ordered > 0 and evicted == self.order[0], "the one that was not used for longest goes")
        oldest.references += 1
        copies_remove(&self.copies, &self.statements, oldest)
        order_drop(self, evicted)
        change(self, CHANGE_EVICT, NONE, evicted, oldest, NULL)
    must(copies_add(&self.copies, statement), "there is memory")
    order_use(self, text)


cdef void define(Stage* self, uint8_t name, uint8_t text, bint is_again) noexcept nogil:
    """A Parse: ``is_again`` in a failed block, where a copy is parsed anew."""
    cdef unsigned char spelled[16]
    cdef uint32_t size = name_of(name, spelled)
    cdef Statement* made
    cdef Name* mine
    if names_find(&self.names, spelled, size) != NULL:
        change(self, CHANGE_NOTHING, NONE, NONE, NULL, NULL)
        return
    made = statement(self, text)
    mine = name_new(spelled, size, NULL)
    must(mine != NULL and names_add(&self.names, spelled, size, made) != NULL, "there is memory")
    made.references += 1
    if is_again and copies_has(&self.copies, made):
        made.references += 1
        copies_remove(&self.copies, &self.statements, made)
        order_drop(self, text)
        change(self, CHANGE_EVICT, NONE, text, made, NULL)
    elif copies_use(&self.copies, made):
        order_use(self, text)
        change(self, CHANGE_ALIAS, name, text, made, mine)
        return
    put_copy(self, text, made)
    change(self, CHANGE_DEFINE, name, text, made, mine)


cdef void bind(Stage* self, uint8_t name) noexcept nogil:
    cdef unsigned char spelled[16]
    cdef uint32_t size = name_of(name, spelled)
    cdef Name* known = names_find(&self.names, spelled, size)
    cdef uint8_t text = self.ahead.names[name]
    must((known != NULL) == (text != NONE), "a name is found just when it is there")
    if known == NULL:
        return
    must(known.statement == self.of[text], "a name means its statement")
    if copies_use(&self.copies, known.statement):
        order_use(self, text)
        return
    put_copy(self, text, known.statement)
    known.statement.references += 1
    change(self, CHANGE_COPY, NONE, text, known.statement, NULL)


cdef void close(Stage* self, uint8_t name) noexcept nogil:
    cdef unsigned char spelled[16]
    cdef uint32_t size = name_of(name, spelled)
    cdef Name* known = names_find(&self.names, spelled, size)
    if known == NULL:
        return
    names_take(&self.names, known)
    change(self, CHANGE_FORGET, name, self.ahead.names[name], NULL, known)


cdef void answered(Stage* self) noexcept nogil:
    if self.first < self.last:
        apply(&self.done, &self.entries[self.first])
        self.first += 1
        changes_commit(&self.changes, &self.statements)


cdef void skipped(Stage* self, bint has_client) noexcept nogil:
    """All that is not answered is taken back."""
    cdef uint32_t i = self.last
    cdef Entry* entry
    changes_undo(&self.changes, &self.statements, self.last - self.first,
                 &self.names if has_client else NULL, &self.copies)
    while i > self.first:
        i -= 1
        entry = &self.entries[i]
        if entry.kind == CHANGE_DEFINE or entry.kind == CHANGE_COPY:
            order_drop(self, entry.text)
        elif entry.kind == CHANGE_EVICT:
            order_use(self, entry.text)
    self.last = self.first
    self.ahead.copies = self.done.copies
    if has_client:
        self.ahead.names = self.done.names


cdef void client_gone(Stage* self) noexcept nogil:
    """Its names go at once; another client comes when the answers are in."""
    names_clear(&self.names, &self.statements)
    memset(self.ahead.names, NONE, NAMES)
    skipped(self, False)
    memset(self.done.names, NONE, NAMES)


cdef void copies_gone(Stage* self) noexcept nogil:
    """As at the end of a server."""
    skipped(self, True)
    copies_clear(&self.copies, &self.statements)
    memset(self.ahead.copies, 0, sizeof(self.ahead.copies))
    memset(self.done.copies, 0, sizeof(self.done.copies))
    self.ordered = 0


# -- checks --------------------------------------------------------------------------------------------


cdef void check(Stage* self) noexcept nogil:
    cdef uint32_t references[TEXTS]
    cdef uint32_t i, count = 0, used = 0
    cdef uint64_t taken = 0
    cdef uint8_t text
    cdef Name* name
    cdef Copy* copy = self.copies.oldest
    cdef Copy* before = NULL
    cdef Change* at = self.changes.head
    memset(references, 0, sizeof(references))
    for i in range(self.names.capacity):
        name = self.names.buckets[i]
        while name != NULL:
            references[text_of(self, name.statement)] += 1
            taken += sizeof(Name) + name.size + name.statement.size
            count += 1
            name = name.next
    must(count == self.names.count and taken == self.names.bytes, "the names are counted, and their bytes")
    for i in range(NAMES):
        count -= self.ahead.names[i] != NONE
    must(count == 0, "there are as many names as the model has")
    for i in range(self.ordered):
        must(copy != NULL and copy.older == before, "the copies are linked by last use")
        text = text_of(self, copy.statement)
        must(text == self.order[i] and self.ahead.copies[text], "the copies are those of the model, in order")
        must(copies_has(&self.copies, copy.statement), "a copy is found")
        references[text] += 1
        before = copy
        copy = copy.newer
    must(copy == NULL and self.copies.newest == before and self.copies.count == self.ordered,
         "the copies are counted")
    for text in range(TEXTS):
        used += self.ahead.copies[text]
    must(used == self.ordered, "there are as many copies as the model has")
    for i in range(self.first, self.last):
        must(at != NULL and at.kind == self.entries[i].kind, "the changes are those of the model")
        if at.statement != NULL:
            references[text_of(self, at.statement)] += 1
        if at.name != NULL and at.name.statement != NULL:
            references[text_of(self, at.name.statement)] += 1
        at = at.next
    must(at == NULL, "the changes are counted")
    used = 0
    for text in range(TEXTS):
        if references[text]:
            must(self.of[text].references == references[text], "a statement counts who refers to it")
            used += 1
        else:
            self.of[text] = NULL        # it was freed
    must(self.statements.count == used, "a statement lives as long as somebody refers to it")


cdef void check_names(Stage* self) noexcept nogil:
    """Different statements have different names on the server."""
    cdef uint8_t one, other
    for one in range(TEXTS):
        for other in range(one):
            if self.of[one] != NULL and self.of[other] != NULL:
                must(memcmp(self.of[one].name, self.of[other].name, STATEMENT_NAME) != 0,
                     "a name on the server is that of one statement")


cdef void act(Stage* self, uint8_t what, uint8_t how) noexcept nogil:
    cdef uint8_t name = how % NAMES
    what %= 32
    if what < 8:
        define(self, name, (how // 8 + what) % TEXTS, what == 0)
    elif what < 16:
        bind(self, name)
    elif what < 20:
        close(self, name)
    elif what < 28:
        answered(self)
    elif what < 30:
        skipped(self, True)
    elif what == 30:
        client_gone(self)
    else:
        copies_gone(self)


cdef api void run(const unsigned char* data, size_t size) noexcept nogil:
    """How many copies a server may have in one byte, then two bytes for each act."""
    cdef Input rest = [data, data + size]
    cdef Stage stage
    cdef uint8_t what
    if size > CHANGES // 2:
        return
    memset(&stage, 0, sizeof(Stage))
    memset(stage.ahead.names, NONE, NAMES)
    stage.done = stage.ahead
    stage.statements.key[0] = 0x0706050403020100
    stage.most = 1 + take(&rest) % 20
    while rest.p < rest.end:
        what = take(&rest)
        act(&stage, what, take(&rest))
        check(&stage)
    check_names(&stage)
    # the newer half stays when the older one is taken back
    changes_undo(&stage.changes, &stage.statements, (stage.last - stage.first) // 2,
                 &stage.names, &stage.copies)
    while stage.changes.head != NULL:
        changes_commit(&stage.changes, &stage.statements)
    names_clear(&stage.names, &stage.statements)
    copies_clear(&stage.copies, &stage.statements)
    must(stage.statements.count == 0, "at the end nobody refers to anything")
    statements_free(&stage.statements)
