"""What a whole SQL text does to its session; the design is in the .pxd."""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memchr, memset, strlen

from gpooler.relay.scanner cimport (
    EFFECT_HOLD, EFFECT_LISTEN, EFFECT_LOCK, EFFECT_PARSE, EFFECT_PREPARE, EFFECT_SET, EFFECT_TEMP,
    MULTIBYTE_SJIS,
)


cdef enum TokenKind:
    TOKEN_END = 0
    TOKEN_WORD = 1              # without quotes
    TOKEN_IDENT = 2             # "…"
    TOKEN_STRING = 3            # any literal
    TOKEN_OTHER = 4             # one byte


cdef struct Lexer:
    const unsigned char* p
    const unsigned char* end
    const unsigned char* start  # of the token's text, without quotes
    uint32_t size
    uint8_t kind
    uint8_t byte                # of TOKEN_OTHER
    uint8_t is_plain            # the text is the value: no escapes, no doubled quotes
    uint8_t has_unicode         # an identifier with escapes was seen: it can spell any name
    bint is_conforming
    uint8_t is_multibyte


# -- tokens --------------------------------------------------------------------------------------------


cdef inline bint _is_start(unsigned char c) noexcept nogil:
    return c'a' <= c <= c'z' or c'A' <= c <= c'Z' or c == c'_' or c >= 0x80


cdef inline bint _is_space(unsigned char c) noexcept nogil:
    return c == c' ' or c == c'\n' or c == c'\r' or c == c'\t' or c == c'\f' or c == c'\v'


cdef inline unsigned char _lower(unsigned char c) noexcept nogil:
    return c + 32 if c'A' <= c <= c'Z' else c


cdef inline void _step(Lexer* x) noexcept nogil:
    """Past one character: the second byte of one may look like ASCII."""
    cdef unsigned char c = x.p[0]
    x.p += 1
    if (c >= 0x80 and x.is_multibyte and not (x.is_multibyte == MULTIBYTE_SJIS and 0xa1 <= c <= 0xdf)
            and x.p < x.end):
        x.p += 1


cdef void _skip_space(Lexer* x, bint is_literal) noexcept nogil:
    """Past white space and comments; inside of a literal that goes on, only those of the kind --."""
    cdef uint32_t depth
    while x.p < x.end:
        if _is_space(x.p[0]):
            x.p += 1
        elif x.end - x.p > 1 and x.p[0] == c'-' and x.p[1] == c'-':
            while x.p < x.end and x.p[0] != c'\n' and x.p[0] != c'\r':
                _step(x)
        elif x.end - x.p > 1 and x.p[0] == c'/' and x.p[1] == c'*' and not is_literal:
            depth = 1
            x.p += 2
            while x.p < x.end and depth:
                if x.end - x.p > 1 and x.p[0] == c'*' and x.p[1] == c'/':
                    depth -= 1
                    x.p += 2
                elif x.end - x.p > 1 and x.p[0] == c'/' and x.p[1] == c'*':
                    depth += 1
                    x.p += 2
                else:
                    _step(x)
        else:
            return


cdef void _quoted(Lexer* x, unsigned char quote, bint has_escapes) noexcept nogil:
    """The rest of a literal or quoted identifier, behind its first quote."""
    cdef const unsigned char* closed
    x.is_plain = not has_escapes
    x.start = x.p
    x.size = 0
    while x.p < x.end:
        if x.p[0] == quote:
            if not x.size:
                x.size = <uint32_t> (x.p - x.start)
            x.p += 1
            if x.p < x.end and x.p[0] == quote:
                x.is_plain = 0
                x.p += 1
                continue
            if quote == c'"':
                return
            closed = x.p
            _skip_space(x, True)
            if x.p < x.end and x.p[0] == quote:
                x.is_plain = 0              # it goes on behind white space
                x.p += 1
                continue
            x.p = closed
            return
        if x.p[0] == c'\\' and has_escapes:
            x.p += 1
            if x.p == x.end:
                return
        _step(x)


