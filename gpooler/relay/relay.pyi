from typing import Any

from gpooler.relay.params import ParameterSet
from gpooler.relay.tls import TlsSession

class Relay:
    def __init__(
        self, counters_address: int, worker: int, has_quiet_ends: bool, statement_key: bytes
    ) -> None: ...
    @property
    def event_fd(self) -> int: ...
    def run(self) -> None: ...
    def stop(self) -> None: ...
    def now_us(self) -> int: ...
    def open_route(
        self,
        route_id: int,
        *,
        mode: int,
        is_dedicated: bool = False,
        discard: bool | None,
        can_cancel: bool,
        can_rollback: bool,
        attach_check: bool,
        maintain_params: bool,
        adds_host: bool,
        defers_begin: bool,
        has_prepared: bool,
        max_copies: int,
        max_names_bytes: int,
        session_state: int,
        pin_on_listen: bool,
        state_check: int,
        log_query: bool,
        pool_timeout_ms: int,
        pool_ttl_s: int,
        reset_timeout_ms: int,
        login_timeout_ms: int,
        keep: int,
        discard_query: bytes,
        keeps_copies: bool,
        resets_parameters: bool,
        drops_old_plans: bool,
        idle_timeout_s: int,
        idle_in_transaction_s: int,
        query_timeout_s: int,
        transaction_timeout_s: int,
        notice_after_ms: int,
        notices: tuple[bytes, bytes, bytes],
        virtual_answers: tuple[bytes, ...],
    ) -> None: ...
    def set_keep(self, route_id: int, count: int) -> None: ...
    def adopt_client(
        self,
        fd: int,
        route_id: int,
        client_id: int,
        parameters: ParameterSet,
        *,
        secret: bytes,
        address: bytes,
        family: int,
        port: int,
        names: int,
        needs_setup: bool,
        pending: bytes,
        tls: TlsSession | None = None,
        has_more: bool = False,
    ) -> int: ...
    def reserve_pid(self) -> int: ...
    def adopt_server(
        self,
        fd: int,
        route_id: int,
        server_id: int,
        parameters: ParameterSet,
        initial: ParameterSet,
        *,
        pid: int,
        secret: bytes,
        slot: int,
        generation: int,
        opened_us: int,
        expires_us: int,
        uses: int,
        is_unix: bool,
        is_new: bool,
        client: int = 0,
        tls: TlsSession | None = None,
    ) -> int: ...
    def start_client(self, handle: int, greeting: bytes, pid: int, secret: bytes) -> None: ...
    def inject(self, handle: int, data: bytes, close_after: bool, reason: int = 0) -> None: ...
    def begin_cancel(self, pid: int, secret: bytes) -> int: ...
    def end_cancel(self, handle: int) -> None: ...
    def recall(self, route_id: int, count: int, is_eviction: bool) -> int: ...
    def forget_recalls(self) -> None: ...
    def drop_idle(self, count: int) -> int: ...
    def connect_failed(self, route_id: int, error: bytes, only_setup: bool) -> None: ...
    def kill_client(self, handle: int, reason: int) -> None: ...
    def close_server(self, handle: int, reason: int) -> None: ...
    def poll(self) -> list[tuple[str, int, Any]]: ...
    def texts(self) -> list[tuple[int, bytes]]: ...
    def client(self, handle: int) -> dict[str, Any]: ...
    def client_parameters(self, handle: int) -> ParameterSet: ...
    def server(self, handle: int) -> dict[str, Any]: ...
    def server_parameters(self, handle: int) -> tuple[ParameterSet, ParameterSet]: ...
    def free_client(self, handle: int) -> tuple[int, int, int, int, int, bytes, int, int]: ...
    def free_server(self, handle: int) -> None: ...
