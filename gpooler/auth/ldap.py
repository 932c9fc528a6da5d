"""A password checked by an LDAP directory: a simple bind as the user decides (RFC 4513, section 5.1).

It blocks: to be called in a thread of ``auth/offload``. It needs python-ldap, which lets the GIL go while it
waits. The master loads it before it forks, and so before gevent patches: its locks are those of threads.
"""

import secrets
import socket
import struct
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

from gevent.monkey import get_original

from gpooler.auth import ldap_names
from gpooler.clock import monotonic_us
from gpooler.config.model import LdapEndpoint
from gpooler.config.words import LdapScheme
from gpooler.errors import ConfigurationError

SEARCH_ATTRIBUTE: Final = "uid"
NO_ATTRIBUTES: Final = "1.1"  # RFC 4511, section 4.5.1.8
ENTRIES_MOST: Final = 2  # one is right, two are one too many
LDAP_PORT: Final = 389
KEEPALIVE_S: Final = 5
KEEPALIVE_PROBES: Final = 3
TEXT_MOST: Final = 200  # of what a directory says, in the log


class LdapError(Exception):
    """The user may not come in; the text is for the log."""


class LdapRefused(LdapError):
    """The directory says no, or the name is none to ask it about."""


class LdapUnavailable(LdapError):
    """The directory could not be asked, or does not let gpooler search."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a directory is asked: whether the password is right, and the values of an attribute."""

    user: str
    password: bytes
    attribute: str | None

    def __repr__(self) -> str:
        return f"<Question about {self.user}>"


def load() -> ModuleType:
    """python-ldap. Raises ConfigurationError when it, or libldap, is not there."""
    try:
        import ldap
    except ImportError as error:
        raise ConfigurationError(
            "ldap_endpoint needs the Python package python-ldap",
            hint="Install it with: pip install 'gpooler[ldap]'.",
            cause=str(error),
        ) from error
    module: ModuleType = ldap
    return module


def check(endpoint: LdapEndpoint, question: Question, timeout_ms: int) -> tuple[str, ...]:
    """The values of the attribute, none when none was asked for. Raises LdapError."""
    if fault := ldap_names.fault_of(question.user):
        raise LdapRefused(fault)
    if not question.password:  # an "unauthenticated bind" succeeds (RFC 4513, section 5.1.2)
        raise LdapRefused("empty password")
    ldap: Any = load()
    try:
        conversation = _Conversation(ldap, endpoint, timeout_ms)
    except ldap.LDAPError as error:
        raise LdapUnavailable(_text(error)) from None
    try:
        return conversation.hold(question)
    finally:
        conversation.close()


