"""The body of a rule, ``[database.NAME.user.NAME]``: every option that Odyssey's reference names in §5."""

from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated

from pydantic import BaseModel, ConfigDict

from gpooler.config.field import Reload, ignored, not_built, option, required
from gpooler.config.values import (
    Bool,
    ClientAddress,
    Count,
    EntryPoint,
    FreeText,
    Ignored,
    Ms,
    Number,
    OneOf,
    OptionalBool,
    OptionalMs,
    OptionalPositive,
    OptionalSecret,
    OptionalSecrets,
    OptionalStr,
    OptionalTexts,
    Parameters,
    PlainSql,
    Positive,
    Quantiles,
    Seconds,
    SocketPath,
    Str,
)
from gpooler.config.words import (
    Authentication,
    ConnectionType,
    Pool,
    PoolRouting,
    Role,
    SessionState,
    SessionStateCheck,
    TargetSessionAttrs,
)

KEEPALIVE_MOST = 32_767  # the kernel refuses a longer TCP_KEEPIDLE or TCP_KEEPINTVL
PROBES_MOST = 127  # and more TCP_KEEPCNT
USR_TIMEOUT_LEAST = -(2**31 - 1)  # any negative number means: compute it

FORBIDDEN_OPTIONS = {
    "user": 'use "storage_user"',
    "database": 'use "storage_db"',
    "replication": "clients ask for it themselves",
    "options": "name the parameters themselves",
}


