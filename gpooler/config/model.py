"""The configuration as the rest of gpooler sees it: frozen, checked, with Odyssey's option names."""

from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Literal

from gpooler.auth.hba import Hba
from gpooler.config.affinity import CpuAffinity
from gpooler.config.field import Reload, ignored, not_built, option, required
from gpooler.config.rule import (
    KEEPALIVE_MOST,
    PROBES_MOST,
    USR_TIMEOUT_LEAST,
    GroupBody,
    RuleBody,
    Section,
    Watchdog,
)
from gpooler.config.storage import Endpoint
from gpooler.config.values import (
    Bool,
    Count,
    FileMode,
    FreeText,
    Ignored,
    LogFormat,
    Ms,
    Networks,
    Number,
    OneOf,
    OptionalPort,
    OptionalPositive,
    OptionalSecret,
    OptionalStr,
    OptionalTexts,
    Port,
    Positive,
    Secret,
    SignalName,
    Size,
    SocketPath,
    Str,
    Text,
    Workers,
)
from gpooler.config.words import (
    Authentication,
    BalancingMethod,
    ConnectionType,
    LdapScheme,
    Pause,
    Pool,
    PoolRouting,
    QueryParsing,
    Role,
    StorageType,
    SyslogFacility,
    TargetSessionAttrs,
    Tls,
    TlsRecords,
)

__all__ = [
    "Authentication",
    "Config",
    "ConnectionType",
    "DropOptions",
    "Endpoint",
    "LdapEndpoint",
    "Limits",
    "Listen",
    "Logging",
    "Metrics",
    "Performance",
    "Pool",
    "PoolRouting",
    "Role",
    "Routing",
    "Rule",
    "Secret",
    "Service",
    "SharedPool",
    "SoftOom",
    "SoftOomDrop",
    "Storage",
    "Tls",
]

DEFAULT = "default"
CLIENTS_ROUTING_PER_WORKER = 64
CANCELS_PER_WORKER = 2
STACK_PAGES_LEAST = 4
COMM_MOST = 15  # characters of a process' name that the kernel keeps
DEPRECATED = "deprecated in Odyssey"
NO_EFFECT = "gpooler has nothing it could mean for"
HOSTS_ADVICE = "a storage has one host"
PROMETHEUS_ALWAYS = "prometheus_port alone decides"


class DropOptions(Section):
    """``[service.conn_drop_options]``: how fast clients are dropped while gpooler drains."""

    drop_enabled: Bool = option(True, "Drop clients between transactions; no: wait until they leave.")
    rate: Positive = option(1, "At most this many an interval, in each worker.")
    interval_ms: Annotated[int, Number("ms", least=1)] = option(1000, "Length of that interval.")


