"""Session parameters as interned, immutable sets; the design is in the .pxd."""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport uint8_t, uint32_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memchr, memcmp, memcpy, strlen

from gpooler.relay.scanner cimport MULTIBYTE_NONE, MULTIBYTE_PAIRS, MULTIBYTE_SJIS


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t* mutex, void* attributes)
    int pthread_mutex_lock(pthread_mutex_t* mutex)
    int pthread_mutex_unlock(pthread_mutex_t* mutex)


cdef enum:
    BUCKETS = 4096


cdef pthread_mutex_t _lock
cdef Param** _params = NULL
cdef ParamSet** _sets = NULL


cdef void params_global_init() noexcept nogil:
    global _params, _sets
    if _params != NULL:
        return
    pthread_mutex_init(&_lock, NULL)
    _params = <Param**> calloc(BUCKETS, sizeof(Param*))
    _sets = <ParamSet**> calloc(BUCKETS, sizeof(ParamSet*))


cdef inline unsigned char _lower(unsigned char c) noexcept nogil:
    return c + 32 if c'A' <= c <= c'Z' else c


cdef int _compare_names(const unsigned char* a, uint32_t a_size,
                        const unsigned char* b, uint32_t b_size) noexcept nogil:
    cdef uint32_t i, size = a_size if a_size < b_size else b_size
    for i in range(size):
        if _lower(a[i]) != _lower(b[i]):
            return <int> _lower(a[i]) - <int> _lower(b[i])
    return <int> a_size - <int> b_size


cdef Param* _param(const unsigned char* name, uint32_t name_size,
                   const unsigned char* value, uint32_t value_size, uint8_t flags) noexcept nogil:
    """An interned parameter, held. The lock is taken by the caller."""
    cdef uint32_t h = 2166136261u, i
    for i in range(name_size):
        h = (h ^ name[i]) * 16777619u
    h = (h ^ (<uint32_t> flags + 256)) * 16777619u
    for i in range(value_size):
        h = (h ^ value[i]) * 16777619u
    cdef Param* p = _params[h % BUCKETS]
    while p != NULL:
        if (p.hash == h and p.name_size == name_size and p.value_size == value_size and p.flags == flags
                and memcmp(p.text, name, name_size) == 0
                and memcmp(p.text + name_size + 1, value, value_size) == 0):
            p.references += 1
            return p
        p = p.next
    p = <Param*> malloc(sizeof(Param) + name_size + value_size + 2)
    if p == NULL:
        return NULL
    p.references = 1
    p.hash = h
    p.name_size = name_size
    p.value_size = value_size
    p.flags = flags
    memcpy(p.text, name, name_size)
    p.text[name_size] = 0
    memcpy(p.text + name_size + 1, value, value_size)
    p.text[name_size + 1 + value_size] = 0
    p.next = _params[h % BUCKETS]
    _params[h % BUCKETS] = p
    return p


cdef void _release_param(Param* p) noexcept nogil:
    cdef Param** link
    p.references -= 1
    if p.references:
        return
    link = &_params[p.hash % BUCKETS]
    while link[0] != p:
        link = &link[0].next
    link[0] = p.next
    free(p)


cdef bint _is_word(Param* p, const char* word) noexcept nogil:
    """Whether a value is this word once all but letters and digits is left out, in any case."""
    cdef const unsigned char* value = p.text + p.name_size + 1
    cdef uint32_t i
    cdef unsigned char c
    for i in range(p.value_size):
        c = _lower(value[i])
        if c'a' <= c <= c'z' or c'0' <= c <= c'9':
            if c != <unsigned char> word[0]:
                return False
            word += 1
    return word[0] == 0


cdef bint _is_off(Param* p) noexcept nogil:
    """A Boolean that is off, in any of the spellings that PostgreSQL's parse_bool takes."""
    cdef const unsigned char* value
    if p == NULL or p.value_size == 0:
        return False
    value = p.text + p.name_size + 1
    return (_lower(value[0]) == c'f' or _lower(value[0]) == c'n' or value[0] == c'0'
            or p.value_size > 1 and _lower(value[0]) == c'o' and _lower(value[1]) == c'f')


