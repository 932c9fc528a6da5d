"""Sets of parameters: what each operation makes, one object for equal content, SQL with all quotes closed."""

from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, strlen

from gpooler.relay.params cimport (
    MAX_DEPLOY, MAX_PARAMS, PARAM_READ_ONLY, PARAM_REPORTED, Param, ParamSet, params_counts, params_deploy,
    params_empty, params_find, params_global_init, params_hold, params_is_same_name, params_is_same_value,
    params_literal, params_merge, params_release, params_settle, params_value, params_with, params_without,
)
from gpooler.relay.scanner cimport MULTIBYTE_SJIS, SCAN_PLAIN, Scan, scan_begin, scan_feed
from tests.fuzz.input cimport Input, copy_of, must, take

cdef enum:
    SLOTS = 4
    MAX_FILLS = 2               # of up to 255 parameters
    MARK = 0xa5


cdef inline unsigned char* value_of(Param* p) noexcept nogil:
    return p.text + p.name_size + 1


cdef inline Param* find(ParamSet* s, Param* other) noexcept nogil:
    return params_find(s, other.text, other.name_size)


cdef bint is_equal(ParamSet* a, ParamSet* b) noexcept nogil:
    """The same content, byte for byte."""
    cdef Param* p
    cdef Param* q
    cdef uint32_t i
    if a.count != b.count:
        return False
    for i in range(a.count):
        p = a.items[i]
        q = b.items[i]
        if (p.name_size != q.name_size or p.flags != q.flags or memcmp(p.text, q.text, p.name_size + 1) != 0
                or not params_is_same_value(p, q)):
            return False
    return True


cdef void check(ParamSet** slots, ParamSet* changed) noexcept nogil:
    cdef Param* p
    cdef uint32_t i, j, held
    for i in range(SLOTS):
        held = 0
        for j in range(SLOTS):
            held += slots[j] == slots[i]
        must(slots[i].references == held, "a set counts who holds it")
        must(slots[i] == changed or not is_equal(slots[i], changed), "equal content is one set")
    must(changed.count <= MAX_PARAMS, "no set is too large")
    for j in range(changed.count):
        p = changed.items[j]
        must(p.text[p.name_size] == 0 and value_of(p)[p.value_size] == 0, "names and values end with NUL")
        must(0 < p.references <= SLOTS, "a parameter counts the sets it is in")
        must(find(changed, p) == p, "a parameter is found by its name, and is the only one of it")


# -- what each operation makes -------------------------------------------------------------------------


cdef void check_with(ParamSet* before, ParamSet* made, const unsigned char* name, uint32_t name_size,
                     const unsigned char* value, uint32_t value_size, uint8_t flags) noexcept nogil:
    cdef Param* p
    cdef Param* q
    cdef uint32_t i
    if made == NULL:
        must(before.count == MAX_PARAMS and params_find(before, name, name_size) == NULL,
             "only a full set takes no more")
        return
    p = params_find(made, name, name_size)
    must(p != NULL and p.name_size == name_size and memcmp(p.text, name, name_size) == 0
         and p.value_size == value_size and memcmp(value_of(p), value, value_size) == 0 and p.flags == flags,
         "what was put in is there")
    must(made.count == before.count + (params_find(before, name, name_size) == NULL), "nothing else came")
    for i in range(before.count):
        q = before.items[i]
        must(params_is_same_name(q.text, q.name_size, name, name_size) or find(made, q) == q,
             "all else stays")


cdef void check_without(ParamSet* before, ParamSet* made, const unsigned char* name,
                        uint32_t name_size) noexcept nogil:
    cdef Param* q
    cdef uint32_t i
    must(made != NULL and params_find(made, name, name_size) == NULL, "what was taken out is gone")
    must(made.count + (params_find(before, name, name_size) != NULL) == before.count, "nothing else is")
    for i in range(made.count):
        q = made.items[i]
        must(find(before, q) == q, "nothing else came")


cdef void check_merge(ParamSet* base, ParamSet* over, ParamSet* made) noexcept nogil:
    cdef Param* p
    cdef Param* q
    cdef Param* r
    cdef uint32_t i, added = 0
    for i in range(over.count):
        p = over.items[i]
        q = find(base, p)
        added += q == NULL
        if made == NULL:
            continue
        r = find(made, p)
        must(r != NULL, "all of both is there")
        if q == NULL:
            must(r == p, "what only the upper one has is as there")
        elif q.flags & PARAM_READ_ONLY:
            must(r == q, "what is read-only stays")
        else:
            must(params_is_same_value(r, p) and r.flags == q.flags and r.name_size == q.name_size
                 and memcmp(r.text, q.text, q.name_size) == 0, "the upper value comes under the lower name")
    if made == NULL:
        must(base.count + added > MAX_PARAMS, "only a set that is too large is not made")
        return
    must(made.count == base.count + added, "no more than both is there")
    for i in range(base.count):
        q = base.items[i]
        must(find(over, q) != NULL or find(made, q) == q, "what only the lower one has is as there")


