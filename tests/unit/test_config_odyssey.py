"""The list of Odyssey's options: complete, up to date, and true to what `gpooler check` says of each."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from gpooler.config.load import load_text
from gpooler.config.odyssey import NAMES, OPTIONS, Fate, Row, own, rows, text
from gpooler.config.options import TABLE
from gpooler.config.problems import ConfigError
from gpooler.config.toml_text import entry
from tests.harness.certificates import Certificates
from tests.unit.test_config_audit import DEMO, HOMES, other_value

ROOT: Final = Path(__file__).parents[2]
ROWS: Final = tuple(rows())

# The options that are gpooler's own: one that is in neither list is not described at all.
OWN: Final = """
service.user service.drain_delay_ms logging.log_slow_ms database.NAME.user.NAME.log_slow_ms
limits.auth_threads limits.auth_queue_limit limits.auth_timeout_ms limits.auth_failure_delay_ms
limits.auth_failure_max limits.auth_failure_ban_ms limits.auth_failure_trusted
metrics.statsd_host metrics.statsd_port metrics.statsd_prefix metrics.prometheus_host
metrics.prometheus_port
performance.tls_records
listen.tls_crl_file listen.tls_ciphers listen.tls_ciphersuites
storage.NAME.tls_crl_file storage.NAME.tls_ciphers storage.NAME.tls_ciphersuites
ldap_endpoint.NAME.ldaptls ldap_endpoint.NAME.tls_ca_file
database.NAME.user.NAME.client_idle_timeout database.NAME.user.NAME.query_timeout
database.NAME.user.NAME.transaction_timeout database.NAME.user.NAME.session_state
database.NAME.user.NAME.session_state_check database.NAME.user.NAME.max_prepared_statements
database.NAME.user.NAME.max_client_prepared_bytes database.NAME.user.NAME.disable_nolinger
"""

# Refused may be only what needs several hosts.
OF_SEVERAL_HOSTS: Final = re.compile(
    r"balancing|target_session_attrs|catchup|watchdog|availability_zone|endpoints_status|listen\.storage"
)
# A value that is good in the demo, where the first that comes to mind is not.
GOOD: Final[Mapping[str, Any]] = {
    "unix_socket_mode": "0660",
    "host": "127.0.0.2",
    "address": "10.0.0.0/8",
    "log_format": "%m",
    "ldapscheme": "ldap",
    "limit": "64MB",
    "cpu_affinity": "auto",
    "signal": "SIGUSR1",
}
HOME_OF: Final = {
    **HOMES,
    "database.NAME.group.NAME": "database.order_app.group.staff",
    "storage.NAME.watchdog": "storage.order_storage.watchdog",
    "shared_pool.NAME": "shared_pool.small",
}
# What a table cannot be without.
BESIDE: Final[Mapping[str, Mapping[str, Any]]] = {
    "ldap_endpoint.NAME": {"ldapserver": "h", "ldapbasedn": "x"},
    "shared_pool.NAME": {"pool_size": 3},
    "soft_oom": {"limit": "64MB"},
}
# Options that need others, and have their meaning with them. DIRECTORY holds certificates.
TOGETHER: Final = """
[service]
unix_socket_dir = "/tmp"
unix_socket_mode = "0600"
daemonize = true
enable_online_restart = false
bindwith_reuseport = false

[logging]
log_format = "%m"
log_to_stdout = false
log_file = "DIRECTORY/log"

[soft_oom]
limit = "1GB"
process = "postgres"

[soft_oom.drop]
signal = "SIGTERM"
max_rate = 3

[routing]
hba_file = "DIRECTORY/hba"

[[listen]]
host = "127.0.0.1"
tls = "verify_full"
tls_ca_file = "DIRECTORY/ca.pem"
tls_key_file = "DIRECTORY/server.key"
tls_cert_file = "DIRECTORY/server.pem"
tls_protocols = "tlsv1.3"

[storage.main]
type = "remote"
host = "127.0.0.1"
tls = "verify_full"
tls_ca_file = "DIRECTORY/ca.pem"
tls_key_file = "DIRECTORY/server.key"
tls_cert_file = "DIRECTORY/server.pem"
tls_protocols = "tlsv1.3"

[storage.console]
type = "local"

[shared_pool.small]
pool_size = 3

[ldap_endpoint.search]
ldapserver = "h"
ldapbasedn = "x"
ldapbinddn = "cn=reader"
ldapbindpasswd = "x"

[ldap_endpoint.direct]
ldapserver = "h"
ldapprefix = "uid="
ldapsuffix = ",dc=example"

[database.console.user.admin]
authentication = "scram-sha-256"
password = "x"
storage = "console"
pool = "session"
role = "admin"

[database.query.user.default]
authentication = "md5"
auth_query = "SELECT usename, passwd FROM pg_shadow WHERE usename = $1"
auth_query_db = "query"
auth_query_user = "reader"
storage = "main"
storage_user = "reader"
storage_password = "x"
pool = "transaction"
shared_pool = "small"
session_state = "allow"
pool_pin_on_listen = true

[database.query.user.reader]
authentication = "none"
storage = "main"
pool = "session"
pool_client_idle_timeout = 5

[database.query.group.staff]
authentication = "none"
group_query = "SELECT member FROM staff"
group_query_user = "reader"
group_query_db = "query"
storage = "main"
storage_user = "reader"
pool = "session"

[database.pam.user.default]
authentication = "clear_text"
auth_pam_service = "postgresql"
password_passthrough = true
storage = "main"
pool = "session"

