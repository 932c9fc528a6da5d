"""The clients of the console in one worker: taken over from the login, never the relay's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import gevent
import gevent.socket

from gpooler import __version__
from gpooler.client.entrance import Guest
from gpooler.client.plan import Plan
from gpooler.clock import monotonic_us
from gpooler.config.model import Config, Role, Rule
from gpooler.config.words import StorageType
from gpooler.console.acts import Acts
from gpooler.console.answers import Answers, Views
from gpooler.console.session import Session, SessionEnd
from gpooler.console.settings import Settings
from gpooler.errors import ConsoleIsNoServer, ConsoleNotAllowed, TooManyConnections
from gpooler.log import LogContext, Logger
from gpooler.net.tls import Stream
from gpooler.stats.registry import ProcessWord
from gpooler.stats.shared import SharedCounters

SESSIONS_MOST: Final = 256  # of a worker; each has a greenlet, which the other clients have not
END_S: Final = 1.0  # a client that does not read its last message has this long


@dataclass(slots=True, eq=False)
class _Client:
    """One that is connected (``sources.ConsoleClient``)."""

    who: LogContext
    born_us: int
    tls: str
    number: int
    settings: Settings
    session: Session
    socket: gevent.socket.socket
    greenlet: gevent.Greenlet | None = None

    @property
    def application_name(self) -> str:
        """As it calls itself."""
        return self.settings.application_name


class ConsoleClients:
    """Those of one worker."""

    def __init__(
        self, config: Callable[[], Config], counters: SharedCounters, views: Views, acts: Acts, logger: Logger
    ) -> None:
        self._config = config
        self._counters = counters
        self._views = views
        self._acts = acts
        self._logger = logger
        self._clients: dict[int, _Client] = {}

    @property
    def all(self) -> Sequence[_Client]:
        """Those that are connected."""
        return list(self._clients.values())

    def takes(self, rule: Rule) -> bool:
        """Whether a rule leads to the console."""
        storage = self._config().storage.get(rule.storage)
        return storage is not None and storage.type is StorageType.LOCAL

    def _role(self, name: str) -> Role:
        """Of a rule as it is now; of one that is there no more, none."""
        rule = next((rule for rule in self._config().rules if rule.name == name), None)
        return Role.NOTALLOW if rule is None else rule.role or Role.STAT

    def take(self, guest: Guest, plan: Plan, greeting: bytes) -> None:
        """Go on with a client that has proved who it is; ``greeting`` is AuthenticationOk.

        Raises ClientFault, TooManyConnections.
        """
        rule, packet = plan.rule, plan.packet
        assert rule is not None
        role = self._role(rule.name)
        if role is Role.NOTALLOW:
            raise ConsoleNotAllowed(packet.user)
        if packet.replication:
            raise ConsoleIsNoServer
        if len(self._clients) >= SESSIONS_MOST:
            raise TooManyConnections(f"a worker serves {SESSIONS_MOST} clients of the console")
        number = next(number for number in range(SESSIONS_MOST) if number not in self._clients)
        who = guest.who
        startup = {**packet.parameters, **rule.options}
        settings = Settings(__version__, role is Role.ADMIN, packet.user, startup)
        name = rule.name
        answers = Answers(self._views, self._acts, settings, lambda: self._role(name), who, __version__)
        tls = "" if guest.tls is None else str(guest.tls.facts)
        pending, session_tls = guest.buffer, guest.tls
        sock = gevent.socket.socket(fileno=guest.detach())
        stream = Stream(sock, session_tls)
        shown_id = who.client if rule.client_show_id else None
        session = Session(stream, pending, answers, settings, who, self._logger, shown_id)
        client = _Client(who, monotonic_us(), tls, number, settings, session, sock)
        self._clients[number] = client
        self._counters.set_process(ProcessWord.CONSOLES, len(self._clients))
        self._counters.add_process(ProcessWord.LOGINS)
        client.greenlet = gevent.spawn(self._run, client, greeting)

    def _run(self, client: _Client, greeting: bytes) -> None:
        is_logged = self._config().logging.log_session
        if is_logged:
            self._logger.info("client connected to the console", context="startup", who=client.who)
        how = "shutdown"
        try:
            how = client.session.run(greeting)
        finally:
            client.socket.close()
            del self._clients[client.number]
            self._counters.set_process(ProcessWord.CONSOLES, len(self._clients))
            if is_logged:
                self._logger.info(
                    f"client of the console disconnected: {how}", context="main", who=client.who
                )

    def close(self) -> None:
        """The worker ends: tell everybody. Yields."""
        greenlets = [client.greenlet for client in self.all]
        gevent.killall(greenlets, exception=SessionEnd, block=False)
        gevent.joinall(greenlets, timeout=END_S)
