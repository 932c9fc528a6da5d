"""SCRAM-SHA-256 against the vectors of RFC 5802 and RFC 7677, and against scramp as an independent peer."""

import base64

import pytest
import scramp

from gpooler.auth import scram
from gpooler.auth.saslprep import saslprep
from gpooler.auth.scram import ScramClient, Verifier, derive_keys
from gpooler.auth.scram_server import ScramServer, prepare
from gpooler.errors import (
    FeatureNotSupported,
    GpoolerError,
    InvalidAuthorization,
    ProtocolViolation,
    ServerAuthentication,
)

# RFC 7677, section 3.
PASSWORD = b"pencil"
CLIENT_NONCE = b"rOprNGfwEbeRWgbNEkqO"
SERVER_NONCE = b"%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
SALT = base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")
CLIENT_FIRST = b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO"
SERVER_FIRST = b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
WITHOUT_PROOF = b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
CLIENT_FINAL = WITHOUT_PROOF + b",p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
SERVER_FINAL = b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="

VERIFIER = Verifier.build(PASSWORD, SALT)


def server(**options: bool) -> ScramServer:
    return ScramServer(prepare([VERIFIER]), nonce=SERVER_NONCE, **options)


def test_server_follows_the_rfc_exchange() -> None:
    side = server()
    assert side.first(CLIENT_FIRST) == SERVER_FIRST
    assert side.final(CLIENT_FINAL) == SERVER_FINAL


def test_client_follows_the_rfc_exchange() -> None:
    side = ScramClient("user", nonce=CLIENT_NONCE)
    assert side.first() == CLIENT_FIRST
    challenge = side.challenge(SERVER_FIRST)
    assert (challenge.salt, challenge.iterations) == (SALT, 4096)
    assert side.final(challenge, derive_keys(PASSWORD, SALT, 4096)) == CLIENT_FINAL
    side.verify(SERVER_FINAL)


def test_messages_up_to_the_proof_are_those_of_rfc_5802() -> None:
    """Section 5; its proofs are those of SHA-1, which nobody speaks to PostgreSQL."""
    client_nonce, server_nonce = b"fyko+d2lbbFgONRv9qkxdawL", b"3rfcNHYJY1ZVvWVs7j"
    client = ScramClient("user", nonce=client_nonce)
    assert client.first() == b"n,,n=user,r=fyko+d2lbbFgONRv9qkxdawL"
    salt = base64.b64decode("QSXCR+Q6sek8bf92")
    first = ScramServer(prepare([Verifier.build(PASSWORD, salt)]), nonce=server_nonce).first(client.first())
    assert first == b"r=fyko+d2lbbFgONRv9qkxdawL3rfcNHYJY1ZVvWVs7j,s=QSXCR+Q6sek8bf92,i=4096"
    final = client.final(client.challenge(first), derive_keys(PASSWORD, salt, 4096))
    assert final.startswith(b"c=biws,r=fyko+d2lbbFgONRv9qkxdawL3rfcNHYJY1ZVvWVs7j,p=")


def test_client_sends_an_empty_user_name_to_postgresql() -> None:
    assert ScramClient(nonce=b"abc").first() == b"n,,n=,r=abc"


def test_commas_and_equal_signs_of_a_user_name_are_escaped() -> None:
    assert ScramClient("a=b,c", nonce=b"abc").first() == b"n,,n=a=3Db=2Cc,r=abc"


def test_server_takes_the_empty_user_name_of_libpq() -> None:
    client, side = ScramClient(), server()
    challenge = client.challenge(side.first(client.first()))
    answer = side.final(client.final(challenge, derive_keys(PASSWORD, SALT, 4096)))
    assert answer is not None
    client.verify(answer)


def test_the_client_key_learned_by_the_server_logs_in_with_the_same_verifier() -> None:
    side = server()
    side.first(CLIENT_FIRST)
    side.final(CLIENT_FINAL)
    assert side.keys == derive_keys(PASSWORD, SALT, 4096)


