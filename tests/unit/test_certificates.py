"""The files of a TLS configuration: each mistake has its own words."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography import x509

from gpooler.config import certificates
from gpooler.config.load import load_text
from gpooler.config.words import Tls
from gpooler.log import Logger, compile_format
from gpooler.net.tls import end_point, is_named
from gpooler.process.broker import warn_daily
from tests.harness.certificates import Certificates


@dataclass(frozen=True)
class Options:
    """Of a listener or a storage."""

    tls: Tls = Tls.REQUIRE
    tls_ca_file: str | None = None
    tls_key_file: str | None = None
    tls_cert_file: str | None = None
    tls_crl_file: str | None = None
    tls_protocols: str | None = None
    tls_ciphers: str | None = None
    tls_ciphersuites: str | None = None


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def good(files: Certificates) -> Options:
    return Options(
        tls_cert_file=files.pem("server"),
        tls_key_file=files.key("server"),
        tls_ca_file=files.pem("ca"),
        tls_crl_file=files.pem("crl"),
        tls_protocols="tlsv1.2,tlsv1.3",
        tls_ciphers="HIGH:!aNULL",
        tls_ciphersuites="TLS_AES_128_GCM_SHA256",
    )


def test_good_files_have_no_mistake(good: Options) -> None:
    assert list(certificates.errors(good)) == []
    assert list(certificates.warnings(good)) == []


def test_every_mistake_has_its_own_words(good: Options, files: Certificates, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    cases: list[tuple[dict[str, str], str, str]] = [
        ({"tls_cert_file": str(tmp_path / "none")}, "tls_cert_file", "cannot be read: No such file"),
        ({"tls_cert_file": str(empty)}, "tls_cert_file", "holds no certificate in PEM"),
        ({"tls_cert_file": files.key("server")}, "tls_cert_file", "holds no certificate in PEM"),
        ({"tls_key_file": str(tmp_path)}, "tls_key_file", "cannot be read: Is a directory"),
        ({"tls_key_file": files.pem("server")}, "tls_key_file", "holds no private key in PEM"),
        ({"tls_key_file": files.key("rsa")}, "tls_key_file", "does not fit the certificate"),
        ({"tls_ca_file": str(empty)}, "tls_ca_file", "holds no certificate in PEM"),
        ({"tls_crl_file": files.pem("ca")}, "tls_crl_file", "holds no revocation list in PEM"),
        ({"tls_protocols": "sslv3"}, "tls_protocols", 'unknown TLS version "sslv3"'),
        ({"tls_protocols": "tlsv1.1 tlsv1.3"}, "tls_protocols", "has a gap"),
        ({"tls_protocols": " , "}, "tls_protocols", "names no TLS version"),
        ({"tls_ciphers": "nonsense"}, "tls_ciphers", "names no cipher suite that OpenSSL knows"),
        ({"tls_ciphersuites": "TLS_NONSENSE"}, "tls_ciphersuites", "names a cipher suite of TLS 1.3"),
    ]
    for change, key, text in cases:
        found = list(certificates.errors(replace(good, **change)))  # type: ignore[arg-type]
        assert [where for where, _ in found] == [key], change
        assert text in found[0][1]


def test_an_expired_certificate_is_an_error_and_one_that_ends_soon_a_warning(files: Certificates) -> None:
    expired = Options(tls_cert_file=files.pem("expired"), tls_key_file=files.key("expired"))
    assert ["has expired on" in text for _, text in certificates.errors(expired)] == [True]
    ending = Options(tls_cert_file=files.pem("ending"), tls_key_file=files.key("ending"))
    assert list(certificates.errors(ending)) == []
    assert ["expires in 4 days" in text for _, text in certificates.warnings(ending)] == [True]


def test_an_encrypted_key_is_refused(files: Certificates, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(Path(files.key("server")).read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    found = list(certificates.errors(Options(tls_key_file=str(locked))))
    assert [text for _, text in found] == ["is encrypted: gpooler cannot ask for its passphrase"]


def test_the_end_of_every_file_is_told_and_read_anew(files: Certificates, tmp_path: Path) -> None:
    own, bundle = tmp_path / "own.pem", tmp_path / "bundle.pem"
    shutil.copy(files.pem("ending"), own)
    # an old authority beside one that is good
    bundle.write_text(Path(files.pem("expired")).read_text() + Path(files.pem("ca")).read_text())
    config = load_text(f"""
        [logging]
        log_format = "%m"
        [[listen]]
        host = "*"
        tls = "verify_ca"
        tls_cert_file = "{own}"
        tls_key_file = "{files.key("ending")}"
        tls_ca_file = "{bundle}"
        [[listen]]
        host = "127.0.0.1"
        [storage.here]
        type = "remote"
        host = "localhost"
        tls = "require"
        tls_cert_file = "{files.pem("rsa")}"
        tls_key_file = "{files.key("rsa")}"
        [storage.plain]
        type = "remote"
        host = "localhost"
        [ldap_endpoint.directory]
        ldapserver = "localhost"
        ldapprefix = "uid="
        ldapscheme = "ldaps"
        tls_ca_file = "{tmp_path / "none.pem"}"
        [database.a.user.b]
        authentication = "none"
        storage = "here"
        pool = "session"
    """)
    (warning,) = [str(one) for one in config.warnings if "expire" in str(one)]
    assert "tls_cert_file: expires in 4 days, on 20" in warning

    def told() -> dict[tuple[str, str, str], float]:
        found = certificates.expiries(config.config)
        return {(one.section, one.name, one.option): one.days_left for one in found}

    days = told()
    assert 4 < days["listen", "*:6432", "tls_cert_file"] < 5
    assert days["listen", "*:6432", "tls_ca_file"] > 30
    assert days["storage", "here", "tls_cert_file"] > 30
    assert len(days) == 3
    (line,) = certificates.expiry_warnings(config.config)
    assert line.startswith(f'tls_cert_file of listen "*:6432", {own}: expires in 4 days, on 20')

    shutil.copy(files.pem("expired"), own)
    assert told()["listen", "*:6432", "tls_cert_file"] < 0
    (line,) = certificates.expiry_warnings(config.config)
    assert f"{own}: has expired on 20" in line
    shutil.copy(files.pem("server"), own)
    assert told()["listen", "*:6432", "tls_cert_file"] > 30
    assert list(certificates.expiry_warnings(config.config)) == []


def test_authorities_count_as_long_as_one_of_them_lasts(good: Options, files: Certificates) -> None:
    expired = replace(good, tls_ca_file=files.pem("expired"))
    assert list(certificates.errors(expired)) == []
    ((key, text),) = certificates.warnings(expired)
    assert (key, text[:14]) == ("tls_ca_file", "has expired on")


def test_what_expires_is_logged_each_day(files: Certificates) -> None:
    lines: list[str] = []
    logger = Logger(
        compile_format("%c %m", pid=1), lambda _, line: lines.append(line), lambda: 0.0, is_debug=False
    )
    days = iter([["one"], [], ["two", "three"]])
    nights = iter(range(3))
    with pytest.raises(StopIteration):
        warn_daily(lambda: next(days), logger, lambda: next(nights) and None)
    assert [line.strip() for line in lines] == [f"config warning: {text}" for text in ("one", "two", "three")]


@pytest.mark.parametrize(
    ("text", "versions"),
    [
        (None, ("tlsv1.2", "tlsv1.3")),
        ("secure", ("tlsv1.2", "tlsv1.3")),
        ("TLSv1.3", ("tlsv1.3",)),
        ("tlsv1.3:tlsv1.2", ("tlsv1.2", "tlsv1.3")),
        ("all", ("tlsv1.0", "tlsv1.1", "tlsv1.2", "tlsv1.3")),
    ],
)
def test_protocols_may_be_written_in_many_ways(text: str | None, versions: tuple[str, ...]) -> None:
    assert certificates.parse_protocols(text) == versions


@pytest.mark.parametrize(
    ("name", "host", "expected"),
    [
        ("server", "localhost", True),
        ("server", "LOCALHOST", True),
        ("server", "127.0.0.1", True),
        ("server", "127.0.0.2", False),
        ("server", "localhost.example", False),
        ("other_host", "localhost", False),
        ("other_host", "elsewhere.example", True),
        ("cert_user", "cert_user", True),  # no subjectAltName: its common name counts
    ],
)
def test_host_names_are_checked_as_libpq_does(
    files: Certificates, name: str, host: str, expected: bool
) -> None:
    assert is_named(certificates.read_certificates(files.pem(name))[0], host) == expected


def test_the_end_point_is_the_hash_of_the_certificate(files: Certificates) -> None:
    certificate = certificates.read_certificates(files.pem("server"))[0]
    algorithm = certificate.signature_hash_algorithm
    assert algorithm is not None
    assert end_point(certificate) == certificate.fingerprint(algorithm)
    assert isinstance(certificate, x509.Certificate)
