"""OpenLDAP's slapd on ports of this machine, as an unprivileged user, with entries of our choice."""

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final

import trustme

from tests.harness.tools import (
    Unavailable,
    as_account,
    eventually,
    find_program,
    free_port,
    unprivileged_account,
)

SCHEMAS: Final = Path("/etc/ldap/schema")
MODULES: Final = Path("/usr/lib/ldap")
BASE: Final = "dc=example,dc=org"
SEARCHER: Final = f"cn=searcher,{BASE}"
SEARCHER_PASSWORD: Final = "searcher-secret"
ADMIN: Final = f"cn=admin,{BASE}"
ADMIN_PASSWORD: Final = "admin-secret"
STOP_TIMEOUT_S: Final = 10

CONFIGURATION: Final = """
include {schemas}/core.schema
include {schemas}/cosine.schema
include {schemas}/inetorgperson.schema
modulepath {modules}
moduleload back_mdb
TLSCACertificateFile {directory}/ca.pem
TLSCertificateFile {directory}/server.pem
TLSCertificateKeyFile {directory}/server.key
database mdb
maxsize 16777216
suffix "{base}"
rootdn "{admin}"
rootpw {admin_password}
directory {directory}/data
access to attrs=userPassword by anonymous auth by * none
access to * by dn.exact="{searcher}" read by * none
"""


class Slapd:
    """One running slapd. ``entries`` is LDIF below BASE; ``searcher`` alone may search."""

    def __init__(self, entries: str) -> None:
        """Raises Unavailable."""
        self._program = find_program("slapd")
        if not SCHEMAS.is_dir() or not MODULES.is_dir():
            raise Unavailable("the files of Debian's package slapd are missing")
        self.host = "127.0.0.1"
        self.port = free_port()
        self.tls_port = free_port()
        self._account = as_account(unprivileged_account())
        self._directory = Path(tempfile.mkdtemp(prefix="gpooler-slapd-"))
        self._process: subprocess.Popen[bytes] | None = None
        self.ca_file = self._directory / "ca.pem"
        self.other_ca_file = self._directory / "other-ca.pem"
        self._entries = entries

    def __enter__(self) -> "Slapd":
        try:
            self._prepare()
            self.start()
        except BaseException:
            self.destroy()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()

    def start(self) -> None:
        """Start and wait until it listens."""
        urls = f"ldap://{self.host}:{self.port}/ ldaps://{self.host}:{self.tls_port}/"
        log = (self._directory / "log").open("ab")
        with log:
            # with -d it does not fork
            self._process = subprocess.Popen(
                [self._program, "-d", "stats", "-f", str(self._directory / "slapd.conf"), "-h", urls],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", **self._account,
            )  # fmt: skip
        try:
            eventually(self._listens, within=20)
        except AssertionError:
            raise AssertionError(f"slapd does not start:\n{self.log()}") from None

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._process is not None

    def stop(self) -> None:
        """Stop it; it can be started again."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def destroy(self) -> None:
        """Stop it and remove every file."""
        self.stop()
        shutil.rmtree(self._directory)

    def log(self) -> str:
        """What it logged: every connection and operation."""
        return (self._directory / "log").read_text(errors="replace")

    def binds(self) -> int:
        """How often somebody tried to log in: the first thing that gpooler asks for."""
        return self.log().count(" BIND dn")

    def _prepare(self) -> None:
        ca, other = trustme.CA(), trustme.CA()
        ca.cert_pem.write_to_path(str(self.ca_file))
        other.cert_pem.write_to_path(str(self.other_ca_file))
        certificate = ca.issue_cert(self.host)
        certificate.private_key_pem.write_to_path(str(self._directory / "server.key"))
        certificate.cert_chain_pems[0].write_to_path(str(self._directory / "server.pem"))
        (self._directory / "data").mkdir()
        (self._directory / "log").touch()
        configuration = self._directory / "slapd.conf"
        configuration.write_text(
            CONFIGURATION.format(
                schemas=SCHEMAS, modules=MODULES, directory=self._directory, base=BASE, searcher=SEARCHER,
                admin=ADMIN, admin_password=ADMIN_PASSWORD,
            )
        )  # fmt: skip
        if account := self._account:
            for path in (self._directory, *self._directory.iterdir()):
                os.chown(path, account["user"], account["group"])
        found = subprocess.run(
            [find_program("slapadd"), "-q", "-f", str(configuration)],
            input=root_entries() + self._entries,
            text=True,
            capture_output=True,
            check=False,
            **self._account,
        )
        assert found.returncode == 0, found.stderr
        self._directory.chmod(0o755)  # gpooler reads the CA

    def _listens(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"slapd ended:\n{self.log()}")
        for port in (self.port, self.tls_port):
            try:
                socket.create_connection((self.host, port), 5).close()
            except OSError:
                return False
        return True


def root_entries() -> str:
    """The base, and who may search."""
    return f"""dn: {BASE}
objectClass: dcObject
objectClass: organization
o: Example
dc: example

dn: {SEARCHER}
objectClass: organizationalRole
objectClass: simpleSecurityObject
cn: searcher
userPassword: {SEARCHER_PASSWORD}

"""


def person(parent: str, uid: str, password: str | None, **attributes: str | list[str]) -> str:
    """LDIF of one person below ``parent,BASE``; ``uid`` is escaped for the DN by its hexadecimal codes."""
    rdn = "".join(c if c.isalnum() else "".join(f"\\{b:02x}" for b in c.encode()) for c in uid)
    lines = [f"dn: uid={rdn},{parent},{BASE}", "objectClass: inetOrgPerson", f"uid: {uid}", "cn: x", "sn: x"]
    if password is not None:
        lines.append(f"userPassword: {password}")
    for name, values in attributes.items():
        lines += [f"{name}: {value}" for value in ([values] if isinstance(values, str) else values)]
    return "\n".join(lines) + "\n\n"


def unit(name: str) -> str:
    """LDIF of one organizational unit below BASE."""
    return f"dn: ou={name},{BASE}\nobjectClass: organizationalUnit\nou: {name}\n\n"
