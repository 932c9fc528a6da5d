"""TLS 1.3's records after the handshake; the design is in the .pxd."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memmove, strcmp, strlen


cdef extern from "<string.h>" nogil:
    void explicit_bzero(void* data, size_t size)


cdef enum:
    HEADER = 5
    TAG = 16
    NONCE = 12
    RECORD_MOST = RECORD + 256          # of a record behind its header
    SMALL = 1024                        # so much is copied, to be sealed in one call

    CONTENT_ALERT = 21                  # RFC 8446, appendix B.1
    CONTENT_HANDSHAKE = 22
    CONTENT_DATA = 23
    KEY_UPDATE = 24                     # B.3
    WARNING = 1                         # B.2
    FATAL = 2
    NONE = -1
    CLOSE_NOTIFY = 0
    UNEXPECTED_MESSAGE = 10
    BAD_RECORD_MAC = 20
    RECORD_OVERFLOW = 22
    ILLEGAL_PARAMETER = 47
    DECODE_ERROR = 50
    INTERNAL_ERROR = 80
    USER_CANCELED = 90

    MAX_QUIET = 32                      # records without bytes in one read: they only make work
    # Section 5.5: AES-GCM is safe for 2^24.5 full records of one key.
    RENEW_AFTER = 1 << 23

    EVP_CTRL_AEAD_GET_TAG = 0x10        # openssl/evp.h
    EVP_CTRL_AEAD_SET_TAG = 0x11
    OSSL_PARAM_UTF8_STRING = 4          # openssl/core.h


cdef struct Parameter:                  # OSSL_PARAM
    const char* key
    unsigned int data_type
    void* data
    size_t data_size
    size_t return_size


cdef struct Suite:
    const char* name
    const char* cipher_name
    const char* digest_name
    size_t key_size
    size_t secret_size
    void* cipher


ctypedef void* (*FetchCipher)(void*, const char*, const char*) noexcept nogil
ctypedef void* (*New)() noexcept nogil
ctypedef void* (*NewOf)(void*) noexcept nogil
ctypedef void (*Free)(void*) noexcept nogil
ctypedef int (*Init)(
    void*, const void*, void*, const unsigned char*, const unsigned char*, int) noexcept nogil
ctypedef int (*Update)(void*, unsigned char*, int*, const unsigned char*, int) noexcept nogil
ctypedef int (*Final)(void*, unsigned char*, int*) noexcept nogil
ctypedef int (*Control)(void*, int, int, void*) noexcept nogil
ctypedef int (*HashSet)(void*, const Parameter*) noexcept nogil
ctypedef int (*HashInit)(void*, const unsigned char*, size_t, const Parameter*) noexcept nogil
ctypedef int (*HashUpdate)(void*, const unsigned char*, size_t) noexcept nogil
ctypedef int (*HashFinal)(void*, unsigned char*, size_t*, size_t) noexcept nogil

cdef FetchCipher EVP_CIPHER_fetch
cdef New EVP_CIPHER_CTX_new
cdef Free EVP_CIPHER_CTX_free
cdef Init EVP_CipherInit_ex
cdef Update EVP_CipherUpdate
cdef Final EVP_CipherFinal_ex
cdef Control EVP_CIPHER_CTX_ctrl
cdef FetchCipher EVP_MAC_fetch
cdef NewOf EVP_MAC_CTX_new
cdef Free EVP_MAC_CTX_free
cdef HashSet EVP_MAC_CTX_set_params
cdef HashInit EVP_MAC_init
cdef HashUpdate EVP_MAC_update
cdef HashFinal EVP_MAC_final

NAMES = (
    "EVP_CIPHER_fetch", "EVP_CIPHER_CTX_new", "EVP_CIPHER_CTX_free", "EVP_CipherInit_ex", "EVP_CipherUpdate",
    "EVP_CipherFinal_ex", "EVP_CIPHER_CTX_ctrl", "EVP_MAC_fetch", "EVP_MAC_CTX_new", "EVP_MAC_CTX_free",
    "EVP_MAC_CTX_set_params", "EVP_MAC_init", "EVP_MAC_update", "EVP_MAC_final",
)

cdef void* hmac = NULL
cdef Suite[SUITES] suites
suites[0] = Suite(b"TLS_AES_128_GCM_SHA256", b"AES-128-GCM", b"SHA256", 16, 32, NULL)
suites[1] = Suite(b"TLS_AES_256_GCM_SHA384", b"AES-256-GCM", b"SHA384", 32, 48, NULL)
suites[2] = Suite(b"TLS_CHACHA20_POLY1305_SHA256", b"ChaCha20-Poly1305", b"SHA256", 32, 32, NULL)


def load(dict addresses not None):
    """Where libcrypto's functions are: an address for each of ``NAMES``. Raises KeyError, ValueError.

    A cipher that this libcrypto does not have is not done here.
    """
    global EVP_CIPHER_fetch, EVP_CIPHER_CTX_new, EVP_CIPHER_CTX_free, EVP_CipherInit_ex, EVP_CipherUpdate
    global EVP_CipherFinal_ex, EVP_CIPHER_CTX_ctrl, EVP_MAC_fetch, EVP_MAC_CTX_new, EVP_MAC_CTX_free
    global EVP_MAC_CTX_set_params, EVP_MAC_init, EVP_MAC_update, EVP_MAC_final, hmac
    cdef int i
    EVP_CIPHER_fetch = <FetchCipher> <uintptr_t> addresses["EVP_CIPHER_fetch"]
    EVP_CIPHER_CTX_new = <New> <uintptr_t> addresses["EVP_CIPHER_CTX_new"]
    EVP_CIPHER_CTX_free = <Free> <uintptr_t> addresses["EVP_CIPHER_CTX_free"]
    EVP_CipherInit_ex = <Init> <uintptr_t> addresses["EVP_CipherInit_ex"]
    EVP_CipherUpdate = <Update> <uintptr_t> addresses["EVP_CipherUpdate"]
    EVP_CipherFinal_ex = <Final> <uintptr_t> addresses["EVP_CipherFinal_ex"]
    EVP_CIPHER_CTX_ctrl = <Control> <uintptr_t> addresses["EVP_CIPHER_CTX_ctrl"]
    EVP_MAC_fetch = <FetchCipher> <uintptr_t> addresses["EVP_MAC_fetch"]
    EVP_MAC_CTX_new = <NewOf> <uintptr_t> addresses["EVP_MAC_CTX_new"]
    EVP_MAC_CTX_free = <Free> <uintptr_t> addresses["EVP_MAC_CTX_free"]
    EVP_MAC_CTX_set_params = <HashSet> <uintptr_t> addresses["EVP_MAC_CTX_set_params"]
    EVP_MAC_init = <HashInit> <uintptr_t> addresses["EVP_MAC_init"]
    EVP_MAC_update = <HashUpdate> <uintptr_t> addresses["EVP_MAC_update"]
    EVP_MAC_final = <HashFinal> <uintptr_t> addresses["EVP_MAC_final"]
    if hmac != NULL:
        return
    for i in range(SUITES):
        suites[i].cipher = EVP_CIPHER_fetch(NULL, suites[i].cipher_name, NULL)
    hmac = EVP_MAC_fetch(NULL, b"HMAC", NULL)
    if hmac == NULL:
        raise ValueError("libcrypto has no HMAC")


def suite_names():
    """Those that are done here."""
    return tuple(suite.name for suite in suites if suite.cipher != NULL)


# -- a thread's contexts -------------------------------------------------------------------------------


cdef Crypto* crypto_new() noexcept nogil:
    cdef Crypto* crypto
    cdef Parameter[2] parameters
    cdef int i
    if hmac == NULL:
        return NULL
    crypto = <Crypto*> calloc(1, sizeof(Crypto))
    if crypto == NULL:
        return NULL
    parameters[1].key = NULL
    for i in range(SUITES):
        if suites[i].cipher == NULL:
            continue
        crypto.sealing[i] = EVP_CIPHER_CTX_new()
        crypto.opening[i] = EVP_CIPHER_CTX_new()
        crypto.hashing[i] = EVP_MAC_CTX_new(hmac)
        parameters[0] = Parameter(b"digest", OSSL_PARAM_UTF8_STRING, <void*> suites[i].digest_name,
                                  strlen(suites[i].digest_name), <size_t> -1)
        if (crypto.sealing[i] == NULL or crypto.opening[i] == NULL or crypto.hashing[i] == NULL
                or EVP_CipherInit_ex(crypto.sealing[i], suites[i].cipher, NULL, NULL, NULL, 1) != 1
                or EVP_CipherInit_ex(crypto.opening[i], suites[i].cipher, NULL, NULL, NULL, 0) != 1
                or EVP_MAC_CTX_set_params(crypto.hashing[i], parameters) != 1):
            crypto_free(crypto)
            return NULL
    return crypto


cdef void crypto_free(Crypto* crypto) noexcept nogil:
    cdef int i
    if crypto == NULL:
        return
    for i in range(SUITES):
        if crypto.sealing[i] != NULL:
            EVP_CIPHER_CTX_free(crypto.sealing[i])
        if crypto.opening[i] != NULL:
            EVP_CIPHER_CTX_free(crypto.opening[i])
        if crypto.hashing[i] != NULL:
            EVP_MAC_CTX_free(crypto.hashing[i])
    free(crypto)


# -- keys ----------------------------------------------------------------------------------------------


cdef bint expand(Crypto* crypto, int suite, const unsigned char* secret, const char* label,
                 unsigned char* out, size_t size) noexcept nogil:
    """HKDF-Expand-Label (RFC 8446, section 7.1) with an empty context, of no more bytes than a hash has."""
    cdef void* hashing = crypto.hashing[suite]
    cdef unsigned char[32] info
    cdef unsigned char[SECRET] block
    cdef size_t length = strlen(label), made = 0
    cdef bint is_made
    info[0] = 0
    info[1] = <unsigned char> size
    info[2] = <unsigned char> (6 + length)
    memcpy(info + 3, b"tls13 ", 6)
    memcpy(info + 9, label, length)
    info[9 + length] = 0                # the context
    info[10 + length] = 1               # HKDF's first block
    is_made = (EVP_MAC_init(hashing, secret, suites[suite].secret_size, NULL) == 1
               and EVP_MAC_update(hashing, info, 11 + length) == 1
               and EVP_MAC_final(hashing, block, &made, SECRET) == 1 and made >= size)
    if is_made:
        memcpy(out, block, size)
    explicit_bzero(block, SECRET)
    return is_made


cdef bint side_keys(Crypto* crypto, int suite, Side* side) noexcept nogil:
    """Keys from the secret; their first record is the next."""
    side.sequence = 0
    return (expand(crypto, suite, side.secret, b"key", side.key, suites[suite].key_size)
            and expand(crypto, suite, side.secret, b"iv", side.iv, NONCE))


cdef bint side_renew(Crypto* crypto, int suite, Side* side) noexcept nogil:
    """Section 7.2: the next secret, and its keys."""
    cdef unsigned char[SECRET] secret
    if not expand(crypto, suite, side.secret, b"traffic upd", secret, suites[suite].secret_size):
        return False
    memcpy(side.secret, secret, suites[suite].secret_size)
    explicit_bzero(secret, SECRET)
    return side_keys(crypto, suite, side)


cdef inline void side_nonce(const Side* side, uint64_t number, unsigned char* nonce) noexcept nogil:
    cdef int i
    memcpy(nonce, side.iv, NONCE)
    for i in range(8):
        nonce[NONCE - 1 - i] ^= <unsigned char> (number >> (8 * i))


cdef ssize_t seal(Crypto* crypto, int suite, Side* side, uint8_t content, const unsigned char* data,
                  size_t size, unsigned char* out) noexcept nogil:
    """One record into a buffer that has room for it: its size; -1: libcrypto refused."""
    cdef void* context = crypto.sealing[suite]
    cdef unsigned char[NONCE] nonce
    cdef unsigned char* at = out + HEADER
    cdef size_t length = size + 1 + TAG
    cdef int part = 0
    out[0] = CONTENT_DATA
    out[1] = 3
    out[2] = 3
    out[3] = <unsigned char> (length >> 8)
    out[4] = <unsigned char> length
    side_nonce(side, side.sequence, nonce)
    side.sequence += 1
    if (EVP_CipherInit_ex(context, NULL, NULL, side.key, nonce, 1) != 1
            or EVP_CipherUpdate(context, NULL, &part, out, HEADER) != 1):
        return -1
    if size <= SMALL:
        memcpy(at, data, size)
        at[size] = content
        if EVP_CipherUpdate(context, at, &part, at, <int> size + 1) != 1:
            return -1
    elif (EVP_CipherUpdate(context, at, &part, data, <int> size) != 1
            or EVP_CipherUpdate(context, at + size, &part, &content, 1) != 1):
        return -1
    if (EVP_CipherFinal_ex(context, at + size + 1, &part) != 1
            or EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_GET_TAG, TAG, at + size + 1) != 1):
        return -1
    return HEADER + <ssize_t> length


cdef bint unseal(void* context, const Side* side, uint64_t number, const unsigned char* record, size_t size,
                 unsigned char* out) noexcept nogil:
    """Plain bytes, content type and padding of a whole record of ``size``; False: it is not genuine."""
    cdef unsigned char[NONCE] nonce
    cdef int part = 0
    side_nonce(side, number, nonce)
    return (EVP_CipherInit_ex(context, NULL, NULL, side.key, nonce, 0) == 1
            and EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_SET_TAG, TAG, <void*> (record + size - TAG)) == 1
            and EVP_CipherUpdate(context, NULL, &part, record, HEADER) == 1
            and EVP_CipherUpdate(context, out, &part, record + HEADER, <int> size - HEADER - TAG) == 1
            and EVP_CipherFinal_ex(context, out + part, &part) == 1)


# -- a session -----------------------------------------------------------------------------------------


cdef int records_suite(const char* name) noexcept nogil:
    cdef int i
    for i in range(SUITES):
        if strcmp(name, suites[i].name) == 0 and suites[i].cipher != NULL:
            return i
    return -1


cdef size_t records_secret_size(int suite) noexcept nogil:
    return suites[suite].secret_size


cdef Records* records_new(Crypto* crypto, int suite, const unsigned char* reading,
                          const unsigned char* writing) noexcept nogil:
    cdef Records* r = <Records*> calloc(1, sizeof(Records))
    if r == NULL:
        return NULL
    r.suite = <uint8_t> suite
    r.owes_alert = NONE
    memcpy(r.reading.secret, reading, suites[suite].secret_size)
    memcpy(r.writing.secret, writing, suites[suite].secret_size)
    if not (side_keys(crypto, suite, &r.reading) and side_keys(crypto, suite, &r.writing)):
        records_free(r)
        return NULL
    return r


cdef void records_free(Records* r) noexcept nogil:
    free(r.held)
    free(r.rest)
    explicit_bzero(r, sizeof(Records))
    free(r)


cdef void records_put(Records* r, unsigned char* data, size_t size) noexcept nogil:
    r.more = data
    r.more_size = size


cdef bint records_keep(Records* r) noexcept nogil:
    cdef bint is_kept = True
    if r.more_size and not (r.is_broken or r.is_ended):
        is_kept = hold(r, r.held_size + r.more_size, r.more_size)
        if not is_kept:
            fail(r, INTERNAL_ERROR)     # what follows has no beginning
    r.more = NULL
    r.more_size = 0
    r.quiet = 0
    return is_kept


cdef bint hold(Records* r, size_t room, size_t size) noexcept nogil:
    """Move the first bytes of ``more`` behind what is held, which gets so much room."""
    cdef unsigned char* held
    if r.held_start:
        memmove(r.held, r.held + r.held_start, r.held_size)
        r.held_start = 0
    held = <unsigned char*> realloc(r.held, room)
    if held == NULL:
        return False
    r.held = held
    memcpy(held + r.held_size, r.more, size)
    r.held_size += <uint32_t> size
    r.more += size
    r.more_size -= size
    return True


cdef ssize_t fail(Records* r, int alert) noexcept nogil:
    r.is_broken = True
    r.owes_alert = NONE if r.is_closed else alert
    r.more_size = 0
    return TLS_BROKEN


cdef inline size_t size_of(const unsigned char* record) noexcept nogil:
    return HEADER + (<size_t> record[3] << 8 | record[4])


cdef ssize_t next_record(Records* r, unsigned char** record) noexcept nogil:
    """The size of the next whole record, where it begins, or a TlsResult."""
    cdef unsigned char* at
    cdef size_t there, size = HEADER, turn
    for turn in range(2):               # its header first, then the rest of it
        at = r.held + r.held_start if r.held_size else r.more
        there = r.held_size if r.held_size else r.more_size
        if there < size:
            if r.more_size == 0:
                return TLS_NOTHING
            if r.held_size + r.more_size < size:
                # it is not whole: from now on it has the room that it needs
                return TLS_NOTHING if hold(r, size, r.more_size) else fail(r, INTERNAL_ERROR)
            if not hold(r, size, size - r.held_size):
                return fail(r, INTERNAL_ERROR)
            at = r.held                 # hold() has moved it there
        if turn == 0:
            if at[0] != CONTENT_DATA:
                return fail(r, UNEXPECTED_MESSAGE)
            size = size_of(at)
            if size > HEADER + RECORD_MOST:
                return fail(r, RECORD_OVERFLOW)
            if size <= HEADER + TAG:
                return fail(r, DECODE_ERROR)
    record[0] = at
    return <ssize_t> size


cdef void consume(Records* r, size_t size) noexcept nogil:
    if r.held_size == 0:
        r.more += size
        r.more_size -= size
    elif r.held_size > size:
        r.held_start += <uint32_t> size
        r.held_size -= <uint32_t> size
    else:
        free(r.held)
        r.held = NULL
        r.held_start = 0
        r.held_size = 0


cdef ssize_t records_read(Records* r, Crypto* crypto, unsigned char* buffer, size_t size) noexcept nogil:
    cdef unsigned char* record = NULL
    cdef unsigned char* plain
    cdef ssize_t whole, result
    cdef size_t length, inner
    while True:
        if r.rest != NULL:
            return take_rest(r, buffer, size)
        if r.is_broken:
            return TLS_BROKEN
        if r.is_ended:
            r.more_size = 0
            return TLS_CLOSED
        whole = next_record(r, &record)
        if whole < 0:
            return whole
        inner = whole - HEADER - TAG
        plain = buffer if inner <= size else record + HEADER
        if not unseal(crypto.opening[r.suite], &r.reading, r.reading.sequence, record, whole, plain):
            return fail(r, BAD_RECORD_MAC)
        r.reading.sequence += 1
        length = inner
        while length and plain[length - 1] == 0:
            length -= 1
        if length == 0:
            return fail(r, UNEXPECTED_MESSAGE)      # no content type
        length -= 1
        if length > RECORD:
            return fail(r, RECORD_OVERFLOW)
        result = take_content(r, crypto, plain[length], plain, length)
        if result > 0 and inner > size:
            result = keep_rest(r, buffer, size, plain, length)
        if result != TLS_BROKEN:
            consume(r, whole)
        if result != TLS_NOTHING:
            return result


cdef ssize_t take_rest(Records* r, unsigned char* buffer, size_t size) noexcept nogil:
    cdef size_t there = r.rest_end - r.rest_start
    if size > there:
        size = there
    memcpy(buffer, r.rest + r.rest_start, size)
    r.rest_start += <uint32_t> size
    if r.rest_start == r.rest_end:
        free(r.rest)
        r.rest = NULL
    return <ssize_t> size


cdef ssize_t keep_rest(Records* r, unsigned char* buffer, size_t size, const unsigned char* plain,
                       size_t length) noexcept nogil:
    """For a record that may not fit: what fits now, and the rest for later."""
    if length <= size:
        memcpy(buffer, plain, length)
        return <ssize_t> length
    r.rest = <unsigned char*> malloc(length - size)
    if r.rest == NULL:
        return fail(r, INTERNAL_ERROR)
    memcpy(buffer, plain, size)
    memcpy(r.rest, plain + size, length - size)
    r.rest_start = 0
    r.rest_end = <uint32_t> (length - size)
    return <ssize_t> size


cdef ssize_t take_content(Records* r, Crypto* crypto, uint8_t content, const unsigned char* data,
                          size_t size) noexcept nogil:
    """What a genuine record brings: bytes, TLS_NOTHING to go on, or how it ends."""
    if content != CONTENT_HANDSHAKE and r.message_size:
        return fail(r, UNEXPECTED_MESSAGE)          # section 5.1: nothing between the parts of a message
    if content == CONTENT_DATA and size:
        return <ssize_t> size
    r.quiet += 1
    if r.quiet > MAX_QUIET:
        return fail(r, UNEXPECTED_MESSAGE)
    if content == CONTENT_DATA:
        return TLS_NOTHING
    if content == CONTENT_HANDSHAKE and size:
        return take_handshake(r, crypto, data, size)
    if content != CONTENT_ALERT or size == 0:
        return fail(r, UNEXPECTED_MESSAGE)
    if size != 2:
        return fail(r, DECODE_ERROR)
    if data[1] == USER_CANCELED:
        return TLS_NOTHING                          # a close_notify follows
    if data[1] == CLOSE_NOTIFY:
        r.is_ended = True
        return TLS_CLOSED
    return fail(r, NONE)                            # section 6.2: every other one is fatal


cdef ssize_t take_handshake(Records* r, Crypto* crypto, const unsigned char* data,
                            size_t size) noexcept nogil:
    """Sections 4.6 and 5.1: what a client may send is KeyUpdate, with nothing behind it in its record."""
    if r.message_size + size > sizeof(r.message):
        return fail(r, UNEXPECTED_MESSAGE)
    memcpy(r.message + r.message_size, data, size)
    r.message_size += <uint8_t> size
    if r.message[0] != KEY_UPDATE:
        return fail(r, UNEXPECTED_MESSAGE)
    if r.message_size < sizeof(r.message):
        return TLS_NOTHING
    r.message_size = 0
    if r.message[1] or r.message[2] or r.message[3] != 1:
        return fail(r, DECODE_ERROR)
    if r.message[4] > 1:
        return fail(r, ILLEGAL_PARAMETER)
    if r.message[4]:
        r.owes_update = True
    if not side_renew(crypto, r.suite, &r.reading):
        return fail(r, INTERNAL_ERROR)
    return TLS_NOTHING


cdef ssize_t renew(Records* r, Crypto* crypto, unsigned char* out) noexcept nogil:
    """A KeyUpdate where one is owed or the key has worked long enough: its size; -1: libcrypto refused."""
    cdef const unsigned char* message = b"\x18\x00\x00\x01\x00"
    cdef ssize_t made
    if r.is_closed or not r.owes_update and r.writing.sequence < RENEW_AFTER:
        return 0
    r.owes_update = False
    made = seal(crypto, r.suite, &r.writing, CONTENT_HANDSHAKE, message, 5, out)
    return made if side_renew(crypto, r.suite, &r.writing) else -1


cdef ssize_t records_write(Records* r, Crypto* crypto, const unsigned char* data, size_t size,
                           unsigned char* out) noexcept nogil:
    cdef ssize_t before, made = -1
    if r.is_broken or r.is_closed:
        return -1
    before = renew(r, crypto, out)
    if before >= 0:
        made = seal(crypto, r.suite, &r.writing, CONTENT_DATA, data, size, out + before)
    if made < 0:
        fail(r, NONE)
        return -1
    return before + made


cdef size_t records_take(Records* r, Crypto* crypto, unsigned char* out) noexcept nogil:
    cdef unsigned char[2] alert
    cdef ssize_t before = 0, made = 0
    if not r.is_broken:
        before = renew(r, crypto, out)
    if before >= 0 and r.owes_alert != NONE:
        alert[0] = WARNING if r.owes_alert == CLOSE_NOTIFY else FATAL
        alert[1] = <unsigned char> r.owes_alert
        r.owes_alert = NONE
        r.is_closed = True
        made = seal(crypto, r.suite, &r.writing, CONTENT_ALERT, alert, 2, out + before)
    if before < 0 or made < 0:
        fail(r, NONE)
        return 0
    return <size_t> (before + made)


cdef void records_close(Records* r) noexcept nogil:
    if not (r.is_broken or r.is_closed):
        r.owes_alert = CLOSE_NOTIFY


cdef bint records_sent(Records* r, Crypto* crypto, const unsigned char* data, size_t size,
                       unsigned char* scratch) noexcept nogil:
    cdef uint64_t count = 0
    cdef size_t at = 0, whole = 0
    while at < size:
        if size - at < HEADER:
            return False
        whole = size_of(data + at)
        if whole <= HEADER + TAG or whole > size - at:
            return False
        at += whole
        count += 1
    if count and not unseal(crypto.opening[r.suite], &r.writing, count - 1, data + size - whole, whole,
                            scratch):
        return False
    r.writing.sequence = count
    return True
