"""Makes programs at random from a seed.

Each program takes some of the FEATURES only (as in swarm testing): one that does a little of everything would
seldom do two things of one kind in a row, and one that never pins a server changes it at each transaction.
The author keeps a rough idea of the state of its session, so that most of what it asks makes sense.

LIMITS are what gpooler is known to answer otherwise today; they are off unless asked for.
"""

import random
from collections.abc import Callable
from typing import Final

from tests.differential.program import (
    COPY_DONE,
    FLUSH,
    SYNC,
    Part,
    Program,
    Step,
    bind,
    call,
    close,
    copy_data,
    copy_fail,
    describe,
    execute,
    parse,
    query,
)

# Nothing of these outlives a transaction on its server: clients change servers all the time.
LIGHT: Final = (
    "simple", "empty", "multi", "broken", "extended", "pipeline", "flush", "unnamed", "named", "blocks",
    "savepoints", "portals", "cursors", "copy in", "copy out", "transaction locks", "notify", "probe", "odd",
    "set local", "startup", "abrupt", "leave", "unanswered",
    "large", "pieces", "dates",
)  # fmt: skip
# These leave something in the session.
HEAVY: Final = (
    "set", "set in a block", "reset", "set config", "hold", "sql prepare", "discard", "listen", "locks",
    "temp", "call", "do", "backslashes", "deallocate", "execute",
)  # fmt: skip
FEATURES: Final = LIGHT + HEAVY
LIMITS: Final = {
    "reset to startup": "RESET and DISCARD ALL in a string or a group of extended messages: what stands "
    "behind them there sees the default of the server, not the value of the startup packet",
    "hidden": "what functions and DO blocks do to the session is met by nobody, its own client included",
    "rebind": "the unnamed statement is bound once more after the end of its transaction",
    "describe": "Describe of a prepared statement without a result in a failed block, on a server that lacks "
    "it: PostgreSQL answers, but refuses the Parse that gpooler puts before it (likewise a Bind of the wrong "
    "number of values: 25P02 for 08P01)",
    "placeholders": "PostgreSQL itself never forgets the name of a setting of no module (mine.own): to the "
    "next client it is empty, no more unknown",
    "doubt": "a Sync among the data of a COPY that fails: nobody can tell whether it is answered, and until "
    "that is known nothing is put between the client's messages, so that a taken name is not refused",
    "reparse": "a prepared text with a literal whose meaning depends on a setting is parsed again",
}