@pytest.mark.parametrize("password", ["pencil", "pass,word=", "Österreich", "ﬁsh\u00ady", "пароль"])
def test_our_client_logs_in_to_scramp(password: str) -> None:
    auth = scramp.ScramMechanism("SCRAM-SHA-256").make_auth_info(password, iteration_count=4096)
    peer = scramp.ScramMechanism("SCRAM-SHA-256").make_server(lambda user: auth)
    client = ScramClient("app")
    peer.set_client_first(client.first().decode())
    challenge = client.challenge(peer.get_server_first().encode())
    keys = derive_keys(password.encode(), challenge.salt, challenge.iterations)
    peer.set_client_final(client.final(challenge, keys).decode())
    client.verify(peer.get_server_final().encode())


@pytest.mark.parametrize("password", ["pencil", "pass,word=", "Österreich", "ﬁsh\u00ady", "пароль"])
def test_scramp_logs_in_to_our_server(password: str) -> None:
    side = ScramServer(prepare([Verifier.build(password.encode(), b"0123456789abcdef")]))
    peer = scramp.ScramClient(["SCRAM-SHA-256"], "app", password)
    peer.set_server_first(side.first(peer.get_client_first().encode()).decode())
    answer = side.final(peer.get_client_final().encode())
    assert answer is not None
    peer.set_server_final(answer.decode())


def test_scramp_with_a_wrong_password_is_refused() -> None:
    side = server()
    peer = scramp.ScramClient(["SCRAM-SHA-256"], "app", "wrong")
    peer.set_server_first(side.first(peer.get_client_first().encode()).decode())
    assert side.final(peer.get_client_final().encode()) is None
    assert side.keys is None


def test_a_doomed_exchange_refuses_even_the_right_proof() -> None:
    side = server(is_doomed=True)
    assert side.first(CLIENT_FIRST) == SERVER_FIRST
    assert side.final(CLIENT_FINAL) is None


def test_channel_binding_flag_y_is_accepted_and_bound_to_the_final_message() -> None:
    side = server()
    side.first(b"y,,n=,r=abc")
    with pytest.raises(ProtocolViolation, match="channel-binding attribute"):
        side.final(b"c=biws,r=abc" + SERVER_NONCE + b",p=" + base64.b64encode(bytes(32)))
    side = server()
    side.first(b"y,,n=,r=abc")
    assert side.final(b"c=eSws,r=abc" + SERVER_NONCE + b",p=" + base64.b64encode(bytes(32))) is None