cdef void _dollar(Lexer* x) noexcept nogil:
    """Behind a dollar sign: a literal, or a parameter."""
    cdef const unsigned char* tag = x.p
    cdef const unsigned char* at
    cdef uint32_t size, i
    while x.p < x.end and (_is_start(x.p[0]) or (c'0' <= x.p[0] <= c'9' and x.p > tag)):
        _step(x)
    if x.p == x.end or x.p[0] != c'$':
        # A tag without its end stays part of the token, as in the scanner: PostgreSQL refuses the text.
        while x.p < x.end and c'0' <= x.p[0] <= c'9':
            x.p += 1
        x.kind = TOKEN_OTHER
        x.byte = c'$'
        return
    size = <uint32_t> (x.p - tag)
    x.p += 1
    x.start = x.p
    x.kind = TOKEN_STRING
    x.is_plain = 1
    while x.p < x.end:
        if x.p[0] == c'$' and x.end - x.p > size + 1 and x.p[size + 1] == c'$':
            at = x.p + 1
            i = 0
            while i < size and at[i] == tag[i]:
                i += 1
            if i == size:
                x.size = <uint32_t> (x.p - x.start)
                x.p += size + 2
                return
        _step(x)
    x.size = <uint32_t> (x.p - x.start)


cdef void _next(Lexer* x) noexcept nogil:
    cdef unsigned char c
    _skip_space(x, False)
    x.byte = 0
    if x.p >= x.end or x.p[0] == 0:
        x.kind = TOKEN_END
        return
    c = x.p[0]
    x.start = x.p
    if c == c"'":
        x.p += 1
        x.kind = TOKEN_STRING
        _quoted(x, c, not x.is_conforming)
        return
    if c == c'"':
        x.p += 1
        x.kind = TOKEN_IDENT
        _quoted(x, c, False)
        return
    if c == c'$':
        x.p += 1
        _dollar(x)
        return
    if _is_start(c):
        while x.p < x.end and (_is_start(x.p[0]) or c'0' <= x.p[0] <= c'9' or x.p[0] == c'$'):
            _step(x)
        x.size = <uint32_t> (x.p - x.start)
        x.kind = TOKEN_WORD
        if x.size == 1 and x.p < x.end:
            c = _lower(c)
            if x.p[0] == c"'" and (c == c'e' or c == c'b' or c == c'x' or c == c'n'):
                x.p += 1
                x.kind = TOKEN_STRING
                _quoted(x, c"'", c == c'e' or (c == c'n' and not x.is_conforming))
                x.is_plain = 0
            elif c == c'u' and x.p[0] == c'&' and x.end - x.p > 1 and (x.p[1] == c"'" or x.p[1] == c'"'):
                c = x.p[1]
                x.p += 2
                x.kind = TOKEN_STRING if c == c"'" else TOKEN_IDENT
                x.has_unicode |= c == c'"'
                _quoted(x, c, False)
                x.is_plain = 0
        return
    x.kind = TOKEN_OTHER
    x.byte = c
    if c'0' <= c <= c'9':
        while x.p < x.end and (c'0' <= x.p[0] <= c'9' or x.p[0] == c'.'):
            x.p += 1
        return
    x.p += 1


cdef bint _is(Lexer* x, const char* word) noexcept nogil:
    """Whether the token is this word, without quotes and in any case."""
    cdef uint32_t i
    if x.kind != TOKEN_WORD or x.size != strlen(word):
        return False
    for i in range(x.size):
        if _lower(x.start[i]) != <unsigned char> word[i]:
            return False
    return True


cdef bint _is_named(Lexer* x, const char* name) noexcept nogil:
    """Whether the token is this name of lower-case letters, with or without quotes."""
    cdef uint32_t i
    if x.kind != TOKEN_IDENT or not x.is_plain or x.size != strlen(name):
        return _is(x, name)
    for i in range(x.size):
        if x.start[i] != <unsigned char> name[i]:
            return False
    return True


