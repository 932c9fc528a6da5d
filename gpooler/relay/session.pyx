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
        _remove_runs(self, 1)
    _load_due(self)


cdef inline void _remove_runs(Session* self, uint32_t count) noexcept nogil:
    self.head = (self.head + count) & (self.capacity - 1)
    self.length -= count
    if self.length == 0 and self.capacity > KEPT_POINTS:
        free(self.points)
        self.points = self.inline_points
        self.capacity = INLINE_POINTS
        self.head = 0


cdef inline void _load_due(Session* self) noexcept nogil:
    """What is due before the point that is the head now comes on top of what is due already."""
    if self.length:
        self.due += _at(self, 0).extended
    else:
        self.due += self.tail
        self.tail = 0


cdef inline void _drop_copy_ends(Session* self) noexcept nogil:
    while self.length and self.due == 0 and _at(self, 0).kind == POINT_COPY_END:
        _pop(self)


cdef void session_frontend(Session* self, uint8_t kind, uint8_t owner) noexcept nogil:
    if kind == c'Q' or kind == c'F':
        if self.is_copy_in:
            self.is_uncertain = 1
        elif not self.is_skipping:
            self.is_open = 0
            _push(self, POINT_QUERY if kind == c'Q' else POINT_CALL, owner)
    elif kind == c'S':
        if self.is_copy_in:
            self.swallowed |= 1             # how many does not matter
        else:
            self.is_skipping = 0
            self.is_open = 0
            _push(self, POINT_SYNC, owner)
    elif kind == c'P' or kind == c'B' or kind == c'E' or kind == c'D' or kind == c'C':
        if self.is_copy_in:
            self.is_uncertain = 1
        elif not self.is_skipping:
            self.is_open = 1
            if self.length:
                self.tail += 1
            else:
                self.due += 1
    elif kind == c'c' or kind == c'f':
        self.has_copy_end = 1
        if self.is_copy_in:
            self.is_copy_in = 0
        elif not self.is_skipping:
            _push(self, POINT_COPY_END, owner)
            _drop_copy_ends(self)


cdef void session_change(Session* self, uint8_t owner) noexcept nogil:
    self.is_open = 1
    _push(self, POINT_CHANGE, owner)


cdef inline bint _is_change_next(Session* self) noexcept nogil:
    """Whether the next answer is that of a change point."""
    return self.due == 0 and self.length != 0 and _at(self, 0).kind == POINT_CHANGE


cdef void _skip_to_sync(Session* self) noexcept nogil:
    """An extended message failed: the server discards all, Query included, up to the next Sync."""
    while self.length:
        self.due = 0
        if _at(self, 0).kind == POINT_SYNC:
            return
        if _at(self, 0).kind == POINT_CHANGE:
            self.skipped += _at(self, 0).count
        _at(self, 0).count = 1
        _pop(self)
    self.due = 0
    self.tail = 0
    self.is_open = 0
    self.is_skipping = 1


cdef bint session_has_sync_point(Session* self) noexcept nogil:
    cdef uint32_t i
    for i in range(self.length):
        if _at(self, i).kind != POINT_COPY_END and _at(self, i).kind != POINT_CHANGE:
            return True
    return False


cdef bint session_awaits_ready(Session* self) noexcept nogil:
    return (not self.is_skipping and not self.is_copy_in and not self.is_copy_both
            and not self.is_uncertain and session_has_sync_point(self))


