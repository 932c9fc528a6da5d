"""What must hold between options: contradictions, dangling references, and what would have no effect.

The list follows "Cross-checks that must fail start/reload" of Odyssey's reference (§1). Each check looks at
the document whatever else is wrong with it; the caller drops what follows from a key already reported.
"""

import difflib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from gpooler.auth.query_text import compile_query
from gpooler.auth.scram import Verifier
from gpooler.config.affinity import KINDS, parse_affinity
from gpooler.config.model import DEFAULT, Document, ListenBody, StorageBody
from gpooler.config.problems import KeyPath
from gpooler.config.rule import GroupBody, RuleBody
from gpooler.config.storage import Endpoint, parse_endpoints, socket_path
from gpooler.config.words import (
    Authentication,
    ConnectionType,
    LdapScheme,
    Pool,
    PoolRouting,
    SessionState,
    StorageType,
    Tls,
)

IN_CLEAR: Final = (Authentication.CLEAR_TEXT, Authentication.EXTERNAL)  # a password is sent as it is
CLEAR_TEXT_SOURCES: Final = (
    "password",
    "auth_query",
    "auth_pam_service",
    "auth_module",
    "ldap_endpoint_name",
    "enable_mdb_iamproxy_auth",
)
# These decide about a password, and alone.
OUTSIDE: Final = ("auth_pam_service", "ldap_endpoint_name", "auth_module", "enable_mdb_iamproxy_auth")
LDAP_DIRECT: Final = ("ldapprefix", "ldapsuffix")
LDAP_SEARCH: Final = ("ldapbinddn", "ldapbindpasswd", "ldapsearchattribute", "ldapsearchfilter")
GROUP_QUERY: Final = ("group_query", "group_query_user", "group_query_db")
# What says how servers are opened and shared.
SERVER_OPTIONS: Final = (
    "storage_db", "storage_user", "storage_password", "backend_startup_options", "ldap_storage_credentials",
    "pool_size", "min_pool_size", "shared_pool",
)  # fmt: skip
TOLD_APART_BY: Final = ("address", "connection_type")
SOCKET_DIR: Final[KeyPath] = ("service", "unix_socket_dir")
MD5_LENGTH: Final = 35  # "md5" and 32 hex digits


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong at ``path``; ``depends`` are further keys without which it cannot be said."""

    path: KeyPath
    text: str
    depends: tuple[KeyPath, ...] = ()
    suggestion: str = ""

    def follows_from(self, broken: Collection[KeyPath]) -> bool:
        """Whether it may be due to one of the ``broken`` keys alone."""
        return any(
            key[:end] in broken for key in (self.path, *self.depends) for end in range(1, len(key) + 1)
        )


@dataclass(frozen=True, slots=True)
class Names:
    """The names that the configuration defines, whether what they name is right or wrong."""

    storage: Collection[str]
    shared_pool: Collection[str]
    ldap_endpoint: Collection[str]


def errors(document: Document, names: Names) -> Iterator[Finding]:
    """What makes ``document`` unusable."""
    yield from _service(document)
    yield from _soft_oom(document)
    yield from _listeners(document)
    yield from _metrics(document)
    yield from _storages(document)
    yield from _ldap_endpoints(document)
    yield from _names(document)
    yield from _rules(document)
    for path, database, user, rule in rules_of(document):
        for check in (_authentication, _outside_checks, _pool):
            yield from check(path, rule)
        yield from _references(path, rule, document, names)
        yield from _certificate(path, rule, document)
        yield from _passthrough(path, user, rule, document)
        yield from _auth_query(path, rule, document)
        yield from _ldap_credentials(path, database, rule, document)
        yield from _console(path, rule, document)
        if isinstance(rule, GroupBody):
            yield from _group(path, rule, document)


def _group(path: KeyPath, rule: GroupBody, document: Document) -> Iterator[Finding]:
    if missing := [word for word in GROUP_QUERY if getattr(rule, word) is None]:
        yield Finding(path, f"a group needs {', '.join(missing)}")
    elif rule.group_query_db and rule.group_query_user:
        yield from _query_route(path, "group_query", rule.group_query_db, rule.group_query_user, document)


def rules_of(document: Document) -> Iterator[tuple[KeyPath, str, str, RuleBody]]:
    """Every rule with its path (with a number, array or not), database and user; a group's takes any."""
    for database, body in document.database.items():
        for user, rules in body.user.items():
            for number, rule in enumerate(rules):
                yield ("database", database, "user", user, number), database, user, rule
        for group, members in body.group.items():
            for number, rule in enumerate(members):
                yield ("database", database, "group", group, number), database, DEFAULT, rule


