"""Loading a configuration: what comes out, and every problem with its place."""

import os
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpooler.config.effective import effective
from gpooler.config.load import ConfigError, Loaded, load, load_text
from gpooler.config.model import Authentication, ConnectionType, Pool
from gpooler.config.problems import Problem
from gpooler.config.storage import Endpoint

DEMO = Path(__file__).parent / "data" / "demo.toml"
DEMO_TEXT = DEMO.read_text()
RULE = "database.order_app.user.default"


def problems(text: str) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        load_text(text)
    assert str(caught.value) == "\n".join(str(problem) for problem in caught.value.problems)
    return caught.value.problems


def only_problem(text: str) -> Problem:
    found = problems(text)
    assert len(found) == 1, found
    return found[0]


def changed(old: str, new: str) -> str:
    assert DEMO_TEXT.count(old) == 1, old
    return DEMO_TEXT.replace(old, new)


def with_rule_lines(lines: str) -> str:
    return DEMO_TEXT + lines + "\n"


def with_lines(header: str, lines: str) -> str:
    """The demo with ``lines`` in a section that it has, or in one at the front."""
    if f"{header}\n" in DEMO_TEXT:
        return DEMO_TEXT.replace(f"{header}\n", f"{header}\n{lines}\n", 1)
    return f"{header}\n{lines}\n{DEMO_TEXT}"


def test_the_demo_everybody_copies_loads(tmp_path: Path) -> None:
    copy = tmp_path / "demo.toml"
    copy.write_text(DEMO_TEXT)
    copy.chmod(0o600)
    loaded = load(copy)
    config = loaded.config
    assert loaded.warnings == ()
    assert config.logging.log_format == "%p %t %e %l [%i %s] (%c) %m\n"
    assert config.logging.stats_interval == 5
    [listen] = config.listen
    assert (listen.host, listen.port, listen.unix_path) == ("*", 6401, None)
    assert config.storage["order_storage"].endpoints == (Endpoint("db.example.com", 5432),)
    [rule] = config.rules
    assert (rule.name, rule.database, rule.user) == ("order_app.default", "order_app", "default")
    assert rule.is_default_user
    assert not rule.is_default_database
    assert rule.authentication is Authentication.CLEAR_TEXT
    assert rule.pool is Pool.TRANSACTION
    assert (rule.pool_size, rule.pool_timeout) == (30, 4000)
    assert rule.password is not None
    assert rule.password[0].get_secret_value() == "client-secret"
    assert rule.storage_password is not None
    assert rule.storage_password.get_secret_value() == "server-secret"
    assert (rule.storage_db, rule.storage_user) == ("order", "order_app")


def test_defaults_are_those_of_the_reference() -> None:
    config = load(DEMO).config
    [rule] = config.rules
    assert config.performance.worker_count(cores=6) == 6
    assert config.limits.routing_limit(workers=3) == 192
    assert config.limits.cancel_limit(workers=3) == 6
    assert config.limits.cancel_queue_limit_ms == 2000
    assert config.storage["order_storage"].routing_limit(workers=3) == 3
    assert (rule.server_lifetime, rule.pool_reset_timeout_ms, rule.pool_discard) == (3600, 1000, None)
    assert rule.client_show_id
    assert rule.address is None
    assert rule.connection_type is ConnectionType.DEFAULT
    assert rule.keepalive is None
    assert config.service.conn_drop_options.interval_ms == 1000


def test_all_errors_come_at_once_in_the_order_of_the_file_with_lines_and_suggestions() -> None:
    text = (
        DEMO_TEXT.replace("stats_interval = 5", "stats_intervall = 5")
        .replace('host = "*"', "host = 5")
        .replace('type = "remote"', "")
        .replace('"clear_text"', '"clear_txt"')
        .replace('storage = "order_storage"', 'storage = "order_storag"')
        .replace("pool_size", "pool_sise")
        .replace("4000", '"4x"')
    )
    found = [(problem.line, problem.key, problem.suggestion) for problem in problems(text)]
    assert found == [
        (4, "logging.stats_intervall", "stats_interval"),
        (7, "listen[0].host", ""),
        (11, "storage.order_storage.type", ""),
        (17, f"{RULE}.authentication", "clear_text"),
        (19, f"{RULE}.storage", "order_storage"),
        (24, f"{RULE}.pool_sise", "pool_size"),
        (25, f"{RULE}.pool_timeout", ""),
    ]
    assert all(problem.file == "config.toml" for problem in problems(text))


def test_a_problem_is_shown_with_its_place_and_the_nearest_known_key() -> None:
    problem = only_problem(changed("pool_timeout", "pool_timout"))
    assert str(problem) == (
        "config.toml:25: database.order_app.user.default.pool_timout: "
        'unknown key (did you mean "pool_timeout"?)'
    )


