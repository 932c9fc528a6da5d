"""A whole worker without servers, in this process: its hub is turned by hand, the broker answers at once."""

import select
import socket
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import gevent
from gevent import get_hub
from gevent.monkey import get_original

from gpooler.auth import md5
from gpooler.auth.failures import Failures, FailureTable
from gpooler.auth.scram import Verifier
from gpooler.broker.client import OpenedRoute
from gpooler.config.load import load_text
from gpooler.config.model import Config, Rule
from gpooler.log import LogSettings
from gpooler.logs.direct import DirectLog
from gpooler.net.listen import Listener
from gpooler.net.tls import prepare
from gpooler.process.context import WorkerContext
from gpooler.process.worker import Worker
from gpooler.routing.route import Route
from gpooler.stats.registry import ProcessWord, RouteWord
from gpooler.stats.shared import SharedCounters
from gpooler.wire.messages import startup_message
from tests.fuzz.secure import write_files

SECRET = "6e1dd5b1f0c94d0a8f0bb22a"  # no input says it by chance
TRUSTED = ("trusted", "session")
USERS = (*TRUSTED, "clear", "md5", "hash", "scram", "verifier", "member", "blocked", "limited", "stranger")
RULES: dict[str, dict[str, object]] = {
    "trusted": {"authentication": "none"},
    "session": {"authentication": "none", "pool": "session"},
    "clear": {"authentication": "clear_text", "password": SECRET},
    "md5": {"authentication": "md5", "password": SECRET},
    "hash": {"authentication": "md5", "password": md5.hash_password(SECRET.encode(), b"hash").decode()},
    "scram": {"authentication": "scram-sha-256", "password": SECRET},
    "verifier": {"authentication": "md5", "password": Verifier.build(SECRET.encode(), bytes(16), 1).format()},
    "member": {"authentication": "cert"},
    "blocked": {"authentication": "block"},
    "limited": {"authentication": "md5", "password": SECRET, "client_max": 1},
}
PARAMETERS = {"client_encoding": "UTF8", "server_version": "15.4", "TimeZone": "UTC"}
STRICT = "auth_failure_max = 2\nauth_failure_delay_ms = 1\nclient_max = 3"
MAX_FREE_CHUNKS = 256  # relay/io.pxd
PATIENCE_S = 5.0
KEY = bytes(range(32))


def configuration(directory: Path, limits: str) -> str:
    """Two listeners, with TLS and a Unix socket, and a rule for each way to log in."""
    tls = "".join(f'{name} = "{path}"\n' for name, path in write_files(directory).items())
    text = f"""
        [service]
        unix_socket_dir = "{directory}"
        unix_socket_mode = "0700"
        [logging]
        log_format = "%m"
        [limits]
        {limits}
        [[listen]]
        host = "127.0.0.1"
        port = 6432
        tls = "allow"
        {tls}
        [[listen]]
        port = 6432
        [storage.nowhere]
        type = "remote"
        host = "127.0.0.1"
        port = 1
    """
    for user, rule in RULES.items():
        text += f'[database.app.user.{user}]\nstorage = "nowhere"\n'
        text += "".join(f"{name} = {str(value) if value == 1 else repr(value)}\n" for name, value in
                        {"pool": "transaction", **rule}.items())  # fmt: skip
    return text


def note_error(context: object, kind: type[BaseException], error: BaseException, at: object) -> None:
    """Nothing may be raised in the hub."""
    ERRORS.append(error)


ERRORS: list[BaseException] = []
get_hub().handle_error = note_error


