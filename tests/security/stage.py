"""What the matrix is played on: two PostgreSQLs, a directory, PAM, an agent, one gpooler before them all."""

import hashlib
import os
import pwd
import re
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from tests.harness import PASSWORD, Gpooler, Postgres, Unavailable, free_port
from tests.harness.agent import Agent
from tests.harness.certificates import Certificates
from tests.harness.pam import PamService
from tests.harness.slapd import BASE, Slapd, person, unit
from tests.security.cells import LISTENERS, OFFERS, UNIX, Cell, Method, Server

USERS: Final = {method: "by_" + re.sub(r"\W+", "_", method.lower()) for method in Method}
USERS[Method.PEER] = pwd.getpwuid(os.geteuid()).pw_name
STRANGER: Final = "by_peer"  # no user of the system
SERVER_USERS: Final = {
    Server.TRUST: "trust_user",
    Server.PASSWORD: "password_user",
    Server.MD5: "md5_user",
    Server.MD5_HASH: "md5_user",
    Server.SCRAM: "scram_user",
    Server.CERT: "cert_user",
}
# The database says how its clients may come.
HBA: Final = (
    "local all all trust\nhost all postgres 127.0.0.1/32 trust\n"
    + "".join(
        f"{kind} {kind} {user} 127.0.0.1/32 {method}\n"
        for kind in OFFERS[1:]
        for user, method in (
            ("trust_user", "trust"),
            ("password_user", "password"),
            ("md5_user", "md5"),
            ("scram_user,+keyed", "scram-sha-256"),
        )
    )
    + "".join(f"hostssl {kind} cert_user 127.0.0.1/32 cert\n" for kind in ("host", "hostssl"))
)
MODULE: Final = (
    f"def check(user, database, address, password):\n    return password == {PASSWORD.encode()!r}\n"
)
PAM_SCRIPT: Final = f"""#!/bin/sh
password=$(tr -d '\\0')
[ "$password" = "{PASSWORD}" ]
"""
HOST_RULES: Final = """
host  all by_reject all reject
local all by_reject     reject
host  all all       all allow
local all all           allow
"""


