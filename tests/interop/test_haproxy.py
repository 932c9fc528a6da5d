"""docs/haproxy.cfg as it stands, but for its addresses, before two gpoolers."""

import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from tests.harness import Gpooler, Postgres, eventually, free_port

pytestmark = pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not here")
ROOT = Path(__file__).parents[2]
Factory = Callable[..., Gpooler]


class Proxy:
    """HAProxy in front of two gpoolers."""

    def __init__(self, postgres: Postgres, gpooler_factory: Factory) -> None:
        self.port = free_port()
        self.metrics_ports = [free_port(), free_port()]
        self.gpoolers = [
            gpooler_factory(
                postgres,
                rule={"application_name_add_host": False, "options": {"search_path": f"pooler{number}"}},
                config={
                    "metrics": {"prometheus_port": port},
                    "service": {"drain_delay_ms": 4000},
                    "database": {"haproxy": {"user": {"haproxy": HEALTH}}},
                },
            )
            for number, port in enumerate(self.metrics_ports)
        ]

    def configuration(self, backend: str) -> str:
        text = (ROOT / "docs/haproxy.cfg").read_text()
        text = text.replace("bind :5432", f"bind 127.0.0.1:{self.port}")
        text = text.replace("maxconn 20000", "maxconn 100")  # each takes two descriptors
        text = text.replace("default_backend gpoolers", f"default_backend {backend}")
        for number, gpooler in enumerate(self.gpoolers):
            address = f"10.0.0.{number + 1}:6432"
            assert address in text
            text = text.replace(
                f"{address} check port 9127", f"{address} check port {self.metrics_ports[number]}"
            )
            text = text.replace(address, f"127.0.0.1:{gpooler.port}")
        return text

    def number(self) -> str:
        """Which gpooler a new client gets to."""
        dsn = {"host": "127.0.0.1", "port": self.port, "user": "trust_user", "dbname": "app"}
        with psycopg.connect(**dsn, autocommit=True) as connection:
            row = connection.execute("SHOW search_path").fetchone()
            assert row is not None
            return str(row[0])


HEALTH = {"authentication": "scram-sha-256", "password": "unused", "storage": "postgres", "pool": "session"}


@contextmanager
def running(proxy: Proxy, backend: str, directory: Path) -> Iterator[None]:
    file = directory / "haproxy.cfg"
    file.write_text(proxy.configuration(backend))
    check = subprocess.run(["haproxy", "-c", "-f", str(file)], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stderr
    with (directory / "haproxy.log").open("wb") as log:
        process = subprocess.Popen(["haproxy", "-db", "-f", str(file)], stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize("backend", ["gpoolers", "gpoolers_by_login"])
def test_clients_go_to_both_and_to_the_other_when_one_is_gone(
    postgres: Postgres, gpooler_factory: Factory, tmp_path: Path, backend: str
) -> None:
    proxy = Proxy(postgres, gpooler_factory)
    with running(proxy, backend, tmp_path):

        def both() -> bool:
            with suppress(psycopg.OperationalError):
                return {proxy.number() for _ in range(4)} == {"pooler0", "pooler1"}
            return False

        eventually(both, within=10)
        if backend == "gpoolers":
            # A drain is seen before it is felt: from SIGTERM on no new client fails.
            first, other = proxy.gpoolers
            first.signal(signal.SIGTERM)
            eventually(lambda: {proxy.number() for _ in range(4)} == {"pooler1"}, within=10)
            eventually(lambda: not first.is_running, within=10)
        else:
            first, other = proxy.gpoolers
            first.signal(signal.SIGINT)
            eventually(lambda: not first.is_running, within=10)

            def only_other() -> bool:
                with suppress(psycopg.OperationalError):
                    return {proxy.number() for _ in range(4)} == {"pooler1"}
                return False

            eventually(only_other, within=10)
        assert "login refused" not in other.log()
        with socket.create_connection(("127.0.0.1", proxy.port)):
            pass


def test_a_query_that_runs_survives_the_drain(
    postgres: Postgres, gpooler_factory: Factory, tmp_path: Path
) -> None:
    proxy = Proxy(postgres, gpooler_factory)
    with running(proxy, "gpoolers", tmp_path):
        dsn = {"host": "127.0.0.1", "port": proxy.port, "user": "trust_user", "dbname": "app"}

        def connection() -> psycopg.Connection | None:
            with suppress(psycopg.OperationalError):
                return psycopg.connect(**dsn, autocommit=True)
            return None

        with eventually(connection, within=10) as client:
            client.execute("BEGIN")
            row = client.execute("SHOW search_path").fetchone()
            assert row is not None
            mine = proxy.gpoolers[int(row[0][-1])]
            mine.signal(signal.SIGTERM)
            eventually(lambda: "draining" in mine.log())
            assert client.execute("SELECT pg_sleep(5), 1").fetchone() == ("", 1)
            client.execute("COMMIT")
        eventually(lambda: not mine.is_running, within=15)
