"""What the relay's thread copies of its records for the console, a slice at a time.

A slice is small, so that no transaction waits for it. The hub gives the memory, the relay fills it, and the
hub reads it when the reply has come: no record is read by two threads.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef enum:
    SLICE = 64                  # records looked at for one command
    NAME_MOST = 64              # bytes of an application_name
    TEXT_MOST = 1024            # bytes of a statement's text
    STATEMENTS_MOST = 32        # statements in one reply
    COPIES_MOST = 1024          # of one server that are shown


cdef struct Place:              # one end of a connection
    uint8_t family              # 0 Unix, 4, 6
    uint16_t port
    unsigned char address[16]


cdef struct Common:             # what rows of clients and servers share
    uint64_t id
    uint64_t handle
    uint64_t born_us
    uint64_t since_us           # entered its state
    uint64_t other_id           # of its server or client; 0 none
    uint64_t other_handle
    uint32_t pid                # the process id a client was given, or PostgreSQL's
    uint32_t prepared           # statements it has
    uint32_t left               # bytes of a message that are to come from it
    uint32_t held               # bytes from it that wait to be used
    uint32_t queued             # bytes for it that it did not take yet
    int32_t fd
    uint16_t pins               # scanner.Effect bits
    uint8_t state
    uint8_t tls                 # index of how its TLS session is shown; 0 plain
    uint8_t transaction         # I, T or E; 0: has no server
    Place local
    uint32_t name_size
    unsigned char name[NAME_MOST]       # application_name


cdef struct ClientRow:
    Common common
    uint64_t request_us
    uint64_t transaction_us     # since when; 0: none is open
    uint64_t query_us           # since when a request runs; 0: none does
    uint32_t names
    uint32_t server_pid
    uint32_t peer_pid           # of a client at a Unix socket
    Place remote


cdef struct ServerRow:
    Common common
    uint64_t query_us           # the current request went out; before that: the last one was answered
    uint64_t begin_us
    uint64_t uses
    uint64_t expires_us
    uint16_t cancelling
    uint8_t closes              # at the end of what it does


cdef struct CopyRow:            # a statement that a server has
    unsigned char name[36]


cdef struct StatementRow:
    uint32_t references
    uint32_t size               # of what is here of its text
    unsigned char name[36]
    unsigned char text[TEXT_MOST]
