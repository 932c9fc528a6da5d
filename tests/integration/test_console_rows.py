"""What the console says is so: compared with what the test did and with what PostgreSQL sees."""

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest

from tests.harness import FaultProxy, Gpooler, Postgres, RawClient, eventually
from tests.harness.client import query
from tests.harness.console import CONSOLE, Row, console, spread

Factory = Callable[..., Gpooler]
LONG = "SELECT pg_sleep(60)"


@pytest.fixture
def make(postgres: Postgres, gpooler_factory: Factory) -> Callable[..., Gpooler]:
    def start(rule: Row | None = None, **config: Any) -> Gpooler:
        return gpooler_factory(postgres, rule={"pool_size": 4, **(rule or {})}, config={**CONSOLE, **config})

    return start


def test_a_client_that_waits_is_seen_with_its_time(make: Callable[..., Gpooler]) -> None:
    pool = make({"pool_size": 1})
    with pool.raw() as holder, pool.raw() as waiter, console(pool) as control:
        holder.login()
        waiter.login()
        holder.query("BEGIN")
        waiter.send(query("SELECT 'served'"))

        def waits() -> bool:
            row = control.pool()
            return bool(row["cl_waiting"] == 1 and (row["maxwait"], row["maxwait_us"]) > (0, 0))

        eventually(waits)
        row = control.one("CLIENTS WHERE state = 'waiting'")
        assert (row["wait"], row["wait_us"]) > (0, 0)
        extended = control.one("CLIENTS_EXTENDED WHERE state = 'waiting'")
        assert extended["wait_us"] > 0
        assert extended["server_id"] is None
        holder.query("COMMIT")
        assert waiter.rows() == [["served"]]
        assert control.pool()["cl_waiting"] == 0
        totals = {row["name"]: int(row["value"]) for row in control.show("TOTALS")}
        assert totals["total_wait_time"] >= row["wait"] * 1_000_000 + row["wait_us"]


def test_a_server_in_login_and_a_cancel_in_flight_are_seen(
    make: Callable[..., Gpooler], postgres: Postgres, fault_proxy: Callable[[int], FaultProxy]
) -> None:
    proxy = fault_proxy(postgres.port)
    limits = {"cancel_timeout_ms": 60_000, "cancel_max_inflight": 2}
    pool = make(
        {"pool_size": 2}, storage={**CONSOLE["storage"], "postgres": {"port": proxy.port}}, limits=limits
    )
    with ExitStack() as stack, console(pool) as control:
        clients = [stack.enter_context(pool.raw()) for _ in range(2)]
        for client in clients:
            client.login()
            client.query("BEGIN")
            client.send(query(LONG))
        eventually(lambda: [row.query for row in postgres.activity()].count(LONG) == 2)
        proxy.stall("up")
        cancellers = [stack.enter_context(pool.raw()) for _ in range(2)]
        for canceller, client in zip(cancellers, clients, strict=True):
            canceller.send(cancel_of(client))
        # one at a time in each worker: how many wait depends on where the two clients are
        names = ("cl_active_cancel_req", "cl_waiting_cancel_req", "sv_active_cancel", "sv_being_canceled")

        def cancels() -> tuple[int, int]:
            row = control.pool()
            active, waiting, active_too, cancelled = (row[name] for name in names)
            assert active == active_too
            return active + waiting, cancelled

        eventually(lambda: cancels() == (2, 2))
        assert control.show("SERVERS_EXTENDED WHERE cancel_requests = 1")
        proxy.resume("up")
        for client in clients:
            client.read_until()
            client.query("ROLLBACK")
        eventually(lambda: cancels() == (0, 0))
        assert len(control.show("SERVERS WHERE state = 'idle'")) == 2
    for backend in postgres.activity():
        postgres.terminate(backend.pid)
    with pool.raw() as client, console(pool) as control:
        eventually(lambda: not control.show("SERVERS"))
        proxy.stall("up")
        client.login()
        client.send(query("SELECT 1"))
        eventually(lambda: control.pool()["sv_login"] == 1)
        new = control.one("SERVERS WHERE state = 'new'")
        assert (new["database"], new["port"]) == ("app", proxy.port)
        proxy.resume("up")
        assert client.rows() == [["1"]]


