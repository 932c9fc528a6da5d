"""Messages as the protocol documentation lays them out."""

import pytest

from gpooler.errors import AuthenticationFailed, PostgresError, ProtocolViolation, ServerProtocol
from gpooler.wire import codes, messages
from gpooler.wire.text import decode, encode


@pytest.mark.parametrize(
    ("built", "expected"),
    [
        (messages.authentication_ok(), "52 00000008 00000000"),
        (messages.authentication_cleartext_password(), "52 00000008 00000003"),
        (messages.authentication_md5_password(b"\1\2\3\4"), "52 0000000c 00000005 01020304"),
        (messages.authentication_sasl([b"A", b"B"]), "52 0000000d 0000000a 4100 4200 00"),
        (messages.authentication_sasl_continue(b"x"), "52 00000009 0000000b 78"),
        (messages.authentication_sasl_final(b"x"), "52 00000009 0000000c 78"),
        (messages.parameter_status("a", "é"), "53 00000009 6100 c3a9 00"),
        (messages.backend_key_data(1 << 30, b"\1\2\3\4"), "4b 0000000c 40000000 01020304"),
        (messages.backend_key_data(1, bytes(32)), "4b 00000028 00000001" + "00" * 32),
        (messages.ready_for_query(), "5a 00000005 49"),
        (messages.ready_for_query(b"T"), "5a 00000005 54"),
        (
            messages.negotiate_protocol_version(codes.PROTOCOL_3_2, ["_pq_.a"]),
            "76 00000013 00030002 00000001 5f70715f2e61 00",
        ),
        (messages.query("SELECT 1"), "51 0000000d 53454c4543542031 00"),
        (messages.terminate(), "58 00000004"),
        (messages.sync(), "53 00000004"),
        (messages.startup_message({"user": "a"}), "00000010 00030000 7573657200 6100 00"),
        (messages.cancel_request(5, b"\1\2\3\4"), "00000010 04d2162e 00000005 01020304"),
        (messages.ssl_request(), "00000008 04d2162f"),
        (messages.password_message(b"x"), "70 00000006 7800"),
        (messages.sasl_initial_response(b"A", b"xy"), "70 0000000c 4100 00000002 7879"),
        (messages.sasl_response(b"xy"), "70 00000006 7879"),
    ],
)
def test_message_has_the_bytes_of_the_documentation(built: bytes, expected: str) -> None:
    assert built == bytes.fromhex(expected)


@pytest.mark.parametrize("secret", [b"", b"abc", bytes(257)])
def test_secret_of_a_length_no_version_allows_is_not_sent(secret: bytes) -> None:
    with pytest.raises(ValueError, match="secret of"):
        messages.backend_key_data(1, secret)


def fields_of(message: bytes, kind: bytes) -> dict[str, str]:
    [(found, body)], rest = messages.split_messages(message)
    assert (found, rest) == (kind, b"")
    return messages.parse_error(body)


def test_error_response_names_the_client_in_its_text_alone() -> None:
    error = AuthenticationFailed("app", cause="wrong")
    plain = fields_of(messages.error_response(error), codes.ERROR_RESPONSE)
    assert plain == error.fields()
    named = fields_of(messages.error_response(error, "c1a2b3c4d5e6"), codes.ERROR_RESPONSE)
    assert named.pop("M") == 'gpooler: c1a2b3c4d5e6: password authentication failed for user "app"'
    assert named == {code: value for code, value in plain.items() if code != "M"}


def test_forwarded_error_of_a_server_keeps_all_its_fields() -> None:
    body = b"SFATAL\0VFATAL\0C53300\0Mtoo many \xff\0Fproc.c\0L354\0RInitProcess\0\0"
    error = PostgresError(messages.parse_error(body))
    assert messages.error_response(error) == messages.message(b"E", body)


def test_nul_in_a_text_cannot_break_an_error_response() -> None:
    fields = fields_of(messages.error_response(ProtocolViolation("a\0b")), codes.ERROR_RESPONSE)
    assert fields["M"] == "ab"


def test_notice_response_is_marked_as_a_notice() -> None:
    fields = fields_of(messages.notice_response("wait", client_id="c1"), codes.NOTICE_RESPONSE)
    assert fields == {"S": "NOTICE", "V": "NOTICE", "C": "00000", "M": "gpooler: c1: wait"}


