"""How names and values cross the wire: as UTF-8, with every other byte carried through unchanged.

Before a client has logged in nobody has agreed on an encoding, and PostgreSQL itself compares names
as bytes. ``surrogateescape`` (PEP 383) makes UTF-8 readable and keeps any other byte: ``encode`` undoes
``decode`` for all byte strings. Whoever writes such a text elsewhere (a log) must say what it does with
surrogates; ``backslashreplace`` is right for a log.
"""


def decode(data: bytes) -> str:
    """Bytes of the wire as text. Never fails, loses nothing."""
    return data.decode("utf-8", "surrogateescape")


def encode(text: str) -> bytes:
    """Text as bytes of the wire; the reverse of ``decode``."""
    return text.encode("utf-8", "surrogateescape")
