"""TLS handshakes of clients that are logging in."""

from collections.abc import Callable, Mapping
from typing import Final

import gevent

from gpooler.client.entrance import ClientGone, Guest
from gpooler.client.refusals import Refusals
from gpooler.errors import TlsFailed
from gpooler.log import Logger
from gpooler.net.tls import ALPN, Acceptor, TlsFault, run_heavy
from gpooler.relay.tls import TlsHandshake

SSL: Final = 1  # bits of Guest.requests
GSSENC: Final = 2
DIRECT: Final = 4  # TLS without a request


class Handshakes:
    """Those of one worker."""

    def __init__(self, refusals: Refusals, logger: Logger) -> None:
        self._refusals = refusals
        self._logger = logger
        self._acceptors: Mapping[int, Acceptor] = {}
        self.demanding: set[int] = set()  # numbers of listeners that take nobody without TLS

    def configure(self, acceptors: Mapping[int, Acceptor]) -> None:
        """From now on; by the number of their listener."""
        self._acceptors = acceptors
        self.demanding.clear()
        self.demanding.update(number for number, acceptor in acceptors.items() if acceptor.is_required)

    def is_possible(self, guest: Guest) -> bool:
        """Whether its listener does TLS, and it has none yet."""
        return guest.family != 0 and guest.tls is None and guest.listener in self._acceptors

    def begin(self, guest: Guest) -> None:
        """Expect its handshake."""
        guest.handshake = self._acceptors[guest.listener].begin()
        guest.expect_handshake()

    def go_on(self, guest: Guest, data: bytes) -> None:
        """Bytes of it have come."""
        assert guest.handshake is not None
        guest.handshake.feed(data)
        if guest.handshake.is_heavy:
            gevent.spawn(self._step, guest, guest.handshake, run_heavy)
        else:
            self._step(guest, guest.handshake, None)

    def _step(
        self, guest: Guest, handshake: TlsHandshake, run: Callable[[Callable[[], bool]], bool] | None
    ) -> None:
        """Go on with a handshake; ``run`` calls its step, None for at once."""
        try:
            try:
                is_over = handshake.step() if run is None else run(handshake.step)
            finally:
                if guest.fd >= 0 and (data := handshake.take()):
                    guest.send_handshake(data)
            if guest.fd < 0:
                return
            if not is_over:
                guest.expect_handshake()
            else:
                session = handshake.session()
                if guest.requests & DIRECT and session.facts.alpn != ALPN:
                    raise TlsFault(f'direct TLS without the protocol name "{ALPN.decode()}" (ALPN)')
                guest.secure(session)
                if self._logger.is_debug:
                    self._logger.debug(f"TLS: {session.facts}", context="startup", who=guest.who)
                guest.expect_startup()
        except (TlsFault, ConnectionError) as error:
            self._refusals.end(guest, TlsFailed(cause=str(error)))
        except ClientGone as error:
            self._refusals.end(guest, error)
        else:
            if run is not None:
                guest.resume()