def _service(document: Document) -> Iterator[Finding]:
    service = document.service
    if service.unix_socket_dir and service.unix_socket_mode is None:
        yield Finding(SOCKET_DIR, 'needs "unix_socket_mode" too', (("service", "unix_socket_mode"),))
    if service.enable_online_restart and not service.bindwith_reuseport:
        yield Finding(("service", "enable_online_restart"), 'needs "bindwith_reuseport"')
    if service.online_restart_drop_options and "conn_drop_options" in service.model_fields_set:
        path = ("service", "online_restart_drop_options")
        yield Finding(path, "is the old name of conn_drop_options: give one of the two")


def _soft_oom(document: Document) -> Iterator[Finding]:
    options = document.soft_oom
    if options is not None and options.drop is not None and not options.process:
        text = "needs process: a signal goes only to processes of that name"
        yield Finding(("soft_oom", "drop"), text, (("soft_oom", "process"),))


def _listeners(document: Document) -> Iterator[Finding]:
    if not document.listen:
        yield Finding(("listen",), "at least one [[listen]] is needed")
    seen: dict[tuple[str | None, int], int] = {}
    for number, listen in enumerate(document.listen):
        path: KeyPath = ("listen", number)
        if listen.host and listen.host[0] in "[/":
            text = "an IPv6 address stands without brackets here, a Unix socket has no host (unix_socket_dir)"
            yield Finding((*path, "host"), text)
        depends = ((*path, "host"), (*path, "port"))
        if text := _unix_listener(listen, document.service.unix_socket_dir):
            yield Finding(path, text, (*depends, SOCKET_DIR))
        yield from _tls(path, listen)
        if listen.tls is not Tls.DISABLE:
            if listen.host is None:
                yield Finding((*path, "tls"), "a Unix socket has no TLS", ((*path, "host"),))
            for key in ("tls_cert_file", "tls_key_file"):
                if getattr(listen, key) is None:
                    yield Finding((*path, "tls"), f'"{listen.tls}" needs "{key}"', ((*path, key),))
        address = (listen.host and listen.host.lower(), listen.port)
        if address in seen:
            yield Finding(path, f"has the host and port of listen[{seen[address]}]", depends)
        seen.setdefault(address, number)


def _metrics(document: Document) -> Iterator[Finding]:
    metrics = document.metrics
    own, odysseys = metrics.prometheus_port, metrics.promhttp_server_port
    if own and odysseys and own != odysseys:
        yield Finding(("metrics", "promhttp_server_port"), "is another name of prometheus_port: give one")
    key = ("metrics", "prometheus_port" if own else "promhttp_server_port")
    for number, listen in enumerate(document.listen):
        is_same_host = "*" in (listen.host, metrics.prometheus_host) or listen.host == metrics.prometheus_host
        if listen.host is not None and is_same_host and listen.port == metrics.http_port:
            yield Finding(key, f"is the port of listen[{number}]", (("listen", number, "port"),))


