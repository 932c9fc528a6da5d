"""What Python asks of the relay."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t, uint8_t
from libc.stdlib cimport free
from libc.string cimport memcpy

from gpooler.relay cimport counters
from gpooler.relay.reason cimport (
    REASON_CLIENT_CANCELLED, REASON_CLIENT_GONE, REASON_CLIENT_KILLED, REASON_SERVER_CLIENT_LEFT,
    REASON_SERVER_CONNECT, REASON_SERVER_LOST, REASON_SERVER_OBSOLETE, REASON_SERVER_RECALLED,
    REASON_SHUTDOWN,
)
from gpooler.relay.session cimport OWNER_ASK, OWNER_DEPLOY, session_is_idle, session_owner
from gpooler.relay.system cimport pthread_mutex_lock, pthread_mutex_unlock


# -- cancel --------------------------------------------------------------------------------------------


cdef bint same_secret(const unsigned char* a, uint32_t a_size, const unsigned char* b,
                      uint32_t b_size) noexcept nogil:
    """Constant time in the content."""
    cdef uint32_t i
    cdef unsigned char difference = 0
    if a_size != b_size or a_size == 0:
        return False
    for i in range(a_size):
        difference |= a[i] ^ b[i]
    return difference == 0


cdef void begin_cancel(Engine* e, Command* command) noexcept nogil:
    """Find the query that a key names. Reply: now = 1 a server is marked, 2 all is done here."""
    cdef Client* c = <Client*> command.conn
    cdef Route* r
    cdef Conn* at
    cdef Server* s
    command.now = 0
    if c != NULL:
        if (c.conn.state == CLIENT_CLOSED or c.conn.fd < 0 or c.pid != command.pid
                or not same_secret(c.secret, c.secret_size, command.secret, command.secret_size)):
            return
    else:
        # the real process id of a session pool's server
        r = e.routes
        while r != NULL and c == NULL:
            at = r.active.head
            while at != NULL:
                s = <Server*> at
                if (s.pid == command.pid and s.client != NULL and s.client.pid == command.pid
                        and same_secret(s.secret, s.secret_size, command.secret, command.secret_size)):
                    c = s.client
                    break
                at = at.following
            r = r.next
        if c == NULL:
            return
    if c.flags & IN_SETUP or c.flags & IS_HELD:
        return
    if c.server != NULL:
        s = c.server
        if session_is_idle(&s.session) or session_owner(&s.session) == OWNER_ASK and s.session.length == 1:
            return
        c.conn.route.words[counters.ROUTE_CANCELS] += 1
        if session_owner(&s.session) == OWNER_DEPLOY or session_owner(&s.session) == OWNER_ASK:
            # Now it would hit our own query, and the client's behind it would run.
            s.flags |= CANCEL_AFTER_DEPLOY
            command.now = 2
            return
        s.cancelling += 1
        command.now = 1
        command.handle = (<uint64_t> s.conn.generation << 32) | s.conn.index
    elif c.conn.state == CLIENT_WAITING:
        c.conn.route.words[counters.ROUTE_CANCELS] += 1
        command.now = 2
        leave_queue(e, c)
        c.wait_us = 0                   # its next request waits anew
        refuse_request(e, c, REASON_CLIENT_CANCELLED)


cdef void end_cancel(Engine* e, Server* s) noexcept nogil:
    if s.cancelling:
        s.cancelling -= 1
    if s.cancelling:
        return
    if s.client != NULL:
        if not s.client.flags & IN_SETUP:
            maybe_detach(e, s)
    elif s.conn.state == SERVER_RESETTING and not s.conn.rx.left and s.conn.hold == NULL:
        settle(e, s)


# -- commands ------------------------------------------------------------------------------------------


cdef void adopt_client(Engine* e, Client* c) noexcept nogil:
    cdef Route* r = c.conn.route
    if c.conn.hold != NULL:
        e.pool.made += 1                # the hub's: it sent something behind its login
    if c.flags & IN_SETUP:
        list_append(&r.idle, &c.conn)
        c.conn.state = CLIENT_IDLE
    else:
        move(e, &c.conn, &r.idle, CLIENT_IDLE)
    clients_gauge(r)
    if c.conn.tls != NULL:
        note_fat(e, &c.conn)            # its handshake was larger than most of what follows
    if not c.conn.flags & IS_REGISTERED and not conn_register(e, &c.conn):
        client_leave(e, c, REASON_CLIENT_GONE)
        return
    if c.flags & IN_SETUP:
        setup_begin(e, c)
    else:
        client_work(e, c)


cdef void adopt_server(Engine* e, Server* s, Client* c, uint32_t generation) noexcept nogil:
    list_append(&s.conn.route.parked, &s.conn)
    s.conn.state = SERVER_PARKED
    s.plans = s.conn.route.plans        # it has parsed nothing yet, or nothing that is known
    s.conn.since_us = e.now_us
    if not conn_register(e, &s.conn):
        server_lost(e, s)
    # What it said on its way here is heard before anybody gets it: it may be its end.
    while s.conn.state == SERVER_PARKED and not is_alive(s):
        look_at_parked(e, s)
    if s.conn.route.is_dedicated:
        dedicate(e, s, c, generation)
    elif s.conn.state == SERVER_PARKED:
        settle(e, s)


cdef void dedicate(Engine* e, Server* s, Client* c, uint32_t generation) noexcept nogil:
    """A server that was opened for one client is that client's, or nobody's."""
    cdef bint is_awaited = c != NULL and c.conn.generation == generation and c.conn.state == CLIENT_WAITING
    if s.conn.state != SERVER_PARKED:
        if is_awaited:
            leave_queue(e, c)
            want_text(e, c, REASON_SERVER_LOST)
    elif is_awaited:
        serve(e, c, s)
    else:
        server_close(e, s, REASON_SERVER_CLIENT_LEFT)


cdef void do_inject(Engine* e, Client* c, Command* command) noexcept nogil:
    if c.conn.inject != NULL:
        free(c.conn.inject)
    c.conn.inject = command.data
    c.conn.inject_size = command.size
    command.data = NULL
    if command.is_close:
        c.flags |= CLOSE_WHEN_SENT
        if command.reason:
            c.conn.reason = command.reason
    inject_now(e, c)


cdef void do_start(Engine* e, Client* c, Command* command) noexcept nogil:
    c.flags &= ~<uint32_t> IS_HELD
    if not conn_send(e, &c.conn, command.data, command.size):
        client_leave(e, c, REASON_CLIENT_GONE)
        return
    c.pid = command.pid
    if command.secret_size:
        memcpy(c.secret, command.secret, command.secret_size)
        c.secret_size = <uint8_t> command.secret_size
    client_work(e, c)
    if c.conn.flags & IS_HUNG_UP and can_read_client(c):
        make_ready(e, &c.conn)


cdef void do_recall(Engine* e, Command* command) noexcept nogil:
    """Give up servers: parked ones now, others at their next release. Reply: how many of each."""
    cdef Route* r = command.route
    cdef uint32_t wanted = command.count
    cdef Server* s
    cdef uint32_t busy, promised
    command.now = 0
    while wanted and r.parked.tail != NULL:
        s = <Server*> r.parked.tail
        if s.conn.flags & (IS_READABLE | IS_HUNG_UP):
            look_at_parked(e, s)
            if s.conn.state != SERVER_PARKED:
                continue
        if command.is_close or s.conn.rx.left or s.conn.hold != NULL or s.conn.tls != NULL:
            server_close(e, s, REASON_SERVER_RECALLED)
        else:
            server_release(e, s)
        wanted -= 1
        command.now += 1
    busy = r.active.count + r.resetting.count
    promised = r.recall_due + r.evict_due
    busy = busy - promised if busy > promised else 0
    command.later = wanted if wanted < busy else busy
    if command.is_close:
        r.evict_due += command.later
    else:
        r.recall_due += command.later


cdef void do_forget_recalls(Engine* e) noexcept nogil:
    """The broker that wanted servers back is dead, and its successor is owed nothing."""
    cdef Route* r = e.routes
    while r != NULL:
        r.recall_due = 0
        r.evict_due = 0
        r = r.next


cdef bint is_between(Client* c) noexcept nogil:
    """Whether a client stands between transactions, with nothing asked."""
    if c.flags & (IN_SETUP | IS_HELD) or c.conn.rx.left or c.conn.hold != NULL or c.conn.out.size:
        return False
    if c.conn.state == CLIENT_IDLE:
        return True
    return (c.conn.state == CLIENT_ACTIVE and session_is_idle(&c.server.session)
            and c.server.session.status == c'I')


cdef void drop(Engine* e, Client* c) noexcept nogil:
    client_unbind(e, c)
    want_text(e, c, REASON_SHUTDOWN)


cdef void do_drop_idle(Engine* e, Command* command) noexcept nogil:
    """Drop up to `count` clients between transactions, now or soon: Python says goodbye to each."""
    cdef Route* r = e.routes
    cdef Conn* at
    cdef Conn* following
    cdef Client* c
    cdef int which
    command.now = 0
    command.later = 0
    while r != NULL:
        for which in range(2):
            at = r.idle.head if which == 0 else r.active_clients.head
            while at != NULL and command.now < command.count:
                following = at.following
                c = <Client*> at
                if is_between(c):
                    command.now += 1
                    drop(e, c)
                at = following
        command.later += r.idle.count + r.active_clients.count + r.waiting.count + r.leaving.count
        r = r.next
    if command.count:
        e.drops_due = command.count - command.now


cdef void swap_text(Text* text, Text* new) noexcept nogil:
    cdef Text old = text[0]
    if new.data != NULL:                # one that was told that it waits is still to be told how long
        text[0] = new[0]
        new[0] = old


cdef void do_change_route(Engine* e, Route* r, Route* new) noexcept nogil:
    """Limits and switches that no session rests on; the rest of `new` is what `r` has."""
    r.can_cancel = new.can_cancel
    r.can_rollback = new.can_rollback
    r.attach_check = new.attach_check
    r.log_query = new.log_query
    r.slow_us = new.slow_us
    r.drops_old_plans = new.drops_old_plans
    r.max_copies = new.max_copies
    r.max_names_bytes = new.max_names_bytes
    r.pool_timeout_us = new.pool_timeout_us
    r.pool_ttl_us = new.pool_ttl_us
    r.reset_timeout_us = new.reset_timeout_us
    r.login_timeout_us = new.login_timeout_us
    r.idle_timeout_us = new.idle_timeout_us
    r.idle_in_transaction_us = new.idle_in_transaction_us
    r.query_timeout_us = new.query_timeout_us
    r.transaction_timeout_us = new.transaction_timeout_us
    r.has_notices = new.has_notices
    r.notice_after_us = new.notice_after_us
    swap_text(&r.notice_waiting, &new.notice_waiting)
    swap_text(&r.notice_served, &new.notice_served)
    swap_text(&r.notice_served_end, &new.notice_served_end)
    if r.waiting.head != NULL:
        deadline(e, e.now_us)           # those who wait have other limits now


cdef void free_route(Route* r) noexcept nogil:
    """One that never entered the relay's list."""
    cdef size_t i
    free(r.discard_query.data)
    free(r.notice_waiting.data)
    free(r.notice_served.data)
    free(r.notice_served_end.data)
    for i in range(sizeof(r.virtual_answers) // sizeof(Text)):
        free(r.virtual_answers[i].data)
    free(r)


cdef void do_outdate(Engine* e, Route* r, uint32_t epoch) noexcept nogil:
    """Servers that were opened before are closed, the busy ones when their clients let them go."""
    cdef Conn* at = r.parked.head
    cdef Conn* following
    r.epoch = epoch
    while at != NULL:
        following = at.following
        if (<Server*> at).epoch < epoch:
            server_close(e, <Server*> at, REASON_SERVER_OBSOLETE)
        at = following


cdef void do_pause(Engine* e, Route* r, uint8_t pause) noexcept nogil:
    """Give nobody a server from now on, or let those who wait have them again."""
    cdef Conn* at
    cdef Server* s
    if r.is_dedicated or r.pause == pause:
        return
    r.pause = pause
    if pause != PAUSE_NONE:
        if r.has_demand:
            r.has_demand = 0
            raise_event(e, &r.conn, EVENT_CALM)
        while pause == PAUSE_CLOSE and r.parked.head != NULL:
            server_close(e, <Server*> r.parked.head, REASON_SERVER_OBSOLETE)
        return
    at = r.waiting.head
    while at != NULL:
        at.since_us = e.now_us              # pool_timeout begins anew: it was not the pool that was busy
        at = at.following
    while r.waiting.head != NULL and r.parked.head != NULL:
        s = take_parked(e, <Client*> r.waiting.head)
        if s == NULL:
            break
        serve(e, <Client*> r.waiting.head, s)
        if s.conn.state == SERVER_PARKED:
            settle(e, s)
    if r.waiting.head != NULL:
        note_wait(e, r)
        if r.pool_timeout_us:
            deadline(e, e.now_us + r.pool_timeout_us)
        if not r.has_demand:
            r.has_demand = 1
            raise_event(e, &r.conn, EVENT_DEMAND)


cdef void kill_server(Engine* e, Server* s, uint8_t reason) noexcept nogil:
    """End a server, and the connection of the client that has it."""
    cdef Client* c = s.client
    if c != NULL:
        if c.asked != NULL:
            slow_stop(e, c, s)
            slow_end(e, c)
        s.client = NULL
        c.server = NULL
        if s.conn.rx.left and not s.flags & IS_SWALLOWING:
            leave_when_sent(e, c, reason)   # it got a message in part
        else:
            want_text(e, c, reason)
    server_close(e, s, reason)


cdef void end_client(Engine* e, Client* c, uint8_t reason) noexcept nogil:
    """End a client that is told why."""
    if c.conn.state == CLIENT_WAITING:
        leave_queue(e, c)
    if c.conn.state < CLIENT_LEAVING:
        part_with_text(e, c, reason)


cdef void do_kill_route(Engine* e, Route* r) noexcept nogil:
    """End all clients and servers at once."""
    while r.waiting.head != NULL:
        leave_queue(e, <Client*> r.waiting.head)
    while r.active.head != NULL:
        kill_server(e, <Server*> r.active.head, REASON_CLIENT_KILLED)
    while r.idle.head != NULL:
        want_text(e, <Client*> r.idle.head, REASON_CLIENT_KILLED)
    while r.resetting.head != NULL:
        server_close(e, <Server*> r.resetting.head, REASON_CLIENT_KILLED)
    while r.parked.head != NULL:
        server_close(e, <Server*> r.parked.head, REASON_CLIENT_KILLED)


cdef void drop_all(Engine* e, Route* r) noexcept nogil:
    """Drop the clients whose time is over and who stand between transactions, or wait for a server."""
    cdef Conn* at
    cdef Conn* following
    cdef int which
    cdef bint is_over = True
    for which in range(3):      # those who wait first: nobody is given a server that another leaves
        at = r.waiting.head if which == 0 else r.idle.head if which == 1 else r.active_clients.head
        while at != NULL:
            following = at.following
            if at.born_us >= r.ended_us:
                pass
            elif which == 0:
                leave_queue(e, <Client*> at)
                want_text(e, <Client*> at, REASON_SHUTDOWN)
            elif is_between(<Client*> at):
                drop(e, <Client*> at)
            else:
                is_over = False
            at = following
    if is_over:
        r.ended_us = 0


cdef void do_connect_failed(Engine* e, Command* command) noexcept nogil:
    """No server could be opened: those who wait get the error (all, or those still in setup)."""
    cdef Route* r = command.route
    cdef Conn* at = r.waiting.head
    cdef Conn* following
    cdef Client* c
    while at != NULL:
        following = at.following
        c = <Client*> at
        if not command.is_close or c.flags & IN_SETUP:
            leave_queue(e, c)
            set_note(at, command.data, command.size)
            want_text(e, c, REASON_SERVER_CONNECT)
        at = following


cdef void run_command(Engine* e, Command* command) noexcept nogil:
    cdef Conn* conn = command.conn
    if command.kind == COMMAND_STOP:
        e.is_stopping = True
    elif command.kind == COMMAND_ROUTE:
        command.route.next = e.routes
        e.routes = command.route
    elif command.kind == COMMAND_CHANGE_ROUTE:
        do_change_route(e, command.route, command.change)
    elif command.kind == COMMAND_OUTDATE:
        do_outdate(e, command.route, command.count)
    elif command.kind == COMMAND_END_ROUTE:
        command.route.ended_us = e.now_us
        drop_all(e, command.route)
    elif command.kind == COMMAND_PAUSE:
        do_pause(e, command.route, <uint8_t> command.count)
    elif command.kind == COMMAND_KILL_ROUTE:
        do_kill_route(e, command.route)
    elif command.kind == COMMAND_RECALL:
        do_recall(e, command)
    elif command.kind == COMMAND_FORGET_RECALLS:
        do_forget_recalls(e)
    elif command.kind == COMMAND_DROP_IDLE:
        do_drop_idle(e, command)
    elif command.kind == COMMAND_CONNECT_FAILED:
        do_connect_failed(e, command)
    elif command.kind == COMMAND_BEGIN_CANCEL:
        begin_cancel(e, command)
    elif command.kind == COMMAND_LIST_CLIENTS:
        do_list_clients(command)
    elif command.kind == COMMAND_LIST_SERVERS:
        do_list_servers(command)
    elif command.kind == COMMAND_LIST_STATEMENTS:
        do_list_statements(e, command)
    elif conn.generation != command.generation:
        return
    elif command.kind == COMMAND_ADOPT_CLIENT:
        adopt_client(e, <Client*> conn)
    elif command.kind == COMMAND_ADOPT_SERVER:
        adopt_server(e, <Server*> conn, command.client, command.client_generation)
    elif conn.fd < 0:
        return
    elif command.kind == COMMAND_LIST_COPIES:
        do_list_copies(<Server*> conn, command)
    elif command.kind == COMMAND_START_CLIENT:
        do_start(e, <Client*> conn, command)
    elif command.kind == COMMAND_INJECT:
        do_inject(e, <Client*> conn, command)
    elif command.kind == COMMAND_END_CANCEL:
        if conn.state < SERVER_CLOSING:
            end_cancel(e, <Server*> conn)
    elif command.kind == COMMAND_KILL:
        if conn.kind == KIND_CLIENT and command.is_close:
            end_client(e, <Client*> conn, command.reason)
        elif conn.kind == KIND_CLIENT:
            client_leave(e, <Client*> conn, command.reason)
        else:
            kill_server(e, <Server*> conn, command.reason)


cdef void run_commands(Engine* e) noexcept nogil:
    cdef Command* command
    cdef Command* following
    cdef bint wake
    pthread_mutex_lock(&e.lock)
    command = e.commands_head
    e.commands_head = NULL
    e.commands_tail = NULL
    e.is_relay_woken = False
    pthread_mutex_unlock(&e.lock)
    while command != NULL:
        following = command.next
        run_command(e, command)
        command.next = NULL
        if command.data != NULL:
            free(command.data)
            command.data = NULL
        if command.change != NULL:
            free_route(command.change)
            command.change = NULL
        if command.has_reply:
            pthread_mutex_lock(&e.lock)
            if e.replies_tail != NULL:
                e.replies_tail.next = command
            else:
                e.replies_head = command
            e.replies_tail = command
            wake = not e.is_python_woken
            e.is_python_woken = True
            pthread_mutex_unlock(&e.lock)
            if wake:
                wake_python(e)
        else:
            free(command)
        command = following
