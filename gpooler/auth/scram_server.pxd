from gpooler.auth.sha256 cimport Hmac, SHA256_LENGTH


cdef class Prepared:
    cdef readonly object verifier       # auth.scram.Verifier
    cdef unsigned char stored_key[SHA256_LENGTH]
    cdef Hmac of_stored_key
    cdef Hmac of_server_key
    cdef bytes salt_part                # of the server-first-message: salt and iteration count


cdef class ScramServer:
    cdef tuple verifiers                # Prepared
    cdef bint is_doomed
    cdef bytes binding                  # of the TLS session; None: not bound to it
    cdef bint offers_plus
    cdef bytes nonce                    # the server's part, then both parts
    cdef bytes bound                    # what the client is to repeat: GS2 header and channel binding, Base64
    cdef bytes auth_prefix              # of AuthMessage: all but the client-final-message
    cdef bytes client_key               # None before success
    cdef Prepared right                 # the verifier of that

    cpdef bytes first(self, bytes message)
    cpdef bytes final(self, bytes message)


cdef class SaslServer:
    cdef tuple verifiers                # Prepared
    cdef bytes binding
    cdef bint is_doomed
    cdef ScramServer server             # from the moment the client has chosen its mechanism
    cdef bint has_sent_salt
    cdef readonly bint is_over          # the client has proved who it is

    cpdef bytes challenge(self)
    cpdef bytes answer(self, bytes body)
