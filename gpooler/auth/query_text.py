"""The text of an ``auth_query``: placeholders to parameters. Sans-IO.

``$1`` and ``%u`` are the user, ``%h`` is the client's host. What a client chose is bound as a parameter and
never becomes part of the text: a placeholder inside quotes is refused, but for one that is all between them,
``'%u'``, as it stands in configurations of Odyssey.
"""

import re
from dataclasses import dataclass
from typing import Final

# What a placeholder cannot stand in, and the placeholders themselves. The longest opening comes first.
_PIECE: Final = re.compile(
    r"""
    (?P<alone> '%[uh]' (?!') )
    | (?P<escaped> (?<![A-Za-z0-9_$]) [eE]' (?: [^'\\] | \\. | '' )* (?: ' | \Z ) )
    | (?P<quoted> ' (?: [^'] | '' )* (?: ' | \Z ) | " [^"]* (?: " | \Z ) )
    | (?P<dollar> (?<![A-Za-z0-9_$]) \$ (?P<tag> [A-Za-z_]\w* )? \$ .*? (?: \$ (?(tag)(?P=tag)) \$ | \Z ) )
    | (?P<comment> -- [^\n]* | /\* .*? (?: \*/ | \Z ) )
    | (?P<parameter> (?<![A-Za-z0-9_$]) \$ \d+ )
    | (?P<placeholder> %[uh] (?![A-Za-z0-9_]) )
    """,
    re.VERBOSE | re.DOTALL | re.ASCII,
)


@dataclass(frozen=True, slots=True)
class QueryText:
    """``sql`` with ``$1``, the user, and, where it asks for it, ``$2``, the host."""

    sql: str
    has_host: bool


def compile_query(text: str) -> QueryText:
    """The query as it is to be prepared. Raises ValueError with a text for the user."""
    has_user = has_host = False

    def put(match: re.Match[str]) -> str:
        nonlocal has_user, has_host
        found = match[0]
        match match.lastgroup:
            case "alone" | "placeholder":
                is_user = "u" in found
                has_user, has_host = has_user or is_user, has_host or not is_user
                return " $1 " if is_user else " $2 "
            case "parameter":
                if found != "$1":
                    raise ValueError(
                        f"must not hold {found}: there is $1, the user, and %h, the client's host"
                    )
                has_user = True
            case "comment":
                pass
            case _:
                if "%u" in found or "%h" in found:
                    raise ValueError("must not hold a placeholder between quotes, beside something else")
        return found

    sql = _PIECE.sub(put, text).strip().removesuffix(";").strip()
    if not has_user:
        raise ValueError("must hold $1 or %u, the user")
    return QueryText(sql, has_host)
