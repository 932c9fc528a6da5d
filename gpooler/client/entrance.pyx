"""Accepts clients and frames what they send until they are logged in.

Compiled because a login must cost little: no greenlet, no socket object and no watcher a client. All of
a worker's guests share one epoll instance, whose descriptor the hub watches; each is armed for one event
at a time (EPOLLONESHOT), so that the relay can take a descriptor over without a call here.

A handler decides: ``on_startup(guest, packet)``, ``on_password(guest, body)``, ``on_handshake(guest, data)``
for bytes of a TLS handshake, ``on_direct_tls(guest)`` when one comes in place of a startup packet,
``on_bad(guest)`` for bytes that are none of these, ``on_gone(guest, cause)``. It answers with ``guest.send``
and says what it expects next; what takes time goes to a greenlet that comes back with the same calls.
"""

from libc.errno cimport EAGAIN, ECONNABORTED, EINTR, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset, strerror

from gpooler.auth.randomness cimport random_bytes
from gpooler.relay.system cimport ntohs, sockaddr_in, sockaddr_in6
from gpooler.relay.tls cimport TlsSession

import socket
from collections import deque

from gpooler.log import LogContext, client_id


cdef extern from "<sys/socket.h>" nogil:
    struct sockaddr:
        unsigned short sa_family
    struct linger:
        int l_onoff
        int l_linger
    ctypedef uint32_t socklen_t
    int accept4(int fd, sockaddr* address, socklen_t* size, int flags)
    ssize_t recv(int fd, void* buffer, size_t size, int flags)
    ssize_t send(int fd, const void* buffer, size_t size, int flags)
    int setsockopt(int fd, int level, int option, const void* value, socklen_t size)
    enum:
        SOCK_NONBLOCK
        SOCK_CLOEXEC
        MSG_DONTWAIT
        MSG_NOSIGNAL
        SOL_SOCKET
        SO_LINGER
        AF_INET
        AF_INET6
        AF_UNIX


cdef extern from "<sys/epoll.h>" nogil:
    union epoll_data:
        int fd
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data data
    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int operation, int fd, epoll_event* event)
    int epoll_wait(int epoll, epoll_event* events, int size, int timeout)
    enum:
        EPOLLIN
        EPOLLRDHUP
        EPOLLONESHOT
        EPOLL_CTL_ADD
        EPOLL_CTL_MOD
        EPOLL_CLOEXEC


cdef extern from "<unistd.h>" nogil:
    int close(int fd)


cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec* now)
    enum:
        CLOCK_MONOTONIC


cdef enum:
    EXPECTS_NOTHING = 0
    EXPECTS_STARTUP = 1
    EXPECTS_PASSWORD = 2
    EXPECTS_HANDSHAKE = 3
    TLS_HANDSHAKE = 22      # content type of a record: the first byte of a ClientHello
    # Limits of wire/startup.py and wire/messages.py; a test compares.
    MIN_STARTUP = 8
    MAX_STARTUP = 10004
    MAX_PASSWORD = 65535
    READ = 16384
    MAX_EVENTS = 64
    ID_BYTES = 6
    MAX_HOSTS = 1024


class ClientGone(Exception):
    """The client closed or broke the connection before its login was complete."""


cdef uint64_t now_us() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t> now.tv_sec * 1000000 + <uint64_t> now.tv_nsec // 1000


