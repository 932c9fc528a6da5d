"""Our login to a server: what a real one does is shown in tests/integration, here what it should not."""

import pytest

from gpooler.auth import exchange, md5
from gpooler.auth.exchange import Done, Exchange
from gpooler.auth.scram import Verifier, derive_keys
from gpooler.auth.secrets import Secret
from gpooler.errors import InvalidAuthorization, PostgresError, ServerAuthentication, ServerProtocol
from gpooler.wire import codes, messages, startup
from gpooler.wire.session import MAX_NOTICES, LoginResult, LoginState, ServerLogin

PLAIN = Secret("pencil")
HASH = Secret(md5.hash_password(b"pencil", b"app").decode())
VERIFIER = Secret(Verifier.build(b"pencil", b"0123456789abcdef").format())
OK = messages.authentication_ok()
WELCOME = (
    messages.parameter_status("server_version", "18.0")
    + messages.parameter_status("TimeZone", "UTC")
    + messages.backend_key_data(4711, b"abcd")
    + messages.ready_for_query()
)


def started(secret: Secret | None = PLAIN, **options: object) -> ServerLogin:
    login = ServerLogin("app", "orders", secret=secret, **options)  # type: ignore[arg-type]
    login.start()
    return login


def converse(login: ServerLogin, server: Exchange) -> None:
    """A login against our own server side of the exchange, until AuthenticationOk."""
    said = server.challenge()
    while not isinstance(said, Done):
        taken = messages.split_password_message(login.receive(said))
        assert taken is not None
        said = server.answer(taken[0])
    login.receive(said.messages)


def test_startup_message_asks_for_protocol_3_0_with_the_parameters_in_order() -> None:
    login = ServerLogin("app", "orders", parameters={"client_encoding": "UTF8", "options": "-c geqo=off"})
    packet = startup.parse_startup(login.start()[4:])
    assert isinstance(packet, startup.Startup)
    assert (packet.minor, packet.user, packet.database) == (0, "app", "orders")
    assert packet.parameters == {"geqo": "off", "client_encoding": "UTF8"}


def test_trusting_server_leads_to_the_result() -> None:
    login = started(None)
    assert login.receive(OK + WELCOME + b"rest") == b""
    expected = {"server_version": "18.0", "TimeZone": "UTC"}
    assert login.result == LoginResult(expected, 4711, b"abcd", b"rest", ())
    assert list(login.result.parameters) == list(expected)
    assert login.state is LoginState.READY


def test_result_is_the_same_byte_by_byte() -> None:
    login = started(None)
    for byte in OK + WELCOME:
        assert login.result is None
        login.receive(bytes([byte]))
    assert login.result is not None
    assert (login.result.pid, login.result.rest) == (4711, b"")


@pytest.mark.parametrize(
    ("method", "ours", "theirs"),
    [
        (exchange.CLEAR_TEXT, PLAIN, VERIFIER),
        (exchange.MD5, PLAIN, HASH),
        (exchange.MD5, HASH, PLAIN),
        (exchange.SCRAM_SHA_256, PLAIN, VERIFIER),
        (exchange.SCRAM_SHA_256, PLAIN, PLAIN),
    ],
)
def test_password_methods_lead_to_the_result(method: str, ours: Secret, theirs: Secret) -> None:
    login = started(ours)
    converse(login, exchange.begin(method, "app", theirs, b"key"))
    login.receive(WELCOME)
    assert login.result is not None


def test_keys_of_a_client_log_in_without_its_password() -> None:
    keys = derive_keys(b"pencil", b"0123456789abcdef", 4096)
    login = started(None, keys=keys)
    converse(login, exchange.begin(exchange.SCRAM_SHA_256, "app", VERIFIER, b"key"))
    assert login.state is LoginState.AUTHENTICATED


def test_error_of_the_server_is_raised_with_its_fields_at_any_time() -> None:
    error = messages.message(b"E", b"SFATAL\0C57P03\0Mthe database system is starting up\0\0")
    for before in (b"", OK, OK + messages.parameter_status("a", "b")):
        with pytest.raises(PostgresError) as caught:
            started().receive(before + error)
        assert caught.value.server_sqlstate == "57P03"


def test_notices_are_kept_for_the_log_but_not_without_end() -> None:
    login = started(None)
    notice = messages.notice_response("collation version mismatch", severity="WARNING")
    login.receive(OK + notice * (MAX_NOTICES + 5) + WELCOME)
    assert login.result is not None
    assert len(login.result.notices) == MAX_NOTICES
    assert login.result.notices[0]["M"] == "collation version mismatch"


def test_server_without_a_cancel_key_is_accepted() -> None:
    login = started(None)
    login.receive(OK + messages.ready_for_query())
    assert login.result == LoginResult({}, 0, b"", b"", ())


def test_negotiation_down_to_3_0_is_accepted() -> None:
    login = started(None)
    login.receive(messages.negotiate_protocol_version(codes.PROTOCOL_3_0, []) + OK + WELCOME)
    assert login.result is not None


