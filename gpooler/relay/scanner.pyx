"""Which session state a SQL text may leave behind; the design is in the .pxd."""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memset


# Words are compared by FNV-1a hashes of their lower-case bytes. A collision can only add an effect, or
# mistake another word for one of the exceptions LOCAL, TRANSACTION, CONSTRAINTS; a test compares those with
# every setting and keyword of PostgreSQL.
cdef enum:
    FNV_BASIS = 2166136261
    FNV_PRIME = 16777619


cdef uint32_t _hash(const char* word) noexcept nogil:
    cdef uint32_t h = <uint32_t> FNV_BASIS
    while word[0]:
        h = (h ^ <uint8_t> word[0]) * <uint32_t> FNV_PRIME
        word += 1
    return h


cdef:
    uint32_t W_SET = _hash("set")
    uint32_t W_RESET = _hash("reset")
    uint32_t W_DISCARD = _hash("discard")
    uint32_t W_DEALLOCATE = _hash("deallocate")
    uint32_t W_DO = _hash("do")
    uint32_t W_CALL = _hash("call")
    uint32_t W_LOCAL = _hash("local")
    uint32_t W_TRANSACTION = _hash("transaction")
    uint32_t W_CONSTRAINTS = _hash("constraints")
    uint32_t W_TO = _hash("to")
    uint32_t W_AS = _hash("as")
    uint32_t W_NAMES = _hash("names")
    uint32_t W_CLIENT_ENCODING = _hash("client_encoding")
    uint32_t W_CONFORMING = _hash("standard_conforming_strings")
    uint32_t W_LISTEN = _hash("listen")
    uint32_t W_PREPARE = _hash("prepare")
    uint32_t W_CREATE = _hash("create")
    uint32_t W_GLOBAL = _hash("global")
    uint32_t W_REPLACE = _hash("replace")
    uint32_t W_INTO = _hash("into")
    uint32_t W_TEMP = _hash("temp")
    uint32_t W_TEMPORARY = _hash("temporary")
    uint32_t W_WITH = _hash("with")
    uint32_t W_HOLD = _hash("hold")
    uint32_t W_LOAD = _hash("load")
    uint32_t W_BEGIN = _hash("begin")
    uint32_t W_START = _hash("start")
    uint32_t W_EXECUTE = _hash("execute")
    uint32_t W_EXPLAIN = _hash("explain")
    uint32_t W_UNLISTEN = _hash("unlisten")
    uint32_t W_CLOSE = _hash("close")
    uint32_t W_DROP = _hash("drop")
    uint32_t W_B = _hash("b")
    uint32_t W_E = _hash("e")
    uint32_t W_U = _hash("u")
    uint32_t W_X = _hash("x")
    uint32_t W_UPDATE = _hash("update")
    uint32_t W_PG_SETTINGS = _hash("pg_settings")
    uint32_t W_PG_TEMP = _hash("pg_temp")
    uint32_t W_PG_TEMP_N = _hash("pg_temp_")
    uint32_t W_SET_CONFIG = _hash("set_config")
    uint32_t W_LOCK1 = _hash("pg_advisory_lock")
    uint32_t W_LOCK2 = _hash("pg_advisory_lock_shared")
    uint32_t W_LOCK3 = _hash("pg_try_advisory_lock")
    uint32_t W_LOCK4 = _hash("pg_try_advisory_lock_shared")
    uint32_t W_UNLOCK1 = _hash("pg_advisory_unlock")
    uint32_t W_UNLOCK2 = _hash("pg_advisory_unlock_shared")
    uint32_t W_UNLOCK3 = _hash("pg_advisory_unlock_all")


cdef void scan_begin(Scan* self, bint is_parse, bint is_conforming, uint8_t is_multibyte) noexcept nogil:
    memset(self, 0, sizeof(Scan))
    self.hash = <uint32_t> FNV_BASIS
    self.state = SCAN_SKIP if is_parse else SCAN_PLAIN
    self.is_conforming = is_conforming
    self.is_multibyte = is_multibyte