class Service(Section):
    """``[service]``: the process as the system sees it."""

    daemonize: Bool = option(
        False,
        "Detach from the terminal; the command ends when gpooler serves. Wants log_file or log_syslog: "
        "nothing is written to the standard output. Ignored under a service manager (NOTIFY_SOCKET).",
        reload=Reload.RESTART,
    )
    priority: Annotated[int, Number(least=-20, most=19)] = option(
        0,
        "Nice value of all processes, set before root is given up; 0 leaves it as it is at the start.",
        reload=Reload.RESTART,
    )
    user: OptionalStr = option(
        None,
        "Started as root: become this user once the listeners are bound. Its groups count, too.",
        reload=Reload.RESTART,
        example="postgres",
    )
    pid_file: OptionalStr = option(
        None, "Where the process id is written.", reload=Reload.RESTART, example="/run/gpooler.pid"
    )
    locks_dir: OptionalStr = ignored(None, "Directory of lock files.", "unused in Odyssey too")
    unix_socket_dir: OptionalStr = option(
        None,
        "Directory of the sockets .s.PGSQL.PORT of listeners and storages without a host.",
        reload=Reload.RESTART,
        example="/tmp",
    )
    unix_socket_mode: Annotated[int | None, FileMode()] = option(
        None, "Permissions of the listeners' sockets.", reload=Reload.RESTART, example="0666"
    )
    enable_online_restart: Bool = option(True, "Allow a restart by SIGUSR2 that nobody feels.")
    bindwith_reuseport: Bool = option(
        True, "Bind listeners with SO_REUSEPORT, so that two gpoolers may overlap.", reload=Reload.RESTART
    )
    graceful_die_on_errors: Ignored = ignored(None, "Of no effect.", DEPRECATED)
    graceful_shutdown_timeout_ms: Ms = option(
        30_000, "After this long in a graceful shutdown exit with status 124; 0 is never."
    )
    drain_delay_ms: Ms = option(
        0,
        "In a graceful shutdown /readyz says so for this long before anything else happens: time for load "
        "balancers to look elsewhere.",
    )
    max_sigterms_to_die: Positive = option(3, "This SIGTERM or SIGINT exits at once with status 1.")
    enable_host_watcher: Bool = ignored(
        False, "Sample CPU and memory of the host.", "SHOW HOST_UTILIZATION samples when it is asked"
    )
    conn_drop_options: DropOptions = option(DropOptions(), "How clients are dropped in a graceful shutdown.")
    online_restart_drop_options: DropOptions | None = option(None, "The old name of conn_drop_options.")


class Logging(Section):
    """``[logging]``."""

    log_format: Annotated[str, LogFormat()] = required(
        'The template of a line, or "json".',
        placeholder="%m",
        example="%p %t %e %l [%i %s] (%c) %m\n",
    )
    log_file: OptionalStr = option(
        None, "Append to this file; SIGUSR1 reopens it.", example="/var/log/gpooler.log"
    )
    log_to_stdout: Bool = option(True, "Write to the standard output.")
    log_syslog: Bool = option(False, "Write to syslog.")
    log_syslog_ident: Str = option(
        "gpooler", "The name there.", odyssey="odyssey", departure="the program's name"
    )
    log_syslog_facility: Annotated[SyslogFacility, OneOf(SyslogFacility)] = option(
        SyslogFacility.DAEMON, "The facility there."
    )
    log_debug: Bool = option(False, "Debug lines.")
    log_config: Bool = option(False, "Log the effective configuration at start and at reload.")
    log_session: Bool = option(True, "Log when clients and servers come and go.")
    log_query: Bool = option(False, "Log the text of every query.")
    log_slow_ms: Ms = option(
        0,
        "Log requests that take so long or longer, with where their time went and how their text begins; "
        "0 is off.",
    )
    log_stats: Bool = option(True, "Log a line a route each stats_interval.")
    log_async: Bool = option(True, "Requests never wait for the log.", reload=Reload.RESTART)
    log_queue_depth: Positive = option(
        30_000,
        "Lines that may wait for the log; beyond it they are dropped and counted.",
        reload=Reload.RESTART,
    )
    stats_interval: Annotated[int, Number("s", least=1)] = option(
        3, "Averaging window, and period of the statistics lines."
    )