def _tls(path: KeyPath, section: ListenBody | StorageBody) -> Iterator[Finding]:
    """What a listener and a storage have in common; the files themselves: ``certificates``."""
    needs = (*path, "tls_ca_file")
    if section.tls in (Tls.VERIFY_CA, Tls.VERIFY_FULL) and section.tls_ca_file is None:
        yield Finding((*path, "tls"), f'"{section.tls}" needs "tls_ca_file"', (needs,))
    if section.tls_crl_file is not None and section.tls_ca_file is None:
        yield Finding((*path, "tls_crl_file"), 'needs "tls_ca_file"', (needs,))
    for one, other in (("tls_cert_file", "tls_key_file"), ("tls_key_file", "tls_cert_file")):
        if getattr(section, one) is not None and getattr(section, other) is None:
            yield Finding((*path, one), f'needs "{other}"', ((*path, other),))


def _unix_listener(listen: ListenBody, directory: str | None) -> str:
    if listen.host is not None:
        return ""
    if directory is None:
        return 'a listener without "host" needs "unix_socket_dir" in [service]'
    try:
        socket_path(directory, listen.port)
    except ValueError as error:
        return str(error)
    return ""


def _storages(document: Document) -> Iterator[Finding]:
    if not document.storage:
        yield Finding(("storage",), "at least one [storage.NAME] is needed")
    for name, storage in document.storage.items():
        path: KeyPath = ("storage", name)
        host = (*path, "host")
        if storage.type is StorageType.LOCAL:
            for key in sorted(storage.model_fields_set - {"type"}):
                yield Finding((*path, key), 'has no place where type is "local"', ((*path, "type"),))
            continue
        yield from _tls(path, storage)
        try:
            endpoints = parse_endpoints(storage.host, storage.port, document.service.unix_socket_dir)
        except ValueError as error:
            yield Finding(host, str(error), (SOCKET_DIR,))
        else:
            if len(endpoints) > 1:
                yield Finding(host, "several hosts are not built yet: give one")


def _ldap_endpoints(document: Document) -> Iterator[Finding]:
    for name, endpoint in document.ldap_endpoint.items():
        path: KeyPath = ("ldap_endpoint", name)
        direct = [word for word in LDAP_DIRECT if getattr(endpoint, word) is not None]
        search = [word for word in LDAP_SEARCH if getattr(endpoint, word) is not None]
        if endpoint.ldapbasedn is None:
            for word in search:
                yield Finding((*path, word), "needs ldapbasedn", ((*path, "ldapbasedn"),))
            if not (endpoint.ldapprefix or endpoint.ldapsuffix):
                text = "needs ldapprefix or ldapsuffix for a direct bind, or ldapbasedn for a search"
                depends = tuple((*path, word) for word in (*LDAP_DIRECT, "ldapbasedn"))
                yield Finding((*path, "ldapserver"), text, depends)
        else:
            for word in direct:
                yield Finding((*path, word), "excludes ldapbasedn", ((*path, "ldapbasedn"),))
        if endpoint.ldapbindpasswd is not None and endpoint.ldapbinddn is None:
            yield Finding((*path, "ldapbindpasswd"), "needs ldapbinddn", ((*path, "ldapbinddn"),))
        if endpoint.ldapbinddn is not None and endpoint.ldapbindpasswd is None:
            yield Finding((*path, "ldapbinddn"), "needs ldapbindpasswd", ((*path, "ldapbindpasswd"),))
        if endpoint.ldaptls and endpoint.ldapscheme is LdapScheme.LDAPS:
            yield Finding((*path, "ldaptls"), 'excludes ldapscheme = "ldaps", which is TLS already')
        if endpoint.tls_ca_file and not endpoint.ldaptls and endpoint.ldapscheme is LdapScheme.LDAP:
            depends = ((*path, "ldaptls"), (*path, "ldapscheme"))
            yield Finding((*path, "tls_ca_file"), 'needs ldaptls or ldapscheme = "ldaps"', depends)


