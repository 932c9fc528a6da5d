"""TLS of one connection: OpenSSL's SSL object over two memory BIOs, called by function pointer; or Records.

Python makes the context and the handshake (``net/tls.py``); from then on only these functions touch the SSL
object, from whichever thread owns the connection, without the GIL. Ciphertext goes in and out as bytes: who
owns the socket sends and receives it. After each call that may write (a read may: KeyUpdate is answered)
what is owed to the peer is to be taken and sent.

A session with a client by TLS 1.3 goes over to ``Records`` when its handshake ends, and its SSL object is
freed (``begin_records``). Sessions with servers, by TLS 1.2, or with ``tls_records = "openssl"`` keep it.
"""

from libc.stdint cimport uint32_t, uint64_t

from gpooler.relay.records cimport SECRET, Crypto, Records


cdef enum:
    FAT = 2048                  # a BIO that has held so much keeps the memory until it is replaced


cdef struct Tls:
    Records* records            # NULL: the three below are at work
    void* ssl
    void* incoming              # BIO: what the peer sent
    void* outgoing              # BIO: what goes to it
    uint32_t most               # bytes that one of them has held
    bint is_closing             # our close_notify was made
    bint is_dry                 # of what came nothing is left that makes plain bytes
    Tls* fat_next               # those with fat BIOs are a list
    Tls* fat_previous
    bint is_fat
    uint64_t used_us            # last time, where it is fat


# Takes the SSL object over, and with it the two BIOs that it has. NULL: no memory.
cdef Tls* tls_new(void* ssl, void* incoming, void* outgoing) noexcept
cdef void tls_free(Tls* tls) noexcept nogil
# Plain bytes, up to one record, or a TlsResult. ``crypto`` is the calling thread's, here and below.
cdef ssize_t tls_read(Tls* tls, Crypto* crypto, unsigned char* buffer, size_t size) noexcept nogil
# Bytes that the peer sent, which may be changed and must stay until they are read or kept. False: no memory.
cdef bint tls_put(Tls* tls, unsigned char* data, size_t size) noexcept nogil
# What of them is not read stays without them. False: no memory.
cdef bint tls_keep(Tls* tls) noexcept nogil
# Seals up to RECORD plain bytes into a buffer of RECORD + RECORD_MORE: how much goes to the peer. -1: the
# connection cannot be used any more.
cdef ssize_t tls_write(Tls* tls, Crypto* crypto, const unsigned char* data, size_t size, unsigned char* out,
                       size_t room) noexcept nogil
# Moves what else goes to the peer into a buffer of RECORD_MORE at least: how much.
cdef size_t tls_take(Tls* tls, Crypto* crypto, unsigned char* out, size_t room) noexcept nogil
# Makes a close_notify, once.
cdef void tls_close(Tls* tls) noexcept nogil
# Gives the memory of fat BIOs back; what stands in them stays. False: no memory.
cdef bint tls_slim(Tls* tls, unsigned char* scratch, size_t size) noexcept nogil


cdef struct Secrets:            # of TLS 1.3, for what comes from a client and what goes to it
    unsigned char client[SECRET]
    unsigned char server[SECRET]
    size_t client_size
    size_t server_size


cdef class TlsSession:
    """A Tls on its way through Python."""

    cdef Tls* tls
    cdef bytes unsent
    # How its peer is shown, and what a login may ask about it.
    cdef readonly object facts

    cdef int check(self) except -1
    cdef Tls* give(self) noexcept


cdef class TlsHandshake:
    """A Tls that is not a session yet."""

    cdef Tls* tls
    cdef object describe
    cdef bint keeps_secrets
    cdef bint is_hello_read
    cdef bytes hello                # as long as it has not come whole
    cdef Secrets secrets
    cdef bint is_over
    cdef bytes last_flight          # what went out under the session's keys
    cdef readonly bint is_heavy

    cdef void begin_records(self)
