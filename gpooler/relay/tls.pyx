"""TLS of one connection; the design is in the .pxd. No Python object but at the edge, ``TlsSession``."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint32_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, strlen

from gpooler.relay.records cimport (
    RECORD, RECORD_MORE, SECRET, TLS_BROKEN, TLS_CLOSED, TLS_NOTHING, Crypto, Records, crypto_new,
    records_close, records_free, records_keep, records_new, records_put, records_read, records_secret_size,
    records_sent, records_suite, records_take, records_write,
)


cdef extern from *:
    """
    static _Thread_local void* gpooler_listening = NULL;
    """
    void* listening "gpooler_listening"     # where this thread's handshake puts its secrets; NULL: nowhere


cdef extern from "<string.h>" nogil:
    void explicit_bzero(void* data, size_t size)


cdef enum:
    SSL_ERROR_WANT_READ = 2     # openssl/ssl.h
    SSL_ERROR_ZERO_RETURN = 6
    PYTHON_READ = 16384         # plain bytes handed to Python at once
    ALPN_OK = 0                 # SSL_TLSEXT_ERR_…, openssl/tls1.h
    ALPN_NONE = 3
    RANDOM = 32                 # bytes of a client's random number
    HANDSHAKE = 22              # content type of a record
    HELLO_SESSION = 43          # where the session's id stands in the record of a ClientHello
    MAX_FRAGMENT_LENGTH = 1     # type of an extension


# OpenSSL has one error queue a thread; without a look at an empty one SSL_get_error takes an older error.
ctypedef void (*ClearError)() noexcept nogil
ctypedef int (*Read)(void*, void*, int) noexcept nogil
ctypedef int (*Write)(void*, const void*, int) noexcept nogil
ctypedef int (*GetError)(const void*, int) noexcept nogil
ctypedef int (*OfSsl)(void*) noexcept nogil
ctypedef void (*Free)(void*) noexcept nogil
ctypedef void (*SetBio)(void*, void*, void*) noexcept nogil
ctypedef int (*FreeBio)(void*) noexcept nogil
ctypedef void* (*NewBio)(const void*) noexcept nogil
ctypedef const void* (*Method)() noexcept nogil
ctypedef long (*SetLong)(void*, int) noexcept nogil
ctypedef long (*MemData)(void*, char**) noexcept nogil

ctypedef void* (*New)(void*) noexcept nogil
ctypedef const void* (*Of)(const void*) noexcept nogil
ctypedef const char* (*NameOf)(const void*) noexcept nogil
ctypedef int (*BitsOf)(const void*, int*) noexcept nogil
ctypedef void (*AlpnOf)(const void*, const unsigned char**, unsigned int*) noexcept nogil
ctypedef int (*ChooseAlpn)(
    void*, const unsigned char**, unsigned char*, const unsigned char*, unsigned int, void*) noexcept nogil
ctypedef void (*SetAlpn)(void*, ChooseAlpn, void*) noexcept nogil
ctypedef void (*KeyLog)(const void*, const char*) noexcept nogil
ctypedef void (*SetKeyLog)(void*, KeyLog) noexcept nogil

cdef ClearError ERR_clear_error
cdef Read SSL_read
cdef Write SSL_write
cdef GetError SSL_get_error
cdef OfSsl SSL_shutdown
cdef Free SSL_free
cdef SetBio SSL_set_bio
cdef FreeBio BIO_free
cdef NewBio BIO_new
cdef Method BIO_s_mem
cdef Read BIO_read
cdef Write BIO_write
cdef SetLong BIO_set_mem_eof_return
cdef MemData BIO_get_mem_data
cdef New SSL_new
cdef Free SSL_set_accept_state
cdef OfSsl SSL_do_handshake
cdef NameOf SSL_get_version
cdef Of SSL_get_current_cipher
cdef NameOf SSL_CIPHER_get_name
cdef BitsOf SSL_CIPHER_get_bits
cdef AlpnOf SSL_get0_alpn_selected
cdef SetAlpn SSL_CTX_set_alpn_select_cb
cdef SetKeyLog SSL_CTX_set_keylog_callback
cdef Crypto* crypto_here = NULL     # of those who hold the GIL
cdef object why = None          # what OpenSSL says of the error that this thread has just seen
cdef bint is_loaded = False

NAMES = (
    "ERR_clear_error", "SSL_read", "SSL_write", "SSL_get_error", "SSL_shutdown", "SSL_free", "SSL_set_bio",
    "BIO_free", "BIO_new", "BIO_s_mem", "BIO_read", "BIO_write", "BIO_set_mem_eof_return", "BIO_get_mem_data",
    "SSL_new", "SSL_set_accept_state", "SSL_do_handshake", "SSL_get_version", "SSL_get_current_cipher",
    "SSL_CIPHER_get_name", "SSL_CIPHER_get_bits", "SSL_get0_alpn_selected", "SSL_CTX_set_alpn_select_cb",
    "SSL_CTX_set_keylog_callback",
)


def load(dict addresses not None, reason):
    """Where OpenSSL's functions are: an address for each of ``NAMES``. Raises KeyError.

    ``reason`` takes the errors of the calling thread from OpenSSL's queue and returns them as text.
    """
    global SSL_new, SSL_set_accept_state, SSL_do_handshake, SSL_get_version, SSL_get_current_cipher
    global SSL_CIPHER_get_name, SSL_CIPHER_get_bits, SSL_get0_alpn_selected, SSL_CTX_set_alpn_select_cb, why
    global ERR_clear_error, SSL_read, SSL_write, SSL_get_error, SSL_shutdown, SSL_free, SSL_set_bio, BIO_free
    global BIO_new, BIO_s_mem, BIO_read, BIO_write, BIO_set_mem_eof_return, BIO_get_mem_data, is_loaded
    global SSL_CTX_set_keylog_callback
    ERR_clear_error = <ClearError> <uintptr_t> addresses["ERR_clear_error"]
    SSL_read = <Read> <uintptr_t> addresses["SSL_read"]
    SSL_write = <Write> <uintptr_t> addresses["SSL_write"]
    SSL_get_error = <GetError> <uintptr_t> addresses["SSL_get_error"]
    SSL_shutdown = <OfSsl> <uintptr_t> addresses["SSL_shutdown"]
    SSL_free = <Free> <uintptr_t> addresses["SSL_free"]
    SSL_set_bio = <SetBio> <uintptr_t> addresses["SSL_set_bio"]
    BIO_free = <FreeBio> <uintptr_t> addresses["BIO_free"]
    BIO_new = <NewBio> <uintptr_t> addresses["BIO_new"]
    BIO_s_mem = <Method> <uintptr_t> addresses["BIO_s_mem"]
    BIO_read = <Read> <uintptr_t> addresses["BIO_read"]
    BIO_write = <Write> <uintptr_t> addresses["BIO_write"]
    BIO_set_mem_eof_return = <SetLong> <uintptr_t> addresses["BIO_set_mem_eof_return"]
    BIO_get_mem_data = <MemData> <uintptr_t> addresses["BIO_get_mem_data"]
    SSL_new = <New> <uintptr_t> addresses["SSL_new"]
    SSL_set_accept_state = <Free> <uintptr_t> addresses["SSL_set_accept_state"]
    SSL_do_handshake = <OfSsl> <uintptr_t> addresses["SSL_do_handshake"]
    SSL_get_version = <NameOf> <uintptr_t> addresses["SSL_get_version"]
    SSL_get_current_cipher = <Of> <uintptr_t> addresses["SSL_get_current_cipher"]
    SSL_CIPHER_get_name = <NameOf> <uintptr_t> addresses["SSL_CIPHER_get_name"]
    SSL_CIPHER_get_bits = <BitsOf> <uintptr_t> addresses["SSL_CIPHER_get_bits"]
    SSL_get0_alpn_selected = <AlpnOf> <uintptr_t> addresses["SSL_get0_alpn_selected"]
    SSL_CTX_set_alpn_select_cb = <SetAlpn> <uintptr_t> addresses["SSL_CTX_set_alpn_select_cb"]
    SSL_CTX_set_keylog_callback = <SetKeyLog> <uintptr_t> addresses["SSL_CTX_set_keylog_callback"]
    why = reason
    is_loaded = True


cdef Tls* tls_new(void* ssl, void* incoming, void* outgoing) noexcept:
    cdef Tls* tls = <Tls*> calloc(1, sizeof(Tls))
    if tls != NULL:
        tls.ssl = ssl
        tls.incoming = incoming
        tls.outgoing = outgoing
    return tls


cdef void tls_free(Tls* tls) noexcept nogil:
    if tls.records != NULL:
        records_free(tls.records)
    else:
        ERR_clear_error()
        SSL_free(tls.ssl)       # and its BIOs
    free(tls)


cdef ssize_t tls_read(Tls* tls, Crypto* crypto, unsigned char* buffer, size_t size) noexcept nogil:
    cdef int got, error
    cdef char* data
    if tls.records != NULL:
        return records_read(tls.records, crypto, buffer, size)
    if tls.is_dry:
        return TLS_NOTHING
    if size > 1 << 30:
        size = 1 << 30
    ERR_clear_error()
    got = SSL_read(tls.ssl, buffer, <int> size)
    if got > 0:
        # The record is at its end where it gave less than there is room for, and OpenSSL reads none ahead.
        tls.is_dry = <size_t> got < size and BIO_get_mem_data(tls.incoming, &data) == 0
        return got
    error = SSL_get_error(tls.ssl, got)
    if error == SSL_ERROR_WANT_READ:
        tls.is_dry = True
        return TLS_NOTHING
    return TLS_CLOSED if error == SSL_ERROR_ZERO_RETURN else TLS_BROKEN


cdef inline void note_size(Tls* tls, void* bio) noexcept nogil:
    cdef char* data
    cdef long size = BIO_get_mem_data(bio, &data)
    if size > tls.most:
        tls.most = <uint32_t> size


cdef bint tls_put(Tls* tls, unsigned char* data, size_t size) noexcept nogil:
    if tls.records != NULL:
        records_put(tls.records, data, size)
        return True
    ERR_clear_error()
    if BIO_write(tls.incoming, data, <int> size) != <int> size:
        return False
    note_size(tls, tls.incoming)
    tls.is_dry = False
    return True


cdef bint tls_keep(Tls* tls) noexcept nogil:
    return tls.records == NULL or records_keep(tls.records)


cdef ssize_t tls_write(Tls* tls, Crypto* crypto, const unsigned char* data, size_t size, unsigned char* out,
                       size_t room) noexcept nogil:
    cdef int wrote
    if tls.records != NULL:
        return records_write(tls.records, crypto, data, size, out)
    # A memory BIO takes everything; in parts where the peer asked for small records (RFC 6066).
    while size:
        ERR_clear_error()
        wrote = SSL_write(tls.ssl, data, <int> size)
        if wrote <= 0:
            return -1
        data += wrote
        size -= wrote
    return <ssize_t> tls_take(tls, crypto, out, room)


cdef size_t tls_take(Tls* tls, Crypto* crypto, unsigned char* out, size_t room) noexcept nogil:
    cdef int got
    cdef char* data
    cdef long there
    if tls.records != NULL:
        return records_take(tls.records, crypto, out)
    there = BIO_get_mem_data(tls.outgoing, &data)
    if there <= 0:
        return 0
    if there > tls.most:
        tls.most = <uint32_t> there
    got = BIO_read(tls.outgoing, out, <int> room)
    return got if got > 0 else 0


cdef void tls_close(Tls* tls) noexcept nogil:
    if tls.is_closing:
        return
    tls.is_closing = True
    if tls.records != NULL:
        records_close(tls.records)
    else:
        ERR_clear_error()
        SSL_shutdown(tls.ssl)
        ERR_clear_error()


cdef bint tls_slim(Tls* tls, unsigned char* scratch, size_t size) noexcept nogil:
    cdef char* data
    cdef long there
    cdef int got
    cdef void* incoming
    cdef void* outgoing
    if tls.records != NULL:
        return True                     # they keep nothing
    there = BIO_get_mem_data(tls.incoming, &data)
    if there > <long> size or BIO_get_mem_data(tls.outgoing, &data) > 0:
        return True                     # in use: later
    incoming = BIO_new(BIO_s_mem())
    outgoing = BIO_new(BIO_s_mem())
    if incoming == NULL or outgoing == NULL:
        if incoming != NULL:
            BIO_free(incoming)
        return False
    BIO_set_mem_eof_return(incoming, -1)
    BIO_set_mem_eof_return(outgoing, -1)
    if there > 0:
        got = BIO_read(tls.incoming, scratch, <int> there)
        if got != <int> there or BIO_write(incoming, scratch, got) != got:
            BIO_free(incoming)
            BIO_free(outgoing)
            return False
    SSL_set_bio(tls.ssl, incoming, outgoing)        # frees the old ones
    tls.incoming = incoming
    tls.outgoing = outgoing
    tls.most = 0
    return True


cdef class TlsSession:
    """A TLS session whose handshake is over, on its way from the handshake to the relay.

    It owns the session until the relay takes it.
    """

    def __cinit__(self):
        self.unsent = b""

    def __init__(self, uintptr_t ssl, uintptr_t incoming, uintptr_t outgoing, facts):
        """Takes over the SSL object at that address, which owns both BIOs. ``facts``: a ``net.tls.Facts``."""
        if not is_loaded:
            raise RuntimeError("OpenSSL's functions are not loaded")
        self.tls = tls_new(<void*> ssl, <void*> incoming, <void*> outgoing)
        if self.tls == NULL:
            raise MemoryError
        self.facts = facts
        self.slim()             # a handshake is larger than most of what follows

    def __dealloc__(self):
        if self.tls != NULL:
            tls_free(self.tls)

    cdef int check(self) except -1:
        if self.tls == NULL:
            raise ValueError("the session is the relay's")
        return 0

    cdef Tls* give(self) noexcept:
        """The relay's from now on."""
        cdef Tls* tls = self.tls
        self.tls = NULL
        return tls

    @property
    def has_records(self):
        """Whether OpenSSL's session is gone, and ``Records`` are at work."""
        self.check()
        return self.tls.records != NULL

    def put(self, bytes data not None):
        """Bytes that the peer sent."""
        self.check()
        # what is kept is a copy, and nothing is read before
        if not (tls_put(self.tls, <unsigned char*> PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
                and tls_keep(self.tls)):
            raise MemoryError

    def read(self, Py_ssize_t most=PYTHON_READ):
        """Plain bytes, up to ``most`` of one record; empty when no whole record is there, None at the end.

        Raises ConnectionError when the peer breaks the protocol.
        """
        cdef unsigned char buffer[PYTHON_READ]
        cdef ssize_t got
        self.check()
        got = tls_read(self.tls, crypto_here, buffer, max(1, min(most, <Py_ssize_t> PYTHON_READ)))
        if got == TLS_BROKEN:
            raise ConnectionError("TLS: the peer sent what is no record of this session")
        if got == TLS_CLOSED:
            return None
        return b"" if got < 0 else PyBytes_FromStringAndSize(<char*> buffer, got)

    def write(self, bytes data not None):
        """Encrypt. Raises ConnectionError."""
        cdef unsigned char sealed[RECORD + RECORD_MORE]
        cdef Py_ssize_t at = 0, size = PyBytes_GET_SIZE(data), part
        cdef ssize_t made
        self.check()
        while at < size:
            part = min(size - at, <Py_ssize_t> RECORD)
            made = tls_write(self.tls, crypto_here, <unsigned char*> PyBytes_AS_STRING(data) + at, part,
                             sealed, RECORD + RECORD_MORE)
            if made < 0:
                raise ConnectionError("TLS: the session is broken")
            self.unsent += PyBytes_FromStringAndSize(<char*> sealed, made)
            at += part

    def take(self):
        """Bytes for the peer."""
        cdef bytes unsent = self.unsent
        self.check()
        self.unsent = b""
        return unsent + take_all(self.tls)

    def close(self):
        """Make a close_notify."""
        self.check()
        tls_close(self.tls)

    def slim(self):
        """Give the memory of large BIOs back."""
        cdef unsigned char scratch[PYTHON_READ]
        self.check()
        if not tls_slim(self.tls, scratch, PYTHON_READ):
            raise MemoryError


cdef const char* ALPN = b"\x0apostgresql"


cdef int choose_alpn(
        void* ssl, const unsigned char** out, unsigned char* out_size, const unsigned char* offered,
        unsigned int size, void* nothing) noexcept nogil:
    """PostgreSQL's protocol if the client offers it, else none: each name has its length before it."""
    cdef unsigned int at = 0
    while at < size and offered[at] < size - at:
        if memcmp(offered + at, ALPN, min(<unsigned int> ALPN[0] + 1, size - at)) == 0:
            out[0] = offered + at + 1
            out_size[0] = offered[at]
            return ALPN_OK
        at += offered[at] + 1
    return ALPN_NONE


def accept_alpn(uintptr_t context):
    """Handshakes of the SSL_CTX at that address take the protocol name ``postgresql`` if it is offered."""
    SSL_CTX_set_alpn_select_cb(<void*> context, choose_alpn, NULL)


cdef bint asks_for_small_records(const unsigned char* data, size_t size, bint* is_whole) noexcept nogil:
    """Whether a ClientHello, from its record's header on, has max_fragment_length (RFC 6066, section 4).

    So has one that cannot be read here: OpenSSL goes on with it then, and ends it if it is none.
    """
    cdef size_t at = HELLO_SESSION, end = 0
    is_whole[0] = True
    if size and data[0] != HANDSHAKE:
        return True
    if size > 4:
        end = 5 + (<size_t> data[3] << 8 | data[4])
    if end == 0 or size < end:
        is_whole[0] = False
        return False
    if end < at + 1 or 9 + (<size_t> data[6] << 16 | <size_t> data[7] << 8 | data[8]) > end:
        return True                     # it goes on in another record
    at += 1 + data[at]
    if at + 2 > end:
        return True
    at += 2 + (<size_t> data[at] << 8 | data[at + 1])       # cipher suites
    if at + 1 > end:
        return True
    at += 1 + data[at]                                      # compression methods
    if at + 2 > end:
        return at != end                                    # no extensions
    at += 2
    while at + 4 <= end:
        if data[at] == 0 and data[at + 1] == MAX_FRAGMENT_LENGTH:
            return True
        at += 4 + (<size_t> data[at + 2] << 8 | data[at + 3])
    return at != end


cdef inline int hexadecimal(unsigned char letter) noexcept nogil:
    return letter - c'0' if letter <= c'9' else (letter | 32) - c'a' + 10


cdef void keep_secret(const void* ssl, const char* line) noexcept nogil:
    """OpenSSL says a secret as in a key log: its name, the client's random number, the secret (RFC 9850)."""
    cdef Secrets* secrets = <Secrets*> listening
    cdef size_t named = 24, size = strlen(line), at = named + 2 * RANDOM + 1, i
    cdef unsigned char* secret
    cdef size_t* taken
    if secrets == NULL or size < at or (size - at) % 2 or (size - at) // 2 > SECRET:
        return
    if memcmp(line, b"CLIENT_TRAFFIC_SECRET_0 ", named) == 0:
        secret = &secrets.client[0]
        taken = &secrets.client_size
    elif memcmp(line, b"SERVER_TRAFFIC_SECRET_0 ", named) == 0:
        secret = &secrets.server[0]
        taken = &secrets.server_size
    else:
        return
    taken[0] = (size - at) // 2
    for i in range(taken[0]):
        secret[i] = <unsigned char> (hexadecimal(line[at + 2 * i]) << 4 | hexadecimal(line[at + 2 * i + 1]))


def keep_secrets(uintptr_t context):
    """Handshakes of the SSL_CTX at that address can end in ``Records``. Raises ValueError: no libcrypto."""
    global crypto_here
    if crypto_here == NULL:
        crypto_here = crypto_new()
    if crypto_here == NULL:
        raise ValueError("libcrypto cannot be used")
    SSL_CTX_set_keylog_callback(<void*> context, keep_secret)


cdef class TlsHandshake:
    """A handshake with a client: its bytes in, ours out, and a session at the end."""

    def __cinit__(self, uintptr_t context, describe, bint is_heavy, bint keeps_secrets):
        """``context``: address of the SSL_CTX; ``describe(self)`` gives the session's ``facts``.

        ``is_heavy``: the first step takes a millisecond, with an RSA key. ``keeps_secrets``: it is to end in
        ``Records`` where it can; ``keep_secrets`` was called for the context.
        """
        cdef void* ssl
        cdef void* incoming
        cdef void* outgoing
        self.describe = describe
        self.is_heavy = is_heavy
        self.keeps_secrets = keeps_secrets
        ERR_clear_error()
        ssl = SSL_new(<void*> context)
        if ssl == NULL:
            raise MemoryError
        incoming = BIO_new(BIO_s_mem())
        outgoing = BIO_new(BIO_s_mem())
        self.tls = tls_new(ssl, incoming, outgoing)
        if incoming == NULL or outgoing == NULL or self.tls == NULL:
            free(self.tls)
            self.tls = NULL
            SSL_free(ssl)
            raise MemoryError
        BIO_set_mem_eof_return(incoming, -1)
        BIO_set_mem_eof_return(outgoing, -1)
        SSL_set_bio(ssl, incoming, outgoing)
        SSL_set_accept_state(ssl)

    def __dealloc__(self):
        explicit_bzero(&self.secrets, sizeof(Secrets))
        if self.tls != NULL:
            tls_free(self.tls)

    @property
    def address(self):
        """Of the SSL object."""
        return <uintptr_t> self.tls.ssl

    def feed(self, bytes data not None):
        """Bytes that the peer sent."""
        cdef bint is_whole = False
        if self.keeps_secrets and not self.is_hello_read:
            self.hello = data if self.hello is None else self.hello + data
            self.keeps_secrets = not asks_for_small_records(
                <unsigned char*> PyBytes_AS_STRING(self.hello), PyBytes_GET_SIZE(self.hello), &is_whole)
            if is_whole:
                self.is_hello_read = True
                self.hello = None
        if not tls_put(self.tls, <unsigned char*> PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data)):
            raise MemoryError

    def step(self):
        """Go on as far as what came allows: whether it is over. Raises ConnectionError."""
        global listening
        cdef int done, error = 0
        cdef char* data
        cdef bint is_clean = BIO_get_mem_data(self.tls.outgoing, &data) == 0
        self.is_heavy = False
        with nogil:
            ERR_clear_error()
            listening = &self.secrets if self.keeps_secrets else NULL
            done = SSL_do_handshake(self.tls.ssl)
            listening = NULL
            if done != 1:
                error = SSL_get_error(self.tls.ssl, done)
        if done == 1:
            # What this step says comes after the client's last word in the handshake: it is sealed with the
            # keys of the session.
            self.is_over = is_clean
            return True
        if error == SSL_ERROR_WANT_READ:
            return False
        raise ConnectionError(why())

    def take(self):
        """Bytes for the peer, also after a fault: an alert."""
        cdef bytes data = take_all(self.tls)
        if self.is_over and self.last_flight is None:
            self.last_flight = data
        return data

    def outcome(self):
        """Protocol, cipher, its bits, and the protocol name of ALPN: empty if there is none."""
        cdef const void* cipher = SSL_get_current_cipher(self.tls.ssl)
        cdef const unsigned char* alpn = NULL
        cdef unsigned int size = 0
        SSL_get0_alpn_selected(self.tls.ssl, &alpn, &size)
        return (
            SSL_get_version(self.tls.ssl).decode(), SSL_CIPHER_get_name(cipher).decode(),
            SSL_CIPHER_get_bits(cipher, NULL), alpn[:size] if size else b"",
        )

    def session(self):
        """What it ended in. Once, and after the last ``take``."""
        cdef TlsSession session = TlsSession.__new__(TlsSession)
        session.facts = self.describe(self)
        if self.keeps_secrets and self.last_flight is not None:
            self.begin_records()
        explicit_bzero(&self.secrets, sizeof(Secrets))
        session.tls = self.tls
        self.tls = NULL
        return session

    cdef void begin_records(self):
        """Let ``Records`` go on where OpenSSL stopped, and free its session, if they can."""
        cdef unsigned char scratch[PYTHON_READ]
        cdef Tls* tls = self.tls
        cdef Records* records
        cdef char* data
        cdef long there
        cdef Py_ssize_t sent = PyBytes_GET_SIZE(self.last_flight)
        cdef int suite = records_suite(SSL_CIPHER_get_name(SSL_get_current_cipher(tls.ssl)))
        if suite < 0 or sent > PYTHON_READ:
            return
        if not self.secrets.client_size == self.secrets.server_size == records_secret_size(suite):
            return
        records = records_new(crypto_here, suite, self.secrets.client, self.secrets.server)
        if records == NULL:
            return
        there = BIO_get_mem_data(tls.incoming, &data)
        records_put(records, <unsigned char*> data, there)
        if not (records_sent(records, crypto_here, <unsigned char*> PyBytes_AS_STRING(self.last_flight), sent,
                             scratch)
                and records_keep(records)):
            records_free(records)
            return
        ERR_clear_error()
        SSL_free(tls.ssl)       # and its BIOs
        tls.ssl = NULL
        tls.incoming = NULL
        tls.outgoing = NULL
        tls.most = 0
        tls.records = records


cdef bytes take_all(Tls* tls):
    cdef unsigned char buffer[PYTHON_READ]
    cdef size_t got = tls_take(tls, crypto_here, buffer, PYTHON_READ)
    cdef bytes result = buffer[:got]
    while got == PYTHON_READ:
        got = tls_take(tls, crypto_here, buffer, PYTHON_READ)
        result += buffer[:got]
    return result
