"""TLS of one connection: OpenSSL's SSL object over two memory BIOs, called by function pointer.

Python makes the context and the handshake (``net/tls.py``); from then on only these functions touch the SSL
object, from whichever thread owns the connection, without the GIL. Ciphertext goes in and out as bytes: who
owns the socket sends and receives it. After each call that may write (a read may: KeyUpdate is answered)
what stands in the outgoing BIO is to be taken and sent.
"""

from libc.stdint cimport uint32_t, uint64_t


cdef enum:
    RECORD = 16384              # plain bytes of one TLS record
    RECORD_MORE = 512           # its header, tag and padding, and a message or two that go with it
    FAT = 2048                  # a BIO that has held so much keeps the memory until it is replaced


cdef enum TlsResult:            # of tls_read, where it is no number of bytes
    TLS_CLOSED = 0              # close_notify
    TLS_NOTHING = -1            # no whole record is there
    TLS_BROKEN = -2


cdef struct Tls:
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
# Plain bytes, up to one record, or a TlsResult.
cdef ssize_t tls_read(Tls* tls, unsigned char* buffer, size_t size) noexcept nogil
# Bytes that the peer sent. False: no memory.
cdef bint tls_put(Tls* tls, const unsigned char* data, size_t size) noexcept nogil
# Encrypts up to RECORD plain bytes. False: the connection cannot be used any more.
cdef bint tls_write(Tls* tls, const unsigned char* data, size_t size) noexcept nogil
# Moves what goes to the peer into a buffer: how much.
cdef size_t tls_take(Tls* tls, unsigned char* buffer, size_t size) noexcept nogil
# Makes a close_notify, once.
cdef void tls_close(Tls* tls) noexcept nogil
# Gives the memory of fat BIOs back; what stands in them stays. False: no memory.
cdef bint tls_slim(Tls* tls, unsigned char* scratch, size_t size) noexcept nogil


cdef class TlsSession:
    """A Tls on its way through Python."""

    cdef Tls* tls
    # How its peer is shown, and what a login may ask about it.
    cdef readonly object facts

    cdef Tls* give(self) noexcept


cdef class TlsHandshake:
    """A Tls that is not a session yet."""

    cdef Tls* tls
    cdef object describe
    cdef readonly bint is_heavy
