"""Tables of clients, servers and what they have: CLIENTS, SERVERS, SOCKETS, FDS, statements. Pure."""

from collections.abc import Callable, Iterator
from typing import Final

from gpooler.console.facts import SocketFact, View
from gpooler.console.spec import Need, Spec, seconds_and_rest, time_text
from gpooler.console.table import Row, columns

_NEEDS: Final = frozenset({Need.SOCKETS})
_CLOSING: Final = "closing"  # PgBouncer has no such state: it counts a server no more that was told to go


def _socket(view: View, fact: SocketFact) -> Row:
    wait_us = max(0, view.now_us - fact.since_us) if fact.is_waiting else 0
    return (
        fact.kind,
        fact.user,
        fact.database,
        fact.replication,
        fact.state,
        fact.address,
        fact.port,
        fact.local_address,
        fact.local_port,
        time_text(view, fact.born_us),
        time_text(view, fact.request_us or fact.born_us),
        *seconds_and_rest(wait_us),
        fact.closes,
        fact.id,
        fact.link,
        fact.remote_pid,
        fact.tls,
        fact.name,
        fact.prepared,
        fact.number,
    )


def _detailed(view: View, fact: SocketFact) -> Row:
    return (*_socket(view, fact), 0, 0, fact.left, 0, 0, fact.held, fact.queued)


Chooser = Callable[[SocketFact], bool]


def _rows(make: Callable[[View, SocketFact], Row], chooses: Chooser) -> Callable[[View], Iterator[Row]]:
    def rows(view: View) -> Iterator[Row]:
        return (make(view, fact) for fact in view.sockets if chooses(fact))

    return rows


def _is_client(fact: SocketFact) -> bool:
    return fact.kind == "C"


def _is_server(fact: SocketFact) -> bool:
    return fact.kind == "S" and fact.state != _CLOSING


def _is_shown(fact: SocketFact) -> bool:
    return fact.state != _CLOSING


def _is_busy(fact: SocketFact) -> bool:
    return fact.state != _CLOSING and (fact.state != "idle" or bool(fact.left or fact.held or fact.queued))


def _age_us(view: View, since_us: int) -> int | None:
    return max(0, view.now_us - since_us) if since_us else None


def _client_extended(view: View, fact: SocketFact) -> Row:
    return (
        fact.id,
        fact.number,
        fact.worker,
        fact.database,
        fact.user,
        fact.state,
        fact.address,
        fact.port,
        fact.name,
        fact.tls,
        fact.link or None,
        fact.link_pid or None,
        fact.pins or None,
        {"I": "idle", "T": "open", "E": "failed"}.get(fact.transaction),
        _age_us(view, fact.transaction_us),
        _age_us(view, fact.query_us),
        _age_us(view, fact.since_us) if fact.is_waiting else 0,
        _age_us(view, fact.since_us),
        fact.prepared,
        fact.held,
        fact.queued,
        time_text(view, fact.born_us),
    )


def _server_extended(view: View, fact: SocketFact) -> Row:
    return (
        fact.id,
        fact.worker,
        fact.remote_pid,
        fact.storage,
        fact.database,
        fact.user,
        fact.state,
        fact.address,
        fact.port,
        fact.tls,
        fact.link or None,
        fact.pins or None,
        {"I": "idle", "T": "open", "E": "failed"}.get(fact.transaction),
        _age_us(view, fact.transaction_us),
        _age_us(view, fact.query_us),
        _age_us(view, fact.since_us),
        fact.uses,
        max(0, fact.expires_us - view.now_us) // 1_000_000 if fact.expires_us else None,
        fact.closes,
        fact.cancelling,
        fact.prepared,
        fact.queued,
        time_text(view, fact.born_us),
    )


def _fd(view: View, fact: SocketFact) -> Row:
    """PgBouncer's table for a takeover. What it would need to take a session over is not shown to anybody."""
    return (
        fact.fd,
        "client" if fact.kind == "C" else "server",
        fact.user,
        fact.database,
        fact.address,
        fact.port,
        None,
        0,
        *[None] * 7,
    )


def _statements(view: View) -> Iterator[Row]:
    for fact in view.statements:
        yield fact.name, fact.text, fact.references


def _copies(view: View) -> Iterator[Row]:
    statements = {fact.name: fact for fact in view.statements}
    for fact in view.copies:
        known = statements.get(fact.name)
        text, references = (None, None) if known is None else (known.text, known.references)
        yield "S", fact.user, fact.database, fact.server_id, fact.name, text, references


_SOCKET: Final = (
    "s: type user database replication state addr i: port s: local_addr i: local_port T: connect_time "
    "request_time i: wait wait_us close_needed s: ptr link i: remote_pid s: tls application_name "
    "i: prepared_statements id"
)
_DETAILED: Final = f"{_SOCKET} recv_pos pkt_pos pkt_remain send_pos send_remain pkt_avail send_avail"
_STATEMENTS: Final = Spec(
    columns("s: name definition i: refcount"), _statements, frozenset({Need.STATEMENTS})
)

TABLES: Final = {
    "clients": Spec(columns(_SOCKET), _rows(_socket, _is_client), _NEEDS),
    "servers": Spec(columns(_SOCKET), _rows(_socket, _is_server), _NEEDS),
    "sockets": Spec(columns(_DETAILED), _rows(_detailed, _is_shown), _NEEDS),
    "active_sockets": Spec(columns(_DETAILED), _rows(_detailed, _is_busy), _NEEDS),
    "clients_extended": Spec(
        columns(
            "s: client_id i: id worker s: database user state addr i: port s: application_name tls server_id "
            "i: server_pid s: pins transaction q: transaction_us query_us wait_us state_us "
            "i: prepared_statements q: bytes_held bytes_queued T: connect_time"
        ),
        _rows(_client_extended, _is_client),
        _NEEDS,
    ),
    "servers_extended": Spec(
        columns(
            "s: server_id i: worker pid s: storage database user state addr i: port s: tls client_id pins "
            "transaction q: transaction_us query_us state_us uses i: expires_in_s close_needed "
            "cancel_requests prepared_statements q: bytes_queued T: connect_time"
        ),
        _rows(_server_extended, lambda fact: fact.kind == "S"),
        _NEEDS,
    ),
    "fds": Spec(
        columns(
            "i: fd s: task user database addr i: port q: cancel i: link s: client_encoding std_strings "
            "datestyle timezone password b: scram_client_key scram_server_key"
        ),
        _rows(_fd, _is_shown),
        _NEEDS,
    ),
    "prepared_statements": _STATEMENTS,
    "global_prepared_statements": _STATEMENTS,
    "server_prep_stmts": Spec(
        columns("s: type user database sid name definition i: refcount"),
        _copies,
        frozenset({Need.COPIES, Need.STATEMENTS}),
    ),
}
