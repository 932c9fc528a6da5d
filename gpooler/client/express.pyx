"""The short way in, for a client that begins as another did before whose login went well.

Most logins of an application are alike to the byte. Where nothing but the password is left to look at, they
are answered here, compiled; every other login, and all that fails, is the handler's (``login.py``), which
also says who may come this way (``remember``).
"""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t

from gpooler.client.entrance cimport Guest
from gpooler.relay cimport counters as words
from gpooler.relay.params cimport ParameterSet

from gpooler.auth.md5 import SALT_LENGTH, is_response_right
from gpooler.auth.randomness import random_bytes
from gpooler.client.entrance import ClientGone
from gpooler.faults import fault_point
from gpooler.net.tcp import set_options
from gpooler.wire import messages


cdef extern from "<arpa/inet.h>" nogil:
    uint32_t htonl(uint32_t number)


cdef enum:
    MAX_KNOWN = 512  # beyond it all are forgotten, and remembered again as they come
    BODY = 36        # of a password message with an MD5 answer: 35 characters and a zero
    KEY_DATA_HEAD = 5

cdef bytes CHALLENGE = messages.authentication_md5_password(bytes(SALT_LENGTH))[:-SALT_LENGTH]
cdef bytes READY = messages.ready_for_query()


cdef class Known:
    """A login that went well, for those that begin with the same packet."""

    cdef object plan
    cdef object route
    cdef uint64_t version           # of the route's parameters
    cdef bytes stored               # "md5…"; None: everybody is believed
    cdef bytes address              # rules look at addresses: only from there; None: from everywhere
    cdef bint is_unix
    cdef bint has_tls
    cdef uint32_t route_id
    cdef uint32_t names
    cdef int secret_length
    cdef ParameterSet parameters
    cdef bytes greeting             # AuthenticationOk, ParameterStatus, BackendKeyData up to its process id
    cdef object socket_changes


cdef class Express:
    """A handler of ``entrance.Entrance`` before the one that handles everything."""

    cdef object relay
    cdef object handler
    cdef object on_adopted
    cdef readonly object on_bad     # those of ``handler``
    cdef readonly object on_handshake
    cdef readonly object on_direct_tls
    cdef readonly object on_gone
    cdef dict known                 # by startup packet
    cdef set demanding              # numbers of listeners that take nobody without TLS
    cdef uint64_t* process_words
    cdef uint64_t* route_words

    def __cinit__(self, relay, uintptr_t counters_address, handler, on_adopted):
        """``handler`` is a ``login.Login``, ``on_adopted`` is told as by that."""
        self.relay = relay
        self.handler = handler
        self.on_adopted = on_adopted
        self.known = {}
        self.process_words = <uint64_t*> counters_address
        self.route_words = self.process_words + words.WORDS_PER_BLOCK
        self.demanding = handler.demanding
        self.on_bad = handler.on_bad
        self.on_handshake = handler.on_handshake
        self.on_direct_tls = handler.on_direct_tls
        self.on_gone = handler.on_gone

    def remember(self, Guest guest, plan, bytes stored, bint is_bound_to_address, socket_changes):
        """``guest`` has come in by ``plan``: let those like it take the short way.

        ``stored``: its "md5…", None for a rule that asks for no password.
        """
        cdef Known known = Known()
        known.plan = plan
        known.route = plan.route
        known.version = plan.version
        known.stored = stored
        known.address = guest.address if is_bound_to_address else None
        known.is_unix = guest.family == 0
        known.has_tls = guest.tls is not None
        known.route_id = plan.route.route_id
        known.names = plan.names
        known.secret_length = plan.packet.secret_length
        known.parameters = plan.greeting.parameters
        key_data = messages.backend_key_data(0, bytes(known.secret_length))
        known.greeting = messages.authentication_ok() + plan.greeting.statuses + key_data[:KEY_DATA_HEAD]
        known.socket_changes = socket_changes
        if len(self.known) >= MAX_KNOWN:
            self.known.clear()
        self.known[plan.data] = known

    def forget(self):
        """From now on everything has to be looked at."""
        self.known.clear()

    def on_startup(self, Guest guest, bytes packet):
        """As ``login.Login``."""
        cdef Known known = self.known.get(packet)
        if (known is None or known.is_unix != (guest.family == 0)
                or (guest.tls is None and guest.listener in self.demanding)
                or known.has_tls != (guest.tls is not None) or known.version != known.route.version
                or (known.address is not None and known.address != guest.address)):
            self.handler.on_startup(guest, packet)
            return
        guest.plan = known.plan
        fault_point("login_started")
        self.process_words[words.PROCESS_CLIENTS] += 1
        guest.is_counted = True
        if known.stored is None:
            self.admit(guest, known)
            return
        guest.known = known
        guest.salt = random_bytes(SALT_LENGTH)
        try:
            guest.send(CHALLENGE + guest.salt)
        except ClientGone as error:
            self.handler.on_gone(guest, str(error))
        else:
            guest.expect_password()

    def on_password(self, Guest guest, bytes body):
        """As ``login.Login``."""
        cdef Known known = guest.known
        if known is None:
            self.handler.on_password(guest, body)
            return
        guest.known = None
        if len(body) != BODY or not is_response_right(body[:BODY - 1], known.stored, guest.salt):
            self.handler.on_mismatch(guest, body)
        elif known.version != known.route.version:
            self.handler.on_proved(guest)
        else:
            self.admit(guest, known)

    cdef int admit(self, Guest guest, Known known) except -1:
        """Greet the client and hand it over to the relay."""
        cdef uint64_t* route_words = self.route_words + <uint64_t> known.route_id * words.WORDS_PER_BLOCK
        fault_point("login_adopting")
        cdef uint32_t pid = htonl(self.relay.reserve_pid())
        cdef bytes secret = random_bytes(known.secret_length)
        try:
            guest.send(known.greeting + (<char*> &pid)[:4] + secret + READY)
        except ClientGone as error:
            self.handler.on_gone(guest, str(error))
            return 0
        if guest.family and known.socket_changes:
            set_options(guest.fd, known.socket_changes)
        handle = self.relay.adopt_client(
            guest.detach(), known.route_id, guest.number, known.parameters, secret=secret,
            address=guest.address, family=guest.family, port=guest.port, names=known.names,
            needs_setup=False, pending=guest.buffer, tls=guest.tls, has_more=guest.has_more)
        route_words[words.ROUTE_CLIENTS_ADMITTED] += 1
        route_words[words.ROUTE_LOGINS] += 1
        self.process_words[words.PROCESS_LOGINS] += 1
        guest.is_counted = False  # from now on the relay's event gives it back
        self.on_adopted(handle, guest, None)
        return 0
