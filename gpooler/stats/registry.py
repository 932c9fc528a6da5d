"""The one table of counters and gauges: their places in shared memory, names and meanings.

A worker's shared memory is an array of aligned 64-bit words: one block for the process, then one
block a route, found by route id. Each word has one writer: the relay thread or the worker's hub.
``relay/counters.pxd`` repeats the indices; a test compares them.
"""

from enum import IntEnum

WORDS_PER_BLOCK = 64
MAX_ROUTES = 65536  # sparse memory: a block costs a page share only when its route is used
ERROR_BASE = 24  # words 24..63 of a route block count ends by reasons.Reason


class ProcessWord(IntEnum):
    """Words of the process block."""

    HUB_BEAT = 0  # bumped by the hub
    RELAY_BEAT = 1  # bumped by the relay thread
    CLIENTS = 2  # gauge: clients counted against client_max (hub)
    CLIENTS_LOGIN = 3  # gauge: clients in login (hub)
    LISTENING = 4  # 1 while the worker accepts (hub)
    LOG_LINES_LOST = 5
    TEXT_EVENTS_LOST = 6  # query texts the bounded ring could not take (relay)
    BROKER_SENT = 7  # messages to the broker
    BROKER_RECEIVED = 8
    LOGINS = 9  # clients that completed login
    LOGIN_ERRORS = 10


class RouteWord(IntEnum):
    """Words of a route block; ERROR_BASE + reason follow."""

    CLIENTS = 0  # gauge (relay): adopted clients
    CLIENTS_ACTIVE = 1  # gauge: attached to a server
    CLIENTS_WAITING = 2  # gauge: in the queue
    SERVERS_ACTIVE = 3  # gauge: attached or resetting
    SERVERS_IDLE = 4  # gauge: parked
    SERVERS_LOGIN = 5  # gauge (hub): being opened
    SERVERS_CLOSING = 6  # gauge: told to go, not yet gone
    TRANSACTIONS = 7
    QUERIES = 8
    BYTES_IN = 9  # from clients to servers
    BYTES_OUT = 10  # from servers to clients
    WAIT_US = 11  # time clients waited for a server
    QUERY_US = 12
    TRANSACTION_US = 13
    ASSIGNMENTS = 14  # servers attached to clients
    DEPLOYS = 15  # session parameters deployed
    RESETS = 16  # servers discarded before parking
    PINS = 17  # servers pinned to a client by session state
    CANCELS = 18  # cancel requests that met a query or a waiting client
    LOGINS = 19  # (hub)
    OLDEST_WAIT_US = 20  # monotonic time in us at which the head of the queue began to wait, 0 none
    SERVERS_OPENED = 21  # (hub)
