"""The relay as Python sees it: records from slabs, commands to its thread, events from it."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t, uint8_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from gpooler.relay cimport counters
from gpooler.relay.engine cimport (
    COMMAND_ADOPT_CLIENT, COMMAND_ADOPT_SERVER, COMMAND_BEGIN_CANCEL, COMMAND_CHANGE_ROUTE,
    COMMAND_CONNECT_FAILED, COMMAND_DROP_IDLE, COMMAND_END_CANCEL, COMMAND_END_ROUTE, COMMAND_FORGET_RECALLS,
    COMMAND_INJECT, COMMAND_KILL, COMMAND_KILL_ROUTE, COMMAND_LIST_CLIENTS, COMMAND_LIST_COPIES,
    COMMAND_LIST_SERVERS, COMMAND_LIST_STATEMENTS, COMMAND_OUTDATE, COMMAND_PAUSE, COMMAND_RECALL,
    COMMAND_ROUTE, COMMAND_START_CLIENT, COMMAND_STOP, DISCARD_ALWAYS, DISCARD_DIRTY, DISCARD_NEVER,
    HAS_STRAY_COPIES, INDEX_MASK, MODE_SESSION, MODE_TRANSACTION,
    IN_SETUP, IS_READABLE, IS_REGISTERED, IS_UNIX, KIND_CLIENT, KIND_ROUTE, KIND_SERVER, SLAB, SYNTHETIC_PID,
    TEXT_RING, TEXT_SLOW, WORKER_MASK, WORKER_SHIFT, Client, Command, Conn, Engine, Route, Server,
    SlowRecord, Text, clock_us, conn_add, engine_new, engine_run,
)
from gpooler.relay.io cimport CHUNK, Chunk
from gpooler.relay.listing cimport (
    COPIES_MOST, SLICE, STATEMENTS_MOST, ClientRow, Common, CopyRow, Place, ServerRow, StatementRow,
)
from gpooler.relay.params cimport (
    ParamSet, ParameterSet, params_counts, params_global_init, params_hold, params_release,
)
from gpooler.relay.reason cimport REASON_CLIENT_GONE
from gpooler.relay.session cimport session_free, session_init
from gpooler.relay.system cimport pthread_mutex_lock, pthread_mutex_unlock, read, write
from gpooler.relay.records cimport crypto_new
from gpooler.relay.tls cimport TlsSession


cdef ParameterSet wrap(Engine* e, ParamSet** place):
    cdef ParameterSet result = ParameterSet()
    pthread_mutex_lock(&e.lock)
    result._set = params_hold(place[0])
    pthread_mutex_unlock(&e.lock)
    return result


cdef bytes packed_address(Client* c):
    return (<char*> c.address)[:4 if c.address_family == 4 else 16 if c.address_family else 0]


cdef bytes place_bytes(Place* place):
    return (<char*> place.address)[:4 if place.family == 4 else 16 if place.family else 0]


cdef dict server_row(ServerRow* row):
    cdef Common* common = &row.common
    return {
        "id": common.id, "handle": common.handle, "born_us": common.born_us, "since_us": common.since_us,
        "other_id": common.other_id, "other_handle": common.other_handle, "pid": common.pid,
        "prepared": common.prepared, "left": common.left, "held": common.held, "queued": common.queued,
        "fd": common.fd, "pins": common.pins, "state": common.state, "tls": common.tls,
        "transaction": common.transaction,
        "local": (common.local.family, place_bytes(&common.local), common.local.port),
        "name": (<char*> common.name)[:common.name_size],
        "query_us": row.query_us, "begin_us": row.begin_us, "uses": row.uses, "expires_us": row.expires_us,
        "cancelling": row.cancelling, "closes": bool(row.closes),
    }


cdef object rows_of(Command* reply):
    """What a LIST_… command has brought."""
    cdef uint32_t i
    cdef list result = []
    cdef StatementRow* statement
    if reply.kind == COMMAND_LIST_CLIENTS:
        return (<char*> reply.rows)[:reply.now * sizeof(ClientRow)]
    for i in range(reply.now):
        if reply.kind == COMMAND_LIST_SERVERS:
            result.append(server_row(<ServerRow*> reply.rows + i))
        elif reply.kind == COMMAND_LIST_COPIES:
            result.append(bytes(<char*> (<CopyRow*> reply.rows + i).name))
        else:
            statement = <StatementRow*> reply.rows + i
            result.append((
                bytes(<char*> statement.name), (<char*> statement.text)[:statement.size],
                statement.references,
            ))
    return result


cdef int keep_text(Text* text, bytes data) except -1:
    """Copy bytes for a route."""
    text.size = <uint32_t> PyBytes_GET_SIZE(data)
    text.data = <unsigned char*> malloc(text.size + 1)
    if text.data == NULL:
        raise MemoryError
    memcpy(text.data, PyBytes_AS_STRING(data), text.size)
    return 0


cdef class Relay:
    """The relay of one worker, as the hub sees it. Called by the hub's thread only.

    ``run`` is the body of the relay's thread. ``event_fd`` becomes readable when ``poll`` has something; with
    ``has_quiet_ends`` up to 50 ms later if that is only the end of clients, so that many are told at once.
    """

    cdef Engine* e
    cdef uint32_t worker
    cdef list clients               # addresses of the slabs
    cdef list servers
    cdef list free_clients          # indices
    cdef list free_servers
    cdef dict routes                # id → address
    cdef list tls_facts             # how TLS sessions are shown: there are few kinds
    cdef uint64_t next_token

    def __cinit__(self, uintptr_t counters_address, uint32_t worker, bint has_quiet_ends,
                  bytes statement_key not None):
        params_global_init()
        self.e = engine_new(<uint64_t*> counters_address)
        if self.e == NULL:
            raise OSError(errno, "the relay cannot start")
        self.e.has_quiet_ends = has_quiet_ends
        if len(statement_key) != sizeof(self.e.statements.key):
            raise ValueError("a key of 16 bytes is needed")
        memcpy(self.e.statements.key, PyBytes_AS_STRING(statement_key), sizeof(self.e.statements.key))
        self.worker = worker & WORKER_MASK
        self.clients = []
        self.servers = []
        self.free_clients = []
        self.free_servers = []
        self.routes = {}
        self.tls_facts = [""]
        self.next_token = 1

    @property
    def event_fd(self):
        """Readable when ``poll`` has something to say."""
        return self.e.event_fd

    def run(self):
        """Body of the relay's thread: blocks all signals, returns after ``stop``."""
        with nogil:
            engine_run(self.e)

    def now_us(self):
        """Microseconds of the monotonic clock."""
        return clock_us()

    # -- records

    cdef Client* client_at(self, uint32_t index):
        cdef uint32_t slab = index // SLAB
        if slab >= <uint32_t> len(self.clients):
            return NULL
        return <Client*> <uintptr_t> self.clients[slab] + index % SLAB

    cdef Server* server_at(self, uint32_t index):
        cdef uint32_t slab = index // SLAB
        if slab >= <uint32_t> len(self.servers):
            return NULL
        return <Server*> <uintptr_t> self.servers[slab] + index % SLAB

    cdef Client* client_of(self, uint64_t handle) except NULL:
        cdef Client* c = self.client_at(<uint32_t> handle)
        if c == NULL or c.conn.generation != handle >> 32:
            raise KeyError(handle)
        return c

    cdef Server* server_of(self, uint64_t handle) except NULL:
        cdef Server* s = self.server_at(<uint32_t> handle)
        if s == NULL or s.conn.generation != handle >> 32:
            raise KeyError(handle)
        return s

    cdef Route* route_of(self, uint32_t route_id) except NULL:
        return <Route*> <uintptr_t> self.routes[route_id]

    cdef Client* new_client(self) except NULL:
        cdef Client* slab
        cdef uint32_t i, base, generation
        if not self.free_clients:
            slab = <Client*> calloc(SLAB, sizeof(Client))
            if slab == NULL:
                raise MemoryError
            base = <uint32_t> len(self.clients) * SLAB
            if base + SLAB > INDEX_MASK:
                free(slab)
                raise MemoryError
            self.clients.append(<uintptr_t> slab)
            for i in range(<uint32_t> SLAB):
                slab[i].conn.index = base + i
                slab[i].conn.generation = 1
                slab[i].conn.fd = -1
            self.free_clients.extend(reversed(range(base, base + SLAB)))
        cdef Client* c = self.client_at(self.free_clients.pop())
        i = c.conn.index
        generation = c.conn.generation
        memset(c, 0, sizeof(Client))
        c.conn.index = i
        c.conn.generation = generation
        c.conn.kind = KIND_CLIENT
        return c

    cdef Server* new_server(self) except NULL:
        cdef Server* slab
        cdef uint32_t i, base, generation
        if not self.free_servers:
            slab = <Server*> calloc(SLAB, sizeof(Server))
            if slab == NULL:
                raise MemoryError
            base = <uint32_t> len(self.servers) * SLAB
            self.servers.append(<uintptr_t> slab)
            for i in range(<uint32_t> SLAB):
                slab[i].conn.index = base + i
                slab[i].conn.generation = 1
                slab[i].conn.fd = -1
            self.free_servers.extend(reversed(range(base, base + SLAB)))
        cdef Server* s = self.server_at(self.free_servers.pop())
        i = s.conn.index
        generation = s.conn.generation
        memset(s, 0, sizeof(Server))
        s.conn.index = i
        s.conn.generation = generation
        s.conn.kind = KIND_SERVER
        return s

    # -- commands

    cdef Command* command(self, uint8_t kind) except NULL:
        cdef Command* command = <Command*> calloc(1, sizeof(Command))
        if command == NULL:
            raise MemoryError
        command.kind = kind
        return command

    cdef Command* route_command(self, uint8_t kind, uint32_t route_id, uint32_t count=0) except NULL:
        cdef Route* route = self.route_of(route_id)
        cdef Command* command = self.command(kind)
        command.route = route
        command.count = count
        return command

    cdef void attach_data(self, Command* command, bytes data):
        command.size = <uint32_t> PyBytes_GET_SIZE(data)
        command.data = <unsigned char*> malloc(command.size + 1)
        memcpy(command.data, PyBytes_AS_STRING(data), command.size)

    cdef void post(self, Command* command, bint is_quiet=False):
        cdef bint wake
        cdef uint64_t one = 1
        pthread_mutex_lock(&self.e.lock)
        if self.e.commands_tail != NULL:
            self.e.commands_tail.next = command
        else:
            self.e.commands_head = command
        self.e.commands_tail = command
        wake = not is_quiet and not self.e.is_relay_woken
        if wake:
            self.e.is_relay_woken = True
        pthread_mutex_unlock(&self.e.lock)
        if wake:
            write(self.e.wake, &one, sizeof(one))

    def stop(self):
        """Make ``run`` return."""
        self.post(self.command(COMMAND_STOP))

    def open_route(self, uint32_t route_id, *, uint8_t mode, bint is_dedicated=False, discard,
                   bint can_cancel, bint can_rollback, bint attach_check, bint maintain_params,
                   bint adds_host, bint defers_begin, bint has_prepared, uint32_t max_copies,
                   uint64_t max_names_bytes, uint8_t session_state,
                   bint pin_on_listen, uint8_t state_check, bint log_query, uint64_t log_slow_ms,
                   uint64_t pool_timeout_ms,
                   uint64_t pool_ttl_s, uint64_t reset_timeout_ms, uint64_t login_timeout_ms, uint32_t keep,
                   bytes discard_query, bint keeps_copies, bint resets_parameters, bint drops_old_plans,
                   uint64_t idle_timeout_s,
                   uint64_t idle_in_transaction_s, uint64_t query_timeout_s, uint64_t transaction_timeout_s,
                   int64_t notice_after_ms, tuple notices, tuple virtual_answers):
        """Make a route known, or change its limits: what sessions rest on stays as it was.

        ``discard``: None resets what is dirty, True always, False never.
        ``is_dedicated``: each server is opened for one client; ``mode`` is that of session pools.
        ``discard_query`` does that; ``keeps_copies``: it spares prepared statements, ``resets_parameters``:
        it resets all parameters, each for certain. ``notices`` for clients
        that wait, unless ``notice_after_ms`` is negative: a message when they do, and, for when they have
        got a server, the body of one in two parts around the number of milliseconds. ``virtual_answers``:
        none, or the texts for each sql.Virtual.
        """
        cdef Route* r
        cdef Command* command
        r = <Route*> calloc(1, sizeof(Route))
        if r == NULL:
            raise MemoryError
        r.conn.kind = KIND_ROUTE
        r.conn.fd = -1
        r.conn.index = route_id
        r.id = route_id
        r.mode = mode
        r.is_dedicated = is_dedicated
        r.discard = DISCARD_DIRTY if discard is None else DISCARD_ALWAYS if discard else DISCARD_NEVER
        r.can_cancel = can_cancel
        r.can_rollback = can_rollback
        r.attach_check = attach_check
        r.maintain_params = maintain_params
        r.adds_host = adds_host
        r.defers_begin = defers_begin and mode == MODE_TRANSACTION
        r.has_prepared = has_prepared and mode != MODE_SESSION
        r.max_copies = max_copies
        r.max_names_bytes = max_names_bytes
        r.session_state = session_state
        r.pin_on_listen = pin_on_listen
        r.state_check = state_check
        r.log_query = log_query
        r.slow_us = log_slow_ms * 1000
        r.pool_timeout_us = pool_timeout_ms * 1000
        r.pool_ttl_us = pool_ttl_s * 1000000
        r.reset_timeout_us = reset_timeout_ms * 1000
        r.login_timeout_us = login_timeout_ms * 1000
        r.keep = keep
        r.keeps_copies = keeps_copies
        keep_text(&r.discard_query, discard_query + b"\0")
        r.resets_parameters = resets_parameters
        r.drops_old_plans = drops_old_plans
        r.idle_timeout_us = idle_timeout_s * 1000000
        r.idle_in_transaction_us = idle_in_transaction_s * 1000000
        r.query_timeout_us = query_timeout_s * 1000000
        r.transaction_timeout_us = transaction_timeout_s * 1000000
        r.has_notices = notice_after_ms >= 0
        if r.has_notices:
            r.notice_after_us = <uint64_t> notice_after_ms * 1000
            keep_text(&r.notice_waiting, notices[0])
            keep_text(&r.notice_served, notices[1])
            keep_text(&r.notice_served_end, notices[2])
        r.has_virtual = len(virtual_answers) > 0
        for i in range(len(virtual_answers)):
            keep_text(&r.virtual_answers[i], virtual_answers[i])
        r.words = self.e.process_words + counters.WORDS_PER_BLOCK * (1 + <uint64_t> route_id)
        r.times = (self.e.process_words + counters.RELAY_TIMES_AT
                   + counters.RELAY_TIME_WORDS * <uint64_t> route_id)
        r.waiting.gauge = r.words + counters.ROUTE_CLIENTS_WAITING
        r.active_clients.gauge = r.words + counters.ROUTE_CLIENTS_ACTIVE
        r.parked.gauge = r.words + counters.ROUTE_SERVERS_IDLE
        r.closing.gauge = r.words + counters.ROUTE_SERVERS_CLOSING
        r.resetting.gauge = r.words + counters.ROUTE_SERVERS_RESETTING
        if route_id in self.routes:
            command = self.command(COMMAND_CHANGE_ROUTE)
            command.route = self.route_of(route_id)
            command.change = r
        else:
            self.routes[route_id] = <uintptr_t> r
            command = self.command(COMMAND_ROUTE)
            command.route = r
        self.post(command)

    def outdate(self, uint32_t route_id, uint32_t epoch):
        """Replace the servers of a route whose epoch is lower: none of them is attached to a client again."""
        self.post(self.route_command(COMMAND_OUTDATE, route_id, epoch))

    def end_route(self, uint32_t route_id):
        """Drop the clients a route has now, each when it stands between transactions: EVENT_TEXT_WANTED."""
        self.post(self.route_command(COMMAND_END_ROUTE, route_id))

    def pause(self, uint32_t route_id, uint8_t mode):
        """Give no client of a route a server, by ``PauseMode``, or again."""
        self.post(self.route_command(COMMAND_PAUSE, route_id, mode))

    def kill_route(self, uint32_t route_id):
        """End all clients and servers of a route at once; the clients are told: EVENT_TEXT_WANTED."""
        self.post(self.route_command(COMMAND_KILL_ROUTE, route_id))

    def set_quiet_ends(self, bint has_quiet_ends):
        """Whether the end of a client may be told up to 10 ms later."""
        self.e.has_quiet_ends = has_quiet_ends

    def set_keep(self, uint32_t route_id, uint32_t count):
        """How many parked servers of the route pool_ttl spares."""
        self.route_of(route_id).keep = count

    def adopt_client(self, int fd, uint32_t route_id, uint64_t client_id, ParameterSet parameters not None, *,
                     bytes secret, bytes address, uint8_t family, uint16_t port, uint32_t names,
                     bint needs_setup, bytes pending, TlsSession tls=None, bint has_more=False):
        """Hand a client's socket over. Returns its handle.

        ``secret``: its cancel key, empty if the server's own is handed out later; ``address``: 4 or 16
        bytes, empty for a Unix socket; ``names``: what ``client`` gives back; ``pending``: bytes read
        beyond its login. ``tls``: its session, the relay's from now on; ``has_more``: bytes that came are
        still in it.
        """
        cdef Client* c
        cdef Command* command
        cdef Route* r = self.route_of(route_id)
        if len(secret) > 32 or len(address) > 16 or len(pending) > CHUNK:
            raise ValueError("too long")
        self.expect_tls(tls)
        c = self.new_client()
        c.conn.fd = fd
        c.conn.route = r
        c.conn.id = client_id
        c.conn.flags = IS_UNIX if family == 0 else 0
        c.params = params_hold(parameters._set)
        c.startup = params_hold(parameters._set) if r.maintain_params and not needs_setup else NULL
        c.pid = SYNTHETIC_PID | (self.worker << WORKER_SHIFT) | c.conn.index
        c.secret_size = <uint8_t> len(secret)
        memcpy(c.secret, PyBytes_AS_STRING(secret), len(secret))
        memcpy(c.address, PyBytes_AS_STRING(address), len(address))
        c.address_family = family
        c.port = port
        c.names = names
        if needs_setup:
            c.flags = IN_SETUP
        if pending:
            c.conn.hold = <Chunk*> malloc(sizeof(Chunk))
            if c.conn.hold == NULL:
                raise MemoryError
            memset(c.conn.hold, 0, 16)
            memcpy(c.conn.hold.data, PyBytes_AS_STRING(pending), len(pending))
            c.conn.hold.start = 0
            c.conn.hold.end = <uint32_t> len(pending)
        c.conn.born_us = clock_us()
        command = self.command(COMMAND_ADOPT_CLIENT)
        command.conn = &c.conn
        command.generation = c.conn.generation
        if tls is not None:
            c.conn.tls_facts = self.facts_index(tls)
            c.conn.tls = tls.give()
        if has_more:
            c.conn.flags |= IS_READABLE
        if needs_setup or pending or has_more:
            self.post(command)
        else:
            # Nothing to do before it speaks: its first bytes wake the relay, which looks at commands first.
            # The command must be there before the registration; the flag is the relay's from then on.
            c.conn.flags |= IS_REGISTERED
            self.post(command, is_quiet=True)
            if not conn_add(self.e, &c.conn):
                self.kill_client((<uint64_t> c.conn.generation << 32) | c.conn.index, REASON_CLIENT_GONE)
        return (<uint64_t> c.conn.generation << 32) | c.conn.index

    def reserve_pid(self):
        """The process id that the next adopted client will have."""
        cdef Client* c
        if not self.free_clients:
            c = self.new_client()
            self.free_clients.append(c.conn.index)
        cdef uint32_t index = self.free_clients[len(self.free_clients) - 1]
        return SYNTHETIC_PID | (self.worker << WORKER_SHIFT) | index

    def adopt_server(self, int fd, uint32_t route_id, uint64_t server_id, ParameterSet parameters not None,
                     ParameterSet initial not None, *, uint32_t pid, bytes secret, uint32_t slot,
                     uint32_t generation, uint64_t opened_us, uint64_t expires_us, uint64_t uses,
                     bint is_unix, bint is_new, uint32_t epoch=0, uint64_t client=0, TlsSession tls=None):
        """Hand a logged-in, idle server over; it serves whoever waits, or parks. Returns its handle.

        One that is not new may have prepared statements. On a dedicated route it is for ``client`` (a
        handle), and is closed when that waits no more. ``epoch``: of its route when it was opened.

        The caller keeps ``fd`` and closes it after EVENT_CLOSED or EVENT_RELEASED.
        """
        cdef Server* s
        cdef Command* command
        cdef Route* r = self.route_of(route_id)
        if len(secret) > 32:
            raise ValueError("cancel key too long")
        self.expect_tls(tls)
        s = self.new_server()
        s.conn.fd = fd
        s.conn.route = r
        s.conn.id = server_id
        s.conn.flags = IS_UNIX if is_unix else 0
        if tls is not None:
            s.conn.tls_facts = self.facts_index(tls)
            s.conn.tls = tls.give()
            s.conn.flags |= IS_READABLE     # what the login left in it
        s.conn.born_us = opened_us
        session_init(&s.session, c'I')
        s.params = params_hold(parameters._set)
        s.initial = params_hold(initial._set)
        s.pid = pid
        s.secret_size = <uint8_t> len(secret)
        memcpy(s.secret, PyBytes_AS_STRING(secret), len(secret))
        s.slot = slot
        s.slot_generation = generation
        s.expires_us = expires_us
        s.uses = uses
        s.epoch = epoch
        s.flags = 0 if is_new else HAS_STRAY_COPIES
        command = self.command(COMMAND_ADOPT_SERVER)
        if r.is_dedicated:
            command.client = self.client_at(<uint32_t> client)
            command.client_generation = <uint32_t> (client >> 32)
        command.conn = &s.conn
        command.generation = s.conn.generation
        self.post(command)
        return (<uint64_t> s.conn.generation << 32) | s.conn.index

    def start_client(self, uint64_t handle, bytes greeting, uint32_t pid, bytes secret):
        """After setup: send the end of the login and begin to read the client."""
        cdef Client* c = self.client_of(handle)
        cdef Command* command = self.command(COMMAND_START_CLIENT)
        command.conn = &c.conn
        command.generation = c.conn.generation
        command.pid = pid
        command.secret_size = <uint32_t> min(len(secret), 32)
        memcpy(command.secret, PyBytes_AS_STRING(secret), command.secret_size)
        self.attach_data(command, greeting)
        self.post(command)

    def inject(self, uint64_t handle, bytes data, bint close_after, uint8_t reason=0):
        """Send a client bytes at the next boundary of its stream; then close it, if asked."""
        cdef Client* c = self.client_of(handle)
        cdef Command* command = self.command(COMMAND_INJECT)
        command.conn = &c.conn
        command.generation = c.conn.generation
        command.is_close = close_after
        command.reason = reason
        self.attach_data(command, data)
        self.post(command)

    def begin_cancel(self, uint32_t pid, bytes secret):
        """Ask whose query a key names. The answer comes by ``poll`` under the token returned."""
        cdef Command* command
        cdef Client* c = NULL
        if len(secret) > 32 or not secret:
            return 0
        if pid & SYNTHETIC_PID:
            if (pid >> WORKER_SHIFT) & WORKER_MASK != self.worker:
                return 0
            c = self.client_at(pid & INDEX_MASK)
            if c == NULL:
                return 0
        command = self.command(COMMAND_BEGIN_CANCEL)
        command.conn = &c.conn if c != NULL else NULL
        command.pid = pid
        command.secret_size = <uint32_t> len(secret)
        memcpy(command.secret, PyBytes_AS_STRING(secret), len(secret))
        return self.post_for_reply(command)

    cdef uint64_t post_for_reply(self, Command* command):
        command.token = self.next_token
        command.has_reply = 1
        self.next_token += 1
        self.post(command)
        return self.next_token - 1

    def end_cancel(self, uint64_t handle):
        """A cancel request for this server is over (its connection has ended)."""
        cdef Server* s = self.server_at(<uint32_t> handle)
        cdef Command* command
        if s == NULL or s.conn.generation != handle >> 32:
            return
        command = self.command(COMMAND_END_CANCEL)
        command.conn = &s.conn
        command.generation = s.conn.generation
        self.post(command)

    def recall(self, uint32_t route_id, uint32_t count, bint is_eviction):
        """Give up servers of a route. The answer (now, later) comes by ``poll`` under the token."""
        cdef Command* command = self.route_command(COMMAND_RECALL, route_id, count)
        command.is_close = is_eviction
        return self.post_for_reply(command)

    def forget_recalls(self):
        """What was promised to a broker that is dead is not owed any more, on no route."""
        self.post(self.command(COMMAND_FORGET_RECALLS))

    def drop_idle(self, uint32_t count):
        """Drop up to ``count`` clients between transactions: EVENT_TEXT_WANTED.

        The answer, by ``poll`` under the token returned, is (dropped, left).
        """
        cdef Command* command = self.command(COMMAND_DROP_IDLE)
        command.count = count
        return self.post_for_reply(command)

    def connect_failed(self, uint32_t route_id, bytes error, bint only_setup):
        """Those who wait on the route get EVENT_TEXT_WANTED with the note ``error``.

        With ``only_setup`` only those who are not logged in yet.
        """
        cdef Command* command = self.route_command(COMMAND_CONNECT_FAILED, route_id)
        command.is_close = only_setup
        self.attach_data(command, error)
        self.post(command)

    def kill_client(self, uint64_t handle, uint8_t reason):
        """Close a client at once."""
        cdef Client* c = self.client_of(handle)
        cdef Command* command = self.command(COMMAND_KILL)
        command.conn = &c.conn
        command.generation = c.conn.generation
        command.reason = reason
        self.post(command)

    def end_client(self, uint64_t handle, uint8_t reason):
        """End a client: EVENT_TEXT_WANTED. What it runs is cancelled."""
        cdef Client* c = self.client_of(handle)
        cdef Command* command = self.command(COMMAND_KILL)
        command.conn = &c.conn
        command.generation = c.conn.generation
        command.reason = reason
        command.is_close = True
        self.post(command)

    def find_client(self, uint64_t client_id):
        """The handle of the client with this id; None when it is not here."""
        cdef uint32_t index
        cdef Client* c
        for index in range(<uint32_t> len(self.clients) * SLAB):
            c = self.client_at(index)
            if c.conn.id == client_id and c.conn.fd >= 0:
                return (<uint64_t> c.conn.generation << 32) | c.conn.index
        return None

    def close_server(self, uint64_t handle, uint8_t reason):
        """End a server: Terminate, wait for PostgreSQL, EVENT_CLOSED."""
        cdef Server* s = self.server_of(handle)
        cdef Command* command = self.command(COMMAND_KILL)
        command.conn = &s.conn
        command.generation = s.conn.generation
        command.reason = reason
        self.post(command)

    # -- events

    def poll(self):
        """What happened: a list of (kind, handle or route id or token, bits or reply).

        Kinds: ``"c"`` client, ``"s"`` server, ``"r"`` route with event bits; ``"="`` the reply to a
        command: (now, later, server handle); ``"l"`` rows that were asked for, and what ``list_…`` says. An
        object's events are merged since the last call.
        """
        cdef list result = []
        cdef Conn* conns[512]
        cdef uint32_t bits[512]
        cdef Conn* conn
        cdef Command* reply
        cdef Command* following
        cdef int count, i
        cdef uint64_t value
        # Before the flag goes: what is raised after that writes anew, and its wake-up must not be swallowed.
        read(self.e.event_fd, &value, sizeof(value))
        while True:
            count = 0
            pthread_mutex_lock(&self.e.lock)
            self.e.quiet_since_us = 0
            conn = self.e.events_head
            while conn != NULL and count < 512:
                conns[count] = conn
                bits[count] = conn.event_bits
                conn.event_bits = 0
                count += 1
                conn = conn.event_next
            self.e.events_head = conn
            if conn == NULL:
                self.e.events_tail = NULL
                self.e.is_python_woken = False
            reply = self.e.replies_head
            self.e.replies_head = NULL
            self.e.replies_tail = NULL
            pthread_mutex_unlock(&self.e.lock)
            for i in range(count):
                if conns[i].kind == KIND_ROUTE:
                    result.append(("r", conns[i].index, bits[i]))
                else:
                    result.append((
                        "c" if conns[i].kind == KIND_CLIENT else "s",
                        (<uint64_t> conns[i].generation << 32) | conns[i].index,
                        bits[i],
                    ))
            while reply != NULL:
                following = reply.next
                if reply.rows == NULL:
                    result.append(("=", reply.token, (reply.now, reply.later, reply.handle)))
                else:
                    result.append(("l", reply.token, (rows_of(reply), reply.later)))
                    free(reply.rows)
                free(reply)
                reply = following
            if conn == NULL:
                return result

    def texts(self):
        """What waits for the log since the last call: client handle, text, and what it is.

        That is None for a query, and for a slow request the fields of a ``client.slow.Slow``.
        """
        cdef list result = []
        cdef uint32_t header[4]
        cdef SlowRecord slow
        cdef size_t facts
        cdef uint64_t at = self.e.texts_read, end
        cdef size_t i
        cdef bytearray text
        pthread_mutex_lock(&self.e.lock)
        end = self.e.texts_written
        pthread_mutex_unlock(&self.e.lock)
        while at < end:
            for i in range(sizeof(header)):
                (<unsigned char*> header)[i] = self.e.texts[(at + i) % TEXT_RING]
            at += sizeof(header)
            facts = sizeof(slow) if header[0] == TEXT_SLOW else 0
            for i in range(facts):
                (<unsigned char*> &slow)[i] = self.e.texts[(at + i) % TEXT_RING]
            text = bytearray(header[1] - facts)
            for i in range(header[1] - facts):
                text[i] = self.e.texts[(at + facts + i) % TEXT_RING]
            at += header[1]
            result.append((
                (<uint64_t> header[3] << 32) | header[2],
                bytes(text),
                None if not facts else (
                    slow.wait_us, slow.server_us, slow.send_us, slow.server_id, slow.pid,
                    bool(slow.is_answered), slow.whole, slow.head,
                ),
            ))
        self.e.texts_read = at
        return result

    # -- rows for the console (listing.pxd)

    def list_clients(self, uint32_t at):
        """Ask for the adopted clients of the slice that begins with record ``at``.

        Returns a token, and where the next slice begins; None as a token at the end. The rows come by
        ``poll`` as they are, ``listing.ClientRow``: ``console.client_rows`` reads them.
        """
        return self.list_slice(COMMAND_LIST_CLIENTS, at, self.clients, sizeof(Client), sizeof(ClientRow))

    def list_servers(self, uint32_t at):
        """The same for servers; their rows come as dictionaries."""
        return self.list_slice(COMMAND_LIST_SERVERS, at, self.servers, sizeof(Server), sizeof(ServerRow))

    cdef tuple list_slice(self, uint8_t kind, uint32_t at, list slabs, size_t size, size_t row_size):
        cdef Command* command
        cdef uintptr_t slab
        if at // SLAB >= <uint32_t> len(slabs):
            return None, at
        slab = slabs[at // SLAB]
        command = self.command(kind)
        command.conn = <Conn*> (slab + at % SLAB * size)
        command.rows = calloc(SLICE, row_size)
        if command.rows == NULL:
            free(command)
            raise MemoryError
        return self.post_for_reply(command), at + SLICE

    def list_copies(self, uint64_t handle):
        """Ask for the names of the prepared statements that a server has. Returns a token.

        Raises KeyError for a stale handle.
        """
        cdef Server* s = self.server_of(handle)
        cdef Command* command = self.command(COMMAND_LIST_COPIES)
        command.conn = &s.conn
        command.generation = s.conn.generation
        command.rows = calloc(COPIES_MOST, sizeof(CopyRow))
        if command.rows == NULL:
            free(command)
            raise MemoryError
        return self.post_for_reply(command)

    def list_statements(self, uint32_t bucket):
        """Ask for prepared statements: (name, text, references).

        Returns a token. With the rows ``poll`` brings the bucket to go on with, 0 when these were the last.
        """
        cdef Command* command = self.command(COMMAND_LIST_STATEMENTS)
        command.count = bucket
        command.rows = calloc(STATEMENTS_MOST, sizeof(StatementRow))
        if command.rows == NULL:
            free(command)
            raise MemoryError
        return self.post_for_reply(command)

    cdef int expect_tls(self, TlsSession tls) except -1:
        """The relay is to have what a session needs; None: there is none."""
        if tls is not None and tls.has_records and self.e.crypto == NULL:
            self.e.crypto = crypto_new()
            if self.e.crypto == NULL:
                raise MemoryError
        return 0

    cdef uint8_t facts_index(self, TlsSession tls):
        cdef str text = str(tls.facts)
        if text not in self.tls_facts:
            if len(self.tls_facts) > 255:
                return 0
            self.tls_facts.append(text)
        return self.tls_facts.index(text)

    def tls_text(self, uint8_t index):
        """How a TLS session is shown; empty for a plain connection."""
        return self.tls_facts[index]

    def memory(self):
        """What the relay's memory holds, by kind: (bytes of one, how many are used, how many are free)."""
        cdef uint32_t params = 0, sets = 0, chunks_free = self.e.pool.count, chunks = self.e.pool.made
        params_counts(&params, &sets)
        cdef Py_ssize_t free_clients = len(self.free_clients), free_servers = len(self.free_servers)
        return {
            "client": (sizeof(Client), len(self.clients) * SLAB - free_clients, free_clients),
            "server": (sizeof(Server), len(self.servers) * SLAB - free_servers, free_servers),
            "chunk": (sizeof(Chunk), chunks - min(chunks, chunks_free), chunks_free),
            "parameter": (0, params, 0),
            "parameter_set": (0, sets, 0),
            "statement": (0, self.e.statements.count, 0),
        }

    # -- what records say

    def client(self, uint64_t handle):
        """A client's record as a dictionary. Raises KeyError for a stale handle."""
        cdef Client* c = self.client_of(handle)
        cdef Server* s = c.server
        return {
            "id": c.conn.id,
            "route": c.conn.route.id,
            "state": c.conn.state,
            "reason": c.conn.reason,
            "pid": c.pid,
            "names": c.names,
            "family": c.address_family,
            "address": packed_address(c),
            "port": c.port,
            "born_us": c.conn.born_us,
            "note": b"" if c.conn.note == NULL else (<char*> c.conn.note)[:c.conn.note_size],
            "secret": (<char*> c.secret)[:c.secret_size],
            "server": 0 if s == NULL else (<uint64_t> s.conn.generation << 32) | s.conn.index,
            "in_setup": bool(c.flags & IN_SETUP),
        }

    def client_parameters(self, uint64_t handle):
        """The parameters a client's session expects."""
        return wrap(self.e, &self.client_of(handle).params)

    def server(self, uint64_t handle):
        """A server's record as a dictionary. Raises KeyError for a stale handle."""
        cdef Server* s = self.server_of(handle)
        cdef Client* client = s.client
        return {
            "id": s.conn.id,
            "route": s.conn.route.id,
            "state": s.conn.state,
            "reason": s.conn.reason,
            "pid": s.pid,
            "secret": (<char*> s.secret)[:s.secret_size],
            "slot": s.slot,
            "generation": s.slot_generation,
            "pins": s.pins,
            "client": 0 if client == NULL else (<uint64_t> client.conn.generation << 32) | client.conn.index,
            "opened_us": s.conn.born_us,
            "expires_us": s.expires_us,
            "uses": s.uses,
        }

    def server_parameters(self, uint64_t handle):
        """(parameters now, parameters after its login)."""
        cdef Server* s = self.server_of(handle)
        return wrap(self.e, &s.params), wrap(self.e, &s.initial)

    def free_client(self, uint64_t handle):
        """Give a closed client's record back; its handle is stale from now on.

        Returns what remains to be said of it: client id, route id, reason, index of its names, address
        family, address (packed), port, how long it was here in microseconds.
        """
        cdef Client* c = self.client_of(handle)
        cdef tuple last = (
            c.conn.id, c.conn.route.id, c.conn.reason, c.names, c.address_family, packed_address(c), c.port,
            c.conn.since_us - c.conn.born_us,
        )
        params_release(c.params)
        params_release(c.startup)
        c.params = NULL
        c.startup = NULL
        if c.conn.note != NULL:
            free(c.conn.note)
            c.conn.note = NULL
        c.conn.generation += 1
        c.conn.state = 0
        self.free_clients.append(c.conn.index)
        return last

    def free_server(self, uint64_t handle):
        """Give a closed or released server's record back."""
        cdef Server* s = self.server_of(handle)
        params_release(s.params)
        params_release(s.initial)
        session_free(&s.session)
        if s.conn.note != NULL:
            free(s.conn.note)
            s.conn.note = NULL
        s.conn.generation += 1
        s.conn.state = 0
        self.free_servers.append(s.conn.index)