def _ldap_credentials(path: KeyPath, database: str, rule: RuleBody, document: Document) -> Iterator[Finding]:
    """Whom to be at the server by a group of the directory."""
    credentials = rule.ldap_storage_credentials
    at = (*path, "ldap_storage_credentials")
    attribute = (*path, "ldap_storage_credentials_attr")
    if rule.ldap_storage_credentials_attr is not None and not credentials:
        yield Finding(attribute, "needs ldap_storage_credentials", (at,))
    if not credentials:
        return
    if rule.ldap_storage_credentials_attr is None:
        yield Finding(at, "needs ldap_storage_credentials_attr", (attribute,))
    endpoint = document.ldap_endpoint.get(rule.ldap_endpoint_name or "")
    if rule.ldap_endpoint_name is None:
        yield Finding(at, "needs ldap_endpoint_name", ((*path, "ldap_endpoint_name"),))
    elif endpoint is not None and endpoint.ldapbasedn is None:
        text = "needs an endpoint with ldapbasedn: a direct bind reads no attribute"
        yield Finding(at, text, (("ldap_endpoint", rule.ldap_endpoint_name),))
    for word in ("storage_user", "storage_password", "password_passthrough", "min_pool_size"):
        if getattr(rule, word):
            yield Finding((*path, word), "excludes ldap_storage_credentials", (at,))
    if database == DEFAULT and rule.storage_db is not None:
        text = "needs a database by name where storage_db is set: the client would choose its group"
        yield Finding(at, text, ((*path, "storage_db"),))
    storage = document.storage.get(rule.storage)
    if storage is not None and (storage.host is None or storage.host.startswith(("unix://", "/"))):
        depends = ((*path, "storage"), ("storage", rule.storage))
        yield Finding(at, "needs a storage with a TCP host, which is a part of the group's name", depends)
    users: dict[str, str] = {}
    for group, one in credentials.items():
        if not group:
            yield Finding(at, "a group needs a name")
        other = users.setdefault(one.ldap_storage_username, group)
        if one.ldap_storage_password != credentials[other].ldap_storage_password:
            text = f"has the user name of {other} and another password"
            yield Finding((*at, group), text)


def _names(document: Document) -> Iterator[Finding]:
    paths: dict[KeyPath, None] = {("database", name): None for name in document.database}
    paths |= {path[:4]: None for path, *_ in rules_of(document)}
    paths |= {("storage", name): None for name in document.storage}
    paths |= {("shared_pool", name): None for name in document.shared_pool}
    for path in paths:
        name = str(path[-1])
        if not name or "\0" in name:
            yield Finding(path, "a name must not be empty or hold a zero byte")


def _rules(document: Document) -> Iterator[Finding]:
    seen: dict[tuple[object, ...], KeyPath] = {}
    for path, database, _, rule in rules_of(document):
        key = (database, *path[2:4], rule.address, rule.connection_type)
        if key in seen:
            depends = tuple((*rule_path, word) for rule_path in (path, seen[key]) for word in TOLD_APART_BY)
            text = f"has the address and connection_type of number {seen[key][-1]} of this array"
            yield Finding(path, text, depends)
        seen.setdefault(key, path)
    if not seen:
        yield Finding(("database",), "at least one rule, [database.NAME.user.NAME], is needed")


def _authentication(path: KeyPath, rule: RuleBody) -> Iterator[Finding]:
    method = rule.authentication
    at = (*path, "authentication")
    sources: tuple[str, ...] = ()
    if method is Authentication.CLEAR_TEXT:
        sources = CLEAR_TEXT_SOURCES
    elif method in (Authentication.MD5, Authentication.SCRAM_SHA_256):
        sources = ("password", "auth_query")
    if sources and not any(getattr(rule, word) for word in sources):
        yield Finding(at, f'"{method}" needs "password"', tuple((*path, word) for word in sources))
    if rule.password:
        secrets = [secret.get_secret_value() for secret in rule.password]
        for text in _unfit_secrets(method, secrets):
            yield Finding((*path, "password"), text, (at,))


def _certificate(path: KeyPath, rule: RuleBody, document: Document) -> Iterator[Finding]:
    """Where no listener verifies certificates ``cert`` would refuse everybody."""
    if rule.authentication is not Authentication.CERT:
        return
    if not any(listen.tls is not Tls.DISABLE and listen.tls_ca_file for listen in document.listen):
        text = '"cert" needs a [[listen]] with "tls" and "tls_ca_file": nobody could come in'
        yield Finding((*path, "authentication"), text, (("listen",),))


