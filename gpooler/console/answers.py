"""What the console answers to a statement: columns, rows, notices, a tag. The protocol is ``session``'s."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import gevent

from gpooler.config.model import Config
from gpooler.config.words import Role
from gpooler.console.acts import OPTIONS, Acts
from gpooler.console.facts import View
from gpooler.console.grammar import nearest_table
from gpooler.console.selection import compile_show, parameters_of
from gpooler.console.settings import Settings
from gpooler.console.spec import Need
from gpooler.console.statements import (
    Act,
    Catalog,
    Item,
    Nothing,
    Select,
    SetSetting,
    Show,
    ShowSetting,
    Statement,
)
from gpooler.console.table import BOOL, INT4, TEXT, Cell, Column, Columns, Row, Type
from gpooler.console.tables import HELP, HELP_TEXT, NAMES, TABLES, VERSION
from gpooler.errors import ConsoleDenied, ConsoleSyntaxError, UndefinedObject
from gpooler.log import LogContext

ROWS_AT_ONCE: Final = 100  # made before others have their turn


class Views(Protocol):
    """Where views come from: ``gather.Gatherer``."""

    @property
    def config(self) -> Callable[[], Config]:
        """The configuration in force."""

    def view(self, needs: frozenset[Need], *, has_legacy_columns: bool) -> tuple[View, list[str]]:
        """A view for tables with these needs, and notices. Yields."""


@dataclass(frozen=True, slots=True)
class Answer:
    """``columns`` None: there are no rows. ``notices``: texts with details."""

    tag: str
    columns: Columns | None = None
    rows: Iterable[Row] = ()
    notices: tuple[tuple[str, str], ...] = ()


# Functions that drivers ask for, and what they give; what is not here has an answer of its own below.
_FUNCTIONS: Final[dict[str, Cell]] = {
    "pg_advisory_unlock_all": None,
    "pg_is_in_recovery": False,
    "pg_backend_pid": 0,
    "current_schema": "public",
    "inet_server_addr": None,
    "inet_server_port": None,
}


class Answers:
    """Those to one client."""

    def __init__(
        self,
        views: Views,
        acts: Acts,
        settings: Settings,
        role: Callable[[], Role],
        who: LogContext,
        version: str,
    ) -> None:
        """``role``: what its client may do now."""
        self._views = views
        self._acts = acts
        self._settings = settings
        self._role = role
        self._who = who
        self._version = version

    def columns(self, statement: Statement) -> Columns | None:
        """The columns of its result before it is run; None when it has none. Raises ConsoleSyntaxError."""
        match statement:
            case Show(table=name) if name != HELP:
                return TABLES[name].shape(self._views.config(), self._settings.has_legacy_columns)
            case ShowSetting(name=name):
                self._known_setting(name)
                return (Column(name, TEXT),)
            case Select(items=items):
                return tuple(Column(item.name, _type_of(item)) for item in items)
            case Catalog(columns=names):
                return tuple(Column(name, TEXT) for name in names)
        return None

    @staticmethod
    def parameters(statement: Statement) -> int:
        """How many parameters it has."""
        return parameters_of(statement) if isinstance(statement, Show) else 0

    def answer(self, statement: Statement, values: Sequence[str | None] = ()) -> Answer:
        """Run a statement, but no Transaction; ``values`` of its parameters. Yields. Raises GpoolerError."""
        match statement:
            case Show(table=name):
                if self._role() is Role.NOTALLOW:
                    raise ConsoleDenied("SHOW")
                return self._help() if name == HELP else self._show(statement, values)
            case ShowSetting(name=name):
                return Answer("SHOW", self.columns(statement), [(self._known_setting(name),)])
            case SetSetting(name=name, value=value):
                return self._set(name, value)
            case Select(items=items):
                row = tuple(self._value(item) for item in items)
                return Answer("SELECT 1", self.columns(statement), [row])
            case Catalog():
                return Answer("SELECT 0", self.columns(statement))
            case Nothing(tag=tag):
                return Answer(tag)
            case Act():
                return self._act(statement)
        raise AssertionError(f"{type(statement).__name__} is the session's")

    def _act(self, act: Act) -> Answer:
        text = self._acts.perform(act, self._role(), self._who)
        return Answer(act.name, notices=tuple((line, "") for line in text.splitlines()))

    def _show(self, show: Show, values: Sequence[str | None]) -> Answer:
        spec = TABLES[show.table]
        is_legacy = self._settings.has_legacy_columns
        columns = spec.shape(self._views.config(), is_legacy)
        selection = compile_show(show, columns, values)
        view, notices = self._views.view(spec.needs, has_legacy_columns=is_legacy)
        if spec.shape(view.config, is_legacy) != columns:  # a reload came in between
            columns = spec.shape(view.config, is_legacy)
            selection = compile_show(show, columns, values)
        rows: Iterable[Row] = _in_turns(spec.rows(view))
        if not selection.is_everything:
            rows = selection.apply(rows)
        return Answer("SHOW", columns, rows, tuple((notice, "") for notice in notices))

    @staticmethod
    def _help() -> Answer:
        return Answer("SHOW", notices=(("Console usage", "\n\t" + "\n\t".join(HELP_TEXT)),))

    def _known_setting(self, name: str) -> str:
        value = self._settings.get(name)
        if value is None:
            raise ConsoleSyntaxError(f'there is no table "{name}"', hint=nearest_table(name, NAMES))
        return value

    def _set(self, name: str, value: str | None) -> Answer:
        if name in OPTIONS:
            return self._act(Act("SET", (name, value or "DEFAULT")))
        self._settings.set(name, value)
        return Answer("SET" if value is not None else "RESET")

    # -- SELECT

    def _value(self, item: Item) -> Cell:
        name, arguments = item.function, item.arguments
        if not name:
            return item.value
        match name:
            case "version":
                return VERSION.format(self._version)
            case "current_database" | "current_catalog":
                return self._who.database
            case "current_user" | "session_user" | "user" | "current_role":
                return self._who.user
            case "current_setting" if arguments:
                return self._settings.get(arguments[0])
            case "set_config" if len(arguments) > 1:
                self._settings.set(arguments[0], arguments[1])
                return arguments[1]
        if name not in _FUNCTIONS:
            raise UndefinedObject(f"function {name}() does not exist", hint="SHOW HELP lists what there is.")
        return _FUNCTIONS[name]


def _in_turns(rows: Iterable[Row]) -> Iterator[Row]:
    """Others of this process have their turn while many rows are made, and left out. Yields."""
    for number, row in enumerate(rows, 1):
        yield row
        if number % ROWS_AT_ONCE == 0:
            gevent.sleep(0)


def _type_of(item: Item) -> Type:
    value = _FUNCTIONS.get(item.function) if item.function else item.value
    if isinstance(value, bool):
        return BOOL
    return INT4 if isinstance(value, int) else TEXT