cdef uint8_t _multibyte(Param* p) noexcept nogil:
    """Names as pg_char_to_encoding reads them. JOHAB is none of them: PostgreSQL takes no ASCII inside it."""
    if p == NULL:
        return MULTIBYTE_NONE
    if (_is_word(p, b"sjis") or _is_word(p, b"shiftjis") or _is_word(p, b"mskanji") or _is_word(p, b"win932")
            or _is_word(p, b"windows932") or _is_word(p, b"shiftjis2004")):
        return MULTIBYTE_SJIS
    if (_is_word(p, b"big5") or _is_word(p, b"win950") or _is_word(p, b"windows950")
            or _is_word(p, b"gbk") or _is_word(p, b"win936") or _is_word(p, b"windows936")
            or _is_word(p, b"uhc") or _is_word(p, b"win949") or _is_word(p, b"windows949")
            or _is_word(p, b"gb18030")):
        return MULTIBYTE_PAIRS
    return MULTIBYTE_NONE


cdef ParamSet* _set(Param** items, uint32_t count) noexcept nogil:
    """An interned set, held; takes over the caller's holds on the items. The lock is taken."""
    cdef uint32_t h = 2166136261u, i
    for i in range(count):
        h = (h ^ items[i].hash) * 16777619u
    cdef ParamSet* s = _sets[h % BUCKETS]
    while s != NULL:
        if s.hash == h and s.count == count and memcmp(s.items, items, count * sizeof(Param*)) == 0:
            s.references += 1
            for i in range(count):
                _release_param(items[i])
            return s
        s = s.next
    s = <ParamSet*> malloc(sizeof(ParamSet) + count * sizeof(Param*))
    if s == NULL:
        for i in range(count):
            _release_param(items[i])
        return NULL
    s.references = 1
    s.hash = h
    s.count = count
    memcpy(s.items, items, count * sizeof(Param*))
    s.is_conforming = not _is_off(params_find(s, <const unsigned char*> b"standard_conforming_strings", 27))
    s.is_multibyte = _multibyte(params_find(s, <const unsigned char*> b"client_encoding", 15))
    s.next = _sets[h % BUCKETS]
    _sets[h % BUCKETS] = s
    return s


cdef ParamSet* params_empty() noexcept nogil:
    cdef ParamSet* s
    cdef Param* nothing[1]
    pthread_mutex_lock(&_lock)
    s = _set(nothing, 0)
    pthread_mutex_unlock(&_lock)
    return s


cdef ParamSet* params_hold(ParamSet* s) noexcept nogil:
    if s != NULL:
        pthread_mutex_lock(&_lock)
        s.references += 1
        pthread_mutex_unlock(&_lock)
    return s


cdef void params_release(ParamSet* s) noexcept nogil:
    cdef ParamSet** link
    cdef uint32_t i
    if s == NULL:
        return
    pthread_mutex_lock(&_lock)
    s.references -= 1
    if s.references == 0:
        link = &_sets[s.hash % BUCKETS]
        while link[0] != s:
            link = &link[0].next
        link[0] = s.next
        for i in range(s.count):
            _release_param(s.items[i])
        free(s)
    pthread_mutex_unlock(&_lock)


cdef ParamSet* params_with(ParamSet* s, const unsigned char* name, uint32_t name_size,
                           const unsigned char* value, uint32_t value_size, uint8_t flags) noexcept nogil:
    cdef Param* items[MAX_PARAMS + 1]
    cdef uint32_t i = 0, n = 0
    cdef int order
    cdef Param* new
    cdef ParamSet* made = NULL
    pthread_mutex_lock(&_lock)
    new = _param(name, name_size, value, value_size, flags)
    if new == NULL:
        pthread_mutex_unlock(&_lock)
        return NULL
    while i < s.count:
        order = _compare_names(s.items[i].text, s.items[i].name_size, name, name_size)
        if order >= 0:
            break
        items[n] = s.items[i]
        items[n].references += 1
        n += 1
        i += 1
    if i < s.count and order == 0:
        i += 1
    items[n] = new
    n += 1
    while i < s.count:
        items[n] = s.items[i]
        items[n].references += 1
        n += 1
        i += 1
    if n <= MAX_PARAMS:
        made = _set(items, n)
    else:
        for i in range(n):
            _release_param(items[i])
    pthread_mutex_unlock(&_lock)
    return made


