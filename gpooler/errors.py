"""Every error gpooler makes, as one tree, with what the client may see of it.

A class says whose fault it was. The text for the client follows PostgreSQL's message style guide
(lower case, no full stop; detail and hint are sentences); ``cause`` goes to the log only. SQLSTATEs
are those of appendix A of PostgreSQL's documentation.
"""

from collections.abc import Mapping
from typing import ClassVar, Final

FATAL: Final = "FATAL"
ERROR: Final = "ERROR"


class GpoolerError(Exception):
    """Base of the tree. ``FATAL`` ends the client's connection, ``ERROR`` ends its statement."""

    sqlstate: ClassVar[str] = "XX000"
    severity: ClassVar[str] = FATAL

    def __init__(self, message: str, *, detail: str = "", hint: str = "", cause: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail
        self.hint = hint
        self.cause = cause  # for the log; never sent

    def fields(self) -> dict[str, str]:
        """Fields of the ErrorResponse in wire order, by code (chapter "Error and Notice Message Fields")."""
        fields = {"S": self.severity, "V": self.severity, "C": self.sqlstate, "M": self.message}
        if self.detail:
            fields["D"] = self.detail
        if self.hint:
            fields["H"] = self.hint
        return fields

    def log_text(self) -> str:
        """One line for the log: what the client saw, then the cause it did not see."""
        return f"{self.message} ({self.cause})" if self.cause else self.message


# --- the client's fault -----------------------------------------------------------------------


class ClientFault(GpoolerError):
    """The client asked for what it may not have, or asked wrongly."""


class ProtocolViolation(ClientFault):
    """The client broke the frontend/backend protocol."""

    sqlstate = "08P01"


class TlsRequired(ProtocolViolation):
    """The listener takes no client without TLS."""

    def __init__(self, *, cause: str = "") -> None:
        super().__init__("a TLS connection is required", cause=cause)


class TlsFailed(ProtocolViolation):
    """A TLS handshake that came to nothing; only an alert can tell the client."""

    def __init__(self, *, cause: str) -> None:
        super().__init__("a TLS handshake failed", cause=cause)


class LoginTimeout(ProtocolViolation):
    """The client did not finish its login within ``client_login_timeout``."""

    def __init__(self, timeout_ms: int, *, cause: str = "") -> None:
        super().__init__(f"login was not completed within {timeout_ms} ms", cause=cause)


class FeatureNotSupported(ClientFault):
    """A feature of the protocol that gpooler does not speak."""

    sqlstate = "0A000"


class InvalidArguments(ClientFault):
    """The startup parameter ``options`` cannot be understood."""

    sqlstate = "42601"


class InvalidParameterValue(ClientFault):
    """A startup parameter has a value that is not one of those it takes."""

    sqlstate = "22023"


class ParameterCannotChange(ClientFault):
    """A startup parameter that no session can set."""

    sqlstate = "55P02"

    def __init__(self, name: str, *, cause: str = "") -> None:
        super().__init__(f'parameter "{name}" cannot be changed', cause=cause)


class TooManyParameters(ClientFault):
    """More startup parameters than PostgreSQL has settings."""

    sqlstate = "54000"

    def __init__(self, *, cause: str = "") -> None:
        super().__init__("too many startup parameters", cause=cause)


class InvalidAuthorization(ClientFault):
    """Refused before any password was looked at."""

    sqlstate = "28000"


class CertificateNeedsTls(InvalidAuthorization):
    """The rule says ``authentication = "cert"``, and the client came without TLS."""

    def __init__(self, *, cause: str = "") -> None:
        super().__init__("certificate authentication needs a TLS connection", cause=cause)


class UserBlocked(InvalidAuthorization):
    """The rule says ``authentication = "block"``."""

    def __init__(self, user: str, database: str, *, cause: str = "") -> None:
        super().__init__(f'user "{user}" is blocked for database "{database}"', cause=cause)


class AuthenticationFailed(ClientFault):
    """A login that failed: one text whatever the cause, so that nothing can be learned from it."""

    sqlstate = "28P01"

    def __init__(self, user: str, *, cause: str) -> None:
        super().__init__(f'password authentication failed for user "{user}"', cause=cause)


class AuthenticationUndecided(AuthenticationFailed):
    """Who decides could not be asked. The client cannot tell, but it did not guess a password wrongly."""


class AuthQueryFailed(AuthenticationUndecided):
    """An ``auth_query`` gave no answer. The text is that of every failed login."""

    sqlstate = InvalidAuthorization.sqlstate


class NoRule(ClientFault):
    """No rule of the configuration matches."""

    sqlstate = "3D000"

    def __init__(self, database: str, user: str, *, cause: str = "") -> None:
        super().__init__(f'no rule for database "{database}" and user "{user}"', cause=cause)


class StatementPoolRefusal(ClientFault):
    """Something that needs more than one statement on the same server, in a statement pool."""

    sqlstate = "0A000"
    severity = ERROR

    def __init__(self, what: str = "transaction blocks", *, cause: str = "") -> None:
        super().__init__(
            f"{what} are not supported in a statement pool",
            hint='Use a pool of type "transaction" or "session".',
            cause=cause,
        )


class SessionStateRefusal(ClientFault):
    """State that cannot go from server to server, where the rule refuses it."""

    sqlstate = "0A000"
    severity = ERROR

    def __init__(self, *, cause: str = "") -> None:
        super().__init__(
            "session state that outlives the transaction is refused in this pool",
            detail="LISTEN, session advisory locks, temporary tables, cursors WITH HOLD and LOAD bind a "
            "session to its server.",
            hint='Use a pool of type "session", or session_state = "pin".',
            cause=cause,
        )


class TargetNotBuilt(ClientFault):
    """SET target_session_attrs to a kind of hosts that is not chosen yet."""

    sqlstate = "0A000"
    severity = ERROR

    def __init__(self, *, cause: str = "") -> None:
        super().__init__(
            'target_session_attrs other than "any" is not built yet',
            hint="A storage has one host.",
            cause=cause,
        )


class TargetInvalid(ClientFault):
    """SET target_session_attrs to what is no kind of hosts."""

    sqlstate = "22023"
    severity = ERROR

    def __init__(self, *, cause: str = "") -> None:
        super().__init__(
            'invalid value for parameter "target_session_attrs"',
            hint="Available values: any, read-write, read-only, prefer-standby.",
            cause=cause,
        )


class VirtualRefusal(ClientFault):
    """What gpooler would answer itself, in a form that it does not."""

    sqlstate = "0A000"
    severity = ERROR

    def __init__(self, *, cause: str = "") -> None:
        super().__init__(
            "target_session_attrs of gpooler is shown and set by a simple query of its own only",
            hint="Send one statement, without parameters, by the simple query protocol.",
            cause=cause,
        )


class PreparedStatementRefusal(ClientFault):
    """A named prepared statement where the pool cannot keep it."""

    sqlstate = "0A000"
    severity = ERROR

    def __init__(self, *, cause: str = "") -> None:
        super().__init__("named prepared statements are not supported in this pool", cause=cause)


class ConsoleSyntaxError(ClientFault):
    """A text that is no command of the console."""

    sqlstate = "42601"
    severity = ERROR


class ConsoleDenied(ClientFault):
    """The role of the rule does not allow this command of the console."""

    sqlstate = "42501"
    severity = ERROR

    def __init__(self, command: str, *, cause: str = "") -> None:
        super().__init__(
            f"permission denied for {command}",
            detail='The role of the rule is less than "admin": SHOW is what "stat" may do.',
            cause=cause,
        )


class ConsoleNotAllowed(InvalidAuthorization):
    """The rule leads to the console and has ``role = "notallow"``."""

    sqlstate = "42501"

    def __init__(self, user: str, *, cause: str = "") -> None:
        super().__init__(f'user "{user}" may not use the console', cause=cause)


class ConsoleIsNoServer(FeatureNotSupported):
    """A replication connection to the console."""

    def __init__(self, *, cause: str = "") -> None:
        super().__init__("the console has no replication", cause=cause)


class ConsoleRefused(ClientFault):
    """A command of the console that cannot be done now: a configuration with mistakes, an unknown client."""

    sqlstate = "55000"
    severity = ERROR

    def __init__(self, text: str, *, cause: str = "") -> None:
        first, _, others = text.partition("\n")
        super().__init__(first.removeprefix("error: "), detail=others, cause=cause)


class ConsoleUnsupported(ClientFault):
    """Something of the protocol that the console does not speak."""

    sqlstate = "0A000"
    severity = ERROR


class ConsoleFailed(GpoolerError):
    """A bug of ours, met by one command of the console."""

    severity = ERROR

    def __init__(self, *, cause: str) -> None:
        super().__init__("internal error", cause=cause)


class UnknownDatabase(ClientFault):
    """A database that no rule has."""

    sqlstate = "3D000"
    severity = ERROR

    def __init__(self, name: str, *, cause: str = "") -> None:
        super().__init__(f'database "{name}" does not exist', cause=cause)


class UndefinedColumn(ClientFault):
    """A column that the table of the console does not have."""

    sqlstate = "42703"
    severity = ERROR

    def __init__(self, column: str, *, hint: str = "", cause: str = "") -> None:
        super().__init__(f'column "{column}" does not exist', hint=hint, cause=cause)


class UndefinedObject(ClientFault):
    """A parameter, statement, client or function of that name is not there."""

    sqlstate = "42704"
    severity = ERROR


class UnknownStatement(ClientFault):
    """A prepared statement or portal that the client did not make."""

    sqlstate = "26000"
    severity = ERROR


class UnknownPortal(ClientFault):
    """A portal that the client did not make, or that is gone with its transaction."""

    sqlstate = "34000"
    severity = ERROR


class DuplicateStatement(ClientFault):
    """A name that is taken."""

    sqlstate = "42P05"
    severity = ERROR


class InvalidText(ClientFault):
    """A text that is no value of the type it is for."""

    sqlstate = "22P02"
    severity = ERROR


class TransactionFailed(ClientFault):
    """A command in a transaction block that has failed."""

    sqlstate = "25P02"
    severity = ERROR

    def __init__(self, *, cause: str = "") -> None:
        super().__init__(
            "current transaction is aborted, commands ignored until end of transaction block", cause=cause
        )


class BindMismatch(ClientFault):
    """A Bind that does not fit its statement; the connection goes on."""

    sqlstate = "08P01"
    severity = ERROR


class QueryCancelled(ClientFault):
    """A cancel request met a client that waits for a server. The client stays connected."""

    sqlstate = "57014"
    severity = ERROR

    def __init__(self, *, cause: str = "") -> None:
        super().__init__("canceling statement due to user request", cause=cause)


class QueryTimeout(ClientFault):
    """A query ran for longer than ``query_timeout``: it was cancelled."""

    sqlstate = "57014"

    def __init__(self, *, cause: str = "") -> None:
        super().__init__("terminating connection due to query timeout", cause=cause)


class TransactionTimeout(ClientFault):
    """A transaction lasted longer than ``transaction_timeout``: it was rolled back."""

    sqlstate = "25P04"

    def __init__(self, *, cause: str = "") -> None:
        super().__init__("terminating connection due to transaction timeout", cause=cause)


class IdleInTransactionTimeout(ClientFault):
    """Idle in a transaction for ``pool_idle_in_transaction_timeout``: it was rolled back."""

    sqlstate = "25P03"

    def __init__(self, *, cause: str = "") -> None:
        super().__init__("terminating connection due to idle-in-transaction timeout", cause=cause)


class IdleSessionTimeout(ClientFault):
    """Idle outside a transaction for ``client_idle_timeout``."""

    sqlstate = "57P05"

    def __init__(self, *, cause: str = "") -> None:
        super().__init__("terminating connection due to idle-session timeout", cause=cause)


class IdleInSessionPool(ClientFault):
    """Idle outside a transaction for ``pool_client_idle_timeout``, in a session pool."""

    sqlstate = "08006"

    def __init__(self, *, cause: str = "") -> None:
        super().__init__("terminating connection due to client idle timeout", cause=cause)


# --- limits: nobody's fault but the load's ----------------------------------------------------


class TooManyConnections(GpoolerError):
    """A limit of the configuration is reached."""

    sqlstate = "53300"


class ClientMaxReached(TooManyConnections):
    """The global ``client_max``."""

    def __init__(self, client_max: int, *, cause: str = "") -> None:
        super().__init__(f"too many clients: client_max is {client_max}", cause=cause)


class RuleClientMaxReached(TooManyConnections):
    """The rule's ``client_max``."""

    def __init__(self, client_max: int, database: str, user: str, *, cause: str = "") -> None:
        super().__init__(
            f'too many clients for database "{database}" and user "{user}": client_max is {client_max}',
            cause=cause,
        )


class MemoryShort(GpoolerError):
    """More memory is in use than ``soft_oom.limit``."""

    sqlstate = "53200"

    def __init__(self, used_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            "out of memory: no new clients are taken while soft_oom.limit is exceeded",
            cause=f"{used_bytes} bytes are in use, the limit is {limit_bytes}",
        )


class PoolTimeout(TooManyConnections):
    """No server within ``pool_timeout``."""

    def __init__(self, timeout_ms: int, pool_size: int, queue_length: int, *, failure: str = "") -> None:
        """``queue_length`` counts the clients of the route that wait, this one included.

        ``failure`` is why the last server could not be opened, for the log.
        """
        hint = 'The servers of this pool are busy; see "pool_size" and "pool_timeout".'
        if failure:
            hint = "A server could not be opened: PostgreSQL is away or refuses the login. The log says why."
        super().__init__(
            f"no server was free within {timeout_ms} ms: "
            f"pool size {pool_size or 'unlimited'}, queue length {queue_length}",
            hint=hint,
            cause=f"last server login failed: {failure}" if failure else "",
        )


# --- the server's fault -----------------------------------------------------------------------


class ServerFault(GpoolerError):
    """A server connection failed. What the network or the server said stays in ``cause``."""

    sqlstate = "08006"


class ServerConnectFailed(ServerFault):
    """No connection to a server could be had."""

    def __init__(self, *, cause: str) -> None:
        super().__init__("could not connect to the server", cause=cause)


class ServerAuthentication(ServerConnectFailed):
    """A server asked for an authentication we cannot give, or could not prove who it is."""


class ServerProtocol(ServerFault):
    """A server sent what the protocol does not allow."""

    def __init__(self, *, cause: str) -> None:
        super().__init__("server broke the protocol", cause=cause)


class ServerLost(ServerFault):
    """The server went away while a client held it."""

    def __init__(self, *, cause: str = "") -> None:
        super().__init__("server closed the connection unexpectedly", cause=cause)


class PostgresError(ServerFault):
    """An ErrorResponse that a server sent to us; may be forwarded where the rule allows it."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        """``fields`` by code as parsed from the wire (``wire/messages.py: parse_error``)."""
        super().__init__(
            fields.get("M", "unknown error"), detail=fields.get("D", ""), hint=fields.get("H", "")
        )
        self._fields = dict(fields)

    @property
    def server_sqlstate(self) -> str:
        """The SQLSTATE the server gave; ``XX000`` when it gave none."""
        return self._fields.get("C", "XX000")

    @property
    def server_severity(self) -> str:
        """The severity, not localised where the server says so (PostgreSQL ≥ 9.6)."""
        return self._fields.get("V") or self._fields.get("S", FATAL)

    def fields(self) -> dict[str, str]:
        """The fields as the server sent them."""
        return dict(self._fields)

    def log_text(self) -> str:
        """One line with severity, SQLSTATE, message and detail."""
        text = f"{self.server_severity} {self.server_sqlstate}: {self.message}"
        return f"{text} ({self.detail})" if self.detail else text


# --- the configuration's fault, and ours ------------------------------------------------------


class ConfigurationError(GpoolerError):
    """A value of the configuration that only shows its fault in use."""

    sqlstate = "F0000"


class AdminShutdown(GpoolerError):
    """gpooler drains, or the connection was ended from the console."""

    sqlstate = "57P01"

    def __init__(self, *, cause: str = "") -> None:
        super().__init__("terminating connection due to administrator command", cause=cause)


class DatabaseDisabled(ClientFault):
    """DISABLE was said on the console."""

    sqlstate = "55000"

    def __init__(self, database: str) -> None:
        super().__init__(f'database "{database}" is not currently accepting connections')


class InternalError(GpoolerError):
    """A bug of ours, as the client sees it."""

    def __init__(self, *, cause: str) -> None:
        super().__init__("internal error", cause=cause)
