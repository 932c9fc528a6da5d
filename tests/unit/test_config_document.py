"""The reference and the example: made from the table of options, complete, and usable."""

import re
from pathlib import Path

import pytest

from gpooler.config.document import EXAMPLE, REFERENCE, example, reference
from gpooler.config.field import Status, about
from gpooler.config.load import load_text
from gpooler.config.model import Config
from gpooler.config.options import TABLE, Option, tables

ROOT = Path(__file__).parents[2]
NAMES = sorted({option.name for option in TABLE})

# Every option that the reference of Odyssey's options names (§2, §4, §5), in its order.
ODYSSEY = """
daemonize priority pid_file locks_dir unix_socket_dir unix_socket_mode enable_online_restart
bindwith_reuseport drop_enabled rate interval_ms graceful_die_on_errors graceful_shutdown_timeout_ms
max_sigterms_to_die enable_host_watcher sequential_routing log_file log_format log_to_stdout log_syslog
log_syslog_ident log_syslog_facility log_debug log_config log_session log_query log_stats log_async
log_queue_depth log_general_stats_prom log_route_stats_prom promhttp_server_port stats_interval workers
resolvers dns_cache_ttl readahead cache_coroutine cache_msg_gc_size coroutine_stack_size
system_coroutine_stack_size cache cache_chunk pipeline packet_read_size packet_write_queue nodelay
disable_nolinger keepalive keepalive_keep_interval keepalive_probes keepalive_usr_timeout client_max
client_max_routing server_login_retry backend_connect_timeout_ms cancel_timeout_ms cancel_queue_timeout_ms
cancel_max_inflight hba_file group_checker_interval availability_zone smart_search_path_enquoting
external_auth_socket_path cpu_affinity virtual_processing virtual_transaction mode mem_limit limit process
check_interval_ms signal max_rate host port backlog client_login_timeout tls tls_ca_file tls_key_file
tls_cert_file tls_protocols target_session_attrs balancing_method catchup_timeout storage compression type
server_max_routing endpoints_status_poll_interval method az_aware show_notice_messages watchdog_lag_query
watchdog_lag_interval pool_size min_pool_size ldapserver ldapport ldapscheme ldapprefix ldapsuffix
ldapbasedn ldapbinddn ldapbindpasswd ldapsearchattribute ldapsearchfilter ldapscope address connection_type
authentication password auth_common_name auth_query auth_query_db auth_query_user auth_pam_service
auth_module enable_mdb_iamproxy_auth mdb_iamproxy_socket_path ldap_endpoint_name
ldap_storage_credentials_attr ldap_storage_username ldap_storage_password ldap_pool_size ldap_pool_timeout
ldap_pool_ttl password_passthrough role client_fwd_error client_show_id reserve_session_server_connection
quantiles application_name_add_host server_lifetime server_drop_on_cached_plan_error maintain_params
catchup_checks storage_db storage_user storage_password pool pool_routing pool_timeout pool_ttl
pool_client_idle_timeout pool_idle_in_transaction_timeout pool_discard pool_smart_discard pool_discard_query
pool_cancel pool_rollback pool_reset_timeout_ms pool_reserve_prepared_statement pool_pin_on_listen
pool_attach_check pool_acquire_fail_fast pool_notice_after_waiting_ms shared_pool options
backend_startup_options group_query group_query_user group_query_db
"""


def uncommented(text: str) -> str:
    return re.sub(r"^#(?=[a-z\[])", "", text, flags=re.MULTILINE)


def test_the_reference_in_docs_is_not_stale() -> None:
    assert (ROOT / REFERENCE).read_text() == reference(), "run `python -m gpooler.config.document`"


def test_the_example_is_not_stale() -> None:
    assert (ROOT / EXAMPLE).read_text() == example(), "run `python -m gpooler.config.document`"


def test_the_table_has_every_option_of_odyssey() -> None:
    assert sorted(set(ODYSSEY.split()) - set(NAMES)) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_example_and_the_reference_name_every_option(name: str) -> None:
    assert re.search(rf"^#   {name}: |^# {name} \(", example(), re.MULTILINE)
    assert f"| `{name}` |" in reference()


def test_the_example_loads_without_a_warning() -> None:
    loaded = load_text(example())
    assert loaded.warnings == ()
    assert [str(endpoint) for endpoint in loaded.config.storage["local_postgres"].endpoints] == [
        "127.0.0.1:5432"
    ]


def test_the_example_loads_with_every_option_taken_in() -> None:
    loaded = load_text(uncommented(example()))
    others = [warning.text for warning in loaded.warnings if "is ignored" not in warning.text]
    assert set(others) == {'has no effect while "tls" is "disable"'}
    assert [rule.group for rule in loaded.config.rules] == [None, "NAME", None, None, None, None, None]
    assert len(loaded.config.listen) == 2


def test_the_commented_values_of_the_example_are_the_defaults() -> None:
    taken_in = load_text(uncommented(example())).config
    plain = load_text(example()).config
    for name in ("performance", "routing", "query_parsing"):
        assert getattr(taken_in, name) == getattr(plain, name)


@pytest.mark.parametrize("option", TABLE, ids=lambda option: f"{option.section}.{option.name}")
def test_every_row_of_the_table_says_what_it_must(option: Option) -> None:
    row = option.about
    assert row.help.endswith((".", ":"))
    assert bool(row.advice) == (row.status is not Status.BUILT)
    assert option.kind.describe()
    assert option.kind.short()


def test_every_default_is_a_value_its_option_takes() -> None:
    for option in TABLE:
        if not option.is_required and option.default is not None:
            value = option.default
            assert option.kind.parse(f"{value:04o}" if option.name == "unix_socket_mode" else value) == value


def test_every_field_of_the_model_is_in_the_table() -> None:
    for table in tables():
        for field in table.model.model_fields.values():
            assert about(field)
    assert set(Config.model_fields) >= {"service", "logging", "rules"}
