"""What is measured. A case runs against a target and returns named numbers."""

import math
import os
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from psycopg.pq import ConnStatus, PGconn

from scripts.benchmark.contenders import PLAIN, POOL_SIZE, Setting, Target
from scripts.benchmark.measure import cpu_us, latencies_us, percentile, pss_bytes
from scripts.benchmark.waits import WorkerWaits
from tests.harness import PASSWORD, Postgres, RawClient, find_program
from tests.harness.client import query
from tests.harness.scrape import Scraper

Numbers = dict[str, float]
CLIENTS_PER_ADDRESS: Final = 5_000  # a source address has some 28,000 ports
RESULT_MB: Final = 1
LOADED_WORKERS: Final = 4
LOADED_CLIENTS: Final = LOADED_WORKERS * 2 * POOL_SIZE
DIRECT: Final = frozenset({"direct"})
OTHERS: Final = frozenset({"direct", "pgbouncer"})
TLS: Final = Setting(has_tls=True)
# The certificate is nobody's matter here.
_TLS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
_TLS.check_hostname = False
_TLS.verify_mode = ssl.CERT_NONE


class Unmeasured(Exception):
    """The target could not do what the case asks; the text says why."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long and how much."""

    seconds: float
    scale: int  # of pgbench's tables
    copies: int


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table."""

    name: str
    run: Callable[[Target, Effort], Numbers]
    setting: Setting = PLAIN
    without: frozenset[str] = frozenset()  # contenders that the case says nothing about


@dataclass(slots=True)
class _Cost:
    """The time and the pooler's CPU between entering and leaving."""

    target: Target
    seconds: float = 0.0
    cpu: float = 0.0
    _began: tuple[float, float] = field(default=(0.0, 0.0))

    def __enter__(self) -> "_Cost":
        self._began = (time.perf_counter(), cpu_us(self.target.pids))
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began[0]
        self.cpu = cpu_us(self.target.pids) - self._began[1] if self.target.pids else math.nan


def prepare(postgres: Postgres, effort: Effort) -> None:
    """Make the tables that the cases read and write."""
    run_program(
        "pgbench", "--initialize", "--quiet", f"--scale={effort.scale}", "--unlogged-tables", postgres.dsn()
    )
    postgres.query(
        "CREATE UNLOGGED TABLE copied (LIKE pgbench_accounts); "
        "GRANT ALL ON ALL TABLES IN SCHEMA public TO PUBLIC; ANALYZE",
        dbname="app",
    )