cdef void _keyword(Scan* self, uint32_t word) noexcept nogil:
    """A word without quotes ended; it is counted already."""
    if self.words == 1:
        self.first = word
        if word == W_RESET:
            self.effects |= EFFECT_SET
        elif word == W_DISCARD:
            self.effects |= EFFECT_SET | EFFECT_FORGET
        elif word == W_DEALLOCATE:
            self.effects |= EFFECT_FORGET
        elif word == W_LISTEN:
            self.effects |= EFFECT_LISTEN
        elif word == W_LOAD:
            self.effects |= EFFECT_LOAD
        elif word == W_DO or word == W_CALL:
            self.effects |= EFFECT_OPAQUE
        elif word == W_BEGIN or word == W_START:
            self.effects |= EFFECT_BEGIN
        elif word == W_EXECUTE:
            self.effects |= EFFECT_NAMES
        elif word == W_UNLISTEN or word == W_CLOSE or word == W_DROP:
            self.effects |= EFFECT_ENDS
    elif self.words == 2:
        # The exceptions are no reserved words: SET local.x = 1 and PREPARE transaction AS … name something.
        if self.first == W_SET:
            if word == W_LOCAL or word == W_TRANSACTION or word == W_CONSTRAINTS:
                self.pending = EFFECT_SET
            else:
                self.effects |= EFFECT_SET
        elif self.first == W_PREPARE:
            if word == W_TRANSACTION:
                self.pending = EFFECT_PREPARE
            else:
                self.effects |= EFFECT_PREPARE
    elif self.pending:
        if (word == W_TO or word == W_AS or word == W_NAMES or word == W_CLIENT_ENCODING
                or word == W_CONFORMING):
            self.effects |= self.pending
        self.pending = 0
    if word == W_TEMP or word == W_TEMPORARY:
        if (self.previous == W_CREATE or self.previous == W_LOCAL or self.previous == W_GLOBAL
                or self.previous == W_REPLACE or self.previous == W_INTO):
            self.effects |= EFFECT_TEMP
    elif word == W_HOLD:
        if self.previous == W_WITH:
            self.effects |= EFFECT_HOLD
    elif word == W_UPDATE:
        self.has_update = 1
    elif word == W_EXECUTE:
        if self.first == W_EXPLAIN or self.first == W_CREATE:
            self.effects |= EFFECT_NAMES
    self.previous = word


cdef void _word(Scan* self, bint is_quoted) noexcept nogil:
    """A word or quoted identifier ended."""
    cdef uint32_t word = self.hash
    if self.words < 255:
        self.words += 1
    if word == W_SET_CONFIG:
        self.effects |= EFFECT_SET
    elif word == W_LOCK1 or word == W_LOCK2 or word == W_LOCK3 or word == W_LOCK4:
        self.effects |= EFFECT_LOCK
    elif word == W_UNLOCK1 or word == W_UNLOCK2 or word == W_UNLOCK3:
        self.effects |= EFFECT_ENDS
    elif word == W_PG_TEMP:
        self.effects |= EFFECT_TEMP
    elif word == W_PG_SETTINGS and self.has_update:
        self.effects |= EFFECT_SET          # a rule of that view calls set_config
    if not is_quoted:
        _keyword(self, word)
        return
    if self.words == 1:
        self.first = 0
    elif self.words == 2:
        if self.first == W_SET:
            self.effects |= EFFECT_SET
        elif self.first == W_PREPARE:
            self.effects |= EFFECT_PREPARE
    else:
        if word == W_CLIENT_ENCODING or word == W_CONFORMING:
            self.effects |= self.pending
        self.pending = 0
    self.previous = 0


cdef inline bint _is_word_start(unsigned char c) noexcept nogil:
    return (c'a' <= c <= c'z') or (c'A' <= c <= c'Z') or c == c'_' or c >= 0x80


cdef inline bint _is_word(unsigned char c) noexcept nogil:
    return _is_word_start(c) or (c'0' <= c <= c'9') or c == c'$'


cdef inline uint32_t _mix(uint32_t h, unsigned char c) noexcept nogil:
    if c'A' <= c <= c'Z':
        c += 32
    return (h ^ c) * <uint32_t> FNV_PRIME


