"""The one table of counters and gauges: their places in shared memory, names and meanings.

A worker's shared memory is an array of aligned 64-bit words: one block for the process, then one
block a route, found by route id. Behind them lie the histograms of times (``stats/histogram.py``): those that
the relay writes, then those of the hub, so that the two share no page. Each word has one writer: the relay
thread or the worker's hub. ``relay/counters.pxd`` repeats the indices; a test compares them.
"""

from enum import IntEnum
from typing import Final

from gpooler.stats.histogram import HISTOGRAM_WORDS

WORDS_PER_BLOCK: Final = 64
MAX_ROUTES: Final = 65536  # sparse memory: a block costs a page share only when its route is used
ERROR_BASE: Final = 24  # words 24..57 of a route block count ends and refused requests by reasons.Reason
PAGE_WORDS: Final = 512


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
    FOLDED = 11  # 1: the process is dead and its counters lie in the past's (master)
    FOLD_SEQUENCE = 12  # of the past's block: odd while the master folds (master)
    CONSOLES = 13  # gauge: clients of the console (hub)
    PHASE = 32  # of the past's block: where the life of the master stands, a process.context.Phase (master)
    PID = 33  # (hub)
    SOFT_OOM_USED = 40  # of the past's block, as the next two: gauge, bytes in use at the last look (broker)
    SOFT_OOM_LIMIT = 41  # gauge: bytes, 0 where there is none (broker)
    SOFT_OOM_SHORT = 42  # 1 while new clients are refused (broker)
    SOFT_OOM_SIGNALS = 43  # of the past's block: sent to processes with too much memory (broker)
    SOFT_OOM_REFUSED = 44  # clients refused (hub)


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
    CLIENTS_ADMITTED = 22  # gauge (hub): clients counted against the rule's client_max
    # behind the reasons
    SERVERS_RESETTING = 23  # gauge: a part of SERVERS_ACTIVE
    SERVERS_CANCELLED = 58  # gauge (hub): cancel requests are under way to them
    CANCELS_ACTIVE = 59  # gauge (hub): cancel requests being delivered
    CANCELS_WAITING = 60  # gauge (hub): cancel requests that wait for their turn
    CLIENT_PARSES = 61  # Parse messages of clients
    SERVER_PARSES = 62  # Parse messages to servers
    BINDS = 63


class Time(IntEnum):
    """What histograms of a route measure. The sums of the relay's are words of the route's block."""

    WAIT = 0  # of clients for a server; no time for those that found one at once
    QUERY = 1
    TRANSACTION = 2
    CONNECT = 3  # (hub) until a server is open and logged in
    LOGIN = 4  # (hub) of clients, from the accepted connection to the relay


HUB_TIMES: Final = 3  # from here on times are the hub's
RELAY_TIME_WORDS: Final = HUB_TIMES * HISTOGRAM_WORDS  # of one route
HUB_TIME_WORDS: Final = (len(Time) - HUB_TIMES) * HISTOGRAM_WORDS
RELAY_TIMES_AT: Final = -(-(1 + MAX_ROUTES) * WORDS_PER_BLOCK // PAGE_WORDS) * PAGE_WORDS
HUB_TIMES_AT: Final = RELAY_TIMES_AT + MAX_ROUTES * RELAY_TIME_WORDS
END_AT: Final = HUB_TIMES_AT + MAX_ROUTES * HUB_TIME_WORDS
TIME_SUMS: Final = {
    Time.WAIT: RouteWord.WAIT_US,
    Time.QUERY: RouteWord.QUERY_US,
    Time.TRANSACTION: RouteWord.TRANSACTION_US,
}
"""Where the sums of the relay's times stand; the hub's are the last word of their histogram."""


ROUTE_GAUGES: Final = frozenset(
    {
        RouteWord.CLIENTS,
        RouteWord.CLIENTS_ACTIVE,
        RouteWord.CLIENTS_WAITING,
        RouteWord.SERVERS_ACTIVE,
        RouteWord.SERVERS_IDLE,
        RouteWord.SERVERS_LOGIN,
        RouteWord.SERVERS_CLOSING,
        RouteWord.CLIENTS_ADMITTED,
        RouteWord.OLDEST_WAIT_US,
        RouteWord.SERVERS_RESETTING,
        RouteWord.SERVERS_CANCELLED,
        RouteWord.CANCELS_ACTIVE,
        RouteWord.CANCELS_WAITING,
    }
)
"""Words that say how things stand; they end with their process and are never folded."""

PROCESS_COUNTERS: Final = (
    ProcessWord.LOG_LINES_LOST,
    ProcessWord.TEXT_EVENTS_LOST,
    ProcessWord.BROKER_SENT,
    ProcessWord.BROKER_RECEIVED,
    ProcessWord.LOGINS,
    ProcessWord.LOGIN_ERRORS,
    ProcessWord.SOFT_OOM_REFUSED,
)
"""Words of the process block that only grow, so that a dead process's share is kept."""
