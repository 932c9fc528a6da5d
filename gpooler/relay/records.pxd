"""TLS 1.3's records with a client after the handshake (RFC 8446, sections 4.6.3, 5 and 6), in 400 bytes.

OpenSSL does the handshake and gives the two traffic secrets; its session, which would keep 23 kB, ends there.
What is left is framing, sequence numbers, new keys (KeyUpdate) and alerts. Ciphers and HMAC are libcrypto's.
Free of Python objects; a session belongs to one thread at a time.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef enum:
    RECORD = 16384              # plain bytes of one record
    # its header, tag and padding, and messages that go with it; OpenSSL may make many small records of one
    RECORD_MORE = 4096
    SECRET = 48                 # bytes of the longest traffic secret, SHA-384's
    SUITES = 3


cdef enum TlsResult:            # of a read, where it is no number of bytes
    TLS_CLOSED = 0              # close_notify
    TLS_NOTHING = -1            # no whole record is there
    TLS_BROKEN = -2


cdef struct Crypto:             # what a thread works with: libcrypto's contexts
    void* sealing[SUITES]
    void* opening[SUITES]
    void* hashing[SUITES]


cdef struct Side:               # one direction
    uint64_t sequence           # number of its next record
    unsigned char secret[SECRET]
    unsigned char key[32]
    unsigned char iv[12]


cdef struct Records:
    Side reading
    Side writing
    uint8_t suite
    bint is_broken              # by the peer or by us: nothing can be read or written any more
    bint is_ended               # the peer's close_notify came
    bint is_closed              # ours went, or another alert: nothing is sent any more
    bint owes_update            # the peer asked for new keys of ours
    int owes_alert              # a description, NONE when there is none to send
    uint8_t quiet               # records of this read that brought no bytes
    uint8_t message_size
    unsigned char message[5]    # the beginning of a handshake message
    unsigned char* held         # the beginning of a record
    uint32_t held_start
    uint32_t held_size          # from there on
    unsigned char* more         # what came behind it; not ours
    size_t more_size
    unsigned char* rest         # plain bytes of the last record for which there was no room
    uint32_t rest_start
    uint32_t rest_end


# NULL: no memory, or libcrypto's functions are not loaded.
cdef Crypto* crypto_new() noexcept nogil
cdef void crypto_free(Crypto* crypto) noexcept nogil

# The number of a cipher suite; -1: not one of those that are done here.
cdef int records_suite(const char* name) noexcept nogil
cdef size_t records_secret_size(int suite) noexcept nogil
# With the secrets of what the peer sends and of what goes to it. NULL: no memory, or libcrypto refused.
cdef Records* records_new(Crypto* crypto, int suite, const unsigned char* reading,
                          const unsigned char* writing) noexcept nogil
cdef void records_free(Records* r) noexcept nogil
# Bytes that the peer sent, which are changed and must stay until they are read or kept.
cdef void records_put(Records* r, unsigned char* data, size_t size) noexcept nogil
# Copies what is not read of them: the end of a read. False: no memory, and the session is broken.
cdef bint records_keep(Records* r) noexcept nogil
# Plain bytes, up to one record, or a TlsResult.
cdef ssize_t records_read(Records* r, Crypto* crypto, unsigned char* buffer, size_t size) noexcept nogil
# Seals up to RECORD plain bytes into a buffer of RECORD + RECORD_MORE: how much. -1: it cannot.
cdef ssize_t records_write(Records* r, Crypto* crypto, const unsigned char* data, size_t size,
                           unsigned char* out) noexcept nogil
# What is owed to the peer beside that, new keys and alerts, into a buffer of RECORD_MORE: how much.
cdef size_t records_take(Records* r, Crypto* crypto, unsigned char* out) noexcept nogil
# Owes a close_notify.
cdef void records_close(Records* r) noexcept nogil
# Begin where OpenSSL stopped: it has sealed these records, and no others, with the keys of this session.
# False: they are not so sealed. ``scratch`` has room for all of them.
cdef bint records_sent(Records* r, Crypto* crypto, const unsigned char* data, size_t size,
                       unsigned char* scratch) noexcept nogil
