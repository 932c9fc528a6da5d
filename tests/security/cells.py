"""How a client may come, how a server may be opened, and what has to come of it.

Four tables say it all (``door``, ``login``, ``server_link``, ``opens``); what a whole cell comes to is put
together from them (``expected``), as libpq does it, which tries the other way with ``allow`` and ``prefer``.
``docs/security-matrix.md`` is printed from the same tables.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from itertools import product
from typing import Final

UNIX: Final = "unix"
BARE: Final = "require, no certificate"
DIRECT: Final = "direct"
LISTENERS: Final = ("disable", "allow", "prefer", "require", "verify_ca", "verify_full", UNIX)
SSLMODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full", DIRECT, BARE)
STORAGES: Final = ("disable", "allow", "prefer", "require", "verify_ca", "verify_full")
# ``ssl = off``, and the kind of its line in pg_hba.conf with ``ssl = on``
OFFERS: Final = ("off", "host", "hostssl", "hostnossl")


class Method(StrEnum):
    """How a client proves who it is: ``authentication`` of its rule, or who decides in its place."""

    NONE = "none"
    CLEAR_TEXT = "clear_text"
    MD5 = "md5"
    SCRAM = "scram-sha-256"
    SCRAM_PLUS = "scram-sha-256, bound"  # the client insists on channel binding
    AUTH_QUERY = "md5, auth_query"  # which finds a SCRAM verifier
    CERT = "cert"
    PEER = "peer"
    EXTERNAL = "external"
    MODULE = "auth_module"
    PAM = "PAM"
    LDAP = "LDAP"
    BLOCK = "block"
    REJECT = "reject"  # a line of hba_file, for a rule with scram-sha-256


class Server(StrEnum):
    """What a server asks for, and what gpooler has for it."""

    TRUST = "trust"
    PASSWORD = "password"
    MD5 = "md5"
    MD5_HASH = "md5, stored as hash"
    SCRAM = "scram-sha-256"
    SCRAM_KEYS = "scram-sha-256, nothing stored"  # the keys of the client's login, or nothing
    CERT = "cert"


class Link(StrEnum):
    """What is between a client and gpooler."""

    PLAIN = "TCP"
    UNIX = "Unix socket"
    TLS = "TLS"
    TLS_BARE = "TLS, no certificate"


class Stage(IntEnum):
    """Where it is decided that a client does not come in."""

    DOOR = 1
    LOGIN = 2
    LINK = 3  # to the server
    SERVER = 4


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error of gpooler; ``sqlstate`` empty: the client itself gives up."""

    sqlstate: str
    text: str

    def __str__(self) -> str:
        return self.sqlstate or "the client gives up"


FAILED: Final = Refusal("28P01", 'password authentication failed for user "USER"')
TLS_REQUIRED: Final = Refusal("08P01", "a TLS connection is required")
NO_TLS: Final = Refusal("", "server does not support SSL, but SSL was required")
NO_DIRECT_TLS: Final = Refusal("", "SSL error")
NO_CERTIFICATE: Final = Refusal("", "certificate required")
NOT_BOUND: Final = Refusal("", "channel binding")
CERT_NEEDS_TLS: Final = Refusal("28000", "certificate authentication needs a TLS connection")
BLOCKED: Final = Refusal("28000", 'user "USER" is blocked for database "DATABASE"')
NO_SERVER: Final = Refusal("08006", "could not connect to the server")

NOTHING: Final = "nothing"
PLAIN_SCRAM: Final = "SCRAM-SHA-256"
ANY_SCRAM: Final = "SCRAM-SHA-256-PLUS, SCRAM-SHA-256"
IN_CLEAR: Final = (Method.CLEAR_TEXT, Method.EXTERNAL, Method.MODULE, Method.PAM, Method.LDAP)
WITHOUT_PROOF: Final = (Method.NONE, Method.BLOCK, Method.REJECT)
# What a client's own login gives gpooler to log in to servers with, where it holds no more than a verifier.
WITH_KEYS: Final = (Method.SCRAM, Method.SCRAM_PLUS, Method.AUTH_QUERY)


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination."""

    listener: str
    sslmode: str
    method: Method
    has_right_proof: bool  # password, token, certificate or name
    storage: str
    offer: str
    server: Server

    def __str__(self) -> str:
        proof = "" if self.has_right_proof else " (wrong)"
        client = f"{self.listener} < {self.sslmode}: {self.method}{proof}"
        return f"{client}; {self.storage} > {self.offer}: {self.server}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the client sees in the end, and what it came to."""

    stage: Stage
    asked: str  # by the method: what libpq is asked for
    refusal: Refusal | None = None
    has_tls: bool = False
    server_has_tls: bool = False


