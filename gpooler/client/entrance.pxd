from libc.stdint cimport uint8_t, uint64_t

from gpooler.relay.tls cimport TlsSession


cdef class Guest:
    cdef readonly int fd                # -1 once it is closed or detached
    cdef readonly int family            # 0 Unix, 4, 6
    cdef readonly int port
    cdef readonly bytes address         # packed; empty for a Unix socket
    cdef readonly str host
    cdef readonly uint64_t number       # the client's id, 48 bits
    cdef readonly int timeout_ms
    cdef readonly bytes buffer          # bytes behind the last message
    cdef readonly TlsSession tls        # None: plain
    cdef readonly bint has_more         # bytes that came are still in `tls`
    cdef readonly int listener          # number of its listener in the configuration
    # The handlers' own:
    cdef public object plan             # what its startup packet leads to; None until it is found
    cdef public object conversation     # auth.exchange.Exchange
    cdef public bint is_counted         # against client_max
    cdef public int requests            # encryption requests seen, as bits
    cdef public object handshake        # relay.tls.TlsHandshake, while it runs
    cdef public bytes salt              # sent with an MD5 challenge
    cdef object known                   # express.Known
    cdef object context                 # LogContext, once it is needed
    cdef uint8_t expects
    cdef bint is_timed                  # stands in the entrance's deadlines
    cdef bint is_armed
    cdef uint64_t deadline_us
    cdef Entrance entrance

    cpdef int send(self, bytes data) except -1
    cpdef uint64_t age_us(self) noexcept
    cpdef void expect_startup(self) noexcept
    cpdef void expect_password(self) noexcept
    cpdef void expect_handshake(self) noexcept
    cdef int send_raw(self, bytes data) except -1
    cdef int pull(self) except -1
    cpdef int detach(self) except -2


cdef class Entrance:
    cdef readonly int fd                # watch it for reading, then call ``poll``
    cdef dict guests                    # by descriptor
    cdef dict deadlines                 # deques of guests by timeout, each in order of time
    cdef dict hosts                     # names of addresses
    cdef object handler

    cdef str host_of(self, int family, bytes address)
    cdef void forget(self, Guest guest)
    cdef int arm(self, Guest guest) except -1
    cpdef int look(self, Guest guest) except -1
    cpdef int read(self, Guest guest) except -1
    cdef int feed(self, Guest guest) except -1
    cdef int hand_over(self, Guest guest) except -1