def test_stream_is_cut_into_messages_and_a_rest() -> None:
    stream = messages.ready_for_query() + messages.parameter_status("a", "b") + b"Z\0\0"
    found, rest = messages.split_messages(stream)
    assert found == [(b"Z", b"I"), (b"S", b"a\0b\0")]
    assert rest == b"Z\0\0"


@pytest.mark.parametrize("word", [0, 3, messages.MAX_LOGIN_MESSAGE_LENGTH + 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_length_out_of_bounds_is_refused_as_soon_as_it_is_seen(word: int) -> None:
    with pytest.raises(ServerProtocol):
        messages.split_messages(b"S" + word.to_bytes(4, "big"))
    with pytest.raises(ProtocolViolation):
        messages.split_password_message(b"p" + word.to_bytes(4, "big"))


def test_password_message_is_taken_when_complete_with_what_follows_it() -> None:
    message = messages.password_message(b"x")
    for end in range(len(message)):
        assert messages.split_password_message(message[:end]) is None
    assert messages.split_password_message(message + b"Q") == (b"x\0", b"Q")


@pytest.mark.parametrize("kind", [b"Q", b"X", b"\0", b"P"])
def test_another_message_during_login_is_refused_at_its_first_byte(kind: bytes) -> None:
    with pytest.raises(ProtocolViolation, match=f"got message type {kind[0]}"):
        messages.split_password_message(kind)


def test_bodies_are_read_back() -> None:
    assert messages.parse_parameter_status(b"TimeZone\0UTC\0") == ("TimeZone", "UTC")
    assert messages.parse_parameter_status(b"search_path\0\0") == ("search_path", "")
    assert messages.parse_backend_key_data(b"\0\0\0\5abcd") == (5, b"abcd")
    assert messages.parse_authentication(b"\0\0\0\5abcd") == (5, b"abcd")
    assert messages.parse_sasl_mechanisms(b"A\0B\0\0") == [b"A", b"B"]
    assert messages.parse_ready_for_query(b"E") == b"E"
    assert messages.parse_error(b"\0") == {}
    negotiated = messages.parse_negotiate_protocol_version(b"\0\3\0\0\0\0\0\1_pq_.a\0")
    assert negotiated == messages.NegotiateProtocolVersion(codes.PROTOCOL_3_0, ("_pq_.a",))


@pytest.mark.parametrize(
    ("parse", "body"),
    [
        (messages.parse_parameter_status, b""),
        (messages.parse_parameter_status, b"a\0b"),
        (messages.parse_parameter_status, b"a\0"),
        (messages.parse_parameter_status, b"\0b\0"),
        (messages.parse_parameter_status, b"a\0b\0c\0"),
        (messages.parse_backend_key_data, b""),
        (messages.parse_backend_key_data, b"\0\0\0\5abc"),
        (messages.parse_backend_key_data, bytes(4 + 257)),
        (messages.parse_authentication, b"\0\0\0"),
        (messages.parse_sasl_mechanisms, b""),
        (messages.parse_sasl_mechanisms, b"A\0"),
        (messages.parse_ready_for_query, b""),
        (messages.parse_ready_for_query, b"X"),
        (messages.parse_ready_for_query, b"II"),
        (messages.parse_error, b""),
        (messages.parse_error, b"Mx\0"),
        (messages.parse_error, b"Mx"),
        (messages.parse_error, b"Mx\0\0Cx\0\0"),
        (messages.parse_negotiate_protocol_version, b"\0\3\0\0\0\0\0"),
        (messages.parse_negotiate_protocol_version, b"\0\3\0\0\0\0\0\1"),
        (messages.parse_negotiate_protocol_version, b"\0\3\0\0\0\0\0\1a"),
        (messages.parse_negotiate_protocol_version, b"\0\3\0\0\xff\xff\xff\xffa\0"),
    ],
)
def test_malformed_body_is_the_fault_of_the_server(parse, body: bytes) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ServerProtocol):
        parse(body)


def test_any_bytes_survive_as_text() -> None:
    everything = bytes(range(256)) + "é€😀".encode()
    assert encode(decode(everything)) == everything