cdef ParamSet* params_without(ParamSet* s, const unsigned char* name, uint32_t name_size) noexcept nogil:
    cdef Param* items[MAX_PARAMS]
    cdef Param* gone = params_find(s, name, name_size)
    cdef ParamSet* made
    cdef uint32_t i, n = 0
    if gone == NULL:
        return params_hold(s)
    pthread_mutex_lock(&_lock)
    for i in range(s.count):
        if s.items[i] != gone:
            items[n] = s.items[i]
            items[n].references += 1
            n += 1
    made = _set(items, n)
    pthread_mutex_unlock(&_lock)
    return made


cdef ParamSet* params_merge(ParamSet* base, ParamSet* over) noexcept nogil:
    cdef ParamSet* s = params_hold(base)
    cdef ParamSet* t
    cdef Param* p
    cdef Param* old
    cdef uint32_t i
    cdef uint8_t flags
    for i in range(over.count):
        p = over.items[i]
        old = params_find(s, p.text, p.name_size)
        flags = p.flags
        if old != NULL:
            if old.flags & PARAM_READ_ONLY:
                continue
            flags = old.flags
            # keep the server's spelling of the name
            t = params_with(s, old.text, old.name_size, p.text + p.name_size + 1, p.value_size, flags)
        else:
            t = params_with(s, p.text, p.name_size, p.text + p.name_size + 1, p.value_size, flags)
        params_release(s)
        if t == NULL:
            return NULL
        s = t
    return s


cdef ParamSet* params_settle(ParamSet* server, ParamSet* client) noexcept nogil:
    cdef Param* items[MAX_PARAMS]
    cdef uint32_t i = 0, j = 0, n = 0
    cdef int order
    cdef Param* p
    cdef ParamSet* made
    pthread_mutex_lock(&_lock)
    while i < server.count or j < client.count:
        if i == server.count:
            order = 1
        elif j == client.count:
            order = -1
        else:
            order = _compare_names(server.items[i].text, server.items[i].name_size,
                                   client.items[j].text, client.items[j].name_size)
        p = NULL
        if order < 0:
            if server.items[i].flags & PARAM_REPORTED:
                p = server.items[i]
            i += 1
        elif order > 0:
            if not client.items[j].flags & PARAM_REPORTED:
                p = client.items[j]
            j += 1
        else:
            p = server.items[i] if server.items[i].flags & PARAM_REPORTED else client.items[j]
            i += 1
            j += 1
        if p != NULL:
            if n == MAX_PARAMS:
                for i in range(n):
                    _release_param(items[i])
                pthread_mutex_unlock(&_lock)
                return NULL
            p.references += 1
            items[n] = p
            n += 1
    made = _set(items, n)
    pthread_mutex_unlock(&_lock)
    return made


cdef Param* params_find(ParamSet* s, const unsigned char* name, uint32_t name_size) noexcept nogil:
    cdef uint32_t low = 0, high = s.count, mid
    cdef int order
    while low < high:
        mid = (low + high) // 2
        order = _compare_names(s.items[mid].text, s.items[mid].name_size, name, name_size)
        if order == 0:
            return s.items[mid]
        if order < 0:
            low = mid + 1
        else:
            high = mid
    return NULL


cdef const unsigned char* params_value(ParamSet* s, const char* name) noexcept nogil:
    cdef Param* p = params_find(s, <const unsigned char*> name, <uint32_t> strlen(name))
    return NULL if p == NULL else p.text + p.name_size + 1


cdef bint params_is_same_name(const unsigned char* a, uint32_t a_size,
                              const unsigned char* b, uint32_t b_size) noexcept nogil:
    return _compare_names(a, a_size, b, b_size) == 0


cdef void params_counts(uint32_t* params, uint32_t* sets) noexcept nogil:
    cdef Param* p
    cdef ParamSet* s
    cdef uint32_t i
    params[0] = 0
    sets[0] = 0
    pthread_mutex_lock(&_lock)
    for i in range(BUCKETS):
        p = _params[i]
        while p != NULL:
            params[0] += 1
            p = p.next
        s = _sets[i]
        while s != NULL:
            sets[0] += 1
            s = s.next
    pthread_mutex_unlock(&_lock)


# -- deploy ------------------------------------------------------------------------------------------


cdef struct Out:
    unsigned char* data
    int size
    int capacity


cdef inline void _put(Out* out, const char* text) noexcept nogil:
    while text[0]:
        if out.size < out.capacity:
            out.data[out.size] = <unsigned char> text[0]
        out.size += 1
        text += 1


cdef inline void _byte(Out* out, unsigned char c) noexcept nogil:
    if out.size < out.capacity:
        out.data[out.size] = c
    out.size += 1


