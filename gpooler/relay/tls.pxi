"""TLS in the relay: between what connections send and receive and what goes over the wire."""

from libc.stdint cimport uint16_t, uint64_t
from libc.string cimport memcpy

from gpooler.relay.io cimport (
    CHUNK, READ_SIZE, RECEIVED_BROKEN, RECEIVED_GOODBYE, RECEIVED_NOTHING, io_recv, iovec,
)
from gpooler.relay.records cimport RECORD, RECORD_MORE, TLS_BROKEN, TLS_CLOSED, TLS_NOTHING
from gpooler.relay.tls cimport (
    FAT, Tls, tls_close, tls_free, tls_keep, tls_put, tls_read, tls_slim, tls_take, tls_write,
)


cdef bint tls_send(Engine* e, Conn* conn, size_t size) noexcept nogil:
    """Send what stands in `cipher`. False: the peer is gone."""
    cdef iovec piece
    if size == 0:
        return True
    piece.iov_base = e.cipher
    piece.iov_len = size
    return conn_put(e, conn, &piece, 1)


cdef bint tls_record(Engine* e, Conn* conn, const unsigned char* data, size_t size,
                     size_t* filled) noexcept nogil:
    """Encrypt up to RECORD bytes behind what stands in `cipher`, which is sent when it is full."""
    cdef ssize_t made = tls_write(conn.tls, e.crypto, data, size, e.cipher + filled[0], CIPHER - filled[0])
    if made < 0:
        return False
    filled[0] += made
    if CIPHER - filled[0] < RECORD + RECORD_MORE:
        size = filled[0]
        filled[0] = 0
        return tls_send(e, conn, size)
    return True


cdef bint tls_conn_write(Engine* e, Conn* conn, iovec* pieces, int count) noexcept nogil:
    """As conn_write. Small pieces share a record."""
    cdef const unsigned char* at
    cdef size_t left, take, used = 0, filled = 0
    cdef int i
    for i in range(count):
        at = <const unsigned char*> pieces[i].iov_base
        left = pieces[i].iov_len
        while left:
            take = min_size(left, RECORD - used)
            if used == 0 and (take == RECORD or i == count - 1):
                if not tls_record(e, conn, at, take, &filled):
                    return False
            else:
                memcpy(e.plain + used, at, take)
                used += take
                if used == RECORD:
                    if not tls_record(e, conn, e.plain, used, &filled):
                        return False
                    used = 0
            at += take
            left -= take
    if used and not tls_record(e, conn, e.plain, used, &filled):
        return False
    if not tls_send(e, conn, filled):
        return False
    note_fat(e, conn)
    return True


cdef ssize_t tls_conn_recv(Engine* e, Conn* conn, unsigned char* at, size_t room) noexcept nogil:
    """As conn_recv. Ciphertext that is left has no edge to come: IS_READABLE stays for it."""
    cdef size_t got = 0, want, taken = 0
    cdef ssize_t part, end
    cdef bint is_drained = False
    while True:
        part = tls_read(conn.tls, e.crypto, at + got, room - got)
        if part > 0:
            got += part
            if got == room:
                end = RECEIVED_NOTHING
                break
            continue
        if part == TLS_BROKEN:
            end = RECEIVED_BROKEN
            break
        if part == TLS_CLOSED:
            end = RECEIVED_GOODBYE
            break
        if is_drained:
            conn.flags &= ~<uint16_t> IS_READABLE
            end = RECEIVED_NOTHING
            break
        if got and taken >= READ_SIZE:
            end = RECEIVED_NOTHING      # records that fill no room: others have their turn
            break
        want = room - got
        if want < CHUNK:
            want = CHUNK
        part = io_recv(conn.fd, e.cipher, want)
        if part <= 0:
            end = part
            if end == RECEIVED_NOTHING:
                conn.flags &= ~<uint16_t> IS_READABLE
            break
        taken += part
        is_drained = <size_t> part < want and not conn.flags & IS_HUNG_UP
        if not tls_put(conn.tls, e.cipher, part):
            end = RECEIVED_BROKEN
            break
    if not tls_keep(conn.tls):
        end = RECEIVED_BROKEN
    if conn.out.size and conn.tls.records != NULL and not conn.tls.records.is_broken:
        pass                            # who does not read is owed its answer to a KeyUpdate until it does
    elif not tls_send(e, conn, tls_take(conn.tls, e.crypto, e.cipher, CIPHER)) and got == 0:
        end = RECEIVED_BROKEN
    note_fat(e, conn)
    if got:
        return got                      # an end is found again by the next read
    if end != RECEIVED_NOTHING:
        conn.flags &= ~<uint16_t> IS_READABLE
    return end


cdef void conn_bye(Engine* e, Conn* conn) noexcept nogil:
    """A close_notify, if the peer has room for it at once."""
    if conn.tls == NULL or conn.out.size or conn.fd < 0:
        return
    tls_close(conn.tls)
    tls_send(e, conn, tls_take(conn.tls, e.crypto, e.cipher, CIPHER))


cdef inline void note_fat(Engine* e, Conn* conn) noexcept nogil:
    cdef Tls* tls = conn.tls
    if tls.most < FAT:
        return
    tls.used_us = e.now_us
    if tls.is_fat:
        return
    tls.is_fat = True
    tls.fat_previous = NULL
    tls.fat_next = e.fat
    if e.fat != NULL:
        e.fat.fat_previous = tls
    e.fat = tls


cdef void fat_remove(Engine* e, Tls* tls) noexcept nogil:
    if not tls.is_fat:
        return
    tls.is_fat = False
    if tls.fat_previous != NULL:
        tls.fat_previous.fat_next = tls.fat_next
    else:
        e.fat = tls.fat_next
    if tls.fat_next != NULL:
        tls.fat_next.fat_previous = tls.fat_previous


cdef void tls_slim_quiet(Engine* e) noexcept nogil:
    """Once a second: sessions that carried much and are quiet give the memory back."""
    cdef Tls* tls = e.fat
    cdef Tls* following
    while tls != NULL:
        following = tls.fat_next
        if e.now_us - tls.used_us >= SLIM_US and tls_slim(tls, e.cipher, CIPHER):
            fat_remove(e, tls)
        tls = following


cdef void tls_forget(Engine* e, Conn* conn) noexcept nogil:
    if conn.tls == NULL:
        return
    fat_remove(e, conn.tls)
    tls_free(conn.tls)
    conn.tls = NULL
