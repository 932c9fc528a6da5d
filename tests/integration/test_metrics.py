"""Every metric moves with what it measures: conditions made on two workers, against counts of our own."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import psutil
import pytest

from gpooler.stats.registry import ProcessWord, RouteWord
from tests.harness import FaultProxy, Gpooler, Postgres, RawClient, eventually, free_port
from tests.harness.client import SYNC, ServerError, bind, cancel_request, execute, parse, query, startup
from tests.harness.scrape import Scraped, Scraper

Factory = Callable[..., Gpooler]

MOST_LOGINS = 60  # until both workers have clients: they differ by eight and some at most


@pytest.fixture
def measured(postgres: Postgres, gpooler_factory: Factory) -> Callable[..., tuple[Gpooler, Scraper]]:
    """Makes a gpooler of two workers, two servers, and its scraper."""

    def make(port: int | None = None, **rule: object) -> tuple[Gpooler, Scraper]:
        scraper = Scraper(free_port())
        config: dict[str, object] = {
            "performance": {"workers": 2},
            "metrics": {"prometheus_port": scraper.port},
            "logging": {"stats_interval": 1, "log_stats": False},
        }
        if port is not None:
            config["storage"] = {"postgres": {"port": port}}
        return gpooler_factory(postgres, rule={"pool_size": 2, **rule}, config=config), scraper

    return make


@contextmanager
def clients_of_both_workers(gpooler: Gpooler, **parameters: str) -> Iterator[list[RawClient]]:
    """Clients logged in, two at least in each worker."""
    with ExitStack() as stack:
        workers = gpooler.worker_counters()
        for counters in workers:
            stack.callback(counters.close)
        clients: list[RawClient] = []
        while min(counters.process(ProcessWord.CLIENTS) for counters in workers) < 2:
            assert len(clients) < MOST_LOGINS
            clients.append(stack.enter_context(gpooler.raw()))
            clients[-1].login(**parameters)
        yield clients


def settled(scraper: Scraper, **wanted: float) -> Scraped:
    """The scrape in which all these metrics of the route have their values."""

    def look() -> Scraped | None:
        nonlocal last
        last = scraper.scrape()
        return last if all(last.route(name) == value for name, value in wanted.items()) else None

    last = scraper.scrape()
    try:
        return eventually(look, within=15)
    except AssertionError:
        found = {name: last.route(name) for name in wanted}
        raise AssertionError(f"wanted {wanted}, found {found}") from None


def test_clients_and_servers_are_told_by_what_they_do(
    measured: Callable[..., tuple[Gpooler, Scraper]], postgres: Postgres
) -> None:
    gpooler, scraper = measured()
    with clients_of_both_workers(gpooler) as clients, gpooler.raw() as slow:
        slow.send(startup("trust_user", "app")[:1])  # who says nothing at all is accepted a second later
        for client in clients[:2]:
            client.query("BEGIN")
        began = time.monotonic()
        clients[2].send(query("SELECT 1"))
        count = len(clients)
        found = settled(
            scraper, clients=count, active_clients=2, waiting_clients=1, active_servers=2, idle_servers=0
        )
        assert [backend.state for backend in postgres.activity()] == ["idle in transaction"] * 2
        waited = eventually(lambda: scraper.route("maxwait_seconds"))
        assert 0 < waited <= time.monotonic() - began
        assert found.pool("client_active_connections") == count - 1
        assert found.pool("client_waiting_connections") == 1
        assert found.pool("server_active_connections") == 2
        assert found.pool("server_idle_connections") == 0
        assert scraper.scrape().pool("client_maxwait_seconds") >= waited
        eventually(lambda: scraper.scrape().value("gpooler_login_clients") == 1, within=10)
        found = scraper.scrape()
        assert found.value("gpooler_workers") == found.value("gpooler_accepting_workers") == 2
        assert found.value("gpooler_connections") == found.value("pgbouncer_used_clients") == count
        assert found.value("pgbouncer_login_clients") == 1
        assert found.value("pgbouncer_used_servers") == len(postgres.activity())
        assert [found.value(f"pgbouncer_{name}") for name in ("databases", "users", "pools", "up")] == [1] * 4
        for client in clients[:2]:
            client.query("COMMIT")
        clients[2].rows()
        found = settled(scraper, active_clients=0, waiting_clients=0, active_servers=0, idle_servers=2)
        assert [backend.state for backend in postgres.activity()] == ["idle"] * 2
        assert found.pool("server_idle_connections") == 2
        assert found.route("maxwait_seconds") == 0
    settled(scraper, clients=0)
    eventually(lambda: scraper.scrape().value("gpooler_login_clients") == 0, within=10)
    eventually(lambda: scraper.scrape().value("gpooler_connections") == 0)


def test_servers_being_opened_and_closed(
    measured: Callable[..., tuple[Gpooler, Scraper]],
    postgres: Postgres,
    fault_proxy: Callable[[int], FaultProxy],
) -> None:
    proxy = fault_proxy(postgres.port)
    gpooler, scraper = measured(proxy.port, pool_size=1)
    proxy.stall("down")
    with gpooler.raw() as client:
        client.send(startup("trust_user", "app"))
        found = settled(scraper, login_servers=1, idle_servers=0)
        assert found.pool("server_login_connections") == 1
        assert found.value("pgbouncer_used_servers") == 1
        proxy.resume()
        client.read_until()
    settled(scraper, login_servers=0)
    (backend,) = postgres.activity()
    postgres.freeze(backend.pid)
    try:
        gpooler.reload(rule={"pool_ttl": 1})
        settled(scraper, closing_servers=1, idle_servers=0)
    finally:
        postgres.thaw(backend.pid)
    settled(scraper, closing_servers=0)
    assert scraper.route("ends_total", reason="server_idle") == 1


def test_work_is_counted(measured: Callable[..., tuple[Gpooler, Scraper]], postgres: Postgres) -> None:
    gpooler, scraper = measured()
    with clients_of_both_workers(gpooler) as clients:
        before = scraper.scrape()
        sent = received = queries = 0
        for number, client in enumerate(clients):
            for sql in ("BEGIN", f"SELECT repeat('x', {number * 100})", "COMMIT"):
                request = query(sql)
                client.send(request)
                sent += len(request)
                received += sum(5 + len(answer.body) for answer in client.read_until())
                queries += 1
        found = settled(
            scraper,
            transactions_total=before.route("transactions_total") + len(clients),
            queries_total=before.route("queries_total") + queries,
            received_bytes_total=before.route("received_bytes_total") + sent,
            sent_bytes_total=before.route("sent_bytes_total") + received,
            assignments_total=before.route("assignments_total") + len(clients),
            logins_total=len(clients),
            opened_servers_total=len(postgres.activity()),
            deploys_total=0,
            resets_total=0,
            pins_total=0,
        )
        assert found.value("gpooler_client_logins_total") == len(clients)
        for ours, theirs in (
            ("queries_total", "queries_pooled_total"),
            ("transactions_total", "sql_transactions_pooled_total"),
            ("received_bytes_total", "received_bytes_total"),
            ("sent_bytes_total", "sent_bytes_total"),
            ("query_seconds_sum", "queries_duration_seconds_total"),
            ("transaction_seconds_sum", "server_in_transaction_seconds_total"),
            ("wait_seconds_sum", "client_wait_seconds_total"),
        ):
            assert found.totals(theirs) == pytest.approx(found.route(ours)), theirs
        broker = gpooler.process_count(ProcessWord.BROKER_SENT)
        assert found.value("gpooler_sent_broker_messages_total") <= broker
        assert found.value("gpooler_received_broker_messages_total") > 0
        for number, client in enumerate(clients[:2]):
            client.query(f"SET application_name = 'other{number}'")
            client.query("CREATE TEMP TABLE mine ()")
            client.query("DISCARD ALL")
        settled(scraper, pins_total=2)
        clients[0].query("CREATE TEMP TABLE mine ()")
        clients[0].terminate()
        settled(scraper, pins_total=3, resets_total=1)
        deploys = scraper.route("deploys_total")
        with gpooler.raw().login(TimeZone="Asia/Tokyo") as foreign:
            assert foreign.query("SHOW TimeZone") == [["Asia/Tokyo"]]
            eventually(lambda: scraper.route("deploys_total") > deploys)


def test_errors_and_ends_are_counted_by_reason(
    measured: Callable[..., tuple[Gpooler, Scraper]], postgres: Postgres
) -> None:
    gpooler, scraper = measured(pool_timeout=5000)

    def told(kind: str, reason: str, count: int) -> None:
        eventually(lambda: scraper.route(f"{kind}_total", reason=reason) == count, within=15)

    with gpooler.raw() as busy, gpooler.raw() as other:
        for client in (busy, other):
            client.login()
            client.query("BEGIN")
        busy.send(query("SELECT pg_sleep(60)"))
        eventually(lambda: "active" in [backend.state for backend in postgres.activity()])
        with gpooler.raw().login() as waiting:
            waiting.send(query("SELECT 1"))
            eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
            with gpooler.raw() as canceller:
                canceller.send(cancel_request(waiting.pid, waiting.key))
                with pytest.raises(ServerError, match="canceling"):
                    waiting.rows()
            told("errors", "client_cancelled", 1)
            assert scraper.route("cancels_total") == 1
            with gpooler.raw() as canceller:
                canceller.send(cancel_request(busy.pid, busy.key))
                with pytest.raises(ServerError, match="canceling"):
                    busy.rows()
            eventually(lambda: scraper.route("cancels_total") == 2)
            with pytest.raises((ServerError, EOFError)):
                waiting.query("SELECT 1")
        told("errors", "client_pool_timeout", 1)
    told("errors", "client_gone", 2)
    for _ in range(3):
        gpooler.raw().login().terminate()
    told("ends", "client_terminated", 3)
    with gpooler.raw().login() as client:
        client.query("BEGIN")
        ((pid,),) = client.query("SELECT pg_backend_pid()")
        postgres.terminate(int(pid or 0))
        client.read_to_end()
    told("errors", "server_lost", 2)  # the server, and its client
    with gpooler.raw() as client:
        client.send(b"\0\0\0\x08\0\x09\0\0")
        client.read_to_end()
    eventually(lambda: scraper.scrape().value("gpooler_login_errors_total") == 1)


def test_times_are_those_that_requests_took(
    measured: Callable[..., tuple[Gpooler, Scraper]], postgres: Postgres
) -> None:
    gpooler, scraper = measured(quantiles=[0.5, 0.99])
    with clients_of_both_workers(gpooler) as clients:
        began = time.monotonic()
        for client in clients[:4]:
            client.query("BEGIN")
            client.query("SELECT pg_sleep(0.1)")
            client.query("COMMIT")
        with ExitStack() as stack:
            for client in clients[:2]:
                client.query("BEGIN")
                stack.callback(client.query, "COMMIT")
            clients[2].send(query("SELECT 1"))
            eventually(lambda: scraper.route("maxwait_seconds") > 0.05)
        clients[2].rows()
        elapsed = time.monotonic() - began
        found = scraper.scrape()

        def within(kind: str, bound: str) -> float:
            return found.route(f"{kind}_seconds_bucket", le=bound)

        # 100 ms lie in the bucket from 65.5 to 262 ms and above it, if the machine is slow
        assert found.route("query_seconds_count") == 4 * 3 + 2 * 2 + 1
        assert within("query", "+Inf") - within("query", "0.065536") >= 4
        assert 0.4 <= found.route("query_seconds_sum") <= elapsed
        assert found.route("transaction_seconds_count") == 4 + 2 + 1
        assert within("transaction", "+Inf") - within("transaction", "0.065536") >= 4
        assert found.route("wait_seconds_count") >= 7
        assert within("wait", "+Inf") - within("wait", "0.016384") >= 1
        assert 0.05 <= found.route("wait_seconds_sum")
        assert found.route("login_seconds_count") == len(clients)
        assert found.route("connect_seconds_count") == len(postgres.activity())
        assert 0 < found.route("connect_seconds_sum")
        assert 0 < found.route("login_seconds_sum")
        end = time.monotonic() + 30
        while time.monotonic() < end:  # only what is asked for now counts in the end
            clients[3].query("SELECT pg_sleep(0.1)")
            median = scraper.route("query_quantile_seconds", quantile="0.5")
            if (
                0.065536 <= median <= 0.2
                and scraper.route("transaction_quantile_seconds", quantile="0.99") >= median
            ):
                return
    raise AssertionError(f"the median of sleeps of 0.1 s is {median} s")


def test_what_dead_workers_and_brokers_counted_is_kept(
    measured: Callable[..., tuple[Gpooler, Scraper]],
) -> None:
    gpooler, scraper = measured()
    with clients_of_both_workers(gpooler) as clients:
        for client in clients:
            client.query("SELECT 1")
        counted = len(clients)
        settled(scraper, queries_total=counted, query_seconds_count=counted, login_seconds_count=counted)
        broker = gpooler.broker_pid()
        os.kill(broker, signal.SIGKILL)  # requests wait for the next one
        settled(scraper, queries_total=counted, query_seconds_count=counted, login_seconds_count=counted)
        assert gpooler.broker_pid() != broker
        assert scraper.get("/readyz").status == 200
        first = gpooler.worker_pids()[0]
        os.kill(first, signal.SIGKILL)
        eventually(lambda: first not in gpooler.worker_pids() and len(gpooler.worker_pids()) == 2, within=20)
        settled(scraper, queries_total=counted, query_seconds_count=counted, login_seconds_count=counted)


def test_processes_are_told_as_the_system_sees_them(
    measured: Callable[..., tuple[Gpooler, Scraper]],
) -> None:
    gpooler, scraper = measured()
    names = ("master", "broker", "worker_1", "worker_2")
    pids = (gpooler.pid, gpooler.broker_pid(), *gpooler.worker_pids())
    processes = {name: psutil.Process(pid) for name, pid in zip(names, pids, strict=True)}
    with clients_of_both_workers(gpooler):
        before = {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}
        found = scraper.scrape()
        for name, process in processes.items():
            cpu = found.value("gpooler_process_cpu_seconds_total", process=name)
            assert before[name] - 0.02 <= cpu <= sum(process.cpu_times()[:2]) + 0.02
            resident = found.value("gpooler_process_resident_memory_bytes", process=name)
            assert resident == pytest.approx(process.memory_info().rss, rel=0.2)

        def agree() -> bool:
            found = scraper.scrape()
            return all(
                found.value("gpooler_process_open_fds", process=name) == processes[name].num_fds()
                for name in names
                if name != "broker"  # our own request is open while it counts
            )

        eventually(agree)
        assert scraper.scrape().value("gpooler_process_open_fds", process="broker") > 0


def test_metrics_that_cannot_be_sent_delay_nobody_and_are_counted(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    scraper = Scraper(free_port())
    gpooler = gpooler_factory(
        postgres,
        config={
            "metrics": {"prometheus_port": scraper.port, "statsd_host": "no-such-host.invalid"},
            "logging": {"stats_interval": 1},
        },
    )
    with gpooler.raw().login() as client:
        eventually(lambda: scraper.scrape().value("gpooler_lost_metrics_total") >= 2, within=20)
        assert client.query("SELECT 1") == [["1"]]


def test_what_the_log_had_no_room_for_is_counted(postgres: Postgres, gpooler_factory: Factory) -> None:
    scraper = Scraper(free_port())
    gpooler = gpooler_factory(
        postgres,
        config={
            "metrics": {"prometheus_port": scraper.port},
            "logging": {"log_queue_depth": 1, "log_query": True},
        },
    )
    with gpooler.raw().login() as client:
        # a text costs the log more than it costs all others: sooner or later it has no room
        text = parse(f"SELECT '{'x' * 1000}'")

        def has_lost_some() -> bool:
            client.send(*[text] * 10_000, SYNC)
            client.read_until()
            return gpooler.process_count(ProcessWord.TEXT_EVENTS_LOST) > 0

        eventually(has_lost_some, within=60)
    for metric, word in (
        ("gpooler_lost_log_lines_total", ProcessWord.LOG_LINES_LOST),
        ("gpooler_lost_log_queries_total", ProcessWord.TEXT_EVENTS_LOST),
    ):
        eventually(
            lambda metric=metric, word=word: scraper.scrape().value(metric) == gpooler.process_count(word) > 0
        )


def test_a_cancel_in_flight_and_prepared_statements(
    measured: Callable[..., tuple[Gpooler, Scraper]],
    postgres: Postgres,
    fault_proxy: Callable[[int], FaultProxy],
) -> None:
    proxy = fault_proxy(postgres.port)
    gpooler, scraper = measured(proxy.port)
    with gpooler.raw().login() as busy, gpooler.raw() as canceller:
        busy.send(parse("SELECT 1", "one"), bind("one"), execute(), bind("one"), execute(), SYNC)
        busy.read_until()
        found = settled(scraper, client_parses_total=1, server_parses_total=1, binds_total=2)
        assert [found.totals(f"{name}_total") for name in ("client_parses", "server_parses", "binds")] == [
            1,
            1,
            2,
        ]
        busy.query("BEGIN")
        busy.send(query("SELECT pg_sleep(60)"))
        eventually(lambda: "active" in [backend.state for backend in postgres.activity()])
        proxy.stall("up")
        canceller.send(cancel_request(busy.pid, busy.key))
        found = settled(scraper, active_cancels=1, waiting_cancels=0, cancelled_servers=1)
        assert found.pool("client_active_cancel_connections") == 1
        assert found.pool("server_active_cancel_connections") == 1
        assert found.pool("server_being_canceled_connections") == 1
        proxy.resume("up")
        with pytest.raises(ServerError, match="canceling"):
            busy.rows()
        busy.query("ROLLBACK")
        settled(scraper, active_cancels=0, cancelled_servers=0)
