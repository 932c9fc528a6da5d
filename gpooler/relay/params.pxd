"""Session parameters as interned, immutable sets.

A client carries the set it expects, a server the set it has. Sets with the same content are one
object, so "nothing to deploy" is a comparison of two pointers. Names are compared without regard to
ASCII case, as PostgreSQL does. Values are bytes as they came over the wire.

The table is shared by the hub (logins) and the relay thread (ParameterStatus): each operation takes
the table's lock. Free of Python objects.
"""

from libc.stdint cimport uint8_t, uint32_t


cdef enum:
    MAX_PARAMS = 400            # PostgreSQL 18 has about 390 settings
    PARAM_REPORTED = 1          # known by ParameterStatus
    PARAM_READ_ONLY = 2         # reported, cannot be set by a session
    # Deploys longer than this are refused: startup packets are at most 10,000 bytes.
    MAX_DEPLOY = 65536


cdef struct Param:
    uint32_t references
    uint32_t hash
    uint32_t name_size
    uint32_t value_size
    uint8_t flags
    Param* next                 # in its bucket
    unsigned char text[1]       # name, NUL, value, NUL


cdef struct ParamSet:
    uint32_t references
    uint32_t hash
    uint32_t count
    uint8_t is_conforming       # standard_conforming_strings is not off
    uint8_t is_multibyte        # how to read client_encoding: a scanner.Multibyte
    ParamSet* next              # in its bucket
    Param* items[1]             # sorted by name


cdef void params_global_init() noexcept nogil

cdef ParamSet* params_empty() noexcept nogil
cdef ParamSet* params_hold(ParamSet* s) noexcept nogil
cdef void params_release(ParamSet* s) noexcept nogil

# Each returns a held set and releases nothing; NULL when memory is short or a limit is passed.
cdef ParamSet* params_with(ParamSet* s, const unsigned char* name, uint32_t name_size,
                           const unsigned char* value, uint32_t value_size, uint8_t flags) noexcept nogil
# The same when it has no such name.
cdef ParamSet* params_without(ParamSet* s, const unsigned char* name, uint32_t name_size) noexcept nogil
# base with the values of over on top
cdef ParamSet* params_merge(ParamSet* base, ParamSet* over) noexcept nogil
# after a deploy: what the server reports, and of the rest what the client asked for
cdef ParamSet* params_settle(ParamSet* server, ParamSet* client) noexcept nogil

# The simple query (no header, NUL at the end) that turns a server with `has` into one with `wants`.
# Returns its size, 0 when nothing differs, -1 when it would not fit.
cdef int params_deploy(ParamSet* has, ParamSet* wants, unsigned char* out, int capacity) noexcept nogil
# A string literal of these bytes that no setting of the session can read otherwise: its size, -1 when it
# would not fit.
cdef int params_literal(const unsigned char* text, uint32_t size, unsigned char* out,
                        int capacity) noexcept nogil
# NULL when absent; it lives as long as the set.
cdef Param* params_find(ParamSet* s, const unsigned char* name, uint32_t name_size) noexcept nogil
cdef bint params_is_same_name(const unsigned char* a, uint32_t a_size,
                              const unsigned char* b, uint32_t b_size) noexcept nogil
cdef bint params_is_same_value(Param* a, Param* b) noexcept nogil
# The value of a name, NULL when absent.
cdef const unsigned char* params_value(ParamSet* s, const char* name) noexcept nogil
# How many parameters and sets are interned.
cdef void params_counts(uint32_t* params, uint32_t* sets) noexcept nogil


cdef class ParameterSet:
    cdef ParamSet* _set
