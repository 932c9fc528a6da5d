"""What a relay must know of the configuration, as it takes it."""

from typing import Any, Final

from gpooler.client.clients import virtual_answers, wait_notices
from gpooler.config.model import Config
from gpooler.config.words import SessionState, SessionStateCheck
from gpooler.routing.route import SMART_DISCARD, Route
from gpooler.wire.text import encode

# as the relay counts them (relay/engine.pxd: StateMode, CheckMode)
STATE_MODES: Final = {mode: number for number, mode in enumerate(SessionState)}
CHECK_MODES: Final = {mode: number for number, mode in enumerate(SessionStateCheck)}


def has_quiet_ends(config: Config) -> bool:
    """Whether the end of a client may be told late: nobody waits for the place where it is not limited."""
    return not (config.limits.client_max or any(rule.client_max for rule in config.served))


def route_options(config: Config, route: Route) -> dict[str, Any]:
    """The arguments of ``Relay.open_route`` beside the id."""
    rule = route.rule
    return {
        "mode": route.mode,
        "is_dedicated": route.is_replication,
        "discard": route.is_discarded,
        "can_cancel": rule.pool_cancel,
        "can_rollback": rule.pool_rollback,
        "attach_check": rule.pool_attach_check,
        "maintain_params": rule.maintain_params and not route.is_replication,
        "adds_host": rule.maintain_params and rule.application_name_add_host and not route.is_replication,
        "defers_begin": config.routing.virtual_transaction,
        "has_prepared": rule.pool_reserve_prepared_statement,
        "max_copies": rule.max_prepared_statements,
        "max_names_bytes": rule.max_client_prepared_bytes,
        "session_state": STATE_MODES[rule.session_state],
        "pin_on_listen": rule.pool_pin_on_listen,
        "state_check": CHECK_MODES[rule.session_state_check],
        "log_query": rule.log_query or config.logging.log_query,
        "log_slow_ms": slow_ms(config, route),
        "pool_timeout_ms": rule.pool_timeout,
        "pool_ttl_s": rule.pool_ttl,
        "reset_timeout_ms": rule.pool_reset_timeout_ms,
        "login_timeout_ms": login_timeout_ms(config),
        "keep": 0,
        "discard_query": encode(route.discard_query),
        "keeps_copies": route.discard_query == SMART_DISCARD,
        "resets_parameters": rule.pool_discard_query is None,
        "drops_old_plans": rule.server_drop_on_cached_plan_error,
        "idle_timeout_s": route.idle_timeout_s,
        "idle_in_transaction_s": rule.pool_idle_in_transaction_timeout,
        "query_timeout_s": rule.query_timeout,
        "transaction_timeout_s": rule.transaction_timeout,
        "notice_after_ms": rule.pool_notice_after_waiting_ms,
        "notices": wait_notices(),
        "virtual_answers": virtual_answers()
        if config.routing.virtual_processing and not route.is_replication
        else (),
    }


def login_timeout_ms(config: Config) -> int:
    """After which an unfinished message of a client counts as its end."""
    return max(listen.client_login_timeout for listen in config.listen)


def slow_ms(config: Config, route: Route) -> int:
    """Requests that take so long are logged; 0 for none. A replication connection has none that ends."""
    if route.is_replication:
        return 0
    own = route.rule.log_slow_ms
    return config.logging.log_slow_ms if own is None else own
