"""The relay's leaves as Python objects, so that tests can drive them one call at a time.

Nothing of a running gpooler uses it. Each class owns one C record and shows its fields as they are.
"""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from gpooler.relay.histogram cimport bucket_of
from gpooler.relay.io cimport ChunkPool, Queue, chunk_drop, io_recv, queue_clear, queue_flush, queue_put
from gpooler.relay.params cimport params_counts, params_global_init
from gpooler.relay.prepared cimport (
    CHANGE_ALIAS,
    CHANGE_COPY,
    CHANGE_DEFINE,
    CHANGE_EVICT,
    CHANGE_FORGET,
    Change,
    Changes,
    Copies,
    Copy,
    Name,
    Names,
    Statement,
    Statements,
    changes_add,
    changes_commit,
    changes_undo,
    copies_add,
    copies_clear,
    copies_remove,
    copies_use,
    name_new,
    names_add,
    names_clear,
    names_find,
    names_take,
    statement_of,
    statements_free,
)
from gpooler.relay.records cimport (
    RECORD,
    Crypto,
    Records,
    crypto_free,
    crypto_new,
    records_free,
    records_new,
    records_secret_size,
    records_sent,
    records_suite,
)
from gpooler.relay.scanner cimport Scan, scan_begin, scan_feed
from gpooler.relay.session cimport (
    Session,
    session_backend,
    session_free,
    session_frontend,
    session_init,
    session_is_idle,
    session_needs_sync,
    session_owner,
    session_ready,
)
from gpooler.relay.sql cimport Reading, sql_read, sql_virtual
from gpooler.relay.tls cimport TlsSession, tls_new


cdef class SessionProbe:
    """One session tracker (relay/session.pxd)."""

    cdef Session session

    def __cinit__(self):
        session_init(&self.session, c'I')

    def __dealloc__(self):
        session_free(&self.session)

    def frontend(self, bytes kinds not None, int owner=0):
        """Messages of these kinds (one byte each) go to the server."""
        for kind in kinds:
            session_frontend(&self.session, <uint8_t> kind, <uint8_t> owner)

    def backend(self, bytes kinds not None):
        """Headers of these kinds came; whether each was in place."""
        cdef bint in_place = True
        for kind in kinds:
            in_place = session_backend(&self.session, <uint8_t> kind) and in_place
        return in_place

    def ready(self, bytes status=b"I"):
        """A ReadyForQuery came, header and body: the owner of what it answers, -1 if nothing."""
        if not session_backend(&self.session, c'Z'):
            return -1
        return session_ready(&self.session, <uint8_t> status[0])

    @property
    def owner(self):
        """Whose answers come next."""
        return session_owner(&self.session)

    @property
    def is_idle(self):
        """Nothing is owed and nothing is open."""
        return bool(session_is_idle(&self.session))

    @property
    def needs_sync(self):
        """The server waits for a Sync."""
        return bool(session_needs_sync(&self.session))

    @property
    def is_uncertain(self):
        """What is owed cannot be known any more."""
        return bool(self.session.is_uncertain)

    @property
    def is_skipping(self):
        """The server discards up to a Sync that was not sent yet."""
        return bool(self.session.is_skipping)

    @property
    def is_copy_in(self):
        """The server reads COPY data and its end was not sent yet."""
        return bool(self.session.is_copy_in)

    @property
    def is_copy_out(self):
        """The server sends COPY data."""
        return bool(self.session.is_copy_out)

    @property
    def is_copy_both(self):
        """A replication stream runs."""
        return bool(self.session.is_copy_both)

    @property
    def error_was_last(self):
        """The last message was an ErrorResponse."""
        return bool(self.session.error_was_last)

    @property
    def status(self):
        """The last ReadyForQuery's status, one byte."""
        return bytes([self.session.status])

    @property
    def due(self):
        """Extended answers due before the next point."""
        return self.session.due

    @property
    def runs(self):
        """How many runs of points are in the ring."""
        return self.session.length

    @property
    def capacity(self):
        """How many runs the ring can take before it grows."""
        return self.session.capacity


cdef class ScanProbe:
    """One scanner (relay/scanner.pxd)."""

    cdef Scan scan

    def __cinit__(self):
        scan_begin(&self.scan, False, True, 0)

    def begin(self, *, bint is_parse=False, bint is_conforming=True, int is_multibyte=0):
        """Begin a message; ``is_multibyte`` is one of relay/scanner.pxd's kinds of encoding."""
        scan_begin(&self.scan, is_parse, is_conforming, <uint8_t> is_multibyte)

    def feed(self, const unsigned char[::1] data not None):
        """The next bytes of the message's body; the effects seen so far, as bits."""
        if data.shape[0]:
            scan_feed(&self.scan, &data[0], <size_t> data.shape[0])
        return self.scan.effects

    @property
    def effects(self):
        """The effects seen so far, as bits."""
        return self.scan.effects

    @property
    def state(self):
        """Where the scanner stands, a number of ScanState."""
        return self.scan.state

    @property
    def size(self):
        """Bytes of state that a scanner takes."""
        return sizeof(Scan)