cdef void scan_feed(Scan* self, const unsigned char* data, size_t size) noexcept nogil:
    cdef const unsigned char* p = data
    cdef const unsigned char* end = data + size
    cdef unsigned char c
    cdef uint8_t state = self.state
    while p < end:
        c = p[0]
        if state == SCAN_END:
            break
        if self.is_trail:
            self.is_trail = 0
            if c != 0:                      # a NUL ends the text before PostgreSQL converts it
                self.hash = (self.hash ^ c) * <uint32_t> FNV_PRIME
                p += 1
                continue
        if state == SCAN_PLAIN:
            if _is_word_start(c):
                self.hash = _mix(<uint32_t> FNV_BASIS, c)
                state = SCAN_WORD
            elif c == c"'":
                self.has_escapes = not self.is_conforming
                state = SCAN_QUOTE
            elif c == c'"':
                self.hash = <uint32_t> FNV_BASIS
                state = SCAN_IDENT
            elif c == c'-':
                state = SCAN_DASH
            elif c == c'/':
                state = SCAN_SLASH
            elif c == c'$':
                self.hash = <uint32_t> FNV_BASIS
                state = SCAN_DOLLAR
            elif c == c'.' or c == c'=' or c == c'(':
                self.effects |= self.pending
                self.pending = 0
            elif c == c';':
                self.words = 0
                self.previous = 0
                self.pending = 0
                self.has_update = 0
            elif c == 0:
                state = SCAN_END
        elif state == SCAN_WORD:
            if _is_word(c):
                self.hash = _mix(self.hash, c)
                if self.hash == W_PG_TEMP_N:
                    self.effects |= EFFECT_TEMP
            elif c == c"'" and (self.hash == W_E or self.hash == W_B or self.hash == W_X):
                # E'…' knows backslashes, B'…' and X'…' never do
                self.has_escapes = self.hash == W_E
                state = SCAN_QUOTE
            elif c == c'&' and self.hash == W_U:
                state = SCAN_U_AMPERSAND
            else:
                state = SCAN_PLAIN
                _word(self, False)
                continue  # the byte is looked at again as plain
        elif state == SCAN_U_AMPERSAND:
            if c == c'"':
                self.effects |= EFFECT_SET  # its escapes can spell any name
                self.hash = <uint32_t> FNV_BASIS
                state = SCAN_IDENT
            elif c == c"'":
                self.has_escapes = 0        # of another kind: they never hide a quote
                state = SCAN_QUOTE
            else:
                state = SCAN_PLAIN
                _word(self, False)
                continue
        elif state == SCAN_QUOTE:
            if c == c"'":
                state = SCAN_QUOTE_CLOSED
            elif c == c'\\' and self.has_escapes:
                state = SCAN_QUOTE_ESCAPE
            elif c == 0:
                state = SCAN_END
        elif state == SCAN_QUOTE_CLOSED:
            # A doubled quote goes on; so does a literal continued on another line, with its escapes and
            # with comments of the kind -- in between.
            if c == c"'":
                state = SCAN_QUOTE
            elif c == c'-':
                state = SCAN_CLOSED_DASH
            elif c != c' ' and c != c'\n' and c != c'\r' and c != c'\t' and c != c'\f' and c != c'\v':
                state = SCAN_PLAIN
                continue
        elif state == SCAN_CLOSED_DASH:
            if c == c'-':
                state = SCAN_CLOSED_COMMENT
            else:
                state = SCAN_PLAIN
                continue
        elif state == SCAN_CLOSED_COMMENT:
            if c == c'\n' or c == c'\r':
                state = SCAN_QUOTE_CLOSED
            elif c == 0:
                state = SCAN_END
        elif state == SCAN_QUOTE_ESCAPE:
            state = SCAN_END if c == 0 else SCAN_QUOTE
        elif state == SCAN_IDENT:
            if c == c'"':
                state = SCAN_IDENT_CLOSED
            elif c == 0:
                state = SCAN_END
            else:
                self.hash = _mix(self.hash, c)      # (settings have the same name in any case)
                if self.hash == W_PG_TEMP_N:
                    self.effects |= EFFECT_TEMP
        elif state == SCAN_IDENT_CLOSED:
            if c == c'"':
                self.hash = (self.hash ^ c) * <uint32_t> FNV_PRIME
                state = SCAN_IDENT
            else:
                state = SCAN_PLAIN
                _word(self, True)
                continue
        elif state == SCAN_DASH:
            if c == c'-':
                state = SCAN_LINE_COMMENT
            else:
                state = SCAN_PLAIN
                continue
        elif state == SCAN_LINE_COMMENT:
            if c == c'\n' or c == c'\r':
                state = SCAN_PLAIN
            elif c == 0:
                state = SCAN_END
        elif state == SCAN_SLASH:
            if c == c'*':
                self.depth = 1
                state = SCAN_COMMENT
            else:
                state = SCAN_PLAIN
                continue
        elif state == SCAN_COMMENT:
            if c == c'*':
                state = SCAN_COMMENT_STAR
            elif c == c'/':
                state = SCAN_COMMENT_SLASH
            elif c == 0:
                state = SCAN_END
        elif state == SCAN_COMMENT_STAR:
            if c == c'/':
                self.depth -= 1
                state = SCAN_PLAIN if self.depth == 0 else SCAN_COMMENT
            elif c != c'*':
                state = SCAN_COMMENT
                continue
        elif state == SCAN_COMMENT_SLASH:
            if c == c'*':
                if self.depth < 255:
                    self.depth += 1
                else:
                    self.effects |= EFFECT_SET
                state = SCAN_COMMENT
            elif c != c'/':
                state = SCAN_COMMENT
                continue
        elif state == SCAN_DOLLAR:
            if c == c'$':
                self.tag = self.hash
                state = SCAN_BODY
            elif _is_word_start(c) or (c'0' <= c <= c'9' and self.hash != <uint32_t> FNV_BASIS):
                self.hash = (self.hash ^ c) * <uint32_t> FNV_PRIME
            else:
                state = SCAN_PLAIN  # a parameter such as $1
                if not (c'0' <= c <= c'9'):
                    continue
        elif state == SCAN_BODY:
            if c == c'$':
                self.hash = <uint32_t> FNV_BASIS
                state = SCAN_BODY_DOLLAR
            elif c == 0:
                state = SCAN_END
        elif state == SCAN_BODY_DOLLAR:
            if c == c'$':
                if self.hash == self.tag:
                    state = SCAN_PLAIN
                else:
                    self.hash = <uint32_t> FNV_BASIS
            elif c == 0:
                state = SCAN_END
            elif _is_word(c):
                self.hash = (self.hash ^ c) * <uint32_t> FNV_PRIME
            else:
                state = SCAN_BODY
        elif state == SCAN_SKIP:
            if c == 0:
                state = SCAN_PLAIN
            else:
                self.effects |= EFFECT_PARSE
        if (c >= 0x80 and self.is_multibyte
                and not (self.is_multibyte == MULTIBYTE_SJIS and 0xa1 <= c <= 0xdf)):
            # The second byte of a character may look like ASCII.
            self.is_trail = 1
        p += 1
    self.state = state
