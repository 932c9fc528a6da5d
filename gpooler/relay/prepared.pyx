"""Prepared statements for every client on every server; the design is in the .pxd."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset


cdef enum:
    LEAST_CAPACITY = 8          # of a hash table; a power of two


# -- SipHash-2-4 with 128 bits -------------------------------------------------------------------------


cdef inline uint64_t _rotate(uint64_t x, int bits) noexcept nogil:
    return (x << bits) | (x >> (64 - bits))


cdef inline void _round(uint64_t* v) noexcept nogil:
    v[0] += v[1]
    v[1] = _rotate(v[1], 13) ^ v[0]
    v[0] = _rotate(v[0], 32)
    v[2] += v[3]
    v[3] = _rotate(v[3], 16) ^ v[2]
    v[0] += v[3]
    v[3] = _rotate(v[3], 21) ^ v[0]
    v[2] += v[1]
    v[1] = _rotate(v[1], 17) ^ v[2]
    v[2] = _rotate(v[2], 32)


cdef inline void _rounds(uint64_t* v, int count) noexcept nogil:
    while count:
        _round(v)
        count -= 1


cdef void siphash(const uint64_t* key, const unsigned char* data, uint64_t size,
                  uint64_t* result) noexcept nogil:
    """Little-endian machines only, like the rest of the relay's loads."""
    cdef uint64_t v[4]
    cdef uint64_t word, at = 0
    v[0] = key[0] ^ <uint64_t> 0x736f6d6570736575
    v[1] = key[1] ^ <uint64_t> 0x646f72616e646f6d ^ 0xee
    v[2] = key[0] ^ <uint64_t> 0x6c7967656e657261
    v[3] = key[1] ^ <uint64_t> 0x7465646279746573
    while size - at >= 8:
        memcpy(&word, data + at, 8)
        v[3] ^= word
        _rounds(v, 2)
        v[0] ^= word
        at += 8
    word = 0
    memcpy(&word, data + at, size - at)
    word |= size << 56
    v[3] ^= word
    _rounds(v, 2)
    v[0] ^= word
    v[2] ^= 0xee
    _rounds(v, 4)
    result[0] = v[0] ^ v[1] ^ v[2] ^ v[3]
    v[1] ^= 0xdd
    _rounds(v, 4)
    result[1] = v[0] ^ v[1] ^ v[2] ^ v[3]


# -- statements ----------------------------------------------------------------------------------------


cdef bint _grow_statements(Statements* self) noexcept nogil:
    cdef uint32_t capacity = self.capacity * 2 if self.capacity else LEAST_CAPACITY
    cdef Statement** buckets = <Statement**> calloc(capacity, sizeof(Statement*))
    cdef Statement* at
    cdef Statement* following
    cdef uint32_t i
    if buckets == NULL:
        return False
    for i in range(self.capacity):
        at = self.buckets[i]
        while at != NULL:
            following = at.next
            at.next = buckets[at.hash[0] & (capacity - 1)]
            buckets[at.hash[0] & (capacity - 1)] = at
            at = following
    free(self.buckets)
    self.buckets = buckets
    self.capacity = capacity
    return True


