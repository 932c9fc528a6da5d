"""What is read from a whole text lies in the text, and has an effect that the scanner saw."""

from libc.stdint cimport uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcmp, memcpy, strlen

from gpooler.relay.scanner cimport (
    EFFECT_BEGIN, EFFECT_READ, EFFECT_SET, SCAN_PLAIN, Scan, scan_begin, scan_feed,
)
from gpooler.relay.sql cimport (
    MAX_NAMES, MAX_SETTINGS, NAME_DEALLOCATE, NAME_MOST, NAME_PREPARE, SETTING_DISCARD_ALL,
    SETTING_RESET, SETTING_SET, PreparedName, Reading, Setting, sql_is_begin, sql_read,
)
from tests.fuzz.input cimport Input, copy_of, must, take


cdef bint is_constant(Setting* setting, const char* name) noexcept nogil:
    return setting.size == strlen(name) and memcmp(setting.name, name, setting.size) == 0


cdef void check(Reading* reading, const unsigned char* text, uint32_t size) noexcept nogil:
    """What is found lies within the text, or is a name that some statement implies."""
    cdef Setting* setting
    cdef PreparedName* name
    cdef bint has_resets = False
    cdef uint32_t i
    must(reading.count <= MAX_SETTINGS and reading.name_count <= MAX_NAMES, "no more is found than has room")
    for i in range(reading.count):
        setting = &reading.settings[i]
        must(SETTING_SET <= setting.kind <= SETTING_DISCARD_ALL, "a setting is of a known kind")
        has_resets = has_resets or setting.kind != SETTING_SET
        if setting.name == NULL:
            must(setting.kind > SETTING_RESET and setting.size == 0, "only what concerns all has no name")
            continue
        must(setting.kind <= SETTING_RESET and setting.size > 0, "a setting has a name")
        if text <= setting.name < text + size:
            must(setting.size <= text + size - setting.name, "a name ends within the text")
            must(memchr(setting.name, 0, setting.size) == NULL, "a name has no NUL")
        else:
            must(is_constant(setting, b"default_transaction_isolation")
                 or is_constant(setting, b"default_transaction_read_only")
                 or is_constant(setting, b"default_transaction_deferrable")
                 or is_constant(setting, b"timezone") or is_constant(setting, b"client_encoding")
                 or is_constant(setting, b"search_path") or is_constant(setting, b"xmloption")
                 or is_constant(setting, b"role"), "a name is in the text or implied")
    for i in range(reading.name_count):
        name = &reading.names[i]
        must(NAME_PREPARE <= name.kind <= NAME_DEALLOCATE, "a name of a statement is of a known kind")
        must(name.size <= NAME_MOST, "a name of a statement is as short as PostgreSQL's")
        must(memchr(name.text, 0, name.size) == NULL, "a name of a statement has no NUL")
    must(has_resets == (reading.has_resets != 0), "resets are told of")


cdef void compare(Reading* a, const unsigned char* a_text, Reading* b, const unsigned char* b_text,
                  uint32_t size) noexcept nogil:
    """The same was found in the same texts at two places."""
    cdef Setting* one
    cdef Setting* other
    cdef uint32_t i
    must(a.count == b.count and a.name_count == b.name_count and a.effects == b.effects and a.ends == b.ends
         and a.has_resets == b.has_resets and a.has_other_names == b.has_other_names
         and a.prepares == b.prepares and a.forgets_all == b.forgets_all
         and a.changes_lexis == b.changes_lexis, "the same text reads the same")
    for i in range(a.count):
        one = &a.settings[i]
        other = &b.settings[i]
        must(one.kind == other.kind and one.size == other.size, "the same text has the same settings")
        if one.name != NULL and a_text <= one.name < a_text + size:
            must(one.name - a_text == other.name - b_text, "the same text has the same names of settings")
    for i in range(a.name_count):
        must(a.names[i].kind == b.names[i].kind and a.names[i].size == b.names[i].size
             and memcmp(a.names[i].text, b.names[i].text, a.names[i].size) == 0,
             "the same text has the same names of statements")


cdef void follow(const unsigned char* text, uint32_t size, bint is_conforming, unsigned char is_multibyte,
                 bint is_outside) noexcept nogil:
    """A statement behind the text is read just when the text leaves no literal or comment open."""
    cdef const char* more = b"\n;SET f.g = 1"
    cdef uint32_t whole = size + <uint32_t> strlen(more)
    cdef unsigned char* both = <unsigned char*> malloc(whole)
    cdef Reading reading
    cdef Setting* last
    cdef bint is_read
    if size:
        memcpy(both, text, size)
    memcpy(both + size, more, strlen(more))
    sql_read(&reading, both, whole, is_conforming, is_multibyte)
    check(&reading, both, whole)
    last = &reading.settings[reading.count - 1] if reading.count else NULL
    is_read = last != NULL and last.name == both + size + 6 and last.size == 3
    if reading.count < MAX_SETTINGS:
        must(is_read == is_outside, "both scanners know whether a literal or comment is open")
    free(both)


cdef api void run(const unsigned char* data, size_t size) noexcept nogil:
    """Options in one byte, then the text."""
    cdef Input rest = [data, data + size]
    cdef unsigned char options = take(&rest)
    cdef bint is_conforming = not options & 1
    cdef unsigned char is_multibyte = (options >> 1) % 3
    cdef uint32_t length = <uint32_t> (rest.end - rest.p)
    cdef const unsigned char* nul = <const unsigned char*> memchr(rest.p, 0, length) if length else NULL
    cdef uint32_t end = <uint32_t> (nul - rest.p) if nul != NULL else length
    cdef unsigned char* text = copy_of(rest.p, length)
    cdef unsigned char* alone = copy_of(rest.p, end)
    cdef Reading reading, again
    cdef Scan scan
    cdef bint is_begin
    sql_read(&reading, text, length, is_conforming, is_multibyte)
    check(&reading, text, end)
    sql_read(&again, alone, end, is_conforming, is_multibyte)
    check(&again, alone, end)
    compare(&reading, text, &again, alone, end)
    scan_begin(&scan, False, is_conforming, is_multibyte)
    scan_feed(&scan, alone, end)
    scan_feed(&scan, <const unsigned char*> b"\n;", 2)
    is_begin = sql_is_begin(text, length)
    must(is_begin == sql_is_begin(alone, end), "BEGIN reads the same")
    if is_begin and is_conforming and not is_multibyte:
        must(scan.effects == EFFECT_BEGIN, "BEGIN has no other effect")
    if scan.state == SCAN_PLAIN and not scan.effects & EFFECT_READ:
        # (SET and PREPARE without a name, which PostgreSQL refuses, may count as what cannot be told)
        must(reading.count == 0 and reading.name_count == 0 and not reading.effects & ~<uint32_t> EFFECT_SET
             and not reading.ends and not reading.forgets_all and not reading.changes_lexis,
             "what has no effect for the scanner has none when read whole")
    follow(alone, end, is_conforming, is_multibyte, scan.state == SCAN_PLAIN)
    free(text)
    free(alone)