REPORTED: Final = {
    "DateStyle": ("ISO, DMY", "German", "SQL, MDY", "'Postgres, YMD'"),
    "TimeZone": ("'Europe/Berlin'", "'UTC'", "'<+0530>-05:30'", "-3.5"),
    "IntervalStyle": ("iso_8601", "sql_standard", "postgres_verbose"),
    "application_name": (
        "'plain'",
        "''",
        "'it''s \\\\ \"odd\"; SELECT 1 --'",
        "'ümläut'",
        "E'back\\\\slash'",
    ),
    "client_encoding": ("'LATIN1'", "'UTF8'", "'SQL_ASCII'"),
    "standard_conforming_strings": ("off", "on"),
    "default_transaction_read_only": ("on", "off"),
}
UNREPORTED: Final = {
    "search_path": ("nowhere, public", "'$user', public", '"Odd Schema", pg_catalog, public'),
    "extra_float_digits": ("0", "-3", "3"),
    "bytea_output": ("'escape'", "'hex'"),
    "work_mem": ("'5MB'", "8192"),
    "statement_timeout": ("'31s'", "77777"),
    "lock_timeout": ("'33s'", "0"),
    "enable_seqscan": ("off", "on"),
    "mine.own": ("'a''b'", "'plain'", "12"),
    "default_transaction_isolation": ("'repeatable read'", "serializable"),
    "client_min_messages": ("'error'", "'notice'", "'log'"),
    "array_nulls": ("off", "on"),
}
SETTINGS: Final = REPORTED | UNREPORTED
WRONG_SETS: Final = (
    "SET nothing = 1", "SET DateStyle = 'nonsense'", "SET TimeZone = 'Nowhere/Land'",
    "SET work_mem = '1 bean'",
    "SET server_version = '1'", "SET application_name", "SET max_connections = 3", "RESET nothing",
    "SET client_encoding = 'KLINGON'", "SHOW nothing", "SET LOCAL DateStyle = 'nonsense'",
)  # fmt: skip
OTHER_SETS: Final = (
    "SET TIME ZONE 'Asia/Tokyo'", "SET TIME ZONE LOCAL",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE", "SET NAMES 'LATIN1'", "SET SCHEMA 'public'",
    "SET SESSION DateStyle TO German", "set /* LOCAL */ intervalstyle to iso_8601", 'SET "DateStyle" = SQL',
    "SET ROLE trust_user", "SET ROLE NONE", "SET SESSION AUTHORIZATION DEFAULT",
)  # fmt: skip
STARTUPS: Final = {
    "application_name": ("started", 'it\'s \\ "odd"; --', "ümläut", "'"),
    "DateStyle": ("German, DMY", "SQL"),
    "TimeZone": ("Asia/Tokyo", "Europe/Berlin"),
    "IntervalStyle": ("iso_8601",),
    "extra_float_digits": ("0", "2"),
    "search_path": ("pg_catalog, public", '"Odd Schema", public'),
    "mine.own": ("from the 'start'",),
    "standard_conforming_strings": ("off",),
    "client_encoding": ("LATIN1",),
    "options": ("-c work_mem=7MB -c DateStyle=SQL --geqo=off", "-c bytea_output=escape"),
    "statement_timeout": ("39s",),
}
PROBES: Final = (
    "SELECT '01/02/2020'::date::text, interval '1 day 2 hours'::text, timestamptz '2020-06-01 12:00Z'::text",
    "SELECT 0.1::float8 + 0.2::float8, '\\x4127'::bytea, 1e20::float4",
    "SELECT current_setting('application_name'), coalesce(current_setting('mine.own', true), '')",
    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
    "SELECT name, is_holdable FROM pg_cursors WHERE name <> '' AND name LIKE 'c_' ORDER BY name",
    "SELECT pg_listening_channels() ORDER BY 1",
    "SELECT to_regclass('tmp0') IS NULL, to_regclass('tmp1') IS NULL",
    "SELECT current_user, session_user, current_schemas(false)",
    "SELECT txid_current_if_assigned() IS NULL, pg_is_in_recovery()",
    "SHOW transaction_isolation", "SHOW transaction_read_only",
)  # fmt: skip
# Values of the startup packet are SET by gpooler, so this is asked where there are none.
CHANGED: Final = """SELECT name, setting FROM pg_settings
WHERE source = 'session' AND setting IS DISTINCT FROM reset_val AND name NOT LIKE 'mine.%' ORDER BY name"""
BROKEN: Final = (
    "SELEC 1", "SELECT 'never closed", 'SELECT "never closed', "SELECT $$never closed", "/* never closed",
    "SELECT $a$x$b$", "SELECT 1 +", "SELECT )", "BEGIN nonsense", "SELECT E'a\\", "COMMIT nonsense; SELECT 1",
    "SELECT 'a' 'b'", "SELECT * FROM missing", "SELECT nothing(1)", "SET = 1", "SELECT '\x01'", "INSERT INTO",
    "SELECT U&'\\00e9', U&\"d\\0061ta\" FROM (VALUES (1)) v (data)", "SELECT 1; SELECT 'x",
    "DECLARE", "FETCH",
    "SELECT 1 -- BEGIN", "SELECT '; BEGIN; SET application_name = ''lost''; '",
    "/* BEGIN; /* x */ */ SELECT 3",
    "SELECT $q$; LISTEN nothing; $q$", "BEGIN;;; SELECT 1;; COMMIT;", "EXECUTE nothing", "CLOSE nothing",
)  # fmt: skip
EMPTY: Final = ("", ";", " ", "-- nothing", "/* nothing */", ";;;", "\n\t;")
BEGINS: Final = (
    "BEGIN", "BEGIN", "BEGIN", "START TRANSACTION", "BEGIN READ ONLY", "begin /* x */ work",
    "BEGIN ISOLATION LEVEL REPEATABLE READ", "BEGIN; SELECT 1",
    "BEGIN ISOLATION LEVEL SERIALIZABLE, READ ONLY",
    "-- first\nBEGIN",
)  # fmt: skip
ENDS: Final = (
    "COMMIT", "COMMIT", "COMMIT", "ROLLBACK", "ROLLBACK", "END", "ABORT", "COMMIT; SELECT 1", "COMMIT; BEGIN",
    "COMMIT AND CHAIN", "ROLLBACK AND CHAIN", "PREPARE TRANSACTION 'x'", "SELECT 1; COMMIT",
)  # fmt: skip
# These leave nothing behind that the next client of the same lane could find.
UNANSWERED: Final = (
    "SELECT 1", "SELECT generate_series(1, 100000)", "SELECT pg_sleep(0.02)", "nonsense", "BEGIN",
    "COPY (SELECT generate_series(1, 100000)) TO STDOUT", "BEGIN; SELECT 1", "SET DateStyle = German",
)  # fmt: skip
# Features that open transaction blocks.
BLOCKS: Final = {"blocks", "savepoints", "portals", "set local", "set in a block", "multi", "broken"}
# Features that may change how dates are read.
SETTERS: Final = {
    "set", "set local", "set in a block", "reset", "set config", "discard", "hidden",
    "backslashes",
}  # fmt: skip
# Names of prepared statements, and how many parameters they have.
ARITIES: Final = {"s0": 0, "s1": 1, "s2": 2, "S 'odd' name": 1}
HIDDEN: Final = "DO $$BEGIN PERFORM set_config('DateStyle', 'German', false); END$$"
INT4PL: Final = 177
SQRT: Final = 230  # dsqrt(float8)


