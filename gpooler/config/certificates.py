"""The TLS options of a configuration, looked at before they are used: every mistake said at once, in words.

No session is made here and nothing of OpenSSL is kept: the master may call it before it forks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from OpenSSL import SSL

from gpooler.config.checks import Finding
from gpooler.config.model import Config, Document
from gpooler.config.problems import KeyPath
from gpooler.config.words import Tls

# Names that ``tls_protocols`` takes, oldest first.
VERSIONS: Final = ("tlsv1.0", "tlsv1.1", "tlsv1.2", "tlsv1.3")
ALIASES: Final = {"tlsv1": ("tlsv1.0",), "secure": VERSIONS[2:], "all": VERSIONS, "legacy": VERSIONS}
SECURE: Final = VERSIONS[2:]
EXPIRES_SOON: Final = timedelta(days=30)
CERTIFICATE: Final = "tls_cert_file"
AUTHORITIES: Final = "tls_ca_file"


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
    data = _read(path)
    try:
        return x509.load_pem_x509_certificates(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError("holds no certificate in PEM") from error


def read_revoked(path: str) -> list[x509.CertificateRevocationList]:
    """The revocation lists of a PEM file. Raises ValueError with what is wrong with it."""
    data = _read(path)
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


def errors(options: TlsOptions, now: datetime | None = None) -> Iterator[tuple[str, str]]:
    """What makes ``options`` unusable, as pairs of option and text."""
    checks: tuple[tuple[str, Callable[[str], object]], ...] = (
        ("tls_cert_file", lambda path: _check_dates(path, now or datetime.now(UTC))),
        ("tls_key_file", lambda path: _check_key(path, options.tls_cert_file)),
        ("tls_ca_file", read_certificates),
        ("tls_crl_file", read_revoked),
        ("tls_protocols", parse_protocols),
        ("tls_ciphers", _check_ciphers),
        ("tls_ciphersuites", _check_ciphersuites),
    )
    for key, check in checks:
        value = getattr(options, key)
        if value is not None:
            try:
                check(value)
            except ValueError as error:
                yield key, str(error)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error


def _check_dates(path: str, now: datetime) -> None:
    certificate = read_certificates(path)[0]
    if certificate.not_valid_after_utc < now:
        raise ValueError(f"has expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    if certificate.not_valid_before_utc > now:
        raise ValueError(f"is not valid before {certificate.not_valid_before_utc:%Y-%m-%d} UTC")


def _check_key(path: str, certificate_path: str | None) -> None:
    data = _read(path)
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError:
        raise ValueError("is encrypted: gpooler cannot ask for its passphrase") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("holds no private key in PEM") from None
    if certificate_path is None:
        return
    try:
        certificate = read_certificates(certificate_path)[0]
    except ValueError:
        return  # told of the certificate
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if key.public_key().public_bytes(*form) != certificate.public_key().public_bytes(*form):
        raise ValueError('does not fit the certificate in "tls_cert_file"')


def _check_ciphers(names: str) -> None:
    try:
        SSL.Context(SSL.TLS_METHOD).set_cipher_list(names.encode())
    except SSL.Error as error:
        raise ValueError("names no cipher suite that OpenSSL knows") from error


def _check_ciphersuites(names: str) -> None:
    try:
        SSL.Context(SSL.TLS_METHOD).set_tls13_ciphersuites(names.encode())
    except SSL.Error as error:
        raise ValueError("names a cipher suite of TLS 1.3 that OpenSSL does not know") from error


def warnings(options: TlsOptions, now: datetime | None = None) -> Iterator[tuple[str, str]]:
    """What will soon make them unusable."""
    now = now or datetime.now(UTC)
    for option in (CERTIFICATE, AUTHORITIES):
        end = _end(option, getattr(options, option))
        if end is not None and end - now < EXPIRES_SOON:
            yield option, _end_text(end, now)


@dataclass(frozen=True, slots=True)
class Expiry:
    """When a file that the configuration names is good no more."""

    section: str  # listen, storage, ldap_endpoint
    name: str  # of a listener HOST:PORT
    option: str  # tls_cert_file, tls_ca_file
    path: str
    end: datetime
    days_left: float  # negative when it has expired

    @property
    def is_soon(self) -> bool:
        """Whether it is worth a warning."""
        return timedelta(days=self.days_left) < EXPIRES_SOON


def expiries(config: Config, now: datetime | None = None) -> Iterator[Expiry]:
    """The end of every certificate file in use: of a chain the first, of authorities the last of their ends.

    Reads the files each time, so that a renewed one is seen; one that cannot be read is left out.
    """
    now = now or datetime.now(UTC)
    for section, name, option, path in _files(config):
        end = _end(option, path)
        if path is not None and end is not None:
            yield Expiry(section, name, option, path, end, (end - now) / timedelta(days=1))


def expiry_warnings(config: Config, now: datetime | None = None) -> Iterator[str]:
    """Lines for the log about what has expired or will soon."""
    now = now or datetime.now(UTC)
    for one in expiries(config, now):
        if one.is_soon:
            yield f'{one.option} of {one.section} "{one.name}", {one.path}: {_end_text(one.end, now)}'


def _files(config: Config) -> Iterator[tuple[str, str, str, str | None]]:
    """Section, name, option and path."""
    for listen in config.listen:
        if listen.tls is not Tls.DISABLE:
            name = f"{listen.host}:{listen.port}"
            yield "listen", name, CERTIFICATE, listen.tls_cert_file
            yield "listen", name, AUTHORITIES, listen.tls_ca_file
    for name, storage in config.storage.items():
        if storage.tls is not Tls.DISABLE:
            yield "storage", name, CERTIFICATE, storage.tls_cert_file
            yield "storage", name, AUTHORITIES, storage.tls_ca_file
    for name, endpoint in config.ldap_endpoint.items():
        yield "ldap_endpoint", name, AUTHORITIES, endpoint.tls_ca_file


def _end(option: str, path: str | None) -> datetime | None:
    """An old authority may stand beside its successor; None where the file cannot be read."""
    try:
        ends = [one.not_valid_after_utc for one in read_certificates(path)] if path else []
    except ValueError:
        return None
    return (max if option == AUTHORITIES else min)(ends, default=None)


def _end_text(end: datetime, now: datetime) -> str:
    verb = "has expired" if end < now else f"expires in {(end - now).days} days,"
    return f"{verb} on {end:%Y-%m-%d}"