@pytest.mark.parametrize(
    ("message", "error", "text"),
    [
        (b"", ProtocolViolation, "malformed SCRAM message"),
        (b"n", ProtocolViolation, "malformed SCRAM message"),
        (b"n,", ProtocolViolation, "malformed SCRAM message"),
        (b"n,,", ProtocolViolation, "malformed SCRAM message"),
        (b"x,,n=,r=abc", ProtocolViolation, "malformed SCRAM message"),
        (b"nn,,n=,r=abc", ProtocolViolation, "malformed SCRAM message"),
        (b"p=tls-server-end-point,,n=,r=abc", ProtocolViolation, "malformed SCRAM message"),
        (b"n,a=admin,n=,r=abc", FeatureNotSupported, "authorization identity"),
        (b"n,,m=ext,n=,r=abc", FeatureNotSupported, "SCRAM extension"),
        (b"n,,r=abc,n=", ProtocolViolation, "malformed SCRAM message"),
        (b"n,,n=user", ProtocolViolation, "malformed SCRAM message"),
        (b"n,,n=,r=", ProtocolViolation, "nonce"),
        (b"n,,n=,r=a\x7fb", ProtocolViolation, "nonce"),
        (b"n,,n=,r=abc\0", ProtocolViolation, "malformed SCRAM message"),
        (b"n,,n=,r=abc,1=x", ProtocolViolation, "malformed SCRAM message"),
    ],
)
def test_malformed_client_first_message_is_refused(
    message: bytes, error: type[GpoolerError], text: str
) -> None:
    with pytest.raises(error, match=text):
        server().first(message)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        WITHOUT_PROOF,
        WITHOUT_PROOF + b",p=",
        WITHOUT_PROOF + b",p=!!!!",
        WITHOUT_PROOF + b",p=AAAA",
        CLIENT_FINAL + b",x=1",
        CLIENT_FINAL.replace(b"biws", b"eSws"),
        CLIENT_FINAL.replace(b"hNlF", b"hNlG"),
        CLIENT_FINAL.replace(b"c=", b"d="),
    ],
)
def test_malformed_client_final_message_is_refused(message: bytes) -> None:
    side = server()
    side.first(CLIENT_FIRST)
    with pytest.raises(ProtocolViolation):
        side.final(message)


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        (b"", "malformed server-first-message"),
        (b"m=x,r=abcd,s=AAAA,i=4096", "extension"),
        (b"r=abc,s=AAAA,i=4096", "nonce"),
        (b"r=xbcd,s=AAAA,i=4096", "nonce"),
        (b"r=abcd,s=A,i=4096", "salt"),
        (b"r=abcd,s=,i=4096", "salt"),
        (b"r=abcd,s=AAAA,i=0", "iterations"),
        (b"r=abcd,s=AAAA,i=-1", "iteration count"),
        (b"r=abcd,s=AAAA,i=2147483647", "iteration count"),
        (b"r=abcd,s=AAAA,i=1000001", "iterations"),
        (b"r=abcd,i=4096,s=AAAA", "malformed server-first-message"),
    ],
)
def test_client_refuses_a_bad_challenge(message: bytes, cause: str) -> None:
    client = ScramClient(nonce=b"abc")
    with pytest.raises(ServerAuthentication) as caught:
        client.challenge(message)
    assert cause in caught.value.cause


@pytest.mark.parametrize(
    "message", [b"", b"e=invalid-proof", b"v=", b"v=!!", b"v=AAAA", b"x=" + SERVER_FINAL]
)
def test_client_refuses_a_server_that_cannot_prove_itself(message: bytes) -> None:
    client = ScramClient("user", nonce=CLIENT_NONCE)
    client.final(client.challenge(SERVER_FIRST), derive_keys(PASSWORD, SALT, 4096))
    with pytest.raises(ServerAuthentication):
        client.verify(message)


def test_client_that_has_proved_nothing_verifies_nothing() -> None:
    with pytest.raises(ServerAuthentication):
        ScramClient().verify(b"v=")


def test_verifier_is_read_and_written_as_postgresql_stores_it() -> None:
    text = VERIFIER.format()
    assert text.startswith("SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$")
    assert Verifier.parse(text) == VERIFIER


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pencil",
        "SCRAM-SHA-256$",
        "SCRAM-SHA-256$4096:AAAA$AAAA:AAAA",
        VERIFIER.format().replace("4096", "0"),
        VERIFIER.format().replace("4096", "-1"),
        VERIFIER.format().replace("4096", "4_096"),
        VERIFIER.format().replace("4096", "٤٠٩٦"),
        VERIFIER.format().replace("4096", "99999999999"),
        VERIFIER.format() + ":AAAA",
        VERIFIER.format().replace("SCRAM-SHA-256", "SCRAM-SHA-1"),
        VERIFIER.format()[:-1],
    ],
)
def test_text_that_is_no_verifier_is_none(text: str) -> None:
    assert Verifier.parse(text) is None


def test_verifier_checks_a_clear_text_password() -> None:
    assert VERIFIER.is_password(PASSWORD)
    assert not VERIFIER.is_password(b"pen")


def test_keys_do_not_show_in_a_repr() -> None:
    assert repr(VERIFIER.server_key) not in repr(VERIFIER)
    assert repr(derive_keys(PASSWORD, SALT, 1)) == "ScramKeys()"


