"""What a server still owes; the design is in the .pxd."""

from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset


cdef void session_init(Session* self, uint8_t status) noexcept nogil:
    memset(self, 0, sizeof(Session))
    self.points = self.inline_points
    self.capacity = INLINE_POINTS
    self.status = status


cdef void session_free(Session* self) noexcept nogil:
    if self.points != NULL and self.points != self.inline_points:
        free(self.points)
    self.points = self.inline_points
    self.capacity = INLINE_POINTS
    self.head = 0
    self.length = 0


cdef inline Point* _at(Session* self, uint32_t i) noexcept nogil:
    return &self.points[(self.head + i) & (self.capacity - 1)]


cdef void _push(Session* self, uint8_t kind, uint8_t owner) noexcept nogil:
    cdef Point* last
    cdef Point* ring
    cdef uint32_t i, extended
    if self.length == 0:
        extended = self.due  # the open tail becomes the head's
    else:
        extended = self.tail
        self.tail = 0
        last = _at(self, self.length - 1)
        if last.kind == kind and last.owner == owner and last.extended == extended:
            last.count += 1
            return
    if self.length == self.capacity:
        if self.capacity >= MAX_POINTS:
            self.is_uncertain = 1
            return
        ring = <Point*> malloc(self.capacity * 2 * sizeof(Point))
        if ring == NULL:
            self.is_uncertain = 1
            return
        for i in range(self.length):
            ring[i] = _at(self, i)[0]
        if self.points != self.inline_points:
            free(self.points)
        self.points = ring
        self.head = 0
        self.capacity *= 2
    last = _at(self, self.length)
    last.kind = kind
    last.owner = owner
    last.extended = extended
    last.count = 1
    self.length += 1


cdef void _pop(Session* self) noexcept nogil:
    """The head point is answered: go to the next one and load what is due before it."""
    cdef Point* head = _at(self, 0)
    head.count -= 1
    if head.count == 0:
        self.head = (self.head + 1) & (self.capacity - 1)
        self.length -= 1
    if self.length:
        self.due = _at(self, 0).extended
    else:
        self.due = self.tail
        self.tail = 0


cdef inline void _drop_copy_ends(Session* self) noexcept nogil:
    while self.length and self.due == 0 and _at(self, 0).kind == POINT_COPY_END:
        _pop(self)


cdef void session_frontend(Session* self, uint8_t kind, uint8_t owner) noexcept nogil:
    if kind == c'Q' or kind == c'F':
        if self.is_copy_in:
            self.is_uncertain = 1
            return
        if not self.is_skipping:
            _push(self, POINT_QUERY if kind == c'Q' else POINT_CALL, owner)
    elif kind == c'S':
        if self.is_copy_in:
            self.swallowed += 1
            return
        self.is_skipping = 0
        _push(self, POINT_SYNC, owner)
    elif kind == c'P' or kind == c'B' or kind == c'E' or kind == c'D' or kind == c'C':
        if self.is_copy_in:
            self.is_uncertain = 1
            return
        if not self.is_skipping:
            if self.length:
                self.tail += 1
            else:
                self.due += 1
    elif kind == c'c' or kind == c'f':
        if self.is_copy_in:
            self.is_copy_in = 0
            self.swallowed = 0
        elif not self.is_skipping:
            _push(self, POINT_COPY_END, owner)
            _drop_copy_ends(self)


cdef void _skip_to_sync(Session* self) noexcept nogil:
    while self.length:
        if _at(self, 0).kind == POINT_SYNC:
            self.due = 0
            return
        _at(self, 0).count = 1
        _pop(self)
    self.due = 0
    self.tail = 0
    self.is_skipping = 1


cdef void _enter_copy_in(Session* self) noexcept nogil:
    """Syncs already on their way are swallowed, up to a CopyDone that is on its way too."""
    cdef uint32_t skip = 0, i, extended
    cdef Point* point
    # A Query that started the COPY stays at the head; the swallowed points stand behind it.
    if self.due == 0 and self.length and _at(self, 0).kind == POINT_QUERY:
        skip = 1
    if self.length == skip:
        self.is_copy_in = 1
        self.swallowed = 0
        return
    if skip and _at(self, 0).count > 1:
        # further queries inside the COPY data: PostgreSQL answers that with an error we cannot count
        self.is_uncertain = 1
        return
    i = skip
    extended = 0
    while i < self.length:
        point = _at(self, i)
        if point.kind == POINT_COPY_END:
            break
        if point.kind != POINT_SYNC or point.count > 1 or (point.extended and i > 0):
            self.is_uncertain = 1
            return
        i += 1
    cdef bint found = i < self.length
    if found and _at(self, i).count > 1:
        self.is_uncertain = 1
        return
    cdef uint32_t removed = i - skip + (1 if found else 0)
    # close the gap: points behind move forward
    cdef uint32_t j
    for j in range(skip, self.length - removed):
        _at(self, j)[0] = _at(self, j + removed)[0]
    self.length -= removed
    if not found:
        self.is_copy_in = 1
        self.swallowed = removed
    if skip == 0:
        # what was due before the removed point is due before the next one
        if self.length:
            _at(self, 0).extended += self.due
            self.due = _at(self, 0).extended
        else:
            self.due += self.tail
            self.tail = 0


cdef bint session_backend(Session* self, uint8_t kind) noexcept nogil:
    self.error_was_last = 0
    if kind == c'D' or kind == c'd':
        return self.length != 0 or self.due != 0
    if kind == c'N' or kind == c'A' or kind == c'S':
        return True
    if kind == c'E':
        self.error_was_last = 1
        if self.is_copy_in:
            self.is_copy_in = 0
            if self.swallowed:
                self.is_uncertain = 1
        self.is_copy_out = 0
        if self.due:
            _skip_to_sync(self)
            return True
        if self.length == 0:
            return False
        return True
    if self.length == 0 and self.due == 0:
        return False
    if (kind == c'C' or kind == c'T' or kind == c'1' or kind == c'2' or kind == c'3' or kind == c'n'
            or kind == c'I' or kind == c's'):
        if kind == c'C':
            self.is_copy_out = 0
            self.is_copy_in = 0
        if self.due:
            self.due -= 1
            if self.due == 0:
                _drop_copy_ends(self)
        return True
    if kind == c'G':
        _enter_copy_in(self)
        return True
    if kind == c'H':
        self.is_copy_out = 1
        return True
    return kind == c'c' or kind == c't' or kind == c'V' or kind == c'Z' or kind == c'W'


cdef int session_ready(Session* self, uint8_t status) noexcept nogil:
    cdef int owner
    _drop_copy_ends(self)
    if self.length == 0 or self.due:
        return -1
    owner = _at(self, 0).owner
    self.status = status
    self.is_copy_in = 0
    self.is_copy_out = 0
    _pop(self)
    _drop_copy_ends(self)
    return owner


cdef uint8_t session_owner(Session* self) noexcept nogil:
    if self.length:
        return _at(self, 0).owner
    return OWNER_CLIENT


cdef bint session_is_idle(Session* self) noexcept nogil:
    return (self.length == 0 and self.due == 0 and not self.is_skipping and not self.is_copy_in)


cdef bint session_needs_sync(Session* self) noexcept nogil:
    if self.is_skipping:
        return True
    if self.length:
        return self.tail != 0
    return self.due != 0
