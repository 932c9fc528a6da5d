"""Our login to a server: bytes in, bytes out, until it is ready for queries.

Section "Start-up" of the protocol documentation, from the client's side.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from gpooler.auth import md5
from gpooler.auth.scram import ScramClient, ScramKeys
from gpooler.auth.secrets import Secret
from gpooler.errors import PostgresError, ServerAuthentication, ServerProtocol
from gpooler.wire import codes, messages
from gpooler.wire.text import encode

# libpq takes no longer Authentication message either.
MAX_AUTHENTICATION_LENGTH: Final = 2000
# Notices of one login that are kept for the log; a login trigger may raise any number.
MAX_NOTICES: Final = 16


class LoginState(IntEnum):
    """Where a login stands."""

    NEW = 0
    STARTED = 1  # StartupMessage sent: the server names its method
    PASSWORD_SENT = 2  # clear text or MD5: AuthenticationOk is next
    SASL_STARTED = 3  # client-first-message sent
    SASL_PROVED = 4  # client-final-message sent
    SASL_VERIFIED = 5  # the server has proved itself, too: AuthenticationOk is next
    AUTHENTICATED = 6  # parameters, key, ReadyForQuery
    READY = 7


# States in which an Authentication message of this code may come, and the state after it.
_NEXT: Final = {
    (LoginState.STARTED, codes.AUTHENTICATION_OK): LoginState.AUTHENTICATED,
    (LoginState.STARTED, codes.AUTHENTICATION_CLEARTEXT_PASSWORD): LoginState.PASSWORD_SENT,
    (LoginState.STARTED, codes.AUTHENTICATION_MD5_PASSWORD): LoginState.PASSWORD_SENT,
    (LoginState.STARTED, codes.AUTHENTICATION_SASL): LoginState.SASL_STARTED,
    (LoginState.PASSWORD_SENT, codes.AUTHENTICATION_OK): LoginState.AUTHENTICATED,
    (LoginState.SASL_STARTED, codes.AUTHENTICATION_SASL_CONTINUE): LoginState.SASL_PROVED,
    (LoginState.SASL_PROVED, codes.AUTHENTICATION_SASL_FINAL): LoginState.SASL_VERIFIED,
    (LoginState.SASL_VERIFIED, codes.AUTHENTICATION_OK): LoginState.AUTHENTICATED,
}

_UNSUPPORTED: Final = {
    codes.AUTHENTICATION_KERBEROS_V5: "Kerberos V5",
    codes.AUTHENTICATION_GSS: "GSSAPI",
    codes.AUTHENTICATION_SSPI: "SSPI",
}


@dataclass(frozen=True, slots=True)
class LoginResult:
    """What a server said about itself by the time it was ready."""

    parameters: dict[str, str]  # as reported by ParameterStatus, in order
    pid: int  # 0 when the server sent no key: nothing can be cancelled there
    secret: bytes = field(repr=False)
    rest: bytes = field(repr=False)  # bytes that came behind ReadyForQuery
    notices: tuple[dict[str, str], ...]  # fields of NoticeResponses


class ServerLogin:
    """One login. ``start`` once, then ``receive`` what comes until ``result`` is there.

    ``receive`` raises ``PostgresError`` for an ErrorResponse of the server, ``ServerAuthentication`` when we
    cannot give what it asks for or it cannot prove itself, ``ServerProtocol`` for anything else.
    """

    def __init__(
        self,
        user: str,
        database: str,
        *,
        secret: Secret | None = None,
        keys: ScramKeys | None = None,
        parameters: Mapping[str, str] | None = None,
        binding: bytes | None = None,
    ) -> None:
        """``keys`` serve SCRAM instead of a plain ``secret``; ``parameters`` go into the StartupMessage.

        ``binding``: channel binding of the TLS session (``auth/scram.py: END_POINT``).
        """
        self.result: LoginResult | None = None
        self.state = LoginState.NEW
        self._user = user
        self._startup = {"user": user, "database": database, **(parameters or {})}
        self._secret = secret
        self._keys = keys
        self._buffer = b""
        self._binding = binding
        self._scram = ScramClient()
        self._parameters: dict[str, str] = {}
        self._pid = 0
        self._cancel_secret = b""
        self._notices: list[dict[str, str]] = []

    def start(self) -> bytes:
        """The StartupMessage.

        Protocol 3.0 for every server: all that 3.2 adds are longer cancel keys, which only travel between us
        and the server, and servers and poolers before 2017 close on a minor they do not know.
        """
        self.state = LoginState.STARTED
        return messages.startup_message(self._startup, codes.PROTOCOL_3_0)

    def receive(self, data: bytes) -> bytes:
        """Takes what the server sent, in any portions; returns what to send, maybe nothing."""
        if self.state in (LoginState.NEW, LoginState.READY):
            raise ValueError(f"receive() in state {self.state.name}")
        self._buffer += data
        offset = 0
        answer = b""
        while self.result is None:
            taken = messages.take_message(self._buffer, offset)
            if taken is None:
                break
            kind, body, offset = taken
            answer += self._on_message(kind, body, offset)
        self._buffer = self._buffer[offset:]
        return answer

    def _on_message(self, kind: bytes, body: bytes, end: int) -> bytes:
        if kind == codes.ERROR_RESPONSE:
            raise PostgresError(messages.parse_error(body))
        if kind == codes.NOTICE_RESPONSE:
            if len(self._notices) < MAX_NOTICES:
                self._notices.append(messages.parse_error(body))
            return b""
        if kind == codes.NEGOTIATE_PROTOCOL_VERSION:
            self._on_negotiation(body)
            return b""
        if kind == codes.AUTHENTICATION:
            return self._on_authentication(body)
        if self.state is not LoginState.AUTHENTICATED:
            raise ServerProtocol(cause=f"message type {kind!r} in state {self.state.name}")
        if kind == codes.PARAMETER_STATUS:
            name, value = messages.parse_parameter_status(body)
            self._parameters[name] = value
        elif kind == codes.BACKEND_KEY_DATA:
            self._pid, self._cancel_secret = messages.parse_backend_key_data(body)
        elif kind == codes.READY_FOR_QUERY:
            self._on_ready(body, end)
        else:
            raise ServerProtocol(cause=f"message type {kind!r} in state {self.state.name}")
        return b""

    def _on_ready(self, body: bytes, end: int) -> None:
        if messages.parse_ready_for_query(body) != codes.IDLE:
            raise ServerProtocol(cause="ReadyForQuery after a login is in a transaction")
        self.state = LoginState.READY
        self.result = LoginResult(
            self._parameters, self._pid, self._cancel_secret, self._buffer[end:], tuple(self._notices)
        )

    def _on_negotiation(self, body: bytes) -> None:
        """We asked for the oldest minor and for no option, so there is nothing to give up."""
        negotiation = messages.parse_negotiate_protocol_version(body)
        if self.state is not LoginState.STARTED or negotiation.names:
            raise ServerProtocol(cause="NegotiateProtocolVersion out of place")
        # The documentation says the minor alone, PostgreSQL sends the whole word.
        if negotiation.version not in (codes.PROTOCOL_3_0, 0):
            raise ServerProtocol(cause=f"server wants protocol {negotiation.version:#010x}")

    def _on_authentication(self, body: bytes) -> bytes:
        if len(body) > MAX_AUTHENTICATION_LENGTH:
            raise ServerProtocol(cause=f"Authentication message of {len(body)} bytes")
        code, data = messages.parse_authentication(body)
        if code in _UNSUPPORTED:
            raise ServerAuthentication(cause=f"server wants {_UNSUPPORTED[code]}, which is not supported")
        following = _NEXT.get((self.state, code))
        if following is None:
            raise ServerProtocol(cause=f"authentication code {code} in state {self.state.name}")
        self.state = following
        match code:
            case codes.AUTHENTICATION_CLEARTEXT_PASSWORD:
                return self._clear_text_password()
            case codes.AUTHENTICATION_MD5_PASSWORD:
                return self._md5_password(data)
            case codes.AUTHENTICATION_SASL:
                return self._sasl_first(data)
            case codes.AUTHENTICATION_SASL_CONTINUE:
                return self._sasl_final(data)
            case codes.AUTHENTICATION_SASL_FINAL:
                self._scram.verify(data)
        return b""

    def _clear_text_password(self) -> bytes:
        password = None if self._secret is None else self._secret.plain
        if password is None:
            raise self._cannot_serve("a clear-text password")
        return messages.password_message(password)

    def _md5_password(self, salt: bytes) -> bytes:
        if len(salt) != md5.SALT_LENGTH:
            raise ServerProtocol(cause=f"MD5 salt of {len(salt)} bytes")
        stored = None if self._secret is None else self._secret.md5_hash(encode(self._user))
        if stored is None:
            raise self._cannot_serve("an MD5 password")
        return messages.password_message(md5.response(stored, salt))

    def _sasl_first(self, data: bytes) -> bytes:
        mechanisms = messages.parse_sasl_mechanisms(data)
        self._scram = ScramClient(binding=self._binding, offers=mechanisms)
        if self._scram.mechanism not in mechanisms:
            names = b", ".join(mechanisms).decode("ascii", "backslashreplace")
            raise ServerAuthentication(cause=f"server offers {names}, none of which is supported")
        if self._keys is None and (self._secret is None or self._secret.plain is None):
            raise self._cannot_serve("SCRAM")
        return messages.sasl_initial_response(self._scram.mechanism, self._scram.first())

    def _sasl_final(self, data: bytes) -> bytes:
        challenge = self._scram.challenge(data)
        keys = self._keys
        if keys is None and self._secret is not None:
            keys = self._secret.keys(challenge.salt, challenge.iterations)
        if keys is None:
            raise self._cannot_serve("SCRAM")
        return messages.sasl_response(self._scram.final(challenge, keys))

    def _cannot_serve(self, wanted: str) -> ServerAuthentication:
        has = "there is none" if self._secret is None else f"the secret is {self._secret.kind.name.lower()}"
        return ServerAuthentication(cause=f"server wants {wanted} of user {self._user!r}, but {has}")
