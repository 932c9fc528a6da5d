"""From the text of a Query or Parse to what the console is asked to do. Pure.

Beside its own commands the console answers what drivers and psql send of themselves: SET, BEGIN, SELECT of a
few functions; a query of PostgreSQL's catalogs finds nothing, in the columns that it names.
"""

import difflib
from collections.abc import Callable, Collection
from typing import Final

from gpooler.console.lexer import Kind, Token, statements
from gpooler.console.statements import (
    Act,
    All,
    Any,
    Catalog,
    Comparison,
    Condition,
    IsNull,
    Item,
    Not,
    Nothing,
    Order,
    Parameter,
    Select,
    SetSetting,
    Show,
    ShowSetting,
    Statement,
    Transaction,
    Value,
)
from gpooler.errors import ConsoleSyntaxError

MAX_DEPTH: Final = 32  # of brackets in WHERE

_END: Final = Token(Kind.END, "", "end of input")
_COMPARISONS: Final = {"=": "=", "<>": "<>", "!=": "<>", "<": "<", ">": ">", "<=": "<=", ">=": ">="}
_CONSTANTS: Final = {"true": "bool", "false": "bool", "null": "?column?"}  # names of their columns
_CATALOGS: Final = ("pg_", "information_schema", "unnest", "generate_series")
_PER_DATABASE: Final = ("PAUSE", "RESUME", "KILL", "RECONNECT", "WAIT_CLOSE")
_OF_DATABASE: Final = ("DISABLE", "ENABLE")
_ALONE: Final = ("RELOAD", "SUSPEND")
_SHUTDOWNS: Final = ("WAIT_FOR_SERVERS", "WAIT_FOR_CLIENTS")
COMMANDS: Final = (
    "SHOW", *_PER_DATABASE, *_OF_DATABASE, *_ALONE, "KILL_CLIENT", "DROP SERVERS", "SHUTDOWN", "SET",
    "SELECT", "BEGIN", "COMMIT", "ROLLBACK", "RESET", "DISCARD", "DEALLOCATE",
)  # fmt: skip


def parse(text: str, tables: Collection[str]) -> list[Statement]:
    """The statements of ``text``; ``tables`` are those that SHOW knows. Raises ConsoleSyntaxError."""
    return [_Parser(tokens, tables).statement() for tokens in statements(text)]


