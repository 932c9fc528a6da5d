"""Exporters that were written for PgBouncer read the console, unchanged."""

import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness import PASSWORD, Gpooler, Postgres, eventually, free_port
from tests.harness.console import CONSOLE

Factory = Callable[..., Gpooler]


@pytest.fixture
def pool(postgres: Postgres, gpooler_factory: Factory) -> Gpooler:
    return gpooler_factory(postgres, rule={"pool_size": 3}, config=CONSOLE)


@contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[Callable[[], dict[str, float]]]:
    """An exporter at a port; gives what reads its metrics."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)

    def metrics() -> dict[str, float]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                lines = answer.read().decode().splitlines()
        except OSError as error:
            raise AssertionError(f"{error}\n{log.read_text()}") from None
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    try:
        eventually(metrics, within=20)
        yield metrics
    finally:
        process.terminate()
        process.wait(20)


def check(pool: Gpooler, metrics: Callable[[], dict[str, float]], names: dict[str, str]) -> None:
    """Values follow what clients do."""
    app, pair = '{database="app"}', '{database="app",user="trust_user"}'
    with pool.connect() as client, pool.raw() as other:
        client.execute("SELECT 1")
        before = metrics()
        other.login()
        other.query("SELECT 2")  # the relay counts a client when it hears of it
        now = metrics()
        assert now[names["clients"] + pair] == before[names["clients"] + pair] + 1 == 2
        assert now[names["queries"] + app] == before[names["queries"] + app] + 1
        assert now[names["received"] + app] > before[names["received"] + app]
        assert [
            value for name, value in now.items() if name.startswith(names["size"]) and '="app"' in name
        ] == [3]


def test_the_exporter_of_debian(pool: Gpooler, program: Callable[[str], str], tmp_path: Path) -> None:
    """It reads columns that PgBouncer had before 1.8: its rule asks for them, by ``options``."""
    port = free_port()
    command = [
        program("prometheus-pgbouncer-exporter"),
        "--host", "127.0.0.1", "--port", str(port), "--pgbouncer-host", pool.host,
        "--pgbouncer-port", str(pool.port), "--pgbouncer-user", "legacy",
    ]  # fmt: skip
    with running(command, port, tmp_path / "log") as metrics:
        names = {
            "clients": "pgbouncer_active_clients",
            "queries": "pgbouncer_requests_total",
            "received": "pgbouncer_received_bytes_total",
            "size": "pgbouncer_pool_size",
        }
        check(pool, metrics, names)
        assert metrics()["pgbouncer_used_servers"] >= 1


def test_the_exporter_of_pypi(pool: Gpooler, tmp_path: Path) -> None:
    port = free_port()
    config = tmp_path / "config.yml"
    config.write_text(
        f"exporter_host: 127.0.0.1\nexporter_port: {port}\npgbouncers:\n"
        f"  - dsn: postgresql://stat:{PASSWORD}@{pool.host}:{pool.port}/pgbouncer\n"
    )
    command = [str(Path(sys.executable).with_name("pgbouncer-exporter")), "--config", str(config)]
    with running(command, port, tmp_path / "log") as metrics:
        names = {
            "clients": "pgbouncer_pools_client_active_connections",
            "queries": "pgbouncer_stats_queries_total",
            "received": "pgbouncer_stats_received_bytes_total",
            "size": "pgbouncer_databases_database_pool_size",
        }
        check(pool, metrics, names)
        assert metrics()["pgbouncer_up"] == 1