def _passthrough(path: KeyPath, user: str, rule: RuleBody, document: Document) -> Iterator[Finding]:
    if not rule.password_passthrough:
        return
    at = (*path, "password_passthrough")
    # a host-based rule may ask for the password whatever the rule's method is
    if rule.authentication not in IN_CLEAR and document.routing.hba_file is None:
        words = " or ".join(f'"{word}"' for word in IN_CLEAR)
        yield Finding(at, f"needs authentication = {words}", ((*path, "authentication"),))
    if rule.storage_password is not None:
        yield Finding(at, "excludes storage_password", ((*path, "storage_password"),))
    if rule.storage_user is not None and (user == DEFAULT or path[2] == "group"):
        text = "excludes storage_user where the rule has many users: each has another password"
        yield Finding(at, text, ((*path, "storage_user"),))


def _auth_query(path: KeyPath, rule: RuleBody, document: Document) -> Iterator[Finding]:
    at = (*path, "auth_query")
    for word in ("auth_query_db", "auth_query_user"):
        if rule.auth_query is None and getattr(rule, word) is not None:
            yield Finding((*path, word), "needs auth_query", (at,))
    if rule.auth_query is None:
        return
    try:
        compile_query(rule.auth_query)
    except ValueError as error:
        yield Finding(at, str(error))
    if not (rule.auth_query_db and rule.auth_query_user):
        yield Finding(at, "needs auth_query_db and auth_query_user")
    else:
        yield from _query_route(path, "auth_query", rule.auth_query_db, rule.auth_query_user, document)


def _query_route(
    path: KeyPath, query: str, database: str, user: str, document: Document
) -> Iterator[Finding]:
    """A query of ours needs a rule that says where it goes and as whom."""
    for rule_path, rule_database, rule_user, rule in rules_of(document):
        is_its = rule_database in (database, DEFAULT) and rule_user in (user, DEFAULT)
        is_its = is_its and rule_path[2] == "user" and not _is_local(rule, document)
        if is_its and rule.address is None and rule.connection_type is ConnectionType.DEFAULT:
            return
    text = f'there is no rule for database "{database}" and user "{user}" without address and connection_type'
    yield Finding((*path, f"{query}_db"), text, ((*path, f"{query}_user"), ("database",)))


def _outside_checks(path: KeyPath, rule: RuleBody) -> Iterator[Finding]:
    """Whoever decides about a password decides alone, and is asked at all."""
    given = [word for word in OUTSIDE if getattr(rule, word)]
    at = (*path, "authentication")
    for number, word in enumerate(given):
        if rule.authentication is not Authentication.CLEAR_TEXT:
            yield Finding((*path, word), f'needs authentication = "{Authentication.CLEAR_TEXT}"', (at,))
        for other in given[:number]:
            yield Finding((*path, word), f"excludes {other}", ((*path, other),))
        for other in ("password", "auth_query"):
            if getattr(rule, other):
                text = f"excludes {other}; what gpooler gives the server is storage_password"
                yield Finding((*path, word), text, ((*path, other),))


def _unfit_secrets(method: Authentication, secrets: Sequence[str]) -> Iterator[str]:
    """What of the passwords of a rule ``method`` could not use."""
    hashes = [secret for secret in secrets if is_md5(secret)]
    verifiers = [verifier for secret in secrets if (verifier := Verifier.parse(secret)) is not None]
    if method is Authentication.SCRAM_SHA_256 and hashes:
        yield 'is an md5 hash, which "scram-sha-256" cannot use'
    # one of these alone is no contradiction: with a verifier "md5" does SCRAM, as PostgreSQL
    if method is Authentication.MD5 and hashes and verifiers:
        yield "has md5 hashes and SCRAM verifiers: one login can try only one of the kinds"
    is_scram = method in (Authentication.MD5, Authentication.SCRAM_SHA_256)
    if is_scram and len({(verifier.salt, verifier.iterations) for verifier in verifiers}) > 1:
        yield (
            "has SCRAM verifiers of different salt or iteration count: one login can try only one of them; "
            "give plain passwords beside one verifier, or make the verifiers with one salt"
        )