class Performance(Section):
    """``[performance]``: processes, sockets, name resolution."""

    workers: Annotated[int | Literal["auto"], Workers()] = option(
        "auto",
        "Worker processes; auto is one a core.",
        reload=Reload.RESTART,
        odyssey=1,
        departure="one a core",
    )
    resolvers: Positive = ignored(
        1, "Threads that resolve names.", "names are resolved in threads that gpooler counts itself"
    )
    dns_cache_ttl: Ms = option(
        30_000,
        "How long a resolved name is kept; names in rules are looked up so often, but once a second at most.",
    )
    readahead: OptionalPositive = ignored(None, "Size of a read.", "the relay sizes its reads itself")
    cache_coroutine: Ignored = ignored(1024, "Idle coroutine stacks kept.", NO_EFFECT)
    cache_msg_gc_size: Ignored = ignored(0, "Reuse of message buffers.", NO_EFFECT)
    coroutine_stack_size: Annotated[int, Number(least=STACK_PAGES_LEAST)] = ignored(
        16, "Pages of a coroutine's stack.", NO_EFFECT
    )
    system_coroutine_stack_size: Annotated[int, Number(least=STACK_PAGES_LEAST)] = ignored(
        32, "Pages of a system coroutine's stack.", NO_EFFECT
    )
    cache: Ignored = ignored(None, "Of no effect.", DEPRECATED)
    cache_chunk: Ignored = ignored(None, "Of no effect.", DEPRECATED)
    pipeline: Ignored = ignored(None, "Of no effect.", DEPRECATED)
    packet_read_size: Ignored = ignored(None, "Of no effect.", DEPRECATED)
    packet_write_queue: Ignored = ignored(None, "Of no effect.", DEPRECATED)
    nodelay: Bool = option(True, "TCP_NODELAY on both sides.")
    disable_nolinger: Bool = option(
        True,
        "no sets SO_LINGER 0 on client sockets: closing resets the connection.",
        odyssey=False,
        departure="a reset can cut off the last error",
    )
    keepalive: Annotated[int, Number("s", most=KEEPALIVE_MOST)] = option(
        15, "Idle time before TCP keepalive probes, on both sides; 0 is off."
    )
    keepalive_keep_interval: Annotated[int, Number("s", least=1, most=KEEPALIVE_MOST)] = option(
        5, "Time between probes."
    )
    keepalive_probes: Annotated[int, Number(least=1, most=PROBES_MOST)] = option(
        3, "Probes without an answer until the connection is dead."
    )
    keepalive_usr_timeout: Annotated[int, Number("ms", least=USR_TIMEOUT_LEAST)] = option(
        0, "TCP_USER_TIMEOUT; 0 is the system's, -1 is computed from the three above."
    )
    tls_records: Annotated[TlsRecords, OneOf(TlsRecords)] = option(
        TlsRecords.GPOOLER,
        "Who seals and opens the records of clients by TLS 1.3 after OpenSSL's handshake. gpooler: the "
        "relay, with libcrypto's ciphers, in 0.5 kB a client; openssl: its session, in 23 kB. Older versions "
        "of TLS, and servers, are always OpenSSL's.",
    )
    cpu_affinity: Annotated[str, CpuAffinity()] = option(
        "off",
        "Cores of the processes. auto: each worker on one of those that gpooler may use, in turn; or rules "
        'for workers, the broker and the master, such as "worker:0-3,8;worker[2]:1;broker:0;master:0": '
        "worker[2] is the second worker, and goes before what is said of all of them.",
        reload=Reload.RESTART,
    )

    def worker_count(self, cores: int) -> int:
        """Worker processes on a machine with ``cores`` usable cores."""
        return max(1, cores) if self.workers == "auto" else self.workers