def test_an_unknown_key_that_belongs_elsewhere_is_told_where() -> None:
    assert "belongs in [performance]" in only_problem("workers = 2\n" + DEMO_TEXT).text
    assert "belongs in [limits] or" in only_problem(with_lines("[logging]", "client_max = 2")).text
    assert only_problem("[pervormance]\n" + DEMO_TEXT).suggestion == "performance"


LDAP = "ldapserver = 'h'\nldapbasedn = 'x'"
GROUPS = "ldap_storage_credentials = { a = { ldap_storage_username = 'u' }}"
WITH_GROUPS = f"ldap_endpoint_name = 'x'\nldap_storage_credentials_attr = 'y'\n{GROUPS}"


def with_ldap(endpoint: str, rule: str = "password = 'x'") -> str:
    """The demo with an endpoint x and one more rule."""
    return (
        f"{DEMO_TEXT}\n[ldap_endpoint.x]\n{endpoint}\n\n[database.b.user.default]\n"
        f"authentication = 'clear_text'\nstorage = 'order_storage'\npool = 'session'\n{rule}\n"
    )


def test_a_configuration_with_ldap_groups_is_good_and_shows_no_secret() -> None:
    groups = WITH_GROUPS.replace("'u'", "'u', ldap_storage_password = 'group-secret'")
    text = with_ldap(f"{LDAP}\nldapbinddn = 'cn=x'\nldapbindpasswd = 'bind-secret'", groups)
    config = load_text(text).config
    assert config.ldap_endpoint["x"].ldapbasedn == "x"
    shown = effective(config)
    assert "group-secret" not in shown + repr(config)
    assert "bind-secret" not in shown + repr(config)
    read = tomllib.loads(shown)
    group = read["database"]["b"]["user"]["default"]["ldap_storage_credentials"]["a"]
    assert group["ldap_storage_username"] == "u"
    assert load_text(shown).config.ldap_endpoint["x"].ldapbinddn == "cn=x"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "logging.log_format: is required"),
        (changed('log_format = "%p %t %e %l [%i %s] (%c) %m\\n"', ""), "log_format: is required"),
        (with_lines("[service]", 'unix_socket_dir = "/tmp"'), 'needs "unix_socket_mode"'),
        (changed('host = "*"\n', ""), 'without "host" needs "unix_socket_dir"'),
        (changed('host = "db.example.com"\n', ""), 'without "host" needs "unix_socket_dir"'),
        (changed('host = "*"\n', 'host = "[::1]"\n'), "without brackets"),
        (changed('host = "db.example.com"', 'host = "a,b"'), "several hosts are not built yet"),
        (changed('host = "db.example.com"', 'host = "a:1:2"'), "two ports"),
        (changed('type = "remote"', 'type = "local"'), 'host: has no place where type is "local"'),
        (
            changed('type = "remote"\nhost = "db.example.com"', 'type = "local"'),
            "pool_size: has no place where the storage is local",
        ),
        (changed('pool = "transaction"', ""), "pool: is required and missing"),
        (changed('"clear_text"', '"md5"').replace('password = "client-secret"\n', "", 1), 'needs "password"'),
        (changed('password = "client-secret"\n', ""), 'needs "password"'),
        (changed('"clear_text"', '"cert"'), '"cert" needs a [[listen]] with "tls" and "tls_ca_file"'),
        (
            with_rule_lines('auth_pam_service = "x"'),
            "auth_pam_service: excludes password; what gpooler gives",
        ),
        (
            changed('"clear_text"', '"md5"').replace('password = "client', 'auth_pam_service = "client', 1),
            'auth_pam_service: needs authentication = "clear_text"',
        ),
        (
            with_rule_lines('shared_pool = "small"\n[shared_pool.small]\npool_size = 3'),
            "excludes shared_pool",
        ),
        (with_rule_lines('shared_pool = "small"').replace("pool_size = 30", ""), "no [shared_pool.small]"),
        (with_rule_lines("min_pool_size = 31"), "more than pool_size, 30"),
        (with_rule_lines("pool_pin_on_listen = true").replace('"transaction"', '"session"'), "session pool"),
        (with_rule_lines('pool_routing = "internal"\naddress = "10.0.0.0/8"'), "needs the default address"),
        (
            with_rule_lines("pool_smart_discard = true\npool_reserve_prepared_statement = false"),
            "needs pool_reserve_prepared_statement",
        ),
        (with_rule_lines("pool_discard_query = ''"), "must not be empty"),
        (with_rule_lines("pool_discard_query = ' ; '"), "must not be empty"),
        (with_rule_lines("pool_discard_query = \"SELECT 'ä'\""), "must be ASCII"),
        (with_rule_lines('pool_discard_query = "A\\u0000"'), "zero byte"),
        (with_rule_lines('role = "admin"'), "role: has a place only where the storage is local"),
        (with_lines("[query_parsing]", 'mode = "full"'), 'must be one of "disabled", "minimal"'),
        (with_lines("[soft_oom]", ""), "soft_oom.limit: is required and missing"),
        (with_lines("[soft_oom]", 'limit = "-1GB"'), "must be more than nothing"),
        (
            with_lines("[soft_oom]", 'limit = "1GB"\nprocess = "sixteen_letters_"'),
            "soft_oom.process: must be at most 15 characters",
        ),
        (
            with_lines("[soft_oom]", 'limit = "1GB"\n[soft_oom.drop]'),
            "soft_oom.drop: needs process: a signal goes only to processes of that name",
        ),
        (
            with_lines("[soft_oom]", 'limit = "1GB"\n[soft_oom.drop]\nsignal = "SIGNONE"'),
            "soft_oom.drop.signal: must be the name of a signal",
        ),
        (
            with_lines("[soft_oom]", 'limit = "1GB"\n[soft_oom.drop]\nsignal = 15'),
            "soft_oom.drop.signal: must be",
        ),
        (with_rule_lines("[storage.order_storage.watchdog]"), "watchdog: is not built yet"),
        (with_rule_lines("password_passthrough = true"), "passthrough: excludes storage_password"),
        (with_rule_lines("password_passthrough = true"), "excludes storage_user where the rule has many"),
        (
            DEMO_TEXT.replace('"clear_text"', '"md5"') + "password_passthrough = true\n",
            'passthrough: needs authentication = "clear_text" or "external"',
        ),
        (
            with_ldap(LDAP, f"{WITH_GROUPS}\npassword_passthrough = true"),
            "password_passthrough: excludes ldap_storage_credentials",
        ),
        (with_ldap("ldapserver = 'h'"), "needs ldapprefix or ldapsuffix for a direct bind, or ldapbasedn"),
        (with_ldap("ldapprefix = 'x'"), "ldapserver: is required and missing"),
        (
            with_ldap("ldapserver = 'h'\nldapprefix = 'x'\nldapbasedn = 'y'"),
            "ldapprefix: excludes ldapbasedn",
        ),
        (with_ldap("ldapserver = 'h'\nldapprefix = 'x'\nldapsearchfilter = 'y'"), "needs ldapbasedn"),
        (with_ldap("ldapserver = 'h'\nldapbasedn = 'x'\nldapbinddn = 'y'"), "needs ldapbindpasswd"),
        (with_ldap("ldapserver = 'h'\nldapbasedn = 'x'\nldapbindpasswd = 'y'"), "needs ldapbinddn"),
        (
            with_ldap("ldapserver = 'h'\nldapbasedn = 'x'\nldapscheme = 'ldaps'\nldaptls = true"),
            "excludes ldapsc",
        ),
        (with_ldap("ldapserver = 'h'\nldapbasedn = 'x'\ntls_ca_file = 'y'"), "tls_ca_file: needs ldaptls"),
        (with_ldap(LDAP, "ldap_endpoint_name = 'y'"), "there is no [ldap_endpoint.y]"),
        (with_ldap(LDAP, "ldap_endpoint_name = 'x'\nauth_pam_service = 'y'"), "excludes auth_pam_service"),
        (
            with_ldap(LDAP, "ldap_endpoint_name = 'x'\npassword = 'y'"),
            "ldap_endpoint_name: excludes password",
        ),
        (with_ldap(LDAP, "ldap_storage_credentials_attr = 'x'"), "needs ldap_storage_credentials"),
        (with_ldap(LDAP, GROUPS), "needs ldap_storage_credentials_attr"),
        (with_ldap(LDAP, f"ldap_storage_credentials_attr = 'x'\n{GROUPS}"), "needs ldap_endpoint_name"),
        (with_ldap("ldapserver = 'h'\nldapprefix = 'x'", WITH_GROUPS), "needs an endpoint with ldapbasedn"),
        (with_ldap(LDAP, f"storage_user = 'x'\n{WITH_GROUPS}"), "storage_user: excludes ldap_storage_cred"),
        (
            with_ldap(LDAP, f"storage_password = 'x'\n{WITH_GROUPS}"),
            "storage_password: excludes ldap_storage",
        ),
        (with_ldap(LDAP, f"min_pool_size = 1\n{WITH_GROUPS}"), "min_pool_size: excludes ldap_storage_cred"),
        (
            with_ldap(LDAP, f"storage_db = 'x'\n{WITH_GROUPS}").replace("[database.b.", "[database.default."),
            "the client would choose its group",
        ),
        (
            with_ldap(LDAP, WITH_GROUPS).replace('host = "db.example.com"', 'host = "unix:///tmp"'),
            "needs a storage with a TCP host",
        ),
        (
            with_ldap(
                LDAP,
                WITH_GROUPS.replace(
                    "}}", "}, b = { ldap_storage_username = 'u', ldap_storage_password = 'p' }}"
                ),
            ),
            "has the user name of a and another password",
        ),
        (with_rule_lines('address = "db example.com"'), "a host name has letters, digits"),
        (with_rule_lines('[[listen]]\nhost = "*"\nport = 6401'), "has the host and port of listen[0]"),
        (with_rule_lines("quantiles = [1.5]"), "from 0 to 1"),
        (with_lines("[routing]", 'availability_zone = "sixteen-letters!"'), "at most 15"),
        (with_lines("[performance]", "coroutine_stack_size = 3"), "at least 4"),
        (with_lines("[performance]", "workers = 0"), 'must be "auto" or a whole number'),
        (with_lines("[performance]", "resolvers = 0"), "at least 1"),
        (with_rule_lines('options = { a = "1", A = "2" }'), "twice, in different case"),
        (with_rule_lines('backend_startup_options = { user = "x" }'), 'use "storage_user"'),
        (with_rule_lines('[database."".user.x]\nstorage = "order_storage"'), "name must not be empty"),
        (
            changed("[database.order_app.user.default]", "[database.order_app]"),
            "belongs in [database.NAME.user.NAME]",
        ),
        (changed("[[listen]]", "[listen]"), "array of tables"),
        ("logging = 5\n", "logging: must be a table"),
        ("include = 5\n", "list of file names"),
        ('include = ["no-such-file.toml"]\n', "No such file"),
    ],
)
def test_what_cannot_be_used_is_refused(text: str, part: str) -> None:
    assert any(part in str(problem) for problem in problems(text)), problems(text)


