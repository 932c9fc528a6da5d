"""TLS with clients and with servers: contexts from the configuration, handshakes, and what came of them.

A handshake runs over memory, with servers by pyOpenSSL, with clients compiled, as there are many. It ends in
a ``TlsSession``, of which no Python is left once the relay has it. Modes are libpq's, chapter "SSL
Support" of PostgreSQL's documentation.
"""

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import gevent
import gevent.socket
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID
from gevent import get_hub
from OpenSSL import SSL

from gpooler.config.certificates import TlsOptions, parse_protocols, read_certificates, read_revoked
from gpooler.config.model import Config
from gpooler.config.words import Tls, TlsRecords
from gpooler.errors import ConfigurationError, ServerConnectFailed
from gpooler.net import openssl
from gpooler.relay.tls import TlsHandshake, TlsSession
from gpooler.wire import messages

ALPN: Final = b"postgresql"
VERIFYING: Final = (Tls.VERIFY_CA, Tls.VERIFY_FULL)
ENCRYPTED: Final = (Tls.REQUIRE, *VERIFYING)
_VERSIONS: Final = {
    "tlsv1.0": SSL.TLS1_VERSION,
    "tlsv1.1": SSL.TLS1_1_VERSION,
    "tlsv1.2": SSL.TLS1_2_VERSION,
    "tlsv1.3": SSL.TLS1_3_VERSION,
}
_CRL_CHECK: Final = 0x4 | 0x8  # X509_V_FLAG_CRL_CHECK, _CRL_CHECK_ALL
_READ: Final = 16384


class TlsFault(Exception):
    """A handshake failed, or its outcome is not good enough; the text says why."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a session."""

    protocol: str  # "TLSv1.3"
    cipher: str
    bits: int
    alpn: bytes
    common_names: tuple[str, ...]  # of the peer's certificate, which was verified; empty: it had none
    # tls-server-end-point of RFC 5929: the hash of the server's certificate
    binding: bytes

    def __str__(self) -> str:
        return f"{self.protocol}/{self.cipher}/{self.bits}"


class Handshake:
    """One handshake with a server, bytes in, bytes out."""

    def __init__(self, connection: SSL.Connection, *, is_verified: bool) -> None:
        """``is_verified``: the peer's certificate was."""
        self._connection = connection
        self._is_verified = is_verified

    def feed(self, data: bytes) -> None:
        """Bytes that the peer sent."""
        self._connection.bio_write(data)

    def step(self) -> bool:
        """Go on as far as what came allows: whether it is over. Raises TlsFault."""
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            return False
        except SSL.Error as error:
            raise TlsFault(_reason(error)) from error
        return True

    def take(self) -> bytes:
        """Bytes for the peer, also after a fault: an alert."""
        result = b""
        while True:
            try:
                result += self._connection.bio_read(65536)
            except SSL.Error:
                return result

    def session(self) -> TlsSession:
        """What it ended in. Once."""
        connection = self._connection
        peer = _peer(connection)
        facts = Facts(
            protocol=connection.get_protocol_version_name(),
            cipher=connection.get_cipher_name() or "",
            bits=connection.get_cipher_bits() or 0,
            alpn=connection.get_alpn_proto_negotiated(),
            common_names=_common_names(peer) if self._is_verified else (),
            binding=b"" if peer is None else end_point(peer),
        )
        return openssl.take_over(connection, facts)


class Acceptor:
    """TLS of one listener."""

    def __init__(self, options: TlsOptions, records: TlsRecords = TlsRecords.GPOOLER) -> None:
        """Reads the files. Raises ConfigurationError."""
        try:
            assert options.tls_cert_file is not None
            assert options.tls_key_file is not None
            context = _context(options)
            context.set_options(SSL.OP_CIPHER_SERVER_PREFERENCE)
            context.set_session_id(b"gpooler")
            context.set_session_cache_mode(SSL.SESS_CACHE_OFF)  # tickets need none
            if options.tls_ca_file is not None:
                mode = SSL.VERIFY_PEER
                if options.tls in VERIFYING:
                    mode |= SSL.VERIFY_FAIL_IF_NO_PEER_CERT
                context.set_verify(mode)
                for authority in read_certificates(options.tls_ca_file):
                    context.add_client_ca(authority)
            openssl.accept_alpn(context)
            if records is TlsRecords.GPOOLER:
                openssl.keep_secrets(context)
            certificate = read_certificates(options.tls_cert_file)[0]
        except (SSL.Error, ValueError, OSError) as error:
            raise ConfigurationError(f"TLS: {_reason(error)}") from error
        self._context = context
        self._is_verified = options.tls_ca_file is not None
        self._binding = end_point(certificate)
        self._records = records
        self._is_heavy = isinstance(certificate.public_key(), rsa.RSAPublicKey)
        self._facts: dict[tuple[object, ...], Facts] = {}  # they are few: of what both sides can do
        self.is_required = options.tls in ENCRYPTED

    def begin(self) -> TlsHandshake:
        """A handshake with a client; its steps raise ConnectionError."""
        return openssl.begin(
            self._context,
            self._describe,
            is_heavy=self._is_heavy,
            keeps_secrets=self._records is TlsRecords.GPOOLER,
        )

    def _describe(self, handshake: TlsHandshake) -> Facts:
        names: tuple[str, ...] = ()
        if self._is_verified:
            try:
                names = _common_names(openssl.peer(handshake))
            except ValueError:
                pass  # it cannot be read
        outcome = handshake.outcome()
        facts = self._facts.get((*outcome, names))
        if facts is None:
            facts = Facts(*outcome, common_names=names, binding=self._binding)
            if not names:
                self._facts[(*outcome, names)] = facts
        return facts


