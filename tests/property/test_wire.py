"""Parsers of the wire: what is built is read back, and garbage raises nothing but gpooler's own errors."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpooler.auth import exchange
from gpooler.auth.saslprep import saslprep
from gpooler.auth.scram import ScramClient, ScramKeys, Verifier, derive_keys
from gpooler.auth.scram_server import ScramServer, prepare
from gpooler.auth.secrets import Secret
from gpooler.errors import ClientFault, GpoolerError, InvalidArguments, PostgresError, ServerFault
from gpooler.wire import codes, messages, options, startup
from gpooler.wire.session import ServerLogin
from gpooler.wire.text import decode, encode

CORPUS = sorted((Path(__file__).parents[1] / "wire" / "startup").rglob("*.bin"))
SECRET = Secret("pencil")
VERIFIER = Verifier.build(b"pencil", b"0123456789abcdef", 1)

texts = st.binary(max_size=40).map(lambda data: decode(data.replace(b"\0", b"")))
names = texts.filter(bool)
parameters = st.dictionaries(
    names.filter(
        lambda name: (
            name not in {"user", "database", "options", "replication"} and not name.startswith("_pq_.")
        )
    ),
    texts,
    max_size=6,
)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(bounds)]


@given(st.binary())
def test_any_bytes_survive_as_text(data: bytes) -> None:
    assert encode(decode(data)) == data


@given(names, texts, parameters, st.integers(0, 0xFFFF))
def test_startup_message_is_read_back(user: str, database: str, extra: dict[str, str], minor: int) -> None:
    packet = messages.startup_message(
        {"user": user, "database": database, **extra}, codes.protocol(codes.PROTOCOL_MAJOR, minor)
    )
    assert startup.parse_startup_length(packet[:4]) == len(packet) - 4
    read = startup.parse_startup(packet[4:])
    assert isinstance(read, startup.Startup)
    assert (read.minor, read.parameters) == (minor, extra)
    assert encode(read.user) == encode(user)[:63]
    assert encode(read.database) == encode(database or user)[:63]
    assert bool(read.negotiation()) is (minor > 2)


@given(st.binary(max_size=200))
def test_random_startup_packet_is_read_or_refused_as_the_fault_of_the_client(data: bytes) -> None:
    for packet in (data, b"\0\3\0\0" + data, b"\x04\xd2\x16\x2e" + data):
        try:
            startup.parse_startup(packet)
        except ClientFault:
            pass


@given(st.sampled_from(CORPUS), st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=4))
def test_corpus_with_changed_bytes_is_read_or_refused(path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(path.read_bytes())
    for place, byte in changes:
        data[place % len(data)] = byte
    try:
        startup.parse_startup_length(bytes(data[:4]))
        startup.parse_startup(bytes(data[4:]))
    except ClientFault:
        pass


@given(st.binary(min_size=4, max_size=4))
def test_length_word_is_within_the_limits_or_refused(word: bytes) -> None:
    try:
        assert 4 <= startup.parse_startup_length(word) <= 10_000
    except ClientFault:
        pass


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), texts, max_size=5), st.booleans())
def test_escaped_options_are_read_back(wanted: dict[str, str], is_long: bool) -> None:
    switch = "--" if is_long else "-c "
    text = " ".join(
        switch + "".join("\\" + char if char in " \t\n\v\f\r\\" else char for char in f"{name}={value}")
        for name, value in wanted.items()
    )
    assert options.parse_options(text) == wanted


@given(st.text(alphabet="-c=fSts eab\\ \t", max_size=30))
def test_random_options_are_read_or_refused(text: str) -> None:
    try:
        options.parse_options(text)
    except InvalidArguments:
        pass


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=1), st.binary(max_size=30)), max_size=8), st.data())
def test_messages_are_the_same_however_the_stream_is_cut(
    wanted: list[tuple[bytes, bytes]], data: st.DataObject
) -> None:
    stream = b"".join(messages.message(kind, body) for kind, body in wanted)
    found: list[tuple[bytes, bytes]] = []
    rest = b""
    for piece in cut(stream, data.draw(st.lists(st.integers(0, 2**16), max_size=8))):
        some, rest = messages.split_messages(rest + piece)
        found += some
    assert (found, rest) == (wanted, b"")


@pytest.mark.parametrize(
    "parse",
    [
        messages.split_messages,
        messages.parse_error,
        messages.parse_parameter_status,
        messages.parse_backend_key_data,
        messages.parse_authentication,
        messages.parse_sasl_mechanisms,
        messages.parse_ready_for_query,
        messages.parse_negotiate_protocol_version,
    ],
)
@given(data=st.binary(max_size=300))
def test_random_bytes_of_a_server_are_read_or_are_its_fault(
    parse: Callable[[bytes], Any], data: bytes
) -> None:
    try:
        parse(data)
    except ServerFault:
        pass


@given(st.binary(max_size=300))
def test_random_bytes_instead_of_a_password_are_read_or_are_the_clients_fault(data: bytes) -> None:
    try:
        messages.split_password_message(data)
    except ClientFault:
        pass


@given(st.dictionaries(st.sampled_from("SVCMDHPpqWstcdnFLR"), texts, max_size=8))
def test_error_of_a_server_is_forwarded_unchanged(fields: dict[str, str]) -> None:
    [(_, body)], _ = messages.split_messages(messages.error_response(PostgresError(fields)))
    assert messages.parse_error(body) == fields


backend_messages = st.one_of(
    st.builds(messages.authentication, st.integers(0, 13), st.binary(max_size=20)),
    st.builds(messages.authentication_sasl, st.lists(st.sampled_from([b"SCRAM-SHA-256", b"X"]), max_size=2)),
    st.builds(messages.parameter_status, names, texts),
    st.builds(messages.backend_key_data, st.integers(0, 2**31), st.binary(min_size=4, max_size=40)),
    st.builds(messages.ready_for_query, st.sampled_from([b"I", b"T"])),
    st.builds(messages.notice_response, texts),
    st.builds(messages.message, st.binary(min_size=1, max_size=1), st.binary(max_size=20)),
    st.binary(max_size=10),
)


def outcome(pieces: list[bytes]) -> tuple[str, str, object]:
    """How a login ends: the error, or the result when there is one."""
    login = ServerLogin("app", "orders", secret=SECRET)
    login.start()
    rest = b""
    try:
        for piece in pieces:
            if login.result is None:
                login.receive(piece)
            else:
                rest += piece
    except GpoolerError as error:
        return type(error).__name__, str(error), error.cause
    if login.result is None:
        return "", "", None
    result = login.result
    said = (result.parameters, result.pid, result.secret, result.rest + rest, result.notices)
    return "", "", said


@given(st.lists(backend_messages, max_size=8), st.booleans())
def test_login_ends_the_same_however_the_stream_is_cut(parts: list[bytes], is_ok_first: bool) -> None:
    stream = (messages.authentication_ok() if is_ok_first else b"") + b"".join(parts)
    assert outcome([bytes([byte]) for byte in stream]) == outcome([stream] if stream else [])


@given(
    st.sampled_from(["none", "clear_text", "md5", "scram-sha-256"]),
    st.lists(st.binary(max_size=60), max_size=4),
)
def test_random_password_messages_let_nobody_in(method: str, bodies: list[bytes]) -> None:
    side = exchange.begin(method, "app", SECRET, b"key")
    try:
        for body in bodies:
            said = side.answer(body)
            assert isinstance(said, bytes)
    except ClientFault:
        pass


scram_parts = st.lists(
    st.sampled_from(
        [b"n", b"y", b"p=x", b"", b"n=", b"r=", b"r=abc", b"a=x", b"m=x", b"c=biws", b"p=AAAA", b"s=AAAA",
         b"i=4096", b"i=1", b"v=AAAA", b"e=x", b"\xff", b"=", b"r=abcdef"]
    ),
    max_size=7,
).map(b",".join)  # fmt: skip


@given(scram_parts, scram_parts)
def test_random_scram_messages_of_a_client_let_nobody_in(first: bytes, final: bytes) -> None:
    side = ScramServer(prepare([VERIFIER]), nonce=b"def")
    try:
        side.first(first)
        assert side.final(final) is None
    except ClientFault:
        pass


@given(scram_parts, scram_parts)
def test_random_scram_messages_of_a_server_are_refused(first: bytes, final: bytes) -> None:
    client = ScramClient(nonce=b"abc")
    keys = ScramKeys(bytes(32), bytes(32))
    try:
        client.final(client.challenge(first), keys)
        client.verify(final)
    except ServerFault:
        return
    pytest.fail("a server proved itself by chance")


@given(st.binary(min_size=1, max_size=30))
def test_every_password_logs_in_with_scram(password: bytes) -> None:
    salt = b"0123456789abcdef"
    side, client = ScramServer(prepare([Verifier.build(password, salt, 1)])), ScramClient()
    challenge = client.challenge(side.first(client.first()))
    final = side.final(client.final(challenge, derive_keys(password, salt, 1)))
    assert final is not None
    client.verify(final)


@given(st.text(max_size=20))
def test_saslprep_never_fails_and_leaves_something(password: str) -> None:
    assert bool(saslprep(password.encode("utf-8", "surrogatepass"))) is bool(password)


@given(st.text(max_size=60), texts)
def test_any_text_is_a_secret_that_takes_itself_alone(text: str, other: str) -> None:
    text = decode(text.encode("utf-8", "replace"))
    secret = Secret(text)
    if secret.plain is not None:
        assert secret.is_password(b"app", encode(text))
        assert secret.is_password(b"app", encode(other)) is (encode(other) == encode(text))
