"""The scanner finds the same in a text however it is cut."""

from libc.stdlib cimport free
from libc.string cimport memchr, memcmp

from gpooler.relay.scanner cimport (
    EFFECT_PARSE, SCAN_END, SCAN_SKIP, SCAN_U_AMPERSAND, Scan, scan_begin, scan_feed,
)
from tests.fuzz.input cimport Input, copy_of, must, take

cdef enum:
    EFFECTS = 8191              # all there are


cdef void feed(Scan* scan, const unsigned char* data, size_t size) noexcept nogil:
    cdef unsigned char* copy = copy_of(data, size)
    cdef Scan before = scan[0]
    scan_feed(scan, copy, size)
    free(copy)
    must(scan.effects & before.effects == before.effects, "effects only grow")
    must(scan.effects & ~<unsigned int> EFFECTS == 0, "an effect is one of the known ones")
    must(scan.state <= SCAN_U_AMPERSAND, "a state is one of the known ones")
    must(before.state != SCAN_END or memcmp(&before, scan, sizeof(Scan)) == 0, "nothing follows the end")


cdef api void run(const unsigned char* data, size_t size) noexcept nogil:
    """Options and a cut in two bytes, then the text."""
    cdef Input rest = [data, data + size]
    cdef unsigned char options = take(&rest)
    cdef bint is_parse = options & 1
    cdef bint is_conforming = not options & 2
    cdef unsigned char is_multibyte = (options >> 2) % 3
    cdef size_t cut = take(&rest)
    cdef size_t length = rest.end - rest.p
    cdef const unsigned char* text = rest.p
    cdef Scan whole, single, twice
    cdef bint has_nul
    cdef size_t i
    scan_begin(&whole, is_parse, is_conforming, is_multibyte)
    single = whole
    twice = whole
    feed(&whole, text, length)
    for i in range(length):
        feed(&single, text + i, 1)
    cut = cut * length // 256
    feed(&twice, text, cut)
    feed(&twice, text + cut, length - cut)
    must(memcmp(&whole, &single, sizeof(Scan)) == 0, "byte by byte the scanner sees the same")
    must(memcmp(&whole, &twice, sizeof(Scan)) == 0, "in two parts the scanner sees the same")
    must(is_parse or not whole.effects & EFFECT_PARSE, "only a Parse has a name")
    has_nul = length > 0 and memchr(text, 0, length) != NULL
    must(is_parse or (whole.state == SCAN_END) == has_nul, "a NUL is the end, and nothing else")
    must(is_parse or whole.state != SCAN_SKIP, "only a Parse has a name to skip")
    feed(&whole, <const unsigned char*> b"\0\0", 2)
    must(whole.state == SCAN_END, "NULs end it wherever it stands")
