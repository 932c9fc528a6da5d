"""What one worker says of itself for the console: its clients, servers, memory. A slice at a time."""

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Protocol

import gevent
from gevent.event import AsyncResult

from gpooler.auth.failures import Failures
from gpooler.client.clients import Clients
from gpooler.console.client_rows import INDEX_BITS, client_facts
from gpooler.console.facts import (
    BanFact,
    CopyFact,
    HostFact,
    MemoryFact,
    RouteFact,
    SocketFact,
    StatementFact,
    WorkerFact,
    name_of,
)
from gpooler.log import LogContext, client_id, server_id
from gpooler.net.host_names import HostNames
from gpooler.net.resolve import Address, Resolver
from gpooler.relay.relay import Relay
from gpooler.routing.route import Route
from gpooler.server.servers import Lease, Servers, pin_names
from gpooler.stats.registry import ProcessWord
from gpooler.stats.shared import SharedCounters

SERVER_STATES: Final = {1: "idle", 2: "active", 3: "tested", 4: "closing"}  # relay/engine.pxd: ServerState
TURN_S: Final = 0.001  # which the others have between two slices: the relay wants a core, too
RESETTING: Final = 3
CLIENT_BIT: Final = 1 << 30  # of the numbers in the column `id`; servers have the other
SERVER_BIT: Final = 1 << 29
PAGE: Final = os.sysconf("SC_PAGE_SIZE")

NOTHING: Final = SocketFact(
    0, "", 0, "", "", "", "none", "", "", 0, "", 0, 0, 0, 0, 0, 0, "", 0, "", "", 0, 0, 0, 0, -1, "", "",
    0, 0, 0, "", 0, 0, 0,
)  # fmt: skip


class ConsoleClient(Protocol):
    """A client of the console."""

    who: LogContext
    born_us: int
    tls: str
    number: int

    @property
    def application_name(self) -> str:
        """As it calls itself."""


