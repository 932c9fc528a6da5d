"""The data plane: one thread without the GIL that owns every running client and server.

Read this file as the design; ``engine.pyx`` and the files that it includes are its code.

Ownership. Python takes a record from a slab, fills it and posts an ADOPT command; from then on the
relay thread alone writes it, until it raises EVENT_CLOSED (clients, servers) or EVENT_RELEASED
(servers) for it; then Python reads what it wants to log and gives the record back. A handle is
(generation << 32 | index): a command for an older generation is a no-op.

Lists. A client or server is in exactly one list of its route, and that list is its state. Gauges in
shared memory are the lengths of these lists.

    client   idle ── a request arrives ──► waiting ── a server is free ──► active ──► idle …
             any ──► leaving (flush a last message, then wait for its FIN) ──► closed
    server   parked ◄─► active ──► resetting ──► parked | released | closing ──► closed
             (on a dedicated route: active, for one client, then closing)

Edges. Sockets are registered once, edge-triggered; EPOLLOUT is asked for only while something is
queued. An edge that cannot be used now leaves IS_READABLE set; whoever removes the obstacle puts the
connection on the ready list.

Texts. The relay writes no sentence: it raises EVENT_TEXT_WANTED with a reason and Python injects the
error. What the relay says by itself: ReadyForQuery for a lone Sync, ParameterStatus as a probe.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from gpooler.relay.io cimport READ_SIZE, Chunk, ChunkPool, Queue, iovec
from gpooler.relay.params cimport ParamSet
from gpooler.relay.prepared cimport Changes, Copies, Names, Statements
from gpooler.relay.records cimport Crypto
from gpooler.relay.scanner cimport Scan
from gpooler.relay.frame cimport Frame
from gpooler.relay.session cimport Session
from gpooler.relay.system cimport pthread_mutex_t
from gpooler.relay.tls cimport Tls


cdef enum:
    MAX_EVENTS = 256
    SLAB = 256                      # records allocated at once
    SWEEP_US = 1000000
    CALM_US = 300000                # a queue that was empty for so long is over
    LEAVE_US = 1000000              # a client that got its last bytes has this long to close
    STUCK_US = 5000000              # PostgreSQL has this long to end a process that was told to go
    ATTACH_CHECK_US = 1000000       # a server parked longer than this is looked at before use
    QUIET_US = 50000                # the end of a client may reach the hub this much later: many at once
    # Gathering: after so many bytes of one request a stream that comes in small pieces is read in large ones.
    GATHER_FROM = 4194304
    GATHER_SIZE = 131072            # wakes the relay …
    GATHER_US = 500                 # … or so much time since the last read
    GATHER_LEAST = 16384            # less by then: it was the end, or the stream is slow
    MAX_GATHERING = 64
    # bytes of names of settings; with more of them the client keeps its server
    MAX_TOUCHED = 1024
    CIPHER = READ_SIZE + 65536      # what one read of plain bytes becomes under TLS
    SLIM_US = 1000000               # so long after its last use a TLS session gives its memory back
    SCRATCH = 65536                 # messages for a server that no client sent so
    TEXT_RING = 1048576             # bytes of query texts on their way to the log
    TEXT_MAX = 8192                 # of one query text
    # slow.pxi: texts of so many requests of a client that are not answered yet, and so much of each
    ASKED_TEXTS = 8
    ASKED_TEXT = 2000
    WORKER_SHIFT = 22               # a synthetic process id: bit 30, eight bits worker, the client's index
    WORKER_MASK = 0xff
    SYNTHETIC_PID = 1 << 30
    INDEX_MASK = (1 << 22) - 1


cdef struct Conn
cdef struct Client
cdef struct Server
cdef struct Route


cdef enum ConnKind:
    KIND_WAKE = 0
    KIND_CLIENT = 1
    KIND_SERVER = 2
    KIND_ROUTE = 3              # routes share the event list


cdef enum ClientState:
    CLIENT_IDLE = 1             # no server, nothing asked
    CLIENT_WAITING = 2          # in the queue
    CLIENT_ACTIVE = 3           # has a server
    CLIENT_LEAVING = 4          # gets its last bytes, or waits for Python's text
    CLIENT_CLOSED = 5


cdef enum ServerState:
    SERVER_PARKED = 1
    SERVER_ACTIVE = 2           # has a client
    SERVER_RESETTING = 3        # its client is gone; brought back to a clean state
    SERVER_CLOSING = 4          # told to go; PostgreSQL has not closed yet
    SERVER_RELEASED = 5         # given up to Python for another worker
    SERVER_CLOSED = 6


cdef enum ConnFlag:
    IS_READABLE = 1             # an edge came that is not consumed
    IS_HUNG_UP = 2              # EPOLLRDHUP: read to the end even after a short read
    IS_READY = 4                # on the ready list
    IS_UNIX = 8
    IS_OUT_ARMED = 16           # EPOLLOUT is registered
    IS_REGISTERED = 32
    IS_GATHERING = 64           # SO_RCVLOWAT is set, a timer runs


cdef enum ClientFlag:
    IN_SETUP = 1                # takes a server before it is told that it is logged in
    IS_HELD = 2                 # set up, or waiting for Python's text: not read
    IS_SCANNING = 4             # the current message goes through the scanner
    IS_DROPPING = 8             # the current message goes nowhere
    IS_SKIPPING = 16            # its request was refused: drop up to the next Sync
    IS_HALF_CLOSED = 32         # FIN seen; may still read answers
    IS_TERMINATED = 64          # sent Terminate while answers are owed
    HAS_SPOKEN = 128            # sent anything to its server since attach
    CLOSE_WHEN_SENT = 256
    TEXT_THEN_SKIP = 512        # after Python's text drop the refused request
    IS_BLOCKED = 1024           # a held request waits for earlier answers
    AWAITS_DEPLOY = 2048        # … for the answer to its parameters
    SKIPS_TO_SYNC = 4096        # IS_SKIPPING, and a Query does not end it
    HAS_UNBOUND = 8192          # sent a Parse, and no Bind since: it may come in a later group
    MAY_MEET_UNNAMED = 16384    # its server may have a stranger's unnamed statement
    NEEDS_DEPLOY = 32768        # what it expects is not what its server has, before its next request
    CHANGES_LEXIS = 65536       # sent a Parse after which other texts may be read otherwise
    UNCHECKED = 131072          # ran something since its server was last asked what its session has
    SENT_AGAIN = 262144         # its request went out a second time, and is not answered yet
    HAS_NEW_NAMES = 524288      # its request prepares or closes statements
    HAS_PARSED = 1048576        # HAS_UNBOUND, and a Parse since was answered
    HAS_BEGUN = 2097152         # its BEGIN was answered and goes to its next server
    HAS_FAILED = 4194304        # HAS_BEGUN, and a request since was refused: its transaction counts as failed
    HAS_BARE_NAME = 8388608     # gave itself an application_name, to which its host is to be added


cdef enum ServerFlag:
    CLOSE_AT_END = 1            # never park again
    IS_SWALLOWING = 2           # the current message is ours
    DEPLOY_FAILED = 4
    RESET_FAILED = 8
    HAS_ROLLED_BACK = 16
    HAS_DISCARDED = 32
    SYNC_SENT = 64
    IS_DIRTY = 128              # must be discarded before parking
    CANCEL_ASKED = 256
    SAID_TERMINATE = 512
    IS_LOST = 1024
    FATAL_SEEN = 2048           # an ErrorResponse out of place reached the client
    HAS_CUT_MESSAGE = 4096      # stands inside a message of a client that is gone: nothing may be appended
    CANCEL_AFTER_DEPLOY = 8192  # its client's query is to be cancelled as soon as it runs
    HAS_STRAY_COPIES = 16384    # it may have prepared statements that `copies` does not know
    HAS_RESETS = 32768          # `touched` has entries that lead back to the client's startup values
    TOUCHED_FAILED = 65536      # an error came since: which entries took effect only PostgreSQL knows
    IS_CLEARED = 131072         # DISCARD ALL was sent, and nothing with an effect after it
    HAS_PLACED = 262144         # an empty statement waits for its DEALLOCATE: an error would leave it there
    AWAITS_TAG = 524288         # DEALLOCATE ALL or DISCARD ALL was sent: its CommandComplete is looked at
    NEEDS_CHECK = 1048576       # something opaque ran: the server is to be asked what its session has
    HAS_OLD_PLAN = 2097152      # reported that a cached plan must not change its result type
    HAS_REAL_NAMES = 4194304    # prepared statements may be left under names of clients
    ENDED_UNSEEN = 8388608      # said goodbye before any answer; its client does not know
    PARSES_ANEW = 16777216      # ran into an old plan; its client does not know


cdef enum PoolMode:
    MODE_SESSION = 0
    MODE_TRANSACTION = 1
    MODE_STATEMENT = 2


cdef enum DiscardMode:
    DISCARD_DIRTY = 0           # pool_discard unset
    DISCARD_ALWAYS = 1
    DISCARD_NEVER = 2


cdef enum StateMode:            # session_state
    STATE_PIN = 0
    STATE_REFUSE = 1
    STATE_ALLOW = 2


cdef enum CheckMode:            # session_state_check
    CHECK_OFF = 0
    CHECK_OPAQUE = 1
    CHECK_ALWAYS = 2


cdef enum PauseMode:
    PAUSE_NONE = 0
    PAUSE_KEEP = 1              # nobody is given a server
    PAUSE_CLOSE = 2             # and those that become free are closed


cdef enum EventBit:
    EVENT_CLOSED = 1
    EVENT_TEXT_WANTED = 2       # client: Python injects an error for conn.reason
    EVENT_READY = 4             # client: setup is done
    EVENT_RELEASED = 16         # server: give it to the broker
    EVENT_CANCEL_WANTED = 32    # server: send a cancel request, then end_cancel
    EVENT_PARAMS = 64           # server: reported new values while parked
    EVENT_STUCK = 128           # server: closing takes too long
    EVENT_PINNED = 256          # server: bound to its client; for the log
    EVENT_DEMAND = 512          # route: clients wait and nothing is parked
    EVENT_CALM = 1024           # route: nobody waited for CALM_US
    EVENT_CLOSING = 2048        # server: told to go, for the broker and the log


cdef enum TextKind:             # of what waits for the log
    TEXT_QUERY = 0
    TEXT_SLOW = 1               # a SlowRecord, then text


cdef struct SlowRecord:         # of one request; its text follows, head and tail
    uint64_t wait_us
    uint64_t server_us
    uint64_t send_us
    uint64_t server_id
    uint32_t pid                # of PostgreSQL's process
    uint32_t whole              # size of the text; head and tail are less where it is long
    uint32_t head
    uint32_t tail
    uint8_t is_answered


cdef struct AskedText:
    uint32_t number             # of the request it belongs to, counted by sync points; 0 none
    uint32_t whole
    uint32_t head
    uint32_t tail
    unsigned char text[ASKED_TEXT]


cdef struct Asked:              # what a client has asked for (slow.pxi)
    uint64_t came_us            # the first request since attach, where it had to wait; 0 it had not
    # the oldest request that is not answered went out, or the one before it was answered
    uint64_t sent_us
    uint64_t queued_us          # bytes for the client are queued since
    uint64_t held_us            # … and were before, while the server worked on that request
    uint32_t count              # sync points sent
    uint32_t number             # of the request measured
    uint8_t is_open             # a request has begun, and its sync point was not sent yet
    uint8_t is_measured         # `record` is that of an answer that the client may not have yet
    SlowRecord record
    AskedText texts[ASKED_TEXTS]


cdef struct Text:               # bytes that Python made for a route (malloc)
    unsigned char* data
    uint32_t size


cdef struct List:
    Conn* head
    Conn* tail
    uint32_t count
    uint64_t* gauge


cdef struct Conn:               # what client and server share; always first in both
    int fd
    uint8_t kind
    uint8_t state
    uint16_t flags              # ConnFlag
    uint32_t index
    uint32_t generation
    uint32_t event_bits
    uint8_t reason              # reasons.Reason
    uint8_t tls_facts           # Python's index of how its TLS session is shown; 0 plain
    uint32_t bulk               # bytes of this request that came in small pieces, up to GATHER_FROM
    uint64_t gather_us          # while gathering: when to read at the latest
    Frame rx                    # the stream this peer sends
    Chunk* hold                 # its bytes that could not be used yet; they start at a boundary
    Queue out                   # bytes for this peer that it did not take yet, as they go over the wire
    Tls* tls                    # NULL: plain
    List* list
    Conn* previous
    Conn* following
    Conn* event_next
    Conn* ready_next
    Route* route
    uint64_t since_us           # entered its state
    uint64_t born_us
    unsigned char* note         # bytes for Python (malloc)
    uint32_t note_size
    # what arrives for the client or goes to the server from Python, until a boundary (malloc)
    unsigned char* inject
    uint32_t inject_size
    uint64_t id                 # the 48 bits behind the letter c or s


cdef struct Client:
    Conn conn
    Server* server
    ParamSet* params            # what its session expects
    ParamSet* startup           # what it began with; NULL until it is logged in
    Server* last_server
    uint32_t last_generation
    uint32_t flags              # ClientFlag
    uint8_t secret_size
    uint8_t address_family      # 0 Unix, 4, 6
    uint16_t port
    uint16_t refusal            # Reason why Python refuses a request
    uint8_t is_noticed          # was told that it waits, and will be told when it does no more
    Scan scan
    unsigned char address[16]
    unsigned char secret[32]
    uint32_t pid                # the process id it was given
    uint32_t names              # Python's index of (database, user) as the client named them
    uint64_t request_us         # last read from, or took the last byte queued for it
    uint64_t wait_us            # began to wait for a server; 0 not since the last request
    Names* prepared             # NULL before the first
    Chunk* request              # what it sent, until the answer begins; NULL: it cannot be sent again
    Asked* asked                # for the slow-request log, while a request runs (malloc); NULL else


cdef struct Server:
    Conn conn
    Client* client
    ParamSet* params            # what its session has
    ParamSet* initial           # what it reported at login
    Session session
    uint32_t pid
    uint32_t flags              # ServerFlag
    uint16_t pins               # scanner.Effect bits
    uint16_t ends               # those of them that may be over
    uint16_t asked              # those that the question under way is about
    uint8_t asked_list          # and all settings that the session changed
    uint16_t newer              # those that came behind it
    uint16_t cancelling         # cancel requests under way
    uint8_t secret_size
    unsigned char secret[32]
    uint32_t slot
    uint32_t slot_generation
    uint64_t expires_us         # server_lifetime, 0 never
    uint64_t deadline_us        # of resetting or closing
    uint64_t cancel_us          # we sent a cancel request for what it runs, and may once more; 0 no
    uint64_t begin_us           # the transaction began; before that: attached, or the last one ended
    uint64_t query_us           # the current request went out; before that: the last one was answered
    uint64_t uses
    uint32_t epoch              # below that of its route: never attached again
    Copies copies
    Changes changes
    unsigned char* touched      # settings since the last question: kind (sql.SettingKind), name, NUL (malloc)
    uint32_t touched_size
    uint32_t plans              # Route.plans, when its statements were last in order
    uint32_t asked_size         # of it, what the question under way is about


cdef struct Route:
    Conn conn                   # kind KIND_ROUTE: only its place in the event list is used
    uint32_t id
    uint8_t mode
    uint8_t discard
    uint8_t can_cancel
    uint8_t can_rollback
    uint8_t attach_check
    uint8_t is_dedicated        # a server is opened for one client and ends with it; mode is MODE_SESSION
    uint8_t maintain_params     # deploy; else clients get what servers have, and a change pins
    uint8_t log_query
    uint8_t adds_host           # to every application_name
    uint8_t defers_begin        # BEGIN takes no server
    uint8_t has_virtual         # answers `virtual_answers`
    uint8_t has_prepared        # named prepared statements go with the client from server to server
    uint8_t session_state       # StateMode
    uint8_t pin_on_listen       # also where session_state is STATE_ALLOW
    uint8_t state_check         # CheckMode
    uint32_t plans              # counted up when a cached plan turned out to be out of date
    uint32_t max_copies         # prepared statements on a server
    # of one client's names and texts; what it prepares beyond that keeps its server
    uint64_t max_names_bytes
    uint8_t has_demand          # EVENT_DEMAND raised and not yet calm
    uint8_t keeps_copies        # the discard query spares prepared statements, for certain
    uint8_t resets_parameters   # the discard query does, for certain
    uint8_t drops_old_plans     # a server that reports a cached plan out of date is closed at detach
    uint8_t has_notices         # who waits for a server for long is told so
    uint8_t pause               # PauseMode
    uint64_t ended_us           # clients that came before are dropped between transactions; 0 none
    uint32_t epoch              # counted up when all its servers are to be replaced
    uint32_t recall_due         # servers to give up at their next release
    uint32_t evict_due          # servers to close then, for another route under the same cap
    uint32_t keep               # parked servers that pool_ttl spares
    uint64_t pool_timeout_us    # 0 none
    uint64_t pool_ttl_us
    uint64_t reset_timeout_us
    uint64_t login_timeout_us
    uint64_t idle_timeout_us            # clients outside a transaction; 0 none, as for the next three
    uint64_t idle_in_transaction_us
    uint64_t query_timeout_us
    uint64_t transaction_timeout_us
    uint64_t notice_after_us
    uint64_t slow_us            # requests that take so long are logged; 0 none
    Text discard_query          # with its NUL
    Text notice_waiting         # a whole message
    Text notice_served          # the body of one up to a number of milliseconds …
    Text notice_served_end      # … and behind it
    Text virtual_answers[4]     # to each sql.Virtual that has one, without ReadyForQuery
    Conn* unnoticed             # in the queue; all before it were told that they wait
    uint64_t last_wait_us       # somebody waited
    uint64_t* words
    uint64_t* times             # histograms, by counters.TIME_*
    List idle
    List waiting
    List active_clients
    List leaving
    List parked
    List active
    List resetting
    List closing
    Route* next


cdef enum CommandKind:
    COMMAND_STOP = 1
    COMMAND_ADOPT_CLIENT = 2
    COMMAND_ADOPT_SERVER = 3
    COMMAND_START_CLIENT = 4    # after setup: greeting, then read it
    COMMAND_INJECT = 5
    COMMAND_BEGIN_CANCEL = 6
    COMMAND_END_CANCEL = 7
    COMMAND_RECALL = 8
    COMMAND_DROP_IDLE = 9
    COMMAND_KILL = 10
    COMMAND_ROUTE = 11          # a new route enters the relay's list
    COMMAND_CONNECT_FAILED = 12     # those who wait on the route get the error
    COMMAND_FORGET_RECALLS = 13     # of all routes
    COMMAND_CHANGE_ROUTE = 14   # `change` has the new limits of `route`
    COMMAND_OUTDATE = 15        # servers below epoch `count` are obsolete
    COMMAND_END_ROUTE = 16
    COMMAND_PAUSE = 17          # `count` is a PauseMode
    COMMAND_KILL_ROUTE = 18
    COMMAND_LIST_CLIENTS = 19   # a slice of records for the console: listing.pxd
    COMMAND_LIST_SERVERS = 20
    COMMAND_LIST_STATEMENTS = 21
    COMMAND_LIST_COPIES = 22


cdef struct Command:
    Command* next
    uint8_t kind
    uint8_t is_close            # INJECT: close after; RECALL: evict; KILL: the client is told why
    uint8_t reason
    uint8_t has_reply
    uint32_t count
    Conn* conn
    uint32_t generation
    Client* client              # ADOPT_SERVER: whom a dedicated server is for
    uint32_t client_generation
    uint32_t pid
    Route* route
    Route* change               # malloc, owned by the command
    uint64_t token
    unsigned char* data         # malloc, owned by the command
    uint32_t size
    unsigned char secret[32]
    uint32_t secret_size
    # the reply
    void* rows                  # malloc, filled by LIST_…
    uint32_t now
    uint32_t later
    uint64_t handle


cdef struct Engine:
    int epoll
    int wake                    # eventfd, written by Python
    int event_fd                # eventfd, written by the relay
    int timer                   # timerfd
    uint64_t timer_us           # what it is set to
    uint64_t now_us
    uint64_t next_deadline_us
    uint64_t next_sweep_us
    uint64_t* process_words
    bint is_stopping
    uint32_t drops_due          # so many clients more may be dropped, each at its next boundary
    bint has_quiet_ends         # the end of a client may wait QUIET_US
    ChunkPool pool
    Conn wake_conn
    Conn* ready_head
    Conn* ready_tail
    Conn* closed_head           # closed in this round; their events are raised at its end
    Route* routes
    Conn* gathering[MAX_GATHERING]
    int gathering_count
    # deploy text of a server attached while its client's bytes are being worked on
    unsigned char* deploy
    uint32_t deploy_size
    bint deploy_waits           # the request goes out only when the deploy was accepted
    Statements statements
    # what a client's bytes become, while they are worked on: pieces for its server, the first for a deploy
    iovec out[64]
    int out_count
    bint has_begin              # among them a BEGIN that was deferred
    bint had_failed             # … whose transaction had failed
    unsigned char* copy_from    # of the bytes worked on, what is to be kept; NULL: nothing
    unsigned char* scratch
    uint32_t scratch_used
    uint32_t taken              # bytes of the message that `out` stands for
    unsigned char* settings     # CHUNK bytes
    unsigned char* question     # CHUNK bytes
    unsigned char* buffer       # CHUNK bytes of headroom, then READ_SIZE
    unsigned char* cipher       # CIPHER bytes, for what goes over the wire under TLS
    unsigned char* plain        # RECORD bytes, in which small pieces become one record
    Crypto* crypto              # of this thread; NULL until a session needs it
    Tls* fat                    # those whose BIOs have grown: made slim when they are quiet
    unsigned char* parked_buffer    # for a look at a parked server while `buffer` is in use; 2 × CHUNK
    # shared with Python, under the lock
    pthread_mutex_t lock
    Command* commands_head
    Command* commands_tail
    Command* replies_head
    Command* replies_tail
    Conn* events_head
    Conn* events_tail
    bint is_python_woken
    bint is_relay_woken
    uint64_t quiet_since_us     # events wait that wake nobody yet; 0 none
    # query texts: one writer, one reader, losses counted
    unsigned char* texts
    uint64_t texts_written
    uint64_t texts_read


cdef Engine* engine_new(uint64_t* process_words) noexcept
cdef void engine_run(Engine* e) noexcept nogil
cdef bint conn_add(Engine* e, Conn* conn) noexcept nogil
cdef uint64_t clock_us() noexcept nogil
