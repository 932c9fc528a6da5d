"""TLS for the targets: gpooler's side of a listener, and a peer that is none of gpooler's code."""

from pathlib import Path
from tempfile import TemporaryDirectory

import trustme
from cryptography.hazmat.primitives.hashes import SHA256
from OpenSSL import SSL

from gpooler.config.model import Listen
from gpooler.config.words import Tls, TlsRecords
from gpooler.net.tls import ALPN, Acceptor

AUTHORITY = trustme.CA()
MEMBER = AUTHORITY.issue_cert(common_name="member")


def write_files(directory: Path) -> dict[str, str]:
    """The options of a listener that asks for no certificate, and takes one."""
    server = AUTHORITY.issue_cert("localhost")
    files = {name: str(directory / name) for name in ("tls_ca_file", "tls_cert_file", "tls_key_file")}
    AUTHORITY.cert_pem.write_to_path(files["tls_ca_file"])
    server.cert_chain_pems[0].write_to_path(files["tls_cert_file"])
    server.private_key_pem.write_to_path(files["tls_key_file"])
    return files


def acceptor(records: TlsRecords = TlsRecords.GPOOLER) -> Acceptor:
    """gpooler's side."""
    with TemporaryDirectory() as directory:
        return Acceptor(Listen(host="127.0.0.1", tls=Tls.PREFER, **write_files(Path(directory))), records)


def peer_context(is_1_3: bool, is_member: bool) -> SSL.Context:
    """The peer's: a version of TLS, with or without a certificate."""
    context = SSL.Context(SSL.TLS_METHOD)
    version = SSL.TLS1_3_VERSION if is_1_3 else SSL.TLS1_2_VERSION
    context.set_min_proto_version(version)
    context.set_max_proto_version(version)
    context.set_alpn_protos([ALPN])
    if is_member:
        MEMBER.configure_cert(context)
    return context


class Peer:
    """A client over memory. What goes wrong here is the end of it, and no fault."""

    def __init__(self, context: SSL.Context) -> None:
        self._connection = SSL.Connection(context, None)
        self._connection.set_connect_state()
        self.is_secured = False
        self.is_over = False
        self._is_closing = False
        self.received = b""

    def take(self) -> bytes:
        """What it sends."""
        result = b""
        while True:
            try:
                result += self._connection.bio_read(65536)
            except SSL.Error:
                return result

    def put(self, data: bytes) -> None:
        """What it is sent; goes on as far as that allows."""
        self._connection.bio_write(data)
        self.go_on()

    def go_on(self) -> None:
        """The handshake, then what there is to read."""
        if self.is_over:
            return
        try:
            if not self.is_secured:
                self._connection.do_handshake()
                self.is_secured = True
            while True:
                self.received += self._connection.recv(65536)
        except SSL.WantReadError:
            pass
        except SSL.Error:
            self.is_over = True

    def binding(self) -> bytes | None:
        """tls-server-end-point; None as long as there is no session."""
        certificate = self._connection.get_peer_certificate(as_cryptography=True)
        return None if certificate is None else certificate.fingerprint(SHA256())

    def write(self, data: bytes) -> bool:
        """Encrypt; whether it could."""
        if not self.is_secured or self.is_over:
            return False
        try:
            self._connection.sendall(data)
        except SSL.Error:
            self.is_over = True
        return not self.is_over

    def renegotiate(self) -> None:
        """Ask for a new handshake, which nobody is to grant; TLS 1.3 has none."""
        if self.is_secured and not self.is_over:
            try:
                self._connection.renegotiate()
                self._connection.do_handshake()
            except SSL.WantReadError:
                pass
            except SSL.Error:
                self.is_over = True

    def close(self) -> bool:
        """A close_notify, once; whether it could."""
        if not self.is_secured or self.is_over or self._is_closing:
            return False
        self._is_closing = True
        try:
            self._connection.shutdown()
        except SSL.Error:
            self.is_over = True
        return not self.is_over