def prepare(config: Config) -> None:
    """What TLS needs in a process, where the configuration has any. Raises ConfigurationError."""
    sections: tuple[TlsOptions, ...] = (*config.listen, *config.storage.values())
    if any(section.tls is not Tls.DISABLE for section in sections):
        openssl.load()
        openssl.self_test(
            with_records=config.performance.tls_records is TlsRecords.GPOOLER
            and any(listen.tls is not Tls.DISABLE for listen in config.listen)
        )


def acceptors(config: Config) -> dict[int, "Acceptor"]:
    """By the number of their listener, of those that do TLS. Raises ConfigurationError."""
    return {
        listen.number: Acceptor(listen, config.performance.tls_records)
        for listen in config.listen
        if listen.tls is not Tls.DISABLE
    }


def connectors(config: Config) -> dict[str, "Connector"]:
    """By the name of their storage. Raises ConfigurationError."""
    return {
        name: Connector(storage, storage.endpoints[0].host)
        for name, storage in config.storage.items()
        if storage.endpoints
    }


class Connector:
    """TLS of one storage."""

    def __init__(self, options: TlsOptions, server_name: str | None) -> None:
        """``server_name`` as configured, None for a Unix socket. Raises ConfigurationError."""
        self.mode = options.tls
        self._server_name = server_name
        self._context: SSL.Context | None = None
        # as libpq: with a root certificate "require" verifies the chain, too
        self._is_verified = options.tls in VERIFYING or options.tls_ca_file is not None
        if options.tls is Tls.DISABLE:
            return
        try:
            context = _context(options)
            if self._is_verified:
                context.set_verify(SSL.VERIFY_PEER)
            context.set_alpn_protos([ALPN])
        except (SSL.Error, ValueError, OSError) as error:
            raise ConfigurationError(f"TLS: {_reason(error)}") from error
        self._context = context

    @property
    def tries(self) -> tuple[bool, ...]:
        """Whether TLS is asked for, of each connect that may be needed in turn (libpq's ``sslmode``)."""
        return {Tls.DISABLE: (False,), Tls.ALLOW: (False, True), Tls.PREFER: (True, False)}.get(
            self.mode, (True,)
        )

    def secure(self, sock: gevent.socket.socket) -> "Stream":
        """Ask the server for TLS, and shake hands. Yields. Raises TlsFault, OSError, ServerConnectFailed."""
        assert self._context is not None
        sock.sendall(messages.ssl_request())
        answer = sock.recv(64)
        if answer == b"N" and self.mode not in ENCRYPTED:
            return Stream(sock, None)
        if answer != b"S":
            raise ServerConnectFailed(
                cause="the server does not do TLS"
                if answer == b"N"
                else "closed when asked for TLS"
                if not answer
                else "sent bytes behind its answer to the request for TLS"
                if answer[:1] == b"S"
                else "does not know what a request for TLS is"
            )
        connection = SSL.Connection(self._context, None)
        connection.set_connect_state()
        if self._server_name is not None and not _is_address(self._server_name):
            connection.set_tlsext_host_name(self._server_name.encode("idna"))
        handshake = Handshake(connection, is_verified=self._is_verified)
        while not self._step(handshake, sock):
            data = sock.recv(_READ)
            if not data:
                raise TlsFault("closed during the handshake")
            handshake.feed(data)
        if self.mode is Tls.VERIFY_FULL:
            certificate = _peer(connection)
            if certificate is None or not is_named(certificate, self._server_name or ""):
                raise TlsFault(f'the server\'s certificate is not for host "{self._server_name}"')
        return Stream(sock, handshake.session())

    @staticmethod
    def _step(handshake: Handshake, sock: gevent.socket.socket) -> bool:
        try:
            return handshake.step()
        finally:
            if data := handshake.take():
                sock.sendall(data)