cdef class Guest:
    """A client's socket until the relay has it."""

    @property
    def who(self):
        """Whom log lines name; user and database as soon as there is a plan."""
        if self.context is None:
            self.context = LogContext(client=client_id(self.number), client_host=self.host,
                                      client_port=self.port)
        if self.plan is not None and not self.context.user:
            self.context.user = self.plan.packet.user
            self.context.database = self.plan.packet.database
        return self.context

    cpdef int send(self, bytes data) except -1:
        """Send all at once: login messages fit any socket buffer. Raises ClientGone."""
        if self.tls is None:
            return self.send_raw(data)
        try:
            self.tls.write(data)
        except ConnectionError as error:
            raise ClientGone(str(error))
        return self.send_raw(self.tls.take())

    def send_handshake(self, bytes data):
        """Send bytes of a handshake. Raises ClientGone."""
        self.send_raw(data)

    cdef int send_raw(self, bytes data) except -1:
        cdef ssize_t sent
        cdef const char* at = data
        if self.fd < 0:
            raise ClientGone("closed")
        while True:
            sent = send(self.fd, at, len(data), MSG_DONTWAIT | MSG_NOSIGNAL)
            if sent == len(data):
                return 0
            if sent < 0 and errno == EINTR:
                continue
            raise ClientGone("does not read" if sent >= 0 or errno == EAGAIN
                             else strerror(errno).decode("ascii", "replace"))

    cpdef uint64_t age_us(self) noexcept:
        """How long ago it was accepted."""
        return now_us() - (self.deadline_us - <uint64_t> self.timeout_ms * 1000)

    cpdef void expect_startup(self) noexcept:
        """The next bytes are a startup packet."""
        self.expects = EXPECTS_STARTUP

    cpdef void expect_password(self) noexcept:
        """The next bytes are a password message."""
        self.expects = EXPECTS_PASSWORD

    cpdef void expect_handshake(self) noexcept:
        """The next bytes go to ``handshake``."""
        self.expects = EXPECTS_HANDSHAKE

    def secure(self, TlsSession session not None):
        """The handshake is over: from now on everything goes through ``session``. Raises ClientGone."""
        self.tls = session
        self.handshake = None
        self.has_more = True

    cdef int pull(self) except -1:
        """Take plain bytes out of ``tls``, up to READ of them. Raises ClientGone at the end."""
        cdef list parts = [self.buffer]
        cdef Py_ssize_t size = 0
        cdef bytes answer
        self.has_more = False
        try:
            while True:
                if size == READ:
                    self.has_more = True
                    break
                part = self.tls.read(READ - size)
                if part is None:
                    if size == 0:
                        raise ClientGone("closed")
                    self.has_more = True    # the end is found again
                    break
                if not part:
                    break
                parts.append(part)
                size += len(part)
            answer = self.tls.take()
        except ConnectionError as error:
            raise ClientGone(str(error))
        self.buffer = b"".join(parts)
        if answer:
            self.send_raw(answer)
        return 0

    def resume(self):
        """After ``expect_…`` from outside a handler's call: go on reading."""
        self.entrance.feed(self)

    cpdef int detach(self) except -2:
        """The descriptor, which is the caller's from now on."""
        cdef int fd = self.fd
        self.entrance.forget(self)
        return fd

    def close(self):
        """Close the descriptor, if it is still ours."""
        cdef int fd = self.fd
        cdef bytes last
        if fd >= 0:
            if self.tls is not None and self.tls.tls != NULL:
                self.tls.close()
                last = self.tls.take()
                send(fd, <const char*> last, len(last), MSG_DONTWAIT | MSG_NOSIGNAL)
            self.entrance.forget(self)
            close(fd)


