"""Copies of records for the console (listing.pxd). In the relay's thread, like all that reads records."""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset, strlen

from gpooler.relay.listing cimport (
    COPIES_MOST, NAME_MOST, SLICE, STATEMENTS_MOST, TEXT_MOST, ClientRow, Common, CopyRow, Place, ServerRow,
    StatementRow,
)
from gpooler.relay.params cimport params_value
from gpooler.relay.prepared cimport STATEMENT_NAME, Copy, Statement
from gpooler.relay.session cimport session_is_idle
from gpooler.relay.system cimport (
    AF_INET, AF_INET6, SOL_SOCKET, SO_PEERCRED, getsockname, getsockopt, ntohs, sockaddr, sockaddr_in,
    sockaddr_in6, socklen_t, ucred,
)


cdef void list_local(Conn* conn, Place* place) noexcept nogil:
    cdef unsigned char storage[128]
    cdef sockaddr* address = <sockaddr*> storage
    cdef socklen_t size = sizeof(storage)
    if conn.flags & IS_UNIX or getsockname(conn.fd, address, &size) != 0:
        return
    if address.sa_family == AF_INET:
        place.family = 4
        place.port = ntohs((<sockaddr_in*> address).sin_port)
        memcpy(place.address, &(<sockaddr_in*> address).sin_addr, 4)
    elif address.sa_family == AF_INET6:
        place.family = 6
        place.port = ntohs((<sockaddr_in6*> address).sin6_port)
        memcpy(place.address, &(<sockaddr_in6*> address).sin6_addr, 16)


cdef void list_common(Conn* conn, ParamSet* params, Common* row) noexcept nogil:
    cdef const unsigned char* name = params_value(params, b"application_name") if params != NULL else NULL
    row.id = conn.id
    row.handle = (<uint64_t> conn.generation << 32) | conn.index
    row.born_us = conn.born_us
    row.since_us = conn.since_us
    row.left = conn.rx.left
    row.held = 0 if conn.hold == NULL else conn.hold.end - conn.hold.start
    row.queued = <uint32_t> conn.out.size
    row.fd = conn.fd
    row.state = conn.state
    row.tls = conn.tls_facts
    list_local(conn, &row.local)
    if name != NULL:
        row.name_size = <uint32_t> strlen(<const char*> name)
        if row.name_size > NAME_MOST:
            row.name_size = NAME_MOST
        memcpy(row.name, name, row.name_size)


cdef void list_client(Client* c, ClientRow* row) noexcept nogil:
    cdef ucred peer
    cdef socklen_t size = sizeof(peer)
    cdef Server* s = c.server
    list_common(&c.conn, c.params, &row.common)
    row.common.pid = c.pid
    row.common.prepared = 0 if c.prepared == NULL else c.prepared.count
    row.request_us = c.request_us
    row.names = c.names
    row.remote.family = c.address_family
    row.remote.port = c.port
    memcpy(row.remote.address, c.address, 16)
    if c.address_family == 0 and getsockopt(c.conn.fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0:
        row.peer_pid = peer.pid
    if s != NULL:
        row.common.other_id = s.conn.id
        row.common.other_handle = (<uint64_t> s.conn.generation << 32) | s.conn.index
        row.server_pid = s.pid
        row.common.pins = s.pins
        row.common.transaction = s.session.status
        if s.session.status != c'I':
            row.transaction_us = s.begin_us
        if not session_is_idle(&s.session):
            row.query_us = s.query_us


cdef void list_server(Server* s, ServerRow* row) noexcept nogil:
    cdef Client* c = s.client
    list_common(&s.conn, s.params, &row.common)
    row.common.pid = s.pid
    row.common.prepared = s.copies.count
    row.common.pins = s.pins
    row.common.transaction = s.session.status
    if c != NULL:
        row.common.other_id = c.conn.id
        row.common.other_handle = (<uint64_t> c.conn.generation << 32) | c.conn.index
    row.query_us = s.query_us
    row.begin_us = s.begin_us
    row.uses = s.uses
    row.expires_us = s.expires_us
    row.cancelling = s.cancelling
    # as it would be let go (release.pxi)
    row.closes = (s.flags & CLOSE_AT_END != 0 or s.epoch < s.conn.route.epoch
                  or s.conn.route.pause == PAUSE_CLOSE)


cdef void do_list_clients(Command* command) noexcept nogil:
    """Reply: now = how many rows there are of the slice that begins at the command's client."""
    cdef Client* first = <Client*> command.conn
    cdef ClientRow* rows = <ClientRow*> command.rows
    cdef int i
    command.now = 0
    for i in range(SLICE):
        if first[i].conn.state and first[i].conn.state < CLIENT_CLOSED and first[i].conn.fd >= 0:
            list_client(&first[i], &rows[command.now])
            command.now += 1


cdef void do_list_servers(Command* command) noexcept nogil:
    cdef Server* first = <Server*> command.conn
    cdef ServerRow* rows = <ServerRow*> command.rows
    cdef int i
    command.now = 0
    for i in range(SLICE):
        if first[i].conn.state and first[i].conn.state < SERVER_RELEASED and first[i].conn.fd >= 0:
            list_server(&first[i], &rows[command.now])
            command.now += 1


cdef void do_list_copies(Server* s, Command* command) noexcept nogil:
    """The latest used first."""
    cdef CopyRow* rows = <CopyRow*> command.rows
    cdef Copy* at = s.copies.newest
    command.now = 0
    while at != NULL and command.now < COPIES_MOST:
        memcpy(rows[command.now].name, at.statement.name, STATEMENT_NAME)
        command.now += 1
        at = at.older


cdef void do_list_statements(Engine* e, Command* command) noexcept nogil:
    """From bucket `count` on. Reply: now = rows, later = the bucket to go on with, 0 at the end."""
    cdef StatementRow* rows = <StatementRow*> command.rows
    cdef Statement* at
    cdef uint32_t bucket = command.count, began
    command.now = 0
    command.later = 0
    while bucket < e.statements.capacity and bucket - command.count < SLICE * SLICE:
        began = command.now
        at = e.statements.buckets[bucket]
        while at != NULL and command.now < STATEMENTS_MOST:
            rows[command.now].references = at.references
            rows[command.now].size = <uint32_t> strlen(<const char*> at.body)
            if rows[command.now].size > TEXT_MOST:
                rows[command.now].size = TEXT_MOST
            memcpy(rows[command.now].text, at.body, rows[command.now].size)
            memcpy(rows[command.now].name, at.name, STATEMENT_NAME)
            command.now += 1
            at = at.next
        if at != NULL and began:
            command.now = began     # the bucket begins the next reply
            break
        bucket += 1
    if bucket < e.statements.capacity:
        command.later = bucket
