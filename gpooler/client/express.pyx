"""The short way in, for a client that begins as another did before whose login went well.

Most logins of an application are alike to the byte. Where nothing but the password is left to look at, they
are answered here, compiled; every other login, and all that fails, is the handler's (``login.py``), which
also says who may come this way (``remember``).
"""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t

from gpooler.auth.randomness cimport random_bytes
from gpooler.auth.scram_server cimport Prepared, SaslServer
from gpooler.client.entrance cimport Guest
from gpooler.relay cimport counters as words
from gpooler.relay.histogram cimport observe
from gpooler.relay.params cimport ParameterSet

from gpooler.auth.exchange import WRONG_PASSWORD, Done
from gpooler.auth.md5 import SALT_LENGTH, is_response_right
from gpooler.client.entrance import ClientGone
from gpooler.errors import AuthenticationFailed, GpoolerError
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
cdef bytes AUTHENTICATION_OK = messages.authentication_ok()
cdef bytes READY = messages.ready_for_query()


cdef class Known:
    """A login that went well, for those that begin with the same packet."""

    cdef object plan
    cdef object route
    cdef uint64_t version           # of the route's parameters
    cdef tuple hashes               # "md5…", each as good; None: another method
    cdef tuple verifiers            # the same of SCRAM; with neither everybody is believed
    cdef bint is_learned_from       # the keys that a client proves itself with open servers
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
    cdef readonly object on_surprise
    cdef dict known                 # by startup packet
    cdef set demanding              # numbers of listeners that take nobody without TLS
    cdef uint64_t* process_words
    cdef const uint64_t* is_short   # of memory: nobody comes in (ProcessWord.SOFT_OOM_SHORT)
    cdef uint64_t* route_words

    def __cinit__(self, relay, uintptr_t counters_address, uintptr_t short_address, handler, on_adopted):
        """``handler`` is a ``login.Login``, ``on_adopted`` is told as by that.

        ``short_address``: of the word that says whether memory is short.
        """
        self.relay = relay
        self.handler = handler
        self.on_adopted = on_adopted
        self.known = {}
        self.process_words = <uint64_t*> counters_address
        self.is_short = <const uint64_t*> short_address
        self.route_words = self.process_words + words.WORDS_PER_BLOCK
        self.demanding = handler.demanding
        self.on_bad = handler.on_bad
        self.on_handshake = handler.on_handshake
        self.on_direct_tls = handler.on_direct_tls
        self.on_gone = handler.on_gone
        self.on_surprise = handler.on_surprise

    def remember(self, Guest guest, plan, tuple stored, bint is_learned_from, bint is_bound_to_address,
                 socket_changes):
        """``guest`` has come in by ``plan``: let those like it take the short way.

        ``stored``: what its password was compared with, hashes or verifiers; None for a rule that asks for
        none. ``is_learned_from``: the route is to learn its keys.
        """
        cdef Known known = Known()
        known.plan = plan
        known.route = plan.route
        known.version = plan.version
        if stored is not None:
            if isinstance(stored[0], Prepared):
                known.verifiers = stored
            else:
                known.hashes = stored
        known.is_learned_from = is_learned_from
        known.address = guest.address if is_bound_to_address else None
        known.is_unix = guest.family == 0
        known.has_tls = guest.tls is not None
        known.route_id = plan.route.route_id
        known.names = plan.names
        known.secret_length = plan.packet.secret_length
        known.parameters = plan.greeting.parameters
        key_data = messages.backend_key_data(0, bytes(known.secret_length))
        known.greeting = AUTHENTICATION_OK + plan.greeting.statuses + key_data[:KEY_DATA_HEAD]
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
                or known.has_tls != (guest.tls is not None) or self.has_news(known)
                or (known.address is not None and known.address != guest.address)):
            self.handler.on_startup(guest, packet)
            return
        guest.plan = known.plan
        fault_point("login_started")
        self.process_words[words.PROCESS_CLIENTS] += 1
        guest.is_counted = True
        if known.verifiers is not None:
            guest.conversation = SaslServer(
                known.verifiers, None if guest.tls is None else guest.tls.facts.binding or None, False)
            guest.known = known
            self.ask(guest, (<SaslServer> guest.conversation).challenge())
        elif known.hashes is not None:
            guest.salt = random_bytes(SALT_LENGTH)
            guest.known = known
            self.ask(guest, CHALLENGE + guest.salt)
        else:
            self.admit(guest, known, b"")

    cdef inline bint has_news(self, Known known) except -1:
        """Whether there is something else to look at by now."""
        return self.is_short[0] != 0 or known.version != known.route.version

    cdef int ask(self, Guest guest, bytes challenge) except -1:
        try:
            guest.send(challenge)
        except ClientGone as error:
            self.handler.on_gone(guest, str(error))
        else:
            guest.expect_password()
        return 0

    def on_password(self, Guest guest, bytes body):
        """As ``login.Login``."""
        cdef Known known = guest.known
        if known is None:
            self.handler.on_password(guest, body)
            return
        if known.verifiers is not None:
            self.go_on(guest, known, guest.conversation, body)
        elif len(body) != BODY or not is_any_right(body[:BODY - 1], known.hashes, guest.salt):
            guest.known = None
            self.handler.on_mismatch(guest, body)
        elif self.has_news(known):
            self.handler.on_proved(guest, Done(AUTHENTICATION_OK))
        else:
            self.admit(guest, known, b"")

    cdef int go_on(self, Guest guest, Known known, SaslServer server, bytes body) except -1:
        """The next message of a SCRAM exchange."""
        cdef bytes said
        try:
            said = server.answer(body)
            if said is None:
                raise AuthenticationFailed(known.plan.packet.user, cause=WRONG_PASSWORD)
        except GpoolerError as error:
            self.handler.on_refused(guest, error)
            return 0
        if not server.is_over:
            self.ask(guest, said)
        elif self.has_news(known):
            self.handler.on_proved(guest, Done(said + AUTHENTICATION_OK, keys=server.keys))
        else:
            if known.is_learned_from:
                known.route.learn(None, server.keys)
            self.admit(guest, known, said)
        return 0

    cdef int admit(self, Guest guest, Known known, bytes said) except -1:
        """Greet the client behind what is to be ``said``, and hand it over to the relay."""
        cdef uint64_t* route_words = self.route_words + <uint64_t> known.route_id * words.WORDS_PER_BLOCK
        fault_point("login_adopting")
        cdef uint32_t pid = htonl(self.relay.reserve_pid())
        cdef bytes secret = random_bytes(known.secret_length)
        try:
            guest.send(said + known.greeting + (<char*> &pid)[:4] + secret + READY)
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
        self.observe_login(known.route_id, guest.age_us())
        guest.is_counted = False  # from now on the relay's event gives it back
        self.on_adopted(handle, guest, None)
        return 0

    cdef void observe_login(self, uint32_t route_id, uint64_t lasted_us) noexcept:
        """As SharedCounters.observe."""
        cdef uint64_t* histogram = (
            self.process_words + words.HUB_TIMES_AT + <uint64_t> route_id * words.HUB_TIME_WORDS
            + (words.TIME_LOGIN - words.HUB_TIMES) * words.HISTOGRAM_WORDS)
        observe(histogram, lasted_us)
        histogram[words.HISTOGRAM_BUCKETS] += lasted_us


cdef bint is_any_right(bytes response, tuple hashes, bytes salt) except -1:
    """Whether it is one of them; all are tried, so that time does not tell which."""
    cdef bint is_right = False
    for stored in hashes:
        is_right |= is_response_right(response, stored, salt)
    return is_right
