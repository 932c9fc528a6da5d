"""HTTP on the port of Prometheus: health, what is refused, who is slow, and a drain from beginning to end."""

import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.harness import Gpooler, Postgres, RawClient, eventually, free_port
from tests.harness.scrape import Scraper

Factory = Callable[..., Gpooler]
SLOW_SCRAPERS = 20


def serving(gpooler_factory: Factory, postgres: Postgres, **service: object) -> tuple[Gpooler, Scraper]:
    """A gpooler of two workers, and its scraper."""
    scraper = Scraper(free_port())
    gpooler = gpooler_factory(
        postgres,
        config={
            "performance": {"workers": 2},
            "metrics": {"prometheus_port": scraper.port},
            "service": service,
        },
    )
    return gpooler, scraper


def answers(scraper: Scraper, path: str) -> tuple[int, str]:
    answer = scraper.get(path)
    return answer.status, answer.body


def last_words(client: RawClient) -> str:
    return client.read_to_end()[-1].fields()["C"]


def test_answers_and_refusals(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler, scraper = serving(gpooler_factory, postgres)
    assert answers(scraper, "/healthz") == (200, "alive\n")
    assert answers(scraper, "/readyz") == (200, "ready\n")
    assert scraper.get("/").status == 404
    refused = scraper.get("/metrics", "POST")
    assert (refused.status, refused.headers["Allow"]) == (405, "GET, HEAD")
    head = scraper.get("/metrics", "HEAD")
    assert (head.status, head.body) == (200, "")
    plain = scraper.get("/metrics")
    assert plain.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert plain.headers["Connection"] == "close"
    wanted = "application/openmetrics-text;version=1.0.0;q=0.7,text/plain;version=0.0.4;q=0.3"
    negotiated = scraper.get("/metrics", Accept=wanted)
    assert negotiated.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    names = {family.name for family in text_string_to_metric_families(negotiated.body)}
    assert {"gpooler_workers", "pgbouncer_up"} <= names
    with socket.create_connection(("127.0.0.1", scraper.port), 10) as rude:
        rude.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        assert b" 400 " in rude.recv(1000)
    assert gpooler.stop() == 0
    with pytest.raises(ConnectionRefusedError):
        scraper.get("/healthz")


def test_who_asks_slowly_or_never_reads_is_in_nobodys_way(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler, scraper = serving(gpooler_factory, postgres)
    with ExitStack() as stack, gpooler.raw().login() as client:
        for number in range(SLOW_SCRAPERS):
            slow = stack.enter_context(socket.socket())
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            slow.connect(("127.0.0.1", scraper.port))
            slow.sendall(b"GET /metrics HTTP/1.1\r\n" + (b"\r\n" if number % 2 else b""))
        assert client.query("SELECT 1") == [["1"]]
        assert answers(scraper, "/readyz") == (200, "ready\n")
        assert scraper.route("queries_total") == 1


def is_refused(gpooler: Gpooler) -> bool:
    """Whether the last worker has closed its listener, too."""
    try:
        gpooler.raw().close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_drain_shows_in_health_checks_before_anybody_feels_it(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler, scraper = serving(gpooler_factory, postgres, drain_delay_ms=4000, graceful_shutdown_timeout_ms=0)
    with gpooler.raw().login() as idle, gpooler.raw().login() as busy:
        busy.query("BEGIN")
        gpooler.signal(signal.SIGTERM)
        eventually(lambda: answers(scraper, "/readyz") == (503, "draining\n"))
        with gpooler.raw().login() as late:  # who did not look is still welcome
            assert late.query("SELECT 1") == idle.query("SELECT 1") == [["1"]]
            assert last_words(late) == last_words(idle) == "57P01"
        eventually(lambda: is_refused(gpooler))
        assert answers(scraper, "/healthz") == (200, "alive\n")
        assert answers(scraper, "/readyz") == (503, "draining\n")
        found = scraper.scrape()
        assert found.value("gpooler_draining") == 1
        assert found.value("gpooler_accepting_workers") == 0
        assert found.route("active_clients") == 1
        # both of them, and the parked server of a worker that has nobody left
        eventually(lambda: scraper.route("ends_total", reason="shutdown") >= 2)
        busy.query("COMMIT")
        assert last_words(busy) == "57P01"
    assert gpooler.stop() == 0


def test_without_a_delay_clients_are_told_at_once(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler, scraper = serving(gpooler_factory, postgres)
    with gpooler.raw().login() as idle, gpooler.raw().login() as busy:
        busy.query("BEGIN")
        gpooler.signal(signal.SIGTERM)
        assert last_words(idle) == "57P01"
        assert answers(scraper, "/readyz") == (503, "draining\n")
        busy.query("COMMIT")
    assert gpooler.stop() == 0
