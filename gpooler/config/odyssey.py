"""Odyssey's options, what each is called here and what becomes of it (``docs/options.md``)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from gpooler.config.field import REMOVE_IT, About, Status
from gpooler.config.options import TABLE, Option, tables

OPTIONS: Final = Path("docs/options.md")
RULE: Final = "database.NAME.user.NAME"
REMOVE_SECTION: Final = "remove the section"

# What Odyssey has at the top level stands in these sections here.
GLOBAL: Final = ("service", "logging", "performance", "limits", "metrics", "routing")

# Section there → the sections here, and its options.
NAMES: Final[Mapping[str, tuple[tuple[str, ...], str]]] = {
    "": (
        GLOBAL,
        """daemonize priority pid_file locks_dir unix_socket_dir unix_socket_mode enable_online_restart
        bindwith_reuseport graceful_die_on_errors graceful_shutdown_timeout_ms max_sigterms_to_die
        enable_host_watcher sequential_routing log_file log_format log_to_stdout log_syslog log_syslog_ident
        log_syslog_facility log_debug log_config log_session log_query log_stats log_async log_queue_depth
        log_general_stats_prom log_route_stats_prom promhttp_server_port stats_interval workers resolvers
        dns_cache_ttl readahead cache_coroutine cache_msg_gc_size coroutine_stack_size
        system_coroutine_stack_size cache cache_chunk pipeline packet_read_size packet_write_queue nodelay
        disable_nolinger keepalive keepalive_keep_interval keepalive_probes keepalive_usr_timeout client_max
        client_max_routing server_login_retry backend_connect_timeout_ms cancel_timeout_ms
        cancel_queue_timeout_ms cancel_max_inflight hba_file group_checker_interval availability_zone
        smart_search_path_enquoting external_auth_socket_path cpu_affinity virtual_processing
        virtual_transaction""",
    ),
    "conn_drop_options": (("service.conn_drop_options",), "drop_enabled rate interval_ms"),
    "online_restart_drop_options": (
        ("service.online_restart_drop_options",),
        "drop_enabled rate interval_ms",
    ),
    "query_parsing": (("query_parsing",), "mode mem_limit"),
    "soft_oom": (("soft_oom",), "limit process check_interval_ms"),
    "soft_oom.drop": (("soft_oom.drop",), "signal max_rate"),
    "listen": (
        ("listen",),
        """host port backlog client_login_timeout tls tls_ca_file tls_key_file tls_cert_file tls_protocols
        target_session_attrs balancing_method catchup_timeout storage compression""",
    ),
    "storage": (
        ("storage.NAME",),
        """type host port tls tls_ca_file tls_key_file tls_cert_file tls_protocols server_max_routing
        endpoints_status_poll_interval""",
    ),
    "storage.balancing": (("storage.NAME.balancing",), "method az_aware show_notice_messages"),
    "storage.watchdog": (("storage.NAME.watchdog",), "watchdog_lag_query watchdog_lag_interval"),
    "shared_pool": (("shared_pool.NAME",), "pool_size"),
    "ldap_endpoint": (
        ("ldap_endpoint.NAME",),
        """ldapserver ldapport ldapscheme ldapprefix ldapsuffix ldapbasedn ldapbinddn ldapbindpasswd
        ldapsearchattribute ldapsearchfilter ldapscope""",
    ),
    "database.user": (
        (RULE,),
        """address connection_type authentication password auth_common_name auth_query auth_query_db
        auth_query_user auth_pam_service auth_module enable_mdb_iamproxy_auth mdb_iamproxy_socket_path
        ldap_endpoint_name ldap_storage_credentials_attr ldap_pool_size ldap_pool_timeout ldap_pool_ttl
        password_passthrough role client_max client_fwd_error client_show_id
        reserve_session_server_connection quantiles application_name_add_host server_lifetime
        server_drop_on_cached_plan_error maintain_params target_session_attrs catchup_timeout catchup_checks
        storage storage_db storage_user storage_password pool pool_routing pool_size min_pool_size
        pool_timeout pool_ttl pool_client_idle_timeout pool_idle_in_transaction_timeout pool_discard
        pool_smart_discard pool_discard_query pool_cancel pool_rollback pool_reset_timeout_ms
        pool_reserve_prepared_statement pool_pin_on_listen pool_attach_check pool_acquire_fail_fast
        pool_notice_after_waiting_ms shared_pool log_debug log_query keepalive keepalive_keep_interval
        keepalive_probes keepalive_usr_timeout options backend_startup_options""",
    ),
    "database.user.ldap_storage_credentials": (
        (f"{RULE}.ldap_storage_credentials.NAME",),
        "ldap_storage_username ldap_storage_password",
    ),
    "database.group": (("database.NAME.group.NAME",), "group_query group_query_user group_query_db"),
}

# What is spelled otherwise there, so that a reader who looks for it finds it.
SPELLED: Final[Mapping[str, str]] = {
    "storage.balancing.method": 'balancing "method" { … }',
    "database.user.address": "what follows the user's name: an address",
    "database.user.connection_type": "what follows the user's name: a connection type",
    "database.user.options": 'options { "name" "value" }',
    "database.user.backend_startup_options": 'backend_startup_options { "name" "value" }',
}


class Fate(StrEnum):
    """What becomes of an option of Odyssey's."""

    BUILT = "built"
    IGNORED = "ignored"  # accepted with a warning
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Row:
    """An option of Odyssey's (``name``, dotted) and what it is here; ``why`` is empty where it is built."""

    name: str
    option: Option
    fate: Fate
    why: str