class Limits(Section):
    """``[limits]``: of clients, logins, connects and cancels."""

    client_max: OptionalPositive = option(
        None, "Clients at once, over all workers; beyond it 53300.", example=1000
    )
    client_max_routing: Count = option(
        0,
        "Logged-in clients that may wait at once for the broker to name their route; others wait for their "
        "turn. 0 is 64 a worker; workers have equal parts, at least 1.",
    )
    server_login_retry: Annotated[int, Number("ms", least=1)] = option(
        1, "Pause before another try when the server has too many connections."
    )
    backend_connect_timeout_ms: Annotated[int, Number("ms", least=1)] = option(
        30_000, "Limit of connect and login at a server."
    )
    cancel_timeout_ms: Ms = option(1000, "Limit of the delivery of one cancel; 0 is none.")
    cancel_queue_timeout_ms: Annotated[int, Number("ms", least=-1)] = option(
        -1, "How long a cancel waits for its turn, then it is dropped; -1 is twice cancel_timeout_ms."
    )
    cancel_max_inflight: Annotated[int, Number(least=-1)] = option(
        -1, "Cancels toward servers at once; -1 is two a worker. Workers have equal parts, at least 1."
    )
    auth_threads: Annotated[int, Number(least=1, most=1024)] = option(
        8, "Threads of each worker for each PAM service and LDAP endpoint: logins it checks at once."
    )
    auth_queue_limit: Count = option(
        128, "Logins of a worker that may wait for such a thread; what comes beyond is refused at once."
    )
    auth_timeout_ms: Annotated[int, Number("ms", least=1)] = option(
        5000,
        "Limit of asking a PAM service or an LDAP endpoint, the wait for a thread included; and of an "
        "auth_query with the wait for a connection, and its opening.",
    )
    auth_failure_delay_ms: Ms = option(
        0, "How long the answer to a failed login is kept back, at most until client_login_timeout; 0 is off."
    )
    auth_failure_max: Count = option(
        0,
        "After so many failed logins as one user from one address, over all workers and with no success "
        "between them, every login as that user from there fails for auth_failure_ban_ms; 0 is off. Behind a "
        "proxy all clients have one address. A whole /64 counts as one address of IPv6.",
    )
    auth_failure_ban_ms: Annotated[int, Number("ms", least=1)] = option(
        60_000, "How long, and after how long without a failure the count begins anew."
    )
    auth_failure_trusted: Annotated[tuple[IPv4Network | IPv6Network, ...], Networks()] = option(
        (),
        "Networks whose failed logins are neither delayed nor counted; nor are those at Unix sockets.",
    )

    def routing_limit(self, workers: int) -> int:
        """Clients in login at once, over all workers."""
        return self.client_max_routing or CLIENTS_ROUTING_PER_WORKER * workers

    def cancel_limit(self, workers: int) -> int:
        """Cancels toward servers at once, over all workers; at least 1."""
        return max(
            1, self.cancel_max_inflight if self.cancel_max_inflight >= 0 else CANCELS_PER_WORKER * workers
        )

    @property
    def cancel_queue_limit_ms(self) -> int:
        """How long a cancel waits for its turn; 0 is without limit."""
        if self.cancel_queue_timeout_ms >= 0:
            return self.cancel_queue_timeout_ms
        return 2 * self.cancel_timeout_ms


class Metrics(Section):
    """``[metrics]``."""

    statsd_host: OptionalStr = option(None, "Send metrics to statsd at this host.", example="127.0.0.1")
    statsd_port: Port = option(8125, "And this UDP port.")
    statsd_prefix: Annotated[str, FreeText(255)] = option("gpooler", "First part of every metric's name.")
    prometheus_host: Str = option(
        "127.0.0.1",
        'The address where prometheus_port is served; "*" is every one.',
        reload=Reload.RESTART,
    )
    prometheus_port: OptionalPort = option(
        None,
        "Serve /metrics, /healthz and /readyz at this TCP port (docs/metrics.md).",
        reload=Reload.RESTART,
        example=9127,
    )
    promhttp_server_port: OptionalPort = option(
        None, "Odyssey's name of prometheus_port.", reload=Reload.RESTART, example=9127
    )
    log_general_stats_prom: Bool = ignored(False, "General statistics for Prometheus.", PROMETHEUS_ALWAYS)
    log_route_stats_prom: Bool = ignored(False, "Statistics by route for Prometheus.", PROMETHEUS_ALWAYS)

    @property
    def http_port(self) -> int | None:
        """Where Prometheus is served; None: nowhere."""
        return self.promhttp_server_port if self.prometheus_port is None else self.prometheus_port