def _pool(path: KeyPath, rule: RuleBody) -> Iterator[Finding]:
    size = (*path, "pool_size")
    if rule.shared_pool and rule.pool_size:
        yield Finding(size, "excludes shared_pool")
    elif rule.pool_size and rule.min_pool_size > rule.pool_size:
        yield Finding((*path, "min_pool_size"), f"is more than pool_size, {rule.pool_size}")
    if rule.pool_routing is PoolRouting.INTERNAL and rule.address is not None:
        yield Finding((*path, "pool_routing"), '"internal" needs the default address')
    if rule.pool_pin_on_listen and rule.pool is Pool.SESSION:
        yield Finding((*path, "pool_pin_on_listen"), "has no place in a session pool", ((*path, "pool"),))
    if rule.pool_smart_discard and not rule.pool_reserve_prepared_statement:
        yield Finding((*path, "pool_smart_discard"), "needs pool_reserve_prepared_statement")
    query = " ".join((rule.pool_discard_query or "").upper().replace(";", " ").split())
    for word in ("DEALLOCATE ALL", "DISCARD ALL"):
        if rule.pool_reserve_prepared_statement and word in query:
            text = f"must not {word} with pool_reserve_prepared_statement"
            yield Finding((*path, "pool_discard_query"), text)


def _console(path: KeyPath, rule: RuleBody, document: Document) -> Iterator[Finding]:
    """What a rule that leads to the console cannot have."""
    if not _is_local(rule, document):
        return
    depends = ((*path, "storage"), ("storage", rule.storage, "type"))
    for key in SERVER_OPTIONS:
        if getattr(rule, key):
            yield Finding((*path, key), "has no place where the storage is local: it has no servers", depends)
    if rule.client_max is not None:
        yield Finding((*path, "client_max"), "does not count clients of the console", depends)
    if rule.pool_routing is PoolRouting.INTERNAL:
        yield Finding((*path, "pool_routing"), '"internal" has no place where the storage is local', depends)


def _is_local(rule: RuleBody, document: Document) -> bool:
    storage = document.storage.get(rule.storage)
    return storage is not None and storage.type is StorageType.LOCAL


def _references(path: KeyPath, rule: RuleBody, document: Document, names: Names) -> Iterator[Finding]:
    for key, section, known in (
        ("storage", "storage", names.storage),
        ("shared_pool", "shared_pool", names.shared_pool),
        ("ldap_endpoint_name", "ldap_endpoint", names.ldap_endpoint),
    ):
        name = getattr(rule, key)
        if name is not None and name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            suggestion = nearest[0] if nearest else ""
            yield Finding((*path, key), f"there is no [{section}.{name}]", suggestion=suggestion)
    storage = document.storage.get(rule.storage)
    if rule.role is not None and storage is not None and storage.type is not StorageType.LOCAL:
        yield Finding((*path, "role"), "has a place only where the storage is local")


