"""MD5 password authentication, both sides.

``"md5" + md5(md5(password + user) + salt)``: section "Start-up" of the protocol documentation. What is stored
is ``"md5" + md5(password + user)``.
"""

import hashlib
import hmac
from typing import Final

SALT_LENGTH: Final = 4
PREFIX: Final = b"md5"
_HEX_DIGITS: Final = frozenset(b"0123456789abcdef")


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).hexdigest().encode("ascii")


def hash_password(password: bytes, user: bytes) -> bytes:
    """``md5…`` (35 bytes) as PostgreSQL stores it."""
    return PREFIX + _md5(password + user)


def is_hash(secret: bytes) -> bool:
    """Whether a stored secret is an MD5 hash, by PostgreSQL's rule (``get_password_type``)."""
    return len(secret) == 35 and secret.startswith(PREFIX) and _HEX_DIGITS.issuperset(secret[3:])


def response(stored: bytes, salt: bytes) -> bytes:
    """What a client answers to ``salt`` (4 bytes), from the stored form ``md5…``."""
    return PREFIX + _md5(stored[3:] + salt)


def is_response_right(answer: bytes, stored: bytes, salt: bytes) -> bool:
    """Whether a client's answer proves the password behind the stored form; in constant time."""
    return hmac.compare_digest(answer, response(stored, salt))