cdef void check_settle(ParamSet* server, ParamSet* client, ParamSet* made) noexcept nogil:
    cdef Param* p
    cdef Param* q
    cdef Param* wanted
    cdef uint32_t i, count = 0
    for i in range(server.count):
        p = server.items[i]
        q = find(client, p)
        wanted = NULL
        if p.flags & PARAM_REPORTED:
            wanted = p
        elif q != NULL:
            wanted = q
        count += wanted != NULL
        must(made == NULL or find(made, p) == wanted, "what is reported is the server's")
    for i in range(client.count):
        p = client.items[i]
        if find(server, p) == NULL:
            wanted = NULL if p.flags & PARAM_REPORTED else p
            count += wanted != NULL
            must(made == NULL or find(made, p) == wanted, "what is not reported is the client's")
    must((made == NULL) == (count > MAX_PARAMS), "only a set that is too large is not made")
    must(made == NULL or made.count == count, "nothing else is there")


# -- the SQL of a deploy -------------------------------------------------------------------------------


cdef bint skip(Input* at, const char* word) noexcept nogil:
    """Past this word, if it stands here."""
    cdef size_t size = strlen(word)
    if <size_t> (at.end - at.p) < size or memcmp(at.p, word, size) != 0:
        return False
    at.p += size
    return True


cdef void identifier(Input* at) noexcept nogil:
    cdef const unsigned char* start = at.p
    while at.p < at.end and (c'a' <= (at.p[0] | 32) <= c'z' or c'0' <= at.p[0] <= c'9' or at.p[0] == c'_'):
        at.p += 1
    must(at.p > start and skip(at, b"\""), "an identifier is of plain letters and is closed")


cdef bint literal(Input* at) noexcept nogil:
    """Past E'…' or the hexadecimal kind; whether one stood here."""
    if skip(at, b"E'"):
        while True:
            must(at.p < at.end, "a literal is closed")
            if skip(at, b"''") or skip(at, b"\\\\"):
                continue
            if skip(at, b"'"):
                return True
            must(0x20 <= at.p[0] <= 0x7e and at.p[0] != c'\\', "a literal is of plain characters")
            at.p += 1
    if not skip(at, b"pg_catalog.convert_from(pg_catalog.decode('"):
        return False
    while at.p < at.end and (c'0' <= at.p[0] <= c'9' or c'a' <= at.p[0] <= c'f'):
        at.p += 1
    must(skip(at, b"','hex'),pg_catalog.getdatabaseencoding())"), "hexadecimal digits are closed")
    return True


cdef uint32_t statements(const unsigned char* text, uint32_t size) noexcept nogil:
    """How many statements there are; each is one of three kinds."""
    cdef Input at = [text, text + size]
    cdef uint32_t count = 0
    while at.p < at.end:
        count += 1
        if skip(&at, b"SET \""):
            identifier(&at)
            must(skip(&at, b"=") and literal(&at) and skip(&at, b";"), "a SET is whole")
        elif skip(&at, b"RESET \""):
            identifier(&at)
            must(skip(&at, b";"), "a RESET is whole")
        else:
            must(skip(&at, b"SELECT pg_catalog.set_config(") and literal(&at) and skip(&at, b",")
                 and (skip(&at, b"NULL") or literal(&at)) and skip(&at, b",false) IS NULL;"),
                 "a call of set_config is whole")
    return count


cdef void check_sql(const unsigned char* text, uint32_t size) noexcept nogil:
    """No setting of a session changes where it ends."""
    cdef Scan scan
    cdef uint8_t kind
    for kind in range((MULTIBYTE_SJIS + 1) * 2):
        scan_begin(&scan, False, kind & 1, kind >> 1)
        scan_feed(&scan, text, size)
        must(scan.state == SCAN_PLAIN and not scan.is_trail, "the text is closed however it is read")


cdef void check_deploy(ParamSet* has, ParamSet* wants) noexcept nogil:
    cdef unsigned char* text = <unsigned char*> malloc(MAX_DEPLOY)
    cdef unsigned char* tight
    cdef int size = params_deploy(has, wants, text, MAX_DEPLOY)
    must(size != 1 and size <= MAX_DEPLOY, "a deploy has a statement, and room")
    must(size == 0 or has != wants, "what is the same needs no deploy")
    if size > 0:
        must(text[size - 1] == 0, "it ends with NUL")
        must(0 < statements(text, size - 1) <= 2 * (has.count + wants.count), "it has a statement for each")
        check_sql(text, size - 1)
        tight = copy_of(text, size)
        must(params_deploy(has, wants, tight, size) == size and memcmp(tight, text, size) == 0,
             "it fits exactly")
        free(tight)
        tight = <unsigned char*> malloc(size - 1)
        must(params_deploy(has, wants, tight, size - 1) == -1, "it does not fit into less")
        free(tight)
    free(text)