def read_virtual(bytes text not None, *, bint is_conforming=True, int is_multibyte=0):
    """Which request to gpooler itself a text is (relay/sql.pxd: Virtual), or begins with."""
    return sql_virtual(<const unsigned char*> PyBytes_AS_STRING(text), <uint32_t> len(text), is_conforming,
                       <uint8_t> is_multibyte)


def read_sql(bytes text not None, *, bint is_conforming=True, int is_multibyte=0):
    """What a whole text does to its session (relay/sql.pxd), as a dictionary.

    ``settings`` are pairs of kind and name (None for the kinds that concern all), ``names`` pairs of kind and
    name of prepared statements.
    """
    cdef Reading reading
    cdef uint32_t i
    cdef list found = [], names = []
    sql_read(&reading, <const unsigned char*> PyBytes_AS_STRING(text), <uint32_t> len(text), is_conforming,
             <uint8_t> is_multibyte)
    for i in range(reading.count):
        name = None
        if reading.settings[i].name != NULL:
            name = (<const char*> reading.settings[i].name)[:reading.settings[i].size]
        found.append((reading.settings[i].kind, name))
    for i in range(reading.name_count):
        names.append((reading.names[i].kind, (<const char*> reading.names[i].text)[:reading.names[i].size]))
    return {
        "settings": found,
        "names": names,
        "effects": reading.effects,
        "ends": reading.ends,
        "has_other_names": bool(reading.has_other_names),
        "prepares": bool(reading.prepares),
        "forgets_all": bool(reading.forgets_all),
        "changes_lexis": bool(reading.changes_lexis),
    }


cdef class QueueProbe:
    """One byte queue with a chunk pool of its own (relay/io.pxd)."""

    cdef ChunkPool pool
    cdef Queue queue

    def __cinit__(self):
        memset(&self.pool, 0, sizeof(ChunkPool))
        memset(&self.queue, 0, sizeof(Queue))

    def __dealloc__(self):
        queue_clear(&self.pool, &self.queue)
        chunk_drop(&self.pool)

    def put(self, bytes data not None):
        """Append bytes; False when memory is short."""
        return bool(queue_put(&self.pool, &self.queue, <const unsigned char*> <char*> data, len(data)))

    def flush(self, int fd):
        """Send what the socket takes; False when its peer is gone."""
        return bool(queue_flush(&self.pool, &self.queue, fd))

    def clear(self):
        """Forget what is queued."""
        queue_clear(&self.pool, &self.queue)

    @property
    def size(self):
        """Bytes queued."""
        return self.queue.size

    @property
    def chunks(self):
        """Chunks that hold what is queued."""
        cdef uint32_t count = 0
        chunk = self.queue.head
        while chunk != NULL:
            count += 1
            chunk = chunk.next
        return count

    @property
    def free_chunks(self):
        """Chunks kept for reuse."""
        return self.pool.count


def receive(int fd, int size):
    """What io_recv reads: bytes; None when nothing is there; ConnectionError when the connection broke."""
    cdef bytearray buffer = bytearray(size)
    cdef ssize_t got = io_recv(fd, <unsigned char*> <char*> buffer, <size_t> size)
    if got == -1:
        return None
    if got < 0:
        raise ConnectionError("the connection broke")
    return bytes(buffer[:got])


def parameter_counts():
    """How many parameters and how many parameter sets are interned at this moment."""
    cdef uint32_t params, sets
    params_global_init()
    params_counts(&params, &sets)
    return params, sets


