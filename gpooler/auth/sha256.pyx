"""SHA-256 (FIPS 180-4) and HMAC with it, in C, for what each login works out: a few hundred bytes.

OpenSSL is quicker at long data; before the first byte it looks the algorithm up and makes contexts for it,
which with cold caches, as between two logins, costs ten times the hash (``hmac.digest``: 50 µs). Nothing
depends on the data but the sums: no table is looked up by it, nothing branches on it.
"""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.string cimport memcpy, memset


cdef uint32_t[8] BEGIN = [
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
]
cdef uint32_t[64] ROUND = [
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
]


cdef inline uint32_t turned(uint32_t word, int bits) noexcept nogil:
    return (word >> bits) | (word << (32 - bits))


cdef inline uint32_t read_word(const uint8_t* at) noexcept nogil:
    return (<uint32_t> at[0] << 24) | (<uint32_t> at[1] << 16) | (<uint32_t> at[2] << 8) | at[3]


cdef inline void write_word(uint8_t* at, uint32_t word) noexcept nogil:
    at[0] = <uint8_t> (word >> 24)
    at[1] = <uint8_t> (word >> 16)
    at[2] = <uint8_t> (word >> 8)
    at[3] = <uint8_t> word


cdef void mix(uint32_t* state, const uint8_t* block) noexcept nogil:
    """One block, section 6.2.2."""
    cdef uint32_t w[64]
    cdef uint32_t a = state[0], b = state[1], c = state[2], d = state[3]
    cdef uint32_t e = state[4], f = state[5], g = state[6], h = state[7]
    cdef uint32_t low, high, one, two
    cdef int i
    for i in range(16):
        w[i] = read_word(block + 4 * i)
    for i in range(16, 64):
        low = turned(w[i - 15], 7) ^ turned(w[i - 15], 18) ^ (w[i - 15] >> 3)
        high = turned(w[i - 2], 17) ^ turned(w[i - 2], 19) ^ (w[i - 2] >> 10)
        w[i] = w[i - 16] + low + w[i - 7] + high
    for i in range(64):
        one = h + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) + ((e & f) ^ (~e & g)) + ROUND[i] + w[i]
        two = (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))
        h = g
        g = f
        f = e
        e = d + one
        d = c
        c = b
        b = a
        a = one + two
    state[0] += a
    state[1] += b
    state[2] += c
    state[3] += d
    state[4] += e
    state[5] += f
    state[6] += g
    state[7] += h


cdef void sha256_begin(Sha256* s) noexcept nogil:
    memcpy(s.state, BEGIN, sizeof(s.state))
    s.size = 0


cdef void sha256_add(Sha256* s, const uint8_t* data, size_t size) noexcept nogil:
    cdef size_t used = s.size % SHA256_BLOCK, part
    s.size += size
    if used:
        part = min(size, SHA256_BLOCK - used)
        memcpy(s.rest + used, data, part)
        if used + part < SHA256_BLOCK:
            return
        mix(s.state, s.rest)
        data += part
        size -= part
    while size >= SHA256_BLOCK:
        mix(s.state, data)
        data += SHA256_BLOCK
        size -= SHA256_BLOCK
    memcpy(s.rest, data, size)


cdef void sha256_end(Sha256* s, uint8_t* digest) noexcept nogil:
    cdef size_t used = s.size % SHA256_BLOCK
    cdef int i
    s.rest[used] = 0x80
    used += 1
    if used > SHA256_BLOCK - 8:
        memset(s.rest + used, 0, SHA256_BLOCK - used)
        mix(s.state, s.rest)
        used = 0
    memset(s.rest + used, 0, SHA256_BLOCK - used)
    write_word(s.rest + SHA256_BLOCK - 8, <uint32_t> (s.size >> 29))
    write_word(s.rest + SHA256_BLOCK - 4, <uint32_t> (s.size << 3))
    mix(s.state, s.rest)
    for i in range(8):
        write_word(digest + 4 * i, s.state[i])


cdef void hmac_begin(Hmac* mac, const uint8_t* key, size_t size) noexcept nogil:
    cdef uint8_t block[SHA256_BLOCK]
    cdef size_t i
    memset(block, 0x36, SHA256_BLOCK)
    for i in range(size):
        block[i] ^= key[i]
    memcpy(mac.inner, BEGIN, sizeof(mac.inner))
    mix(mac.inner, block)
    for i in range(<size_t> SHA256_BLOCK):
        block[i] ^= 0x36 ^ 0x5c
    memcpy(mac.outer, BEGIN, sizeof(mac.outer))
    mix(mac.outer, block)


cdef void hmac_of(const Hmac* mac, const uint8_t* data, size_t size, uint8_t* digest) noexcept nogil:
    cdef Sha256 s
    memcpy(s.state, mac.inner, sizeof(s.state))
    s.size = SHA256_BLOCK
    sha256_add(&s, data, size)
    sha256_end(&s, digest)
    memcpy(s.state, mac.outer, sizeof(s.state))
    s.size = SHA256_BLOCK
    sha256_add(&s, digest, SHA256_LENGTH)
    sha256_end(&s, digest)


def sha256(*parts):
    """The hash of these parts of a message."""
    cdef Sha256 s
    cdef uint8_t digest[SHA256_LENGTH]
    cdef bytes part
    sha256_begin(&s)
    for part in parts:
        sha256_add(&s, <uint8_t*> PyBytes_AS_STRING(part), len(part))
    sha256_end(&s, digest)
    return digest[:SHA256_LENGTH]


def hmac_sha256(bytes key not None, bytes data not None):
    """The HMAC of ``data``; ``key`` is up to 64 bytes."""
    cdef Hmac mac
    cdef uint8_t digest[SHA256_LENGTH]
    if len(key) > SHA256_BLOCK:
        raise ValueError("the key is too long")
    hmac_begin(&mac, <uint8_t*> PyBytes_AS_STRING(key), len(key))
    hmac_of(&mac, <uint8_t*> PyBytes_AS_STRING(data), len(data), digest)
    return digest[:SHA256_LENGTH]
