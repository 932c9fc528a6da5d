"""Prints docs/security-matrix.md from the tables that the test of the matrix goes by.

``python -m tests.security.document`` writes the page.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from tests.security.cells import (
    BARE,
    DIRECT,
    LISTENERS,
    NOTHING,
    OFFERS,
    SSLMODES,
    STORAGES,
    Cell,
    Link,
    Method,
    Server,
    all_cells,
    expected,
    login,
    opens,
    server_link,
)

PAGE: Final = Path(__file__).parents[2] / "docs" / "security-matrix.md"
METHODS: Final = {
    Method.NONE: '`authentication = "none"`',
    Method.CLEAR_TEXT: "`clear_text`",
    Method.MD5: "`md5`",
    Method.SCRAM: "`scram-sha-256`",
    Method.SCRAM_PLUS: "`scram-sha-256`, the client has `channel_binding=require`",
    Method.AUTH_QUERY: "`md5` with an `auth_query` that finds a SCRAM verifier",
    Method.CERT: "`cert`",
    Method.PEER: "`peer`",
    Method.EXTERNAL: "`external`",
    Method.MODULE: "`clear_text` with `auth_module`",
    Method.PAM: "`clear_text` with `auth_pam_service`",
    Method.LDAP: "`clear_text` with `ldap_endpoint_name`",
    Method.BLOCK: "`block`",
    Method.REJECT: "`reject` or `deny` in `hba_file`",
}
CLIENTS: Final = {DIRECT: "`verify-full`, `sslnegotiation=direct`", BARE: "`require`, no certificate"}
LINES: Final = {"off": "`ssl = off`", "host": "`host`", "hostssl": "`hostssl`", "hostnossl": "`hostnossl`"}
SERVERS: Final = {
    Server.TRUST: ("`trust`", "nothing"),
    Server.PASSWORD: ("`password`", "`storage_password`, plain"),
    Server.MD5: ("`md5`", "`storage_password`, plain"),
    Server.MD5_HASH: ("`md5`", "`storage_password`, the hash"),
    Server.SCRAM: ("`scram-sha-256`", "`storage_password`, plain"),
    Server.SCRAM_KEYS: ("`scram-sha-256`", "nothing stored but the client's verifier: the keys of its login"),
    Server.CERT: ("`cert`", "`tls_cert_file` of the storage"),
}
TEXT: Final = """\
# Security matrix: who comes in by which way

Made by `python -m tests.security.document` from the tables that the test goes by: `tests/security` logs in
through every combination of client, its TLS, server and TLS to the server, by libpq, in front of PostgreSQL
15 (`scripts/test`: each pair of values once; `scripts/test --full`: all {cells:,}). A combination comes in
if each of the four tables below lets it in. What the options mean: [authentication](authentication.md),
[TLS](tls.md).

Every refusal by a method has SQLSTATE 28P01 and the one text `password authentication failed for user "…"`,
be it a wrong password, another's certificate, or a user that the system, the directory or the agent does
not take. `08P01` stands for `a TLS connection is required`, `28000` for a user who is blocked or who comes
by `cert` without TLS, and `08006` for a server that could not be opened: the log tells why.

## TLS of clients: the listener's `tls` and libpq's `sslmode`

{doors}

- All but the last column show a certificate. The listeners that have TLS have `tls_ca_file`.
- With `allow` libpq tries TLS when it was refused without, and with `prefer` the other way round; the
  second answer counts. It does so for a refused password, too, but not for what fails after the login.
- A Unix socket has no TLS; libpq does not ask.

## Methods of clients: what they are asked for

{methods}

- Over TLS SCRAM is offered with channel binding first; libpq takes it unless told
  `channel_binding=disable`.
- With a SCRAM verifier `md5` means SCRAM, as in PostgreSQL.
- Who is refused by `hba_file`, or comes to `peer` over TCP, meets the exchange that a wrong password meets.

## TLS to servers: the storage's `tls` and PostgreSQL's `pg_hba.conf`

{links}

As libpq: with `allow` and `prefer` the other way is tried when the server refuses the first. Not so for a
wrong password, an unknown database, too many connections or a server that starts up, where it would not
help.

## Methods of servers

{servers}

- Over TLS SCRAM is bound to the channel wherever the server offers it, which PostgreSQL does.
- The keys of a client's login come from SCRAM alone. After any other method the last but one row is 08006,
  unless another client of the same route has come by SCRAM.
- A line with `cert` is a `hostssl` one.
"""


def page() -> str:
    """The whole text."""
    return TEXT.format(
        cells=sum(1 for _ in all_cells()),
        doors=_table(
            ["`tls`", *(CLIENTS.get(mode, f"`{mode}`") for mode in SSLMODES)],
            ([f"`{listener}`", *(_door(listener, mode) for mode in SSLMODES)] for listener in LISTENERS[:-1]),
        ),
        methods=_table(
            ["", *Link],
            ([name, *(_login(method, link) for link in Link)] for method, name in METHODS.items()),
        ),
        links=_table(
            ["`tls`", *LINES.values()],
            ([f"`{mode}`", *(_link(mode, offer) for offer in OFFERS)] for mode in STORAGES),
        ),
        servers=_table(
            ["the server's method", "what gpooler shows it", "plain", "TLS"],
            (
                [*names, *(_opens(server, has_tls) for has_tls in (False, True))]
                for server, names in SERVERS.items()
            ),
        ),
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _door(listener: str, sslmode: str) -> str:
    """For a client that nothing else refuses."""
    cell = Cell(listener, sslmode, Method.NONE, True, "disable", "host", Server.TRUST)
    outcome = expected(cell)
    if outcome.refusal is not None:
        return str(outcome.refusal)
    return "TLS" if outcome.has_tls else "plain"


def _login(method: Method, link: Link) -> str:
    asked, refusal = login(method, link)
    if refusal is None:
        return asked
    return str(refusal) if asked == NOTHING else f"{asked}, then {refusal}"


def _link(storage: str, offer: str) -> str:
    has_tls = server_link(storage, offer)
    return "08006" if has_tls is None else "TLS" if has_tls else "plain"


def _opens(server: Server, has_tls: bool) -> str:
    return "opens" if opens(server, Method.SCRAM, has_tls=has_tls) else "08006"


if __name__ == "__main__":
    PAGE.write_text(page())