def test_what_follows_from_a_broken_key_is_not_reported_besides_it() -> None:
    assert only_problem(changed('password = "client-secret"', "password = 5")).key == f"{RULE}.password"
    assert only_problem(changed('host = "*"', "host = 5")).key == "listen[0].host"
    assert only_problem(changed('type = "remote"', 'type = "remot"')).suggestion == "remote"
    assert only_problem(changed('pool = "transaction"', "pool = 1")).key == f"{RULE}.pool"


def test_what_is_not_built_is_accepted_at_its_inert_value() -> None:
    text = with_rule_lines("virtual_processing = false")
    text = with_rule_lines(
        "pool_reserve_prepared_statement = false\npool_smart_discard = 'no'\nquantiles = []"
    )
    text += '[storage.order_storage.balancing]\nmethod = "roundrobin"\n'
    assert load_text(text).warnings == ()


def test_what_odyssey_ignores_is_accepted_with_a_warning() -> None:
    loaded = load_text(with_lines("[performance]", "cache_coroutine = 0\npipeline = 'yes'"))
    assert [(warning.line, warning.key) for warning in loaded.warnings] == [
        (2, "performance.cache_coroutine"),
        (3, "performance.pipeline"),
    ]
    assert all("is ignored" in warning.text for warning in loaded.warnings)


