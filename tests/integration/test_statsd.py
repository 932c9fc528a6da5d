"""Metrics on the wire: a real UDP socket, a closed one, an unknown name; and those of a running gpooler."""

import os
import re
import shutil
import signal
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import gevent
import pytest

from gpooler.clock import monotonic_us
from gpooler.log import Logger, compile_format
from gpooler.stats.metrics import Kind, Metric
from gpooler.stats.registry import ProcessWord, RouteWord
from gpooler.stats.reporter import Reporter
from gpooler.stats.shared import SharedCounters, Totals
from gpooler.stats.snapshot import Snapshot, take
from gpooler.stats.statsd import Statsd
from tests.harness import Gpooler, Postgres, eventually
from tests.harness.certificates import Certificates
from tests.harness.client import ServerError, cancel_request, query

Factory = Callable[..., Gpooler]

METRICS = [Metric("a", Kind.GAUGE, 2), Metric("b", Kind.COUNT, 3), Metric("c", Kind.TIME, 0.25)]


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.bind(("127.0.0.1", 0))
        made.settimeout(10)
        yield made


def test_metrics_arrive_together_with_the_prefix(server: socket.socket) -> None:
    statsd = Statsd(
        "localhost" if server.family == socket.AF_INET6 else "127.0.0.1", server.getsockname()[1], "p.q"
    )
    statsd.send(METRICS)
    statsd.close()
    assert server.recv(2000).decode().split("\n") == ["p.q.a:2|g", "p.q.b:3|c", "p.q.c:0.250000|ms"]
    assert statsd.failed == 0


def test_many_metrics_leave_in_datagrams_that_fit(server: socket.socket) -> None:
    statsd = Statsd("127.0.0.1", server.getsockname()[1], "p")
    statsd.send([Metric(f"m{number:04d}", Kind.COUNT, number) for number in range(300)])
    statsd.close()
    lines: list[str] = []
    while len(lines) < 300:
        datagram = server.recv(65536)
        assert len(datagram) <= 1432
        lines += datagram.decode().split("\n")
    assert lines[-1] == "p.m0299:299|c"


def test_a_closed_port_is_counted_and_nothing_raised(server: socket.socket) -> None:
    port = server.getsockname()[1]
    server.close()
    statsd = Statsd("127.0.0.1", port, "p")
    for _ in range(4):  # the kernel tells of the refusal at the send after
        statsd.send(METRICS)
    statsd.close()
    assert statsd.failed >= 1


def test_a_name_nobody_knows_is_counted_and_not_asked_for_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def nobody(host: str, *_: object, **__: object) -> None:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    statsd = Statsd("no-such-host.invalid", 8125, "p")
    statsd.send(METRICS)
    statsd.send(METRICS)
    assert statsd.failed == 2
    assert asked == ["no-such-host.invalid"]
    statsd.close()


def report(server: socket.socket) -> list[str]:
    """The lines of one report, in however many datagrams; this is the last of them."""
    lines: list[str] = []
    while not any(line.startswith("gp.process.lost.metrics:") for line in lines):
        lines += server.recv(2000).decode().split("\n")
    return lines


def test_reporter_logs_and_sends_what_happened(server: socket.socket) -> None:
    past, counters = SharedCounters.create(), SharedCounters.create()
    totals = Totals(past)
    totals.attach(1, counters)
    lines: list[str] = []
    logger = Logger(
        compile_format("%d %u %c %m", pid=1), lambda _, line: lines.append(line), lambda: 0.0, is_debug=False
    )
    statsd = Statsd("127.0.0.1", server.getsockname()[1], "gp")

    def snapshot() -> Snapshot:
        return take(monotonic_us(), totals, [(3, "app", "web")])

    reporter = Reporter(snapshot, interval_s=3600, logger=logger, is_logged=True, statsd=statsd)
    runner = gevent.spawn(reporter.run)
    gevent.sleep(0)
    assert "gp.routes.app.web.clients.total:0|g" in report(server)
    counters.add_route(3, RouteWord.QUERIES, 5)
    counters.add_process(ProcessWord.LOGINS)
    reporter.report()
    sent = report(server)
    assert "gp.routes.app.web.queries:5|c" in sent
    assert "gp.process.logins:1|c" in sent
    assert "gp.process.lost.metrics:0|g" in sent
    assert lines[0].startswith("app web stats [app.web] clients 0 active 0")
    assert not runner.dead
    runner.kill()
    statsd.close()
    totals.detach(1)
    past.close()


# --- of a running gpooler ---------------------------------------------------------------------


