"""A client proves who it is: one object per method, messages in, messages out.

``challenge`` is sent first, then every password message goes to ``answer`` until one of them returns
``Done``. Whoever fails, for whatever cause, gets the same ``AuthenticationFailed`` after the same number of
messages. Section "Start-up" of the protocol documentation; the method is chosen as PostgreSQL's
``CheckPWChallengeAuth`` does.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

from gpooler.auth import md5, scram
from gpooler.auth.randomness import random_bytes
from gpooler.auth.scram import ScramKeys, Verifier
from gpooler.auth.scram_server import Prepared, SaslServer, prepare
from gpooler.auth.secrets import Secret
from gpooler.errors import AuthenticationFailed, ConfigurationError, ProtocolViolation
from gpooler.wire import messages
from gpooler.wire.text import encode

NONE: Final = "none"
CLEAR_TEXT: Final = "clear_text"
MD5: Final = "md5"
SCRAM_SHA_256: Final = "scram-sha-256"

DEFAULT: Final = "default"  # in ``auth_common_name``: the user's own name
NO_PASSWORD: Final = "no password is known for this user"
WRONG_PASSWORD: Final = "wrong password"
_UNKNOWN_MD5: Final = md5.PREFIX + b"0" * 32
_NO_KEY: Final = bytes(scram.KEY_LENGTH)


@dataclass(frozen=True, slots=True)
class Done:
    """The client is who it says. ``messages`` are to be sent, AuthenticationOk is the last of them."""

    messages: bytes
    password: bytes | None = field(default=None, repr=False)  # clear text, where the client sent it
    keys: ScramKeys | None = None  # from a SCRAM exchange: log in to servers with the same verifier
    secret: Secret | None = None  # what it was compared with, where the configuration does not have it
    storage_user: str | None = None  # whom to be at the server, where a directory says so


@dataclass(frozen=True, slots=True)
class Later:
    """Somebody else has to be asked. ``work`` gives what is said then.

    It yields, has a deadline of its own, and raises as ``Exchange.answer`` does.
    """

    work: Callable[[], bytes | Done] = field(repr=False)  # it holds the password


# What an answer is compared with: hashes "md5…" or verifiers, each as good; None: nothing is asked for.
Stored = tuple[bytes, ...] | tuple[Prepared, ...] | None

# Somebody else's word on a clear-text password. As ``Later.work``: yields, has a deadline, raises.
Check = Callable[[bytes], Done]


class Exchange(Protocol):
    """One login of one client."""

    def challenge(self) -> bytes | Done | Later:
        """What to send first; ``Done`` when the method asks for nothing."""

    def answer(self, body: bytes) -> bytes | Done | Later:
        """What to send after a password message (its body), or ``Done``.

        Raises ``AuthenticationFailed`` or ``ProtocolViolation``; the connection is to be closed then.
        """


def begin(
    method: str,
    user: str,
    secret: Secret | None,
    mock_key: bytes,
    *,
    salt_name: str | None = None,
    md5_salt: bytes | None = None,
    binding: bytes | None = None,
    unknown_cause: str = NO_PASSWORD,
    check: Check | None = None,
    another: Secret | None = None,
) -> Exchange:
    """The exchange for ``method``, one of the names of the option ``authentication``.

    ``secret`` None means a user without one: the exchange runs as for any other and fails with
    ``unknown_cause`` in the log. ``mock_key`` are random bytes, the same in all workers. With ``md5`` a user
    whose secret is a SCRAM verifier does SCRAM, as in PostgreSQL.

    ``salt_name`` is what the SCRAM salt of a plain or a missing secret comes from: the user name when not
    given, but one fixed name for a rule of many users, so that invented user names do not cost PBKDF2 each.
    ``md5_salt`` was sent already, with an MD5 challenge. ``binding``: channel binding of the client's TLS
    session, None or empty where there is none. ``check`` decides in place of ``secret`` with ``clear_text``;
    with it a user without a secret costs what ``another`` user's secret costs.

    Raises ``ConfigurationError`` for a method that is not one of these four (``block`` is the caller's).
    """
    salt_name = user if salt_name is None else salt_name
    if method == MD5:
        if secret is None or not secret.wants_scram:
            return Md5Exchange(user, secret, md5_salt or random_bytes(md5.SALT_LENGTH), unknown_cause)
        return ScramExchange(user, secret, mock_key, salt_name, unknown_cause, binding)
    if method == SCRAM_SHA_256:
        return ScramExchange(user, secret, mock_key, salt_name, unknown_cause, binding)
    if method == NONE:
        return _NoExchange()
    if method == CLEAR_TEXT:
        return _ClearTextExchange(user, secret, unknown_cause, check, another)
    raise ConfigurationError(f'authentication "{method}" cannot be used with a password')


def by_certificate(user: str, names: Collection[str], accepted: Collection[str]) -> Exchange:
    """``cert``: the exchange for a client whose verified certificate has the common names ``names``.

    ``accepted`` are those that may be the user, ``default`` stands for its own name; empty: only that.
    """
    allowed = {user if name == DEFAULT else name for name in accepted} or {user}
    return _CertificateExchange(user, names, allowed)


class AsksNothing:
    """What methods have in common that ask the client for nothing."""

    __slots__ = ()

    def answer(self, body: bytes) -> bytes | Done | Later:
        """Nothing was asked."""
        raise ProtocolViolation("unexpected password message")


class _CertificateExchange(AsksNothing):
    """``cert``: TLS has seen who it is."""

    __slots__ = ("_allowed", "_names", "_user")

    def __init__(self, user: str, names: Collection[str], allowed: Collection[str]) -> None:
        self._user = user
        self._names = names
        self._allowed = allowed

    def challenge(self) -> bytes | Done:
        if not self._names:
            raise AuthenticationFailed(self._user, cause="it showed no certificate with a common name")
        if not any(name in self._allowed for name in self._names):
            cause = f"the common name of its certificate, {', '.join(self._names)}, is not allowed"
            raise AuthenticationFailed(self._user, cause=cause)
        return Done(messages.authentication_ok())


class _NoExchange(AsksNothing):
    """``none``: everybody is believed."""

    __slots__ = ()

    def challenge(self) -> bytes | Done:
        return Done(messages.authentication_ok())


class _ClearTextExchange:
    """``clear_text``."""

    __slots__ = ("_another", "_check", "_secret", "_unknown_cause", "_user")

    def __init__(
        self,
        user: str,
        secret: Secret | None,
        unknown_cause: str,
        check: Check | None,
        another: Secret | None,
    ) -> None:
        self._another = another
        self._user = user
        self._secret = secret
        self._unknown_cause = unknown_cause
        self._check = check

    def challenge(self) -> bytes | Done:
        return messages.authentication_cleartext_password()

    def answer(self, body: bytes) -> bytes | Done | Later:
        password = _password(body, self._user)
        if self._check is not None:
            return Later(partial(self._check, password))
        user = encode(self._user)
        if self._secret is None:
            if self._another is not None:
                self._another.is_password(user, password)  # nobody shall see by the time who exists
            raise AuthenticationFailed(self._user, cause=self._unknown_cause)
        if not _tries_all(secret.is_password(user, password) for secret in self._secret.all):
            raise AuthenticationFailed(self._user, cause=WRONG_PASSWORD)
        return Done(messages.authentication_ok(), password=password)


class Md5Exchange:
    """``md5`` with a plain or an MD5 secret."""

    __slots__ = ("_cause", "_salt", "_user", "stored")

    def __init__(self, user: str, secret: Secret | None, salt: bytes, unknown_cause: str) -> None:
        self._user = user
        self._salt = salt
        hashes = () if secret is None else [one.md5_hash(encode(user)) for one in secret.all]
        stored = [one for one in hashes if one is not None]
        self.stored = tuple(stored) or (_UNKNOWN_MD5,)  # what answers are compared with
        self._cause = "" if stored else unknown_cause

    def challenge(self) -> bytes | Done:
        return messages.authentication_md5_password(self._salt)

    def answer(self, body: bytes) -> bytes | Done:
        answer = _password(body, self._user)
        is_right = _tries_all(md5.is_response_right(answer, stored, self._salt) for stored in self.stored)
        if not is_right or self._cause:
            raise AuthenticationFailed(self._user, cause=self._cause or WRONG_PASSWORD)
        return Done(messages.authentication_ok())


class ScramExchange:
    """``scram-sha-256`` with a plain secret or a verifier."""

    __slots__ = ("_cause", "_server", "_user", "stored")

    def __init__(
        self,
        user: str,
        secret: Secret | None,
        mock_key: bytes,
        salt_name: str,
        unknown_cause: str,
        binding: bytes | None,
    ) -> None:
        self._user = user
        salt = scram.derived_salt(mock_key, encode(salt_name))
        verifiers = () if secret is None else secret.verifiers(salt)
        self._cause = ""
        if not verifiers:
            self._cause = unknown_cause if secret is None else "an MD5 hash cannot serve SCRAM"
            verifiers = (Verifier(scram.DEFAULT_ITERATIONS, salt, _NO_KEY, _NO_KEY),)
        self.stored = prepare(verifiers)  # what proofs are compared with
        self._server = SaslServer(self.stored, binding or None, bool(self._cause))

    def challenge(self) -> bytes | Done:
        return self._server.challenge()

    def answer(self, body: bytes) -> bytes | Done:
        said = self._server.answer(body)
        if said is None:
            raise AuthenticationFailed(self._user, cause=self._cause or WRONG_PASSWORD)
        if not self._server.is_over:
            return said
        return Done(said + messages.authentication_ok(), keys=self._server.keys)


def _tries_all(results: Iterable[bool]) -> bool:
    """Whether one of them is true; all are worked out, so that time does not tell which."""
    return sum(results) > 0


def _password(body: bytes, user: str) -> bytes:
    """What a PasswordMessage holds."""
    if body.find(b"\0") != len(body) - 1 or not body:
        raise ProtocolViolation("invalid password packet size")
    if len(body) == 1:
        raise AuthenticationFailed(user, cause="empty password")
    return body[:-1]
