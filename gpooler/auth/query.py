"""Runs gpooler's own queries (secrets, members of groups) on connections of their own.

They go straight to the storage of a rule, with its credentials: no parameter of a client ever reaches them,
and they do not count against the limits of pools. psycopg2 waits in the hub (``process/patch``).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import gevent
import psycopg2
import psycopg2.extensions
from gevent.lock import BoundedSemaphore

from gpooler.clock import monotonic_us
from gpooler.config.certificates import parse_protocols
from gpooler.config.model import Config, Rule
from gpooler.errors import ServerFault
from gpooler.net.resolve import Resolver
from gpooler.routing.rules import rule_for_queries

CONNECTIONS_MOST: Final = 2  # of one worker for one database and user
IDLE_US: Final = 60_000_000  # a connection that was not used for so long is closed
IDLE_TICK_S: Final = 10.0
DATA_EXCEPTION: Final = "22"  # class of SQLSTATEs whose messages quote values
NO_FILE: Final = "/dev/null/none"
_LIBPQ_VERSIONS: Final = {
    "tlsv1.0": "TLSv1",
    "tlsv1.1": "TLSv1.1",
    "tlsv1.2": "TLSv1.2",
    "tlsv1.3": "TLSv1.3",
}
# Columns of these types are wanted as the server writes them.
_TIMES: Final = psycopg2.extensions.new_type((1082, 1114, 1184), "GPOOLER_TIME", lambda value, _: value)
# As the server is to write them, and an end to what runs on after we gave up.
_OPTIONS: Final = "-c datestyle=ISO -c timezone=UTC -c statement_timeout={}"

Row = tuple[str | None, ...]


class QueryFailed(Exception):
    """No result was had; the text says why, for the log."""


class Queries:
    """The connections of one worker, by database and user as the configuration names them."""

    def __init__(self, config: Config, resolver: Resolver) -> None:
        self._config = config
        self._resolver = resolver
        self._homes: dict[tuple[str, str], _Home] = {}

    def rows(
        self, database: str, user: str, sql: str, arguments: Sequence[str], *, timeout_ms: int, query_ms: int
    ) -> list[Row]:
        """The rows of ``sql``, whose ``$1`` and so on are ``arguments``. Yields. Raises QueryFailed.

        ``query_ms`` is the limit of the query, ``timeout_ms`` that of all: the wait for a connection and its
        opening, too.
        """
        home = self._homes.get((database, user))
        if home is None:
            storages = self._config.storage
            rules = [rule for rule in self._config.rules if storages[rule.storage].endpoints]
            rule = rule_for_queries(rules, database, user)
            if rule is None:
                raise QueryFailed(f'there is no rule for database "{database}" and user "{user}"')
            home = self._homes[database, user] = _Home(self._config, self._resolver, rule, database, user)
        try:
            with _within(timeout_ms), home.free:
                rows = home.rows(sql, arguments, query_ms)
        except psycopg2.Error as error:
            raise QueryFailed(_text(error)) from None
        except ServerFault as error:
            raise QueryFailed(error.log_text()) from None
        return rows


class _Home:
    """The connections for one database and user."""

    def __init__(self, config: Config, resolver: Resolver, rule: Rule, database: str, user: str) -> None:
        self.free = BoundedSemaphore(CONNECTIONS_MOST)
        self._storage = config.storage[rule.storage]
        self._resolver = resolver
        self._database = rule.storage_db or database
        self._user = rule.storage_user or user
        secret = rule.server_password
        self._password = "" if secret is None else secret.get_secret_value()
        self._idle: list[_Connection] = []
        self._ticker: gevent.Greenlet | None = None

    def rows(self, sql: str, arguments: Sequence[str], query_ms: int) -> list[Row]:
        """See Queries; for who holds ``free``. Raises QueryFailed, psycopg2.Error, ServerFault."""
        while self._idle:
            connection = self._idle.pop()
            try:
                return self._run(connection, sql, arguments, query_ms)
            except psycopg2.Error:
                if not connection.is_closed:
                    raise
                # it died while nobody looked
        return self._run(self._open(query_ms), sql, arguments, query_ms)

    def _run(self, connection: "_Connection", sql: str, arguments: Sequence[str], query_ms: int) -> list[Row]:
        is_sound = False
        try:
            with _within(query_ms):
                rows = connection.rows(sql, arguments)
            is_sound = True
            return rows
        except psycopg2.Error:
            is_sound = not connection.is_closed  # the query is wrong, not the connection
            raise
        finally:
            if is_sound:
                self._park(connection)
            else:
                connection.close()

    def _park(self, connection: "_Connection") -> None:
        connection.idle_since_us = monotonic_us()
        self._idle.append(connection)
        if self._ticker is None:
            self._ticker = gevent.spawn(self._close_idle)

    def _close_idle(self) -> None:
        """As long as there are any: those last used first are used again, so the others grow old."""
        while self._idle:
            gevent.sleep(IDLE_TICK_S)
            limit_us = monotonic_us() - IDLE_US
            for connection in [one for one in self._idle if one.idle_since_us <= limit_us]:
                self._idle.remove(connection)
                connection.close()
        self._ticker = None

    def _open(self, query_ms: int) -> "_Connection":
        storage = self._storage
        endpoint = storage.endpoints[0]
        versions = parse_protocols(storage.tls_protocols)
        options: dict[str, Any] = {
            "port": endpoint.port,
            "dbname": self._database,
            "user": self._user,
            # never NULL, and no file: libpq is not to find a password elsewhere
            "password": self._password,
            "passfile": NO_FILE,
            "sslmode": storage.tls.value.replace("_", "-"),
            "sslrootcert": storage.tls_ca_file,
            "sslcert": storage.tls_cert_file,
            "sslkey": storage.tls_key_file,
            "sslcrl": storage.tls_crl_file,
            "ssl_min_protocol_version": _LIBPQ_VERSIONS[versions[0]],
            "ssl_max_protocol_version": _LIBPQ_VERSIONS[versions[-1]],
            "gssencmode": "disable",
            "client_encoding": "UTF8",
            "application_name": "gpooler",
            "options": _OPTIONS.format(query_ms),
        }
        if endpoint.unix_path is not None:
            return _Connection({**options, "host": os.path.dirname(endpoint.unix_path)})
        *others, last = self._resolver.addresses(endpoint)
        for address in others:
            try:
                return _Connection({**options, "host": endpoint.host, "hostaddr": address.sockaddr[0]})
            except psycopg2.OperationalError:
                continue
        return _Connection({**options, "host": endpoint.host, "hostaddr": last.sockaddr[0]})


class _Connection:
    """One connection, with the queries it has prepared."""

    def __init__(self, options: dict[str, Any]) -> None:
        """Connect. Yields. Raises psycopg2.Error."""
        self._connection = psycopg2.connect(**{k: v for k, v in options.items() if v is not None})
        self._connection.autocommit = True
        psycopg2.extensions.register_type(_TIMES, self._connection)
        self._names: dict[str, str] = {}
        self.idle_since_us = 0

    @property
    def is_closed(self) -> bool:
        return bool(self._connection.closed)

    def close(self) -> None:
        self._connection.close()

    def rows(self, sql: str, arguments: Sequence[str]) -> list[Row]:
        """Yields. Raises psycopg2.Error."""
        with self._connection.cursor() as cursor:
            if not arguments:
                cursor.execute(sql)
            else:
                name = self._names.get(sql)
                if name is None:
                    name = f"gpooler_{len(self._names)}"
                    cursor.execute(f"PREPARE {name} AS {sql}")
                    self._names[sql] = name
                marks = ", ".join(["%s"] * len(arguments))
                cursor.execute(f"EXECUTE {name} ({marks})", tuple(arguments))
            if cursor.description is None:
                raise psycopg2.ProgrammingError("the query gives no rows")
            return [tuple(None if v is None else str(v) for v in row) for row in cursor.fetchall()]


@contextmanager
def _within(limit_ms: int) -> Iterator[None]:
    """Raises QueryFailed if its body takes longer."""
    timeout = gevent.Timeout(limit_ms / 1000)
    with timeout:
        try:
            yield
        except gevent.Timeout as expired:
            if expired is not timeout:
                raise
            raise QueryFailed(f"no answer within {limit_ms} ms") from None


def _text(error: psycopg2.Error) -> str:
    """The first line of what is wrong: a detail may hold what a table holds, and so may a data exception."""
    if error.pgcode and error.pgcode.startswith(DATA_EXCEPTION):
        return f"{error.pgcode}: a value is not what the query takes it for"
    said = error.diag.message_primary or (str(error).strip().splitlines() or ["unknown error"])[0]
    return f"{error.pgcode}: {said}" if error.pgcode else said