cdef Statement* statement_of(Statements* self, const unsigned char* body, uint32_t size,
                             const unsigned char* settings, uint32_t settings_size) noexcept nogil:
    cdef const char* digits = b"0123456789abcdef"
    cdef uint32_t whole = size + settings_size
    cdef Statement* made
    cdef Statement* at
    cdef int i
    if self.count >= self.capacity and not _grow_statements(self) and self.capacity == 0:
        return NULL
    made = <Statement*> malloc(sizeof(Statement) + whole)
    if made == NULL:
        return NULL
    memcpy(made.body, body, size)
    memcpy(made.body + size, settings, settings_size)
    siphash(self.key, made.body, whole, made.hash)
    at = self.buckets[made.hash[0] & (self.capacity - 1)]
    while at != NULL:
        if (at.hash[0] == made.hash[0] and at.hash[1] == made.hash[1] and at.size == size
                and at.whole == whole and memcmp(at.body, made.body, whole) == 0):
            free(made)
            at.references += 1
            return at
        at = at.next
    made.references = 1
    made.effects = 0
    made.size = size
    made.whole = whole
    memcpy(made.name, b"gp_", 3)
    for i in range(32):
        made.name[3 + i] = digits[(made.hash[i // 16] >> (60 - 4 * (i % 16))) & 15]
    made.name[STATEMENT_NAME - 1] = 0
    made.next = self.buckets[made.hash[0] & (self.capacity - 1)]
    self.buckets[made.hash[0] & (self.capacity - 1)] = made
    self.count += 1
    return made


cdef void statement_release(Statements* self, Statement* statement) noexcept nogil:
    cdef Statement** place
    if statement == NULL:
        return
    statement.references -= 1
    if statement.references:
        return
    place = &self.buckets[statement.hash[0] & (self.capacity - 1)]
    while place[0] != statement:
        place = &place[0].next
    place[0] = statement.next
    self.count -= 1
    free(statement)


cdef void statements_free(Statements* self) noexcept nogil:
    """Every reference is gone."""
    free(self.buckets)
    self.buckets = NULL
    self.capacity = 0


# -- a client's names ----------------------------------------------------------------------------------


cdef uint32_t _hash_of(const unsigned char* text, uint32_t size) noexcept nogil:
    """FNV-1a: a client that makes its own names collide slows itself down."""
    cdef uint32_t hash = <uint32_t> 2166136261, i
    for i in range(size):
        hash = (hash ^ text[i]) * <uint32_t> 16777619
    return hash


cdef bint _grow_names(Names* self) noexcept nogil:
    cdef uint32_t capacity = self.capacity * 2 if self.capacity else LEAST_CAPACITY
    cdef Name** buckets = <Name**> calloc(capacity, sizeof(Name*))
    cdef Name* at
    cdef Name* following
    cdef uint32_t i
    if buckets == NULL:
        return False
    for i in range(self.capacity):
        at = self.buckets[i]
        while at != NULL:
            following = at.next
            at.next = buckets[at.hash & (capacity - 1)]
            buckets[at.hash & (capacity - 1)] = at
            at = following
    free(self.buckets)
    self.buckets = buckets
    self.capacity = capacity
    return True


cdef Name* names_find(Names* self, const unsigned char* text, uint32_t size) noexcept nogil:
    cdef uint32_t hash
    cdef Name* at
    if self.count == 0:
        return NULL
    hash = _hash_of(text, size)
    at = self.buckets[hash & (self.capacity - 1)]
    while at != NULL:
        if at.hash == hash and at.size == size and memcmp(at.text, text, size) == 0:
            return at
        at = at.next
    return NULL


cdef inline uint64_t _bytes_of(Name* name) noexcept nogil:
    return sizeof(Name) + name.size + name.statement.size


cdef Name* name_new(const unsigned char* text, uint32_t size, Statement* statement) noexcept nogil:
    cdef Name* name = <Name*> malloc(sizeof(Name) + size)
    if name == NULL:
        return NULL
    name.next = NULL
    name.hash = _hash_of(text, size)
    name.size = size
    name.used = 0
    memcpy(name.text, text, size)
    name.statement = statement
    return name


cdef Name* names_add(Names* self, const unsigned char* text, uint32_t size,
                     Statement* statement) noexcept nogil:
    cdef Name* name
    if self.count >= self.capacity and not _grow_names(self) and self.capacity == 0:
        return NULL
    name = name_new(text, size, statement)
    if name != NULL:
        names_put_back(self, name)
    return name


cdef void names_put_back(Names* self, Name* name) noexcept nogil:
    name.next = self.buckets[name.hash & (self.capacity - 1)]
    self.buckets[name.hash & (self.capacity - 1)] = name
    self.count += 1
    self.bytes += _bytes_of(name)


cdef void names_take(Names* self, Name* name) noexcept nogil:
    cdef Name** place = &self.buckets[name.hash & (self.capacity - 1)]
    while place[0] != name:
        place = &place[0].next
    place[0] = name.next
    self.count -= 1
    self.bytes -= _bytes_of(name)


cdef void names_clear(Names* self, Statements* statements) noexcept nogil:
    cdef uint32_t i
    cdef Name* at
    cdef Name* following
    for i in range(self.capacity):
        at = self.buckets[i]
        while at != NULL:
            following = at.next
            name_free(statements, at)
            at = following
    free(self.buckets)
    memset(self, 0, sizeof(Names))


cdef void name_free(Statements* statements, Name* name) noexcept nogil:
    statement_release(statements, name.statement)
    free(name)


# -- a server's copies ---------------------------------------------------------------------------------


cdef bint _grow_copies(Copies* self) noexcept nogil:
    cdef uint32_t capacity = self.capacity * 2 if self.capacity else LEAST_CAPACITY
    cdef Copy** buckets = <Copy**> calloc(capacity, sizeof(Copy*))
    cdef Copy* at = self.newest
    if buckets == NULL:
        return False
    while at != NULL:
        at.next = buckets[at.statement.hash[0] & (capacity - 1)]
        buckets[at.statement.hash[0] & (capacity - 1)] = at
        at = at.older
    free(self.buckets)
    self.buckets = buckets
    self.capacity = capacity
    return True


cdef Copy* _find_copy(Copies* self, Statement* statement) noexcept nogil:
    cdef Copy* at
    if self.count == 0:
        return NULL
    at = self.buckets[statement.hash[0] & (self.capacity - 1)]
    while at != NULL and at.statement != statement:
        at = at.next
    return at


cdef inline void _unlink(Copies* self, Copy* copy) noexcept nogil:
    if copy.newer != NULL:
        copy.newer.older = copy.older
    else:
        self.newest = copy.older
    if copy.older != NULL:
        copy.older.newer = copy.newer
    else:
        self.oldest = copy.newer


cdef inline void _link_newest(Copies* self, Copy* copy) noexcept nogil:
    copy.newer = NULL
    copy.older = self.newest
    if self.newest != NULL:
        self.newest.newer = copy
    else:
        self.oldest = copy
    self.newest = copy


cdef bint copies_has(Copies* self, Statement* statement) noexcept nogil:
    return _find_copy(self, statement) != NULL


cdef bint copies_use(Copies* self, Statement* statement) noexcept nogil:
    cdef Copy* copy = _find_copy(self, statement)
    if copy == NULL:
        return False
    if self.newest != copy:
        _unlink(self, copy)
        _link_newest(self, copy)
    return True


cdef bint copies_add(Copies* self, Statement* statement) noexcept nogil:
    cdef Copy* copy
    if self.count >= self.capacity and not _grow_copies(self) and self.capacity == 0:
        return False
    copy = <Copy*> malloc(sizeof(Copy))
    if copy == NULL:
        return False
    statement.references += 1
    copy.statement = statement
    copy.next = self.buckets[statement.hash[0] & (self.capacity - 1)]
    self.buckets[statement.hash[0] & (self.capacity - 1)] = copy
    _link_newest(self, copy)
    self.count += 1
    return True


cdef void copies_remove(Copies* self, Statements* statements, Statement* statement) noexcept nogil:
    cdef Copy* copy = _find_copy(self, statement)
    cdef Copy** place
    if copy == NULL:
        return
    place = &self.buckets[statement.hash[0] & (self.capacity - 1)]
    while place[0] != copy:
        place = &place[0].next
    place[0] = copy.next
    _unlink(self, copy)
    self.count -= 1
    free(copy)
    statement_release(statements, statement)


cdef void copies_clear(Copies* self, Statements* statements) noexcept nogil:
    cdef Copy* at = self.newest
    cdef Copy* following
    while at != NULL:
        following = at.older
        statement_release(statements, at.statement)
        free(at)
        at = following
    free(self.buckets)
    memset(self, 0, sizeof(Copies))


# -- changes -------------------------------------------------------------------------------------------


cdef Change* changes_add(Changes* self, uint8_t kind, Statement* statement, Name* name) noexcept nogil:
    cdef Change* change = <Change*> malloc(sizeof(Change))
    if change == NULL:
        return NULL
    change.next = NULL
    change.kind = kind
    change.statement = statement
    change.name = name
    if self.tail != NULL:
        self.tail.next = change
    else:
        self.head = change
    self.tail = change
    return change


cdef void _change_free(Statements* statements, Change* change) noexcept nogil:
    if change.name != NULL:
        name_free(statements, change.name)
    statement_release(statements, change.statement)
    free(change)


cdef void changes_commit(Changes* self, Statements* statements) noexcept nogil:
    cdef Change* change = self.head
    self.head = change.next
    if self.head == NULL:
        self.tail = NULL
    _change_free(statements, change)


cdef void changes_undo(Changes* self, Statements* statements, uint32_t count, Names* names,
                       Copies* copies) noexcept nogil:
    cdef Change* newest = NULL
    cdef Change* change
    cdef Name* name
    while count and self.head != NULL:
        change = self.head
        self.head = change.next
        change.next = newest
        newest = change
        count -= 1
    if self.head == NULL:
        self.tail = NULL
    while newest != NULL:
        change = newest
        newest = change.next
        if names != NULL:
            if change.kind == CHANGE_DEFINE or change.kind == CHANGE_ALIAS:
                name = names_find(names, change.name.text, change.name.size)
                if name != NULL and name.statement == change.statement:
                    names_take(names, name)
                    name_free(statements, name)
            elif change.kind == CHANGE_FORGET:
                names_put_back(names, change.name)
                change.name = NULL
        if change.kind == CHANGE_DEFINE or change.kind == CHANGE_COPY:
            copies_remove(copies, statements, change.statement)
        elif change.kind == CHANGE_EVICT:
            copies_add(copies, change.statement)
        _change_free(statements, change)