class _Conversation:
    """One connection to the directory, for one login."""

    def __init__(self, ldap: Any, endpoint: LdapEndpoint, timeout_ms: int) -> None:
        self._ldap = ldap
        self._endpoint = endpoint
        self._deadline_us = monotonic_us() + timeout_ms * 1000
        # these say something about the user, all others about the directory or gpooler's right to search
        self._refusals = (
            ldap.INVALID_CREDENTIALS,
            ldap.INAPPROPRIATE_AUTH,  # the entry has no password
            ldap.UNWILLING_TO_PERFORM,  # disabled
            ldap.CONSTRAINT_VIOLATION,  # locked
            ldap.INVALID_DN_SYNTAX,
            ldap.NO_SUCH_OBJECT,
        )
        self._connection = self._connect() if endpoint.ldaptls else self._initialize(endpoint.ldapserver)
        self._connection.set_option(ldap.OPT_REFERRALS, 0)  # they would carry the password elsewhere
        # With ldaps nothing in libldap ends a handshake that stopped halfway: a machine that is gone must not
        # hold a thread.
        self._connection.set_option(ldap.OPT_X_KEEPALIVE_IDLE, KEEPALIVE_S)
        self._connection.set_option(ldap.OPT_X_KEEPALIVE_INTERVAL, KEEPALIVE_S)
        self._connection.set_option(ldap.OPT_X_KEEPALIVE_PROBES, KEEPALIVE_PROBES)
        self._connection.set_option(ldap.OPT_TCP_USER_TIMEOUT, KEEPALIVE_S * KEEPALIVE_PROBES * 1000)
        if endpoint.ldaptls or endpoint.ldapscheme is LdapScheme.LDAPS:
            self._connection.set_option(ldap.OPT_X_TLS_REQUIRE_CERT, ldap.OPT_X_TLS_DEMAND)
            if endpoint.tls_ca_file is not None:
                self._connection.set_option(ldap.OPT_X_TLS_CACERTFILE, endpoint.tls_ca_file)
            self._connection.set_option(ldap.OPT_X_TLS_NEWCTX, 0)
            # libldap minds OPT_NETWORK_TIMEOUT in a handshake only when it need not wait for it (``tls2.c:
            # ldap_int_tls_start``); else it asks an open connection again and again, for ever.
            self._connection.set_option(ldap.OPT_CONNECT_ASYNC, 1)

    def _initialize(self, servers: str, descriptor: int | None = None) -> Any:
        endpoint = self._endpoint
        uri = ldap_names.uri(endpoint.ldapscheme, servers, endpoint.ldapport)
        return self._ldap.initialize(uri, fileno=descriptor)

    def _connect(self) -> Any:
        """A connection over a socket of our own, whose reads and writes have a limit: for StartTLS.

        Raises LdapUnavailable.
        """
        cause: Exception | None = None
        for server in self._endpoint.ldapserver.split():
            try:
                sock = _open_socket(server.strip("[]"), self._endpoint.ldapport or LDAP_PORT, self._left_s())
            except OSError as error:
                cause = error
            else:
                return self._initialize(server, sock.detach())
        raise LdapUnavailable(f"cannot connect: {cause}")

    def hold(self, question: Question) -> tuple[str, ...]:
        """Raises LdapError."""
        endpoint = self._endpoint
        if endpoint.ldaptls:
            self._must(self._connection.start_tls_s)
        if endpoint.ldapbasedn is None:
            self._bind_as_user(
                ldap_names.bind_name(endpoint.ldapprefix, question.user, endpoint.ldapsuffix), question
            )
            return ()
        password = "" if endpoint.ldapbindpasswd is None else endpoint.ldapbindpasswd.get_secret_value()
        self._must(self._connection.simple_bind_s, endpoint.ldapbinddn or "", password)
        name, values = self._find(endpoint.ldapbasedn, question)
        self._bind_as_user(name, question)
        return values

    def close(self) -> None:
        """Say goodbye, if the directory listens; the descriptor is closed in any case."""
        try:
            self._connection.unbind_s()
        except self._ldap.LDAPError:
            pass

    def _find(self, base: str, question: Question) -> tuple[str, tuple[str, ...]]:
        """The one entry of the user: its DN, the values of the attribute. Raises LdapError."""
        endpoint = self._endpoint
        attribute = endpoint.ldapsearchattribute or SEARCH_ATTRIBUTE
        found = self._must(
            self._connection.search_ext_s,
            base,
            self._ldap.SCOPE_SUBTREE,
            ldap_names.search_filter(attribute, question.user, endpoint.ldapsearchfilter),
            [question.attribute or NO_ATTRIBUTES],
            sizelimit=ENTRIES_MOST,
        )
        entries = [(name, values) for name, values in found if name]  # without those that refer elsewhere
        if not entries:
            self._bind_as_nobody(base)
            raise LdapRefused("no entry for this user")
        if len(entries) > 1:
            raise LdapRefused("more than one entry for this user")
        [(name, attributes)] = entries
        values = [
            value.decode(errors="replace")
            for key, several in attributes.items()
            if question.attribute is not None and key.lower() == question.attribute.lower()
            for value in several
        ]
        return name, tuple(values)

    def _bind_as_user(self, name: str, question: Question) -> None:
        if not name:
            raise LdapRefused("no name to bind with")  # it would be an anonymous bind
        try:
            self._call(self._connection.simple_bind_s, name, question.password)
        except self._refusals as error:
            raise LdapRefused(_text(error)) from None
        except self._ldap.LDAPError as error:
            raise LdapUnavailable(_text(error)) from None

    def _bind_as_nobody(self, base: str) -> None:
        """A user that is not there takes as many steps as one with another password."""
        try:
            self._call(
                self._connection.simple_bind_s, f"cn={secrets.token_hex(8)},{base}", secrets.token_hex(8)
            )
        except self._ldap.LDAPError:
            pass

    def _must(self, call: Any, *arguments: Any, **options: Any) -> Any:
        """A step that has nothing to do with the user's password."""
        try:
            return self._call(call, *arguments, **options)
        except self._ldap.LDAPError as error:
            raise LdapUnavailable(_text(error)) from None

    def _call(self, call: Any, *arguments: Any, **options: Any) -> Any:
        """In what is left of the time. Raises ldap.LDAPError, LdapUnavailable."""
        left_s = self._left_s()
        self._connection.set_option(self._ldap.OPT_NETWORK_TIMEOUT, left_s)
        self._connection.set_option(self._ldap.OPT_TIMEOUT, left_s)
        self._connection.timeout = left_s
        return call(*arguments, **options)

    def _left_s(self) -> float:
        """Raises LdapUnavailable when there is none."""
        left_s = (self._deadline_us - monotonic_us()) / 1e6
        if left_s <= 0:
            raise LdapUnavailable("no time left")
        return left_s


def _open_socket(host: str, port: int, limit_s: float) -> socket.socket:
    """Connected, and blocking as libldap wants it, but no step takes longer than ``limit_s``. Raises OSError.

    The socket is one of the system, not of gevent: this is no greenlet.
    """
    cause = OSError("no address")
    for family, kind, protocol, _, address in get_original("socket", "getaddrinfo")(
        host, port, type=socket.SOCK_STREAM
    ):
        sock: socket.socket = get_original("socket", "socket")(family, kind, protocol)
        try:
            sock.settimeout(limit_s)
            sock.connect(address)
            sock.setblocking(True)
            limit = struct.pack("@ll", *divmod(max(1, int(limit_s * 1e6)), 1_000_000))  # a struct timeval
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        except OSError as error:
            sock.close()
            cause = error
        else:
            return sock
    raise cause


def _text(error: BaseException) -> str:
    """What the library and the directory say, in one line."""
    said = error.args[0] if error.args and isinstance(error.args[0], dict) else {}
    parts = [str(said[key]) for key in ("desc", "info") if said.get(key)] or [type(error).__name__]
    return " ".join(": ".join(parts).split())[:TEXT_MOST]