class Author:
    """Writes one program; ``lane`` names the tables, locks and channels that are its own."""

    def __init__(self, chance: random.Random, lane: int, features: set[str]) -> None:
        self._chance = chance
        self._lane = lane
        self._features = features
        self._in_block = False
        self._startup: dict[str, str] = {}
        self._defined: set[str] = set()  # names of statements that may be taken
        self._recent = "DateStyle"  # the setting that was changed last
        self._makers: dict[str, Callable[[], list[Step]]] = {
            "simple": lambda: [(query(self._data()),)],
            "empty": lambda: [(query(chance.choice(EMPTY)),)],
            "multi": self._multi,
            "broken": lambda: [self._any(chance.choice(BROKEN))],
            "extended": lambda: [(*self._group(), SYNC)],
            "pipeline": self._pipeline,
            "flush": lambda: [(*self._group(), FLUSH), (SYNC,)],
            "unnamed": self._unnamed,
            "named": self._named,
            "blocks": self._block,
            "savepoints": self._savepoints,
            "portals": self._portals,
            "cursors": self._cursors,
            "copy in": self._copy_in,
            "copy out": self._copy_out,
            "transaction locks": lambda: [self._any(self._lock("pg_advisory_xact_lock"))],
            "notify": self._notify,
            "probe": lambda: [self._probe()],
            "odd": self._odd,
            "set local": self._set_local,
            "set": self._set,
            "set in a block": self._set_in_block,
            "reset": self._reset,
            "set config": self._set_config,
            "hold": self._hold,
            "sql prepare": self._sql_prepare,
            "discard": self._discard,
            "listen": self._listen,
            "locks": self._locks,
            "temp": self._temp,
            "call": self._call,
            "do": self._do,
            "backslashes": self._backslashes,
            "large": self._large,
            "dates": self._dates,
            "deallocate": lambda: [(query(chance.choice((f"DEALLOCATE {self._name()}", "DEALLOCATE ALL"))),)],
            "execute": lambda: [(query(f"EXECUTE {self._name()}"),), (parse("SELECT 1", "q0"), SYNC)],
            "hidden": lambda: [(query(HIDDEN),), self._probe()],
            "rebind": lambda: [(*self._group(), SYNC), (bind(), execute(), SYNC)],
            "reparse": lambda: [
                (query(f"SET DateStyle = {chance.choice(REPORTED['DateStyle'])}"),),
                (close("S", "day"), parse("SELECT '01/02/2020'::date::text", "day"), SYNC),
                (query(f"SET DateStyle = {chance.choice(REPORTED['DateStyle'])}"),),
                self._run_of("day"),
            ],
        }

    def write(self) -> Program:
        """A program of a few to some dozens of steps."""
        chance = self._chance
        if "startup" in self._features:
            names = chance.sample(sorted(STARTUPS), chance.choice((1, 1, 2, 3)))
            self._startup = {name: chance.choice(STARTUPS[name]) for name in names}
        if "dates" in self._features and chance.random() < 0.5:
            self._startup["DateStyle"] = chance.choice(STARTUPS["DateStyle"])
        makers = [self._makers[feature] for feature in sorted(self._features) if feature in self._makers]
        steps: list[Step] = []
        wanted = chance.randrange(4, 30)
        while len(steps) < wanted:
            steps += chance.choice(makers)()
            if chance.random() < 0.2:
                steps.append(self._probe())
            if self._in_block and chance.random() < 0.15:
                steps += self._end()
        return Program(
            tuple(steps),
            self._startup,
            self._any(chance.choice(UNANSWERED))[: chance.choice((1, 2, 9))]
            if self._has("unanswered")
            else (),
            piece=chance.choice((3, 40, 1000, 17_000)) if self._has("pieces") else 0,
            has_end=not self._has("leave"),
            has_terminate=not self._has("abrupt"),
        )

    # -- pieces ----------------------------------------------------------------------------------------

    def _has(self, feature: str) -> bool:
        return feature in self._features

    def _any(self, sql: str) -> Step:
        """One statement, simple or extended."""
        if self._chance.random() < 0.6 or ";" in sql:
            return (query(sql),)
        return (parse(sql), bind(), *self._maybe(describe("P"), 0.5), execute(), SYNC)

    def _maybe(self, part: Part, probability: float) -> tuple[Part, ...]:
        return (part,) if self._chance.random() < probability else ()

    def _name(self) -> str:
        return self._chance.choice(sorted(ARITIES))

    def _known_settings(self) -> list[str]:
        has_placeholders = self._has("placeholders")
        return [name for name in sorted(SETTINGS) if "." not in name or has_placeholders]

    def _data(self) -> str:
        """A statement on the client's own tables, or on none."""
        lane, chance = self._lane, self._chance
        number = chance.randrange(20)
        return chance.choice(
            (
                f"SELECT {number}",
                f"SELECT n, d FROM t{lane} ORDER BY n, d",
                f"SELECT count(*), sum(n) AS total FROM t{lane}",
                f"INSERT INTO t{lane} VALUES ({number}, 'x{number}')",
                f"INSERT INTO t{lane} VALUES ({number}, NULL) RETURNING n, d",
                f"INSERT INTO t{lane} VALUES (5000, 'refused')",
                f"INSERT INTO t{lane} SELECT n, 'many' FROM generate_series(1, 5) n",
                f"UPDATE t{lane} SET d = d || '!' WHERE n < {number}",
                f"DELETE FROM t{lane} WHERE n = {number}",
                f"INSERT INTO u{lane} VALUES ({number % 4})",
                f"DELETE FROM u{lane}",
                f"TABLE u{lane}",
                f"SELECT generate_series(1, {number * 3})",
                f"SELECT repeat('0123456789', {number * number * 20}), NULL, ''",
                "SELECT 1/0",
                "SELECT 1 WHERE false",
                "VALUES (1, 'one'), (2, NULL)",
                f"SELECT 1/(n - 3) FROM generate_series(1, {number}) n",
                f"EXPLAIN (COSTS off) SELECT n FROM t{lane}",
                f"LOCK TABLE t{lane}",
            )
        )

    def _parametrised(self) -> tuple[str, tuple[bytes | None, ...]]:
        """A text with parameters, and values that mostly fit."""
        lane, chance = self._lane, self._chance
        number = b"%d" % chance.randrange(20)
        return chance.choice(
            (
                ("SELECT $1::int + 1, $2::text", (number, chance.choice((b"x", b"", None)))),
                ("SELECT $1::int", (chance.choice((b"no number", number)),)),
                ("SELECT 10 / $1::int", (chance.choice((b"0", b"3")),)),
                (f"INSERT INTO t{lane} VALUES ($1, $2)", (chance.choice((number, b"5000")), b"value")),
                (f"SELECT n, d FROM t{lane} WHERE n > $1 ORDER BY n, d", (number,)),
                (f"UPDATE t{lane} SET d = $1 WHERE n = $2 RETURNING n", (b"new", number)),
                ("SELECT generate_series(1, $1::int)", (number,)),
                ("SELECT $1::int", (number, number)),
                ("SELECT repeat('z', $1::int * 100)", (number,)),
                ("", ()),
            )
        )

    def _group(self, portal: str = "") -> tuple[Part, ...]:
        """Parse to Execute of the unnamed statement."""
        chance = self._chance
        sql, values = self._parametrised() if chance.random() < 0.5 else (self._data(), ())
        types = (23,) if values and chance.random() < 0.2 else ()
        return (
            parse(sql, "", types),
            *self._maybe(describe("S"), 0.3),
            bind("", values, portal),
            *self._maybe(describe("P", portal), 0.5),
            execute(portal, chance.choice((0, 0, 0, 1, 3))),
            *self._maybe(execute(portal, 2), 0.1),
            *self._maybe(close("P", portal), 0.1),
        )

    def _end(self) -> list[Step]:
        sql = self._chance.choice(ENDS)
        self._in_block = "CHAIN" in sql or sql.endswith("BEGIN")
        return [self._any(sql)]

    def _probe(self) -> Step:
        chance = self._chance
        if chance.random() < 0.4:
            known = self._known_settings()
            recent = self._recent if self._recent in known else "DateStyle"
            return self._any(f"SHOW {chance.choice((recent, chance.choice(known)))}")
        if chance.random() < 0.1 and self._may_reset():
            return self._any(CHANGED)
        return self._any(chance.choice(PROBES))

    # -- features --------------------------------------------------------------------------------------

    def _multi(self) -> list[Step]:
        chance = self._chance
        texts = [self._data() for _ in range(chance.randrange(2, 5))]
        if self._has("blocks") and chance.random() < 0.4:
            texts.insert(chance.randrange(len(texts)), "BEGIN")
            texts.append(chance.choice(("COMMIT", "ROLLBACK", "SELECT 'open'")))
            self._in_block = texts[-1].startswith("SELECT")
        if self._has("set") and chance.random() < 0.3:
            texts.insert(chance.randrange(len(texts)), self._set_text())
        if self._has("broken") and chance.random() < 0.2:
            texts.append(chance.choice(BROKEN))
        return [(query("; ".join(texts)),)]

    def _pipeline(self) -> list[Step]:
        chance = self._chance
        parts: list[Part] = []
        for _ in range(chance.randrange(2, 7)):
            match chance.randrange(8):
                case 0:
                    parts.append(query(self._data()))
                case 1 if self._has("named"):
                    parts += self._named()[0]
                case 2 if self._has("broken"):
                    parts += (parse(chance.choice(BROKEN)), bind(), execute(), SYNC)
                case 3 if self._has("blocks"):
                    begin, end = chance.choice(BEGINS[:5]), chance.choice(ENDS[:6])
                    for sql in (begin, self._data(), end):
                        parts += (parse(sql), bind(), execute(), *self._maybe(SYNC, 0.7))
                case 4:
                    parts += (*self._group(), FLUSH, *self._group(), SYNC)
                case _:
                    parts += (*self._group(), *self._maybe(SYNC, 0.8))
        if chance.random() < 0.9:
            parts.append(SYNC)
        return [tuple(parts)]

    def _unnamed(self) -> list[Step]:
        """Drivers that describe first and bind later."""
        chance = self._chance
        sql, values = self._parametrised()
        match chance.randrange(4):
            case 0:
                return [(parse(sql), describe("S"), SYNC), (bind("", values), execute(), SYNC)]
            case 1:
                return [(parse(sql), SYNC), (query(self._data()),), (bind("", values), execute(), SYNC)]
            case 2:
                return [(parse(sql), SYNC), (parse("SELECT 'other'"), bind(), execute(), SYNC)]
            case _:
                # a Query leaves no unnamed statement, and none of another client may appear
                return [(query(self._data()),), (chance.choice((bind(), describe("S"))), SYNC)]

    def _run_of(self, name: str, portal: str = "") -> Step:
        values = self._values(name)
        if self._chance.random() < 0.03 * self._may_describe():
            values = (b"1", b"2", b"3")
        return (
            *self._maybe(describe("S", name), 0.2 * self._may_describe()),
            bind(name, values, portal),
            *self._maybe(describe("P", portal), 0.3),
            execute(portal, self._chance.choice((0, 0, 0, 2))),
            SYNC,
        )

    def _named(self) -> list[Step]:
        chance = self._chance
        name = self._name()
        match chance.randrange(12):
            case 0 | 1 | 2 | 3:
                return [self._run_of(name)]
            case 4:
                self._defined.discard(name)
                return [(close("S", name), SYNC)]
            case 5:
                made = self._define(name)
                return [(close("S", name), made, *self._run_of(name))]
            case 6:
                # prepared, closed, bound behind an error: skipped
                other = self._name()
                wrong = (parse("SELECT 1/0"), bind(), execute())
                skipped = chance.choice(
                    (
                        (close("S", name),),
                        (self._define(name),),
                        (close("S", name), self._define(name)),
                        (bind(name),),
                    )
                )
                first: list[Step] = [(self._define(name), SYNC)] if chance.random() < 0.5 else []
                step = (*wrong, *skipped, *self._maybe(self._define(other), 0.3), SYNC)
                return [*first, step, self._run_of(name), self._run_of(other)]
            case 7 | 8 if name in self._defined:
                # a copy that its server lacks is skipped, too
                wrong = (parse("SELECT 1/0"), bind(), execute())
                return [
                    (*wrong, bind(name, self._values(name)), SYNC),
                    self._run_of(name),
                    self._run_of(name),
                ]
            case 9 if self._may_describe():
                return [(describe("S", name), SYNC)]
            case 10 if self._has("blocks"):
                made = self._define(name)
                self._in_block = False
                inside = (query("BEGIN"), made, SYNC, *self._run_of(name), query(chance.choice(ENDS[:6])))
                return [inside]
            case _:
                free = sorted(ARITIES.keys() - self._defined)
                if free and chance.random() < 0.8:
                    name = chance.choice(free)
                made = self._define(name)
                if chance.random() < 0.5:
                    return [(made, *self._run_of(name))]
                return [(made, *self._maybe(describe("S", name), 0.5 * self._may_describe()), SYNC)]

    def _may_describe(self) -> bool:
        """Whether a named statement may be described, or bound to too many values: not in a failed block."""
        return self._has("describe") or not (self._features & BLOCKS)

    def _define(self, name: str) -> Part:
        """A Parse whose number of parameters goes with the name: its Bind fits whichever Parse succeeded."""
        count = ARITIES.get(name, 0)
        self._defined.add(name)
        if self._chance.random() < 0.1:
            return parse("SELECT nothing" if count else self._chance.choice(BROKEN), name)
        texts = [sql for sql, values in (self._parametrised() for _ in range(20)) if len(values) == count]
        texts = [sql for sql in texts if sql.count("$") == count] or [
            ("", "SELECT $1::int", "SELECT $1::int, $2")[count]
        ]
        return parse(self._data() if count == 0 else texts[0], name)

    def _values(self, name: str) -> tuple[bytes | None, ...]:
        values = (b"3", b"7", b"0", b"no number", None)
        return tuple(self._chance.choice(values) for _ in range(ARITIES.get(name, 0)))

    def _block(self) -> list[Step]:
        chance = self._chance
        if self._in_block:
            return self._end()
        if chance.random() < 0.1:
            return self._end()  # there is none: a warning
        self._in_block = True
        return [self._any(chance.choice(BEGINS))]

    def _savepoints(self) -> list[Step]:
        name = self._chance.choice("ab")
        texts = (f"SAVEPOINT {name}", f"SAVEPOINT {name}", f"ROLLBACK TO {name}", f"RELEASE {name}")
        steps: list[Step] = []
        if not self._in_block and self._chance.random() < 0.8:
            self._in_block = True
            steps.append((query("BEGIN"),))
        return [*steps, self._any(self._chance.choice(texts))]

    def _portals(self) -> list[Step]:
        chance = self._chance
        portal = chance.choice(("p0", "p1"))
        steps: list[Step] = []
        if not self._in_block and chance.random() < 0.7:
            self._in_block = True
            steps.append((query("BEGIN"),))
        numbers = f"SELECT n, repeat('p', n) FROM generate_series(1, {chance.choice((3, 40))}) n"
        match chance.randrange(5):
            case 0 | 1:
                made = (parse(numbers), bind("", (), portal), execute(portal, chance.choice((1, 2, 10))))
                steps += [(*made, SYNC), (execute(portal, 3), SYNC)]
            case 2:
                steps.append((execute(portal, chance.choice((0, 1, 5))), SYNC))
            case 3:
                steps.append((close("P", portal), SYNC))
            case _:
                steps.append((describe("P", portal), execute(portal, 2), execute(portal), SYNC))
        return steps

    def _cursors(self) -> list[Step]:
        chance = self._chance
        name = chance.choice(("c0", "c1"))
        texts = (
            f"DECLARE {name} CURSOR FOR SELECT generate_series(1, 20)",
            f"DECLARE {name} SCROLL CURSOR FOR SELECT n FROM generate_series(1, 9) n",
            f"FETCH {chance.randrange(1, 6)} FROM {name}",
            f"FETCH BACKWARD 2 FROM {name}",
            f"MOVE 3 FROM {name}",
            f"CLOSE {name}",
            "CLOSE ALL",
        )
        return [self._any(chance.choice(texts))]

    def _hold(self) -> list[Step]:
        chance = self._chance
        name = chance.choice(("c0", "c1"))
        texts = (
            f"DECLARE {name} CURSOR WITH HOLD FOR SELECT generate_series(1, 20)",
            f"DECLARE {name} CURSOR WITH HOLD FOR SELECT 1/(n - 4) FROM generate_series(1, 9) n",
            f"FETCH 3 FROM {name}",
            f"CLOSE {name}",
        )
        return [self._any(chance.choice(texts))]

    def _copy_in(self) -> list[Step]:
        chance, lane = self._chance, self._lane
        start = chance.choice(
            (f"COPY t{lane} FROM STDIN", f"COPY t{lane} (n) FROM STDIN", "COPY missing FROM STDIN")
        )
        rows = chance.choice(
            (b"1\tone\n", b"1\n", b"x\ty\n", b"5000\tz\n", b"2\t\\N\n3\tthree\n", b"7\tmany\n" * 3000)
        )
        parts = [copy_data(rows)] * chance.randrange(3)
        if chance.random() < 0.3:
            parts.append(copy_data(b"\\.\n"))
        end = chance.choice((COPY_DONE, COPY_DONE, COPY_DONE, copy_fail("changed my mind")))
        if chance.random() < 0.25:
            return [(parse(start), bind(), execute(), *parts, end, SYNC)]
        if self._has("odd") and chance.random() < 0.2:
            odd = chance.choice((FLUSH, SYNC))
            if odd is SYNC and not self._has("doubt"):
                fitting = chance.choice((b"1\tone\n", b"2\t\\N\n3\tthree\n", b"7\tmany\n" * 3000))
                start, end = f"COPY t{lane} FROM STDIN", COPY_DONE
                parts = [copy_data(fitting)] * chance.randrange(3)
            parts.insert(chance.randrange(len(parts) + 1), odd)
        return [(query(start), *parts, end)]

    def _copy_out(self) -> list[Step]:
        chance, lane = self._chance, self._lane
        texts = (
            f"COPY (SELECT n, d FROM t{lane} ORDER BY n, d) TO STDOUT",
            f"COPY (SELECT generate_series(1, {chance.randrange(1, 2000)})) TO STDOUT (FORMAT csv)",
            "COPY (SELECT 1/(n - 50) FROM generate_series(1, 99) n) TO STDOUT",
            "COPY missing TO STDOUT",
        )
        return [self._any(chance.choice(texts))]

    def _notify(self) -> list[Step]:
        return [self._any(f"NOTIFY ch{self._lane}, 'payload {self._chance.randrange(9)}'")]

    def _odd(self) -> list[Step]:
        """What no driver sends, though a client may."""
        chance = self._chance
        return [
            chance.choice(
                (
                    (SYNC,),
                    (SYNC, SYNC, SYNC),
                    (FLUSH, query(self._data())),
                    (COPY_DONE, query(self._data())),
                    (copy_data(b"stray"), copy_fail("stray"), SYNC),
                    (close("P"), SYNC),
                    (close("S"), close("S", "never made"), SYNC),
                    (close("X"), SYNC),
                    (execute("missing"), query(self._data()), SYNC),
                    (parse("SELECT 1"), parse("SELECT 2"), bind(), execute(), execute(), SYNC),
                    (parse("SELECT 1; SELECT 2"), bind(), execute(), SYNC),
                    (*self._group(), query(self._data()), *self._group(), SYNC),
                    (
                        parse("nonsense"),
                        query(self._data()),
                        FLUSH,
                        *self._group(),
                        SYNC,
                        query(self._data()),
                    ),
                    (bind("missing"), SYNC, describe("P", "missing"), SYNC),
                    (describe("X"), SYNC),
                )
            )
        ]

    def _set_local(self) -> list[Step]:
        name = self._chance.choice(sorted(SETTINGS))
        value = self._chance.choice(SETTINGS[name])
        self._recent = name
        steps: list[Step] = [self._any(f"SET LOCAL {name} = {value}")]
        if not self._in_block and self._chance.random() < 0.8:
            self._in_block = True
            steps.insert(0, (query("BEGIN"),))
        return [*steps, *([self._probe()] if self._chance.random() < 0.6 else [])]

    def _set_text(self) -> str:
        chance = self._chance
        if chance.random() < 0.15:
            return chance.choice(WRONG_SETS)
        if chance.random() < 0.15:
            return chance.choice(
                [text for text in OTHER_SETS if self._may_reset() or "LOCAL" not in text.split()]
            )
        name = chance.choice(sorted(SETTINGS))
        self._recent = name
        if chance.random() < 0.1 and self._may_reset(name):
            return f"SET {name} TO DEFAULT"
        return f"SET {name} {chance.choice(('=', 'TO'))} {chance.choice(SETTINGS[name])}"

    def _set(self) -> list[Step]:
        steps: list[Step] = [self._any(self._set_text())]
        if self._chance.random() < 0.2:
            text = self._set_text()
            steps = [(query(f"{text}; {self._data()}"),)]
        if self._chance.random() < 0.5:
            steps.append(self._probe())
        return steps

    def _set_in_block(self) -> list[Step]:
        """SET undone by ROLLBACK, or by ROLLBACK TO a savepoint, or not."""
        chance = self._chance
        texts = [self._set_text() for _ in range(chance.randrange(1, 4))]
        if chance.random() < 0.5:
            at = chance.randrange(len(texts))
            texts.insert(at, "SAVEPOINT a")
            texts.append(chance.choice(("ROLLBACK TO a", "RELEASE a", self._data())))
        steps = [self._any(text) for text in ("BEGIN", *texts, chance.choice(ENDS[:6]))]
        self._in_block = False
        if chance.random() < 0.2:
            return [tuple(part for step in steps for part in step), self._probe()]
        return [*steps, self._probe()]

    def _may_reset(self, name: str = "") -> bool:
        """Whether a default may be asked for: not, while it may be a value of the startup packet."""
        if self._has("reset to startup"):
            return True
        return not self._startup

    def _reset(self) -> list[Step]:
        chance = self._chance
        if not self._may_reset():
            return [self._probe()]
        name = chance.choice(self._known_settings())
        return [self._any(chance.choice((f"RESET {name}", f"RESET {name}", "RESET ALL"))), self._probe()]

    def _set_config(self) -> list[Step]:
        name = self._chance.choice(("DateStyle", "work_mem", "application_name", "mine.own"))
        value = {"DateStyle": "German", "work_mem": "6MB"}.get(name, "by ''function''")
        local = self._chance.choice(("true", "false"))
        return [self._any(f"SELECT set_config('{name}', '{value}', {local})"), self._probe()]

    def _sql_prepare(self) -> list[Step]:
        chance = self._chance
        name = chance.choice(("q0", "q1"))
        texts = [
            f"PREPARE {name} AS SELECT {chance.randrange(9)}, $1::int",
            f"PREPARE {name} (int) AS SELECT $1 + 1",
            f"EXECUTE {name} (7)",
            f"EXECUTE {name} (7)",
            f"EXECUTE {name}",
            f"DEALLOCATE {name}",
            f"DEALLOCATE PREPARE {name}",
        ]
        texts.append("DEALLOCATE ALL")
        if chance.random() < 0.2:
            return [(bind(name, (b"5",)), execute(), SYNC)]
        return [self._any(chance.choice(texts))]

    def _discard(self) -> list[Step]:
        texts = ["DISCARD PLANS", "DISCARD TEMP", "DISCARD SEQUENCES"]
        if self._may_reset():
            texts += ["DISCARD ALL"] * 3
        return [self._any(self._chance.choice(texts))]

    def _listen(self) -> list[Step]:
        chance, lane = self._chance, self._lane
        texts = (
            f"LISTEN ch{lane}", f"LISTEN ch{lane}", f"NOTIFY ch{lane}", f"NOTIFY ch{lane}, 'load'",
            f"UNLISTEN ch{lane}", "UNLISTEN *", f"SELECT pg_notify('ch{lane}', 'by function')",
            f"LISTEN other{lane}", f"NOTIFY other{lane}, 'x'; NOTIFY ch{lane}, 'y'",
        )  # fmt: skip
        return [self._any(chance.choice(texts))]

    def _lock(self, function: str) -> str:
        return f"SELECT {function}({self._lane}, {self._chance.randrange(3)})"

    def _locks(self) -> list[Step]:
        functions = (
            "pg_advisory_lock", "pg_try_advisory_lock", "pg_advisory_unlock", "pg_advisory_lock_shared",
            "pg_advisory_unlock_shared",
        )  # fmt: skip
        sql = self._lock(self._chance.choice(functions))
        if self._chance.random() < 0.1:
            sql = "SELECT pg_advisory_unlock_all()"
        return [self._any(sql)]

    def _temp(self) -> list[Step]:
        chance = self._chance
        name = chance.choice(("tmp0", "tmp1"))
        texts = (
            f"CREATE TEMP TABLE {name} (n int, d text)",
            f"CREATE TEMPORARY TABLE IF NOT EXISTS {name} (n int, d text)",
            f"CREATE TEMP TABLE {name} ON COMMIT DROP AS SELECT 1 AS n",
            f"CREATE TEMP TABLE {name} (n int) ON COMMIT DELETE ROWS",
            f"SELECT 5 AS n INTO TEMP {name}",
            f"INSERT INTO {name} VALUES (1)",
            f"SELECT n FROM {name}",
            f"DROP TABLE {name}",
            f"SELECT * FROM {name}",
        )
        return [self._any(chance.choice(texts))]

    def _dates(self) -> list[Step]:
        """A text that means something else under other settings: clients that differ must not share it."""
        if self._features & SETTERS:
            return [self._probe()]
        made = parse("SELECT '01/02/2020'::date - '2020-01-01'::date", "day")
        return [(close("S", "day"), made, *self._run_of("day")), self._probe(), self._run_of("day")]

    def _large(self) -> list[Step]:
        """Around and above what the relay looks at as a whole (16 KiB)."""
        chance = self._chance
        size = chance.choice((8_000, 16_300, 16_384, 17_000, 40_000))
        text, name = "x" * size, self._name()
        match chance.randrange(6):
            case 0:
                return [(query(f"SELECT length('{text}')"),)]
            case 1:
                return [(parse(f"SELECT length('{text}')"), bind(), execute(), SYNC)]
            case 2:
                return [(parse("SELECT length($1), $1"), bind("", (text.encode(),)), execute(), SYNC)]
            case 3:
                columns = "".join(f", ${number + 1}::text" for number in range(ARITIES[name]))
                made = parse(f"SELECT length('{text}'){columns}", name)
                again = [(made, SYNC)] if chance.random() < 0.5 else []
                return [(close("S", name), made, *self._run_of(name)), self._run_of(name), *again]
            case 4:
                values = [text.encode()] * ARITIES[name]
                return [(bind(name, tuple(values)), execute(), SYNC)]
            case _:
                portal = "x" * min(size, 9_000)  # PostgreSQL takes no Execute above 10,000 bytes
                return [(parse("SELECT 1"), bind("", (), portal), execute(portal), close("P", portal), SYNC)]

    def _call(self) -> list[Step]:
        chance = self._chance
        return [
            chance.choice(
                (
                    (call(INT4PL, b"2", b"40"),),
                    (call(SQRT, chance.choice((b"16", b"-1"))),),
                    (call(INT4PL, b"x", b"1"), query(self._data())),
                    (call(1),),
                )
            )
        ]

    def _do(self) -> list[Step]:
        chance, lane = self._chance, self._lane
        texts = [
            "DO $$BEGIN RAISE NOTICE 'said'; END$$",
            f"DO $x$BEGIN INSERT INTO t{lane} VALUES (1, 'done'); END$x$",
            "DO 'BEGIN RAISE EXCEPTION ''thrown''; END'",
        ]
        return [self._any(chance.choice(texts))]

    def _backslashes(self) -> list[Step]:
        """Texts that mean something else when standard_conforming_strings is off."""
        chance = self._chance
        if self._startup.get("standard_conforming_strings") == "off" or chance.random() < 0.3:
            texts = (
                "SELECT 'it\\'s'; SET work_mem = '6MB'; SELECT '\\''",
                f"SELECT 'it\\'s'; LISTEN ch{self._lane}; SELECT '\\''",
                "SELECT 'a\\'; SET work_mem = ''6MB''; --'",
                "SELECT 'a\\\\'; SELECT 'b'",
            )
        else:
            texts = (
                "SELECT 'a\\'; SET work_mem = '6MB'",
                f"SELECT 'a\\'; LISTEN ch{self._lane}",
                "SET standard_conforming_strings = off",
                "SELECT E'\\'; BEGIN; --'",
            )
        probe = chance.choice(("SHOW work_mem", "SELECT pg_listening_channels() ORDER BY 1"))
        return [(query(chance.choice(texts)),), self._any(probe)]


def generate(
    seed: str, lane: int, limits: frozenset[str] = frozenset(), may_leave_state: bool = True
) -> Program:
    """The program of a seed; ``limits`` are those of LIMITS that it may use."""
    chance = random.Random(seed)
    known = chance.choice((LIGHT, FEATURES)) if may_leave_state else LIGHT
    share = chance.choice((0.2, 0.4, 0.8))
    features = {feature for feature in (*known, *sorted(limits)) if chance.random() < share}
    features.add(chance.choice(known[:12]))
    return Author(chance, lane, features).write()