cdef bint _is_plain(const unsigned char* text, uint32_t size) noexcept nogil:
    """Printable ASCII: means the same in every encoding."""
    cdef uint32_t i
    for i in range(size):
        if text[i] < 0x20 or text[i] > 0x7e:
            return False
    return True


cdef bint _is_identifier(const unsigned char* text, uint32_t size) noexcept nogil:
    cdef uint32_t i
    for i in range(size):
        if not (c'a' <= _lower(text[i]) <= c'z' or text[i] == c'_'
                or (i and c'0' <= text[i] <= c'9')):
            return False
    return size > 0


cdef bint _can_set(Param* p) noexcept nogil:
    """Whether SET takes this value as the startup packet does.

    SET would take one string for one element of a setting that is a list of names (GUC_LIST_QUOTE), of which
    versions and extensions have more and more. A small word means the same either way; of the reported
    settings only search_path is one.
    """
    cdef const unsigned char* value = p.text + p.name_size + 1
    cdef uint32_t i
    if not _is_identifier(p.text, p.name_size) or not _is_plain(value, p.value_size):
        return False
    if (p.flags & PARAM_REPORTED
            and _compare_names(p.text, p.name_size, <const unsigned char*> b"search_path", 11) != 0):
        return True
    for i in range(p.value_size):
        if not (c'a' <= value[i] <= c'z' or c'0' <= value[i] <= c'9' or value[i] == c'_'):
            return False
    return p.value_size > 0


cdef void _literal(Out* out, const unsigned char* text, uint32_t size) noexcept nogil:
    """A string literal that no setting of the session can read otherwise."""
    cdef uint32_t i
    cdef const char* digits = b"0123456789abcdef"
    if _is_plain(text, size):
        _put(out, b"E'")
        for i in range(size):
            if text[i] == c"'" or text[i] == c'\\':
                _byte(out, text[i])
            _byte(out, text[i])
        _byte(out, c"'")
        return
    # A byte above 0x7e may combine with a following backslash or quote in some client encodings.
    _put(out, b"pg_catalog.convert_from(pg_catalog.decode('")
    for i in range(size):
        _byte(out, digits[text[i] >> 4])
        _byte(out, digits[text[i] & 15])
    _put(out, b"','hex'),pg_catalog.getdatabaseencoding())")


cdef int params_literal(const unsigned char* text, uint32_t size, unsigned char* buffer,
                        int capacity) noexcept nogil:
    cdef Out out
    out.data = buffer
    out.size = 0
    out.capacity = capacity
    _literal(&out, text, size)
    return -1 if out.size > capacity else out.size


cdef void _set_one(Out* out, Param* p) noexcept nogil:
    cdef const unsigned char* value = p.text + p.name_size + 1
    cdef uint32_t i
    if (_compare_names(p.text, p.name_size, <const unsigned char*> b"DateStyle", 9) == 0
            and memchr(value, c',', p.value_size) == NULL):
        _reset_one(out, p)              # "SQL" alone keeps the order of day and month from the value before
    if _can_set(p):
        _put(out, b"SET \"")
        for i in range(p.name_size):
            _byte(out, p.text[i])
        _put(out, b"\"=")
        _literal(out, value, p.value_size)
        _byte(out, c';')
        return
    _put(out, b"SELECT pg_catalog.set_config(")
    _literal(out, p.text, p.name_size)
    _byte(out, c',')
    _literal(out, value, p.value_size)
    # the value itself may not exist in client_encoding, and could not be sent back
    _put(out, b",false) IS NULL;")


cdef void _reset_one(Out* out, Param* p) noexcept nogil:
    cdef uint32_t i
    if _is_identifier(p.text, p.name_size):
        _put(out, b"RESET \"")
        for i in range(p.name_size):
            _byte(out, p.text[i])
        _put(out, b"\";")
        return
    # NULL resets; unlike RESET, it takes names of any bytes and length
    _put(out, b"SELECT pg_catalog.set_config(")
    _literal(out, p.text, p.name_size)
    _put(out, b",NULL,false) IS NULL;")


cdef bint params_is_same_value(Param* a, Param* b) noexcept nogil:
    return (a.value_size == b.value_size
            and memcmp(a.text + a.name_size, b.text + b.name_size, a.value_size + 1) == 0)