def door(listener: str, sslmode: str, *, has_tls: bool) -> Link | Refusal:
    """Whether a listener takes a connection, which libpq begins with or without TLS."""
    if listener == UNIX:
        return Link.UNIX
    if not has_tls:
        return Link.PLAIN if listener in ("disable", "allow", "prefer") else TLS_REQUIRED
    if listener == "disable":
        if sslmode == "prefer":
            return Link.PLAIN
        return NO_DIRECT_TLS if sslmode == DIRECT else NO_TLS
    if sslmode != BARE:
        return Link.TLS
    return NO_CERTIFICATE if listener.startswith("verify") else Link.TLS_BARE


def login(method: Method, link: Link, *, has_right_proof: bool = True) -> tuple[str, Refusal | None]:
    """What the client is asked for, and whether it is refused then."""
    is_encrypted = link in (Link.TLS, Link.TLS_BARE)
    scram = ANY_SCRAM if is_encrypted else PLAIN_SCRAM
    refusal = None if has_right_proof else FAILED
    match method:
        case Method.NONE:
            return NOTHING, None
        case Method.BLOCK:
            return NOTHING, BLOCKED
        case Method.REJECT:
            return scram, FAILED
        case Method.MD5:
            return "md5", refusal
        case Method.SCRAM | Method.AUTH_QUERY:
            return scram, refusal
        case Method.SCRAM_PLUS:
            return (scram, refusal) if is_encrypted else (NOTHING, NOT_BOUND)
        case Method.CERT if not is_encrypted:
            return NOTHING, CERT_NEEDS_TLS
        case Method.CERT:
            return NOTHING, FAILED if link is Link.TLS_BARE else refusal
        case Method.PEER:
            return (NOTHING, refusal) if link is Link.UNIX else (scram, FAILED)
    assert method in IN_CLEAR
    return "a password", refusal


def server_link(storage: str, offer: str) -> bool | None:
    """Whether a connection to the server has TLS; None: there is none."""
    if storage == "disable":
        return None if offer == "hostssl" else False
    if offer == "off":
        return False if storage in ("allow", "prefer") else None
    if offer == "hostnossl":
        return False if storage in ("allow", "prefer") else None
    return not (storage == "allow" and offer == "host")


def opens(server: Server, method: Method, *, has_tls: bool) -> bool:
    """Whether gpooler can give what the server asks for."""
    match server:
        case Server.CERT:
            return has_tls
        case Server.SCRAM_KEYS:
            return method in WITH_KEYS
    return True


def expected(cell: Cell) -> Outcome:
    """What comes of a cell: the first try of libpq that is let in, or the last one."""
    tries = {"disable": (False,), "allow": (False, True), "prefer": (True, False)}.get(cell.sslmode, (True,))
    if cell.listener == UNIX:
        tries = (False,)
    if (cell.listener, cell.sslmode) == ("disable", "prefer"):
        tries = (True,)  # told that there is no TLS, it goes on without on the same connection
    for has_tls in tries:
        outcome = _attempt(cell, has_tls)
        if outcome.stage > Stage.LOGIN or outcome.refusal is NOT_BOUND:
            break  # what fails now is no matter of TLS to libpq
    return outcome


def _attempt(cell: Cell, has_tls: bool) -> Outcome:
    link = door(cell.listener, cell.sslmode, has_tls=has_tls)
    if isinstance(link, Refusal):
        return Outcome(Stage.DOOR, NOTHING, link)
    asked, refusal = login(cell.method, link, has_right_proof=cell.has_right_proof)
    if refusal is not None:
        return Outcome(Stage.LOGIN, asked, refusal)
    # a line with ``cert`` takes nobody without TLS
    is_cert = cell.server is Server.CERT and cell.offer == "host"
    server_has_tls = server_link(cell.storage, "hostssl" if is_cert else cell.offer)
    if server_has_tls is None:
        return Outcome(Stage.LINK, asked, NO_SERVER)
    if not opens(cell.server, cell.method, has_tls=server_has_tls):
        return Outcome(Stage.SERVER, asked, NO_SERVER)
    return Outcome(Stage.SERVER, asked, None, link in (Link.TLS, Link.TLS_BARE), server_has_tls)


def all_cells() -> Iterator[Cell]:
    """The matrix. A client that is refused before it needs a server is combined with one server alone."""
    houses = list(product(STORAGES, OFFERS, Server))
    for method, listener, sslmode, has_right_proof in product(Method, LISTENERS, SSLMODES, (True, False)):
        if listener == UNIX and sslmode != "prefer":
            continue  # libpq has no TLS there, whatever it is asked for
        if not has_right_proof and (method in WITHOUT_PROOF or (method, sslmode) == (Method.CERT, BARE)):
            continue
        cells = (Cell(listener, sslmode, method, has_right_proof, *house) for house in houses)
        first = next(cells)
        yield first
        if expected(first).stage > Stage.LOGIN:
            yield from cells