class Section(BaseModel):
    """A table of the configuration; its fields are options or tables."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=False,
    )


class LdapCredentials(Section):
    """``ldap_storage_credentials.NAME``: whom to log in as at the server."""

    ldap_storage_username: Str = required(
        "User name at the server.", placeholder="?", reload=Reload.SERVER, example="sales_ro"
    )
    ldap_storage_password: OptionalSecret = option(
        None, "Its password.", reload=Reload.SERVER, example="secret"
    )


class RuleBody(Section):
    """Options of a rule. Times are in the unit the option's kind names."""

    address: Annotated[IPv4Network | IPv6Network | str | None, ClientAddress()] = option(
        None,
        "Clients from this network, or from the addresses of this host name, only; tells the rules of an "
        "array apart.",
        reload=Reload.LOGIN,
        odyssey="default",
        example="default",
    )
    connection_type: Annotated[ConnectionType, OneOf(ConnectionType)] = option(
        ConnectionType.DEFAULT,
        "Clients of this kind only: host is any TCP connection, hostssl and hostnossl one with and without "
        "TLS, local a Unix socket.",
        reload=Reload.LOGIN,
    )

    # who may come in
    authentication: Annotated[Authentication, OneOf(Authentication)] = required(
        "How a client proves who it is; block refuses everybody; peer takes the system's users at Unix "
        "sockets; external shows a clear-text token to an agent; cert needs TLS, and a certificate that an "
        "authority of the listener has signed.",
        reload=Reload.LOGIN,
        placeholder="none",
        example="none",
    )
    password: OptionalSecrets = option(
        None,
        "The secret: plain, md5… or a SCRAM verifier. Of a list any lets a client in, while a password is "
        "being replaced; the first serves servers.",
        reload=Reload.LOGIN,
        example="secret",
    )
    auth_common_name: OptionalTexts = option(
        (),
        "Common names that cert accepts, default being the name of the user; unset: only that.",
        reload=Reload.LOGIN,
        example=["default"],
    )
    auth_query: OptionalStr = option(
        None,
        "A query that gives user and password, and maybe until when it is valid, in place of password: $1 or "
        "%u is the user, %h the client's host. It has 500 ms, with the wait for a connection "
        "auth_timeout_ms; answers serve for 15 seconds.",
        reload=Reload.LOGIN,
        example="SELECT usename, passwd, valuntil FROM pg_shadow WHERE usename = $1",
    )
    auth_query_db: OptionalStr = option(
        None,
        "Database of the rule whose storage and credentials it uses, and there, unless that rule has "
        "storage_db.",
        reload=Reload.LOGIN,
        example="postgres",
    )
    auth_query_user: OptionalStr = option(
        None, "User of that rule, and there unless it has storage_user.", reload=Reload.LOGIN, example="auth"
    )
    auth_pam_service: OptionalStr = option(
        None,
        "The PAM service that checks a clear-text password, and the account; PAM_RHOST is the client's "
        "address. Needs the package pamela.",
        reload=Reload.LOGIN,
        example="postgresql",
    )
    auth_module: Annotated[str | None, EntryPoint()] = option(
        None,
        "A Python function, package.module:function, decides about a clear-text password: called with user, "
        "database, address and password (bytes) in a thread, True lets the client in.",
        reload=Reload.LOGIN,
    )
    enable_mdb_iamproxy_auth: Bool = option(
        False,
        "An agent at a Unix socket of its own decides about a clear-text token, as with external.",
        reload=Reload.LOGIN,
    )
    mdb_iamproxy_socket_path: SocketPath = option(
        "/var/run/iam-auth-proxy/iam-auth-proxy.sock", "The socket of that agent.", reload=Reload.LOGIN
    )
    ldap_endpoint_name: OptionalStr = option(
        None,
        "The LDAP endpoint that checks a clear-text password. Needs the package python-ldap.",
        reload=Reload.LOGIN,
        example="directory",
    )
    ldap_storage_credentials_attr: OptionalStr = option(
        None,
        "The attribute of the user's LDAP entry that names the storage groups it is in, as "
        "HOST_DATABASE_GROUP: the storage's host, the client's database, the name of "
        "ldap_storage_credentials.",
        reload=Reload.LOGIN,
        example="memberOf",
    )
    ldap_storage_credentials: Mapping[str, LdapCredentials] = option(
        {},
        "Whom to be at the server by storage group. The first the user is in counts; who is in none is "
        "refused.",
        reload=Reload.SERVER,
    )
    ldap_pool_size: Ignored = ignored(None, "Size of a pool of LDAP connections.", "deprecated in Odyssey")
    ldap_pool_timeout: Ignored = ignored(None, "Its timeout.", "deprecated in Odyssey")
    ldap_pool_ttl: Ignored = ignored(None, "Its time to live.", "deprecated in Odyssey")
    password_passthrough: Bool = option(
        False,
        "The password that a client has sent in clear text, and came in with, opens the servers of its "
        "route, whoever judged it; of several clients the last one's.",
        reload=Reload.LOGIN,
    )
    role: Annotated[Role | None, OneOf(Role)] = option(
        None,
        "Rights in the console: stat may SHOW, admin may do all, notallow nothing. Unset: stat.",
        example="admin",
    )

    # clients
    client_max: OptionalPositive = option(
        None, "Clients of a route at once; beyond it 53300.", reload=Reload.LOGIN, example=1000
    )
    client_fwd_error: Bool = option(
        False, "Give the client the server's own startup error, else a general 08006."
    )
    client_show_id: Bool = option(True, "Put the client's id before the text of gpooler's own errors.")
    reserve_session_server_connection: Bool = ignored(
        True, "Of no effect.", "it has no effect in Odyssey either"
    )
    quantiles: Annotated[tuple[float, ...], Quantiles()] = option(
        (),
        "Quantiles of transaction and query time among the metrics, of the last one to two stats_interval.",
        example=[0.95, 0.99],
    )
    application_name_add_host: Bool = option(
        False,
        "Show the client's address behind its application_name, from the login on and behind every name that "
        "it gives itself.",
        reload=Reload.SESSION,
    )
    maintain_params: Bool = option(
        True,
        "Give a server the session parameters of the client that takes it; no: clients get what the server "
        "has, whatever they ask for at startup, and one that sets a parameter keeps its server.",
        reload=Reload.SESSION,
    )
    log_debug: Bool = option(False, "Debug lines of this rule's clients and servers.")
    log_query: Bool = option(False, "Log the queries of this rule's clients.")
    log_slow_ms: OptionalMs = option(
        None, "log_slow_ms of this rule's clients; unset: that of [logging], 0 is off.", example=1000
    )
    options: Annotated[Mapping[str, str], Parameters(FORBIDDEN_OPTIONS)] = option(
        {},
        "Session parameters that replace what the client asks for at startup.",
        reload=Reload.LOGIN,
        example={"search_path": "public"},
    )

    # where to
    storage: Str = required(
        "The storage this rule's servers are on.",
        placeholder="?",
        reload=Reload.SERVER,
        example="local_postgres",
    )
    storage_db: OptionalStr = option(
        None, "Database there; unset: the client's.", reload=Reload.SERVER, example="postgres"
    )
    storage_user: OptionalStr = option(
        None, "User there; unset: the client's.", reload=Reload.SERVER, example="postgres"
    )
    storage_password: OptionalSecret = option(
        None, "Password there; unset: the rule's password.", reload=Reload.SERVER, example="secret"
    )
    backend_startup_options: Annotated[Mapping[str, str], Parameters(FORBIDDEN_OPTIONS)] = option(
        {},
        "Parameters for the startup packet to the server, sent as they are.",
        reload=Reload.SERVER,
        example={"jit": "off"},
    )
    target_session_attrs: Annotated[TargetSessionAttrs, OneOf(TargetSessionAttrs)] = not_built(
        TargetSessionAttrs.ANY, "Which of several hosts will do."
    )
    catchup_timeout: Seconds = not_built(0, "Refuse replicas that lag more; 0 is off.")
    catchup_checks: Ignored = ignored(None, "Number of lag checks.", "deprecated in Odyssey")

    # the pool
    pool: Annotated[Pool, OneOf(Pool)] = required(
        "How long a client keeps a server: session, transaction or statement.",
        reload=Reload.SESSION,
        placeholder="transaction",
        example="transaction",
    )
    pool_routing: Annotated[PoolRouting, OneOf(PoolRouting)] = option(
        PoolRouting.CLIENT_VISIBLE,
        "internal: for gpooler's own queries, never for a client.",
        reload=Reload.LOGIN,
    )
    pool_size: Count = option(
        0,
        "Servers of a route at once, over all workers, those of replication clients too; 0 is no limit.",
        example=20,
    )
    min_pool_size: Count = option(0, "Servers kept open even when idle.")
    pool_timeout: Ms = option(0, "How long a client waits for a server, then 53300; 0 is no limit.")
    pool_ttl: Seconds = option(0, "Servers idle for longer are closed; 0 keeps them.", example=60)
    server_lifetime: Seconds = option(3600, "Servers older than this are closed when free; 0 is never.")
    server_drop_on_cached_plan_error: Bool = option(
        True,
        'Close a server when its client leaves it, if it said "cached plan must not change result type".',
    )
    client_idle_timeout: Seconds = option(
        0,
        "Close clients that are idle outside a transaction for longer, with 57P05; 0 is never. Not one that "
        "waits for a server or still takes its answer.",
    )
    pool_client_idle_timeout: Seconds = option(0, "The same for session pools only, with 08006.")
    pool_idle_in_transaction_timeout: Seconds = option(
        0,
        "Close clients that are idle in a transaction for longer, with 25P03, and roll it back; 0 is never.",
    )
    query_timeout: Seconds = option(
        0,
        "Cancel queries that run for longer, the time their client takes to read included, and close the "
        "client, with 57014, or without a word where it stands inside a row; 0 is never.",
    )
    transaction_timeout: Seconds = option(
        0,
        "Roll back transactions that last longer, a single statement being one, and close the client, with "
        "25P04; 0 is never.",
    )
    pool_discard: OptionalBool = option(
        None,
        "DISCARD ALL before a server is parked: yes always, no never; unset: when a client left it dirty, as"
        " far as its SQL shows. What a function in a query does inside (set_config, a lock) only yes undoes."
        " Beside one of the next two no means: only those, where a client left it dirty.",
        reload=Reload.SESSION,
        odyssey=True,
        departure="only what a client left dirty is discarded; yes discards always",
        example=True,
    )
    pool_smart_discard: Bool = option(
        False,
        "In place of DISCARD ALL what it does to all but plans and prepared statements.",
        reload=Reload.SESSION,
    )
    pool_discard_query: Annotated[str | None, PlainSql()] = option(
        None,
        "A query in place of DISCARD ALL, in ASCII; if it fails or leaves a transaction open, the server is"
        " closed. What it does not reset the next client meets, session parameters that clients give at"
        " startup excepted.",
        reload=Reload.SESSION,
        example="RESET ALL; UNLISTEN *",
    )
    pool_cancel: Bool = option(
        True,
        "Client gone in a query: cancel it and keep the server; no: close the server.",
    )
    pool_rollback: Bool = option(
        True, "Client gone in a transaction: roll back and keep the server; no: close it."
    )
    pool_reset_timeout_ms: Ms = option(1000, "Limit of the whole reset of a server, then it is closed.")
    pool_reserve_prepared_statement: Bool = option(
        True,
        "Named prepared statements of the protocol go with their client from server to server.",
        reload=Reload.SESSION,
    )
    pool_pin_on_listen: Bool = option(
        False,
        "After LISTEN the client keeps its server. gpooler does so in any case, unless session_state says "
        "allow.",
        reload=Reload.SESSION,
    )
    session_state: Annotated[SessionState, OneOf(SessionState)] = option(
        SessionState.PIN,
        "State that cannot go from server to server (LISTEN, session advisory locks, temporary tables, "
        "cursors WITH HOLD, LOAD). pin: the client keeps its server until that state ends; refuse: error "
        "0A000, and in a transaction the end of the client; allow: nothing is done, and the next client of "
        "the server meets it.",
        reload=Reload.SESSION,
    )
    session_state_check: Annotated[SessionStateCheck, OneOf(SessionStateCheck)] = option(
        SessionStateCheck.OPAQUE,
        "When a server is asked, between transactions, what its session has that SQL does not show. opaque: "
        "after DO, CALL and function calls of the protocol; always: after every transaction, which costs a "
        "query of a millisecond or two; off: never.",
        reload=Reload.SESSION,
    )
    max_prepared_statements: Positive = option(
        500,
        "Named prepared statements of clients that a server keeps; the one used longest ago goes first.",
    )
    max_client_prepared_bytes: Positive = option(
        16_777_216,
        "Bytes of names and texts of one client's prepared statements; what goes beyond keeps its server.",
    )
    pool_attach_check: Bool = option(
        True,
        "Look at a parked server before a client gets it, and take another if it died.",
    )
    pool_acquire_fail_fast: Bool = option(
        False,
        "Fail at once when a server cannot be reached, instead of waiting for another.",
    )
    pool_notice_after_waiting_ms: Annotated[int, Number("ms", least=-1)] = option(
        -1,
        "Send a client that waits for a server a notice after this long, and one with the time when it has"
        " got a server; -1 is never. Not in its login.",
    )
    shared_pool: OptionalStr = option(
        None, "The shared pool that limits this rule's servers.", example="small"
    )

    # TCP, unset: as in [performance]
    disable_nolinger: OptionalBool = option(
        None,
        "As in [performance], for this rule, once its clients are logged in.",
        reload=Reload.LOGIN,
        example=True,
    )
    keepalive: Annotated[int | None, Number("s", most=KEEPALIVE_MOST)] = option(
        None, "As in [performance], for this rule.", reload=Reload.LOGIN, example=15
    )
    keepalive_keep_interval: Annotated[int | None, Number("s", least=1, most=KEEPALIVE_MOST)] = option(
        None, "As in [performance], for this rule.", reload=Reload.LOGIN, example=5
    )
    keepalive_probes: Annotated[int | None, Number(least=1, most=PROBES_MOST)] = option(
        None, "As in [performance], for this rule.", reload=Reload.LOGIN, example=3
    )
    keepalive_usr_timeout: Annotated[int | None, Number("ms", least=USR_TIMEOUT_LEAST)] = option(
        None, "As in [performance], for this rule.", reload=Reload.LOGIN, example=0
    )


class GroupBody(RuleBody):
    """A rule for the members of a group that a query names."""

    group_query: OptionalStr = option(
        None,
        "First column: the names of the members. Asked every group_checker_interval, by each worker.",
        reload=Reload.LOGIN,
        example="SELECT member FROM staff",
    )
    group_query_user: OptionalStr = option(
        None, "As auth_query_user, for group_query.", reload=Reload.LOGIN, example="auth"
    )
    group_query_db: OptionalStr = option(
        None, "As auth_query_db, for group_query.", reload=Reload.LOGIN, example="postgres"
    )


class Watchdog(RuleBody):
    """A storage's own pool, on which the lag of its hosts is asked."""

    watchdog_lag_query: Annotated[str | None, FreeText()] = not_built(
        None, "Gives a unix time to compare with now."
    )
    watchdog_lag_interval: Ignored = ignored(
        None, "Period of the query.", "it has no effect in Odyssey either"
    )
