"""Every table of the console by its name, and those about the configuration and the processes. Pure."""

import platform
from collections.abc import Iterator
from typing import Final

from gpooler.config.listing import options
from gpooler.config.words import Pause
from gpooler.console import tables_sockets, tables_stats
from gpooler.console.facts import View
from gpooler.console.spec import Need, Spec
from gpooler.console.table import Row, columns
from gpooler.stats.registry import ProcessWord

ALL_DATABASES: Final = ""  # in Config.pauses
VERSION: Final = "gpooler {}"
# Bytes that wait in memory for one client at most: from it a chunk; for it one read of its server, what was
# held before, and a chunk for TLS and what gpooler itself has to say (relay/io.pxd: CHUNK, READ_SIZE).
BUFFER_LIMITS: Final = {"client_bytes_held_max": 16_384, "client_bytes_queued_max": 294_912}


def _version(view: View) -> Iterator[Row]:
    yield (VERSION.format(view.version),)


def _version_extended(view: View) -> Iterator[Row]:
    yield (
        VERSION.format(view.version),
        "release",
        platform.python_compiler().split(" ")[0].lower(),
        f"Python {platform.python_version()}",
        platform.machine(),
    )


def _config(view: View) -> Iterator[Row]:
    for option in options(view.config):
        yield option.key, option.value, option.default, "yes" if option.is_changeable else "no"
    for key, limit in BUFFER_LIMITS.items():
        yield key, str(limit), str(limit), "no"
    if view.config.limits.client_max is not None:
        # by the name that exporters know
        yield "max_client_conn", str(view.config.limits.client_max), "100", "yes"


def _listen(view: View) -> Iterator[Row]:
    for listen in view.config.listen:
        yield (
            listen.unix_path or listen.host,
            listen.port,
            listen.tls.value,
            listen.tls_cert_file,
            listen.tls_key_file,
            listen.tls_ca_file,
            listen.tls_protocols,
        )


def _storages(view: View) -> Iterator[Row]:
    for storage in view.config.storage.values():
        endpoint = storage.endpoints[0] if storage.endpoints else None
        yield (
            storage.type.value,
            None if endpoint is None else endpoint.unix_path or endpoint.host,
            None if endpoint is None else endpoint.port,
            storage.tls.value,
            storage.tls_cert_file,
            storage.tls_key_file,
            storage.tls_ca_file,
            storage.tls_protocols,
            storage.name,
        )


def _rules(view: View) -> Iterator[Row]:
    current = set(view.config.rules)
    for rule in (*view.config.served, *view.config.removed):
        yield (
            "<default>" if rule.is_default_database else rule.database,
            f"group {rule.group}" if rule.group else "<default>" if rule.is_default_user else rule.user,
            "<default>" if rule.address is None else str(rule.address),
            rule.connection_type.value,
            "no" if rule in current else "yes",
            rule.name,
            rule.storage,
            rule.pool.value,
            rule.authentication.value,
        )


def _memory(view: View) -> Iterator[Row]:
    names = dict.fromkeys(fact.name for fact in view.memory)
    for name in names:
        facts = [fact for fact in view.memory if fact.name == name]
        size = max(fact.size for fact in facts)
        used, free = sum(fact.used for fact in facts), sum(fact.free for fact in facts)
        yield name, size, used, free, size * (used + free)


def _state(view: View) -> Iterator[Row]:
    pause = view.config.pauses.get(ALL_DATABASES, Pause.NONE)
    for name, found in (("active", Pause.NONE), ("paused", Pause.CLOSE), ("suspended", Pause.KEEP)):
        yield name, "yes" if pause is found else "no"


def _is_paused(view: View) -> Iterator[Row]:
    yield (ALL_DATABASES in view.config.pauses,)


def _dns_hosts(view: View) -> Iterator[Row]:
    seen: dict[str, tuple[int, str]] = {}
    for fact in view.hosts:
        known = seen.get(fact.name)
        if known is None or known[0] < fact.expires_us:
            seen[fact.name] = fact.expires_us, fact.addresses
    for name, (expires_us, addresses) in seen.items():
        yield name, max(0, expires_us - view.now_us) // 1_000_000, addresses