def warnings(document: Document) -> Iterator[Finding]:
    """What is allowed and has no effect, or another than one may think."""
    if document.service.online_restart_drop_options is not None:
        yield Finding(("service", "online_restart_drop_options"), "is the old name of conn_drop_options")
    logging = document.logging
    if document.service.daemonize and not (logging.log_file or logging.log_syslog):
        text = "leaves no log: it has no standard output; set log_file or log_syslog"
        yield Finding(("service", "daemonize"), text)
    elif not (logging.log_file or logging.log_to_stdout or logging.log_syslog):
        yield Finding(("logging",), "no log is written: log_file, log_to_stdout and log_syslog are all off")
    affinity, workers = parse_affinity(document.performance.cpu_affinity), document.performance.workers
    if affinity.foreign:
        text = f"gpooler has no {', '.join(affinity.foreign)}, only {', '.join(KINDS)}"
        yield Finding(("performance", "cpu_affinity"), text)
    if isinstance(workers, int) and affinity.last_worker > workers:
        text = f"there is no worker {affinity.last_worker}: workers is {workers}"
        yield Finding(("performance", "cpu_affinity"), text, (("performance", "workers"),))
    if document.metrics.http_port is None and "prometheus_host" in document.metrics.model_fields_set:
        yield Finding(("metrics", "prometheus_host"), "has no effect without prometheus_port")
    for name, storage in document.storage.items():
        if storage.host and any(endpoint.zone for endpoint in _endpoints(storage.host, storage.port)):
            yield Finding(("storage", name, "host"), "its availability zone means nothing: there is one host")
        yield from _idle_tls(("storage", name), storage)
    for number, listen in enumerate(document.listen):
        yield from _idle_tls(("listen", number), listen)
    has_tls = any(listen.tls is not Tls.DISABLE for listen in document.listen)
    for path, database, user, rule in rules_of(document):
        yield from _min_pool_size_warnings(path, database, user, rule)
        if rule.connection_type is ConnectionType.HOSTSSL and not has_tls:
            yield Finding((*path, "connection_type"), "never matches: no [[listen]] has tls")
        for key, text in _idle_options(rule):
            yield Finding((*path, key), text)
        if rule.role is None and _is_local(rule, document):
            yield Finding((*path, "role"), 'is unset: as "stat", its clients may SHOW and nothing else')


def _idle_tls(path: KeyPath, section: ListenBody | StorageBody) -> Iterator[Finding]:
    if section.tls is Tls.DISABLE:
        for key in sorted(section.model_fields_set):
            if key.startswith("tls_"):
                yield Finding((*path, key), 'has no effect while "tls" is "disable"')


def _endpoints(host: str, port: int) -> tuple[Endpoint, ...]:
    try:
        return parse_endpoints(host, port, None)
    except ValueError:
        return ()  # an error, told as such


def _min_pool_size_warnings(path: KeyPath, database: str, user: str, rule: RuleBody) -> Iterator[Finding]:
    is_open = (database == DEFAULT and not rule.storage_db) or (user == DEFAULT and not rule.storage_user)
    if rule.min_pool_size and rule.shared_pool:
        yield Finding((*path, "min_pool_size"), "is not applied in a shared pool")
    elif rule.min_pool_size and is_open:
        text = "is not applied where only the client says which database and user"
        yield Finding((*path, "min_pool_size"), text)


def _idle_options(rule: RuleBody) -> Iterator[tuple[str, str]]:
    """Options of a rule that do nothing, and why."""
    if rule.connection_type is ConnectionType.LOCAL and rule.address is not None:
        yield "address", "never matches: a client of a Unix socket has no address"
    if rule.pool_pin_on_listen and rule.session_state is not SessionState.ALLOW:
        yield "pool_pin_on_listen", "is so in any case"
    if rule.pool_client_idle_timeout and rule.pool is not Pool.SESSION:
        yield "pool_client_idle_timeout", "is for session pools; client_idle_timeout is for all"
    if rule.pool_idle_in_transaction_timeout and rule.pool is Pool.STATEMENT:
        yield "pool_idle_in_transaction_timeout", "has no effect in a statement pool"
    if rule.pool_notice_after_waiting_ms >= 0 and rule.pool is Pool.SESSION:
        yield (
            "pool_notice_after_waiting_ms",
            "has no effect in a session pool: its clients wait in their login",
        )
    if rule.pool_smart_discard and rule.pool_discard_query:
        yield "pool_smart_discard", "has no effect beside pool_discard_query"
    if not rule.maintain_params:
        for key in ("options", "application_name_add_host"):
            if getattr(rule, key):
                yield key, "has no effect where maintain_params is off"


def is_md5(secret: str) -> bool:
    """Whether a secret has PostgreSQL's md5 form."""
    return (
        len(secret) == MD5_LENGTH and secret.startswith("md5") and set(secret[3:]) <= set("0123456789abcdef")
    )
