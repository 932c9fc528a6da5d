"""The SQL scanner against a tokenizer of another make, on random texts cut at random places."""

import re

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpooler.relay.probe import ScanProbe

SET, LISTEN, PREPARE, TEMP, HOLD, LOCK, LOAD, PARSE, BEGIN = (1 << bit for bit in range(9))
FORGET, OPAQUE = 512, 1024
NONE, PAIRS, SJIS = range(3)
HIGH = "\x80-\xff"
GAP = r"(?:[ \t\n\r\f\v]|--[^\n\r]*[\n\r])*"
TOKEN = re.compile(
    rf"""
      (?P<gap>[ \t\n\r\f\v]+|--[^\n\r]*)
    | (?P<comment>/\*)
    | (?P<escaped>[eE]'(?:[^'\\]|\\.|'{GAP}')*+(?:'|\\?\Z))
    | (?P<bits>[bBxX]'(?:[^']|'{GAP}')*+(?:'|\Z))
    | (?P<unicode>[uU]&'(?:[^']|'{GAP}')*+(?:'|\Z))
    | (?P<unicode_name>[uU]&"(?:[^"]|"")*+")
    | (?P<open_name>(?:[uU]&)?"(?:[^"]|"")*+\Z)
    | (?P<word>[a-zA-Z_{HIGH}][a-zA-Z0-9_${HIGH}]*)
    | (?P<name>"(?:[^"]|"")*+")
    | (?P<quote>')
    | (?P<dollar>\$(?P<tag>(?:[a-zA-Z_{HIGH}][a-zA-Z0-9_{HIGH}]*)?)\$)
    | (?P<failed>\$(?:[a-zA-Z_{HIGH}][a-zA-Z0-9_{HIGH}]*|[0-9])?)
    | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)
CONFORMING = re.compile(rf"'(?:[^']|'{GAP}')*+(?:'|\Z)", re.DOTALL)
ESCAPED = re.compile(rf"'(?:[^'\\]|\\.|'{GAP}')*+(?:'|\\?\Z)", re.DOTALL)


def single_bytes(text: bytes, kind: int) -> str:
    """The text with each character of two bytes replaced by two bytes that mean nothing in SQL."""
    out = bytearray()
    at = 0
    while at < len(text):
        byte = text[at]
        is_lead = kind != NONE and byte >= 0x80 and not (kind == SJIS and 0xA1 <= byte <= 0xDF)
        out.append(byte)
        at += 1
        if is_lead and at < len(text):
            # still told apart: the tag of a dollar quote is compared
            low, high = text[at] & 0x0F, text[at] >> 4
            out += bytes([0x80 | low, 0x90 | high])
            at += 1
    return out.decode("latin-1")


def skip_comment(text: str, at: int) -> int:
    depth = 1
    while depth and at < len(text):
        if text.startswith("/*", at):
            depth, at = depth + 1, at + 2
        elif text.startswith("*/", at):
            depth, at = depth - 1, at + 2
        else:
            at += 1
    return at


def tokens(text: str, is_conforming: bool) -> list[tuple[str, str]]:
    """Pairs of kind (word, name, unicode_name, literal or a character) and text."""
    found: list[tuple[str, str]] = []
    at = 0
    while match := TOKEN.match(text, at):
        kind, at = match.lastgroup or "", match.end()
        if kind == "tag":
            kind = "dollar"
        if kind == "comment":
            at = skip_comment(text, at)
        elif kind == "quote":
            literal = (CONFORMING if is_conforming else ESCAPED).match(text, match.start())
            assert literal is not None
            at = literal.end()
            found.append(("literal", ""))
        elif kind == "dollar":
            end = text.find(match[0], at)
            at = len(text) if end < 0 else end + len(match[0])
            found.append(("literal", ""))
        elif kind in ("escaped", "bits", "unicode"):
            found.append(("literal", ""))
        elif kind == "word":
            found.append(("word", match[0].lower()))
        elif kind in ("name", "unicode_name"):
            found.append((kind, match[0].partition('"')[2][:-1].replace('""', '"').lower()))
        elif kind == "open_name":  # it never ends, but its beginning was seen
            found.append((kind, match[0].partition('"')[2].lower()))
            if match[0][0] != '"':
                found.append(("U&", ""))
        elif kind == "other":
            found.append((match[0], ""))
    return found


def effects_of(text: str, is_conforming: bool) -> int:
    """The effects, one statement after the other, each as a list of tokens."""
    effects = 0
    statement: list[tuple[str, str]] = []
    for token in [*tokens(text, is_conforming), (";", "")]:
        if token[0] == ";":
            effects |= effects_of_statement(statement)
            statement = []
        else:
            statement.append(token)
    return effects


def effects_of_statement(statement: list[tuple[str, str]]) -> int:
    words = [(kind, word) for kind, word in statement if kind in ("word", "name", "unicode_name")]
    keywords = [word if kind == "word" else "" for kind, word in words]
    effects = 0
    if any(kind in ("unicode_name", "U&") for kind, _ in statement):
        effects |= SET
    if any(kind == "open_name" and word.startswith("pg_temp_") for kind, word in statement):
        effects |= TEMP
    for at, (kind, word) in enumerate(words):
        effects |= SET if word == "set_config" else 0
        effects |= LOCK if re.fullmatch("pg_(try_)?advisory_lock(_shared)?", word) else 0
        effects |= TEMP if word == "pg_temp" or word.startswith("pg_temp_") else 0
        effects |= SET if word == "pg_settings" and "update" in keywords[:at] else 0
        before = keywords[at - 1] if at else ""
        if kind == "word" and word in ("temp", "temporary"):
            effects |= TEMP if before in ("create", "local", "global", "replace", "into") else 0
        if kind == "word" and word == "hold" and before == "with":
            effects |= HOLD
    first = keywords[0] if keywords else ""
    effects |= {
        "reset": SET,
        "discard": SET | FORGET,
        "deallocate": FORGET,
        "listen": LISTEN,
        "load": LOAD,
    }.get(first, 0)
    effects |= BEGIN if first in ("begin", "start") else 0
    effects |= OPAQUE if first in ("do", "call") else 0
    if first in ("set", "prepare") and len(words) > 1:
        effect = SET if first == "set" else PREPARE
        exceptions = ("local", "transaction", "constraints") if first == "set" else ("transaction",)
        if keywords[1] not in exceptions or names_something(statement):
            effects |= effect
    return effects


def names_something(statement: list[tuple[str, str]]) -> bool:
    """Whether the second word of SET LOCAL and its kin is a name after all."""
    count = 0
    for kind, word in statement:
        if kind in ("word", "name", "unicode_name"):
            count += 1
            if count == 3:
                settings_of_reading = ("client_encoding", "standard_conforming_strings")
                return word in settings_of_reading or (kind == "word" and word in ("to", "as", "names"))
        elif count == 2 and kind in ".=(":
            return True
    return False


def scan(text: bytes, cuts: list[int], is_conforming: bool, kind: int) -> int:
    probe = ScanProbe()
    probe.begin(is_conforming=is_conforming, is_multibyte=kind)
    text += b"\0"
    start = 0
    for cut in [*sorted(cut % len(text) for cut in cuts), len(text)]:
        probe.feed(text[start:cut])
        start = cut
    return probe.effects


WORDS = [
    "set", "SET", "local", "transaction", "constraints", "session", "to", "as", "reset", "discard", "listen",
    "prepare", "create", "or", "replace", "global", "temp", "temporary", "into", "table", "with", "hold",
    "load", "begin", "start", "update", "pg_settings", "pg_temp", "pg_temp_3", "set_config", "x", "names",
    "client_encoding", "standard_conforming_strings", "pg_advisory_lock", "pg_try_advisory_lock_shared",
    "select", "e", "b", "u", "n", "E", "U",
]  # fmt: skip
SIGNS = [
    "'", "'", '"', "\\", "$", "$$", "$a$", "$b$", "$1", "--", "-", "/", "*", "/*", "*/", "\n", "\r", " ", " ",
    ";", ";", ".", "=", "(", "&", "U&", "E'", "''", "\\'", "1", "\t",
]  # fmt: skip
PIECES = st.one_of(
    st.sampled_from([word.encode() for word in WORDS]),
    st.sampled_from([b" " + word.encode() + b" " for word in WORDS]),
    st.sampled_from([sign.encode() for sign in SIGNS]),
    st.sampled_from([b"\x81", b"\x83\\", b"\x83'", b"\xb1", b"\xc3\xa9", b"\x95\x5c", b"\x810\x811"]),
)
TEXTS = st.one_of(
    st.lists(PIECES, max_size=30).map(b"".join),
    st.binary(max_size=60).map(lambda text: text.replace(b"\0", b"0")),
)
KINDS = st.sampled_from([NONE, NONE, PAIRS, SJIS])


@settings(max_examples=3000)
@given(TEXTS, st.booleans(), KINDS)
@example(b"local E'' temp", True, NONE)  # what stands between words is no word, of whatever kind it is
def test_effects_are_those_of_the_reference(text: bytes, is_conforming: bool, kind: int) -> None:
    expected = effects_of(single_bytes(text, kind), is_conforming)
    assert scan(text, [], is_conforming, kind) == expected


@settings(max_examples=500)
@given(TEXTS, st.lists(st.integers(0, 1000), max_size=8), st.booleans(), KINDS)
def test_cuts_change_nothing(text: bytes, cuts: list[int], is_conforming: bool, kind: int) -> None:
    assert scan(text, cuts, is_conforming, kind) == scan(text, [], is_conforming, kind)
    assert scan(text, list(range(len(text))), is_conforming, kind) == scan(text, [], is_conforming, kind)


@settings(max_examples=300)
@given(TEXTS, TEXTS)
def test_effects_only_grow(text: bytes, more: bytes) -> None:
    seen = scan(text + b" ", [], True, NONE)
    assert scan(text + b" " + more, [], True, NONE) & seen == seen
