"""gpooler as a user runs it: the command, a configuration file, a port, its processes and its log."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final

import psutil
import psycopg
import toml

from gpooler.process.context import Phase
from gpooler.stats.registry import ProcessWord, RouteWord
from gpooler.stats.shared import SharedCounters
from tests.harness.client import SSL_REQUEST, RawClient
from tests.harness.dirt import busy_servers, dirty_servers
from tests.harness.forkserver import Forked, fork_server
from tests.harness.postgres import PASSWORD, Postgres
from tests.harness.tools import eventually, free_port

STOP_TIMEOUT_S: Final = 15
# Descriptors a worker may open after it is ready and keep: parked servers, resolver, thread pool, log.
DESCRIPTOR_SLACK: Final = 16

REAL_VARIABLE: Final = "GPOOLER_REAL_COMMAND"

Config = Mapping[str, Any]


def merge(base: Config, change: Config) -> dict[str, Any]:
    """``base`` with ``change`` laid over it, table by table; None takes a key away."""
    result = dict(base)
    for key, value in change.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merge(result[key], value)
        elif value is None:
            result.pop(key, None)
        else:
            result[key] = value
    return result


def basic_config(postgres: Postgres, port: int, rule: Config) -> dict[str, Any]:
    """One worker, one listener, one storage, and one rule for every user of every database."""
    default_rule = {
        "authentication": "none",
        "storage": "postgres",
        "storage_db": "app",
        "storage_user": "trust_user",
        "pool": "transaction",
        "pool_size": 20,
    }
    return {
        "service": {
            "graceful_shutdown_timeout_ms": 5000,
            "conn_drop_options": {"rate": 1000, "interval_ms": 10},
        },
        "logging": {"log_format": "%p %t %e %l [%i %s] (%c) %m", "log_to_stdout": True},
        "performance": {"workers": 1},
        # BEGIN takes a server at once: that is how tests keep one
        "routing": {"virtual_transaction": False},
        "listen": [{"host": "127.0.0.1", "port": port}],
        "storage": {"postgres": {"type": "remote", "host": postgres.host, "port": postgres.port}},
        "database": {"default": {"user": {"default": merge(default_rule, rule)}}},
    }


class Gpooler:
    """One running gpooler; made by the fixture ``gpooler_factory``, or used as a context manager.

    ``config`` is laid over basic_config(), ``rule`` over its only rule, ``listener`` over its listener;
    ``text`` is a whole configuration file instead, where ``{port}`` stands for the port. ``environment`` is
    added to our own. Without one it is started by a fork (``forkserver.py``), unless REAL_VARIABLE is set.
    """

    def __init__(
        self,
        postgres: Postgres | None = None,
        *,
        rule: Config | None = None,
        listener: Config | None = None,
        config: Config | None = None,
        text: str | None = None,
        environment: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        self.host = "127.0.0.1"
        self.port = port or free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="gpooler-test-"))
        self.config_file = self.directory / "config.toml"
        self.log_file = self.directory / "log"
        self._postgres = postgres
        self._environment = {**os.environ, **(environment or {})}
        self._is_forked = environment is None and not os.environ.get(REAL_VARIABLE)
        self._process: Process | None = None
        self._masters: list[Process] = []  # that were replaced
        self._family: dict[int, psutil.Process] = {}  # every process ever seen below the master
        self._descriptors: dict[int, int] = {}
        self.may_be_dirty = ""  # why servers are left as no client should find them, if a test wants it so
        self.used_database = "app"  # the one whose servers dirt() looks at
        if text is None:
            if postgres is None:
                raise TypeError("a Gpooler needs a Postgres, or the text of its configuration")
            basic = basic_config(postgres, self.port, rule or {})
            basic["listen"][0].update(listener or {})
            text = toml.dumps(merge(basic, config or {}))
        else:
            text = text.replace("{port}", str(self.port))
        self._config = toml.loads(text)
        workers = self._config.get("performance", {}).get("workers", "auto")
        self._workers = len(os.sched_getaffinity(0)) if workers == "auto" else int(workers)
        self.config_file.write_text(text)

    # life

    def start(self) -> "Gpooler":
        """Start and wait until every worker accepts and the master knows it."""
        with open(self.log_file, "ab") as log:
            self._process = self._run("run", output=log.fileno())
        try:
            eventually(self._answers, within=20)
            eventually(lambda: self.process_count(ProcessWord.LISTENING) == self._workers, within=20)
            eventually(lambda: self.process_count(ProcessWord.PHASE) >= Phase.SERVING, within=20)
        except AssertionError as error:
            raise AssertionError(f"gpooler does not serve: {error}\n{self.tail()}") from None
        self.processes()
        self._descriptors = self.descriptors()
        return self

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to stop and return the exit status; what lives on is killed and an AssertionError raised."""
        process = self._process
        if process is None:
            raise RuntimeError("gpooler was not started")
        self.processes()
        if process.poll() is None:
            process.send_signal(how)
        try:
            status = process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._kill_all()
            process.wait()
            raise AssertionError(f"gpooler did not stop on {how.name}\n{self.tail()}") from None
        finally:
            self._process = None
        try:
            eventually(lambda: not self._survivors(), within=5)
        except AssertionError:
            names = ", ".join(f"{p.pid} {_title(p)}" for p in self._survivors())
            self._kill_all()
            raise AssertionError(f"processes outlived the master: {names}\n{self.tail()}") from None
        return status

    def destroy(self) -> None:
        """Kill what runs and remove every file."""
        if self._process is not None:
            self.processes()
            self._kill_all()
            self._process.wait()
            self._process = None
        for master in self._masters:
            master.wait(STOP_TIMEOUT_S)
        shutil.rmtree(self.directory)

    def __enter__(self) -> "Gpooler":
        try:
            return self.start()
        except BaseException:
            self.destroy()
            raise

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None and self.is_running:
                self.stop()
        finally:
            self.destroy()

    # use

    def dsn(self, user: str = "trust_user", dbname: str = "app", **parameters: Any) -> str:
        """Connection string for psycopg, psycopg2 and psql."""
        merged = {"host": self.host, "port": self.port, "user": user, "dbname": dbname, "password": PASSWORD}
        return psycopg.conninfo.make_conninfo(**{**merged, **parameters})

    def connect(
        self, user: str = "trust_user", dbname: str = "app", **parameters: Any
    ) -> psycopg.Connection[Any]:
        """A psycopg connection in autocommit mode that prepares nothing by itself."""
        return psycopg.connect(self.dsn(user, dbname, **parameters), autocommit=True, prepare_threshold=None)

    def raw(self, **options: Any) -> RawClient:
        """A hand-made client, connected but not logged in."""
        return RawClient(self.port, self.host, **options)

    def reload(
        self,
        *arguments: str,
        rule: Config | None = None,
        listener: Config | None = None,
        config: Config | None = None,
        is_refused: bool = False,
    ) -> str:
        """Write the configuration with changes as in ``__init__`` and have it read; the answer."""
        self.rewrite(rule=rule, listener=listener, config=config)
        status, text = self._ask("reload", *arguments)
        assert status == is_refused, f"{text}\n{self.tail()}"
        return text

    def rewrite(
        self, *, rule: Config | None = None, listener: Config | None = None, config: Config | None = None
    ) -> None:
        """Write the configuration with changes as in ``__init__``."""
        if rule is not None:
            config = merge({"database": {"default": {"user": {"default": rule}}}}, config or {})
        changed = merge(self._config, config or {})
        if listener is not None:
            changed["listen"] = [merge(changed["listen"][0], listener), *changed["listen"][1:]]
        self._config = changed
        self.config_file.write_text(toml.dumps(changed))

    def restart(self, *, is_refused: bool = False, is_awaited: bool = True) -> str:
        """Ask for an online restart; the answer. With ``is_awaited`` the old master has ended."""
        self.processes()
        status, text = self._ask("restart")
        assert status == is_refused, f"{text}\n{self.tail()}"
        if not is_refused:
            self.adopt(is_awaited=is_awaited)
        return text

    def adopt(self, *, is_awaited: bool = True) -> None:
        """Go on with the master that an online restart has brought."""
        before = self._process
        assert before is not None
        self._masters.append(before)
        self._process = Successor(int(re.findall(r"process (\d+) serves", self.log())[-1]))
        self.processes()
        self._descriptors = {}
        if is_awaited:
            eventually(lambda: before.poll() is not None, within=30)

    # processes

    @property
    def is_running(self) -> bool:
        """Whether the master lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The master's."""
        if self._process is None:
            raise RuntimeError("gpooler does not run")
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the master."""
        os.kill(self.pid, number)

    def processes(self) -> list[psutil.Process]:
        """The master and everything below it, living."""
        try:
            master = psutil.Process(self.pid)
            family = [master, *master.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        self._family.update((process.pid, process) for process in family)
        return [process for process in family if _is_alive(process)]

    def worker_pids(self) -> list[int]:
        """Process ids of the workers, in the order of their numbers."""
        found = []
        for process in self.processes():
            if match := re.match(r"gpooler: worker (\d+)", _title(process)):
                found.append((int(match[1]), process.pid))
        return [pid for _, pid in sorted(found)]

    def broker_pid(self) -> int:
        """Process id of the broker; raises AssertionError while there is none."""
        pids = [process.pid for process in self.processes() if _title(process).startswith("gpooler: broker")]
        assert len(pids) == 1, f"{len(pids)} brokers"
        return pids[0]

    def descriptors(self) -> dict[int, int]:
        """Open file descriptors of every process."""
        found = {}
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                found[process.pid] = process.num_fds()
        return found

    def client_connections(self) -> int:
        """TCP connections to our first port that a worker still has open."""
        count = 0
        for pid in self.worker_pids():
            with suppress(psutil.NoSuchProcess):
                count += sum(
                    bool(connection.laddr.port == self.port and connection.raddr)
                    for connection in psutil.Process(pid).net_connections(kind="tcp")
                )
        return count

    def process_count(self, *words: ProcessWord) -> int:
        """The sum of these words of the process blocks over all workers, dead ones included."""
        return self._sum(lambda counters: sum(counters.process(word) for word in words))

    def route_count(self, word: RouteWord) -> int:
        """The sum of a word of the route blocks over all workers and routes."""
        return self._sum(
            lambda counters: sum(counters.route(route, word) for route in counters.used_routes())
        )

    def worker_counters(self) -> list[SharedCounters]:
        """The counters of each worker that accepts, mapped here; the caller closes them."""
        found = []
        for counters in self._counters():
            if counters.process(ProcessWord.LISTENING):
                found.append(counters)
            else:
                counters.close()
        return found

    # log and leaks

    def log(self) -> str:
        """All it has written to standard output and error."""
        return self.log_file.read_text(errors="replace")

    def tail(self, lines: int = 40) -> str:
        """The end of the log, for messages about failures."""
        return "\n".join(self.log().splitlines()[-lines:])

    def leaks(self, within: float = 5.0) -> list[str]:
        """What a finished test should not have left behind, as sentences; waits that long for it to go."""
        problems = []
        try:
            eventually(lambda: self.client_connections() == 0, within)
        except AssertionError:
            problems.append(f"{self.client_connections()} client connections are still open")
        try:
            eventually(lambda: not self._grown(), within)
        except AssertionError:
            problems += self._grown()
        if "Traceback (most recent call last)" in self.log():
            problems.append("there is a traceback in the log")
        return problems

    def dirt(self, within: float = 5.0) -> list[str]:
        """What clients that are gone have left on servers, as sentences; waits that long for servers to rest.

        Servers are looked at from outside and, in pools of the common rule, as the next client finds them.
        """
        postgres = self._postgres
        if self.may_be_dirty or postgres is None or not postgres.is_running or self.client_connections():
            return []
        try:
            eventually(lambda: not busy_servers(postgres), within)
        except AssertionError:
            return busy_servers(postgres)
        parked = self.route_count(RouteWord.SERVERS_IDLE)
        rule = self._config.get("database", {}).get("default", {}).get("user", {}).get("default")
        if not parked or not isinstance(rule, Mapping):
            return []
        pids = [backend.pid for backend in postgres.activity()]
        allowed = {name.lower() for name in rule.get("options", {})}
        if rule.get("application_name_add_host"):
            allowed.add("application_name")
        return dirty_servers(self, self.used_database, pids, parked, rule["pool"] != "statement", allowed)

    # inside

    def _run(self, *arguments: str, output: int) -> "subprocess.Popen[bytes] | Forked":
        """Start the command with our configuration; what it says goes to the descriptor."""
        line = [*command(), *arguments, "-c", str(self.config_file)]
        if self._is_forked:
            return fork_server().start(line, self._environment, str(self.directory), output)
        return subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=self.directory,
            env=self._environment, start_new_session=True,
        )  # fmt: skip

    def _ask(self, *arguments: str) -> tuple[int, str]:
        """Have the command ask the master for something: its exit status and what it said."""
        with tempfile.TemporaryFile() as said:
            status = self._run(*arguments, "--pid", str(self.pid), output=said.fileno()).wait(90)
            said.seek(0)
            return status, said.read().decode()

    def _grown(self) -> list[str]:
        """The processes with more descriptors than they began with, servers aside, as sentences."""
        servers = len(self._postgres.activity()) if self._postgres else 0
        return [
            f"process {pid} had {before} descriptors and has {count}"
            for pid, count in self.descriptors().items()
            if (before := self._descriptors.get(pid)) is not None
            and count > before + servers + DESCRIPTOR_SLACK
        ]

    def _counters(self) -> Iterator[SharedCounters]:
        """The master's counters that are not folded, seen through its descriptors; the caller closes them."""
        seen = set()
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            try:
                if not os.readlink(link).startswith("/memfd:gpooler-counters"):
                    continue
                fd = os.open(link, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # a child was buried meanwhile
            if not os.fstat(fd).st_size:
                os.close(fd)  # it is just being made
                continue
            counters = SharedCounters.attach(fd)
            inode = os.fstat(fd).st_ino
            if inode in seen or counters.process(ProcessWord.FOLDED):
                counters.close()
            else:
                yield counters
            seen.add(inode)

    def _sum(self, read: Callable[[SharedCounters], int]) -> int:
        """Add up what ``read`` finds in each of the master's counters."""
        total = 0
        for counters in self._counters():
            with closing(counters):
                total += read(counters)
        return total

    def _answers(self) -> bool:
        if not self.is_running:
            raise RuntimeError(f"gpooler did not start:\n{self.log()}")
        try:
            with socket.create_connection((self.host, self.port), 5) as probe:
                probe.sendall(SSL_REQUEST)
                return probe.recv(1) in (b"N", b"S")
        except OSError:
            return False

    def _survivors(self) -> list[psutil.Process]:
        return [process for process in self._family.values() if _is_alive(process)]

    def _kill_all(self) -> None:
        for process in self._survivors():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass


class Successor:
    """A master that another one started; what is needed of subprocess.Popen. Its exit status is not ours."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._process = psutil.Process(pid)

    def poll(self) -> int | None:
        """None while it lives."""
        return None if _is_alive(self._process) else 0

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises subprocess.TimeoutExpired."""
        try:
            self._process.wait(timeout)
        except psutil.TimeoutExpired as error:
            raise subprocess.TimeoutExpired("gpooler", error.seconds) from None
        return 0

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)


Process = subprocess.Popen[bytes] | Forked | Successor


def command() -> list[str]:
    """The installed command of this environment."""
    return [str(Path(sys.executable).with_name("gpooler"))]


def check(text: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run ``gpooler check`` on a configuration text."""
    with tempfile.TemporaryDirectory(prefix="gpooler-check-") as directory:
        file = Path(directory) / "config.toml"
        file.write_text(text)
        return subprocess.run(
            [*command(), "check", "-c", str(file), *options],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