class _Parser:
    """One statement."""

    def __init__(self, tokens: list[Token], tables: Collection[str]) -> None:
        self._tokens = tokens
        self._tables = tables
        self._at = 0
        self._depth = 0

    # -- tokens

    @property
    def _next(self) -> Token:
        return self._tokens[self._at] if self._at < len(self._tokens) else _END

    def _take(self) -> Token:
        token = self._next
        self._at += 1
        return token

    def _is_word(self, *words: str) -> bool:
        return self._next.kind is Kind.WORD and self._next.value.lower() in words

    def _take_word(self, *words: str) -> bool:
        is_there = self._is_word(*words)
        self._at += is_there
        return is_there

    def _take_sign(self, sign: str) -> bool:
        is_there = self._next.is_sign(sign)
        self._at += is_there
        return is_there

    def _need_word(self, word: str) -> None:
        if not self._take_word(word):
            raise self._error()

    def _need_sign(self, sign: str) -> None:
        if not self._take_sign(sign):
            raise self._error()

    def _need_end(self) -> None:
        if self._next is not _END:
            raise self._error()

    def _error(self, hint: str = "") -> ConsoleSyntaxError:
        near = "end of input" if self._next is _END else f'or near "{self._next.text}"'
        return ConsoleSyntaxError(f"syntax error at {near}", hint=hint)

    def _name(self) -> str:
        """A name, as PostgreSQL reads it; with dots where it is written so."""
        parts = []
        while True:
            token = self._next
            if token.kind is Kind.WORD:
                parts.append(token.value.lower())
            elif token.kind is Kind.NAME:
                parts.append(token.value)
            else:
                raise self._error()
            self._at += 1
            if not self._take_sign("."):
                return ".".join(parts)

    # -- statements

    def statement(self) -> Statement:
        first = self._take()
        word = first.value.upper() if first.kind is Kind.WORD else ""
        simple: dict[str, Callable[[], Statement]] = {
            "SHOW": self._show,
            "SET": self._set,
            "RESET": self._reset,
            "SELECT": self._select,
            "WITH": self._with,
            "DROP": self._drop,
            "SHUTDOWN": self._shutdown,
            "KILL_CLIENT": self._kill_client,
        }
        if word in simple:
            return simple[word]()
        if word in _PER_DATABASE or word in _OF_DATABASE:
            arguments = () if self._next is _END and word in _PER_DATABASE else (self._database(),)
            self._need_end()
            return Act(word, arguments)
        if word in _ALONE:
            self._need_end()
            return Act(word)
        found = self._of_drivers(word)
        if found is not None:
            return found
        self._at = 0
        nearest = difflib.get_close_matches(word, COMMANDS, 1, cutoff=0.7)
        hint = f'Perhaps you meant "{nearest[0]}".' if nearest else "SHOW HELP lists the commands."
        raise self._error(hint)

    def _of_drivers(self, word: str) -> Statement | None:
        """What a client says to PostgreSQL of itself; the rest of it does not matter."""
        if word in ("BEGIN", "START"):
            return Transaction("BEGIN" if word == "BEGIN" else "START TRANSACTION")
        if word in ("COMMIT", "END"):
            return Transaction("COMMIT")
        if word in ("ROLLBACK", "ABORT"):
            return Nothing("ROLLBACK") if self._is_word("to") else Transaction("ROLLBACK")
        if word in ("SAVEPOINT", "RELEASE", "UNLISTEN"):
            return Nothing(word)
        if word == "DISCARD":
            return Nothing("DISCARD ALL")
        if word == "DEALLOCATE":
            return Nothing("DEALLOCATE ALL" if self._is_word("all") else "DEALLOCATE")
        if word == "CLOSE":
            return Nothing("CLOSE CURSOR ALL" if self._is_word("all") else "CLOSE CURSOR")
        return None

    def _database(self) -> str:
        token = self._take()
        if token.kind not in (Kind.WORD, Kind.NAME, Kind.STRING):
            self._at -= 1
            raise self._error("The name of a database is needed.")
        return token.value

    def _drop(self) -> Statement:
        self._need_word("servers")
        self._need_end()
        return Act("DROP SERVERS")

    def _shutdown(self) -> Statement:
        if self._next is _END:
            return Act("SHUTDOWN")
        word = self._next.value.upper()
        if word not in _SHUTDOWNS:
            raise self._error(_nearest("SHUTDOWN ", word, _SHUTDOWNS))
        self._at += 1
        self._need_end()
        return Act("SHUTDOWN", (word,))

    def _kill_client(self) -> Statement:
        token = self._take()
        if token.kind not in (Kind.WORD, Kind.NUMBER, Kind.STRING):
            self._at -= 1
            raise self._error("The id of a client is needed, as SHOW CLIENTS has it.")
        self._need_end()
        return Act("KILL_CLIENT", (token.value,))

    # -- settings

    def _set(self) -> Statement:
        self._take_word("session", "local")
        if self._take_word("time"):
            self._need_word("zone")
            return SetSetting("timezone", self._setting_value())
        if self._is_word("transaction", "characteristics", "constraints", "role", "authorization"):
            return Nothing("SET")
        if self._take_word("names"):
            return SetSetting("client_encoding", self._setting_value())
        name = self._name()
        if not self._take_sign("="):
            self._need_word("to")
        return SetSetting(name, self._setting_value())

    def _setting_value(self) -> str | None:
        if self._take_word("default"):
            self._need_end()
            return None
        parts = []
        while True:
            sign = "-" if self._take_sign("-") else ""
            token = self._take()
            if token.kind not in (Kind.WORD, Kind.NAME, Kind.STRING, Kind.NUMBER):
                self._at -= 1
                raise self._error()
            parts.append(sign + token.value)
            if not self._take_sign(","):
                break
        self._need_end()
        return ", ".join(parts)

    def _reset(self) -> Statement:
        if self._take_word("all"):
            self._need_end()
            return Nothing("RESET")
        name = self._name()
        self._need_end()
        return SetSetting(name, None)

    # -- SHOW

    def _show(self) -> Statement:
        if self._next is _END:
            raise self._error("SHOW HELP lists the tables.")
        if self._take_word("transaction"):
            self._need_word("isolation")
            self._need_word("level")
            self._need_end()
            return ShowSetting("transaction_isolation")
        if self._take_word("time"):
            self._need_word("zone")
            self._need_end()
            return ShowSetting("timezone")
        name = self._name()
        table = name.lower()
        if table not in self._tables:
            if self._next is not _END:
                self._at -= 1
                raise self._error(_nearest("SHOW ", name, self._tables))
            return ShowSetting(name)
        where = self._condition() if self._take_word("where") else None
        order = self._order() if self._take_word("order") else ()
        limit = offset = None
        while self._is_word("limit", "offset"):
            if self._take_word("limit"):
                limit = None if self._take_word("all") else self._count()
            else:
                self._at += 1
                offset = self._count()
                self._take_word("row", "rows")
        self._need_end()
        return Show(table, where, order, limit, offset)

    def _count(self) -> Value:
        value = self._value()
        if not isinstance(value, int | Parameter):
            self._at -= 1
            raise self._error("LIMIT and OFFSET take a whole number.")
        return value

    def _order(self) -> tuple[Order, ...]:
        self._need_word("by")
        keys = []
        while True:
            column: str | int
            if self._next.kind is Kind.NUMBER and self._next.value.isdigit():
                column = int(self._take().value)
            else:
                column = self._name()
            is_descending = self._is_word("desc")
            self._take_word("asc", "desc")
            keys.append(Order(column, is_descending))
            if not self._take_sign(","):
                return tuple(keys)

    def _condition(self) -> Condition:
        parts = [self._conjunction()]
        while self._take_word("or"):
            parts.append(self._conjunction())
        return parts[0] if len(parts) == 1 else Any(tuple(parts))

    def _conjunction(self) -> Condition:
        parts = [self._term()]
        while self._take_word("and"):
            parts.append(self._term())
        return parts[0] if len(parts) == 1 else All(tuple(parts))

    def _term(self) -> Condition:
        if self._depth >= MAX_DEPTH:
            raise ConsoleSyntaxError("the condition is nested too deeply")
        self._depth += 1
        try:
            if self._take_word("not"):
                return Not(self._term())
            if self._take_sign("("):
                condition = self._condition()
                self._need_sign(")")
                return condition
            return self._comparison()
        finally:
            self._depth -= 1

    def _comparison(self) -> Condition:
        column = self._name()
        if self._take_word("is"):
            is_not = self._take_word("not")
            self._need_word("null")
            return Not(IsNull(column)) if is_not else IsNull(column)
        is_not = self._take_word("not")
        found: Condition
        if self._take_word("in"):
            self._need_sign("(")
            values = [self._value()]
            while self._take_sign(","):
                values.append(self._value())
            self._need_sign(")")
            found = Any(tuple(Comparison(column, "=", value) for value in values))
        elif self._is_word("like", "ilike"):
            operator = self._take().value.lower()
            found = Comparison(column, operator, self._value())
        elif not is_not and self._next.kind is Kind.SIGN and self._next.value in _COMPARISONS:
            operator = _COMPARISONS[self._take().value]
            return Comparison(column, operator, self._value())
        else:
            raise self._error("A condition compares a column by =, <>, <, >, <=, >=, LIKE, IN or IS NULL.")
        return Not(found) if is_not else found

    def _value(self) -> Value:
        is_negative = self._take_sign("-")
        token = self._take()
        found: Value
        if token.kind is Kind.NUMBER:
            found = int(token.value) if token.value.isdigit() and len(token.value) < 19 else token.value
        elif is_negative:
            found = None
        elif token.kind is Kind.STRING:
            found = token.value
        elif token.kind is Kind.PARAMETER:
            found = Parameter(int(token.value))
        elif token.kind is Kind.WORD and token.value.lower() in ("true", "false", "null"):
            return {"true": "t", "false": "f", "null": None}[token.value.lower()]
        else:
            found = None
        if found is None:
            self._at -= 1
            raise self._error("A value is a number, a text in single quotes, or a parameter.")
        if self._take_sign("::"):
            self._name()
        if is_negative:
            return -found if isinstance(found, int) else f"-{found}"
        return found

    # -- SELECT

    def _with(self) -> Statement:
        if not self._mentions_catalogs():
            self._at -= 1
            raise self._error("The console has no SQL: SHOW HELP lists what it has.")
        depth = 0
        while self._next is not _END:  # the names are those of the last SELECT
            depth += self._next.is_sign("(") - self._next.is_sign(")")
            if self._take_word("select") and depth == 0:
                return Catalog(tuple(name for name, _ in self._items()))
            self._at += 1
        return Catalog(("?column?",))

    def _mentions_catalogs(self) -> bool:
        return any(
            token.kind is Kind.WORD and token.value.lower().startswith(_CATALOGS) for token in self._tokens
        )

    def _select(self) -> Statement:
        self._take_word("all", "distinct")
        items = self._items()
        if self._next is not _END:
            if self._mentions_catalogs():
                return Catalog(tuple(name for name, _ in items))
            tables = [token.value.lower() for token in self._tokens if token.value.lower() in self._tables]
            hint = f"Try SHOW {tables[0].upper()}." if tables else "SHOW HELP lists the tables."
            raise self._error(hint)
        return Select(tuple(self._item(name, tokens) for name, tokens in items))

    def _items(self) -> list[tuple[str, list[Token]]]:
        """Names and tokens of a select list; stands behind it then."""
        items: list[list[Token]] = [[]]
        depth = 0
        while self._next is not _END:
            token = self._next
            if depth == 0 and self._is_word("from", "where", "union", "order", "limit", "group"):
                break
            self._at += 1
            depth += (token.value in ("(", "[")) - (token.value in (")", "]"))
            if depth == 0 and token.is_sign(","):
                items.append([])
            else:
                items[-1].append(token)
        return [_named(tokens) for tokens in items]

    def _item(self, name: str, tokens: list[Token]) -> Item:
        first, *rest = tokens or [_END]
        if rest[:1] and rest[0].is_sign("."):  # pg_catalog.version()
            first, *rest = rest[1:] or [_END]
        if not rest:
            if first.kind is Kind.NUMBER:
                return Item(name, int(first.value) if first.value.isdigit() else first.value)
            if first.kind is Kind.STRING:
                return Item(name, first.value)
            if first.kind is Kind.WORD and first.value.lower() in ("true", "false", "null"):
                return Item(name, {"true": True, "false": False}.get(first.value.lower()))
            if first.kind is Kind.WORD:
                return Item(name, function=first.value.lower())
        elif first.kind in (Kind.WORD, Kind.NAME) and rest[0].is_sign("(") and rest[-1].is_sign(")"):
            arguments = tuple(token.value for token in rest[1:-1] if not token.is_sign(","))
            return Item(name, function=first.value.lower(), arguments=arguments)
        raise ConsoleSyntaxError("the console computes no expressions", hint="SHOW HELP lists what it has.")