@pytest.mark.parametrize(
    ("secret", "challenge"),
    [
        (None, messages.authentication_cleartext_password()),
        (HASH, messages.authentication_cleartext_password()),
        (VERIFIER, messages.authentication_cleartext_password()),
        (None, messages.authentication_md5_password(b"salt")),
        (VERIFIER, messages.authentication_md5_password(b"salt")),
        (None, messages.authentication_sasl([b"SCRAM-SHA-256"])),
        (HASH, messages.authentication_sasl([b"SCRAM-SHA-256"])),
        (VERIFIER, messages.authentication_sasl([b"SCRAM-SHA-256"])),
        (PLAIN, messages.authentication_sasl([b"OAUTHBEARER"])),
        (PLAIN, messages.authentication(codes.AUTHENTICATION_GSS)),
        (PLAIN, messages.authentication(codes.AUTHENTICATION_SSPI)),
        (PLAIN, messages.authentication(codes.AUTHENTICATION_KERBEROS_V5)),
    ],
)
def test_what_the_secret_cannot_give_is_said_in_the_log(secret: Secret | None, challenge: bytes) -> None:
    with pytest.raises(ServerAuthentication) as caught:
        started(secret).receive(challenge)
    assert caught.value.cause.startswith("server ")
    assert "pencil" not in caught.value.cause


def test_scram_with_channel_binding_on_offer_is_done_without_it() -> None:
    answer = started().receive(messages.authentication_sasl([b"SCRAM-SHA-256-PLUS", b"SCRAM-SHA-256"]))
    assert answer[5:].startswith(b"SCRAM-SHA-256\0")
    assert b"n,,n=,r=" in answer


def test_server_that_cannot_prove_itself_is_refused() -> None:
    login = started()
    server = exchange.begin(exchange.SCRAM_SHA_256, "app", VERIFIER, b"key")
    said = server.challenge()
    for _ in range(2):
        assert isinstance(said, bytes)
        taken = messages.split_password_message(login.receive(said))
        assert taken is not None
        said = server.answer(taken[0])
    with pytest.raises(ServerAuthentication):
        login.receive(messages.authentication_sasl_final(b"v=" + b"A" * 43 + b"=") + OK)


def test_authentication_ok_in_the_middle_of_scram_is_refused() -> None:
    login = started()
    login.receive(messages.authentication_sasl([b"SCRAM-SHA-256"]))
    with pytest.raises(ServerProtocol):
        login.receive(OK)


@pytest.mark.parametrize(
    "data",
    [
        WELCOME,
        OK + OK,
        OK + messages.message(b"T"),
        OK + messages.ready_for_query(b"T"),
        OK + messages.message(b"K", b"abc"),
        messages.message(b"R", b"\0\0\0"),
        messages.message(b"R", bytes(2001)),
        messages.authentication(99),
        messages.authentication_md5_password(b"abc"),
        messages.authentication_sasl_continue(b"r=x"),
        messages.authentication_sasl([])[:-1],
        messages.negotiate_protocol_version(codes.PROTOCOL_3_2, []),
        messages.negotiate_protocol_version(codes.PROTOCOL_3_0, ["_pq_.x"]),
        OK + messages.negotiate_protocol_version(codes.PROTOCOL_3_0, []),
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x15\x03\x01\x00\x02\x02\x46",
    ],
)
def test_what_should_not_come_is_a_fault_of_the_server(data: bytes) -> None:
    login = started()
    with pytest.raises(ServerProtocol):
        login.receive(data + bytes(8))


def test_login_is_used_in_order() -> None:
    login = ServerLogin("app", "orders")
    with pytest.raises(ValueError, match="NEW"):
        login.receive(OK)
    login.start()
    login.receive(OK + WELCOME)
    with pytest.raises(ValueError, match="READY"):
        login.receive(OK)


@pytest.mark.parametrize(
    ("binding", "mechanism"), [(b"certificate", b"SCRAM-SHA-256-PLUS"), (None, b"SCRAM-SHA-256")]
)
def test_scram_is_bound_to_the_channel_where_there_is_one(binding: bytes | None, mechanism: bytes) -> None:
    login = started(binding=binding)
    offer = messages.authentication_sasl([b"SCRAM-SHA-256-PLUS", b"SCRAM-SHA-256"])
    assert login.receive(offer)[5:].startswith(mechanism + b"\0")


def test_a_bound_login_succeeds_on_the_same_channel_alone() -> None:
    server = exchange.begin(exchange.SCRAM_SHA_256, "app", VERIFIER, b"key", binding=b"certificate")
    converse(started(binding=b"certificate"), server)
    server = exchange.begin(exchange.SCRAM_SHA_256, "app", VERIFIER, b"key", binding=b"another one")
    with pytest.raises(InvalidAuthorization):
        converse(started(binding=b"certificate"), server)