[database.module.user.default]
authentication = "clear_text"
auth_module = "tests.module:decide"
storage = "main"
storage_user = "reader"
pool = "session"

[database.agent.user.default]
authentication = "clear_text"
enable_mdb_iamproxy_auth = true
storage = "main"
storage_user = "reader"
pool = "session"

[database.ldap.user.default]
authentication = "clear_text"
ldap_endpoint_name = "search"
ldap_storage_credentials_attr = "memberOf"
storage = "main"
pool = "session"

[database.ldap.user.default.ldap_storage_credentials.rw]
ldap_storage_username = "x"
ldap_storage_password = "x"
"""


def label(row: Row) -> str:
    return row.name


def with_row(row: Row) -> str:
    """The demo with this option set to what is not its default."""
    item = row.option
    value = GOOD.get(item.name, other_value(item))
    header = HOME_OF.get(item.section, item.section)
    lines = entry(item.name, value)
    if item.name in ("options", "backend_startup_options"):
        lines = f"{item.name} = {{ jit = 'off' }}\n"
    bracketed = "[[listen]]" if item.section == "listen" else f"[{header}]"
    if bracketed in DEMO.splitlines():
        above, below = DEMO.split(f"{bracketed}\n", 1)
        table, bracket, rest = below.partition("\n[")
        table = re.sub(rf"(?m)^{item.name} = .*\n?", "", table)
        return f"{above}{bracketed}\n{lines}{table}{bracket}{rest}"
    beside = {**BESIDE.get(item.section, {})}
    beside.pop(item.name, None)
    return f"{DEMO}\n{bracketed}\n{lines}{''.join(entry(key, other) for key, other in beside.items())}"


def told(row: Row) -> tuple[list[str], list[str]]:
    """Errors and warnings when this option is set alone, with those of its section where that is refused."""
    path = HOME_OF.get(row.option.section, row.option.section)
    keys = {f"{path}.{row.option.name}", path, path.rpartition(".")[0]}
    if row.option.section == "listen":
        keys = {f"listen[0].{row.option.name}"}
    try:
        loaded = load_text(with_row(row))
    except ConfigError as error:
        return [problem.text for problem in error.problems if problem.key in keys], []
    return [], [problem.text for problem in loaded.warnings if problem.key in keys]


def test_the_list_in_docs_is_not_stale() -> None:
    assert (ROOT / OPTIONS).read_text() == text(), "run `python -m gpooler.config.document`"


def test_no_option_is_listed_twice() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names)) == sum(len(words.split()) for _, words in NAMES.values())


def test_an_option_is_either_odysseys_or_of_our_own() -> None:
    assert sorted(f"{item.section}.{item.name}" for item in own()) == sorted(OWN.split())


def test_every_option_is_shown() -> None:
    shown = (ROOT / OPTIONS).read_text()
    for item in TABLE:
        if "group" not in item.section and "watchdog" not in item.section:
            assert f"`{item.name}`" in shown


def test_only_what_needs_several_hosts_is_refused() -> None:
    refused = [row.name for row in ROWS if row.fate is Fate.REFUSED]
    assert [name for name in refused if not OF_SEVERAL_HOSTS.search(name)] == []


def of(fate: Fate) -> list[Row]:
    return [row for row in ROWS if row.fate is fate]


@pytest.mark.parametrize("row", of(Fate.REFUSED), ids=label)
def test_what_is_listed_as_refused_is_refused_by_name(row: Row) -> None:
    errors, _ = told(row)
    assert any("not built yet" in text for text in errors)


@pytest.mark.parametrize("row", of(Fate.IGNORED), ids=label)
def test_what_is_listed_as_ignored_is_accepted_with_a_warning(row: Row) -> None:
    assert told(row) == ([], [f"is ignored: {row.why}"])


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("files")
    Certificates(directory)
    (directory / "hba").write_text("local all all allow\n")
    return TOGETHER.replace("DIRECTORY", str(directory))


def test_options_that_need_others_are_accepted_silently_with_them(together: str) -> None:
    assert load_text(together).warnings == ()


@pytest.mark.parametrize("row", of(Fate.BUILT), ids=label)
def test_what_is_listed_as_built_is_accepted_silently(row: Row) -> None:
    item = row.option
    if re.search(rf"(?m)^{item.name} = ", _tables_like(item.section)):
        return  # with others: the test above
    loaded = load_text(with_row(row))
    old_name = "is the old name of conn_drop_options"
    assert [warning.text for warning in loaded.warnings if warning.text != old_name] == []
    assert bool(loaded.warnings) is row.name.startswith("online_restart_drop_options")


def _tables_like(section: str) -> str:
    """The text of the tables of ``TOGETHER`` that are of this section."""
    header = "\\.".join("[^.]+" if part == "NAME" else part for part in section.split("."))
    return "\n".join(re.findall(rf"(?m)^\[{{1,2}}{header}\]{{1,2}}\n((?:.+\n)+)", TOGETHER))


@pytest.mark.parametrize(
    ("written", "refused"),
    [
        ('[storage.more]\ntype = "remote"\nhost = "a,b"', "several hosts are not built yet"),
        ('[query_parsing]\nmode = "full"', 'must be one of "disabled", "minimal"'),
    ],
)
def test_refused_values_of_options_that_are_built(written: str, refused: str) -> None:
    with pytest.raises(ConfigError, match=refused):
        load_text(f"{DEMO}\n{written}\n")