cdef inline bint _is_over(Lexer* x) noexcept nogil:
    """The statement ended before this token."""
    return x.kind == TOKEN_END or x.byte == c';'


# -- statements ----------------------------------------------------------------------------------------


cdef bint _same(const unsigned char* name, uint32_t size, const char* other) noexcept nogil:
    """Names of settings are the same in any case."""
    cdef uint32_t i
    if size != strlen(other):
        return False
    for i in range(size):
        if _lower(name[i]) != <unsigned char> other[i]:
            return False
    return True


cdef void _add(Reading* self, uint8_t kind, const unsigned char* name, uint32_t size) noexcept nogil:
    cdef Setting* setting
    if name != NULL:
        if (size == 0 or _same(name, size, b"seed") or _same(name, size, b"session_authorization")):
            self.effects |= EFFECT_SET  # cannot be asked for, or not be set again
            return
        if (_same(name, size, b"transaction_isolation") or _same(name, size, b"transaction_read_only")
                or _same(name, size, b"transaction_deferrable")):
            return                      # of the transaction alone
        if _same(name, size, b"client_encoding") or _same(name, size, b"standard_conforming_strings"):
            self.changes_lexis = 1
    if self.count == MAX_SETTINGS:
        self.effects |= EFFECT_SET
        return
    setting = &self.settings[self.count]
    setting.kind = kind
    setting.name = name
    setting.size = size
    self.count += 1
    if kind != SETTING_SET:
        self.has_resets = 1


cdef void _add_word(Reading* self, uint8_t kind, const char* name) noexcept nogil:
    _add(self, kind, <const unsigned char*> name, <uint32_t> strlen(name))


cdef bint _name(Lexer* x, const unsigned char** name, uint32_t* size) noexcept nogil:
    """The name of a setting begins with this token; the next one is read. False: cannot be told."""
    cdef const unsigned char* start = x.start
    cdef const unsigned char* stop = x.start + x.size
    cdef uint32_t i
    if x.kind == TOKEN_IDENT:
        name[0] = x.start
        size[0] = x.size
        if not x.is_plain:
            return False
        _next(x)
    elif x.kind == TOKEN_WORD:
        _next(x)
        while x.byte == c'.':
            _next(x)
            if x.kind != TOKEN_WORD:
                return False
            stop = x.start + x.size
            _next(x)
        name[0] = start
        size[0] = <uint32_t> (stop - start)
    else:
        return False
    if x.byte == c'.':
        return False                    # parts with quotes
    for i in range(size[0]):
        if not (_is_start(name[0][i]) or c'0' <= name[0][i] <= c'9' or name[0][i] == c'.'
                or name[0][i] == c'$') or name[0][i] >= 0x80:
            return False
    return True


cdef bint _is_sign(Lexer* x) noexcept nogil:
    """What stands between a setting's name and its value."""
    return x.byte == c'=' or x.byte == c'.' or _is(x, b"to") or _is(x, b"from")


cdef uint8_t _value_kind(Lexer* x) noexcept nogil:
    """The value begins with this token: whether it is DEFAULT and nothing else."""
    if not _is(x, b"default"):
        return SETTING_SET
    _next(x)
    return SETTING_RESET if _is_over(x) else SETTING_SET