cdef class Entrance:
    """All clients of a worker that are not logged in yet."""

    def __cinit__(self, handler):
        self.fd = epoll_create1(EPOLL_CLOEXEC)
        if self.fd < 0:
            raise OSError(errno, "epoll_create1")
        self.guests = {}
        self.deadlines = {}
        self.hosts = {}
        self.handler = handler

    def __len__(self):
        return len(self.guests)

    def accept(self, int listener, int number, int timeout_ms, bint lingers):
        """Accept one client; None when none is there. Raises OSError.

        ``number`` is that of the listener, ``timeout_ms`` its client_login_timeout; ``lingers``: SO_LINGER 0,
        a close resets the connection.
        """
        cdef unsigned char storage[128]
        cdef sockaddr* address = <sockaddr*> storage
        cdef socklen_t size
        cdef linger option
        cdef int fd
        cdef Guest guest
        while True:
            size = sizeof(storage)
            memset(storage, 0, sizeof(storage))
            fd = accept4(listener, address, &size, SOCK_NONBLOCK | SOCK_CLOEXEC)
            if fd >= 0:
                break
            if errno == EAGAIN or errno == ECONNABORTED:
                return None
            if errno != EINTR:
                raise OSError(errno, strerror(errno).decode("ascii", "replace"))
        guest = Guest()
        guest.fd = fd
        guest.entrance = self
        guest.listener = number
        guest.buffer = b""
        guest.timeout_ms = timeout_ms
        guest.number = int.from_bytes(random_bytes(ID_BYTES), "big")
        if address.sa_family == AF_INET:
            guest.family = 4
            guest.port = ntohs((<sockaddr_in*> address).sin_port)
            guest.address = (<char*> &(<sockaddr_in*> address).sin_addr)[:4]
            guest.host = self.host_of(AF_INET, guest.address)
        elif address.sa_family == AF_INET6:
            guest.family = 6
            guest.port = ntohs((<sockaddr_in6*> address).sin6_port)
            guest.address = (<char*> &(<sockaddr_in6*> address).sin6_addr)[:16]
            guest.host = self.host_of(AF_INET6, guest.address)
        else:
            guest.address = b""
            guest.host = "local"
        if lingers and guest.family:
            option.l_onoff = 1
            option.l_linger = 0
            setsockopt(fd, SOL_SOCKET, SO_LINGER, &option, sizeof(option))
        guest.deadline_us = now_us() + <uint64_t> timeout_ms * 1000
        self.guests[fd] = guest
        guest.expects = EXPECTS_STARTUP
        return guest

    cdef str host_of(self, int family, bytes address):
        host = self.hosts.get(address)
        if host is None:
            if len(self.hosts) >= MAX_HOSTS:
                self.hosts.clear()
            host = self.hosts[address] = socket.inet_ntop(family, address)
        return host

    def expired(self, uint64_t ahead_us):
        """Guests whose client_login_timeout passes within ``ahead_us``."""
        cdef Guest guest
        cdef uint64_t limit = now_us() + ahead_us
        cdef list result = []
        for queue in self.deadlines.values():
            while queue:
                guest = queue[0]
                if guest.fd >= 0 and guest.deadline_us > limit:
                    break
                queue.popleft()
                if guest.fd >= 0:
                    result.append(guest)
        return result

    cdef void forget(self, Guest guest):
        if guest.fd >= 0:
            self.guests.pop(guest.fd, None)
            guest.fd = -1
            guest.expects = EXPECTS_NOTHING

    cdef int arm(self, Guest guest) except -1:
        cdef epoll_event event
        event.events = EPOLLIN | EPOLLRDHUP | EPOLLONESHOT
        event.data.u64 = 0
        event.data.fd = guest.fd
        if epoll_ctl(self.fd, EPOLL_CTL_MOD if guest.is_armed else EPOLL_CTL_ADD, guest.fd, &event) != 0:
            raise OSError(errno, strerror(errno).decode("ascii", "replace"))
        guest.is_armed = True
        return 0

    def poll(self):
        """Read from those who sent something."""
        cdef epoll_event events[MAX_EVENTS]
        cdef int i, count
        count = epoll_wait(self.fd, events, MAX_EVENTS, 0)
        for i in range(count):
            guest = self.guests.get(events[i].data.fd)
            if guest is not None:
                self.look(<Guest> guest)

    cpdef int look(self, Guest guest) except -1:
        """As ``read``; a mistake of ours ends that login and no other's turn.

        Who is not through by then has a deadline.
        """
        try:
            self.read(guest)
        except Exception:
            self.handler.on_surprise(guest)
        finally:
            if guest.fd >= 0 and not guest.is_timed:
                guest.is_timed = True
                queue = self.deadlines.get(guest.timeout_ms)
                if queue is None:
                    queue = self.deadlines[guest.timeout_ms] = deque()
                queue.append(guest)
        return 0

    cpdef int read(self, Guest guest) except -1:
        """Take in what is there, hand complete messages to the handler, wait for more if it expects any."""
        cdef char data[READ]
        cdef ssize_t got
        while True:
            got = recv(guest.fd, data, READ, MSG_DONTWAIT)
            if got >= 0 or errno != EINTR:
                break
        if got > 0 and guest.tls is not None:
            try:
                guest.tls.put(data[:got])
                guest.pull()
            except ClientGone as error:
                self.handler.on_gone(guest, str(error))
                return 0
            self.feed(guest)
        elif got > 0:
            guest.buffer = data[:got] if not guest.buffer else guest.buffer + data[:got]
            self.feed(guest)
        elif got < 0 and errno == EAGAIN:
            self.arm(guest)
        else:
            cause = "closed" if got == 0 else strerror(errno).decode("ascii", "replace")
            self.handler.on_gone(guest, cause)
        return 0

    cdef int feed(self, Guest guest) except -1:
        """Hand complete messages to the handler, as long as it expects any; then wait for more."""
        while True:
            self.hand_over(guest)
            if guest.expects == EXPECTS_NOTHING or guest.fd < 0:
                return 0
            if not guest.has_more:
                return self.arm(guest)
            try:
                guest.pull()
            except ClientGone as error:
                self.handler.on_gone(guest, str(error))
                return 0

    cdef int hand_over(self, Guest guest) except -1:
        cdef const unsigned char* at
        cdef Py_ssize_t size
        cdef uint32_t length
        cdef bytes message
        while guest.expects != EXPECTS_NOTHING and guest.fd >= 0:
            at = <const unsigned char*> <const char*> guest.buffer
            size = len(guest.buffer)
            if guest.expects == EXPECTS_HANDSHAKE:
                if size == 0:
                    break
                message = guest.buffer
                guest.buffer = b""
                guest.expects = EXPECTS_NOTHING
                self.handler.on_handshake(guest, message)
            elif guest.expects == EXPECTS_STARTUP:
                if size < 4:
                    break
                if at[0] == TLS_HANDSHAKE and guest.tls is None and not guest.requests:
                    guest.expects = EXPECTS_NOTHING
                    self.handler.on_direct_tls(guest)
                    continue
                length = (<uint32_t> at[0] << 24) | (<uint32_t> at[1] << 16) | (<uint32_t> at[2] << 8) | at[3]
                if length < MIN_STARTUP or length > MAX_STARTUP:
                    guest.expects = EXPECTS_NOTHING
                    self.handler.on_bad(guest, True)
                    return 0
                if size < length:
                    break
                message = guest.buffer[4:length]
                guest.buffer = guest.buffer[length:] if size > length else b""
                guest.expects = EXPECTS_NOTHING
                self.handler.on_startup(guest, message)
            else:
                if size and at[0] != c'p':
                    guest.expects = EXPECTS_NOTHING
                    self.handler.on_bad(guest, False)
                    return 0
                if size < 5:
                    break
                length = (<uint32_t> at[1] << 24) | (<uint32_t> at[2] << 16) | (<uint32_t> at[3] << 8) | at[4]
                if length < 4 or length > MAX_PASSWORD:
                    guest.expects = EXPECTS_NOTHING
                    self.handler.on_bad(guest, False)
                    return 0
                if size < length + 1:
                    break
                message = guest.buffer[5:length + 1]
                guest.buffer = guest.buffer[length + 1:] if size > length + 1 else b""
                guest.expects = EXPECTS_NOTHING
                self.handler.on_password(guest, message)
        return 0
