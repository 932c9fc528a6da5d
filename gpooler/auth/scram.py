"""SCRAM-SHA-256 as PostgreSQL speaks it: keys, verifiers, the client's side; ``scram_server`` is the other.

RFC 5802, RFC 7677, "SASL Authentication". A side is an object that takes the other's message and gives its
own. As in PostgreSQL the user name inside the exchange is ignored by the server and sent empty by the client.
Channel binding is tls-server-end-point, as SCRAM-SHA-256-PLUS.
"""

import base64
import hashlib
import hmac
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from gpooler.auth.saslprep import saslprep
from gpooler.errors import ServerAuthentication

MECHANISM: Final = b"SCRAM-SHA-256"
MECHANISM_PLUS: Final = b"SCRAM-SHA-256-PLUS"
# The one type of channel binding that PostgreSQL knows (RFC 5929, section 4).
END_POINT: Final = b"tls-server-end-point"
KEY_LENGTH: Final = 32
SALT_LENGTH: Final = 16  # SCRAM_DEFAULT_SALT_LEN of PostgreSQL
DEFAULT_ITERATIONS: Final = 4096  # RFC 7677 asks for at least this; PostgreSQL's default
NONCE_BYTES: Final = 18  # SCRAM_RAW_NONCE_LEN of PostgreSQL
# PG_MAX_SASL_MESSAGE_LENGTH of PostgreSQL: the longest message either side may send.
MAX_MESSAGE_LENGTH: Final = 1024
# A hostile or mistaken server could ask for 2**31 rounds; this many take about half a second.
MAX_ITERATIONS: Final = 1_000_000

_VERIFIER_PREFIX: Final = "SCRAM-SHA-256$"


@dataclass(frozen=True, slots=True)
class ScramKeys:
    """What a client needs instead of the password; good for one salt and iteration count."""

    client_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Verifier:
    """What a server keeps instead of the password: ``SCRAM-SHA-256$4096:salt$StoredKey:ServerKey``."""

    iterations: int
    salt: bytes
    stored_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> "Verifier | None":
        """The verifier, None when the text is none (``parse_scram_secret`` of PostgreSQL)."""
        if not text.startswith(_VERIFIER_PREFIX):
            return None
        try:
            parameters, keys = text[len(_VERIFIER_PREFIX) :].split("$")
            iterations, salt = parameters.split(":")
            stored_key, server_key = (_unbase64(key.encode()) for key in keys.split(":"))
            verifier = cls(int(iterations), _unbase64(salt.encode()), stored_key, server_key)
        except ValueError:
            return None
        is_sound = (
            iterations.isascii()
            and iterations.isdecimal()
            and 0 < verifier.iterations <= 0x7FFFFFFF
            and verifier.salt
            and len(stored_key) == len(server_key) == KEY_LENGTH
        )
        return verifier if is_sound else None

    @classmethod
    def build(cls, password: bytes, salt: bytes, iterations: int = DEFAULT_ITERATIONS) -> "Verifier":
        """The verifier of a password. Costs PBKDF2 (about a millisecond at 4096 iterations)."""
        keys = derive_keys(password, salt, iterations)
        return cls(iterations, salt, hashlib.sha256(keys.client_key).digest(), keys.server_key)

    def format(self) -> str:
        """The text PostgreSQL stores."""
        salt, stored, server = (
            base64.b64encode(part).decode("ascii") for part in (self.salt, self.stored_key, self.server_key)
        )
        return f"{_VERIFIER_PREFIX}{self.iterations}:{salt}${stored}:{server}"

    def is_password(self, password: bytes) -> bool:
        """Whether a clear-text password is the right one. Costs PBKDF2; constant time otherwise."""
        keys = derive_keys(password, self.salt, self.iterations)
        return hmac.compare_digest(keys.server_key, self.server_key)


def derive_keys(password: bytes, salt: bytes, iterations: int) -> ScramKeys:
    """ClientKey and ServerKey of a password (RFC 5802, section 3). Costs PBKDF2, without the GIL."""
    salted = hashlib.pbkdf2_hmac("sha256", saslprep(password), salt, iterations)
    return ScramKeys(_hmac(salted, b"Client Key"), _hmac(salted, b"Server Key"))


def derived_salt(mock_key: bytes, name: bytes) -> bytes:
    """A salt that always is the same for a name, and tells nothing without ``mock_key``.

    Users who do not exist get it, and those whose plain password stands in the configuration: so an
    attacker cannot tell them apart. ``mock_key`` is one for all workers.
    """
    return _hmac(mock_key, name)[:SALT_LENGTH]


