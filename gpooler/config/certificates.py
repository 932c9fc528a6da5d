"""The files of a TLS configuration, looked at before they are used: every mistake is said at once, in words.

No session is made here and nothing of OpenSSL is kept: the master may call it before it forks.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Protocol

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from gpooler.config.checks import Finding
from gpooler.config.model import Document
from gpooler.config.problems import KeyPath
from gpooler.config.words import Tls

# Names that ``tls_protocols`` takes, oldest first.
VERSIONS: Final = ("tlsv1.0", "tlsv1.1", "tlsv1.2", "tlsv1.3")
ALIASES: Final = {"tlsv1": ("tlsv1.0",), "secure": VERSIONS[2:], "all": VERSIONS, "legacy": VERSIONS}
SECURE: Final = VERSIONS[2:]
EXPIRES_SOON: Final = timedelta(days=30)


class TlsOptions(Protocol):
    """What a listener and a storage have in common."""

    @property
    def tls(self) -> Tls: ...
    @property
    def tls_ca_file(self) -> str | None: ...
    @property
    def tls_key_file(self) -> str | None: ...
    @property
    def tls_cert_file(self) -> str | None: ...
    @property
    def tls_crl_file(self) -> str | None: ...
    @property
    def tls_protocols(self) -> str | None: ...
    @property
    def tls_ciphers(self) -> str | None: ...
    @property
    def tls_ciphersuites(self) -> str | None: ...


def findings(document: Document) -> tuple[list[Finding], list[Finding]]:
    """Errors and warnings about the files that a configuration names. Reads them."""
    sections: list[tuple[KeyPath, TlsOptions]] = [
        *((("listen", number), listen) for number, listen in enumerate(document.listen)),
        *((("storage", name), storage) for name, storage in document.storage.items()),
    ]
    used = [(path, section) for path, section in sections if section.tls is not Tls.DISABLE]
    return (
        [Finding((*path, key), text) for path, section in used for key, text in errors(section)],
        [Finding((*path, key), text) for path, section in used for key, text in warnings(section)],
    )


def parse_protocols(text: str | None) -> tuple[str, ...]:
    """The versions of TLS that ``tls_protocols`` names, oldest first; unset: those that are secure.

    Names stand apart by commas, colons or spaces. Raises ValueError for an unknown name and for a gap:
    OpenSSL knows the oldest and the newest version only.
    """
    if text is None:
        return SECURE
    words = text.lower().replace(",", " ").replace(":", " ").split()
    named: set[str] = set()
    for word in words:
        found = ALIASES.get(word, (word,))
        if not set(found) <= set(VERSIONS):
            raise ValueError(f'unknown TLS version "{word}"; known: {", ".join(VERSIONS)}, secure, all')
        named.update(found)
    if not named:
        raise ValueError("names no TLS version")
    result = tuple(version for version in VERSIONS if version in named)
    if VERSIONS[VERSIONS.index(result[0]) : VERSIONS.index(result[-1]) + 1] != result:
        raise ValueError("has a gap between its versions")
    return result


def read_certificates(path: str) -> list[x509.Certificate]:
    """The certificates of a PEM file. Raises ValueError with what is wrong with it."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    try:
        found = x509.load_pem_x509_certificates(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError("holds no certificate in PEM") from error
    return found


def errors(options: TlsOptions, now: datetime | None = None) -> Iterator[tuple[str, str]]:
    """What makes the files of ``options`` unusable, as pairs of option and text."""
    now = now or datetime.now(UTC)
    certificate = None
    if options.tls_cert_file is not None:
        try:
            certificate = read_certificates(options.tls_cert_file)[0]
        except ValueError as error:
            yield "tls_cert_file", str(error)
        else:
            if certificate.not_valid_after_utc < now:
                yield "tls_cert_file", f"has expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
            elif certificate.not_valid_before_utc > now:
                yield "tls_cert_file", f"is not valid before {certificate.not_valid_before_utc:%Y-%m-%d} UTC"
    if options.tls_key_file is not None:
        yield from _key_errors(options.tls_key_file, certificate)
    if options.tls_ca_file is not None:
        try:
            read_certificates(options.tls_ca_file)
        except ValueError as error:
            yield "tls_ca_file", str(error)
    if options.tls_crl_file is not None:
        try:
            read_revoked(options.tls_crl_file)
        except ValueError as error:
            yield "tls_crl_file", str(error)
    try:
        parse_protocols(options.tls_protocols)
    except ValueError as error:
        yield "tls_protocols", str(error)


def read_revoked(path: str) -> list[x509.CertificateRevocationList]:
    """The revocation lists of a PEM file. Raises ValueError with what is wrong with it."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    begin, end = b"-----BEGIN X509 CRL-----", b"-----END X509 CRL-----"
    try:
        lists = [
            x509.load_pem_x509_crl(begin + part.partition(end)[0] + end + b"\n")
            for part in data.split(begin)[1:]
        ]
    except ValueError as error:
        raise ValueError("holds a broken revocation list") from error
    if not lists:
        raise ValueError("holds no revocation list in PEM")
    return lists


def _key_errors(path: str, certificate: x509.Certificate | None) -> Iterator[tuple[str, str]]:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        yield "tls_key_file", f"cannot be read: {error.strerror}"
        return
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError:
        yield "tls_key_file", "is encrypted: gpooler cannot ask for its passphrase"
        return
    except (ValueError, UnsupportedAlgorithm):
        yield "tls_key_file", "holds no private key in PEM"
        return
    if certificate is not None:
        form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if key.public_key().public_bytes(*form) != certificate.public_key().public_bytes(*form):
            yield "tls_key_file", 'does not fit the certificate in "tls_cert_file"'


def warnings(options: TlsOptions, now: datetime | None = None) -> Iterator[tuple[str, str]]:
    """What will soon make them unusable."""
    if options.tls_cert_file is None:
        return
    now = now or datetime.now(UTC)
    try:
        certificate = read_certificates(options.tls_cert_file)[0]
    except ValueError:
        return
    left = certificate.not_valid_after_utc - now
    if timedelta() <= left < EXPIRES_SOON:
        yield "tls_cert_file", f"expires in {left.days} days, on {certificate.not_valid_after_utc:%Y-%m-%d}"