@pytest.mark.parametrize(
    ("text", "key", "part"),
    [
        (
            with_rule_lines('connection_type = "hostssl"'),
            f"{RULE}.connection_type",
            "never matches: no [[listen]] has tls",
        ),
        (
            with_rule_lines('maintain_params = "no"\noptions = { jit = "off" }'),
            f"{RULE}.options",
            "has no effect where maintain_params is off",
        ),
        (
            with_rule_lines('maintain_params = "no"\napplication_name_add_host = "yes"'),
            f"{RULE}.application_name_add_host",
            "has no effect where maintain_params is off",
        ),
        (with_rule_lines("pool_pin_on_listen = true"), f"{RULE}.pool_pin_on_listen", "in any case"),
        (
            with_rule_lines('connection_type = "local"\naddress = "10.0.0.0/8"'),
            f"{RULE}.address",
            "never matches",
        ),
        (
            changed('host = "db.example.com"', 'host = "db.example.com:5433:az1"'),
            "storage.order_storage.host",
            "availability zone means nothing",
        ),
        (with_lines("[logging]", "log_to_stdout = 'no'"), "logging", "no log is written"),
        (
            changed('host = "db.example.com"', 'host = "db.example.com"\ntls_protocols = "tlsv1.3"'),
            "storage.order_storage.tls_protocols",
            'has no effect while "tls" is "disable"',
        ),
        (
            with_lines("[[listen]]", 'tls_protocols = "tlsv1.3"'),
            "listen[0].tls_protocols",
            'has no effect while "tls" is "disable"',
        ),
    ],
)
def test_what_is_accepted_and_does_nothing_is_warned_about(text: str, key: str, part: str) -> None:
    (warning,) = load_text(text).warnings
    assert warning.key == key
    assert part in warning.text