def cancel_of(client: RawClient) -> bytes:
    return b"\0\0\0\x10\x04\xd2\x16\x2e" + client.pid.to_bytes(4, "big") + client.key


def test_a_server_being_reset_is_seen(make: Callable[..., Gpooler], postgres: Postgres) -> None:
    pool = make({"pool_size": 1, "pool_reset_timeout_ms": 60_000, "pool_discard": True})
    with console(pool) as control:
        client = pool.raw()
        client.login()
        pid = int(client.query("SELECT pg_backend_pid()")[0][0] or 0)
        client.query("BEGIN")
        postgres.freeze(pid)
        try:
            client.close()
            eventually(lambda: control.pool()["sv_tested"] == 1)
            assert control.one("SERVERS")["state"] == "tested"
            assert control.pool()["sv_active"] == 0
        finally:
            postgres.thaw(pid)
        eventually(lambda: control.pool()["sv_idle"] == 1)


def test_totals_do_not_go_back_when_a_worker_dies(make: Callable[..., Gpooler]) -> None:
    pool = make()
    pool.may_be_dirty = "a worker is killed"
    with ExitStack() as stack:
        for client in spread(pool, stack, 6):
            client.query("SELECT 1")
        with console(pool) as control:
            before = control.one("STATS_TOTALS WHERE database = 'app'")
        victim = pool.worker_pids()[0]
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: len(pool.worker_pids()) == 2 and victim not in pool.worker_pids())
    with console(pool) as control:
        eventually(lambda: len(control.show("WORKERS")) == 2)
        now = control.one("STATS_TOTALS WHERE database = 'app'")
        assert all(now[name] >= before[name] for name in now if name != "database")
        assert now["query_count"] == before["query_count"]


def test_errors_are_counted_by_reason(make: Callable[..., Gpooler]) -> None:
    pool = make({"pool_size": 1})
    with pool.raw() as holder, pool.raw() as waiter, console(pool) as control:
        holder.login()
        waiter.login()
        holder.query("BEGIN")
        pool.reload(rule={"pool_timeout": 200})
        waiter.send(query("SELECT 1"))
        waiter.read_to_end()
        timeouts = "ERRORS WHERE error_type = 'client_pool_timeout'"
        eventually(lambda: control.one(timeouts)["count"] == 1)
        per_route = control.one("ERRORS_PER_ROUTE")
        assert (per_route["user"], per_route["database"], per_route["count"]) == ("trust_user", "app", 1)
        holder.query("COMMIT")


def test_bans_are_shown(make: Callable[..., Gpooler]) -> None:
    pool = make(limits={"auth_failure_max": 2, "auth_failure_ban_ms": 60_000})
    for _ in range(2):
        with pytest.raises(psycopg.OperationalError):
            pool.connect("stat", "pgbouncer", password="wrong")
    with console(pool) as control:
        ban = control.one("BANS")
        assert (ban["address"], ban["user"]) == ("127.0.0.1", "stat")
        assert ban["failures"] == 2
        assert 0 < ban["remaining_ms"] <= 60_000


def test_names_that_were_resolved_are_shown(make: Callable[..., Gpooler], postgres: Postgres) -> None:
    pool = make(storage={**CONSOLE["storage"], "postgres": {"host": "localhost", "port": postgres.port}})
    with pool.connect() as client, console(pool) as control:
        client.execute("SELECT 1")
        host = control.one("DNS_HOSTS")
        assert host["hostname"] == "localhost"
        assert f"127.0.0.1:{postgres.port}" in host["addrs"]
        assert 0 <= host["ttl"] <= 30  # seconds, of dns_cache_ttl
        assert control.one("LISTS WHERE list = 'dns_names'")["items"] == 1


def test_the_hosts_of_rules_are_shown_with_their_addresses(make: Callable[..., Gpooler]) -> None:
    pool = make({"address": "localhost"})
    with console(pool) as control:
        host = control.one("DNS_HOSTS")
        assert host["hostname"] == "localhost"
        assert "127.0.0.1" in host["addrs"].split(", ")
        assert 0 <= host["ttl"] <= 30
        assert "localhost" in [row["address"] for row in control.show("RULES")]
