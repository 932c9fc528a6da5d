"""Certificates for tests: an authority, what it has signed, well and badly, and a stranger."""

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization


class Certificates:
    """Files in a directory: ``NAME.pem`` with the chain, ``NAME.key`` with the private key.

    ``ca.pem`` is the authority, ``crl.pem`` what it has revoked, ``stranger.pem`` an authority nobody trusts.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ca = trustme.CA()
        self._ca.cert_pem.write_to_path(str(directory / "ca.pem"))
        stranger = trustme.CA()
        stranger.cert_pem.write_to_path(str(directory / "stranger.pem"))
        now = datetime.now(UTC)
        self._keep("server", self._ca.issue_cert("localhost", "127.0.0.1"))
        self._keep("rsa", self._ca.issue_cert("localhost", "127.0.0.1", key_type=trustme.KeyType.RSA))
        self._keep("other_host", self._ca.issue_cert("elsewhere.example"))
        self._keep("expired", self._ca.issue_cert("localhost", not_after=now - timedelta(days=1)))
        self._keep("ending", self._ca.issue_cert("localhost", not_after=now + timedelta(days=5)))
        self._keep("chained", self._ca.create_child_ca().issue_cert("localhost", "127.0.0.1"))
        self._keep("foreign", stranger.issue_cert("localhost", "127.0.0.1"))
        # (Java reads no certificate whose list of names is empty)
        self._keep("cert_user", self._ca.issue_cert("user@example.com", common_name="cert_user"))
        self._keep("other_user", self._ca.issue_cert(common_name="other_user"))
        self._keep("foreign_user", stranger.issue_cert(common_name="cert_user"))
        revoked = self._ca.issue_cert("localhost", "127.0.0.1", common_name="cert_user")
        self._keep("revoked", revoked)
        self._write_crl(revoked)

    def pem(self, name: str) -> str:
        """The path of a certificate."""
        return str(self.directory / f"{name}.pem")

    def key(self, name: str) -> str:
        """The path of its key."""
        return str(self.directory / f"{name}.key")

    def options(self, name: str, mode: str, **others: str) -> dict[str, str]:
        """TLS options of a listener or a storage."""
        return {"tls": mode, "tls_cert_file": self.pem(name), "tls_key_file": self.key(name), **others}

    def client(self, name: str | None = None, alpn: str | None = None) -> ssl.SSLContext:
        """A client that trusts the authority, with a certificate of its own if wanted."""
        context = ssl.create_default_context(cafile=self.pem("ca"))
        if name is not None:
            context.load_cert_chain(self.pem(name), self.key(name))
        if alpn is not None:
            context.set_alpn_protocols([alpn])
        return context

    def _keep(self, name: str, leaf: trustme.LeafCert) -> None:
        (self.directory / f"{name}.pem").write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        key = self.directory / f"{name}.key"
        key.touch(mode=0o600)
        key.write_bytes(leaf.private_key_pem.bytes())

    def _write_crl(self, leaf: trustme.LeafCert) -> None:
        now = datetime.now(UTC)
        authority = x509.load_pem_x509_certificate(self._ca.cert_pem.bytes())
        key = serialization.load_pem_private_key(self._ca.private_key_pem.bytes(), None)
        number = x509.load_pem_x509_certificate(leaf.cert_chain_pems[0].bytes()).serial_number
        revoked = x509.RevokedCertificateBuilder().serial_number(number).revocation_date(now).build()
        crl = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(authority.subject)
            .last_update(now - timedelta(hours=1))
            .next_update(now + timedelta(days=1))
            .add_revoked_certificate(revoked)
            .sign(key, hashes.SHA256())  # type: ignore[arg-type]
        )
        (self.directory / "crl.pem").write_bytes(crl.public_bytes(serialization.Encoding.PEM))
