"""One client of the matrix, by libpq: how it comes, what it is asked for, what comes of it."""

import re
import select
import tempfile
from dataclasses import dataclass
from typing import Final

from psycopg import conninfo, pq

from tests.harness import PASSWORD
from tests.security.cells import (
    ANY_SCRAM,
    BARE,
    DIRECT,
    NOTHING,
    PLAIN_SCRAM,
    UNIX,
    Cell,
    Method,
)
from tests.security.stage import STRANGER, USERS, Stage, database

TIMEOUT_S: Final = 20
WHO: Final = "SELECT current_user, ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
ASKED: Final = {
    "AuthenticationCleartextPassword": "a password",
    "AuthenticationMD5Password": "md5",
    'AuthenticationSASL\t "SCRAM-SHA-256" ""': PLAIN_SCRAM,
    'AuthenticationSASL\t "SCRAM-SHA-256-PLUS" "SCRAM-SHA-256" ""': ANY_SCRAM,
}


@dataclass(frozen=True, slots=True)
class Seen:
    """What a client saw."""

    asked: str  # in its last try
    sqlstate: str = ""
    error: str = ""  # of gpooler where there is a sqlstate, otherwise libpq's own; empty: it came in
    has_tls: bool = False
    server_user: str = ""
    server_has_tls: bool = False


def visit(stage: Stage, cell: Cell) -> Seen:
    """Connect and ask who it is at the server."""
    with tempfile.TemporaryFile() as trace:
        connection = pq.PGconn.connect_start(_conninfo(stage, cell).encode())
        try:
            connection.trace(trace.fileno())
            connection.set_trace_flags(pq.Trace.SUPPRESS_TIMESTAMPS)
            is_connected = _connect(connection)
            connection.untrace()  # writes what is left
            trace.seek(0)
            # of its last try, which may have ended when it asked for TLS
            said = trace.read().decode().rpartition("StartupMessage\t")[2].rpartition("SSLRequest\t")[2]
            asked = next((name for sign, name in ASKED.items() if f"\t{sign}" in said), NOTHING)
            if not is_connected:
                error = re.search(r'\tErrorResponse\t.* C "(\w{5})" M "(.*)" \\x00', said)
                if error is None:
                    return Seen(asked, "", connection.error_message.decode())
                return Seen(asked, error[1], re.sub(r"^gpooler: c[0-9a-f]{12}: ", "", error[2]))
            result = connection.exec_(WHO.encode())
            assert result.status == pq.ExecStatus.TUPLES_OK, result.error_message
            user, server_has_tls = result.get_value(0, 0), result.get_value(0, 1)
            assert user is not None
            return Seen(asked, "", "", connection.ssl_in_use, user.decode(), server_has_tls == b"t")
        finally:
            connection.finish()


def _connect(connection: pq.PGconn) -> bool:
    """Whether it did; yields to nobody."""
    wanted = pq.PollingStatus.WRITING
    while wanted not in (pq.PollingStatus.OK, pq.PollingStatus.FAILED):
        sockets = [connection.socket]
        is_reading = wanted == pq.PollingStatus.READING
        ready = select.select(sockets if is_reading else [], [] if is_reading else sockets, [], TIMEOUT_S)
        assert ready != ([], [], []), "gpooler does not answer"
        wanted = connection.connect_poll()
    return wanted == pq.PollingStatus.OK


def _conninfo(stage: Stage, cell: Cell) -> str:
    files = stage.files
    options: dict[str, str | int] = {
        "port": stage.ports[cell.listener],
        "user": USERS[cell.method],
        "dbname": database(cell),
        "password": PASSWORD,
        "gssencmode": "disable",
        "sslrootcert": files.pem("ca"),
    }
    if cell.listener == UNIX:
        options["host"] = str(stage.directory)
    else:
        options |= {"host": "localhost", "hostaddr": "127.0.0.1"}
    certificate = "cert_user"
    match cell.method:
        case Method.SCRAM:
            options["channel_binding"] = "disable"
        case Method.SCRAM_PLUS:
            options["channel_binding"] = "require"
        case Method.EXTERNAL:
            options["password"] = "yes:somebody"
    if not cell.has_right_proof:
        match cell.method:
            case Method.CERT:
                certificate = "other_user"
            case Method.PEER:
                options["user"] = STRANGER
            case _:
                options["password"] = "wrong"
    match cell.sslmode:
        case str(mode) if mode == BARE:
            options |= {"sslmode": "require", "sslcertmode": "disable"}
        case str(mode) if mode == DIRECT:
            options |= {"sslmode": "verify-full", "sslnegotiation": "direct"}
        case mode:
            options["sslmode"] = mode
    if cell.sslmode != BARE:
        options |= {"sslcert": files.pem(certificate), "sslkey": files.key(certificate)}
    return conninfo.make_conninfo("", **options)