def _none(view: View) -> Iterator[Row]:
    """What gpooler never has."""
    return iter(())


def _bans(view: View) -> Iterator[Row]:
    for fact in view.bans:
        yield fact.address, fact.user, fact.failures, max(0, fact.until_us - view.now_us) // 1000


def _workers(view: View) -> Iterator[Row]:
    for fact in view.workers:
        yield (
            fact.worker,
            fact.pid,
            fact.clients,
            fact.clients_login,
            fact.consoles,
            bool(fact.is_listening),
            fact.rss_bytes,
            fact.broker_sent,
            fact.broker_received,
            fact.lost_log_lines,
        )


def _host_utilization(view: View) -> Iterator[Row]:
    yield tuple(round(value, 2) for value in view.utilization)


def _soft_oom(view: View) -> Iterator[Row]:
    options = view.config.soft_oom
    if options is not None:
        yield (
            options.process,
            options.limit,
            view.process[ProcessWord.SOFT_OOM_USED],
            bool(view.process[ProcessWord.SOFT_OOM_SHORT]),
            view.process[ProcessWord.SOFT_OOM_REFUSED],
            view.process[ProcessWord.SOFT_OOM_SIGNALS],
        )


_TLS: Final = "i: port s: tls tls_cert_file tls_key_file tls_ca_file tls_protocols"

TABLES: Final[dict[str, Spec]] = {
    **tables_stats.TABLES,
    **tables_sockets.TABLES,
    "version": Spec(columns("s: version"), _version),
    "version_extended": Spec(
        columns("s: version build_type compiler compiler_version arch"), _version_extended
    ),
    "config": Spec(columns("s: key value default changeable"), _config),
    "listen": Spec(columns(f"s: host {_TLS}"), _listen),
    "storages": Spec(columns(f"s: type host {_TLS} name"), _storages),
    "rules": Spec(
        columns("s: database user address connection_type obsolete rule storage pool authentication"), _rules
    ),
    "mem": Spec(columns("s: name i: size used free memtotal"), _memory, frozenset({Need.MEMORY})),
    "state": Spec(columns("s: key value"), _state),
    "is_paused": Spec(columns("B: is_paused"), _is_paused),
    "dns_hosts": Spec(columns("s: hostname q: ttl s: addrs"), _dns_hosts, frozenset({Need.HOSTS})),
    "dns_zones": Spec(columns("s: zonename q: serial i: count"), _none),
    "peers": Spec(columns("i: peer_id s: host i: port pool_size"), _none),
    "peer_pools": Spec(
        columns("i: peer_id cl_active_cancel_req cl_waiting_cancel_req sv_active_cancel sv_login"), _none
    ),
    "bans": Spec(columns("s: address user i: failures q: remaining_ms"), _bans, frozenset({Need.BANS})),
    "workers": Spec(
        columns(
            "i: worker pid clients login_clients console_clients B: accepting q: rss_bytes "
            "broker_messages_sent broker_messages_received log_lines_lost"
        ),
        _workers,
        frozenset({Need.WORKERS}),
    ),
    "host_utilization": Spec(columns("f: cpu mem"), _host_utilization, frozenset({Need.UTILIZATION})),
    "soft_oom": Spec(
        columns("s: process q: limit_bytes used_bytes B: is_short q: refused_clients signals"), _soft_oom
    ),
}

HELP: Final = "help"  # a notice, and no table
HELP_TEXT: Final = (
    "SHOW " + " | ".join(sorted([HELP.upper(), *(name.upper() for name in TABLES)])),
    "SHOW … WHERE condition ORDER BY column [DESC], … LIMIT count OFFSET count",
    "PAUSE | RESUME | KILL | RECONNECT | WAIT_CLOSE [database], DISABLE | ENABLE database",
    "KILL_CLIENT id, DROP SERVERS, RELOAD, SUSPEND, SHUTDOWN [WAIT_FOR_SERVERS | WAIT_FOR_CLIENTS]",
    "SET option = value",
)
NAMES: Final = frozenset({*TABLES, HELP})
