"""What may stand for a host in a rule; nothing is looked up here."""

import re
from typing import Final

NAME_MOST: Final = 253  # characters without a dot at the end (RFC 1035, section 2.3.4)
# RFC 1123, section 2.1, and the underscores that names of containers have.
LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
# No top-level domain is a number, and the resolver takes "10.1" and "0x7f.1" for addresses.
NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)
# They say something else in one place or the other; a host that is called so may be named with its domain.
WORDS: Final = frozenset({"default", "all", "samehost", "samenet"})


def host_name(text: str) -> str:
    """A full host name in lower case. Raises ValueError: what is wrong with it, for the user."""
    name = text.lower()
    labels = name.removesuffix(".").split(".")
    if name.startswith("."):
        raise ValueError("suffixes of host names are not supported: name each host, or give their network")
    if name in WORDS:
        raise ValueError(f'"{name}" is a word, and no host name')
    if (
        not text.isascii()
        or len(name.removesuffix(".")) > NAME_MOST
        or NUMBER.fullmatch(labels[-1])
        or not all(map(LABEL.fullmatch, labels))
    ):
        raise ValueError(
            "a host name has letters, digits, hyphens and underscores, at most 63 between two dots and "
            f"{NAME_MOST} in all, and does not end with a number"
        )
    return name
