"""A password as it stands in the configuration: plain, an MD5 hash or a SCRAM verifier.

Made once for a rule and kept, because it remembers what is expensive to derive: a login must not cost PBKDF2.
"""

import hmac
from collections.abc import Sequence
from enum import IntEnum
from typing import Final

from gpooler.auth import md5
from gpooler.auth.scram import DEFAULT_ITERATIONS, ScramKeys, Verifier, derive_keys
from gpooler.wire.text import encode

# What is kept of one secret: keys by salt (the rule's own, and those of the servers it logs in to) and MD5
# hashes by user. Beyond it all are dropped and derived anew: new salts or users cannot fill the memory.
MAX_CACHED: Final = 64


class SecretKind(IntEnum):
    """What a secret is stored as."""

    PLAIN = 0
    MD5 = 1
    SCRAM = 2


class Secret:
    """One secret. Its text never appears in a ``repr``."""

    __slots__ = ("_keys", "_md5", "_text", "_verifier", "_verifiers", "kind", "others")

    def __init__(self, text: str, others: Sequence[str] = ()) -> None:
        """Tells the kinds apart as PostgreSQL does (``get_password_type``): what is no hash is plain.

        ``others`` are good for a client's login, too, while a password is being replaced.
        """
        self.others = tuple(Secret(other) for other in others)
        self._text = encode(text)
        self._verifier = Verifier.parse(text)
        self._verifiers: dict[tuple[bytes, int], Verifier] = {}
        self._keys: dict[tuple[bytes, int], ScramKeys] = {}
        self._md5: dict[bytes, bytes] = {}
        if self._verifier is not None:
            self.kind = SecretKind.SCRAM
        elif md5.is_hash(self._text):
            self.kind = SecretKind.MD5
        else:
            self.kind = SecretKind.PLAIN

    @classmethod
    def of_password(cls, password: bytes) -> "Secret":
        """A password as a client typed it: plain, even if it looks like a hash."""
        made = cls("")
        made._text = password
        return made

    def __repr__(self) -> str:
        return f"<Secret {self.kind.name.lower()}>"

    @property
    def plain(self) -> bytes | None:
        """The password itself, None when only a hash is known."""
        return self._text if self.kind is SecretKind.PLAIN else None

    def md5_hash(self, user: bytes) -> bytes | None:
        """``md5…`` for MD5 authentication of ``user``; None for a SCRAM verifier, which cannot serve it."""
        if self.kind is not SecretKind.PLAIN:
            return self._text if self.kind is SecretKind.MD5 else None
        found = self._md5.get(user)
        if found is None:
            if len(self._md5) >= MAX_CACHED:
                self._md5.clear()
            found = self._md5[user] = md5.hash_password(self._text, user)
        return found

    @property
    def all(self) -> "tuple[Secret, ...]":
        """This one and the others."""
        return (self, *self.others)

    @property
    def wants_scram(self) -> bool:
        """Whether one of them is a SCRAM verifier, which nothing but SCRAM and a clear password can serve."""
        return any(secret.kind is SecretKind.SCRAM for secret in self.all)

    def verifiers(self, salt: bytes) -> tuple[Verifier, ...]:
        """What a SCRAM exchange can compare with: all that have one salt and iteration count.

        These are those of the first stored verifier, to which plain passwords are fitted, or ``salt`` where
        there are plain passwords only. Empty where there are MD5 hashes only.
        """
        lead = next((secret._verifier for secret in self.all if secret._verifier is not None), None)
        salt, iterations = (salt, DEFAULT_ITERATIONS) if lead is None else (lead.salt, lead.iterations)
        found = [secret.verifier(salt, iterations) for secret in self.all]
        return tuple(v for v in found if v is not None and (v.salt, v.iterations) == (salt, iterations))

    def verifier(self, salt: bytes, iterations: int = DEFAULT_ITERATIONS) -> Verifier | None:
        """The verifier for SCRAM; None for an MD5 hash.

        ``salt`` and ``iterations`` are for a plain password, whose verifier is derived once for them.
        """
        if self.kind is not SecretKind.PLAIN:
            return self._verifier
        verifier = self._verifiers.get((salt, iterations))
        if verifier is None:
            if len(self._verifiers) >= MAX_CACHED:
                self._verifiers.clear()
            verifier = self._verifiers[salt, iterations] = Verifier.build(self._text, salt, iterations)
        return verifier

    def keys(self, salt: bytes, iterations: int) -> ScramKeys | None:
        """Keys to log in to a server with; None when only a hash is known. Derived once a salt."""
        if self.kind is not SecretKind.PLAIN:
            return None
        found = self._keys.get((salt, iterations))
        if found is None:
            if len(self._keys) >= MAX_CACHED:
                self._keys.clear()
            found = self._keys[salt, iterations] = derive_keys(self._text, salt, iterations)
        return found

    def is_password(self, user: bytes, password: bytes) -> bool:
        """Whether a clear-text password is right. Constant time; costs PBKDF2 with a SCRAM verifier."""
        if self._verifier is not None:
            return self._verifier.is_password(password)
        if self.kind is SecretKind.MD5:
            return hmac.compare_digest(md5.hash_password(password, user), self._text)
        return hmac.compare_digest(password, self._text)
