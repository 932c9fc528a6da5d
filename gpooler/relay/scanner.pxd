"""Which session state a SQL text may leave behind: a resumable scanner fed as bytes pass.

It keeps no text. It knows comments (nested), quotes, dollar quotes and words, and remembers the
leading words of each statement. It errs on the side of an effect: a false one costs a pinned server,
a missed one would leak state.

Seen where nothing lasts, on purpose:

* ``set_config(…, true)``, EXPLAIN or a rule around a statement, a Parse that is never executed;
* SET LOCAL of ``client_encoding`` and ``standard_conforming_strings``: they change how later texts are read;
* any identifier written as ``U&"…"``, since it may spell any name;
* identifiers in quotes in any case, since settings have no case;
* comments nested deeper than 255;
* any mention of the schema ``pg_temp``; ``pg_settings`` behind the word UPDATE.

Not seen: what a function, a DO block, a rule or a fast-path call does inside the server, except for the few
functions that are known by name; a temporary table that is one only because ``search_path`` begins with
``pg_temp``.

Lexical rules: PostgreSQL manual, chapter "Lexical Structure", and its scan.l. Free of Python objects.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t


cdef enum Effect:
    EFFECT_SET = 1          # SET, RESET, DISCARD, set_config(): session parameters
    EFFECT_LISTEN = 2
    EFFECT_PREPARE = 4      # SQL PREPARE
    EFFECT_TEMP = 8         # temporary table, view, sequence
    EFFECT_HOLD = 16        # DECLARE … WITH HOLD
    EFFECT_LOCK = 32        # session advisory lock
    EFFECT_LOAD = 64
    EFFECT_PARSE = 128      # a named Parse message
    EFFECT_BEGIN = 256      # opens a transaction block; not session state
    EFFECT_FORGET = 512     # DEALLOCATE, DISCARD: prepared statements may be gone
    EFFECT_OPAQUE = 1024    # DO, CALL: whatever the code inside does to the session
    EFFECT_NAMES = 2048     # SQL EXECUTE: by a name that may be the protocol's
    EFFECT_ENDS = 4096      # UNLISTEN, CLOSE, DROP, unlock: state may be over
    # the text is worth a second look, whole (relay/sql.pxd): SET, PREPARE, FORGET, NAMES, ENDS
    EFFECT_READ = 6661
    EFFECT_STATE = 122      # what cannot go from server to server: LISTEN, TEMP, HOLD, LOCK, LOAD
    EFFECT_SESSION = 255    # all that outlives a transaction


cdef enum ScanState:
    SCAN_PLAIN = 0
    SCAN_WORD = 1
    SCAN_DASH = 2           # one '-' seen
    SCAN_LINE_COMMENT = 3
    SCAN_SLASH = 4          # one '/' seen
    SCAN_COMMENT = 5
    SCAN_COMMENT_STAR = 6
    SCAN_COMMENT_SLASH = 7
    SCAN_QUOTE = 8          # '…'
    SCAN_QUOTE_ESCAPE = 9   # after a backslash in an E'…'
    SCAN_IDENT = 10         # "…"
    SCAN_DOLLAR = 11        # reading an opening $tag$
    SCAN_BODY = 12          # inside $tag$…
    SCAN_BODY_DOLLAR = 13   # reading a possible closing $tag$
    SCAN_SKIP = 14          # skipping the name of a Parse message
    SCAN_END = 15           # after the closing NUL
    SCAN_QUOTE_CLOSED = 16  # after the quote that may end a literal
    SCAN_CLOSED_DASH = 17   # one '-' seen there
    SCAN_CLOSED_COMMENT = 18
    SCAN_IDENT_CLOSED = 19  # after the quote that may end an identifier
    SCAN_U_AMPERSAND = 20   # U& seen


cdef enum Multibyte:        # client encodings whose characters may end in a byte that looks like ASCII
    MULTIBYTE_NONE = 0
    MULTIBYTE_PAIRS = 1     # BIG5, GBK, GB18030, UHC: from 0x80 on, two bytes (or twice two)
    MULTIBYTE_SJIS = 2      # likewise, but 0xa1 to 0xdf stand alone


cdef struct Scan:           # 32 bytes at most: every client has one
    uint32_t hash           # of the current word, lower case; of the tag while in SCAN_BODY_DOLLAR
    uint32_t tag            # of the opening dollar tag
    uint32_t first          # hash of the statement's first word
    uint32_t previous       # of the word before the current one
    uint16_t effects        # what has been seen
    uint8_t pending         # SET LOCAL and its kin: the effect if the next token says it is a name after all
    uint8_t state
    uint8_t words           # words in this statement, at most 255
    uint8_t depth           # of nested comments, at most 255
    uint8_t has_escapes     # the current quote knows backslashes
    uint8_t has_update      # the word UPDATE stands in this statement
    uint8_t is_multibyte    # Multibyte
    uint8_t is_conforming   # standard_conforming_strings
    uint8_t is_trail        # the next byte is the second of a character


cdef void scan_begin(Scan* self, bint is_parse, bint is_conforming, uint8_t is_multibyte) noexcept nogil
cdef void scan_feed(Scan* self, const unsigned char* data, size_t size) noexcept nogil