class Stream:
    """A connection to a server until the relay has it, plain or under TLS."""

    def __init__(self, sock: gevent.socket.socket, session: TlsSession | None) -> None:
        self.socket = sock
        self.session = session

    @property
    def binding(self) -> bytes | None:
        """For SCRAM's channel binding; None without TLS."""
        return None if self.session is None else self.session.facts.binding

    def sendall(self, data: bytes) -> None:
        """Yields. Raises OSError."""
        if self.session is None:
            self.socket.sendall(data)
        else:
            self.session.write(data)
            self.socket.sendall(self.session.take())

    def recv(self) -> bytes:
        """What the server sent; empty at the end. Yields. Raises OSError."""
        if self.session is None:
            return self.socket.recv(_READ)  # type: ignore[no-any-return]
        while True:
            found = self.session.read()
            if answer := self.session.take():
                self.socket.sendall(answer)
            if found is None:
                return b""
            if found:
                return found
            data = self.socket.recv(_READ)
            if not data:
                return b""
            self.session.put(data)


def run_heavy(work: Callable[[], bool]) -> bool:
    """Run a handshake's step in a native thread. Yields. Raises TlsFault."""
    return get_hub().threadpool.apply(work)  # type: ignore[no-any-return]


def end_point(certificate: x509.Certificate) -> bytes:
    """tls-server-end-point (RFC 5929, section 4.1); empty where it is not defined for the certificate."""
    try:
        algorithm = certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        return b""
    if algorithm is None:
        return b""  # Ed25519: no hash function
    if isinstance(algorithm, hashes.MD5 | hashes.SHA1):
        algorithm = hashes.SHA256()
    return certificate.fingerprint(algorithm)


def is_named(certificate: x509.Certificate, host: str) -> bool:
    """Whether a certificate is for a host, as libpq decides (``verify-full``).

    The names of the subjectAltName of the host's own kind decide; the common name only where there is none.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = None
    except (ValueError, x509.DuplicateExtension):
        return False  # nobody can say for whom it is
    address = ipaddress.ip_address(host) if _is_address(host) else None
    if names is not None:
        if address is not None and address in names.get_values_for_type(x509.IPAddress):
            return True
        dns = names.get_values_for_type(x509.DNSName)
        if any(_matches(pattern, host) for pattern in dns):
            return True
        if dns or names.get_values_for_type(x509.IPAddress):
            return False
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return bool(common) and _matches(str(common[0].value), host)


def _matches(pattern: str, host: str) -> bool:
    """Equal, or equal behind a first label that is ``*``."""
    pattern, host = pattern.lower(), host.lower()
    if pattern.startswith("*.") and not _is_address(host):
        first, dot, rest = host.partition(".")
        return bool(first and dot) and rest == pattern[2:]
    return pattern == host


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _context(options: TlsOptions) -> SSL.Context:
    """Raises SSL.Error, ValueError, OSError."""
    context = SSL.Context(SSL.TLS_METHOD)
    versions = parse_protocols(options.tls_protocols)
    context.set_min_proto_version(_VERSIONS[versions[0]])
    context.set_max_proto_version(_VERSIONS[versions[-1]])
    context.set_options(SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)
    if options.tls_ciphers is not None:
        context.set_cipher_list(options.tls_ciphers.encode())
    if options.tls_ciphersuites is not None:
        context.set_tls13_ciphersuites(options.tls_ciphersuites.encode())
    if options.tls_ca_file is not None:
        context.load_verify_locations(options.tls_ca_file)
    if options.tls_crl_file is not None:
        store = context.get_cert_store()
        assert store is not None
        for revoked in read_revoked(options.tls_crl_file):
            store.add_crl(revoked)
        store.set_flags(_CRL_CHECK)
    if options.tls_cert_file is not None:
        context.use_certificate_chain_file(options.tls_cert_file)
    if options.tls_key_file is not None:
        context.use_privatekey_file(options.tls_key_file)
        context.check_privatekey()
    return context


def _peer(connection: SSL.Connection) -> x509.Certificate | None:
    """The peer's certificate; None when there is none, or none that can be read."""
    try:
        return connection.get_peer_certificate(as_cryptography=True)
    except ValueError:
        return None


def _common_names(certificate: x509.Certificate | None) -> tuple[str, ...]:
    if certificate is None:
        return ()
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return tuple(str(name.value) for name in names)


def _reason(error: Exception) -> str:
    """What OpenSSL says, in its own words; nothing of files' contents is in them."""
    if isinstance(error, SSL.Error) and error.args and isinstance(error.args[0], list):
        texts = [str(item[-1]) for item in error.args[0] if item]
        return "; ".join(texts) or "the connection broke"
    return str(error) or type(error).__name__
