"""Who decides about a clear-text password in place of the configuration: PAM or a directory.

Each is asked in threads of its own (``auth/offload``), so that one that hangs is no other's business.
Whatever it says, the client gets the one text of a failed login; the log gets the cause.
"""

import sys
from collections.abc import Callable
from typing import Final

import gevent

from gpooler.auth import ldap, ldap_names, pam
from gpooler.auth.exchange import Check, Done
from gpooler.auth.ldap import LdapRefused, LdapUnavailable, Question
from gpooler.auth.offload import Offload, OffloadError
from gpooler.config.model import Config, LdapEndpoint, Rule
from gpooler.errors import AuthenticationFailed, AuthenticationUndecided
from gpooler.wire import messages
from gpooler.wire.text import encode

OK: Final = messages.authentication_ok()


def load_libraries(config: Config) -> None:
    """Load what the rules need, in the master before it forks. Raises ConfigurationError."""
    if any(rule.auth_pam_service for rule in config.rules):
        pam.load()
    if any(rule.ldap_endpoint_name for rule in config.rules):
        ldap.load()


def missing_libraries(config: Config) -> str:
    """What the rules need and ``load_libraries`` has not loaded: too late, for it has locks of its own."""
    if any(rule.auth_pam_service for rule in config.rules) and "pamela" not in sys.modules:
        return "PAM"
    if any(rule.ldap_endpoint_name for rule in config.rules) and "ldap" not in sys.modules:
        return "LDAP"
    return ""


class PasswordChecks:
    """The checks of one worker; made in its hub."""

    def __init__(self, config: Config) -> None:
        self._offloads: dict[tuple[str, str], Offload] = {}
        self._limits = (0, 0, 0)
        self.configure(config)

    def configure(self, config: Config) -> None:
        """From now on; what is asked already goes on."""
        self._config = config
        limits = config.limits
        now = (limits.auth_threads, limits.auth_queue_limit, limits.auth_timeout_ms)
        if now != self._limits:
            self._limits = now
            self._offloads = {}

    def of(self, rule: Rule, user: str, database: str, host: str) -> Check | None:
        """What decides about a password of ``user`` from ``host``; None where the configuration does."""
        if rule.auth_pam_service is not None:
            service = rule.auth_pam_service
            return lambda password: self._ask_pam(service, user, password, host)
        if rule.ldap_endpoint_name is not None:
            name = rule.ldap_endpoint_name
            endpoint = self._config.ldap_endpoint[name]
            return lambda password: self._ask_ldap(name, endpoint, rule, user, database, password)
        return None

    def _offload(self, kind: str, name: str) -> Offload:
        """The threads of one service or directory."""
        found = self._offloads.get((kind, name))
        if found is None:
            limits = self._config.limits
            found = self._offloads[kind, name] = Offload(
                f'{kind} "{name}"',
                threads=limits.auth_threads,
                queue_limit=limits.auth_queue_limit,
                timeout_ms=limits.auth_timeout_ms,
            )
        return found

    def _ask_pam(self, service: str, user: str, password: bytes, host: str) -> Done:
        """Yields. Raises AuthenticationFailed."""
        ask: Callable[[], pam.PamAnswer] = lambda: pam.check(service, encode(user), password, host)  # noqa: E731
        try:
            answer = self._offload("PAM service", service).run(ask)
        except OffloadError as error:
            raise AuthenticationUndecided(user, cause=str(error)) from error
        if answer.cause:
            gevent.sleep(answer.delay_s)
            kind = AuthenticationFailed if answer.is_decided else AuthenticationUndecided
            raise kind(user, cause=f'PAM service "{service}": {answer.cause}')
        return Done(OK, password=password)

    def _ask_ldap(
        self, name: str, endpoint: LdapEndpoint, rule: Rule, user: str, database: str, password: bytes
    ) -> Done:
        """Yields. Raises AuthenticationFailed."""
        if fault := ldap_names.fault_of(user):  # no thread is needed to know that
            raise AuthenticationFailed(user, cause=f"LDAP is not asked: {fault}")
        question = Question(user, password, rule.ldap_storage_credentials_attr)
        timeout_ms = self._config.limits.auth_timeout_ms
        try:
            values = self._offload("LDAP endpoint", name).run(
                lambda: ldap.check(endpoint, question, timeout_ms)
            )
        except LdapRefused as error:
            raise AuthenticationFailed(user, cause=f'LDAP endpoint "{name}": {error}') from error
        except LdapUnavailable as error:
            raise AuthenticationUndecided(user, cause=f'LDAP endpoint "{name}": {error}') from error
        except OffloadError as error:
            raise AuthenticationUndecided(user, cause=str(error)) from error
        return Done(OK, password=password, storage_user=self._storage_user(rule, user, database, values))

    def _storage_user(self, rule: Rule, user: str, database: str, values: tuple[str, ...]) -> str | None:
        """Whom the user is at the server; None: as the rule says. Raises AuthenticationFailed."""
        credentials = rule.ldap_storage_credentials
        if not credentials:
            return None
        host = self._config.storage[rule.storage].endpoints[0].host or ""
        group = ldap_names.chosen_group(values, host, database, credentials)
        if group is None:
            attribute = rule.ldap_storage_credentials_attr
            text = f"{attribute} names none of the rule's groups for {host} and database {database}"
            raise AuthenticationFailed(user, cause=text)
        return credentials[group].ldap_storage_username
