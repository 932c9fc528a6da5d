"""Texts that a directory is asked with, and what its answers mean. No I/O.

A user name comes from a stranger. One with a character that means something in a filter is refused before
anything is asked, as Odyssey does; what is left is escaped besides (RFC 4514, section 2.4; RFC 4515,
section 3).
"""

import re
from collections.abc import Iterable
from typing import Final

FORBIDDEN: Final = "*()\\/"
_DN_SPECIAL: Final = re.compile(r'[\\,+"<>;=]')
_FILTER_SPECIAL: Final = re.compile(r"[\\*()\0]")
# What a database may not hold where it is a part of a group's name: it would name a part of a DN.
_DATABASE_SPECIAL: Final = re.compile(r'[\\,+"<>;=\s]')


def fault_of(user: str) -> str:
    """Why a directory is not asked about this user name; empty when it may be."""
    for character in user:
        if character in FORBIDDEN:
            return f'the user name holds "{character}"'
    if not user.isprintable():  # surrogates, which are bytes that are not UTF-8, are not
        return "the user name holds a character that is not printable"
    return ""


def escape_dn(value: str) -> str:
    """``value`` as a part of a DN."""
    text = _DN_SPECIAL.sub(lambda match: "\\" + match[0], value).replace("\0", "\\00")
    if text.endswith(" "):
        text = text[:-1] + "\\ "
    return "\\" + text if text.startswith(("#", " ")) else text


def escape_filter(value: str) -> str:
    """``value`` as an assertion value of a filter."""
    return _FILTER_SPECIAL.sub(lambda match: f"\\{ord(match[0]):02x}", value)


def bind_name(prefix: str | None, user: str, suffix: str | None) -> str:
    """Whom a direct bind names."""
    return f"{prefix or ''}{escape_dn(user)}{suffix or ''}"


def search_filter(attribute: str, user: str, further: str | None) -> str:
    """The entries of ``user``; ``further`` must hold besides, with or without its brackets."""
    own = f"({attribute}={escape_filter(user)})"
    if not further:
        return own
    return f"(&{own}{further})" if further.startswith("(") else f"(&{own}({further}))"


def uri(scheme: str, servers: str, port: int | None) -> str:
    """The servers, of a text that separates them by spaces, as libldap takes them: tried in turn."""
    end = "" if port is None else f":{port}"
    hosts = (f"[{host}]" if ":" in host and not host.startswith("[") else host for host in servers.split())
    return " ".join(f"{scheme}://{host}{end}" for host in hosts)


def chosen_group(values: Iterable[str], host: str, database: str, groups: Iterable[str]) -> str | None:
    """The first of ``groups`` for which one of ``values`` holds ``host_database_group``; None: no one.

    It has to stand there as a whole, with neither letters, digits nor ``_ - .`` beside it, so that the group
    ``ro`` is not found in ``rollout``.
    """
    if _DATABASE_SPECIAL.search(database):
        return None
    texts = list(values)
    for group in groups:
        word = re.compile(rf"(?<![\w.-]){re.escape(f'{host}_{database}_{group}')}(?![\w.-])")
        if any(word.search(text) for text in texts):
            return group
    return None
