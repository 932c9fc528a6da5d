"""The one place that knows how to reach the OpenSSL inside ``cryptography``.

pyOpenSSL makes contexts and handshakes; the relay goes on with the same SSL object in C, by the addresses of
OpenSSL's functions. Both the addresses and the way to take an object over are private to those packages:
their versions are pinned, and ``self_test`` says at start whether they still work that way.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.bindings.openssl.binding import Binding
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from OpenSSL import SSL, crypto

from gpooler.errors import ConfigurationError
from gpooler.net import libcrypto
from gpooler.relay import records, tls

_TEST_BYTES: Final = 300_000  # more than one record, and than one read


def load() -> None:
    """Give the relay the addresses. Raises ConfigurationError when this OpenSSL cannot be used so."""
    try:
        binding = Binding()
        library = binding.lib._original_lib
        tls.load(
            {
                name: int(binding.ffi.cast("uintptr_t", binding.ffi.addressof(library, name)))
                for name in tls.NAMES
            },
            _reason,
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"TLS cannot be used: this version of the package cryptography hides a part of OpenSSL ({error})"
        ) from error


def _reason() -> str:
    """The errors of this thread, in OpenSSL's own words; nothing of files' contents is in them."""
    library, ffi = Binding().lib, Binding().ffi
    texts = []
    while code := library.ERR_get_error():
        text = library.ERR_reason_error_string(code)
        texts.append("unknown error" if text == ffi.NULL else ffi.string(text).decode())
    return "; ".join(texts) or "the connection broke"


def accept_alpn(context: SSL.Context) -> None:
    """Handshakes with clients take PostgreSQL's protocol name if it is offered."""
    tls.accept_alpn(_address(context))


def keep_secrets(context: SSL.Context) -> None:
    """Handshakes with clients can end in the relay's own records. Raises ConfigurationError."""
    libcrypto.load()
    tls.keep_secrets(_address(context))


def begin(
    context: SSL.Context,
    describe: Callable[[tls.TlsHandshake], object],
    *,
    is_heavy: bool,
    keeps_secrets: bool,
) -> tls.TlsHandshake:
    """A handshake with a client; the parameters are those of ``TlsHandshake``."""
    return tls.TlsHandshake(_address(context), describe, is_heavy, keeps_secrets)


def peer(handshake: tls.TlsHandshake) -> x509.Certificate | None:
    """The client's certificate. Raises ValueError for one that cannot be read."""
    binding = Binding()
    pointer = binding.lib.SSL_get_peer_certificate(binding.ffi.cast("SSL *", handshake.address))
    if pointer == binding.ffi.NULL:
        return None
    certificate: Any = crypto.X509
    return certificate._from_raw_x509_ptr(pointer).to_cryptography()  # type: ignore[no-any-return]


def _address(context: SSL.Context) -> int:
    private: Any = context
    return int(Binding().ffi.cast("uintptr_t", private._context))


def take_over(connection: SSL.Connection, facts: object) -> tls.TlsSession:
    """The session of a connection over memory BIOs whose handshake is over; ``connection`` is dead then."""
    ffi = Binding().ffi
    private: Any = connection
    session = tls.TlsSession(
        int(ffi.cast("uintptr_t", private._ssl)),
        int(ffi.cast("uintptr_t", private._into_ssl)),
        int(ffi.cast("uintptr_t", private._from_ssl)),
        facts,
    )
    ffi.gc(private._ssl, None)  # its end is the session's
    return session


def self_test(*, with_records: bool) -> None:
    """Make sessions with ourselves, some of them with the relay's own records if they are to be used.

    Raises ConfigurationError when one does not carry what it should.
    """
    try:
        identity = _identity()
        _test(identity, None)
        if with_records:
            libcrypto.load()
            for suite in records.suite_names():
                _test(identity, suite)
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"TLS cannot be used: OpenSSL's self-test failed ({type(error).__name__}: {error}); "
            "are pyOpenSSL and cryptography of the versions in requirements.txt?"
        ) from error


def _identity() -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """A key and its certificate, good for today."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "self-test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def _test(identity: tuple[ec.EllipticCurvePrivateKey, x509.Certificate], suite: bytes | None) -> None:
    """With a cipher suite of TLS 1.3 for the relay's own records; with None in OpenSSL's hands to the end."""
    context = SSL.Context(SSL.TLS_METHOD)
    context.use_privatekey(identity[0])
    context.use_certificate(identity[1])
    if suite is not None:
        context.set_tls13_ciphersuites(suite)
        keep_secrets(context)
    server = begin(context, lambda _: None, is_heavy=False, keeps_secrets=suite is not None)
    client = SSL.Connection(SSL.Context(SSL.TLS_METHOD), None)
    client.set_connect_state()
    for _ in range(4):
        try:
            client.do_handshake()
        except SSL.WantReadError:
            pass
        server.feed(client.bio_read(_TEST_BYTES))
        is_over = server.step()
        client.bio_write(server.take())
        if is_over:
            break
    sessions = take_over(client, None), server.session()
    if sessions[1].has_records != (suite is not None):
        raise ValueError("the session did not go over to the relay's own records")
    data = bytes(range(256)) * (_TEST_BYTES // 256)
    for _ in range(2):
        for sender, receiver in (sessions, sessions[::-1]):
            sender.write(data)
            receiver.put(sender.take())
            received = b""
            while part := receiver.read():
                received += part
            if received != data:
                raise ValueError(f"{len(received)} of {len(data)} bytes arrived")
            receiver.slim()
    for sender, receiver in (sessions, sessions[::-1]):
        sender.close()
        receiver.put(sender.take())
        if receiver.read() is not None:
            raise ValueError("the end was not seen")
