"""What a whole SQL text does to its session: which settings, which names.

The scanner (relay/scanner.pxd) looks at every text as it passes and remembers effects, not names. The few
texts that have an effect are read here once more, whole and in tokens. Like the scanner it errs on the side
of an effect: what cannot be told from the text (a computed name, an identifier with escapes) is EFFECT_SET,
which pins.

Settings are pointers into the text, or to constants; nothing is kept. Statements are what stands between
semicolons, so the body of a rule may count as several.

Lexical rules: PostgreSQL manual, chapter "Lexical Structure"; SET, RESET, DISCARD, DEALLOCATE: their
reference pages and gram.y. Free of Python objects.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t


cdef enum:
    MAX_SETTINGS = 32           # of one text; with more of them it pins
    MAX_NAMES = 8               # of prepared statements
    NAME_MOST = 63              # bytes of an identifier, as PostgreSQL cuts it


cdef enum SettingKind:
    SETTING_SET = 1             # it has a value now that the text may not show
    SETTING_RESET = 2           # back to where the session began
    SETTING_RESET_ALL = 3       # all but role and session_authorization
    SETTING_DISCARD_ALL = 4


cdef struct Setting:
    const unsigned char* name   # NULL for the two kinds that concern all
    uint32_t size
    uint8_t kind


cdef enum NameKind:
    NAME_PREPARE = 1
    NAME_EXECUTE = 2
    NAME_DEALLOCATE = 3


cdef struct PreparedName:
    uint8_t kind
    uint8_t size
    unsigned char text[NAME_MOST]


cdef enum Virtual:               # what is answered without a server (virtual_processing)
    VIRTUAL_NONE = 0
    VIRTUAL_SHOW_ODYSSEY = 1    # SHOW odyssey.target_session_attrs
    VIRTUAL_SHOW_GPOOLER = 2    # … by the name that begins with gpooler
    VIRTUAL_SET = 3             # to the one value that there is
    VIRTUAL_RESET = 4
    VIRTUAL_UNBUILT = 5         # SET to a value that is to come
    VIRTUAL_INVALID = 6         # SET to what is none
    VIRTUAL_UNCLEAR = 7         # one of them, and more


cdef struct Reading:
    Setting settings[MAX_SETTINGS]
    PreparedName names[MAX_NAMES]
    uint32_t count              # of settings
    uint32_t name_count
    uint16_t effects            # scanner.Effect bits: state that cannot be followed by a name
    uint16_t ends               # scanner.Effect bits: state of these kinds may be over
    uint8_t has_resets          # a setting of another kind than SETTING_SET
    uint8_t has_other_names     # prepared statements that are not in `names`: too many, too long …
    uint8_t prepares            # PREPARE or EXECUTE of a prepared statement
    uint8_t forgets_all         # DEALLOCATE ALL, DISCARD ALL
    uint8_t changes_lexis       # client_encoding, standard_conforming_strings: how later texts are read


# Whether a text is BEGIN without options and nothing else.
cdef bint sql_is_begin(const unsigned char* text, uint32_t size) noexcept nogil

# A Virtual: what the text is, or begins with.
cdef uint8_t sql_virtual(const unsigned char* text, uint32_t size, bint is_conforming,
                         uint8_t is_multibyte) noexcept nogil

# `text` ends with its NUL, or with `size`.
cdef void sql_read(Reading* self, const unsigned char* text, uint32_t size, bint is_conforming,
                   uint8_t is_multibyte) noexcept nogil
