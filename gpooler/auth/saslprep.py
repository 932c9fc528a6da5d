"""Prepares a password for SCRAM: SASLprep (RFC 4013), as leniently as PostgreSQL's ``pg_saslprep``.

What is not UTF-8, or has characters that the profile prohibits, is used as the raw bytes: the encoding of a
password is not known during a login.
"""

import stringprep
import unicodedata

_PROHIBITED = (
    stringprep.in_table_c12,
    stringprep.in_table_c21_c22,
    stringprep.in_table_c3,
    stringprep.in_table_c4,
    stringprep.in_table_c5,
    stringprep.in_table_c6,
    stringprep.in_table_c7,
    stringprep.in_table_c8,
    stringprep.in_table_c9,
    stringprep.in_table_a1,  # unassigned in Unicode 3.2
)


def saslprep(password: bytes) -> bytes:
    """The password normalised, or unchanged where the profile cannot be applied. Never fails."""
    if password.isascii():  # as PostgreSQL: control characters too
        return password
    try:
        text = password.decode("utf-8")
    except UnicodeDecodeError:
        return password
    prepared = _prepare(text)
    return password if prepared is None else prepared.encode("utf-8")


def _prepare(text: str) -> str | None:
    """RFC 4013, sections 2.1 to 2.4; None when a character is prohibited or nothing is left.

    PostgreSQL looks for prohibited characters before it normalises, the RFC after; what matters is to
    arrive at the bytes PostgreSQL hashed.
    """
    mapped = "".join(
        " " if stringprep.in_table_c12(char) else char
        for char in text
        if stringprep.in_table_c12(char) or not stringprep.in_table_b1(char)
    )
    if not mapped or any(is_in(char) for char in mapped for is_in in _PROHIBITED):
        return None
    if any(stringprep.in_table_d1(char) for char in mapped):  # RFC 3454, section 6
        is_mixed = any(stringprep.in_table_d2(char) for char in mapped)
        if is_mixed or not (stringprep.in_table_d1(mapped[0]) and stringprep.in_table_d1(mapped[-1])):
            return None
    return unicodedata.normalize("NFKC", mapped)
