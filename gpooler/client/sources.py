"""Begins the exchange of a login: with the configuration's secret, or with what somebody else says.

Whoever else is asked is asked in the login's own greenlet and with a deadline. Whatever comes of it, the
client gets the one text of a failed login; the log gets the cause.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Final

from gpooler.auth import exchange, peer
from gpooler.auth.exchange import AsksNothing, Done, Exchange, Later
from gpooler.auth.lookup import Found, Key, Lookups, read_rows
from gpooler.auth.offload import Offload, OffloadError
from gpooler.auth.query import Queries, QueryFailed
from gpooler.auth.query_text import QueryText, compile_query
from gpooler.auth.secrets import Secret
from gpooler.client.agents import Agents
from gpooler.client.entrance import Guest
from gpooler.client.password_checks import PasswordChecks
from gpooler.client.plan import Plan
from gpooler.clock import wall
from gpooler.config.model import Authentication, Config, Rule
from gpooler.errors import (
    AuthenticationFailed,
    AuthenticationUndecided,
    AuthQueryFailed,
    CertificateNeedsTls,
)
from gpooler.log import Logger
from gpooler.wire import messages

AUTH_QUERY_MS: Final = 500  # as Odyssey's
# Names of user ids are files in most places, and a directory in some.
PEER_THREADS: Final = 2
PEER_QUEUE: Final = 256
PEER_TIMEOUT_MS: Final = 1000

Begin = Callable[..., Exchange]


class Sources:
    """Those of one worker; made in its hub."""

    def __init__(
        self, config: Config, agents: Agents, queries: Queries, mock_key: bytes, logger: Logger
    ) -> None:
        """``mock_key``: see ``auth.exchange``."""
        self._mock_key = mock_key
        self._logger = logger
        self._checks = PasswordChecks(config)
        self._peers: Offload | None = None
        self.configure(config, agents, queries)

    def configure(self, config: Config, agents: Agents, queries: Queries) -> None:
        """From now on; what is asked already is answered as before."""
        self.agents = agents
        texts = {rule.name: compile_query(rule.auth_query) for rule in config.served if rule.auth_query}
        rules = {rule.name: rule for rule in config.served}
        self._texts: dict[str, QueryText] = texts
        timeout_ms = config.limits.auth_timeout_ms
        self._lookups = Lookups(lambda key: _fetch(rules, texts, queries, timeout_ms, key), self._on_failure)
        self._checks.configure(config)

    def exchange(self, guest: Guest, plan: Plan, md5_salt: bytes | None) -> Exchange:
        """The exchange for ``plan``, which has a rule. ``md5_salt``: see ``auth.exchange``.

        Raises CertificateNeedsTls.
        """
        rule = plan.rule
        assert rule is not None
        user = plan.packet.user
        if plan.method is Authentication.PEER:
            return PeerExchange(user, peer.peer_uid(guest.fd), self._name_of)
        if plan.method is Authentication.CERT:
            if guest.tls is None:
                raise CertificateNeedsTls
            return exchange.by_certificate(user, guest.tls.facts.common_names, rule.auth_common_name)
        check = self.agents.of(guest, plan, rule) or self._checks.of(
            rule, user, plan.packet.database, guest.host if guest.family else ""
        )
        begin = partial(
            exchange.begin,
            # an agent is shown what the client sends
            Authentication.CLEAR_TEXT if plan.method is Authentication.EXTERNAL else plan.method,
            user,
            mock_key=self._mock_key,
            # with a query invented user names cost none, and each stored verifier has its own salt
            salt_name=rule.name if rule.is_default_user and not rule.auth_query else None,
            md5_salt=md5_salt,
            binding=binding_of(guest),
            check=check,
        )
        if rule.auth_query and check is None and plan.method is not Authentication.NONE:
            host = guest.host if self._texts[rule.name].has_host else ""
            return QueriedExchange(begin, user, (rule.name, user, host), self._lookups)
        return begin(secret=plan.secret)

    def _name_of(self, uid: int) -> str | None:
        """Yields. Raises OffloadError."""
        if self._peers is None:
            self._peers = Offload(
                "peer", threads=PEER_THREADS, queue_limit=PEER_QUEUE, timeout_ms=PEER_TIMEOUT_MS
            )
        return self._peers.run(lambda: peer.name_of(uid))

    def _on_failure(self, key: Key, error: QueryFailed) -> None:
        name, user, _ = key
        text = f'auth_query of rule {name} failed for user "{user}", who is known for some seconds: {error}'
        self._logger.error(text, context="auth")


def _fetch(
    rules: Mapping[str, Rule], texts: Mapping[str, QueryText], queries: Queries, timeout_ms: int, key: Key
) -> Found:
    """Yields. Raises QueryFailed."""
    name, user, host = key
    rule, text = rules[name], texts[name]
    assert rule.auth_query_db is not None
    assert rule.auth_query_user is not None
    if not _is_text(user):
        return Found()  # no user of a database in UTF-8
    arguments = (user, host) if text.has_host else (user,)
    rows = queries.rows(
        rule.auth_query_db,
        rule.auth_query_user,
        text.sql,
        arguments,
        timeout_ms=timeout_ms,
        query_ms=AUTH_QUERY_MS,
    )
    return read_rows(rows, user)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


class QueriedExchange:
    """Any method that needs a secret, with one that an ``auth_query`` gives."""

    __slots__ = ("_begin", "_inner", "_key", "_lookups", "_secret", "_user")

    def __init__(self, begin: Begin, user: str, key: Key, lookups: Lookups) -> None:
        self._begin = begin
        self._user = user
        self._key = key
        self._lookups = lookups
        self._inner: Exchange | None = None
        self._secret: Secret | None = None

    def challenge(self) -> bytes | Done | Later:
        """At once where the answer is known."""
        known = self._lookups.known(self._key)
        return Later(self._ask) if known is None else self._go_on(*known)

    def _ask(self) -> bytes | Done:
        """Yields. Raises AuthQueryFailed."""
        try:
            found, secret = self._lookups.ask(self._key)
        except QueryFailed as error:
            raise AuthQueryFailed(self._user, cause=f"auth_query failed: {error}") from None
        said = self._go_on(found, secret)
        assert not isinstance(said, Later)
        return said

    def _go_on(self, found: Found, secret: Secret | None) -> bytes | Done | Later:
        cause = "auth_query gives no password for this user"
        if secret is not None and found.valid_until <= wall():
            secret, cause = None, "the password has expired"
        self._secret = secret
        another = self._lookups.another(self._key)
        self._inner = self._begin(secret=secret, unknown_cause=cause, another=another)
        return self._inner.challenge()

    def answer(self, body: bytes) -> bytes | Done | Later:
        """As the method does."""
        assert self._inner is not None
        said = self._inner.answer(body)
        return replace(said, secret=self._secret) if isinstance(said, Done) else said


class PeerExchange(AsksNothing):
    """``peer``: a client of a Unix socket is whom the system says it is; it is asked for nothing."""

    __slots__ = ("_name_of", "_uid", "_user")

    def __init__(self, user: str, uid: int, name_of: Callable[[int], str | None]) -> None:
        self._user = user
        self._uid = uid
        self._name_of = name_of

    def challenge(self) -> bytes | Done | Later:
        """Always ``Later``: the name may come from a directory."""
        return Later(self._ask)

    def _ask(self) -> bytes | Done:
        """Yields. Raises AuthenticationFailed."""
        try:
            name = self._name_of(self._uid)
        except OffloadError as error:
            raise AuthenticationUndecided(self._user, cause=str(error)) from None
        if name != self._user:
            who = f"uid {self._uid}" if name is None else f'"{name}"'
            raise AuthenticationFailed(self._user, cause=f"peer is {who}")
        return Done(messages.authentication_ok())


def binding_of(guest: Guest) -> bytes | None:
    """Channel binding of its TLS session, None without one."""
    return None if guest.tls is None else guest.tls.facts.binding


def learns_servers_secret(rule: Rule, user: str) -> bool:
    """Whether what a client proved itself with is good for servers, too: it is the same user there."""
    return rule.storage_user in (None, user) and rule.storage_password is None
