"""The server's side of SCRAM-SHA-256 as PostgreSQL speaks it, compiled: most logins go through it.

RFC 5802, RFC 7677; keys, verifiers and the client's side are ``scram.py``. What a client sends is read and
compared in C, and comparisons with secrets take the same time whatever differs.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.string cimport memchr, memcpy

from gpooler.auth.randomness cimport random_bytes
from gpooler.auth.sha256 cimport Sha256, hmac_begin, hmac_of, sha256_add, sha256_begin, sha256_end

from gpooler.auth.scram import (
    END_POINT, KEY_LENGTH, MAX_MESSAGE_LENGTH, MECHANISM, MECHANISM_PLUS, NONCE_BYTES, ScramKeys,
)
from gpooler.errors import FeatureNotSupported, InvalidAuthorization, ProtocolViolation
from gpooler.wire import codes, messages


cdef enum:
    SASL_HEAD = 9           # type, length and kind of an Authentication message
    PROOF = 44              # characters of a proof in Base64
    NO_DIGIT = 64

cdef bytes PLUS_FLAG = b"p=" + END_POINT
cdef bytes CHALLENGE = messages.authentication_sasl([MECHANISM])
cdef bytes CHALLENGE_PLUS = messages.authentication_sasl([MECHANISM_PLUS, MECHANISM])
cdef int CONTINUE = codes.AUTHENTICATION_SASL_CONTINUE
cdef int FINAL = codes.AUTHENTICATION_SASL_FINAL
cdef int MOST = MAX_MESSAGE_LENGTH
cdef char* DIGITS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


cdef class Prepared:
    """A verifier, with what is the same in every exchange worked out."""

    def __cinit__(self, verifier):
        cdef bytes stored_key = verifier.stored_key
        cdef bytes server_key = verifier.server_key
        if len(stored_key) != SHA256_LENGTH or len(server_key) != SHA256_LENGTH:
            raise ValueError(f"keys of {KEY_LENGTH} bytes are wanted")
        self.verifier = verifier
        memcpy(self.stored_key, PyBytes_AS_STRING(stored_key), SHA256_LENGTH)
        hmac_begin(&self.of_stored_key, self.stored_key, SHA256_LENGTH)
        hmac_begin(&self.of_server_key, <unsigned char*> PyBytes_AS_STRING(server_key), SHA256_LENGTH)
        self.salt_part = b",s=%b,i=%d" % (base64(verifier.salt), verifier.iterations)


def prepare(verifiers):
    """These verifiers as ``ScramServer`` takes them."""
    return tuple([Prepared(verifier) for verifier in verifiers])


cdef class ScramServer:
    """One exchange: ``first`` then ``final``.

    A *doomed* exchange goes through the same motions and ends like a wrong password.
    """

    def __cinit__(self, tuple verifiers not None, *, bint is_doomed=False, bytes nonce=None,
                  bytes binding=None, bint offers_plus=False):
        """``verifiers``: at least one, all of one salt and iteration count, each as good.

        ``nonce`` is the server's part, printable; random when not given. ``binding`` is what binds the
        exchange to the TLS session, where the client chose ``MECHANISM_PLUS``; ``offers_plus``: it might.
        """
        self.verifiers = verifiers
        self.is_doomed = is_doomed
        self.binding = binding
        self.offers_plus = offers_plus
        self.nonce = base64(random_bytes(NONCE_BYTES)) if nonce is None else nonce

    @property
    def keys(self):
        """Known after success: they log in as the user."""
        return None if self.right is None else ScramKeys(self.client_key, self.right.verifier.server_key)

    cpdef bytes first(self, bytes message):
        """Answers the client-first-message. Raises ``ProtocolViolation`` or ``FeatureNotSupported``."""
        cdef bytes flag, separator, rest, bare, nonce, answer
        flag, separator, rest = message.partition(b",")
        if self.binding is not None:
            if flag[:1] != b"p":
                raise malformed("The client selected SCRAM-SHA-256-PLUS, "
                                "but the SCRAM message does not include channel binding data.")
            if flag != PLUS_FLAG or not separator:
                raise ProtocolViolation("unsupported SCRAM channel-binding type")
        elif flag[:1] == b"p":
            raise malformed("The client selected SCRAM-SHA-256 without channel binding, "
                            "but the SCRAM message includes channel binding data.")
        elif (flag != b"n" and flag != b"y") or not separator:
            raise malformed("Unexpected channel-binding flag.")
        elif flag == b"y" and self.offers_plus:
            # it could, and believes that we cannot: somebody between us took the offer away
            raise InvalidAuthorization("SCRAM channel binding negotiation error")
        if rest[:1] == b"a":
            raise FeatureNotSupported("client uses authorization identity, but it is not supported")
        if rest[:1] != b",":
            raise malformed("Unexpected attribute in client-first-message.")
        bare = rest[1:]
        if bare[:1] == b"m":
            raise FeatureNotSupported("client requires an unsupported SCRAM extension")
        _, nonce = two_attributes(bare, c"n", c"r", "client-first-message")
        if not nonce or not is_printable(nonce):
            raise ProtocolViolation("non-printable characters in SCRAM nonce")

        self.bound = base64(flag + b",," if self.binding is None else flag + b",," + self.binding)
        self.nonce = nonce + self.nonce
        answer = b"r=" + self.nonce + (<Prepared> self.verifiers[0]).salt_part
        self.auth_prefix = bare + b"," + answer + b","
        return answer

    cpdef bytes final(self, bytes message):
        """Answers the client-final-message; None when the proof is wrong. Raises ``ProtocolViolation``."""
        cdef Py_ssize_t end = message.rfind(b",p=")
        cdef bytes without_proof = message[:max(end, 0)]
        cdef bytes bound, nonce, auth_message
        cdef unsigned char proof[SHA256_LENGTH]
        cdef unsigned char key[SHA256_LENGTH]
        cdef unsigned char digest[SHA256_LENGTH]
        cdef const unsigned char* signed
        cdef Prepared verifier
        cdef Sha256 hashing
        cdef int i
        bound, nonce = two_attributes(without_proof, c"c", c"r", "client-final-message")
        if not (len(bound) == len(self.bound)
                and is_equal(PyBytes_AS_STRING(bound), PyBytes_AS_STRING(self.bound), len(bound))):
            if self.binding is not None:
                raise InvalidAuthorization("SCRAM channel binding check failed")
            raise ProtocolViolation("unexpected SCRAM channel-binding attribute in client-final-message")
        if nonce != self.nonce:
            raise ProtocolViolation("invalid SCRAM response", detail="Nonce does not match.")
        if len(message) - end - 3 != PROOF or not read_proof(PyBytes_AS_STRING(message) + end + 3, proof):
            raise malformed("Malformed proof in client-final-message.")

        auth_message = self.auth_prefix + without_proof
        signed = <const unsigned char*> PyBytes_AS_STRING(auth_message)
        for verifier in self.verifiers:     # each time all of them
            hmac_of(&verifier.of_stored_key, signed, len(auth_message), key)
            for i in range(SHA256_LENGTH):
                key[i] ^= proof[i]
            sha256_begin(&hashing)
            sha256_add(&hashing, key, SHA256_LENGTH)
            sha256_end(&hashing, digest)
            if is_equal(<char*> digest, <char*> verifier.stored_key, SHA256_LENGTH) and not self.is_doomed:
                self.client_key = key[:SHA256_LENGTH]
                self.right = verifier
        if self.right is None:
            return None
        hmac_of(&self.right.of_server_key, signed, len(auth_message), digest)
        return b"v=" + base64(digest[:SHA256_LENGTH])


cdef class SaslServer:
    """SCRAM in the messages of the protocol, section "SASL Authentication"."""

    def __cinit__(self, tuple verifiers not None, bytes binding, bint is_doomed):
        """``verifiers`` as ``ScramServer``; ``binding``: of the TLS session, None without."""
        self.verifiers = verifiers
        self.binding = binding
        self.is_doomed = is_doomed

    @property
    def keys(self):
        """As ``ScramServer``."""
        return None if self.server is None else self.server.keys

    cpdef bytes challenge(self):
        """AuthenticationSASL."""
        return CHALLENGE if self.binding is None else CHALLENGE_PLUS

    cpdef bytes answer(self, bytes body):
        """What to send after a password message (its body), None when its proof is wrong.

        With what ends the exchange ``is_over`` is true. Raises ProtocolViolation and others of ScramServer.
        """
        cdef bytes mechanism, said
        cdef bint is_plus
        if len(body) > MOST:
            raise ProtocolViolation("invalid message length", cause=f"SASL message of {len(body)} bytes")
        if self.server is None:
            mechanism, body = initial_response(body)
            is_plus = mechanism == MECHANISM_PLUS
            if mechanism != MECHANISM and not (is_plus and self.binding is not None):
                raise ProtocolViolation("client selected an invalid SASL authentication mechanism")
            self.server = ScramServer(
                self.verifiers, is_doomed=self.is_doomed,
                binding=self.binding if is_plus else None, offers_plus=self.binding is not None)
            if body is None:    # a client may wait for an empty challenge (RFC 4422, section 3)
                return authentication(CONTINUE, b"")
        if not self.has_sent_salt:
            self.has_sent_salt = True
            return authentication(CONTINUE, self.server.first(body))
        said = self.server.final(body)
        if said is None:
            return None
        self.is_over = True
        return authentication(FINAL, said)


cdef bytes authentication(int kind, bytes data):
    """An Authentication message."""
    cdef Py_ssize_t size = len(data)
    cdef bytes result = PyBytes_FromStringAndSize(NULL, SASL_HEAD + size)
    cdef char* at = PyBytes_AS_STRING(result)
    at[0] = c"R"
    write_int(at + 1, SASL_HEAD - 1 + size)
    write_int(at + 5, kind)
    memcpy(at + SASL_HEAD, PyBytes_AS_STRING(data), size)
    return result


cdef inline void write_int(char* at, Py_ssize_t number) noexcept:
    cdef int i
    for i in range(4):
        at[i] = <char> (number >> (24 - 8 * i))


cdef tuple initial_response(bytes body):
    """Mechanism and client-first-message of a SASLInitialResponse, None when there is none in it."""
    cdef Py_ssize_t end = body.find(b"\0"), rest = len(body) - end - 5     # behind the length word
    cdef const unsigned char* at = <const unsigned char*> PyBytes_AS_STRING(body) + end + 1
    cdef unsigned int length
    if end < 0 or rest < 0:
        raise ProtocolViolation("malformed SASLInitialResponse")
    length = (<unsigned int> at[0] << 24) | (at[1] << 16) | (at[2] << 8) | at[3]
    if length == 0xFFFFFFFF and rest == 0:
        return body[:end], None
    if length != rest:
        raise ProtocolViolation("malformed SASLInitialResponse")
    return body[:end], body[end + 5:]


cdef tuple two_attributes(bytes message, unsigned char first, unsigned char second, str where):
    """The values of the first two attributes, which must have these names.

    A message is ``a=value`` pairs; any letter may be a name, a value may be anything but a comma and NUL.
    """
    cdef const unsigned char* at = <const unsigned char*> PyBytes_AS_STRING(message)
    cdef const unsigned char* end = at + len(message)
    cdef const unsigned char* comma
    cdef unsigned char names[2]
    cdef list values = []
    while True:
        comma = <const unsigned char*> memchr(at, c",", end - at)
        if comma == NULL:
            comma = end
        if comma - at < 2 or not is_letter(at[0]) or at[1] != c"=" or memchr(at, 0, comma - at) != NULL:
            raise malformed(f"Attribute expected, but found an invalid character in {where}.")
        if len(values) < 2:
            names[len(values)] = at[0]
            values.append(at[2:comma - at])
        if comma == end:
            break
        at = comma + 1
    if len(values) < 2 or names[0] != first or names[1] != second:
        raise malformed(f"Attribute expected, but not found in {where}.")
    return tuple(values)


cdef inline bint is_letter(unsigned char char) noexcept:
    return c"a" <= (char | 0x20) <= c"z"


cdef bint is_printable(bytes nonce) noexcept:
    cdef unsigned char char
    for char in nonce:          # a comma cannot be in it: it ends the attribute
        if not 0x21 <= char <= 0x7E:
            return False
    return True


cdef bint is_equal(const char* one, const char* other, Py_ssize_t size) noexcept:
    """In the same time wherever they differ."""
    cdef unsigned char difference = 0
    cdef Py_ssize_t i
    for i in range(size):
        difference |= one[i] ^ other[i]
    return difference == 0


cdef bytes base64(bytes data):
    """RFC 4648, section 4."""
    cdef Py_ssize_t size = len(data), whole = size - size % 3, i
    cdef const unsigned char* at = <const unsigned char*> PyBytes_AS_STRING(data)
    cdef bytes result = PyBytes_FromStringAndSize(NULL, (size + 2) // 3 * 4)
    cdef char* out = PyBytes_AS_STRING(result)
    cdef unsigned int three
    for i in range(0, whole, 3):
        three = (at[i] << 16) | (at[i + 1] << 8) | at[i + 2]
        out[0] = DIGITS[three >> 18]
        out[1] = DIGITS[three >> 12 & 63]
        out[2] = DIGITS[three >> 6 & 63]
        out[3] = DIGITS[three & 63]
        out += 4
    if whole < size:
        three = at[whole] << 16
        if whole + 1 < size:
            three |= at[whole + 1] << 8
        out[0] = DIGITS[three >> 18]
        out[1] = DIGITS[three >> 12 & 63]
        out[2] = DIGITS[three >> 6 & 63] if whole + 1 < size else c"="
        out[3] = c"="
    return result


cdef inline unsigned int digit(unsigned char char) noexcept:
    if c"A" <= char <= c"Z":
        return char - c"A"
    if c"a" <= char <= c"z":
        return char - c"a" + 26
    if c"0" <= char <= c"9":
        return char - c"0" + 52
    return 62 if char == c"+" else 63 if char == c"/" else NO_DIGIT


cdef bint read_proof(const char* text, unsigned char* proof) noexcept:
    """PROOF characters of Base64, which are SHA256_LENGTH bytes; False for others."""
    cdef unsigned int bits = 0, value
    cdef int i, at = 0, there = 0
    for i in range(PROOF - 1):
        value = digit(<unsigned char> text[i])
        if value == NO_DIGIT:
            return False
        bits = (bits << 6) | value
        there += 6
        if there >= 8:
            there -= 8
            proof[at] = <unsigned char> (bits >> there)
            at += 1
    return text[PROOF - 1] == c"="


cdef object malformed(str detail):
    return ProtocolViolation("malformed SCRAM message", detail=detail)
