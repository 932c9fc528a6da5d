"""The life of a client of the console after its login: messages in, answers out, in a greenlet of its own."""

import itertools
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

import gevent

from gpooler.console import frontend
from gpooler.console.answers import ROWS_AT_ONCE, Answer, Answers
from gpooler.console.grammar import parse
from gpooler.console.settings import Settings
from gpooler.console.statements import Nothing, Statement, Transaction
from gpooler.console.table import Columns, Row, encoders, row_description
from gpooler.console.tables import NAMES
from gpooler.errors import (
    AdminShutdown,
    BindMismatch,
    ConsoleFailed,
    ConsoleSyntaxError,
    ConsoleUnsupported,
    DuplicateStatement,
    GpoolerError,
    ProtocolViolation,
    TransactionFailed,
    UnknownPortal,
    UnknownStatement,
)
from gpooler.log import LogContext, Logger
from gpooler.wire import codes, messages
from gpooler.wire.data_row import data_row
from gpooler.wire.text import encode

TURN_S: Final = 0.002  # which the others have after so many rows: the relay wants a core, too
SEND_SIZE: Final = 32_768  # bytes that are gathered before they are sent
PREPARED_MOST: Final = 256  # statements, and portals, of one client
TEXT_OID: Final = 25


class SessionEnd(Exception):
    """Thrown into a session's greenlet when the worker ends; between answers the client is told."""


class Stream(Protocol):
    """The connection: ``net.tls.Stream``."""

    def sendall(self, data: bytes) -> None:
        """Yields. Raises OSError."""

    def recv(self) -> bytes:
        """Empty at the end. Yields. Raises OSError."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A statement that Parse has made; None is an empty one."""

    statement: Statement | None
    types: tuple[int, ...]


@dataclass(slots=True)
class _Portal:
    """A statement with its values. Run at its first Execute, whose answer is kept for the next."""

    statement: Statement | None
    values: tuple[str | None, ...]
    results: tuple[int, ...]
    answer: Answer | None = None
    rows: Iterator[Row] = field(default_factory=lambda: iter(()))