def rows() -> Iterator[Row]:
    """Every option of Odyssey's, in the order of ``NAMES``; ``LookupError`` for one that is not here."""
    for there, (sections, names) in NAMES.items():
        for name in names.split():
            option = _find(sections, name)
            yield Row(f"{there}.{name}" if there else name, option, *_fate(option))


def own() -> Iterator[Option]:
    """The options that Odyssey does not have; those of a rule once, though groups and watchdogs have them."""
    known = {(row.option.section, row.option.name) for row in rows()}
    for item in TABLE:
        is_repeated = "group" in item.section or "watchdog" in item.section
        if (item.section, item.name) not in known and not is_repeated:
            yield item


def _find(sections: tuple[str, ...], name: str) -> Option:
    found = [item for item in TABLE if item.section in sections and item.name == name]
    if len(found) != 1:
        raise LookupError(f"{name} is {len(found)} times in {', '.join(sections)}")
    return found[0]


def _fate(option: Option) -> tuple[Fate, str]:
    """By its own row of the table of options, or that of a section around it which is not built."""
    for table in tables():
        is_around = option.section == table.section or option.section.startswith(table.section + ".")
        if is_around and table.about is not None and table.about.status is Status.NOT_BUILT:
            return Fate.REFUSED, _refusal("its section is not built yet", table.about)
    row = option.about
    if row.status is Status.IGNORED:
        return Fate.IGNORED, row.advice
    if row.status is Status.NOT_BUILT:
        return Fate.REFUSED, _refusal("not built yet", row)
    return Fate.BUILT, ""


def _refusal(what: str, row: About) -> str:
    return what + ("" if row.advice in (REMOVE_IT, REMOVE_SECTION) else f": {row.advice}")


HEAD: Final = """\
# Odyssey's options

<!-- Written by `python -m gpooler.config.document` from the table of options. Do not edit. -->

Every option of Odyssey's, where it stands here, and what becomes of it. *built*: it does what it does there,
or what [configuration.md](configuration.md) says. *ignored*: it is accepted, and `gpooler check` warns that
it does nothing and why. *refused*: every value but the one that asks for nothing is an error. An option that
is not in this list is unknown, and an error too.

Odyssey's options of the top level have sections here. `include "path"` is `include = ["path"]`, a section
with a name in quotes is a table: `storage "main" {}` is `[storage.main]`, `database "x" { user "y" {} }` is
`[database.x.user.y]`. `group` stands beside `user` and has the same options, and so has `watchdog`. Where a
default is not Odyssey's, [configuration.md](configuration.md) says so.
"""

VALUES: Final = """
## What is refused of options that are built

- `storage.host`: several hosts, with commas. One host may have a zone (`host:port:zone`), which means
  nothing.
- `query_parsing.mode`: `full`, which Odyssey refuses, too.
"""


def text() -> str:
    """The text of ``docs/options.md``."""
    found = list(rows())
    counts = ", ".join(f"{sum(row.fate is fate for row in found)} {fate}" for fate in Fate)
    parts = [HEAD, f"\n{len(found)} options: {counts}.\n", VALUES]
    for there in NAMES:
        title = f"`{there}`" if there else "Top level"
        parts.append(f"\n## {title}\n\n| Odyssey's option | here | what becomes of it |\n|---|---|---|\n")
        names = [row for row in found if row.name.rpartition(".")[0] == there]
        parts += [_line(row) for row in names]
    parts.append("\n## Of gpooler's own\n\nOdyssey does not have these.\n\n| option | section |\n|---|---|\n")
    parts += [f"| `{item.name}` | `{_header(item)}` |\n" for item in own()]
    return "".join(parts)


def _line(row: Row) -> str:
    name = SPELLED.get(row.name, row.name.rpartition(".")[2])
    shown = name if name.startswith("what") else f"`{name}`"
    status = "built" if row.fate is Fate.BUILT else f"**{row.fate}**: {row.why}"
    return f"| {shown} | `{_header(row.option)}` `{row.option.name}` | {status} |\n"


def _header(option: Option) -> str:
    return f"[[{option.section}]]" if option.section == "listen" else f"[{option.section}]"
