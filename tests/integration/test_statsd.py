"""Metrics on the wire: a real UDP socket, a closed one, a name nobody knows."""

import socket
from collections.abc import Iterator

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
    assert "gp.routes.app.web.clients.total:0|g" in server.recv(2000).decode()
    counters.add_route(3, RouteWord.QUERIES, 5)
    counters.add_process(ProcessWord.LOGINS)
    reporter.report()
    sent = server.recv(2000).decode().split("\n")
    assert "gp.routes.app.web.queries:5|c" in sent
    assert "gp.process.logins:1|c" in sent
    assert "gp.process.lost.metrics:0|g" in sent
    assert lines[0].startswith("app web stats [app.web] clients 0 active 0")
    assert not runner.dead
    runner.kill()
    statsd.close()
    totals.detach(1)
    past.close()