class Routing(Section):
    """``[routing]``: how a client finds its rule, and what the pooler does in its name."""

    sequential_routing: Bool = option(
        False, "yes: the first rule in the order of the file; no: the most specific.", reload=Reload.LOGIN
    )
    hba_file: OptionalStr = option(
        None,
        "Host-based rules in the syntax of pg_hba.conf (docs/authentication.md): the first line that takes a "
        "client decides, and none refuses it; unset: the rules alone decide. Relative to the file that has "
        "it.",
        reload=Reload.LOGIN,
    )
    group_checker_interval: Annotated[int, Number("ms", least=1)] = option(7000, "Period of group queries.")
    availability_zone: Annotated[str, FreeText(15)] = not_built("", "The zone gpooler is in.")
    smart_search_path_enquoting: Bool = ignored(
        False,
        "Quote each element of search_path.",
        "gpooler always does: each server gets the elements that the client or its rule gave",
    )
    external_auth_socket_path: SocketPath = option(
        "/tmp/external-auth.sock",
        'Unix socket of the agent for authentication = "external". Better in a directory that only gpooler '
        "and the agent can write to.",
    )
    virtual_processing: Bool = option(
        False,
        "SHOW, SET and RESET of odyssey.target_session_attrs (or gpooler.…) are answered here, with a "
        "notice. Its one value is any.",
        reload=Reload.SESSION,
    )
    virtual_transaction: Bool = option(
        False,
        "A plain BEGIN takes no server in transaction pools: it is answered here and sent with the query "
        "that follows.",
        reload=Reload.SESSION,
        odyssey=True,
        departure="a client that began a transaction has its server, unless it is asked otherwise",
    )


class QueryParsingOptions(Section):
    """``[query_parsing]``."""

    mode: Annotated[QueryParsing, OneOf(QueryParsing)] = ignored(
        QueryParsing.MINIMAL,
        "How much of SQL is understood in passing.",
        "the relay reads as much of it as the rule's options need",
    )
    mem_limit: Annotated[int, Size()] = ignored(
        1 << 20, "Memory of the parser for a client.", "the scanner keeps a few bytes a client"
    )


class SoftOomDrop(Section):
    """``[soft_oom.drop]``."""

    signal: Annotated[str, SignalName()] = option(
        "SIGTERM", "With or without SIG. SIGKILL of one PostgreSQL process restarts the whole server."
    )
    max_rate: Positive = option(3, "How many processes at each check.")


class SoftOom(Section):
    """``[soft_oom]``: refuse new clients while memory is short."""

    limit: Annotated[int, Size()] = required(
        "Above it new clients get FATAL 53200 when they have proved who they are; "
        "those of the console come in.",
        placeholder=1,
        example="12GB",
    )
    process: Annotated[str, FreeText(COMM_MOST)] = option(
        "",
        "The memory (PSS) of all processes counts that have this in their names, as ps -o comm shows them; "
        "empty: what the machine has in use, all but what is available.",
        example="postgres",
    )
    check_interval_ms: Annotated[int, Number("ms", least=1)] = option(1000, "How often that is looked at.")
    drop: SoftOomDrop | None = option(
        None,
        "While memory is short, send a signal to the largest of these processes. Needs process. Never to one "
        "that has others of them as children, nor to gpooler's master and broker.",
    )


