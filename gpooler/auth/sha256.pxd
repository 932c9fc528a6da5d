from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef enum:
    SHA256_LENGTH = 32
    SHA256_BLOCK = 64


cdef struct Sha256:
    uint32_t state[8]
    uint64_t size               # bytes so far
    uint8_t rest[SHA256_BLOCK]  # those of them that fill no block yet


# HMAC (RFC 2104) with a key worked in.
cdef struct Hmac:
    uint32_t inner[8]           # states behind the padded keys
    uint32_t outer[8]


cdef void sha256_begin(Sha256* s) noexcept nogil
cdef void sha256_add(Sha256* s, const uint8_t* data, size_t size) noexcept nogil
cdef void sha256_end(Sha256* s, uint8_t* digest) noexcept nogil
# The key is no longer than a block.
cdef void hmac_begin(Hmac* mac, const uint8_t* key, size_t size) noexcept nogil
cdef void hmac_of(const Hmac* mac, const uint8_t* data, size_t size, uint8_t* digest) noexcept nogil