class Received:
    """What a statsd server makes of the datagrams: the last gauges, sums of counts, all times in ms."""

    def __init__(self, server: socket.socket) -> None:
        self._server = server
        self.gauges: dict[str, float] = {}
        self.counts: dict[str, int] = defaultdict(int)
        self.times: dict[str, list[float]] = defaultdict(list)
        self.names: set[str] = set()

    def read(self) -> "Received":
        """Take in what has arrived."""
        self._server.setblocking(False)
        while True:
            try:
                datagram = self._server.recv(65536).decode("ascii")
            except BlockingIOError:
                return self
            for line in datagram.split("\n"):
                name, value, kind = re.fullmatch(r"([^:|]+):(-?[\d.]+)\|(g|c|ms)", line).groups()  # type: ignore[union-attr]
                self.names.add(name)
                if kind == "g":
                    self.gauges[name] = float(value)
                elif kind == "c":
                    self.counts[name] += int(value)
                else:
                    self.times[name].append(float(value))


def reporting(server: socket.socket, **metrics: str) -> dict[str, dict[str, object]]:
    """The sections that have a gpooler report to ``server`` each second."""
    host, port = server.getsockname()
    return {
        "logging": {"stats_interval": 1, "log_stats": "no"},
        "metrics": {"statsd_host": host, "statsd_port": port, **metrics},
    }


def measured(postgres: Postgres, gpooler_factory: Factory, server: socket.socket, **rule: object) -> Gpooler:
    """A gpooler that reports to ``server`` each second."""
    return gpooler_factory(
        postgres,
        rule={"pool_size": 2, "storage_db": None, "storage_user": None, **rule},
        config={
            "performance": {"workers": 2},
            **reporting(server, statsd_prefix="prod.pool"),
        },
    )


def test_a_running_gpooler_tells_clients_servers_work_and_times(
    postgres: Postgres, gpooler_factory: Factory, server: socket.socket
) -> None:
    gpooler = measured(postgres, gpooler_factory, server)
    got = Received(server)
    route = "prod.pool.routes.app.trust_user"
    with gpooler.raw() as one, gpooler.raw() as two, gpooler.raw() as three, gpooler.raw() as four:
        for client in (one, two, three, four):
            client.login()
        one.query("BEGIN")
        two.query("BEGIN")
        three.send(query("SELECT repeat('x', 100000)"))
        eventually(lambda: got.read().gauges.get(f"{route}.clients.waiting") == 1, within=10)
        # a snapshot is taken word by word: wait for one of the state that lasts
        eventually(
            lambda: (
                [
                    got.read().gauges.get(f"{route}.{name}")
                    for name in ("clients.total", "clients.active", "servers.active", "servers.idle")
                ]
                == [4, 2, 2, 0]
            ),
            within=10,
        )
        eventually(lambda: got.read().gauges[f"{route}.clients.maxwait_ms"] > 0, within=10)
        one.query("COMMIT")
        two.query("COMMIT")
        assert three.rows()
        for _ in range(10):
            four.query("SELECT 1")
        eventually(lambda: got.read().counts[f"{route}.queries"] == 15, within=10)
        eventually(lambda: got.read().gauges[f"{route}.servers.idle"] == 2, within=10)
        assert got.gauges[f"{route}.clients.active"] == 0
        assert got.gauges["prod.pool.process.workers"] == 2
        assert got.gauges["prod.pool.process.clients"] == 4
    assert got.counts[f"{route}.transactions"] == 13
    assert got.counts[f"{route}.logins"] == 4
    assert got.counts[f"{route}.servers.opened"] == 2
    assert got.counts[f"{route}.bytes.in"] > 15 * 5
    assert got.counts[f"{route}.bytes.out"] > 100_000
    assert max(got.times[f"{route}.time.wait"]) > 0
    assert max(got.times[f"{route}.time.query"]) > 0
    assert max(got.times[f"{route}.time.transaction"]) > max(got.times[f"{route}.time.query"])


def test_errors_are_told_by_reason(
    postgres: Postgres, gpooler_factory: Factory, server: socket.socket
) -> None:
    gpooler = measured(postgres, gpooler_factory, server, pool="statement", pool_size=1)
    got = Received(server)
    route = "prod.pool.routes.app.trust_user"

    def told(name: str, at_least: int = 1) -> None:
        eventually(lambda: got.read().counts[f"{route}.{name}"] >= at_least, within=10)

    with gpooler.raw() as busy:
        busy.login()
        with pytest.raises(ServerError):
            busy.query("BEGIN")
        told("errors.statement_pool")
        busy.send(query("SELECT pg_sleep(60)"))
        eventually(lambda: [row.state for row in postgres.activity()] == ["active"])
        with gpooler.raw() as waiting:
            waiting.login()
            waiting.send(query("SELECT 1"))
            eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
            with gpooler.raw() as canceller:
                canceller.send(cancel_request(waiting.pid, waiting.key))
                with pytest.raises(ServerError, match="canceling"):
                    waiting.rows()
            told("errors.client_cancelled")
            gpooler.reload(rule={"pool_timeout": 500})
            with pytest.raises((ServerError, EOFError)):
                waiting.query("SELECT 1")
        told("errors.client_pool_timeout")
        gpooler.reload(rule={"pool_timeout": 0})
    told("errors.client_gone")
    with gpooler.raw() as client:
        client.login()
        client.query("SELECT 1")
        (backend,) = postgres.activity()
        postgres.terminate(backend.pid)
        told("errors.server_lost")
        client.send(b"!\0\0\0\4")
        client.read_to_end()
        told("errors.client_protocol")
    with gpooler.raw() as client:
        client.login()
        client.terminate()
    told("ends.client_terminated")
    with gpooler.raw() as client, pytest.raises(ServerError):
        client.login(database="nowhere")
    eventually(
        lambda: got.read().counts["prod.pool.routes.nowhere.trust_user.errors.server_connect"] >= 1, within=10
    )
    eventually(lambda: got.read().counts["prod.pool.process.login_errors"] == 1, within=10)
    assert got.counts["prod.pool.process.logins"] == 4


