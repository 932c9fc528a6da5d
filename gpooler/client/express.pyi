from collections.abc import Callable

from gpooler.auth.exchange import Stored
from gpooler.client.entrance import Guest
from gpooler.client.login import Login, SetUp
from gpooler.client.plan import Plan
from gpooler.net.tcp import Option
from gpooler.relay.relay import Relay

class Express:
    def __init__(
        self,
        relay: Relay,
        counters_address: int,
        short_address: int,
        handler: Login,
        on_adopted: Callable[[int, Guest, SetUp | None], None],
    ) -> None: ...
    def remember(
        self,
        guest: Guest,
        plan: Plan,
        stored: Stored,
        is_learned_from: bool,
        is_bound_to_address: bool,
        socket_changes: tuple[Option, ...],
    ) -> None: ...
    def forget(self) -> None: ...
    def on_startup(self, guest: Guest, packet: bytes) -> None: ...
    def on_password(self, guest: Guest, body: bytes) -> None: ...
    def on_handshake(self, guest: Guest, data: bytes) -> None: ...
    def on_direct_tls(self, guest: Guest) -> None: ...
    def on_bad(self, guest: Guest, is_startup: bool) -> None: ...
    def on_gone(self, guest: Guest, cause: str) -> None: ...