class ScramClient:
    """The client's side of one exchange: ``first``, ``final``, then ``verify``.

    What the server does wrong, and a server that does not know the password itself, raise
    ``ServerAuthentication``.
    """

    __slots__ = ("_bare", "_bound", "_header", "_nonce", "_server_signature", "mechanism")

    def __init__(
        self,
        user: str = "",
        *,
        nonce: bytes | None = None,
        binding: bytes | None = None,
        offers: Collection[bytes] = (MECHANISM,),
    ) -> None:
        """``user`` is empty towards PostgreSQL, which takes the one of the startup packet.

        ``binding``: what binds the exchange to the TLS session (``END_POINT``), None or empty without;
        ``offers``: the server's mechanisms.
        """
        self.mechanism = MECHANISM_PLUS if binding and MECHANISM_PLUS in offers else MECHANISM
        if self.mechanism == MECHANISM_PLUS:
            self._header = b"p=" + END_POINT + b",,"
        else:
            self._header = b"y,," if binding else b"n,,"
        self._bound = self._header + (binding or b"" if self.mechanism == MECHANISM_PLUS else b"")
        self._nonce = _new_nonce() if nonce is None else nonce
        name = user.encode("utf-8").replace(b"=", b"=3D").replace(b",", b"=2C")
        self._bare = b"n=%b,r=%b" % (name, self._nonce)
        self._server_signature = b""

    def first(self) -> bytes:
        """The client-first-message."""
        return self._header + self._bare

    def challenge(self, message: bytes) -> "Challenge":
        """Reads the server-first-message: what the keys are to be derived from."""
        if message[:2] == b"m=":
            raise _server_fault("server requires an unsupported SCRAM extension")
        parts = message.split(b",")
        if len(parts) < 3 or [part[:2] for part in parts[:3]] != [b"r=", b"s=", b"i="]:
            raise _server_fault("malformed server-first-message")
        nonce = parts[0][2:]
        if not nonce.startswith(self._nonce) or nonce == self._nonce or not _is_printable(nonce):
            raise _server_fault("nonce of the server does not continue ours")
        try:
            salt = _unbase64(parts[1][2:])
        except ValueError as error:
            raise _server_fault("malformed salt") from error
        iterations = parts[2][2:]
        if not salt or not iterations.isdigit() or len(iterations) > 9:
            raise _server_fault("malformed salt or iteration count")
        if not 0 < int(iterations) <= MAX_ITERATIONS:
            raise _server_fault(f"{int(iterations)} iterations are out of bounds")
        return Challenge(message, nonce, salt, int(iterations))

    def final(self, challenge: "Challenge", keys: ScramKeys) -> bytes:
        """The client-final-message, from keys derived for this challenge's salt and iterations."""
        without_proof = b"c=" + base64.b64encode(self._bound) + b",r=" + challenge.nonce
        auth_message = self._bare + b"," + challenge.message + b"," + without_proof
        stored_key = hashlib.sha256(keys.client_key).digest()
        proof = _xor(keys.client_key, _hmac(stored_key, auth_message))
        self._server_signature = _hmac(keys.server_key, auth_message)
        return without_proof + b",p=" + base64.b64encode(proof)

    def verify(self, message: bytes) -> None:
        """Checks the server-final-message: the server must know the verifier, too."""
        if message[:2] == b"e=":
            raise _server_fault(f"server says {message[2:64].decode('ascii', 'backslashreplace')}")
        try:
            signature = _unbase64(message.split(b",")[0][2:]) if message[:2] == b"v=" else b""
        except ValueError:
            signature = b""
        if not self._server_signature or not hmac.compare_digest(signature, self._server_signature):
            raise _server_fault("wrong server signature")


@dataclass(frozen=True, slots=True)
class Challenge:
    """A server-first-message, read."""

    message: bytes
    nonce: bytes
    salt: bytes
    iterations: int


def _server_fault(cause: str) -> ServerAuthentication:
    return ServerAuthentication(cause=f"SCRAM: {cause}")


def _is_printable(nonce: bytes) -> bool:
    return all(0x21 <= byte <= 0x7E for byte in nonce)  # a comma cannot be in it: it ends the attribute


def _new_nonce() -> bytes:
    return base64.b64encode(os.urandom(NONCE_BYTES))


def _hmac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")


def _xor(left: bytes, right: bytes) -> bytes:
    return (int.from_bytes(left, "big") ^ int.from_bytes(right, "big")).to_bytes(len(left), "big")


def _unbase64(data: bytes) -> bytes:
    """Strict Base64. Raises ``ValueError`` (``binascii.Error`` is one)."""
    return base64.b64decode(data, validate=True)