class ListenBody(Section):
    """``[[listen]]``: one address to accept clients at."""

    host: OptionalStr = option(
        None,
        '"*" is any address; a name is resolved and each address bound; unset: a Unix socket.',
        example="127.0.0.1",
    )
    port: Port = option(
        6432,
        "TCP port, or the number in the name of the Unix socket.",
    )
    backlog: Annotated[int, Number(least=1, most=65_535)] = option(
        128,
        "Connections the kernel keeps until they are accepted, up to net.core.somaxconn. More than that at "
        "once try again a second later: raise it where many reconnect together.",
    )
    client_login_timeout: Annotated[int, Number("ms", least=1)] = option(
        15_000, "Limit of startup, authentication and routing."
    )
    tls: Annotated[Tls, OneOf(Tls)] = option(
        Tls.DISABLE,
        "TLS with clients. allow and prefer: who asks for it gets it; require: nobody comes in without; "
        "verify_ca and verify_full: nor without a certificate that an authority of tls_ca_file has signed.",
    )
    tls_ca_file: OptionalStr = option(
        None,
        "Authorities, in PEM: a client that shows a certificate must have it from one of these.",
        example="ca.pem",
    )
    tls_key_file: OptionalStr = option(
        None, "The private key, in PEM, without a passphrase.", example="key.pem"
    )
    tls_cert_file: OptionalStr = option(
        None, "The certificate, in PEM; those between it and its authority follow it.", example="cert.pem"
    )
    tls_crl_file: OptionalStr = option(
        None, "Revocation lists of these authorities, in PEM.", example="crl.pem"
    )
    tls_protocols: OptionalStr = option(
        None,
        "Versions of TLS: tlsv1.0 to tlsv1.3, with commas; secure: tlsv1.2 and tlsv1.3, as when unset.",
        example="tlsv1.3",
    )
    tls_ciphers: OptionalStr = option(
        None, "OpenSSL's list of cipher suites, up to TLS 1.2.", example="HIGH:!aNULL"
    )
    tls_ciphersuites: OptionalStr = option(
        None, "OpenSSL's list of cipher suites of TLS 1.3.", example="TLS_AES_128_GCM_SHA256"
    )
    target_session_attrs: Annotated[TargetSessionAttrs | None, OneOf(TargetSessionAttrs)] = not_built(
        None, "Which of several hosts will do for clients of this port.", HOSTS_ADVICE
    )
    balancing_method: Annotated[BalancingMethod | None, OneOf(BalancingMethod)] = not_built(
        None, "How one of several hosts is chosen for clients of this port.", HOSTS_ADVICE
    )
    catchup_timeout: Annotated[int | None, Number("s")] = not_built(
        None, "Replica lag allowed for this port."
    )
    storage: OptionalTexts = not_built(
        (), "Storages in place of the rule's, in order.", 'use the rule\'s "storage"'
    )
    compression: Ignored = ignored(None, "Of no effect.", DEPRECATED)


class Balancing(Section):
    """``[storage.NAME.balancing]``."""

    method: Annotated[BalancingMethod, OneOf(BalancingMethod)] = not_built(
        BalancingMethod.ROUNDROBIN, "How one of several hosts is chosen.", HOSTS_ADVICE
    )
    az_aware: Bool = not_built(False, "Hosts of the own availability zone first.", HOSTS_ADVICE)
    show_notice_messages: Bool = not_built(False, "Tell clients which host was chosen.", HOSTS_ADVICE)


class StorageBody(Section):
    """``[storage.NAME]``: a PostgreSQL host."""

    type: Annotated[StorageType, OneOf(StorageType)] = required(
        '"remote" is PostgreSQL; "local" is the console (docs/console.md), and has no other option.',
        placeholder="remote",
        reload=Reload.SERVER,
        example="remote",
    )
    host: Annotated[str | None, Text(4095)] = option(
        None,
        "[tcp://|unix://]host[:port][:zone]; a unix:// host is a socket's directory; unset: unix_socket_dir.",
        reload=Reload.SERVER,
        example="127.0.0.1",
    )
    port: Port = option(5432, "For hosts without their own.", reload=Reload.SERVER)
    tls: Annotated[Tls, OneOf(Tls)] = option(
        Tls.DISABLE,
        "TLS with servers, as sslmode of libpq; a Unix socket has none. allow: only where the server refuses "
        "a login without it; prefer: where the server has it.",
        reload=Reload.SERVER,
    )
    tls_ca_file: OptionalStr = option(
        None,
        "Authorities, in PEM; with it require verifies the server's certificate, too.",
        reload=Reload.SERVER,
        example="ca.pem",
    )
    tls_key_file: OptionalStr = option(
        None,
        "Private key of the certificate shown to the server, in PEM.",
        reload=Reload.SERVER,
        example="key.pem",
    )
    tls_cert_file: OptionalStr = option(
        None, "The certificate shown to the server, in PEM.", reload=Reload.SERVER, example="cert.pem"
    )
    tls_crl_file: OptionalStr = option(
        None, "Revocation lists of these authorities, in PEM.", reload=Reload.SERVER, example="crl.pem"
    )
    tls_protocols: OptionalStr = option(None, "As of a listener.", reload=Reload.SERVER, example="tlsv1.3")
    tls_ciphers: OptionalStr = option(None, "As of a listener.", reload=Reload.SERVER, example="HIGH:!aNULL")
    tls_ciphersuites: OptionalStr = option(
        None, "As of a listener.", reload=Reload.SERVER, example="TLS_AES_128_GCM_SHA256"
    )
    server_max_routing: Count = option(0, "Server logins at once, over all workers; 0 is one a worker.")
    endpoints_status_poll_interval: Annotated[int, Number("ms", least=1)] = not_built(
        1000, "How long the known role of a host is trusted.", HOSTS_ADVICE
    )
    balancing: Balancing | None = option(None, "How one of several hosts is chosen.")
    watchdog: Watchdog | None = not_built(None, "A rule's body: the pool on which lag is asked.")