cdef bint _enter_copy_in(Session* self) noexcept nogil:
    """Syncs already on their way are swallowed, up to a CopyDone that is on its way too.

    False: nothing runs that could have started a COPY.
    """
    cdef uint32_t first = 0, i
    cdef Point* point
    cdef bint has_end = False
    if self.due == 0:
        # The Query that started the COPY stays at the head; what is swallowed stands behind it.
        if self.length == 0 or _at(self, 0).kind != POINT_QUERY:
            return False
        if _at(self, 0).count > 1:
            self.is_uncertain = 1
            return True
        first = 1
    elif self.due > 1:
        self.is_uncertain = 1
        return True
    i = first
    while i < self.length:
        point = _at(self, i)
        if point.extended and i > 0:
            self.is_uncertain = 1
            return True
        if point.kind == POINT_COPY_END:
            has_end = True
            break
        if point.kind != POINT_SYNC or point.extended and point.count > 1:
            self.is_uncertain = 1
            return True
        self.swallowed = 1
        i += 1
    if has_end:
        _at(self, i).count -= 1
        if _at(self, i).count == 0:
            i += 1
    elif self.length and self.tail:
        self.is_uncertain = 1
        return True
    else:
        self.is_copy_in = 1
    if first:
        _at(self, i - 1)[0] = _at(self, 0)[0]
        _remove_runs(self, i - 1)
    else:
        _remove_runs(self, i)
        _load_due(self)
        if not session_has_sync_point(self):
            self.is_open = 1
    return True


cdef bint session_backend(Session* self, uint8_t kind) noexcept nogil:
    self.error_was_last = kind == c'E'
    self.has_change = 0
    if kind == c'N' or kind == c'A' or kind == c'S' or kind == c'Z':
        return True
    if kind == c'E':
        if self.swallowed:
            self.is_uncertain = 1
        self.swallowed = 0
        self.is_copy_in = 0
        self.is_copy_out = 0
        self.is_copy_both = 0
        if self.due or _is_change_next(self):
            _skip_to_sync(self)
            return True
        return self.length != 0 or self.is_uncertain
    if self.length == 0 and self.due == 0:
        return self.is_uncertain
    if kind == c'D' or kind == c'd' or kind == c'c':
        return True
    if kind == c'C' or kind == c'T' or kind == c'I':
        if kind == c'C':
            self.is_copy_out = 0
            self.is_copy_in = 0
            self.is_copy_both = 0
            self.swallowed = 0
        if self.due:
            self.due -= 1
            _drop_copy_ends(self)
        return True
    if kind == c'1' or kind == c'2' or kind == c'3' or kind == c'n' or kind == c's':
        if _is_change_next(self):
            self.has_change = 1
            _pop(self)
            _drop_copy_ends(self)
            return True
        if self.due == 0:
            return self.is_uncertain
        self.due -= 1
        _drop_copy_ends(self)
        return True
    if kind == c't':                        # the T or n that follows is the answer
        return self.due != 0 or self.is_uncertain
    if kind == c'G':
        return _enter_copy_in(self) or self.is_uncertain
    if kind == c'H' or kind == c'W':
        self.is_copy_out = 1
        self.is_copy_both = kind == c'W'
        return True
    return kind == c'V'


cdef int session_ready(Session* self, uint8_t status) noexcept nogil:
    cdef int owner = OWNER_CLIENT
    if status != c'I' and status != c'T' and status != c'E':
        return -1
    _drop_copy_ends(self)
    if self.is_uncertain:
        self.due = 0
    elif self.length == 0 or self.due or _at(self, 0).kind == POINT_CHANGE:
        return -1
    self.status = status
    self.is_copy_in = 0
    self.is_copy_out = 0
    self.is_copy_both = 0
    self.swallowed = 0
    if self.length:
        owner = _at(self, 0).owner
        _pop(self)
        _drop_copy_ends(self)
    if self.length == 0:
        self.has_copy_end = 0
    return owner


cdef uint8_t session_owner(Session* self) noexcept nogil:
    if self.length == 0:
        return OWNER_CLIENT
    if _at(self, 0).kind == POINT_CHANGE and self.due:
        return OWNER_CLIENT
    return _at(self, 0).owner


cdef bint session_is_idle(Session* self) noexcept nogil:
    return (self.length == 0 and self.due == 0 and not self.is_open and not self.is_skipping
            and not self.is_copy_in)


cdef bint session_needs_sync(Session* self) noexcept nogil:
    return self.is_open or self.is_skipping