def test_derived_salt_is_stable_for_a_name_and_differs_between_names_and_keys() -> None:
    salt = scram.derived_salt(b"key", b"app")
    assert salt == scram.derived_salt(b"key", b"app")
    assert len({salt, scram.derived_salt(b"key", b"bpp"), scram.derived_salt(b"kez", b"app")}) == 3
    assert len(salt) == scram.SALT_LENGTH


@pytest.mark.parametrize(
    ("password", "prepared"),
    [
        (b"plain", b"plain"),
        (b"tab\tand\x07", b"tab\tand\x07"),  # ASCII is never looked at
        ("I\u00adX".encode(), b"IX"),  # RFC 4013, section 3
        ("\u00aa".encode(), b"a"),
        ("\u2168".encode(), b"IX"),
        ("a\u00a0b\u3000c".encode(), b"a b c"),
        ("\u0627\u0031".encode(), "\u0627\u0031".encode()),  # bad bidi: raw
        ("\u0627\u0628".encode(), "\u0627\u0628".encode()),
        ("x\u0007é".encode(), "x\u0007é".encode()),  # prohibited: raw
        ("\u0221x".encode(), "\u0221x".encode()),  # not assigned in Unicode 3.2: raw
        ("\u00ad".encode(), "\u00ad".encode()),  # nothing would be left: raw
        (b"caf\xe9", b"caf\xe9"),  # not UTF-8: raw
    ],
)
def test_saslprep_gives_the_bytes_postgresql_hashes(password: bytes, prepared: bytes) -> None:
    assert saslprep(password) == prepared


# --- channel binding ---------------------------------------------------------------------------------

PLUS = (scram.MECHANISM, scram.MECHANISM_PLUS)


def test_who_was_not_shown_the_offer_is_refused() -> None:
    """RFC 5802, section 6: it could bind and believes that we cannot, so somebody is between us."""
    with pytest.raises(InvalidAuthorization, match="negotiation"):
        ScramServer(prepare([VERIFIER]), offers_plus=True).first(b"y,,n=,r=abc")
    assert ScramServer(prepare([VERIFIER]), offers_plus=True).first(b"n,,n=,r=abc")


def bound_exchange(ours: bytes, theirs: bytes) -> bytes | None:
    """A client bound to one channel, a server to another; the server's last word."""
    client = ScramClient(binding=ours, offers=PLUS)
    side = ScramServer(prepare([VERIFIER]), binding=theirs, offers_plus=True)
    assert client.mechanism == scram.MECHANISM_PLUS
    challenge = client.challenge(side.first(client.first()))
    answer = side.final(client.final(challenge, derive_keys(PASSWORD, SALT, 4096)))
    if answer is not None:
        client.verify(answer)
    return answer


def test_both_ends_of_one_channel_agree() -> None:
    assert bound_exchange(b"certificate", b"certificate") is not None


def test_somebody_between_two_channels_is_found_out() -> None:
    with pytest.raises(InvalidAuthorization, match="channel binding check failed"):
        bound_exchange(b"certificate", b"another one")


@pytest.mark.parametrize(
    ("binding", "offers", "first"),
    [
        (None, PLUS, b"n,,"),
        (b"", PLUS, b"n,,"),
        (b"certificate", (scram.MECHANISM,), b"y,,"),
        (b"certificate", PLUS, b"p=tls-server-end-point,,"),
    ],
)
def test_the_client_says_what_it_could_do(
    binding: bytes | None, offers: tuple[bytes, ...], first: bytes
) -> None:
    assert ScramClient(binding=binding, offers=offers).first().startswith(first)


def test_scramp_speaks_the_same_channel_binding() -> None:
    client = scramp.ScramClient(
        ["SCRAM-SHA-256-PLUS"],
        "user",
        PASSWORD.decode(),
        channel_binding=("tls-server-end-point", b"certificate"),
    )
    side = ScramServer(prepare([VERIFIER]), binding=b"certificate", offers_plus=True)
    client.set_server_first(side.first(client.get_client_first().encode()).decode())
    answer = side.final(client.get_client_final().encode())
    assert answer is not None
    client.set_server_final(answer.decode())
