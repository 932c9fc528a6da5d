"""Facts of clients out of the relay's rows. Compiled: thousands are made while transactions run beside it."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport strlen

from gpooler.relay.listing cimport ClientRow, Place
from gpooler.relay.system cimport AF_INET, AF_INET6

from gpooler.console.facts import SocketFact


cdef extern from "<arpa/inet.h>" nogil:
    const char* inet_ntop(int family, const void* address, char* text, uint32_t size)


cdef enum:
    HOST_MOST = 46          # INET6_ADDRSTRLEN
    ID_LENGTH = 13
    WAITING = 2             # relay/engine.pxd: ClientState

INDEX_BITS = 21             # of a record's place among those of its worker, the low ones of a handle
cdef tuple STATES = (None, "idle", "waiting", "active", "leaving")
cdef object MAKE = SocketFact._make


cdef str host_of(const Place* place):
    cdef char text[HOST_MOST]
    if place.family == 0:
        return "unix"
    inet_ntop(AF_INET6 if place.family == 6 else AF_INET, place.address, text, HOST_MOST)
    return PyUnicode_DecodeUTF8(text, strlen(text), NULL)


cdef str id_of(char kind, uint64_t number):
    """As ``log.client_id`` and ``log.server_id``."""
    cdef char text[ID_LENGTH + 1]
    snprintf(text, ID_LENGTH + 1, b"%c%012llx", kind, <unsigned long long> number)
    return PyUnicode_DecodeUTF8(text, ID_LENGTH, NULL)


def client_facts(
        bytes rows not None, int worker, int64_t first_number, name_of, replication_of, tls_text, pin_names):
    """A ``SocketFact`` for each ``relay.listing.ClientRow`` of ``rows``.

    ``first_number`` is the ``number`` of record 0. ``name_of`` takes an index of names, ``replication_of`` a
    handle, ``tls_text`` the index of a session's text, ``pin_names`` bits.
    """
    cdef const ClientRow* row = <const ClientRow*> PyBytes_AS_STRING(rows)
    cdef Py_ssize_t count = PyBytes_GET_SIZE(rows) // <Py_ssize_t> sizeof(ClientRow)
    cdef list result = []
    cdef str database = "", user = ""
    cdef int64_t names = -1
    cdef uint64_t index = (1 << INDEX_BITS) - 1
    for _ in range(count):
        if row.names != names:      # neighbours are mostly alike
            names = row.names
            database, user = name_of(row.names)
        result.append(MAKE((
            worker, "C", first_number + <int64_t> (row.common.handle & index), id_of(c"c", row.common.id),
            user, database, replication_of(row.common.handle), STATES[row.common.state],
            host_of(&row.remote), row.remote.port, host_of(&row.common.local), row.common.local.port,
            row.common.born_us, row.request_us, row.common.since_us,
            1 if row.common.state == WAITING else 0, 0,
            id_of(c"s", row.common.other_id) if row.server_pid else "",
            row.peer_pid, tls_text(row.common.tls) if row.common.tls else "",
            PyUnicode_DecodeUTF8(<const char*> row.common.name, row.common.name_size, b"replace"),
            row.common.prepared, row.common.left, row.common.held, row.common.queued, row.common.fd,
            pin_names(row.common.pins) if row.common.pins else "",
            chr(row.common.transaction) if row.common.transaction else "",
            row.transaction_us, row.query_us, row.server_pid, "", 0, 0, 0,
        )))
        row += 1
    return result