def run_program(
    name: str,
    *arguments: str,
    timeout: float = 600,
    stdin: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Standard output of a client program; raises Unmeasured when it fails or hangs.

    ``environment`` is added to our own.
    """
    command = [find_program(name), *arguments]
    with ExitStack() as stack:
        source = stack.enter_context(stdin.open("rb")) if stdin else subprocess.DEVNULL
        try:
            done = subprocess.run(
                command,
                stdin=source,
                capture_output=True,
                timeout=timeout,
                check=False,
                env={**os.environ, **(environment or {})},
            )
        except subprocess.TimeoutExpired:
            raise Unmeasured(f"{name} hung") from None
    if done.returncode:
        raise Unmeasured(f"{name}: {done.stderr.decode(errors='replace').strip()[-300:]}")
    return done.stdout.decode(errors="replace")


def pgbench(target: Target, effort: Effort, clients: int, *options: str, sampled: float = 0.1) -> Numbers:
    """Run pgbench after a short warm-up: tps, latencies, the pooler's CPU a transaction."""
    common = ["--no-vacuum", f"--client={clients}", f"--jobs={min(clients, 2)}", *options, target.dsn]
    patience = effort.seconds + 20
    run_program("pgbench", "--time=1", *common, timeout=patience)
    with tempfile.TemporaryDirectory(prefix="gpooler-bench-log-") as directory:
        log = ["--log", f"--log-prefix={directory}/pgbench_log", f"--sampling-rate={sampled}"]
        messages = target.broker_messages()
        with _Cost(target) as cost:
            output = run_program("pgbench", f"--time={effort.seconds:g}", *log, *common, timeout=patience)
        latencies = latencies_us(Path(directory))
    lines = output.splitlines()
    done = next(int(line.split(":")[1].split("/")[0]) for line in lines if "actually processed" in line)
    tps = next(float(line.split("=")[1].split()[0]) for line in lines if line.startswith("tps ="))
    numbers = {
        "tps": tps,
        "p50_us": percentile(latencies, 0.5),
        "p99_us": percentile(latencies, 0.99),
        "cpu_us_per_tx": cost.cpu / done,
    }
    after = target.broker_messages()
    if messages is not None and after is not None:
        numbers["broker_messages_per_1000_tx"] = (after - messages) * 1000 / done
    return numbers


def selects(mode: str, clients: int, setting: Setting = PLAIN) -> Case:
    """Select-only transactions in one of pgbench's protocol modes."""
    return Case(
        f"{'tls' if setting.has_tls else 'select'}-{mode}-{clients}",
        lambda target, effort: pgbench(target, effort, clients, "--select-only", f"--protocol={mode}"),
        setting,
        DIRECT if setting.has_tls else frozenset(),
    )


def tpcb(target: Target, effort: Effort) -> Numbers:
    """Seven statements a transaction, on rows that clients fight for."""
    return pgbench(target, effort, 50, sampled=1.0)


def differing(clients: int) -> Case:
    """Clients of four applications, each with its own name and time zone, in one pool."""

    def run(target: Target, effort: Effort) -> Numbers:
        zones = ("UTC", "Europe/Paris", "Asia/Tokyo", "America/Lima")
        with ThreadPoolExecutor(len(zones)) as pool:

            def each(seconds: float) -> list[str]:
                options = ["--no-vacuum", f"--client={clients // len(zones)}", "--jobs=1", "--select-only"]
                runs = [
                    pool.submit(
                        run_program,
                        "pgbench",
                        *options,
                        f"--time={seconds:g}",
                        f"{target.dsn} application_name=app{number}",
                        environment={"PGTZ": zone},
                    )
                    for number, zone in enumerate(zones)
                ]
                return [line for one in runs for line in one.result().splitlines()]

            each(1)
            with _Cost(target) as cost:
                lines = each(effort.seconds)
        done = sum(int(line.split(":")[1].split("/")[0]) for line in lines if "actually processed" in line)
        return {"tps": done / cost.seconds, "cpu_us_per_tx": cost.cpu / done}

    return Case(f"params-{clients}", run, without=DIRECT)


def two_workers(target: Target, effort: Effort) -> Numbers:
    """Fewer clients than servers: how often do workers have to ask the broker?"""
    return pgbench(target, effort, 16, "--select-only")


def loaded(workers: int) -> Case:
    """Every one of four workers has twice as many clients as servers; or one worker has them all."""

    def run(target: Target, effort: Effort) -> Numbers:
        with WorkerWaits(target.worker_counters()) as waits:
            numbers = pgbench(target, effort, LOADED_CLIENTS, "--select-only")
        return {**numbers, **waits.numbers()}

    return Case(f"loaded-{workers}", run, Setting(workers=workers), OTHERS)


def fair(target: Target, effort: Effort) -> Numbers:
    """The same on servers whose work takes no CPU, so that waits are the pooler's doing."""
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
        script.write("SELECT pg_sleep(0.005);\n")
        script.flush()
        with WorkerWaits(target.worker_counters()) as waits:
            pgbench(target, effort, LOADED_CLIENTS, f"--file={script.name}")
    return waits.numbers()


def measured(metrics: bool) -> Case:
    """With all metrics on, a report and a scrape each second; or with none."""

    def run(target: Target, effort: Effort) -> Numbers:
        with Scraping(target.metrics_port) if metrics else nullcontext():
            return pgbench(target, effort, 16, "--select-only")

    name = "metrics-on" if metrics else "metrics-off"
    return Case(name, run, Setting(metrics=metrics), OTHERS)


def scraped(is_scraped: bool) -> Case:
    """What a scrape of 200 routes each second does to transactions; or what they are like without."""
    setting = Setting(metrics=True, routes=200)

    def run(target: Target, effort: Effort) -> Numbers:
        for number in range(setting.routes):
            with RawClient(target.port) as client:
                client.login(target.user, f"route_{number}").query("SELECT 1")
        with Scraping(target.metrics_port) if is_scraped else nullcontext():
            return pgbench(target, effort, 16, "--select-only", sampled=1.0)

    return Case(f"{'scraped' if is_scraped else 'routes'}-200", run, setting, OTHERS)


def listed(is_shown: bool) -> Case:
    """What a look at 10,000 idle clients each second does to transactions; or what they are like without."""
    count = 10_000

    def run(target: Target, effort: Effort) -> Numbers:
        with ExitStack() as stack:
            for number in range(count):
                stack.enter_context(login(target, f"127.0.0.{2 + number // CLIENTS_PER_ADDRESS}"))
            with Looking(target) if is_shown else nullcontext():
                return pgbench(target, effort, 16, "--select-only", sampled=1.0)

    return Case(f"{'shown' if is_shown else 'clients'}-{count}", run, Setting(has_console=True), OTHERS)


class Every:
    """Something once a second, in a thread. A context manager."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(1):
            self._act()


READY: Final = b"Z\0\0\0\5I"  # ReadyForQuery, which ends an answer


class Looking(Every):
    """SHOW CLIENTS; what comes is thrown away, as reading it costs more than sending it."""

    def __init__(self, target: Target) -> None:
        client = RawClient(target.port, timeout=30).login("admin", "pgbouncer")

        def look() -> None:
            client.send(query("SHOW CLIENTS"))
            end = b""
            while not end.endswith(READY):
                end = (end + client.socket.recv(1 << 20))[-len(READY) :]

        super().__init__(look)


class Scraping(Every):
    """Prometheus."""

    def __init__(self, port: int) -> None:
        scraper = Scraper(port)
        super().__init__(lambda: scraper.get("/metrics"))


def churn(target: Target, effort: Effort) -> Numbers:
    """A connection for every transaction."""
    return pgbench(target, effort, 8, "--select-only", "--connect", sampled=1.0)


def _logins(target: Target, effort: Effort, once: Callable[[], None]) -> Numbers:
    """Nothing but logins, one after the other; the first does not count."""
    once()
    count = 0
    with _Cost(target) as cost:
        end = time.monotonic() + effort.seconds
        while time.monotonic() < end:
            once()
            count += 1
    return {"logins_per_s": count / cost.seconds, "cpu_us_per_login": cost.cpu / count}


def logins(target: Target, effort: Effort) -> Numbers:
    """By a client that costs little itself."""
    return _logins(target, effort, lambda: login(target).terminate())


def driver_logins(target: Target, effort: Effort) -> Numbers:
    """By libpq, which does SCRAM with channel binding."""
    dsn = target.dsn.encode()

    def once() -> None:
        connection = PGconn.connect(dsn)
        if connection.status != ConnStatus.OK:
            raise Unmeasured(connection.get_error_message())
        connection.finish()

    return _logins(target, effort, once)


def login(target: Target, source: str | None = None) -> RawClient:
    """A client that has logged in."""
    client = RawClient(target.port, timeout=30, source=source)
    if target.has_tls:
        client.start_tls(_TLS)
    return client.login(target.user, password=PASSWORD)


def results(target: Target, effort: Effort) -> Numbers:
    """Rows of one megabyte, made without work for PostgreSQL."""
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
        script.write(f"SELECT repeat('x', {RESULT_MB << 20});\n")
        script.flush()
        numbers = pgbench(target, effort, 4, f"--file={script.name}", sampled=1.0)
    return {
        "mb_per_s": numbers["tps"] * RESULT_MB,
        "cpu_us_per_mb": numbers["cpu_us_per_tx"] / RESULT_MB,
        "p99_us": numbers["p99_us"],
    }


def copy_out(target: Target, effort: Effort) -> Numbers:
    """The accounts table to the client, about 97 bytes a row."""
    command = ["COPY pgbench_accounts TO STDOUT"] * effort.copies
    with tempfile.NamedTemporaryFile() as file, _Cost(target) as cost:
        for statement in command:
            run_program("psql", "-Xqc", statement, "-o", file.name, target.dsn)
        size = Path(file.name).stat().st_size
    return _volume(size * effort.copies, cost)


def copy_in(target: Target, effort: Effort) -> Numbers:
    """The same rows back, into a table without an index."""
    with tempfile.NamedTemporaryFile() as file:
        run_program("psql", "-Xqc", "COPY pgbench_accounts TO STDOUT", "-o", file.name, target.dsn)
        size = Path(file.name).stat().st_size
        with _Cost(target) as cost:
            for _ in range(effort.copies):
                run_program("psql", "-Xqc", "COPY copied FROM STDIN", target.dsn, stdin=Path(file.name))
    run_program("psql", "-Xqc", "TRUNCATE copied", target.dsn)
    return _volume(size * effort.copies, cost)


def _volume(size: int, cost: _Cost) -> Numbers:
    megabytes = size / (1 << 20)
    return {"mb_per_s": megabytes / cost.seconds, "cpu_us_per_mb": cost.cpu / megabytes}


def idle(count: int, setting: Setting = PLAIN) -> Case:
    """Memory of clients that have logged in, run one query and do nothing."""

    def run(target: Target, effort: Effort) -> Numbers:
        with ExitStack() as stack:
            # whatever a pooler makes at first use is not to count
            first = [stack.enter_context(login(target)) for _ in range(50)]
            for client in first:
                client.query("SELECT 1")
            before = pss_bytes(target.pids)
            for number in range(count):
                source = f"127.0.0.{2 + number // CLIENTS_PER_ADDRESS}"
                stack.enter_context(login(target, source)).query("SELECT 1")
            return {"bytes_per_client": (pss_bytes(target.pids) - before) / count}

    name = f"{'tls-' if setting.has_tls else ''}idle-{count}"
    return Case(name, run, setting, DIRECT)


CASES: Final = (
    *(selects(mode, clients) for mode in ("simple", "extended", "prepared") for clients in (1, 16, 100)),
    differing(16),
    differing(100),
    Case("tpcb-50", tpcb),
    Case("two-workers-16", two_workers, Setting(workers=2), OTHERS),
    loaded(1),
    loaded(LOADED_WORKERS),
    Case("fair-4", fair, Setting(workers=LOADED_WORKERS), OTHERS),
    measured(False),
    measured(True),
    scraped(False),
    scraped(True),
    listed(False),
    listed(True),
    Case("churn-md5", churn, Setting("md5")),
    Case("login-md5", logins, Setting("md5")),
    Case("login-scram", driver_logins, Setting("scram-sha-256"), DIRECT),
    Case("tls-login-scram", driver_logins, Setting("scram-sha-256", has_tls=True), DIRECT),
    Case("result-1mb", results),
    Case("copy-out", copy_out),
    Case("copy-in", copy_in),
    *(selects("simple", clients, TLS) for clients in (1, 16, 100)),
    Case("tls-result-1mb", results, TLS, DIRECT),
    Case("tls-copy-out", copy_out, TLS, DIRECT),
    idle(2_000),
    idle(10_000),
    idle(2_000, TLS),
)