cdef class PreparedProbe:
    """One client's names, one server's copies and the changes between them (relay/prepared.pxd).

    What is done to them in the order in which relay/prepared.pxi does it, without messages and answers.
    """

    cdef Statements statements
    cdef Names names
    cdef Copies copies
    cdef Changes changes

    def __cinit__(self):
        memset(&self.statements, 0, sizeof(Statements))
        memset(&self.names, 0, sizeof(Names))
        memset(&self.copies, 0, sizeof(Copies))
        memset(&self.changes, 0, sizeof(Changes))

    def __dealloc__(self):
        self.undo()
        self.drop_names()
        self.drop_copies()
        statements_free(&self.statements)

    cdef Name* _find(self, bytes name) noexcept:
        return names_find(&self.names, <const unsigned char*> PyBytes_AS_STRING(name), <uint32_t> len(name))

    cdef int _change(self, uint8_t kind, Statement* statement, Name* name) except -1:
        if changes_add(&self.changes, kind, statement, name) == NULL:
            raise MemoryError
        return 0

    cdef int _copy(self, Statement* statement, uint32_t most) except -1:
        cdef Statement* oldest
        if self.copies.count >= most:
            oldest = self.copies.oldest.statement
            oldest.references += 1
            copies_remove(&self.copies, &self.statements, oldest)
            self._change(CHANGE_EVICT, oldest, NULL)
        if not copies_add(&self.copies, statement):
            raise MemoryError
        return 0

    def define(self, bytes name not None, bytes body not None, bytes settings=b"", uint32_t most=100):
        """A Parse; False when the name is taken. ``most``: copies that the server may have."""
        cdef Statement* statement
        cdef Name* mine
        if self._find(name) != NULL:
            return False
        statement = statement_of(
            &self.statements, <const unsigned char*> PyBytes_AS_STRING(body), <uint32_t> len(body),
            <const unsigned char*> PyBytes_AS_STRING(settings), <uint32_t> len(settings))
        mine = name_new(<const unsigned char*> PyBytes_AS_STRING(name), <uint32_t> len(name), NULL)
        if statement == NULL or mine == NULL or names_add(
                &self.names, mine.text, mine.size, statement) == NULL:
            raise MemoryError
        statement.references += 1
        if copies_use(&self.copies, statement):
            self._change(CHANGE_ALIAS, statement, mine)
            return True
        self._copy(statement, most)
        self._change(CHANGE_DEFINE, statement, mine)
        return True

    def bind(self, bytes name not None, uint32_t most=100):
        """A Bind or Describe: the name that goes to the server, None when there is no such name."""
        cdef Name* known = self._find(name)
        if known == NULL:
            return None
        if not copies_use(&self.copies, known.statement):
            self._copy(known.statement, most)
            known.statement.references += 1
            self._change(CHANGE_COPY, known.statement, NULL)
        return <bytes> <char*> known.statement.name

    def close(self, bytes name not None):
        """A Close; False when there is no such name."""
        cdef Name* known = self._find(name)
        if known == NULL:
            return False
        names_take(&self.names, known)
        self._change(CHANGE_FORGET, NULL, known)
        return True

    def commit(self):
        """The oldest change was answered; False when there is none."""
        if self.changes.head == NULL:
            return False
        changes_commit(&self.changes, &self.statements)
        return True

    def undo(self, uint32_t count=0xffffffff, *, bint has_client=True):
        """The oldest changes were skipped, the last of them first."""
        changes_undo(&self.changes, &self.statements, count, &self.names if has_client else NULL,
                     &self.copies)

    def drop_names(self):
        """The client is gone."""
        names_clear(&self.names, &self.statements)

    def drop_copies(self):
        """The server has none any more."""
        copies_clear(&self.copies, &self.statements)

    @property
    def named(self):
        """What the client has prepared: bodies by name."""
        cdef dict found = {}
        cdef uint32_t i
        cdef Name* at
        for i in range(self.names.capacity):
            at = self.names.buckets[i]
            while at != NULL:
                found[(<char*> at.text)[:at.size]] = (<char*> at.statement.body)[:at.statement.whole]
                at = at.next
        return found

    @property
    def copied(self):
        """What the server has, the latest used first."""
        cdef list found = []
        cdef Copy* at = self.copies.newest
        while at != NULL:
            found.append((<char*> at.statement.body)[:at.statement.whole])
            at = at.older
        return found

    @property
    def pending(self):
        """Changes that were not answered."""
        cdef uint32_t count = 0
        cdef Change* at = self.changes.head
        while at != NULL:
            count += 1
            at = at.next
        return count

    @property
    def counts(self):
        """How many statements there are, and how many bytes the names take."""
        return self.statements.count, self.names.bytes


def histogram_bucket(uint64_t us):
    """The bucket of a histogram that counts a time."""
    return bucket_of(us)


def records_session(bytes suite, bytes reading, bytes writing, *, bytes sent=b"", uint64_t number=0):
    """A session of TLS 1.3's records with these traffic secrets; ``openssl.keep_secrets`` was called before.

    ``sent``: records that were sealed before; ``number``: of the next record that it seals, where it is not
    behind those. Raises ValueError when it cannot be.
    """
    cdef unsigned char scratch[RECORD]
    cdef TlsSession session = TlsSession.__new__(TlsSession)
    cdef Crypto* crypto = crypto_new()
    cdef Records* records = NULL
    cdef int index = records_suite(suite)
    if (crypto != NULL and index >= 0
            and len(reading) == len(writing) == <Py_ssize_t> records_secret_size(index)):
        records = records_new(crypto, index, reading, writing)
    if records != NULL and not records_sent(records, crypto, sent, len(sent), scratch):
        records_free(records)
        records = NULL
    crypto_free(crypto)
    if records == NULL:
        raise ValueError("no such session")
    if number:
        records.writing.sequence = number
    session.tls = tls_new(NULL, NULL, NULL)
    session.tls.records = records
    return session