class Sources:
    """Those of one worker."""

    def __init__(
        self,
        worker: int,
        relay: Relay,
        counters: SharedCounters,
        clients: Clients,
        servers: Servers,
        resolver: Resolver,
        hosts: HostNames,
        failures: Failures,
        consoles: Callable[[], Sequence[ConsoleClient]],
    ) -> None:
        """``consoles``: the clients of the console that are connected here."""
        self._worker = worker
        self._relay = relay
        self._counters = counters
        self._clients = clients
        self._servers = servers
        self._resolver = resolver
        self._host_names = hosts
        self._failures = failures
        self._consoles = consoles
        self._replies: dict[int, AsyncResult] = {}

    def facts(self, what: str) -> Iterator[Sequence[Any]]:
        """Slices of one kind of facts; a kind that is not known has none. Yields."""
        makers: Mapping[str, Callable[[], Iterator[Sequence[Any]]]] = {
            "routes": self._routes,
            "sockets": self._sockets,
            "memory": self._memory,
            "bans": self._bans,
            "hosts": self._hosts,
            "statements": self._statements,
            "copies": self._copies,
            "workers": self._workers,
        }
        maker = makers.get(what)
        return iter(()) if maker is None else maker()

    def on_reply(self, token: int, reply: tuple[Any, int]) -> None:
        """Rows of the relay."""
        waiter = self._replies.pop(token, None)
        if waiter is not None:
            waiter.set(reply)

    def _reply(self, token: int) -> tuple[Any, int]:
        waiter = self._replies[token] = AsyncResult()
        return waiter.get()  # type: ignore[no-any-return]

    # -- clients and servers

    def _sockets(self) -> Iterator[Sequence[SocketFact]]:
        yield [self._console(client) for client in self._consoles()]
        yield from self._slices(self._relay.list_clients, self._client_facts)
        yield from self._slices(self._relay.list_servers, self._server_facts)
        yield [self._opening(lease) for lease in self._servers.opening]

    def _slices(
        self,
        ask: Callable[[int], tuple[int | None, int]],
        make: Callable[[Any], Sequence[SocketFact]],
    ) -> Iterator[Sequence[SocketFact]]:
        """Each slice is a command to the relay, which looks at its other work in between."""
        at = 0
        while True:
            token, at = ask(at)
            if token is None:
                return
            rows, _ = self._reply(token)
            if rows:
                yield make(rows)
                gevent.sleep(TURN_S)

    def _client_facts(self, rows: bytes) -> Sequence[SocketFact]:
        clients = self._clients
        first = CLIENT_BIT | self._place(0)
        return client_facts(
            rows,
            self._worker,
            first,
            clients.name_of,
            clients.replication_of,
            self._relay.tls_text,
            pin_names,
        )

    def _server_facts(self, rows: list[dict[str, Any]]) -> Sequence[SocketFact]:
        return [fact for row in rows if (fact := self._server(row)) is not None]

    def _server(self, row: dict[str, Any]) -> SocketFact | None:
        handle, other = row["handle"], row["other_handle"]
        lease = self._servers.leases.get(handle)
        if lease is None:
            return None  # it has gone meanwhile
        database, user = _route_name(lease.route)
        state = SERVER_STATES[row["state"]]
        if row["cancelling"] and row["state"] == RESETTING:
            state = "being_canceled"
        local_family, local_address, local_port = row["local"]
        return SocketFact(
            self._worker, "S", SERVER_BIT | self._place(handle), server_id(row["id"]),
            user, database, self._clients.replication_of(other) if other else "none", state,
            *_endpoint(lease.address), _host(local_family, local_address), local_port,
            row["born_us"], row["query_us"], row["since_us"],
            0, int(row["closes"]), client_id(row["other_id"]) if other else "",
            row["pid"], self._relay.tls_text(row["tls"]), row["name"].decode("utf-8", "replace"),
            row["prepared"], row["left"], row["held"], row["queued"], row["fd"],
            pin_names(row["pins"]), chr(row["transaction"]),
            row["begin_us"] if row["transaction"] != ord("I") else 0, row["query_us"] if other else 0,
            0, lease.route.rule.storage, row["uses"], row["expires_us"], row["cancelling"],
        )  # fmt: skip

    def _place(self, handle: int) -> int:
        """Worker and index of a record: unique among those that are there now."""
        return (self._worker & 0xFF) << INDEX_BITS | handle & ((1 << INDEX_BITS) - 1)

    def _bare(self, **known: Any) -> SocketFact:
        """What the relay has no record of."""
        return NOTHING._replace(worker=self._worker, **known)

    def _console(self, client: ConsoleClient) -> SocketFact:
        who = client.who
        return self._bare(
            kind="C",
            number=CLIENT_BIT | self._place((1 << INDEX_BITS) - 1 - client.number),
            id=who.client,
            user=who.user,
            database=who.database,
            state="idle",  # as PgBouncer has its own: they are linked to no server
            address="unix" if who.client_host == "local" else who.client_host,
            port=who.client_port,
            born_us=client.born_us,
            since_us=client.born_us,
            tls=client.tls,
            name=client.application_name,
        )

    def _opening(self, lease: Lease) -> SocketFact:
        database, user = _route_name(lease.route)
        address, port = _endpoint(lease.address)
        return self._bare(
            kind="S",
            number=SERVER_BIT | self._place((1 << INDEX_BITS) - 1 - lease.slot),
            id=server_id(lease.server_id),
            user=user,
            database=database,
            state="new",
            address=address,
            port=port,
            born_us=lease.born_us,
            since_us=lease.born_us,
            storage=lease.route.rule.storage,
            fd=lease.fd,
        )

    # -- the rest

    def _routes(self) -> Iterator[Sequence[RouteFact]]:
        yield [
            RouteFact(
                route.route_id,
                route.rule.name,
                route.database,
                route.user,
                int(route.is_replication),
                0,
            )
            for route in self._servers.routes.values()
        ]

    def _memory(self) -> Iterator[Sequence[MemoryFact]]:
        yield [MemoryFact(name, *counts) for name, counts in self._relay.memory().items()]

    def _bans(self) -> Iterator[Sequence[BanFact]]:
        yield [BanFact(*ban) for ban in self._failures.bans()]

    def _hosts(self) -> Iterator[Sequence[HostFact]]:
        yield [
            HostFact(host, until_us, ", ".join(address.text for address in addresses))
            for host, until_us, addresses in self._resolver.known()
        ] + [HostFact(*known) for known in self._host_names.known()]

    def _statements(self) -> Iterator[Sequence[StatementFact]]:
        bucket = 0
        while True:
            rows, bucket = self._reply(self._relay.list_statements(bucket))
            yield [
                StatementFact(name.decode(), text.decode("utf-8", "replace"), references)
                for name, text, references in rows
            ]
            if not bucket:
                return
            gevent.sleep(0)

    def _copies(self) -> Iterator[Sequence[CopyFact]]:
        for handle, lease in list(self._servers.leases.items()):
            try:
                token = self._relay.list_copies(handle)
            except KeyError:
                continue  # it has gone meanwhile
            names, _ = self._reply(token)
            database, user = _route_name(lease.route)
            yield [CopyFact(user, database, server_id(lease.server_id), name.decode()) for name in names]

    def _workers(self) -> Iterator[Sequence[WorkerFact]]:
        process = self._counters.process
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        yield [
            WorkerFact(
                self._worker,
                os.getpid(),
                process(ProcessWord.CLIENTS),
                process(ProcessWord.CLIENTS_LOGIN),
                process(ProcessWord.CONSOLES),
                process(ProcessWord.LISTENING),
                pages * PAGE,
                process(ProcessWord.BROKER_SENT),
                process(ProcessWord.BROKER_RECEIVED),
                process(ProcessWord.LOG_LINES_LOST),
            )
        ]


def _route_name(route: Route) -> tuple[str, str]:
    fact = RouteFact(route.route_id, route.rule.name, route.database, route.user, 0, 0)
    return name_of(fact, route.rule)


@lru_cache(maxsize=1024)
def _host(family: int, address: bytes) -> str:
    if family == 0:
        return "unix"
    return socket.inet_ntop(socket.AF_INET6 if family == 6 else socket.AF_INET, address)


def _endpoint(address: Address | None) -> tuple[str, int]:
    """Where a server is."""
    if address is None:
        return "", 0
    if isinstance(address.sockaddr, str):
        return "unix", int(address.sockaddr.rpartition(".")[2])
    return address.sockaddr[0], address.sockaddr[1]