class Stage:
    """Everything that ``cells`` need; a context manager. ``missing`` says why a method is not tried here."""

    def __init__(self, cells: Iterable[Cell]) -> None:
        self._cells = list(cells)
        self._stack = ExitStack()
        self.missing: dict[Method, str] = {}
        self.ports = {listener: free_port() for listener in LISTENERS}

    def __enter__(self) -> "Stage":
        with self._stack:
            self.directory = Path(tempfile.mkdtemp(prefix="gpooler-matrix-"))
            self._stack.callback(shutil.rmtree, self.directory)
            self.directory.chmod(0o755)
            self.files = Certificates(self.directory)
            self._clusters = {has_tls: self._cluster(has_tls) for has_tls in (True, False)}
            self._secrets = self._make_roles()
            self._checks = self._outside_checks()
            config = self._config()
            environment = {"PYTHONPATH": str(self.directory)}
            port = self.ports[LISTENERS[0]]
            self.gpooler = Gpooler(self._clusters[True], config=config, environment=environment, port=port)
            self._stack.enter_context(self.gpooler)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _cluster(self, has_tls: bool) -> Postgres:
        cluster = Postgres(15, hba=HBA)
        if has_tls:
            cluster.settings |= {
                "ssl": "on",
                "ssl_cert_file": cluster.own(self.files.pem("server"), "server.pem"),
                "ssl_key_file": cluster.own(self.files.key("server"), "server.key"),
                "ssl_ca_file": cluster.own(self.files.pem("ca"), "ca.pem"),
            }
        self._stack.enter_context(cluster)
        for kind in OFFERS[1:]:
            cluster.query(f"CREATE DATABASE {kind}")
        return cluster

    def _make_roles(self) -> dict[str, str]:
        """The roles of clients, with one verifier in both clusters; the stored secrets, by name."""
        sql = "SELECT rolname, rolpassword FROM pg_authid WHERE rolname IN ('md5_user', 'scram_user')"
        secrets = {str(name): str(secret) for name, secret in self._clusters[True].query(sql)}
        for cluster in self._clusters.values():
            cluster.query(f"CREATE ROLE keyed; CREATE ROLE cert_user LOGIN PASSWORD '{PASSWORD}'")
            for user in (*USERS.values(), STRANGER):
                verifier = secrets["scram_user"]
                cluster.query(f"CREATE ROLE \"{user}\" LOGIN IN ROLE keyed PASSWORD '{verifier}'")
        return secrets

    def _outside_checks(self) -> dict[Method, dict[str, Any]]:
        """Options of the rules where others decide."""
        (self.directory / "module_of_the_matrix.py").write_text(MODULE)
        found: dict[Method, dict[str, Any]] = {Method.MODULE: {"auth_module": "module_of_the_matrix:check"}}
        self._agent = self._stack.enter_context(Agent(self.directory / "agent"))
        script = self.directory / "pam"
        script.write_text(PAM_SCRIPT)
        script.chmod(0o755)
        try:
            auth = f"auth required pam_exec.so expose_authtok quiet {script}"
            service = PamService(auth, "account required pam_permit.so")
            self._stack.callback(service.close)
            found[Method.PAM] = {"auth_pam_service": service.name}
        except Unavailable as error:
            self.missing[Method.PAM] = str(error)
        try:
            self._slapd = self._stack.enter_context(
                Slapd(unit("people") + person("ou=people", USERS[Method.LDAP], PASSWORD))
            )
            found[Method.LDAP] = {"ldap_endpoint_name": "directory"}
        except Unavailable as error:
            self.missing[Method.LDAP] = str(error)
        return found

    def _config(self) -> dict[str, Any]:
        (self.directory / "hba.conf").write_text(HOST_RULES)
        config: dict[str, Any] = {
            "service": {"unix_socket_dir": str(self.directory), "unix_socket_mode": "0666"},
            "routing": {
                "hba_file": str(self.directory / "hba.conf"),
                "external_auth_socket_path": str(self._agent.path),
            },
            "listen": [self._listener(mode) for mode in LISTENERS],
            "storage": {
                name: self._storage(cell.storage, cell.offer != "off")
                for cell in self._cells
                for name in [storage_name(cell)]
            },
            "database": {"default": None, "asking": {"user": {"asker": self._asker()}}},
        }
        config["storage"]["postgres"] = self._storage("disable", True)
        if Method.LDAP in self._checks:
            endpoint = {
                "ldapserver": self._slapd.host,
                "ldapport": self._slapd.port,
                "ldapprefix": "uid=",
                "ldapsuffix": f",ou=people,{BASE}",
            }
            config["ldap_endpoint"] = {"directory": endpoint}
        for cell in self._cells:
            if cell.method not in self.missing:
                users = config["database"].setdefault(database(cell), {"user": {}})["user"]
                users[USERS[cell.method]] = rule = self._rule(cell)
                if cell.method is Method.PEER:
                    users[STRANGER] = rule
        return config

    def _listener(self, mode: str) -> dict[str, Any]:
        if mode == UNIX:
            return {"port": self.ports[mode]}
        tls = {"tls": mode}
        if mode != "disable":
            tls = self.files.options("server", mode, tls_ca_file=self.files.pem("ca"))
        return {"host": "127.0.0.1", "port": self.ports[mode], **tls}

    def _storage(self, mode: str, has_tls: bool) -> dict[str, Any]:
        cluster = self._clusters[has_tls]
        found = {"type": "remote", "host": cluster.host, "port": cluster.port, "tls": mode}
        if mode != "disable":
            found |= self.files.options("cert_user", mode)
        if mode.startswith("verify"):
            found["tls_ca_file"] = self.files.pem("ca")
        return found

    @staticmethod
    def _asker() -> dict[str, Any]:
        return {
            "authentication": "block",
            "storage": "postgres",
            "storage_db": "host",
            "storage_user": "postgres",
            "pool": "session",
            "pool_routing": "internal",
        }

    def _rule(self, cell: Cell) -> dict[str, Any]:
        rule: dict[str, Any] = {
            "storage": storage_name(cell),
            "storage_db": "host" if cell.offer == "off" else cell.offer,
            "pool": "transaction",
            "pool_size": 2,
            "pool_ttl": 2,
        }
        method = cell.method
        if (user := SERVER_USERS.get(cell.server)) is not None:
            rule["storage_user"] = user
        if cell.server is Server.MD5_HASH:
            rule["storage_password"] = self._secrets["md5_user"]
        elif cell.server is not Server.SCRAM_KEYS:
            rule["storage_password"] = PASSWORD
        match method:
            case Method.NONE | Method.BLOCK | Method.EXTERNAL | Method.PEER:
                return {**rule, "authentication": str(method)}
            case Method.CERT:
                return {**rule, "authentication": "cert", "auth_common_name": ["cert_user"]}
            case Method.MODULE | Method.PAM | Method.LDAP:
                return {**rule, "authentication": "clear_text", **self._checks[method]}
            case Method.AUTH_QUERY:
                query = {
                    "auth_query": "SELECT usename, passwd FROM pg_shadow WHERE usename = $1",
                    "auth_query_db": "asking",
                    "auth_query_user": "asker",
                }
                return {**rule, "authentication": "md5", **query}
            case Method.MD5:
                digest = hashlib.md5((PASSWORD + USERS[method]).encode()).hexdigest()
                return {**rule, "authentication": "md5", "password": f"md5{digest}"}
        kind = "clear_text" if method is Method.CLEAR_TEXT else "scram-sha-256"
        return {**rule, "authentication": kind, "password": self._secrets["scram_user"]}


def storage_name(cell: Cell) -> str:
    """The storage of a cell."""
    return f"{cell.storage} {'off' if cell.offer == 'off' else 'on'}"


def database(cell: Cell) -> str:
    """The database that the cell's client asks for: a name for what is behind it."""
    return f"{cell.server} {cell.storage} {cell.offer}"
