"""The one table of metrics: their names for Prometheus and statsd, and what they say. Pure.

``docs/metrics.md`` is made from it. Names for Prometheus begin with ``gpooler_`` and end as its conventions
want; those for statsd with the prefix and ``routes.DATABASE.USER.`` or ``process.``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from gpooler.reasons import Reason
from gpooler.stats.registry import ProcessWord, RouteWord, Time

NAMESPACE: Final = "gpooler_"

NORMAL_ENDS: Final = frozenset(
    {
        Reason.CLIENT_TERMINATED,
        Reason.SHUTDOWN,
        Reason.SERVER_LIFETIME,
        Reason.SERVER_IDLE,
        Reason.SERVER_RECALLED,
        Reason.SERVER_OBSOLETE,
        Reason.SERVER_CLIENT_LEFT,
    }
)
"""Reasons that are nobody's error: counted under ``ends``, the others under ``errors``."""


class Type(StrEnum):
    """Of Prometheus."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Row:
    """One metric that is a word in shared memory."""

    name: str  # for Prometheus, without the namespace and the ``_total`` of a counter
    statsd: str
    word: int
    help: str


@dataclass(frozen=True, slots=True)
class TimeRow:
    """A histogram of Prometheus; for statsd the mean of an interval, where sum and count are words."""

    name: str
    time: Time
    help: str
    statsd: str = ""
    sum_word: RouteWord | None = None
    count_word: RouteWord | None = None


@dataclass(frozen=True, slots=True)
class OtherRow:
    """A metric that is made of something else than one word."""

    name: str
    statsd: str
    type: Type
    labels: tuple[str, ...]
    help: str


@dataclass(frozen=True, slots=True)
class Alias:
    """A metric under the name that pgbouncer_exporter gives it."""

    name: str
    type: Type
    scale: float
    value: Callable[[list[int]], int]  # of a route's block
    help: str


ROUTE_GAUGES: Final = (
    Row("clients", "clients.total", RouteWord.CLIENTS, "Clients logged in."),
    Row("active_clients", "clients.active", RouteWord.CLIENTS_ACTIVE, "Clients that have a server."),
    Row("waiting_clients", "clients.waiting", RouteWord.CLIENTS_WAITING, "Clients that wait for a server."),
    Row(
        "active_servers",
        "servers.active",
        RouteWord.SERVERS_ACTIVE,
        "Servers that have a client or are being reset.",
    ),
    Row("idle_servers", "servers.idle", RouteWord.SERVERS_IDLE, "Servers parked."),
    Row("login_servers", "servers.login", RouteWord.SERVERS_LOGIN, "Servers being opened."),
    Row(
        "resetting_servers",
        "servers.resetting",
        RouteWord.SERVERS_RESETTING,
        "Servers being reset: a part of the active ones.",
    ),
    Row(
        "cancelled_servers",
        "servers.cancelled",
        RouteWord.SERVERS_CANCELLED,
        "Servers that a cancel request is under way to.",
    ),
    Row("active_cancels", "cancels.active", RouteWord.CANCELS_ACTIVE, "Cancel requests being delivered."),
    Row("waiting_cancels", "cancels.waiting", RouteWord.CANCELS_WAITING, "Cancel requests that wait."),
    Row("closing_servers", "servers.closing", RouteWord.SERVERS_CLOSING, "Servers told to go, not yet gone."),
)
ROUTE_COUNTERS: Final = (
    Row("transactions", "transactions", RouteWord.TRANSACTIONS, "Transactions ended."),
    Row("queries", "queries", RouteWord.QUERIES, "Queries, Executes and function calls of clients."),
    Row("received_bytes", "bytes.in", RouteWord.BYTES_IN, "Bytes from clients to servers."),
    Row("sent_bytes", "bytes.out", RouteWord.BYTES_OUT, "Bytes from servers to clients."),
    Row("assignments", "assignments", RouteWord.ASSIGNMENTS, "Times a client was given a server."),
    Row("deploys", "deploys", RouteWord.DEPLOYS, "Times a client's parameters were set on a server."),
    Row("resets", "resets", RouteWord.RESETS, "Servers discarded before they were parked."),
    Row("pins", "pins", RouteWord.PINS, "Servers bound to their client by session state."),
    Row("cancels", "cancels", RouteWord.CANCELS, "Cancel requests that met a query or a waiting client."),
    Row("client_parses", "parses.client", RouteWord.CLIENT_PARSES, "Parse messages of clients."),
    Row("server_parses", "parses.server", RouteWord.SERVER_PARSES, "Parse messages to servers."),
    Row("binds", "binds", RouteWord.BINDS, "Bind messages of clients."),
    Row("logins", "logins", RouteWord.LOGINS, "Clients that completed their login."),
    Row("opened_servers", "servers.opened", RouteWord.SERVERS_OPENED, "Servers opened."),
)
ROUTE_TIMES: Final = (
    TimeRow(
        "wait_seconds",
        Time.WAIT,
        "How long clients waited for a server; no time for those that found one at once.",
        "time.wait",
        RouteWord.WAIT_US,
        RouteWord.ASSIGNMENTS,
    ),
    TimeRow(
        "query_seconds",
        Time.QUERY,
        "From a request, or the group of extended messages up to a Sync, to its end.",
        "time.query",
        RouteWord.QUERY_US,
        RouteWord.QUERIES,
    ),
    TimeRow(
        "transaction_seconds",
        Time.TRANSACTION,
        "How long clients had a server for a transaction.",
        "time.transaction",
        RouteWord.TRANSACTION_US,
        RouteWord.TRANSACTIONS,
    ),
    TimeRow("connect_seconds", Time.CONNECT, "Until a server was connected and logged in."),
    TimeRow(
        "login_seconds",
        Time.LOGIN,
        "From a client's first byte, or a second of silence, to the end of its login.",
    ),
)
PROCESS_GAUGES: Final = (
    Row("connections", "process.clients", ProcessWord.CLIENTS, "Clients counted against client_max."),
    Row("login_clients", "process.clients_login", ProcessWord.CLIENTS_LOGIN, "Clients that are logging in."),
    Row("console_clients", "process.consoles", ProcessWord.CONSOLES, "Clients of the console."),
    Row("accepting_workers", "process.listening", ProcessWord.LISTENING, "Workers that accept clients."),
    Row(
        "soft_oom_used_bytes",
        "process.soft_oom.used_bytes",
        ProcessWord.SOFT_OOM_USED,
        "Memory in use as [soft_oom] measures it; 0 without.",
    ),
    Row(
        "soft_oom_limit_bytes",
        "process.soft_oom.limit_bytes",
        ProcessWord.SOFT_OOM_LIMIT,
        "The limit of that; 0 without.",
    ),
    Row(
        "soft_oom_short",
        "process.soft_oom.short",
        ProcessWord.SOFT_OOM_SHORT,
        "1 while new clients are refused because more is in use.",
    ),
)
PROCESS_COUNTERS: Final = (
    Row("client_logins", "process.logins", ProcessWord.LOGINS, "Clients that completed their login."),
    Row("login_errors", "process.login_errors", ProcessWord.LOGIN_ERRORS, "Logins refused."),
    Row(
        "soft_oom_refused_clients",
        "process.soft_oom.refused",
        ProcessWord.SOFT_OOM_REFUSED,
        "Clients refused because memory was short.",
    ),
    Row(
        "soft_oom_signals",
        "process.soft_oom.signals",
        ProcessWord.SOFT_OOM_SIGNALS,
        "Signals sent to processes because memory was short.",
    ),
    Row(
        "sent_broker_messages",
        "process.broker_messages.sent",
        ProcessWord.BROKER_SENT,
        "Messages from workers to the broker.",
    ),
    Row(
        "received_broker_messages",
        "process.broker_messages.received",
        ProcessWord.BROKER_RECEIVED,
        "Messages from the broker to workers.",
    ),
    Row(
        "lost_log_lines",
        "process.lost.log_lines",
        ProcessWord.LOG_LINES_LOST,
        "Lines the log had no room for.",
    ),
    Row(
        "lost_log_queries",
        "process.lost.text_events",
        ProcessWord.TEXT_EVENTS_LOST,
        "Query texts and slow requests the log had no room for.",
    ),
)

ROUTE_LABELS: Final = ("database", "user")
MAXWAIT: Final = OtherRow(
    "maxwait_seconds",
    "clients.maxwait_ms",
    Type.GAUGE,
    ROUTE_LABELS,
    "How long the client at the head of the queue has waited.",
)
QUERY_QUANTILE: Final = OtherRow(
    "query_quantile_seconds",
    "quantiles.query.pNN_ms",
    Type.GAUGE,
    (*ROUTE_LABELS, "quantile"),
    "The quantiles of query time that the rule asks for, of the last one to two stats_interval.",
)
TRANSACTION_QUANTILE: Final = OtherRow(
    "transaction_quantile_seconds",
    "quantiles.transaction.pNN_ms",
    Type.GAUGE,
    (*ROUTE_LABELS, "quantile"),
    "The same of transaction time.",
)
ERRORS: Final = OtherRow(
    "errors",
    "errors.REASON",
    Type.COUNTER,
    (*ROUTE_LABELS, "reason"),
    "Connections ended, and requests refused, by what went wrong.",
)
ENDS: Final = OtherRow(
    "ends",
    "ends.REASON",
    Type.COUNTER,
    (*ROUTE_LABELS, "reason"),
    "Connections ended as they should.",
)
ROUTE_OTHERS: Final = (MAXWAIT, QUERY_QUANTILE, TRANSACTION_QUANTILE, ERRORS, ENDS)

INFO: Final = OtherRow("info", "", Type.GAUGE, ("version",), "Always 1; the label says the version.")
WORKERS: Final = OtherRow("workers", "process.workers", Type.GAUGE, (), "Workers that live.")
DRAINING: Final = OtherRow("draining", "", Type.GAUGE, (), "1 in a graceful shutdown, from its first moment.")
LOST_METRICS: Final = OtherRow(
    "lost_metrics",
    "process.lost.metrics",
    Type.COUNTER,
    (),
    "Datagrams that could not be sent to statsd, since this broker began; a gauge for statsd.",
)
RESIDENT_BYTES: Final = OtherRow(
    "process_resident_memory_bytes",
    "process.NAME.resident_bytes",
    Type.GAUGE,
    ("process",),
    "Memory that a process has, counters shared with others included.",
)
CPU_SECONDS: Final = OtherRow(
    "process_cpu_seconds",
    "process.NAME.cpu_ms",
    Type.COUNTER,
    ("process",),
    "CPU time of a process, user and system.",
)
OPEN_FDS: Final = OtherRow(
    "process_open_fds",
    "process.NAME.open_fds",
    Type.GAUGE,
    ("process",),
    "Open file descriptors of a process; missing where the system does not tell.",
)
CERTIFICATE_END: Final = OtherRow(
    "certificate_not_after_seconds",
    "",
    Type.GAUGE,
    ("section", "name", "option"),
    "When the certificate that an option names ends, in seconds since 1970.",
)
PROCESS_OTHERS: Final = (
    INFO,
    WORKERS,
    DRAINING,
    LOST_METRICS,
    RESIDENT_BYTES,
    CPU_SECONDS,
    OPEN_FDS,
    CERTIFICATE_END,
)

# --- the names of pgbouncer_exporter ----------------------------------------------------------------

_SECONDS: Final = 1e-6


def _word(word: RouteWord) -> Callable[[list[int]], int]:
    return lambda block: block[word]


def _linked_or_idle(block: list[int]) -> int:
    return block[RouteWord.CLIENTS] - block[RouteWord.CLIENTS_WAITING]


def _without_reset(block: list[int]) -> int:
    return block[RouteWord.SERVERS_ACTIVE] - block[RouteWord.SERVERS_RESETTING]


def _pool(name: str, value: Callable[[list[int]], int], help_text: str) -> Alias:
    return Alias(f"pgbouncer_pools_{name}_connections", Type.GAUGE, 1, value, help_text)


POOLS: Final = (
    _pool("client_active", _linked_or_idle, "Clients that do not wait."),
    _pool("client_waiting", _word(RouteWord.CLIENTS_WAITING), "As gpooler_waiting_clients."),
    _pool("client_active_cancel", _word(RouteWord.CANCELS_ACTIVE), "As gpooler_active_cancels."),
    _pool("client_waiting_cancel", _word(RouteWord.CANCELS_WAITING), "As gpooler_waiting_cancels."),
    _pool("server_active", _without_reset, "Servers that have a client."),
    _pool("server_active_cancel", _word(RouteWord.CANCELS_ACTIVE), "As gpooler_active_cancels."),
    _pool("server_being_canceled", _word(RouteWord.SERVERS_CANCELLED), "As gpooler_cancelled_servers."),
    _pool("server_idle", _word(RouteWord.SERVERS_IDLE), "As gpooler_idle_servers."),
    _pool("server_testing", _word(RouteWord.SERVERS_RESETTING), "As gpooler_resetting_servers."),
    _pool("server_login", _word(RouteWord.SERVERS_LOGIN), "As gpooler_login_servers."),
)
"""Of a database and a user, as SHOW POOLS; and pgbouncer_pools_client_maxwait_seconds besides."""


def _total(name: str, scale: float, word: RouteWord, of: str) -> Alias:
    return Alias(f"pgbouncer_stats_totals_{name}", Type.COUNTER, scale, _word(word), f"As {of}.")


STATS_TOTALS: Final = (
    _total("queries_pooled", 1, RouteWord.QUERIES, "gpooler_queries"),
    _total("queries_duration_seconds", _SECONDS, RouteWord.QUERY_US, "the sum of gpooler_query_seconds"),
    _total("sql_transactions_pooled", 1, RouteWord.TRANSACTIONS, "gpooler_transactions"),
    _total(
        "server_in_transaction_seconds",
        _SECONDS,
        RouteWord.TRANSACTION_US,
        "the sum of gpooler_transaction_seconds",
    ),
    _total("client_wait_seconds", _SECONDS, RouteWord.WAIT_US, "the sum of gpooler_wait_seconds"),
    _total("received_bytes", 1, RouteWord.BYTES_IN, "gpooler_received_bytes"),
    _total("sent_bytes", 1, RouteWord.BYTES_OUT, "gpooler_sent_bytes"),
    _total("client_parses", 1, RouteWord.CLIENT_PARSES, "gpooler_client_parses"),
    _total("server_parses", 1, RouteWord.SERVER_PARSES, "gpooler_server_parses"),
    _total("binds", 1, RouteWord.BINDS, "gpooler_binds"),
)
"""Of a database, all its users together, as SHOW STATS_TOTALS."""

POOLS_MAXWAIT: Final = OtherRow(
    "pgbouncer_pools_client_maxwait_seconds", "", Type.GAUGE, ROUTE_LABELS, "As gpooler_maxwait_seconds."
)
UP: Final = OtherRow("pgbouncer_up", "", Type.GAUGE, (), "Always 1.")
VERSION: Final = OtherRow(
    "pgbouncer_version_info", "", Type.GAUGE, ("version",), "Always 1; gpooler's version."
)
DATABASES: Final = OtherRow("pgbouncer_databases", "", Type.GAUGE, (), "Databases that have a route.")
USERS: Final = OtherRow("pgbouncer_users", "", Type.GAUGE, (), "Users that have a route.")
POOL_COUNT: Final = OtherRow("pgbouncer_pools", "", Type.GAUGE, (), "Routes.")
USED_CLIENTS: Final = OtherRow("pgbouncer_used_clients", "", Type.GAUGE, (), "As gpooler_connections.")
LOGIN_CLIENTS: Final = OtherRow("pgbouncer_login_clients", "", Type.GAUGE, (), "As gpooler_login_clients.")
USED_SERVERS: Final = OtherRow(
    "pgbouncer_used_servers", "", Type.GAUGE, (), "Servers that are open or being opened."
)
LISTS: Final = (UP, VERSION, DATABASES, USERS, POOL_COUNT, USED_CLIENTS, LOGIN_CLIENTS, USED_SERVERS)