cdef void check_literal(const unsigned char* text, uint32_t size) noexcept nogil:
    cdef int capacity = <int> size * 2 + 128
    cdef unsigned char* out = <unsigned char*> malloc(capacity)
    cdef int whole = params_literal(text, size, out, capacity)
    cdef Input at = [out, out + whole]
    must(whole > 0 and literal(&at) and at.p == at.end, "a literal is one literal")
    free(out)


# -- the input -----------------------------------------------------------------------------------------


cdef uint32_t take_text(Input* rest, unsigned char* out, bint is_name) noexcept nogil:
    """A name or value: a known one, or up to 15 bytes of the input; out[i] has room for 64."""
    cdef const char* known = NULL
    cdef uint8_t how = take(rest)
    cdef uint32_t i
    cdef const char** table = [
        b"TimeZone", b"timezone", b"role", b"DateStyle", b"search_path", b"client_encoding",
        b"standard_conforming_strings", b"x.y",
    ]
    cdef const char** values = [b"", b"off", b"SJIS", b"gbk", b"ISO, DMY", b"it's", b"a\\b", b"UTC"]
    if how < 128:
        known = table[how % 8] if is_name else values[how % 8]
        for i in range(<uint32_t> strlen(known)):
            out[i] = <unsigned char> known[i]
        return <uint32_t> strlen(known)
    for i in range(how & 15):
        out[i] = take(rest)
    return how & 15


cdef void fill(ParamSet** slot, uint8_t start, uint32_t count) noexcept nogil:
    """Many parameters at once, reported or not: up to the limit and above it."""
    cdef unsigned char name[2]
    cdef ParamSet* made
    cdef uint32_t i
    for i in range(count):
        name[0] = c'p'
        name[1] = <unsigned char> (start + i)
        if i >= 128:
            name[0] = c'q'
        made = params_with(slot[0], name, 2, name, 1, start & PARAM_REPORTED)
        if i == count - 1:
            check_with(slot[0], made, name, 2, name, 1, start & PARAM_REPORTED)
        if made != NULL:
            params_release(slot[0])
            slot[0] = made


cdef void act(ParamSet** slots, Input* rest, uint32_t* fills) noexcept nogil:
    cdef uint8_t what = take(rest)
    cdef ParamSet** target = &slots[(what >> 4) % SLOTS]
    cdef ParamSet* other = slots[(what >> 6) % SLOTS]
    cdef ParamSet* made = NULL
    cdef unsigned char name[64]
    cdef unsigned char value[64]
    cdef unsigned char* one
    cdef unsigned char* two
    cdef uint32_t name_size, value_size
    what &= 15
    if what < 7:
        name_size = take_text(rest, name, True)
        value_size = take_text(rest, value, False)
        one = copy_of(name, name_size)
        two = copy_of(value, value_size)
        if what < 5:
            what = what % 4             # flags
            made = params_with(target[0], one, name_size, two, value_size, what)
            check_with(target[0], made, one, name_size, two, value_size, what)
        elif what == 5:
            made = params_without(target[0], one, name_size)
            check_without(target[0], made, one, name_size)
        else:
            check_literal(two, value_size)
        free(one)
        free(two)
    elif what < 9:
        made = params_merge(target[0], other)
        check_merge(target[0], other, made)
    elif what < 11:
        made = params_settle(target[0], other)
        check_settle(target[0], other, made)
    elif what < 13:
        check_deploy(target[0], other)
    elif what == 13:
        made = params_hold(other)
    elif what == 14:
        made = params_empty()
        must(made.count == 0 and made.is_conforming and not made.is_multibyte, "nothing is in an empty set")
    else:
        # not by chance: large sets take their time
        if fills[0] < MAX_FILLS and take(rest) == MARK:
            name_size = take(rest)
            fill(target, <uint8_t> name_size, take(rest))
            fills[0] += 1
    if made != NULL:
        params_release(target[0])
        target[0] = made
    params_value(target[0], b"client_encoding")
    check(slots, target[0])


cdef api void run(const unsigned char* data, size_t size) noexcept nogil:
    """Acts on four sets: a byte each, and what it needs."""
    cdef Input rest = [data, data + size]
    cdef ParamSet* slots[SLOTS]
    cdef uint32_t i, params, sets, fills = 0
    params_global_init()
    for i in range(SLOTS):
        slots[i] = params_empty()
    while rest.p < rest.end:
        act(slots, &rest, &fills)
    for i in range(SLOTS):
        params_release(slots[i])
    params_counts(&params, &sets)
    must(params == 0 and sets == 0, "at the end nothing is kept")