cdef int params_deploy(ParamSet* has, ParamSet* wants, unsigned char* buffer, int capacity) noexcept nogil:
    cdef Out out
    cdef uint32_t i = 0, j = 0
    cdef int order, begun
    cdef Param* a
    cdef Param* b
    cdef Param* role
    cdef Param* was
    if has == wants:
        return 0
    out.data = buffer
    out.size = 0
    out.capacity = capacity
    # Another role may lack the right to set the rest: it is given up first and taken last.
    role = params_find(wants, <const unsigned char*> b"role", 4)
    was = params_find(has, <const unsigned char*> b"role", 4)
    if was != NULL:
        _reset_one(&out, was)
    begun = out.size
    while i < has.count or j < wants.count:
        a = has.items[i] if i < has.count else NULL
        b = wants.items[j] if j < wants.count else NULL
        if a == NULL:
            order = 1
        elif b == NULL:
            order = -1
        else:
            order = _compare_names(a.text, a.name_size, b.text, b.name_size)
        if order < 0:
            if not a.flags & PARAM_REPORTED and a != was:
                _reset_one(&out, a)
            i += 1
        elif order > 0:
            if not b.flags & PARAM_READ_ONLY and b != role:
                _set_one(&out, b)
            j += 1
        else:
            if a != b and b != role and not (a.flags & PARAM_READ_ONLY or b.flags & PARAM_READ_ONLY):
                if not params_is_same_value(a, b):
                    _set_one(&out, b)
            i += 1
            j += 1
    if out.size == begun and (role == was
                              or role != NULL and was != NULL and params_is_same_value(role, was)):
        return 0
    if role != NULL:
        _set_one(&out, role)
    _byte(&out, 0)
    return -1 if out.size > capacity else out.size


cdef class ParameterSet:
    """Session parameters, interned and immutable. Equal content is the same object underneath."""

    def __cinit__(self):
        params_global_init()
        self._set = NULL

    def __dealloc__(self):
        params_release(self._set)

    @staticmethod
    def of(parameters, bint is_reported, read_only=frozenset()):
        """A set from a mapping of names to values (bytes to bytes).

        ``is_reported``: they came by ParameterStatus; names in ``read_only`` are never deployed.
        Raises ValueError when there are too many.
        """
        cdef ParameterSet self = ParameterSet()
        cdef ParamSet* s = params_empty()
        cdef ParamSet* t
        cdef bytes name, value
        cdef uint8_t flags
        for name, value in parameters.items():
            flags = PARAM_REPORTED if is_reported else 0
            if name in read_only:
                flags |= PARAM_READ_ONLY
            t = params_with(s, <const unsigned char*> PyBytes_AS_STRING(name), <uint32_t> len(name),
                            <const unsigned char*> PyBytes_AS_STRING(value), <uint32_t> len(value), flags)
            params_release(s)
            if t == NULL:
                raise ValueError("too many parameters")
            s = t
        self._set = s
        return self

    def merged(self, ParameterSet over not None):
        """This set with the values of ``over`` on top; read-only names keep theirs."""
        cdef ParameterSet result = ParameterSet()
        result._set = params_merge(self._set, over._set)
        if result._set == NULL:
            raise ValueError("too many parameters")
        return result

    def items(self, bint is_reported=False):
        """Pairs of name and value as bytes, sorted by name; with ``is_reported`` only the reported."""
        cdef uint32_t i
        cdef list result = []
        for i in range(self._set.count):
            if is_reported and not self._set.items[i].flags & PARAM_REPORTED:
                continue
            result.append((
                (<char*> self._set.items[i].text)[:self._set.items[i].name_size],
                (<char*> self._set.items[i].text + self._set.items[i].name_size + 1)
                [:self._set.items[i].value_size],
            ))
        return result

    def deploy(self, ParameterSet wants not None):
        """The SQL that turns a server with this set into one with ``wants``; empty if nothing differs."""
        cdef unsigned char* out = <unsigned char*> malloc(MAX_DEPLOY)
        cdef int size
        if out == NULL:
            raise MemoryError
        try:
            size = params_deploy(self._set, wants._set, out, MAX_DEPLOY)
            if size < 0:
                raise ValueError("the difference is too large")
            return (<char*> out)[:size - 1] if size else b""
        finally:
            free(out)

    def __eq__(self, other):
        return isinstance(other, ParameterSet) and self._set == (<ParameterSet> other)._set

    def __hash__(self):
        return hash(<uintptr_t> self._set)