cdef void _set(Lexer* x, Reading* self) noexcept nogil:
    """Behind SET."""
    cdef const unsigned char* name = NULL
    cdef uint32_t size = 0
    cdef bint is_local = False
    cdef uint8_t kind
    _next(x)
    if _is(x, b"local") or _is(x, b"session"):
        is_local = _is(x, b"local")
        _next(x)
        if _is_sign(x):
            self.effects |= EFFECT_SET
            return
        if _is(x, b"authorization") and not is_local:
            self.effects |= EFFECT_SET
            return
        if _is(x, b"characteristics") and not is_local:
            _add_word(self, SETTING_SET, b"default_transaction_isolation")
            _add_word(self, SETTING_SET, b"default_transaction_read_only")
            _add_word(self, SETTING_SET, b"default_transaction_deferrable")
            return
    if _is(x, b"transaction") or _is(x, b"constraints"):
        _next(x)
        if _is_sign(x):
            self.effects |= EFFECT_SET
        return
    if _is(x, b"time"):
        _next(x)
        if _is(x, b"zone"):
            _next(x)
            if is_local:
                return
            is_local = _is(x, b"local") or _is(x, b"default")
            _add_word(self, SETTING_RESET if is_local else SETTING_SET, b"timezone")
            return
        self.effects |= EFFECT_SET
        return
    if _is(x, b"names"):
        _next(x)
        _add_word(self, SETTING_SET if not (_is_over(x) or _is(x, b"default")) else SETTING_RESET,
                  b"client_encoding")
        return
    if _is(x, b"schema"):
        if not is_local:
            _add_word(self, SETTING_SET, b"search_path")
        return
    if _is(x, b"xml"):
        if not is_local:
            _add_word(self, SETTING_SET, b"xmloption")
        return
    if _is(x, b"role"):
        if not is_local:
            _add_word(self, SETTING_SET, b"role")
        return
    if not _name(x, &name, &size) or not _is_sign(x):
        self.effects |= EFFECT_SET
        return
    _next(x)
    kind = _value_kind(x)
    if is_local:
        if _same(name, size, b"client_encoding") or _same(name, size, b"standard_conforming_strings"):
            self.changes_lexis = 1
        return
    _add(self, kind, name, size)


cdef void _reset(Lexer* x, Reading* self) noexcept nogil:
    """Behind RESET."""
    cdef const unsigned char* name = NULL
    cdef uint32_t size = 0
    _next(x)
    if _is(x, b"all"):
        _add(self, SETTING_RESET_ALL, NULL, 0)
    elif _is(x, b"session"):
        self.effects |= EFFECT_SET
    elif _is(x, b"time"):
        _add_word(self, SETTING_RESET, b"timezone")
    elif _is(x, b"transaction"):
        return
    elif _name(x, &name, &size):
        _add(self, SETTING_RESET, name, size)
    else:
        self.effects |= EFFECT_SET


cdef void _discard(Lexer* x, Reading* self) noexcept nogil:
    """Behind DISCARD."""
    _next(x)
    if _is(x, b"all"):
        _add(self, SETTING_DISCARD_ALL, NULL, 0)
        self.forgets_all = 1
    elif _is(x, b"temp") or _is(x, b"temporary"):
        self.ends |= EFFECT_TEMP


cdef void _prepared(Lexer* x, Reading* self, uint8_t kind) noexcept nogil:
    """This token is the name of a prepared statement."""
    cdef PreparedName* name
    cdef uint32_t i
    if kind != NAME_DEALLOCATE:
        self.prepares = 1
    if (not (x.kind == TOKEN_WORD or x.kind == TOKEN_IDENT and x.is_plain) or x.size > NAME_MOST
            or self.name_count == MAX_NAMES):
        self.has_other_names = 1
        return
    name = &self.names[self.name_count]
    for i in range(x.size):
        if x.start[i] >= 0x80 and x.kind == TOKEN_WORD:
            self.has_other_names = 1    # its case may be folded as the locale has it
            return
        name.text[i] = x.start[i] if x.kind == TOKEN_IDENT else _lower(x.start[i])
    name.size = <uint8_t> x.size
    name.kind = kind
    self.name_count += 1


cdef void _deallocate(Lexer* x, Reading* self) noexcept nogil:
    """Behind DEALLOCATE."""
    cdef Lexer before
    _next(x)
    if _is(x, b"prepare"):
        before = x[0]
        _next(x)
        if _is_over(x):
            x[0] = before               # a statement of that name
    self.ends |= EFFECT_PREPARE | EFFECT_PARSE
    if _is(x, b"all"):
        self.forgets_all = 1
    else:
        _prepared(x, self, NAME_DEALLOCATE)