def test_names_that_a_client_chose_are_safe_for_graphite(
    postgres: Postgres, gpooler_factory: Factory, server: socket.socket
) -> None:
    postgres.query('CREATE DATABASE "a.b c/d:|ü"')
    try:
        dangerous = gpooler_factory(
            postgres,
            rule={"storage_db": None},
            config=reporting(server),
        )
        with dangerous.raw() as client:
            client.login(database="a.b c/d:|ü")
            client.query("SELECT 1")
            got = Received(server)
            name = "gpooler.routes.a-x2eb-x20c-x2fd-x3a-x7c-xc3-xbc.trust_user.queries"
            eventually(lambda: got.read().counts[name] == 1, within=10)
        assert dangerous.stop() == 0
        assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", each) for each in got.names)
    finally:
        postgres.query('DROP DATABASE "a.b c/d:|ü"')


def test_a_new_broker_does_not_tell_again_what_the_last_one_told(
    postgres: Postgres, gpooler_factory: Factory, server: socket.socket
) -> None:
    gpooler = measured(postgres, gpooler_factory, server)
    got = Received(server)
    route = "prod.pool.routes.app.trust_user"
    queries = f"{route}.queries"
    with gpooler.raw().login() as client:
        for _ in range(500):
            client.query("SELECT 1")
        eventually(lambda: got.read().counts[queries] == 500, within=10)
        broker = gpooler.broker_pid()
        os.kill(broker, signal.SIGKILL)
        eventually(lambda: gpooler.broker_pid() != broker, within=10)
        got.gauges.clear()
        eventually(lambda: got.read().gauges.get(f"{route}.clients.total") == 1, within=10)
        for _ in range(20):
            client.query("SELECT 1")
        eventually(lambda: got.read().counts[queries] >= 520, within=10)
    assert got.read().counts[queries] == 520


def test_rules_with_the_same_server_are_told_apart(
    postgres: Postgres, gpooler_factory: Factory, server: socket.socket
) -> None:
    rule = {
        "authentication": "none",
        "storage": "postgres",
        "storage_db": "app",
        "storage_user": "trust_user",
        "pool": "transaction",
    }
    gpooler = gpooler_factory(
        postgres,
        config={
            "database": {"default": None, "one": {"user": {"default": rule}}, "two": {"user": {"web": rule}}},
            **reporting(server),
        },
    )
    got = Received(server)
    with gpooler.raw() as one, gpooler.raw() as two:
        one.login("trust_user", "one").query("SELECT 1")
        two.login("web", "two").query("SELECT 1; SELECT 2")
        two.query("SELECT 3")
        eventually(lambda: got.read().counts["gpooler.routes.one.trust_user.queries"] == 1, within=10)
        eventually(lambda: got.read().counts["gpooler.routes.two.web.queries"] == 2, within=10)


def test_days_to_the_end_of_a_certificate(
    postgres: Postgres, gpooler_factory: Factory, server: socket.socket, tmp_path: Path
) -> None:
    """They are those of the file as it is: a renewed one is seen, and one that has expired is below zero."""
    files = Certificates(tmp_path)
    own = tmp_path / "own.pem"
    shutil.copy(files.pem("ending"), own)
    options = {**files.options("ending", "require"), "tls_cert_file": str(own)}
    gpooler = gpooler_factory(postgres, listener=options, config=reporting(server))
    assert "tls_cert_file: expires in 4 days, on 20" in gpooler.log()
    received = Received(server)
    name = f"gpooler.process.certificate_days.listen.127-x2e0-x2e0-x2e1-x3a{gpooler.port}"

    def days() -> float:
        return received.read().gauges.get(name, 0)

    eventually(lambda: 4 < days() <= 5)
    shutil.copy(files.pem("expired"), own)
    eventually(lambda: days() < 0)
    shutil.copy(files.pem("server"), own)
    eventually(lambda: days() > 30)
    shutil.copy(files.pem("ending"), own)
    eventually(lambda: days() <= 5)
    gpooler.reload(listener={"tls_cert_file": files.pem("rsa"), "tls_key_file": files.key("rsa")})
    eventually(lambda: days() > 30)