def test_the_port_of_prometheus_is_its_own_and_has_one_name() -> None:
    assert load_text(with_lines("[metrics]", "promhttp_server_port = 9127")).config.metrics.http_port == 9127
    two = with_lines("[metrics]", "prometheus_port = 9127\npromhttp_server_port = 9128")
    assert "give one" in only_problem(two).text
    taken = only_problem(with_lines("[metrics]", "prometheus_port = 6401"))
    assert (taken.key, taken.text) == ("metrics.prometheus_port", "is the port of listen[0]")
    (warning,) = load_text(with_lines("[metrics]", "prometheus_host = '*'")).warnings
    assert "no effect without prometheus_port" in warning.text


def test_the_old_name_of_the_drop_options_means_the_same() -> None:
    loaded = load_text(with_lines("[service.online_restart_drop_options]", "rate = 7\ndrop_enabled = 'no'"))
    assert loaded.config.service.conn_drop_options.rate == 7
    assert not loaded.config.service.conn_drop_options.drop_enabled
    assert len(loaded.warnings) == 1
    both = with_lines("[service.online_restart_drop_options]", "rate = 7") + "[service.conn_drop_options]\n"
    assert "give one of the two" in only_problem(both).text


def test_departures_from_odyssey_are_named_until_they_are_set() -> None:
    def names(loaded: Loaded) -> set[str]:
        return {departure.split(":")[0] for departure in loaded.departures}

    assert {"workers", "disable_nolinger", "pool_discard"} <= names(load(DEMO))
    text = with_lines("[performance]", "workers = 1\ndisable_nolinger = 'no'") + "pool_discard = 'yes'\n"
    assert not {"workers", "disable_nolinger", "pool_discard"} & names(load_text(text))


# --- rules ------------------------------------------------------------------------------------

SHORT_RULE = 'authentication = "none"\nstorage = "order_storage"\npool = "session"\n'


def test_rules_are_in_the_order_of_the_file_though_tables_nest_otherwise() -> None:
    text = DEMO_TEXT
    for header in ("[database.b.user.x]", "[database.order_app.user.z]", "[database.default.user.default]"):
        text += f"{header}\n{SHORT_RULE}"
    names = [rule.name for rule in load_text(text).config.rules]
    assert names == ["order_app.default", "b.x", "order_app.z", "default.default"]


def test_rules_of_an_array_are_numbered_and_must_differ() -> None:
    header = "[[database.b.user.x]]\n" + SHORT_RULE
    text = DEMO_TEXT + header + 'address = "10.0.0.1/8"\n' + header + "connection_type = 'local'\n"
    rules = load_text(text).config.rules
    assert [rule.name for rule in rules] == ["order_app.default", "b.x[0]", "b.x[1]"]
    assert str(rules[1].address) == "10.0.0.0/8"
    problem = only_problem(DEMO_TEXT + header + header)
    assert problem.key == "database.b.user.x[1]"
    assert "number 0 of this array" in problem.text


def test_hosts_tell_the_rules_of_an_array_apart_in_whatever_case_they_are_written() -> None:
    header = "[[database.b.user.x]]\n" + SHORT_RULE
    one, other = header + 'address = "Db.Example.com"\n', header + 'address = "db2.example.com"\n'
    rules = load_text(DEMO_TEXT + one + other).config.rules
    assert [rule.address for rule in rules[1:]] == ["db.example.com", "db2.example.com"]
    problem = only_problem(DEMO_TEXT + one + one.lower())
    assert "number 0 of this array" in problem.text


def test_names_that_are_no_bare_keys_are_quoted_in_rule_names() -> None:
    text = DEMO_TEXT + f'[database."a.b".user."c"]\n{SHORT_RULE}[database.a.user."b.c"]\n{SHORT_RULE}'
    assert [rule.name for rule in load_text(text).config.rules][1:] == ['"a.b".c', 'a."b.c"']


def test_unix_sockets_are_in_the_socket_directory() -> None:
    text = with_lines("[service]", 'unix_socket_dir = "/run/pg"\nunix_socket_mode = "0660"')
    text = text.replace('host = "*"\n', "").replace('host = "db.example.com"\n', "")
    config = load_text(text).config
    assert config.service.unix_socket_mode == 0o660
    assert config.listen[0].unix_path == "/run/pg/.s.PGSQL.6401"
    assert config.storage["order_storage"].endpoints[0].unix_path == "/run/pg/.s.PGSQL.5432"