class SharedPool(Section):
    """``[shared_pool.NAME]``: one limit for the servers of all rules that name it."""

    pool_size: Positive = required("Servers at once, over all these rules.", placeholder=1, example=10)


class LdapEndpoint(Section):
    """``[ldap_endpoint.NAME]``: a directory, and how a user is found there."""

    ldapserver: Str = required(
        "Host, or several separated by spaces, which are tried in turn.",
        placeholder="?",
        reload=Reload.LOGIN,
        example="ldap.example.com",
    )
    ldapport: Annotated[int | None, Number(least=1, most=65_535)] = option(
        None, "Port; unset: 389, or 636 with ldaps.", reload=Reload.LOGIN, example=389
    )
    ldapscheme: Annotated[LdapScheme, OneOf(LdapScheme)] = option(
        LdapScheme.LDAP, "ldaps is TLS from the first byte.", reload=Reload.LOGIN
    )
    ldaptls: Bool = option(
        False, "With ldap: encrypt by StartTLS before anything else is said.", reload=Reload.LOGIN
    )
    tls_ca_file: OptionalStr = option(
        None,
        "Under ldaps and ldaptls: authorities of the directory's certificate, which is always verified; "
        "unset: as ldap.conf says.",
        reload=Reload.LOGIN,
    )
    ldapprefix: Annotated[str | None, FreeText()] = option(
        None,
        "Direct bind: what stands before the user name, such as uid= or a domain with a backslash.",
        reload=Reload.LOGIN,
        example="uid=",
    )
    ldapsuffix: Annotated[str | None, FreeText()] = option(
        None, "And behind it.", reload=Reload.LOGIN, example=",ou=people,dc=example,dc=com"
    )
    ldapbasedn: OptionalStr = option(
        None,
        "Search and bind: below this entry, at any depth, the user's entry is sought.",
        reload=Reload.LOGIN,
        example="dc=example,dc=com",
    )
    ldapbinddn: OptionalStr = option(
        None, "Who searches; unset: anonymous.", reload=Reload.LOGIN, example="cn=gpooler,dc=example,dc=com"
    )
    ldapbindpasswd: OptionalSecret = option(
        None, "With what password.", reload=Reload.LOGIN, example="secret"
    )
    ldapsearchattribute: OptionalStr = option(
        None, "The attribute that is the user name; unset: uid.", reload=Reload.LOGIN, example="uid"
    )
    ldapsearchfilter: OptionalStr = option(
        None,
        "A filter that must hold besides.",
        reload=Reload.LOGIN,
        example="(objectClass=inetOrgPerson)",
    )
    ldapscope: OptionalStr = ignored(None, "Depth of the search.", "it is always the whole tree")


