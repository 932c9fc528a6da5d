"""Reads the startup parameter ``options`` and PostgreSQL's booleans.

Follows ``pg_split_opts``, ``process_postgres_switches`` and ``parse_bool`` of PostgreSQL 18, so that
``PGOPTIONS="-c statement_timeout=5s"`` means the same through gpooler as on a direct connection.
"""

from collections.abc import Iterator
from typing import Final

from gpooler.errors import InvalidArguments

# Switches without and with an argument that set a parameter any user may set.
_FLAGS: Final = {
    "e": ("DateStyle", "euro"),
    "s": ("log_statement_stats", "true"),
}
_DISABLED_PLANS: Final = {
    "s": "enable_seqscan", "i": "enable_indexscan", "o": "enable_indexonlyscan", "b": "enable_bitmapscan",
    "t": "enable_tidscan", "n": "enable_nestloop", "m": "enable_mergejoin", "h": "enable_hashjoin",
}  # fmt: skip
_TIMINGS: Final = (("pa", "log_parser_stats"), ("pl", "log_planner_stats"), ("e", "log_executor_stats"))
_SPACES: Final = " \t\n\v\f\r"  # isspace() in the C locale

_WORDS: Final = (("true", 1, True), ("false", 1, False), ("yes", 1, True), ("no", 1, False),
                 ("on", 2, True), ("off", 2, False), ("1", 1, True), ("0", 1, False))  # fmt: skip


def parse_bool(value: str) -> bool | None:
    """The boolean a value means, None if it means none: words and their unambiguous beginnings, any case."""
    lowered = value.lower()
    for word, shortest, meaning in _WORDS:
        if len(lowered) >= shortest and word.startswith(lowered):
            return meaning
    return None


def split_options(text: str) -> list[str]:
    """Arguments of ``options``: separated by white space; a backslash takes the next character literally."""
    arguments: list[str] = []
    argument: list[str] | None = None
    is_escaped = False
    for char in text:
        if is_escaped:
            is_escaped = False
        elif char in _SPACES:
            if argument is not None:
                arguments.append("".join(argument))
                argument = None
            continue
        elif char == "\\":
            is_escaped = True
            argument = [] if argument is None else argument
            continue
        if argument is None:
            argument = []
        argument.append(char)
    if argument is not None:
        arguments.append("".join(argument))
    return arguments


def parse_options(text: str) -> dict[str, str]:
    """Parameters that ``options`` sets, by name, the last one of a name winning.

    Understands ``-c name=value``, ``-cname=value``, ``--name=value`` (in a name ``-`` is ``_``) and the short
    switches any user may give: ``-e -s -f -S -t``. Raises ``InvalidArguments`` (42601, as PostgreSQL) for all
    others.
    """
    parameters: dict[str, str] = {}
    arguments = iter(split_options(text))
    for argument in arguments:
        if argument == "--":  # ends the switches, as in getopt(); nothing may follow
            argument = next(arguments, "")
            if argument:
                raise _invalid(argument)
        elif argument.startswith("--"):
            _set(parameters, "--", argument[2:])
        elif len(argument) > 1 and argument[0] == "-":
            _parse_cluster(parameters, argument, arguments)
        else:
            raise _invalid(argument)
    return parameters


def _parse_cluster(parameters: dict[str, str], argument: str, following: Iterator[str]) -> None:
    """Switches of one argument, as getopt() reads ``-se`` or ``-ecname=value``."""
    for position, switch in enumerate(argument[1:], start=1):
        if switch in _FLAGS:
            name, value = _FLAGS[switch]
            parameters[name] = value
            continue
        if switch not in "cfSt":
            raise _invalid(argument)
        operand = argument[position + 1 :] or next(following, None)
        if operand is None:
            raise _invalid(argument)
        if switch == "c":
            _set(parameters, "-c ", operand)
        elif switch == "S":
            parameters["work_mem"] = operand
        elif switch == "f" and operand in _DISABLED_PLANS:
            parameters[_DISABLED_PLANS[operand]] = "false"
        elif switch == "t" and (names := [name for start, name in _TIMINGS if operand.startswith(start)]):
            parameters[names[0]] = "true"
        else:
            raise _invalid(argument)
        return


def _set(parameters: dict[str, str], switch: str, text: str) -> None:
    """``name=value``; in a name ``-`` means ``_`` (``ParseLongOption``)."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InvalidArguments(f"{switch}{text} requires a value")
    parameters[name.replace("-", "_")] = value


def _invalid(argument: str) -> InvalidArguments:
    return InvalidArguments(
        f"invalid command-line argument for server process: {argument}",
        hint='The startup parameter "options" takes -c name=value, --name=value, -e, -f, -s, -S and -t.',
    )
