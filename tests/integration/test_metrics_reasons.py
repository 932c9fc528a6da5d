"""Reasons of errors and ends: each is made to happen in both workers, and counted by metrics and console."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from gpooler.reasons import Reason
from tests.harness import FaultProxy, Gpooler, Postgres, RawClient, eventually, free_port
from tests.harness.certificates import Certificates
from tests.harness.client import ServerError, cancel_request, query
from tests.harness.console import CONSOLE, Console, console, spread
from tests.harness.gpooler import merge
from tests.harness.scrape import Scraper

Factory = Callable[..., Gpooler]
Deed = Callable[[list[RawClient], Console], int]
PATIENCE = 20.0


@pytest.fixture
def make(postgres: Postgres, gpooler_factory: Factory) -> Callable[..., tuple[Gpooler, Scraper]]:
    """Makes a gpooler of two workers with a console, and its scraper."""

    def start(
        rule: dict[str, Any] | None = None, config: dict[str, Any] | None = None, **options: Any
    ) -> tuple[Gpooler, Scraper]:
        scraper = Scraper(free_port())
        own = {"metrics": {"prometheus_port": scraper.port}, "logging": {"stats_interval": 1}}
        whole = merge(merge(CONSOLE, own), config or {})
        return gpooler_factory(
            postgres, rule={"pool_size": 8, **(rule or {})}, config=whole, **options
        ), scraper

    return start


@dataclass(frozen=True)
class Case:
    """What makes a reason happen as often as the deed says."""

    reason: Reason
    deed: Deed
    rule: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    listener: dict[str, Any] = field(default_factory=dict)


def each(*requests: str) -> Deed:
    """Every client sends these queries; the last one has no answer that matters."""

    def deed(clients: list[RawClient], control: Console) -> int:
        for client in clients:
            for sql in requests[:-1]:
                client.query(sql)
            client.send(query(requests[-1]))
        return len(clients)

    return deed


def sends(*data: bytes) -> Deed:
    def deed(clients: list[RawClient], control: Console) -> int:
        for client in clients:
            client.send(*data)
        return len(clients)

    return deed


def nothing(clients: list[RawClient], control: Console) -> int:
    return len(clients)


def are_killed(clients: list[RawClient], control: Console) -> int:
    for row in control.show("CLIENTS WHERE database = 'app'"):
        control.connection.execute(f"KILL_CLIENT {row['ptr']}")  # type: ignore[call-overload]
    return len(clients)


def leave_in_copy(clients: list[RawClient], control: Console) -> int:
    for client in clients:
        client.query("CREATE TEMP TABLE t (a int)")
        client.send(query("COPY t FROM STDIN"))
        client.read_until(b"G")
        client.reset()
    return len(clients)


def leave_dirty(clients: list[RawClient], control: Console) -> int:
    for client in clients:
        client.query("CREATE TEMP TABLE t (a int)")
        client.terminate()
    return len(clients)


def servers_of_each(clients: list[RawClient]) -> int:
    """As many servers as there are clients, which are no fewer than the pool has room for."""
    for client in clients:
        client.query("BEGIN")
    for client in clients:
        client.query("COMMIT")
    return len(clients)


def reconnect(clients: list[RawClient], control: Console) -> int:
    count = servers_of_each(clients[:4])
    control.connection.execute("RECONNECT app")
    return count


VIRTUAL = {"routing": {"virtual_processing": True}}
SET = "SET odyssey.target_session_attrs = "
LONG = query(f"SELECT '{'x' * 100_000}'")[:60_000]

CASES = [
    Case(Reason.CLIENT_KILLED, are_killed),
    Case(Reason.CLIENT_PROTOCOL, sends(b"\x01\0\0\0\x04")),
    Case(Reason.CLIENT_IDLE, nothing, {"client_idle_timeout": 1}),
    Case(Reason.CLIENT_IDLE_IN_TRANSACTION, each("BEGIN"), {"pool_idle_in_transaction_timeout": 1}),
    Case(Reason.CLIENT_QUERY_TIMEOUT, each("SELECT pg_sleep(60)"), {"query_timeout": 1}),
    Case(Reason.CLIENT_TRANSACTION_TIMEOUT, each("BEGIN", "SELECT 1"), {"transaction_timeout": 1}),
    Case(Reason.CLIENT_STALLED, sends(LONG), listener={"client_login_timeout": 3000}),
    Case(Reason.STATEMENT_POOL, each("BEGIN"), {"pool": "statement"}),
    Case(Reason.SESSION_STATE, each("LISTEN x"), {"session_state": "refuse"}),
    Case(Reason.TARGET_INVALID, each(SET + "'nearest'"), config=VIRTUAL),
    Case(Reason.TARGET_UNBUILT, each(SET + "'read-write'"), config=VIRTUAL),
    Case(Reason.VIRTUAL_UNCLEAR, each("SHOW odyssey.target_session_attrs; SELECT 1"), config=VIRTUAL),
    Case(Reason.SERVER_DIRTY_END, leave_in_copy),
    Case(Reason.SERVER_RESET_FAILED, leave_dirty, {"pool_discard_query": "SELECT 1/0"}),
    Case(Reason.SERVER_OBSOLETE, reconnect, {"pool_size": 4}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason.label)
def test_a_reason_is_counted_as_often_as_it_happens(
    make: Callable[..., tuple[Gpooler, Scraper]], case: Case
) -> None:
    gpooler, scraper = make(case.rule, case.config, listener=case.listener)
    label = case.reason.label
    with ExitStack() as stack, console(gpooler) as control:
        clients = spread(gpooler, stack, 4)
        count = case.deed(clients, control)
        kind = "ends" if case.reason is Reason.SERVER_OBSOLETE else "errors"

        def counted() -> float:
            return scraper.route(f"{kind}_total", reason=label)

        eventually(lambda: counted() == count, within=PATIENCE)
        if kind == "errors":
            assert control.one(f"ERRORS WHERE error_type = '{label}'")["count"] == count
            route = control.one(f"ERRORS_PER_ROUTE WHERE error_type = '{label}'")
            assert (route["database"], route["user"], route["count"]) == ("app", "trust_user", count)
        stack.pop_all().close()
        assert counted() == count


def test_a_reset_that_takes_too_long(
    make: Callable[..., tuple[Gpooler, Scraper]], postgres: Postgres
) -> None:
    gpooler, scraper = make({"pool_size": 1, "pool_reset_timeout_ms": 60_000, "pool_discard": True})
    with gpooler.raw().login() as client:
        client.query("SELECT 1")
    eventually(lambda: scraper.route("resets_total") == 1)
    client = gpooler.raw().login()
    pid = int(client.query("SELECT pg_backend_pid()")[0][0] or 0)
    client.query("BEGIN")
    gpooler.reload(rule={"pool_reset_timeout_ms": 300})
    postgres.freeze(pid)
    try:
        client.close()
        eventually(lambda: scraper.route("closing_servers") == 1, within=PATIENCE)
        assert scraper.route("active_servers") == 0
    finally:
        postgres.thaw(pid)
    # ends are counted when PostgreSQL has let go
    eventually(lambda: scraper.route("errors_total", reason="server_reset_timeout") == 1, within=PATIENCE)
    assert postgres.activity() == []


def test_parameters_that_a_server_refuses(make: Callable[..., tuple[Gpooler, Scraper]]) -> None:
    gpooler, scraper = make()
    for _ in range(2):
        with gpooler.raw() as client, pytest.raises(ServerError, match="invalid value"):
            client.login(DateStyle="nonsense")
    eventually(lambda: scraper.route("errors_total", reason="server_deploy_failed") == 2, within=PATIENCE)


def test_servers_of_replication_end_with_their_clients(
    make: Callable[..., tuple[Gpooler, Scraper]], postgres: Postgres
) -> None:
    gpooler, scraper = make({"storage_user": "replicator"})
    route = Scraper(scraper.port, user="replicator")
    count = 0
    found: dict[int, list[RawClient]] = {1: [], 2: []}
    with ExitStack() as stack, console(gpooler) as control:
        while any(len(clients) < 2 for clients in found.values()):
            client = stack.enter_context(gpooler.raw()).login(replication="database")
            client.query("IDENTIFY_SYSTEM")
            count += 1
            port = client.socket.getsockname()[1]
            clients = found[control.one(f"CLIENTS_EXTENDED WHERE port = {port}")["worker"]]
            if len(clients) < 2:
                clients.append(client)
            else:
                client.terminate()
        eventually(lambda: len(postgres.walsenders()) == 4)
        for clients in found.values():
            for client in clients:
                client.terminate()
        eventually(lambda: route.route("ends_total", reason="server_client_left") == count, within=PATIENCE)
        eventually(lambda: postgres.walsenders() == [])


def test_a_smaller_pool_has_servers_recalled(
    make: Callable[..., tuple[Gpooler, Scraper]], postgres: Postgres
) -> None:
    gpooler, scraper = make({"pool_size": 4})
    with ExitStack() as stack:
        count = servers_of_each(spread(gpooler, stack, 4)[:4])
        assert len(postgres.activity()) == count
        gpooler.reload(rule={"pool_size": 2})
        wanted = count - 2
        eventually(lambda: scraper.route("ends_total", reason="server_recalled") == wanted, within=PATIENCE)
        assert len(postgres.activity()) == 2


def test_a_server_being_reset_and_cancels_that_wait(
    make: Callable[..., tuple[Gpooler, Scraper]],
    postgres: Postgres,
    fault_proxy: Callable[[int], FaultProxy],
) -> None:
    proxy = fault_proxy(postgres.port)
    limits = {"cancel_timeout_ms": 60_000, "cancel_max_inflight": 2}
    gpooler, scraper = make(
        {"pool_discard": True, "pool_reset_timeout_ms": 60_000},
        {"limits": limits, "storage": {"postgres": {"port": proxy.port}}},
    )
    with ExitStack() as stack:
        clients = spread(gpooler, stack, 4)[:4]
        for client in clients:
            client.query("BEGIN")
            client.send(query("SELECT pg_sleep(60)"))
        eventually(lambda: [each.state for each in postgres.activity()].count("active") == len(clients))
        proxy.stall("up")
        for client in clients:
            canceller = stack.enter_context(gpooler.raw())
            canceller.send(cancel_request(client.pid, client.key))

        def is_seen() -> bool:
            """One at a time in each worker: two where both have clients."""
            found = scraper.scrape()
            active, waiting = found.route("active_cancels"), found.route("waiting_cancels")
            assert found.pool("client_waiting_cancel_connections") == waiting
            return active + waiting == len(clients) and waiting >= len(clients) - 2

        eventually(is_seen, within=PATIENCE)
        proxy.resume("up")
        for client in clients:
            with pytest.raises(ServerError, match="canceling"):
                client.rows()
            client.query("ROLLBACK")
        eventually(lambda: scraper.route("active_cancels") + scraper.route("waiting_cancels") == 0)
        victim = clients[0]
        victim.query("BEGIN")
        pid = int(victim.query("SELECT pg_backend_pid()")[0][0] or 0)
        postgres.freeze(pid)
        try:
            victim.close()

            def is_reset() -> bool:
                found = scraper.scrape()
                told = found.route("resetting_servers"), found.pool("server_testing_connections")
                return told == (1, 1) and found.route("active_servers") == 1

            eventually(is_reset, within=PATIENCE)
        finally:
            postgres.thaw(pid)
        eventually(lambda: scraper.route("resetting_servers") == 0, within=PATIENCE)


def test_clients_of_the_console_are_counted(make: Callable[..., tuple[Gpooler, Scraper]]) -> None:
    gpooler, scraper = make()
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(console(gpooler))
        eventually(lambda: scraper.scrape().value("gpooler_console_clients") == 5)
        assert scraper.scrape().value("gpooler_connections") == 0
    eventually(lambda: scraper.scrape().value("gpooler_console_clients") == 0)


def test_the_end_of_a_certificate_is_told(
    make: Callable[..., tuple[Gpooler, Scraper]], tmp_path: Path
) -> None:
    certificates = Certificates(tmp_path)
    gpooler, scraper = make(listener=certificates.options("ending", "allow"))
    data = Path(certificates.pem("ending")).read_bytes()
    end = x509.load_pem_x509_certificate(data).not_valid_after_utc.timestamp()
    name = f"127.0.0.1:{gpooler.port}"

    def told() -> float:
        labels = {"section": "listen", "name": name, "option": "tls_cert_file"}.items()
        return scraper.scrape().values["gpooler_certificate_not_after_seconds", frozenset(labels)]

    assert told() == end