class DatabaseRules(Section):
    """``[database.NAME]``: its users and groups. One table is kept as a list of one."""

    user: Mapping[str, tuple[RuleBody, ...]] = option({}, "Rules by user name.")
    group: Mapping[str, tuple[GroupBody, ...]] = option(
        {}, "Rules by group name, for the members that a query names."
    )


class Document(Section):
    """The whole configuration as it is written, includes read in."""

    service: Service = option(Service(), "The process as the system sees it.")
    logging: Logging = option(None, "What is logged, where and how.")
    performance: Performance = option(Performance(), "Processes, sockets, name resolution.")
    limits: Limits = option(Limits(), "Limits of clients, logins, connects and cancels.")
    metrics: Metrics = option(Metrics(), "Where metrics go.")
    routing: Routing = option(Routing(), "How a client finds its rule.")
    query_parsing: QueryParsingOptions = option(QueryParsingOptions(), "SQL understood in passing.")
    soft_oom: SoftOom | None = option(None, "Refuse new clients while memory is short.")
    listen: tuple[ListenBody, ...] = option((), "Addresses to accept clients at.")
    storage: Mapping[str, StorageBody] = option({}, "PostgreSQL hosts by name.", reload=Reload.SERVER)
    shared_pool: Mapping[str, SharedPool] = option({}, "Limits over several rules.")
    ldap_endpoint: Mapping[str, LdapEndpoint] = option({}, "LDAP servers by name.", reload=Reload.LOGIN)
    database: Mapping[str, DatabaseRules] = option({}, "The rules.")


# What the rest of gpooler is given: the bodies with what the whole document says about them.


class Listen(ListenBody):
    """A listener; ``unix_path`` is its socket when it has no host, else None."""

    unix_path: str | None = None
    number: int = 0  # of all that there ever were


class Storage(StorageBody):
    """A storage with its endpoints; the console has none, PostgreSQL at least one."""

    name: str
    endpoints: tuple[Endpoint, ...]

    def routing_limit(self, workers: int) -> int:
        """Server logins at once, over all workers."""
        return self.server_max_routing or workers


class Rule(RuleBody):
    """A rule. ``name`` is unique: ``order_app.default``, with ``[1]`` for the second of an array."""

    name: str
    database: str
    user: str  # DEFAULT for a group's, which says itself whom it takes
    group: str | None = None
    epoch: int = 0  # counted up by a reload that makes its servers obsolete

    @property
    def is_default_database(self) -> bool:
        """Whether it matches any database."""
        return self.database == DEFAULT

    @property
    def is_default_user(self) -> bool:
        """Whether it matches any user."""
        return self.user == DEFAULT

    @property
    def server_password(self) -> Secret | None:
        """What servers are shown: that for them, else the first of the clients'."""
        return self.storage_password or (self.password[0] if self.password else None)

    def __hash__(self) -> int:
        return hash(self.name)


class GroupRule(GroupBody, Rule):
    """A rule for the members of ``group``: ``order_app.group.staff``."""


class Config(Section):
    """A configuration that passed every check."""

    service: Service
    logging: Logging
    performance: Performance
    limits: Limits
    metrics: Metrics
    routing: Routing
    query_parsing: QueryParsingOptions
    listen: tuple[Listen, ...]
    storage: Mapping[str, Storage]
    shared_pool: Mapping[str, SharedPool]
    ldap_endpoint: Mapping[str, LdapEndpoint]
    rules: tuple[Rule, ...]  # in the order of the file
    hba: Hba | None = None
    soft_oom: SoftOom | None = None
    # what reloads have left (config/succession.py): rules for clients of another kind than new ones are …
    retired: tuple[Rule, ...] = ()
    removed: tuple[Rule, ...] = ()  # … and rules whose clients are sent away

    # what operators have asked for (process/operations.py), by database, "" for all of them
    pauses: Mapping[str, Pause] = {}
    disabled: frozenset[str] = frozenset()

    @property
    def served(self) -> tuple[Rule, ...]:
        """The rules that have clients and servers."""
        return self.rules + self.retired
