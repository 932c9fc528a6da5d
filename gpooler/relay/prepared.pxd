"""Prepared statements that every client of a pool may use on every server of it.

What a client calls by a name of its own is a *statement*: a text, its parameter types and the settings under
which it was parsed, interned, so that two clients mean the same record. On a server it is called by a hash of
all that, keyed with a secret of this gpooler: no client can name, or guess, what another one has prepared.

    client   names    name → statement      what it has prepared
    server   copies   set of statements     what PostgreSQL has under hashed names, the latest used first

Messages are sent before the answers to earlier ones are in. So both tables run ahead of PostgreSQL, and each
step leaves a *change* in a FIFO, which is committed when PostgreSQL has answered and taken back, the last one
first, when it skipped the message after an error.

The protocol chapters "Extended Query" and "Message Formats"; SipHash: Aumasson and Bernstein, 2012, with the
128-bit output of its authors' reference. Belongs to the relay thread. Free of Python objects.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


cdef enum:
    STATEMENT_NAME = 36         # of a hashed name with its NUL: "gp_" and 32 digits


cdef struct Statement:
    uint64_t hash[2]
    Statement* next             # in its bucket
    uint32_t references         # names, copies and changes
    uint16_t effects            # scanner.Effect bits of its text
    uint32_t size               # of the first part of the body
    uint32_t whole              # of both
    unsigned char name[STATEMENT_NAME]
    unsigned char body[1]       # as in a Parse message: text, NUL, number of types, types; then the settings


cdef struct Statements:         # every statement that anybody has
    Statement** buckets
    uint32_t capacity
    uint32_t count
    uint64_t key[2]


cdef struct Name:
    Name* next                  # in its bucket
    Statement* statement
    uint32_t hash
    uint32_t size
    uint32_t used               # Names.uses when it was bound or described last
    unsigned char text[1]


cdef struct Names:
    Name** buckets
    uint32_t capacity
    uint32_t count
    uint32_t uses
    uint64_t bytes              # what names and texts take


cdef struct Copy:
    Copy* next                  # in its bucket
    Copy* newer                 # by last use
    Copy* older
    Statement* statement


cdef struct Copies:
    Copy** buckets
    uint32_t capacity
    uint32_t count
    Copy* newest
    Copy* oldest


cdef enum ChangeKind:
    CHANGE_NOTHING = 0          # our own Close of what may not be there
    CHANGE_DEFINE = 1           # the client's Parse went out: a name, and a copy
    CHANGE_ALIAS = 2            # the server has a copy: a name; a Close of nothing went out, and 3 becomes 1
    CHANGE_COPY = 3             # our own Parse went out: a copy; its answer is ours
    CHANGE_FORGET = 4           # the client's Close: no name any more
    CHANGE_EVICT = 5            # our own Close: no copy any more; its answer is ours


cdef struct Change:
    Change* next                # the one after it
    uint8_t kind
    Statement* statement
    Name* name                  # FORGET: what was taken out; DEFINE, ALIAS: a copy of the name


cdef struct Changes:            # those that PostgreSQL has not answered yet
    Change* head
    Change* tail


# The statement of a Parse message's body behind its name; `settings` is what else decides its meaning. NULL
# without memory. The caller owns a reference.
cdef Statement* statement_of(Statements* self, const unsigned char* body, uint32_t size,
                             const unsigned char* settings, uint32_t settings_size) noexcept nogil
cdef void statement_release(Statements* self, Statement* statement) noexcept nogil
cdef void statements_free(Statements* self) noexcept nogil

# Takes over the caller's reference to the statement, which may be NULL. NULL without memory.
cdef Name* name_new(const unsigned char* text, uint32_t size, Statement* statement) noexcept nogil
cdef Name* names_find(Names* self, const unsigned char* text, uint32_t size) noexcept nogil
# Takes over the caller's reference. NULL without memory.
cdef Name* names_add(Names* self, const unsigned char* text, uint32_t size,
                     Statement* statement) noexcept nogil
# Out of the table; the name is the caller's.
cdef void names_take(Names* self, Name* name) noexcept nogil
cdef void names_put_back(Names* self, Name* name) noexcept nogil
cdef void names_clear(Names* self, Statements* statements) noexcept nogil
cdef void name_free(Statements* statements, Name* name) noexcept nogil

cdef bint copies_has(Copies* self, Statement* statement) noexcept nogil
# Likewise, and now it is the latest used.
cdef bint copies_use(Copies* self, Statement* statement) noexcept nogil
# Takes a reference of its own.
cdef bint copies_add(Copies* self, Statement* statement) noexcept nogil
cdef void copies_remove(Copies* self, Statements* statements, Statement* statement) noexcept nogil
cdef void copies_clear(Copies* self, Statements* statements) noexcept nogil

# Takes over the references to statement and name. NULL without memory: then they stay the caller's.
cdef Change* changes_add(Changes* self, uint8_t kind, Statement* statement, Name* name) noexcept nogil
# The oldest was answered.
cdef void changes_commit(Changes* self, Statements* statements) noexcept nogil
# The `count` oldest were skipped. `names` is NULL when the client is gone.
cdef void changes_undo(Changes* self, Statements* statements, uint32_t count, Names* names,
                       Copies* copies) noexcept nogil
