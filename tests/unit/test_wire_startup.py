"""Startup options and booleans as PostgreSQL reads them. Whole packets: ``tests/wire``."""

import pytest

from gpooler.errors import InvalidArguments, ProtocolViolation
from gpooler.wire import messages, startup
from gpooler.wire.options import parse_bool, parse_options, split_options


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("", []),
        (" \t\n", []),
        ("-c a=b", ["-c", "a=b"]),
        ("  -c\ta=b  ", ["-c", "a=b"]),
        (r"a\ b c", ["a b", "c"]),
        (r"a\\b", [r"a\b"]),
        (r"\a", ["a"]),
        ("a\\", ["a"]),
        (r"\ ", [" "]),
    ],
)
def test_options_are_split_at_white_space_that_is_not_escaped(text: str, arguments: list[str]) -> None:
    assert split_options(text) == arguments


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        ("", {}),
        ("-c a=b", {"a": "b"}),
        ("-ca=b", {"a": "b"}),
        ("--a=b", {"a": "b"}),
        ("--statement-timeout=5s -c lock-timeout=1s", {"statement_timeout": "5s", "lock_timeout": "1s"}),
        ("-c a=", {"a": ""}),
        ("-c a=b=c-d", {"a": "b=c-d"}),
        ("-c a=1 -c a=2", {"a": "2"}),
        (r"-c search_path=a\,\ b", {"search_path": "a, b"}),
        ("-c a.b=c", {"a.b": "c"}),
        ("-e -S 64MB -fh", {"DateStyle": "euro", "work_mem": "64MB", "enable_hashjoin": "false"}),
        ("-sefs", {"log_statement_stats": "true", "DateStyle": "euro", "enable_seqscan": "false"}),
        ("-t planner", {"log_planner_stats": "true"}),
        ("-c a=b --", {"a": "b"}),
    ],
)
def test_options_set_parameters(text: str, parameters: dict[str, str]) -> None:
    assert parse_options(text) == parameters


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-c", "invalid command-line argument for server process: -c"),
        ("-c a", "-c a requires a value"),
        ("--a", "--a requires a value"),
        ("-c =b", "-c =b requires a value"),
        ("a=b", "invalid command-line argument for server process: a=b"),
        ("-", "invalid command-line argument for server process: -"),
        ("-p 5432", "invalid command-line argument for server process: -p"),
        ("-fx", "invalid command-line argument for server process: -fx"),
        ("-t x", "invalid command-line argument for server process: -t"),
        ("-- x", "invalid command-line argument for server process: x"),
    ],
)
def test_other_options_are_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidArguments) as caught:
        parse_options(text)
    assert caught.value.message == message
    assert caught.value.sqlstate == "42601"


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        *((word, True) for word in ("1", "t", "TRUE", "tr", "y", "Yes", "on")),
        *((word, False) for word in ("0", "f", "False", "n", "no", "of", "OFF")),
        *((word, None) for word in ("", "o", "2", "10", "truex", "database", "ja")),
    ],
)
def test_booleans_are_words_and_their_unambiguous_beginnings(value: str, meaning: bool | None) -> None:
    assert parse_bool(value) is meaning


def test_length_word_gives_the_number_of_bytes_that_follow() -> None:
    assert startup.parse_startup_length((8).to_bytes(4, "big")) == 4
    assert startup.parse_startup_length((10_004).to_bytes(4, "big")) == 10_000


def test_the_log_learns_of_a_direct_tls_connection() -> None:
    with pytest.raises(ProtocolViolation) as caught:
        startup.parse_startup_length(b"\x16\x03\x01\x00")
    assert caught.value.cause == "direct TLS connection"


def test_our_own_startup_messages_are_read_back() -> None:
    parameters = {"user": "app", "database": "orders", "application_name": "é"}
    packet = startup.parse_startup(messages.startup_message(parameters)[4:])
    assert isinstance(packet, startup.Startup)
    assert (packet.user, packet.database) == ("app", "orders")
    assert packet.parameters == {"application_name": "é"}
    cancel = startup.parse_startup(messages.cancel_request(7, b"abcd")[4:])
    assert cancel == startup.CancelRequest(7, b"abcd")
    assert startup.parse_startup(messages.ssl_request()[4:]) == startup.SSLRequest()
