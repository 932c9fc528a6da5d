"""DataRow messages, compiled: the console sends thousands of them while transactions run beside it."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_CheckExact
from cpython.mem cimport PyMem_Realloc
from cpython.unicode cimport PyUnicode_CheckExact
from libc.stdint cimport uint16_t, uint32_t
from libc.stdio cimport snprintf
from libc.string cimport memcpy

from gpooler.wire.text import encode


cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* size) except NULL
    bint PyUnicode_IS_COMPACT_ASCII(object text)

cdef extern from "<arpa/inet.h>" nogil:
    uint32_t htonl(uint32_t number)
    uint16_t htons(uint16_t number)


cdef enum:
    HEAD = 7            # kind, length of the message, count of its columns
    NUMBER_MOST = 24    # characters of a 64-bit number


# What a row is put together in. It grows with the largest row; nothing yields while it is in use.
cdef unsigned char* room = NULL
cdef Py_ssize_t room_size = 0


cdef int make_room(Py_ssize_t size) except -1:
    global room, room_size
    cdef unsigned char* grown
    if size > room_size:
        grown = <unsigned char*> PyMem_Realloc(room, 2 * size)
        if grown == NULL:
            raise MemoryError
        room = grown
        room_size = 2 * size
    return 0


cdef inline void put_size(Py_ssize_t at, Py_ssize_t size) noexcept:
    cdef uint32_t word = htonl(<uint32_t> size)
    memcpy(room + at, &word, 4)


cdef inline Py_ssize_t put(Py_ssize_t at, const char* text, Py_ssize_t size) except -1:
    """A value and its length: where the next one goes."""
    make_room(at + 4 + size)
    put_size(at, size)
    memcpy(room + at + 4, text, size)
    return at + 4 + size


def data_row(tuple cells not None, list how not None):
    """A DataRow (protocol, "Message Formats"). A cell that is None is NULL.

    ``how`` makes the bytes of the cell in its place; where it is None the cell goes as text: a number, a
    truth value as t or f, or a str. Raises ValueError if there are not as many of them as cells.
    """
    cdef Py_ssize_t at = HEAD, i, size
    cdef uint16_t count
    cdef long long whole
    cdef int beyond
    cdef char number[NUMBER_MOST]
    cdef const char* text
    cdef bytes value
    if len(cells) != len(how):
        raise ValueError(f"{len(cells)} cells for {len(how)} columns")
    make_room(HEAD)
    for i in range(len(cells)):
        cell = cells[i]
        make = how[i]
        if cell is None:
            make_room(at + 4)
            put_size(at, -1)
            at += 4
            continue
        if make is None:
            if PyUnicode_CheckExact(cell) and PyUnicode_IS_COMPACT_ASCII(cell):
                text = PyUnicode_AsUTF8AndSize(cell, &size)
                at = put(at, text, size)
                continue
            if PyLong_CheckExact(cell):
                whole = PyLong_AsLongLongAndOverflow(cell, &beyond)
                if not beyond:
                    at = put(at, number, snprintf(number, NUMBER_MOST, b"%lld", whole))
                    continue
            value = encode(str(cell)) if not isinstance(cell, bool) else b"t" if cell else b"f"
        else:
            value = make(cell)
            if value is None:
                raise TypeError("an encoder made nothing of a cell")
        at = put(at, PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value))
    room[0] = c"D"
    put_size(1, at - 1)
    count = htons(<uint16_t> len(cells))
    memcpy(room + 5, &count, 2)
    return PyBytes_FromStringAndSize(<char*> room, at)