# --- secrets ----------------------------------------------------------------------------------


def test_secrets_come_from_files_and_the_environment(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("  from file \n")
    text = DEMO_TEXT.replace('"client-secret"', '{ file = "one" }').replace(
        '"server-secret"', '{ env = "TWO" }'
    )
    (tmp_path / "config.toml").write_text(text)
    [rule] = load(tmp_path / "config.toml", {"TWO": "from environment"}).config.rules
    assert rule.password is not None
    assert rule.password[0].get_secret_value() == "  from file "
    assert rule.storage_password is not None
    assert rule.storage_password.get_secret_value() == "from environment"


@pytest.mark.parametrize(
    ("secret", "part"),
    [
        ('{ file = "no-such-file" }', "No such file"),
        ('{ file = "." }', "not a regular file"),
        ('{ env = "GPOOLER_NO_SUCH" }', 'variable "GPOOLER_NO_SUCH" is not set'),
        ('{ vault = "x" }', "must be text, { file ="),
        ('{ file = "a", env = "b" }', "must be text, { file ="),
        ('""', "must not be empty"),
        ("[['TOPSECRET']]", "must be text, { file ="),
        ("['TOPSECRET', '']", "must not be empty"),
        ("[]", "must be a list of 1 to 8"),
        (str(["TOPSECRET"] * 9), "must be a list of 1 to 8"),
        ("{ env = ['TOPSECRET'] }", "must be text, { file ="),
        ('"TOPSECRET\\u0000"', "zero byte"),
    ],
)
def test_a_secret_that_cannot_be_had_is_refused_and_never_shown(secret: str, part: str) -> None:
    problem = only_problem(changed('"client-secret"', secret))
    assert part in problem.text
    assert "TOPSECRET" not in str(problem)


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="not a regular file"):
        load(tmp_path / "pipe")


SECRETS = ["SCRAM-SHA-256$4096:TOPSECRET", "md5" + "0" * 32 + "TOPSECRET", "TOPSECRET"]


@given(
    st.sampled_from(SECRETS),
    st.sampled_from(["md5", "scram-sha-256", "clear_text", "cert", "none", "bogus"]),
    st.sampled_from(["password", "storage_password", "ldap_storage_password", "passwrd", "pool"]),
    st.booleans(),
)
def test_no_message_or_repr_holds_a_secret(secret: str, method: str, key: str, is_nested: bool) -> None:
    text = DEMO_TEXT.replace('"clear_text"', f'"{method}"').replace("client-secret", secret)
    value = f"{{ x = '{secret}' }}" if is_nested else f"'{secret}'"
    text += f"{key} = {value}\n" if key not in ("password", "storage_password", "pool") else ""
    text = text.replace("server-secret", secret)
    try:
        loaded = load_text(text)
        shown = f"{loaded!r} {loaded.config.rules!r}"
    except ConfigError as error:
        shown = f"{error} {error.problems!r}"
    assert "TOPSECRET" not in shown


def test_a_hash_that_the_method_cannot_use_is_refused() -> None:
    md5 = changed('"clear_text"', '"scram-sha-256"').replace("client-secret", "md5" + "0" * 32)
    assert "is an md5 hash" in only_problem(md5).text


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("[logging]\nlog_format = \n", 2, "not valid TOML: invalid value"),
        ("[logging\n", 1, "not valid TOML"),
        ("[logging]\nlog_debug = true\n\nlog_debug = false\n", 4, "stands twice, first in line 2"),
        ("[a]\n[a]\n", 2, "this table stands twice, first in line 1"),
        ('a = "', None, "at the end of the file"),
        ("a = 1" + "0" * 5000, None, "too long or nested too deep"),
        ("a = " + "[" * 5000, None, "too long or nested too deep"),
    ],
)
def test_what_is_no_toml_is_refused_with_its_line(text: str, line: int | None, part: str) -> None:
    problem = only_problem(text)
    assert problem.line == line
    assert part in problem.text


@given(st.text(max_size=200) | st.text(alphabet='[]{}=.,"\\#\n ab1', max_size=60))
def test_any_text_is_refused_with_problems_and_nothing_else(text: str) -> None:
    assert problems(text)