cdef void _set_config(Lexer* x, Reading* self) noexcept nogil:
    """Behind the word set_config; afterwards the token is the first one not looked at."""
    cdef const unsigned char* name
    cdef uint32_t size, depth = 1, commas = 1
    cdef bint is_local = False
    _next(x)
    if x.byte != c'(':
        self.effects |= EFFECT_SET
        return
    _next(x)
    name = x.start
    size = x.size
    if x.kind != TOKEN_STRING or not x.is_plain:
        self.effects |= EFFECT_SET
        return
    _next(x)
    if x.byte != c',':
        self.effects |= EFFECT_SET      # a concatenation, a cast …
        return
    while not _is_over(x) and depth:
        _next(x)
        if _is_named(x, b"set_config"):
            self.effects |= EFFECT_SET      # one inside the other
        if x.byte == c'(':
            depth += 1
        elif x.byte == c')':
            depth -= 1
        elif x.byte == c',' and depth == 1:
            commas += 1
            _next(x)
            if _is_named(x, b"set_config"):
                self.effects |= EFFECT_SET
            is_local = commas == 2 and _is(x, b"true")
            if is_local:
                _next(x)
                if x.byte == c')':
                    break
                is_local = False
            if x.byte == c'(':
                depth += 1
            elif x.byte == c')':
                depth -= 1
    if not is_local:
        _add(self, SETTING_SET, name, size)


cdef void _statement(Lexer* x, Reading* self) noexcept nogil:
    """One statement; its first token is read."""
    cdef bint has_update = False
    cdef bint may_execute = False
    cdef Lexer before
    if _is_over(x):
        return
    if _is(x, b"set"):
        _set(x, self)
    elif _is(x, b"reset"):
        _reset(x, self)
    elif _is(x, b"discard"):
        _discard(x, self)
    elif _is(x, b"deallocate"):
        _deallocate(x, self)
    elif _is(x, b"prepare"):
        _next(x)
        before = x[0]
        _next(x)
        if not _is(&before, b"transaction") or _is(x, b"as") or x.byte == c'(':
            x[0] = before
            _prepared(x, self, NAME_PREPARE)
    elif _is(x, b"execute"):
        _next(x)
        _prepared(x, self, NAME_EXECUTE)
    elif _is(x, b"unlisten"):
        self.ends |= EFFECT_LISTEN
    elif _is(x, b"close"):
        self.ends |= EFFECT_HOLD
    elif _is(x, b"drop"):
        self.ends |= EFFECT_TEMP
    elif _is(x, b"explain") or _is(x, b"create"):
        may_execute = True
    # Functions may stand anywhere, also behind what was looked at.
    while not _is_over(x):
        if x.kind == TOKEN_WORD or x.kind == TOKEN_IDENT:
            if _is_named(x, b"set_config"):
                _set_config(x, self)
                continue
            if _is(x, b"update"):
                has_update = True
            elif has_update and _is_named(x, b"pg_settings"):
                self.effects |= EFFECT_SET
            elif may_execute and _is(x, b"execute"):
                _next(x)
                if not (_is(x, b"function") or _is(x, b"procedure")):
                    _prepared(x, self, NAME_EXECUTE)
                continue
            elif (_is_named(x, b"pg_advisory_unlock") or _is_named(x, b"pg_advisory_unlock_shared")
                    or _is_named(x, b"pg_advisory_unlock_all")):
                self.ends |= EFFECT_LOCK
        _next(x)


cdef const unsigned char* _end(const unsigned char* text, uint32_t size) noexcept nogil:
    """Where the text ends: the types of a Parse may stand behind its NUL."""
    cdef const unsigned char* nul = <const unsigned char*> memchr(text, 0, size)
    return text + size if nul == NULL else nul


