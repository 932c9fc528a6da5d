"""Why a connection ended: one enum for the log line, the console column and the metric label.

The relay (``relay/engine.pxd``) uses the same numbers; a test compares them.
"""

from enum import IntEnum


class Reason(IntEnum):
    """Cause of the end of a client or server connection. Values are stable within a release."""

    NONE = 0
    # clients
    CLIENT_TERMINATED = 1  # sent Terminate, or closed between transactions
    CLIENT_GONE = 2  # vanished while a request ran, waited or was incomplete
    CLIENT_PROTOCOL = 3  # broke the protocol
    CLIENT_KILLED = 4  # ended from the console
    CLIENT_POOL_TIMEOUT = 5  # waited longer than pool_timeout
    CLIENT_IDLE = 6  # outside a transaction, for client_idle_timeout or pool_client_idle_timeout
    CLIENT_IDLE_IN_TRANSACTION = 7  # for pool_idle_in_transaction_timeout
    CLIENT_CANCELLED = 9  # a cancel request met it while it waited (it stays connected)
    CLIENT_STALLED = 10  # left a message incomplete while holding a server
    SHUTDOWN = 11  # gpooler drains
    STATEMENT_POOL = 12  # opened a transaction in a statement pool
    CLIENT_QUERY_TIMEOUT = 13
    CLIENT_TRANSACTION_TIMEOUT = 14
    TARGET_UNBUILT = (
        15  # wanted hosts of a kind that nobody chooses yet (it stays connected, like the next two)
    )
    TARGET_INVALID = 16  # wanted hosts of no kind
    VIRTUAL_UNCLEAR = 17  # asked gpooler in a way that only PostgreSQL answers
    SOFT_OOM = 18  # was refused at login: memory is short (counted by the hub)
    SESSION_STATE = 19  # made session state that its rule refuses
    # servers
    SERVER_LOST = 20  # closed by PostgreSQL or by the network
    SERVER_CONNECT = 21  # could not be reached, or refused the login
    SERVER_PROTOCOL = 22  # sent what it should not
    SERVER_LIFETIME = 23
    SERVER_IDLE = 24  # parked longer than pool_ttl
    SERVER_RESET_TIMEOUT = 25
    SERVER_DIRTY_END = 26  # its client left inside a message, COPY or uncertain pipeline
    SERVER_DEPLOY_FAILED = 27  # refused the session parameters of a client
    SERVER_RECALLED = 28  # evicted for another route under the same cap, or the pool became smaller
    SERVER_RESET_FAILED = 29
    SERVER_CLIENT_LEFT = 31  # was opened for one client, which has left
    SERVER_OLD_PLAN = 32  # reported that a cached plan must not change its result type
    SERVER_OBSOLETE = 33  # the configuration says something else by now, or RECONNECT was asked for

    @property
    def label(self) -> str:
        """The name as metrics and console columns show it, e.g. ``client_gone``."""
        return self.name.lower()