KEYS = st.sampled_from(
    ["database", "default", "user", "group", "listen", "storage", "logging", "x", "password", "pool"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)


def toml_of(value: object) -> str:
    match value:
        case dict():
            return "{" + ", ".join(f"{key} = {toml_of(item)}" for key, item in value.items()) + "}"
        case list():
            return "[" + ", ".join(toml_of(item) for item in value) + "]"
        case str():
            return '"' + "".join(f"\\U{ord(char):08x}" for char in value) + '"'
        case bool():
            return str(value).lower()
        case None:
            return "1979-05-27"
    return repr(value)


@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_any_shape_of_document_is_refused_with_problems_and_nothing_else(document: dict[str, object]) -> None:
    text = "".join(f"{key} = {toml_of(value)}\n" for key, value in document.items())
    try:
        found = problems(text)
    except UnicodeError:
        return
    assert found


def test_includes_are_read_first_and_keep_their_own_names_and_lines(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "main.toml").write_text('include = ["sub/rules.toml", "more.toml"]\n' + DEMO_TEXT)
    (tmp_path / "sub" / "rules.toml").write_text(
        f'include = ["deep.toml"]\n[database.b.user.x]\n{SHORT_RULE}password = {{ file = "secret" }}\n'
    )
    (tmp_path / "sub" / "secret").write_text("hidden\n")
    (tmp_path / "sub" / "deep.toml").write_text("[logging]\nlog_debug = true\n")
    (tmp_path / "more.toml").write_text(
        '[[listen]]\nhost = "::1"\n[database.order_app.user.x]\n' + SHORT_RULE
    )
    config = load(tmp_path / "main.toml").config
    assert [rule.name for rule in config.rules] == ["b.x", "order_app.x", "order_app.default"]
    assert [listen.host for listen in config.listen] == ["::1", "*"]
    assert config.logging.log_debug
    assert config.rules[0].password is not None
    assert config.rules[0].password[0].get_secret_value() == "hidden"

    (tmp_path / "more.toml").write_text(
        "[[listen]]\nhost = 5\n\n[logging]\nlog_debug = false\nlog_sesion = true\n"
    )
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "main.toml")
    [twice] = caught.value.problems
    assert (twice.file, twice.line, twice.key) == (str(tmp_path / "more.toml"), 5, "logging.log_debug")
    assert f"first in {tmp_path}/sub/deep.toml:2" in twice.text


def test_an_error_in_an_included_file_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "main.toml").write_text('include = "more.toml"\n' + DEMO_TEXT)
    (tmp_path / "more.toml").write_text("\n[[listen]]\nhost = 5\n")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "main.toml")
    assert [(p.file, p.line, p.key) for p in caught.value.problems] == [
        (str(tmp_path / "more.toml"), 3, "listen[0].host")
    ]


def test_a_rule_in_two_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "main.toml").write_text('include = ["more.toml"]\n' + DEMO_TEXT)
    (tmp_path / "more.toml").write_text("[database.order_app.user.default]\nmin_pool_size = 1\n")
    with pytest.raises(ConfigError, match=r"main\.toml:17: .*default: stands twice, first in .*more\.toml:1"):
        load(tmp_path / "main.toml")


def test_includes_are_at_most_sixteen_deep_and_never_in_a_circle(tmp_path: Path) -> None:
    for number in range(18):
        (tmp_path / f"{number}.toml").write_text(f'include = ["{number + 1}.toml"]\n')
    (tmp_path / "17.toml").write_text(DEMO_TEXT)
    with pytest.raises(ConfigError, match=r"16\.toml:1: include: includes are nested deeper than 16"):
        load(tmp_path / "0.toml")
    assert load(tmp_path / "1.toml").config.rules
    (tmp_path / "17.toml").write_text('include = ["17.toml"]')
    with pytest.raises(ConfigError, match="includes itself"):
        load(tmp_path / "1.toml")


def test_a_file_that_is_not_utf8_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"[logging]\n# \xff\n")
    with pytest.raises(ConfigError, match="not UTF-8 in line 2"):
        load(tmp_path / "config.toml")
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "other.toml")
    with pytest.raises(ConfigError, match="not a regular file"):
        load(tmp_path)


def test_a_thousand_rules_load() -> None:
    text = DEMO_TEXT + "".join(f"[database.d{n}.user.u]\n{SHORT_RULE}" for n in range(1000))
    assert len(load_text(text).config.rules) == 1001