cdef bint sql_is_begin(const unsigned char* text, uint32_t size) noexcept nogil:
    cdef Lexer x
    memset(&x, 0, sizeof(Lexer))
    x.p = text
    x.end = _end(text, size)
    x.is_conforming = True
    _next(&x)
    if not _is(&x, b"begin"):
        return False
    _next(&x)
    if _is(&x, b"work") or _is(&x, b"transaction"):
        _next(&x)
    while x.byte == c';':
        _next(&x)
    return x.kind == TOKEN_END


cdef uint8_t _virtual_name(Lexer* x) noexcept nogil:
    """This token begins one of the names: its SHOW; the token behind it is read."""
    cdef uint8_t kind = VIRTUAL_NONE
    if _is_named(x, b"odyssey.target_session_attrs") or _is_named(x, b"gpooler.target_session_attrs"):
        kind = VIRTUAL_SHOW_ODYSSEY if _lower(x.start[0]) == c'o' else VIRTUAL_SHOW_GPOOLER
    elif _is_named(x, b"odyssey") or _is_named(x, b"gpooler"):
        kind = VIRTUAL_SHOW_ODYSSEY if _lower(x.start[0]) == c'o' else VIRTUAL_SHOW_GPOOLER
        _next(x)
        if x.byte != c'.':
            return VIRTUAL_NONE
        _next(x)
        if not _is_named(x, b"target_session_attrs"):
            return VIRTUAL_NONE
    _next(x)
    return kind


cdef uint8_t _virtual_value(Lexer* x) noexcept nogil:
    """The value that SET gives; the token behind it is read."""
    cdef uint8_t kind = VIRTUAL_INVALID
    cdef bint is_string = x.kind == TOKEN_STRING or x.kind == TOKEN_IDENT
    if is_string and not x.is_plain or not is_string and x.kind != TOKEN_WORD:
        return VIRTUAL_INVALID
    if _same(x.start, x.size, b"any") or not is_string and _same(x.start, x.size, b"default"):
        kind = VIRTUAL_SET
    elif is_string and (_same(x.start, x.size, b"read-write") or _same(x.start, x.size, b"read-only")
                        or _same(x.start, x.size, b"prefer-standby")):
        kind = VIRTUAL_UNBUILT
    _next(x)
    return kind


cdef uint8_t sql_virtual(const unsigned char* text, uint32_t size, bint is_conforming,
                         uint8_t is_multibyte) noexcept nogil:
    cdef Lexer x
    cdef uint8_t kind
    cdef bint is_show, is_reset
    memset(&x, 0, sizeof(Lexer))
    x.p = text
    x.end = text + size
    x.is_conforming = is_conforming
    x.is_multibyte = is_multibyte
    _next(&x)
    is_show = _is(&x, b"show")
    is_reset = _is(&x, b"reset")
    if not is_show and not is_reset and not _is(&x, b"set"):
        return VIRTUAL_NONE
    _next(&x)
    if not is_show and not is_reset and (_is(&x, b"session") or _is(&x, b"local")):
        _next(&x)
    kind = _virtual_name(&x)
    if kind == VIRTUAL_NONE:
        return VIRTUAL_NONE
    if is_reset:
        kind = VIRTUAL_RESET
    elif not is_show:
        if x.byte != c'=' and not _is(&x, b"to"):
            return VIRTUAL_UNCLEAR
        _next(&x)
        kind = _virtual_value(&x)
        if kind == VIRTUAL_INVALID:
            return kind
    while x.byte == c';':
        _next(&x)
    return kind if x.kind == TOKEN_END else VIRTUAL_UNCLEAR


cdef void sql_read(Reading* self, const unsigned char* text, uint32_t size, bint is_conforming,
                   uint8_t is_multibyte) noexcept nogil:
    cdef Lexer x
    memset(self, 0, sizeof(Reading))
    memset(&x, 0, sizeof(Lexer))
    x.p = text
    x.end = _end(text, size)
    x.is_conforming = is_conforming
    x.is_multibyte = is_multibyte
    _next(&x)
    while x.kind != TOKEN_END:
        _statement(&x, self)
        if x.byte == c';':
            _next(&x)
    if x.has_unicode:
        self.effects |= EFFECT_SET
