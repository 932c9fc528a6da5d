"""What a server still owes: a FIFO of sync points, as PostgreSQL works through them.

A *sync point* is a frontend message that is answered by ReadyForQuery: Query, Sync, FunctionCall.
Each carries the number of extended-protocol messages (Parse, Bind, Describe, Execute, Close) that
stand before it and are answered one by one. Equal neighbours are kept as one run with a count, so a
pipeline of a thousand equal groups takes one entry.

Follows the protocol chapter "Message Flow" (Extended Query, Pipelining, COPY Operations):

* an ErrorResponse while extended answers are due makes the server skip everything, Query included,
  to the next Sync;
* inside COPY IN the server swallows Sync and Flush until CopyDone or CopyFail;
* stray CopyData, CopyDone, CopyFail outside COPY are ignored.

Where the count cannot be known any more, ``is_uncertain`` is set for good: any answer is then taken to be
in place, and the server is closed when its client leaves it. The cases:

* a COPY IN fails while a Sync was sent inside it: the server may have read it before or after the failure;
* inside a COPY IN anything is sent but CopyData, CopyDone, CopyFail, Flush, Sync: PostgreSQL ends the
  connection, unless the COPY fails before it reads that message;
* the ring cannot grow.

Free of Python objects.
"""

from libc.stdint cimport uint8_t, uint32_t


cdef enum PointKind:
    POINT_QUERY = 1
    POINT_SYNC = 2
    POINT_CALL = 3
    POINT_COPY_END = 4      # a CopyDone or CopyFail sent before we knew of a COPY; owes nothing
    POINT_CHANGE = 5        # a Parse or Close whose answer is looked at (relay/prepared.pxd: Change)


cdef enum PointOwner:
    OWNER_CLIENT = 0        # answers go to the client
    OWNER_DEPLOY = 1        # ours: session parameters before the client's request
    OWNER_RESET = 2         # ours: Sync, ROLLBACK, DISCARD after the client
    # ours: a Parse or Close among the client's messages; an error there is the client's
    OWNER_EXTRA = 3
    OWNER_ASK = 4           # ours: a question about the session's state


cdef enum:
    INLINE_POINTS = 4
    KEPT_POINTS = 64        # a larger ring is given back as soon as it is empty
    MAX_POINTS = 262144     # runs, not messages: 3 MiB; a longer pipeline is not followed


cdef struct Point:
    uint32_t extended       # extended answers due before this point
    uint32_t count          # how many equal points in a row
    uint8_t kind
    uint8_t owner


cdef struct Session:
    Point* points           # ring; inline_points until it grows
    uint32_t head
    uint32_t length
    uint32_t capacity
    uint32_t due            # extended answers still due before the head point (or the open tail)
    uint32_t tail           # extended messages sent since the last sync point, when length > 0
    uint32_t swallowed      # Syncs sent inside the COPY IN that has not completed yet
    uint8_t status          # last ReadyForQuery: I, T, E
    uint8_t is_skipping     # the server discards until a Sync that was not sent yet
    uint8_t is_open         # extended messages went out since the last sync point, answered or not
    uint8_t is_copy_in      # CopyInResponse seen, CopyDone/CopyFail not yet sent
    uint8_t is_copy_out
    uint8_t is_copy_both    # is_copy_out, too: a replication stream, which lasts as long as its client
    uint8_t is_uncertain
    uint8_t error_was_last  # the last complete message was an ErrorResponse
    uint8_t has_copy_end    # a CopyDone or CopyFail was sent since the session was idle
    uint8_t has_change      # the last message answered a change point
    uint32_t skipped        # change points whose messages the server skipped, since somebody set it to 0
    Point inline_points[INLINE_POINTS]


cdef void session_init(Session* self, uint8_t status) noexcept nogil
cdef void session_free(Session* self) noexcept nogil

# A frontend message of this kind goes to the server.
cdef void session_frontend(Session* self, uint8_t kind, uint8_t owner) noexcept nogil
# A Parse or Close whose answer is looked at goes to the server, outside of any COPY IN.
cdef void session_change(Session* self, uint8_t owner) noexcept nogil
# Whether a message that was sent will be answered by ReadyForQuery.
cdef bint session_has_sync_point(Session* self) noexcept nogil
# Whether ReadyForQuery comes, as far as can be known, whether or not another message is sent before it.
cdef bint session_awaits_ready(Session* self) noexcept nogil
# The header of a backend message of this kind came from the server. False: it came out of place.
cdef bint session_backend(Session* self, uint8_t kind) noexcept nogil
# A complete ReadyForQuery came. Returns the owner of the point it answers, -1 if none was due or the status
# is none.
cdef int session_ready(Session* self, uint8_t status) noexcept nogil
# Whose answers come next.
cdef uint8_t session_owner(Session* self) noexcept nogil
# Nothing is owed and nothing is open.
cdef bint session_is_idle(Session* self) noexcept nogil
# The server sends no ReadyForQuery before it gets a Sync (or, unless it skips, a Query): what it did for
# extended messages, answered or not, is not committed yet.
cdef bint session_needs_sync(Session* self) noexcept nogil