def test_several_passwords_come_from_several_places(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("from file\n")
    several = '[{ file = "one" }, "plain", { env = "TWO" }]'
    (tmp_path / "config.toml").write_text(DEMO_TEXT.replace('"client-secret"', several))
    [rule] = load(tmp_path / "config.toml", {"TWO": "from environment"}).config.rules
    assert rule.password is not None
    values = [secret.get_secret_value() for secret in rule.password]
    assert values == ["from file", "plain", "from environment"]


SALTED = "SCRAM-SHA-256$4096:{}$" + "A" * 43 + "=:" + "A" * 43 + "="


@pytest.mark.parametrize(
    ("method", "passwords", "part"),
    [
        ("scram-sha-256", ["plain", "md5" + "0" * 32], "is an md5 hash"),
        ("md5", [SALTED.format("c2FsdA=="), "md5" + "0" * 32], "md5 hashes and SCRAM verifiers"),
        ("md5", [SALTED.format("c2FsdA=="), SALTED.format("c2FsdDI=")], "different salt"),
        ("scram-sha-256", [SALTED.format("c2FsdA=="), SALTED.format("c2FsdDI=")], "different salt"),
    ],
)
def test_passwords_that_one_login_cannot_try_are_refused(
    method: str, passwords: list[str], part: str
) -> None:
    text = DEMO_TEXT.replace('"client-secret"', str(passwords))
    text = re.sub(r'(?m)^authentication = ".*"$', f'authentication = "{method}"', text)
    assert part in only_problem(text).text


QUERY = """
auth_query = "SELECT a, b FROM c WHERE a = $1"
auth_query_db = "order_app"
auth_query_user = "default"
"""


@pytest.mark.parametrize(
    ("lines", "key", "part"),
    [
        (QUERY.replace("auth_query_db", "#"), "auth_query", "needs auth_query_db and auth_query_user"),
        (QUERY.replace("auth_query_user", "#"), "auth_query", "needs auth_query_db and auth_query_user"),
        (QUERY.replace("auth_query =", "#"), "auth_query_db", "needs auth_query"),
        (QUERY.replace("$1", "'x%u'"), "auth_query", "between quotes"),
        (QUERY.replace('"order_app"', '"other"'), "auth_query_db", 'no rule for database "other"'),
    ],
)
def test_an_auth_query_needs_a_place_to_run_and_its_parameter(lines: str, key: str, part: str) -> None:
    header = "[database.order_app.user.default]"
    with pytest.raises(ConfigError) as caught:
        load_text(DEMO_TEXT.replace(header, header + lines))
    assert any(p.key.endswith(key) and part in p.text for p in caught.value.problems)


def test_an_auth_query_stands_in_place_of_the_password() -> None:
    header = "[database.order_app.user.default]"
    text = re.sub("(?m)^(password|storage_password) = .*$", "", DEMO_TEXT.replace(header, header + QUERY))
    assert load_text(text).config.rules[0].auth_query is not None


@pytest.mark.parametrize(
    ("lines", "key", "part"),
    [
        ('auth_module = "os:x"', "auth_module", "excludes password"),
        ("enable_mdb_iamproxy_auth = true", "enable_mdb_iamproxy_auth", "excludes password"),
        (
            'auth_module = "os:x"\nenable_mdb_iamproxy_auth = true',
            "enable_mdb_iamproxy_auth",
            "excludes auth_mo",
        ),
        ('auth_module = "os"', "auth_module", "the name of a Python function"),
        ('auth_module = "os:x;y"', "auth_module", "the name of a Python function"),
        (f'mdb_iamproxy_socket_path = "/{"x" * 107}"', "mdb_iamproxy_socket_path", "at most 107"),
    ],
)
def test_who_judges_a_password_judges_alone(lines: str, key: str, part: str) -> None:
    header = "[database.order_app.user.default]"
    with pytest.raises(ConfigError) as caught:
        load_text(DEMO_TEXT.replace(header, f"{header}\n{lines}"))
    assert any(p.key.endswith(key) and part in p.text for p in caught.value.problems)


@pytest.mark.parametrize("option", ['auth_module = "os:x"', "enable_mdb_iamproxy_auth = true"])
def test_who_judges_a_password_must_be_shown_it(option: str) -> None:
    text = re.sub("(?m)^authentication = .*$", f'authentication = "md5"\n{option}', DEMO_TEXT)
    with pytest.raises(ConfigError, match='needs authentication = "clear_text"'):
        load_text(text)


@pytest.mark.parametrize("missing", ["group_query", "group_query_db", "group_query_user"])
def test_a_group_needs_its_query_and_a_place_for_it(missing: str) -> None:
    body = {
        "authentication": "none", "storage": "order_storage", "pool": "session",
        "group_query": "SELECT 1", "group_query_db": "order_app", "group_query_user": "x",
    }  # fmt: skip

    def text(change: dict[str, str]) -> str:
        lines = "".join(f'{key} = "{value}"\n' for key, value in {**body, **change}.items() if value)
        return f"{DEMO_TEXT}\n[database.order_app.group.staff]\n{lines}"

    rule = load_text(text({})).config.rules[-1]
    assert (rule.name, rule.group, rule.user) == ("order_app.group.staff", "staff", "default")
    assert f"a group needs {missing}" in only_problem(text({missing: ""})).text
    assert 'no rule for database "other"' in only_problem(text({"group_query_db": "other"})).text