def _named(tokens: list[Token]) -> tuple[str, list[Token]]:
    """Name and tokens of an item of a select list, without ``AS name`` and casts."""
    name = ""
    if len(tokens) > 2 and tokens[-2].kind is Kind.WORD and tokens[-2].value.lower() == "as":
        name = _folded(tokens[-1])
        tokens = tokens[:-2]
    elif (
        len(tokens) > 1
        and tokens[-1].kind in (Kind.WORD, Kind.NAME)
        and (tokens[-2].kind is not Kind.SIGN or tokens[-2].is_sign(")"))
    ):
        name = _folded(tokens[-1])
        tokens = tokens[:-1]
    casts = [number for number, token in enumerate(tokens) if token.is_sign("::")]
    if casts:
        tokens = tokens[: casts[0]]
    if name:
        return name, tokens
    if tokens and tokens[-1].is_sign(")"):
        depth = 0
        for number in range(len(tokens) - 1, 0, -1):
            depth += tokens[number].is_sign(")") - tokens[number].is_sign("(")
            if depth == 0:
                is_call = tokens[number - 1].kind in (Kind.WORD, Kind.NAME)
                return _folded(tokens[number - 1]) if is_call else "?column?", tokens
    if tokens and tokens[-1].kind in (Kind.WORD, Kind.NAME):
        name = _folded(tokens[-1])
        return _CONSTANTS.get(name, name), tokens
    return "?column?", tokens


def _folded(token: Token) -> str:
    return token.value.lower() if token.kind is Kind.WORD else token.value


def _nearest(prefix: str, word: str, known: Collection[str]) -> str:
    """A hint that names the nearest of ``known``."""
    found = difflib.get_close_matches(word.lower(), [name.lower() for name in known], 1)
    return f'Perhaps you meant "{prefix}{found[0].upper()}".' if found else "SHOW HELP lists the commands."


def nearest_table(word: str, tables: Collection[str]) -> str:
    """A hint for a SHOW of nothing that is known."""
    return _nearest("SHOW ", word, tables)