class House:
    """One worker; ``limits`` are those of its configuration."""

    def __init__(self, limits: str = "") -> None:
        with TemporaryDirectory() as directory:
            config = load_text(configuration(Path(directory), limits)).config
            prepare(config)
            tcp = socket.create_server(("127.0.0.1", 0), backlog=64)
            unix = socket.socket(socket.AF_UNIX)
            unix.bind("")  # an address without a file
            unix.listen(64)
            for listener in (tcp, unix):
                listener.setblocking(False)
            self.lines: list[str] = []
            self.worker = Worker(self._context(config, tcp, unix), self._log())
        self._limits = config.limits
        self._listeners = {False: tcp, True: unix}
        self._route_ids: dict[tuple[object, ...], int] = {}
        self.worker._broker.open_route = self._open_route
        self.login = self.worker._clients.login
        self.login._routes = self
        self._opened: set[tuple[str, str, str, bool]] = set()
        get_original("_thread", "start_new_thread")(self.worker._relay.run, ())
        self.worker._clients.start()
        self._entrance = self.worker._clients._entrance
        self._is_full = False

    def fill_pool(self) -> None:
        """The relay keeps what held bytes sent ahead, up to a limit: have it reached, once."""
        if self._is_full:
            return
        self._is_full = True
        self.begin(is_draining=False)
        for _ in range(MAX_FREE_CHUNKS):
            client = self.connect(is_unix=True)
            client.send(startup_message({"user": TRUSTED[0], "database": "app"}) + b"p")
            self.turn()
            client.close()
            self.end()

    def _context(self, config: Config, tcp: socket.socket, unix: socket.socket) -> WorkerContext:
        self._counters = SharedCounters.create()
        return WorkerContext(
            config=config,
            worker=1,
            workers=1,
            incarnation=1,
            control=tcp,  # nobody speaks there
            past=SharedCounters.create(),
            listeners=(Listener(0, tcp, "127.0.0.1", 0), Listener(1, unix, "", 0, is_unix=True)),
            counters=self._counters,
            log=LogSettings(""),
            is_debug=False,
            failures=FailureTable(1),
            mock_key=KEY,
        )

    def _log(self) -> DirectLog:
        log = DirectLog(LogSettings("%l %m (%u, %d)", is_stdout=False, is_debug=True), [])
        log.logger._write = lambda level, line: self.lines.append(line)
        return log

    def _open_route(self, *key: object) -> OpenedRoute:
        return OpenedRoute(self._route_ids.setdefault(key, len(self._route_ids)), PARAMETERS)

    # in place of the worker, as ``client.login.Routes``: whom nobody has named since the beginning is new

    def known(self, rule: Rule, database: str, user: str, is_replication: bool) -> Route | None:
        """The route of a client, None when it is new."""
        is_new = (rule.name, database, user, is_replication) not in self._opened
        return None if is_new else self.worker.known(rule, database, user, is_replication)

    def open(self, rule: Rule, database: str, user: str, is_replication: bool) -> Route:
        """The same. Yields."""
        gevent.sleep(0)
        self._opened.add((rule.name, database, user, is_replication))
        return self.worker.open(rule, database, user, is_replication)

    def begin(self, is_draining: bool) -> None:
        """As if nobody had been here."""
        self.lines.clear()
        self._opened.clear()
        self.login._look_anew()  # whatever was found out about packets is forgotten
        self.login.is_draining = is_draining
        self.login._refusals._failures = Failures(self._limits, FailureTable(1), 1, KEY)

    def connect(self, is_unix: bool) -> socket.socket:
        """A client's socket, which never blocks."""
        listener = self._listeners[is_unix]
        client = socket.socket(listener.family)
        client.connect(listener.getsockname())
        client.setblocking(False)
        return client

    def turn(self) -> None:
        """Let the worker do what there is to do."""
        gevent.idle()
        gevent.idle()
        self.worker._on_relay()
        assert not ERRORS, "".join(traceback.format_exception(ERRORS[0]))

    def expire(self) -> None:
        """The time for all logins is over."""
        for guest in self._entrance.expired(1 << 40):
            self.login.expire(guest)

    def left_over(self) -> str:
        """What is still there of clients; empty when they have left nothing."""
        routes = self._route_ids.values()
        left = {
            "guests": len(self._entrance),
            "kept back": len(self.login._refusals._kept_back),
            "clients": self._counters.process(ProcessWord.CLIENTS),
            "admitted": sum(self._counters.route(route, RouteWord.CLIENTS_ADMITTED) for route in routes),
            "at the relay": sum(self._counters.route(route, RouteWord.CLIENTS) for route in routes),
            "set up": len(self.worker._clients._setups),
            "cancels": len(self.worker._cancels._replies),
        }
        return ", ".join(f"{count} {what}" for what, count in left.items() if count)

    def end(self) -> None:
        """All clients have closed: nothing of them must be left, and nothing secret have been logged."""
        deadline = monotonic() + PATIENCE_S
        while self.left_over():
            assert monotonic() < deadline, f"left over: {self.left_over()}"
            select.select([self.worker._relay.event_fd], [], [], 0.001)
            self.turn()
        self.expire()
        for line in self.lines:
            assert "Traceback" not in line, line
            assert SECRET not in line, line