class Session:
    """One client. ``run`` is the body of its greenlet."""

    def __init__(
        self,
        stream: Stream,
        pending: bytes,
        answers: Answers,
        settings: Settings,
        who: LogContext,
        logger: Logger,
        shown_id: str | None,
    ) -> None:
        """``pending``: bytes that came with its login; ``shown_id``: before the texts of errors."""
        self._stream = stream
        self._framer = frontend.Framer(pending)
        self._answers = answers
        self._settings = settings
        self._who = who
        self._logger = logger
        self._shown_id = shown_id
        self._status = codes.IDLE
        self._is_skipping = False  # up to the next Sync
        self._prepared: dict[str, _Prepared] = {}
        self._portals: dict[str, _Portal] = {}
        self._out = bytearray()
        self._handlers: dict[bytes, Callable[[bytes], None]] = {
            codes.PARSE: self._parse,
            codes.BIND: self._bind,
            codes.DESCRIBE: self._describe,
            codes.EXECUTE: self._execute,
            codes.CLOSE: self._close,
            codes.FUNCTION_CALL: self._function_call,
        }

    def run(self, greeting: bytes) -> str:
        """Serve until the client leaves; ``greeting`` goes out first. Yields. Returns how it ended."""
        try:
            self._put(greeting)
            for name, value in self._settings.reported.items():
                self._put(messages.parameter_status(name, value))
            self._ready()
            while True:
                for kind, body in self._framer.messages():
                    if kind == codes.TERMINATE:
                        return "client_terminated"
                    self._handle(kind, body)
                self._flush()
                try:
                    data = self._stream.recv()
                except SessionEnd:
                    self.end(AdminShutdown())
                    raise
                if not data:
                    return "client_gone"
                self._framer.feed(data)
        except SessionEnd:
            return "shutdown"
        except OSError:
            return "client_gone"
        except GpoolerError as error:
            self.end(error)
            return "client_protocol"

    def end(self, error: GpoolerError) -> None:
        """The last thing this client is told. Yields."""
        self._error(error)
        try:
            self._flush()
        except OSError:
            pass  # it does not hear it

    # -- sending

    def _put(self, data: bytes) -> None:
        self._out += data
        if len(self._out) >= SEND_SIZE:
            self._flush()

    def _flush(self) -> None:
        data = bytes(self._out)
        self._out.clear()
        if data:
            self._stream.sendall(data)

    def _ready(self) -> None:
        self._put(messages.ready_for_query(self._status))
        self._flush()

    def _error(self, error: GpoolerError) -> None:
        self._logger.info(f"console: {error.sqlstate} {error.log_text()}", context="console", who=self._who)
        self._put(messages.error_response(error, self._shown_id))
        if self._status == codes.IN_TRANSACTION:
            self._status = codes.IN_FAILED_TRANSACTION

    # -- messages

    def _handle(self, kind: bytes, body: bytes) -> None:
        """Raises ProtocolViolation, OSError."""
        if kind == codes.QUERY and not self._is_skipping:
            self._query(frontend.read_query(body))
        elif kind == codes.SYNC:
            self._is_skipping = False
            if self._status == codes.IDLE:
                self._portals.clear()
            self._ready()
        elif kind == codes.FLUSH:
            self._flush()
        elif kind in self._handlers and not self._is_skipping:
            try:
                self._guarded(lambda: self._handlers[kind](body))
            except ProtocolViolation:
                raise
            except GpoolerError as error:
                self._error(error)
                self._is_skipping = True
        # what is left is the rest of a COPY that never was: PostgreSQL does not mind it either

    def _guarded(self, work: Callable[[], None]) -> None:
        """A mistake of ours ends the statement and not the client."""
        try:
            work()
        except (GpoolerError, OSError):
            raise
        except Exception as error:
            self._logger.error(traceback.format_exc(), context="console", who=self._who)
            raise ConsoleFailed(cause=f"uncaught {type(error).__name__}") from error

    def _query(self, sql: str) -> None:
        self._prepared.pop("", None)
        try:
            statements = parse(sql, NAMES)
            if not statements:
                self._put(messages.message(codes.EMPTY_QUERY_RESPONSE))
            for statement in statements:
                self._guarded(lambda statement=statement: self._run(statement))  # type: ignore[misc]
        except GpoolerError as error:
            self._error(error)
        self._ready()

    def _run(self, statement: Statement) -> None:
        answer = self._answer(statement, ())
        if answer.columns is not None:
            self._put(row_description(answer.columns))
            self._rows(answer.rows, answer.columns, ())
        self._put(messages.command_complete(answer.tag))

    def _answer(self, statement: Statement, values: tuple[str | None, ...]) -> Answer:
        is_rollback = statement in (Transaction("COMMIT"), Transaction("ROLLBACK"))
        if self._status == codes.IN_FAILED_TRANSACTION and not (
            is_rollback or statement == Nothing("ROLLBACK")
        ):
            raise TransactionFailed
        if isinstance(statement, Transaction):
            tag = statement.tag
            if is_rollback and self._status == codes.IN_FAILED_TRANSACTION:
                tag = "ROLLBACK"
            self._status = codes.IDLE if is_rollback else codes.IN_TRANSACTION
            return Answer(tag)
        if statement == Nothing("ROLLBACK"):
            self._status = codes.IN_TRANSACTION
        before = self._settings.application_name
        answer = self._answers.answer(statement, values)
        for text, detail in answer.notices:
            self._put(_notice(text, detail))
        if self._settings.application_name != before:
            self._put(messages.parameter_status("application_name", self._settings.application_name))
        return answer

    def _rows(self, rows: Iterable[Row], columns: Columns, formats: tuple[int, ...]) -> int:
        how = encoders(columns, formats)
        number = 0
        for number, row in enumerate(rows, 1):
            self._put(data_row(row, how))
            if number % ROWS_AT_ONCE == 0:
                gevent.sleep(TURN_S)
        return number

    # -- the extended protocol

    def _parse(self, body: bytes) -> None:
        message = frontend.read_parse(body)
        if message.name and message.name in self._prepared:
            raise DuplicateStatement(f'prepared statement "{message.name}" already exists')
        if len(self._prepared) >= PREPARED_MOST:
            raise ConsoleUnsupported(f"a client of the console may prepare {PREPARED_MOST} statements")
        statements = parse(message.sql, NAMES)
        if len(statements) > 1:
            raise ConsoleSyntaxError("cannot insert multiple commands into a prepared statement")
        self._prepared[message.name] = _Prepared(statements[0] if statements else None, message.types)
        self._put(messages.message(codes.PARSE_COMPLETE))

    def _statement(self, name: str) -> _Prepared:
        try:
            return self._prepared[name]
        except KeyError:
            named = f'prepared statement "{name}"' if name else "unnamed prepared statement"
            raise UnknownStatement(f"{named} does not exist") from None

    def _portal(self, name: str) -> _Portal:
        try:
            return self._portals[name]
        except KeyError:
            raise UnknownPortal(f'portal "{name}" does not exist') from None

    def _bind(self, body: bytes) -> None:
        message = frontend.read_bind(body)
        prepared = self._statement(message.statement)
        wanted = _parameter_types(prepared)
        if len(message.values) != len(wanted):
            raise BindMismatch(
                f"bind message supplies {len(message.values)} parameters, "
                f'but prepared statement "{message.statement}" requires {len(wanted)}'
            )
        columns = self._columns(prepared.statement)
        if len(message.results) > 1 and len(message.results) != len(columns or ()):
            raise BindMismatch(
                f"bind message has {len(message.results)} result formats but query has {len(columns or ())} "
                "columns"
            )
        if message.portal and message.portal in self._portals:
            raise DuplicateStatement(f'portal "{message.portal}" already exists')
        if len(self._portals) >= PREPARED_MOST:
            raise ConsoleUnsupported(f"a client of the console may have {PREPARED_MOST} portals")
        values = frontend.parameter_texts(message, wanted)
        self._portals[message.portal] = _Portal(prepared.statement, values, message.results)
        self._put(messages.message(codes.BIND_COMPLETE))

    def _columns(self, statement: Statement | None) -> Columns | None:
        return None if statement is None else self._answers.columns(statement)

    def _describe(self, body: bytes) -> None:
        target = frontend.read_target(body)
        formats: tuple[int, ...] = ()
        if target.is_statement:
            prepared = self._statement(target.name)
            statement = prepared.statement
            types = _parameter_types(prepared)
            parts = [len(types).to_bytes(2, "big"), *(oid.to_bytes(4, "big") for oid in types)]
            self._put(messages.message(codes.PARAMETER_DESCRIPTION, b"".join(parts)))
        else:
            portal = self._portal(target.name)
            statement, formats = portal.statement, portal.results
        columns = self._columns(statement)
        if columns is None:
            self._put(messages.message(codes.NO_DATA))
        else:
            self._put(row_description(columns, formats))

    def _execute(self, body: bytes) -> None:
        message = frontend.read_execute(body)
        portal = self._portal(message.portal)
        if portal.statement is None:
            self._put(messages.message(codes.EMPTY_QUERY_RESPONSE))
            return
        if portal.answer is None:
            portal.answer = self._answer(portal.statement, portal.values)
            portal.rows = iter(portal.answer.rows)
        if portal.answer.columns is not None:
            rows = itertools.islice(portal.rows, message.rows) if message.rows else portal.rows
            count = self._rows(rows, portal.answer.columns, portal.results)
            if message.rows and count == message.rows:
                self._put(messages.message(codes.PORTAL_SUSPENDED))
                return
        self._put(messages.command_complete(portal.answer.tag))

    def _close(self, body: bytes) -> None:
        target = frontend.read_target(body)
        if target.is_statement:
            self._prepared.pop(target.name, None)
        else:
            self._portals.pop(target.name, None)
        self._put(messages.message(codes.CLOSE_COMPLETE))

    def _function_call(self, body: bytes) -> None:
        raise ConsoleUnsupported("the console has no function calls")


def _parameter_types(prepared: _Prepared) -> tuple[int, ...]:
    """OIDs: what the client gave, text for the others."""
    count = max(
        len(prepared.types), 0 if prepared.statement is None else Answers.parameters(prepared.statement)
    )
    given = prepared.types + (0,) * (count - len(prepared.types))
    return tuple(oid or TEXT_OID for oid in given)


def _notice(text: str, detail: str) -> bytes:
    fields = {"S": "NOTICE", "V": "NOTICE", "C": "00000", "M": text, "D": detail}
    parts = [f"{code}{value}\0" for code, value in fields.items() if value]
    return messages.message(codes.NOTICE_RESPONSE, encode("".join(parts)) + b"\0")
