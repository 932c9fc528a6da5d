"""The other end of TLS 1.3's records, as RFC 8446 says it, by the package cryptography."""

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from OpenSSL import SSL

from gpooler.net import openssl
from gpooler.relay.probe import records_session
from gpooler.relay.tls import TlsSession

SUITES: Final = {
    b"TLS_AES_128_GCM_SHA256": (AESGCM, 16, hashes.SHA256()),
    b"TLS_AES_256_GCM_SHA384": (AESGCM, 32, hashes.SHA384()),
    b"TLS_CHACHA20_POLY1305_SHA256": (ChaCha20Poly1305, 32, hashes.SHA256()),
}
ALERT: Final = 21
HANDSHAKE: Final = 22
DATA: Final = 23
HEADER: Final = 5
TAG: Final = 16


def prepare() -> None:
    """Load what sessions need. Once."""
    openssl.load()
    openssl.keep_secrets(SSL.Context(SSL.TLS_METHOD))


class Direction:
    """One direction's keys: seals, or opens."""

    def __init__(self, suite: bytes, secret: bytes) -> None:
        self._cipher, self._key_size, self._hash = SUITES[suite]
        self.secret = secret
        self.number = 0
        self._set_keys()

    def _expand(self, label: bytes, size: int) -> bytes:
        """HKDF-Expand-Label of section 7.1."""
        label = b"tls13 " + label
        info = size.to_bytes(2, "big") + bytes([len(label)]) + label + b"\0"
        return HKDFExpand(self._hash, size, info).derive(self.secret)

    def _set_keys(self) -> None:
        self._aead = self._cipher(self._expand(b"key", self._key_size))
        self._iv = int.from_bytes(self._expand(b"iv", 12), "big")
        self.number = 0

    def renew(self) -> None:
        """Section 7.2."""
        self.secret = self._expand(b"traffic upd", self._hash.digest_size)
        self._set_keys()

    def _nonce(self) -> bytes:
        nonce = (self._iv ^ self.number).to_bytes(12, "big")
        self.number += 1
        return nonce

    def seal(self, content: int, data: bytes, padding: int = 0) -> bytes:
        """A record."""
        return self.seal_inner(data + bytes([content]) + bytes(padding))

    def seal_inner(self, inner: bytes) -> bytes:
        """A record of a TLSInnerPlaintext, right or wrong."""
        header = b"\x17\x03\x03" + (len(inner) + TAG).to_bytes(2, "big")
        return header + self._aead.encrypt(self._nonce(), inner, header)

    def open(self, record: bytes) -> tuple[int, bytes]:
        """Content type and bytes. Raises InvalidTag."""
        inner = self._aead.decrypt(self._nonce(), record[HEADER:], record[:HEADER]).rstrip(b"\0")
        return inner[-1], inner[:-1]


class Peer:
    """A client whose handshake is over, and gpooler's session with it."""

    def __init__(self, suite: bytes, *, number: int = 0) -> None:
        """``number``: of the next record that gpooler seals."""
        size = SUITES[suite][2].digest_size
        secrets = bytes(range(size)), bytes(range(100, 100 + size))
        self.session: TlsSession = records_session(suite, *secrets, number=number)
        self.out = Direction(suite, secrets[0])
        self.back = Direction(suite, secrets[1])
        self.back.number = number

    def put(self, content: int, data: bytes, padding: int = 0) -> None:
        """Send the session a record."""
        self.session.put(self.out.seal(content, data, padding))

    def send(self, data: bytes) -> None:
        """Send it bytes as they are."""
        self.session.put(data)

    def take(self) -> list[tuple[int, bytes]]:
        """The records that the session has for us; KeyUpdate is followed."""
        found = []
        data = self.session.take()
        while data:
            size = HEADER + int.from_bytes(data[3:HEADER], "big")
            found.append(self.back.open(data[:size]))
            data = data[size:]
            if found[-1][0] == HANDSHAKE:
                self.back.renew()
        return found

    def read(self, most: int = 16384) -> bytes:
        """All that it makes of what it got, in pieces of at most so many bytes. Raises ConnectionError."""
        found = b""
        while part := self.session.read(most):
            assert len(part) <= most
            found += part
        return found


__all__ = ["ALERT", "DATA", "HANDSHAKE", "SUITES", "Direction", "InvalidTag", "Peer", "prepare"]
