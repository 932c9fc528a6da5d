"""How a client proves who it is, method by method."""

from contextlib import nullcontext

import pytest

from gpooler.auth import exchange, md5
from gpooler.auth.exchange import Done, Exchange, Later, begin
from gpooler.auth.scram import DEFAULT_ITERATIONS, ScramClient, Verifier, derive_keys, derived_salt
from gpooler.auth.secrets import Secret
from gpooler.errors import AuthenticationFailed, ConfigurationError, ProtocolViolation
from gpooler.wire import codes, messages

MOCK_KEY = b"k" * 32
PLAIN = Secret("pencil")
HASH = Secret(md5.hash_password(b"pencil", b"app").decode())
VERIFIER = Secret(Verifier.build(b"pencil", b"0123456789abcdef").format())
OK = messages.authentication_ok()


def authentication(data: bytes | Done) -> tuple[int, bytes]:
    assert isinstance(data, bytes)
    [(kind, body)], rest = messages.split_messages(data)
    assert (kind, rest) == (codes.AUTHENTICATION, b"")
    return messages.parse_authentication(body)


def body_of(message: bytes) -> bytes:
    taken = messages.split_password_message(message)
    assert taken is not None
    return taken[0]


def answer_md5(side: Exchange, password: bytes, user: bytes = b"app") -> bytes | Done:
    code, salt = authentication(side.challenge())
    assert (code, len(salt)) == (codes.AUTHENTICATION_MD5_PASSWORD, 4)
    response = md5.response(md5.hash_password(password, user), salt)
    return side.answer(body_of(messages.password_message(response)))


def answer_clear(side: Exchange, password: bytes) -> bytes | Done | Later:
    assert authentication(side.challenge())[0] == codes.AUTHENTICATION_CLEARTEXT_PASSWORD
    return side.answer(body_of(messages.password_message(password)))


def answer_scram(side: Exchange, password: bytes) -> tuple[bytes | Done, ScramClient]:
    code, names = authentication(side.challenge())
    assert code == codes.AUTHENTICATION_SASL
    assert messages.parse_sasl_mechanisms(names) == [b"SCRAM-SHA-256"]
    client = ScramClient()
    initial = messages.sasl_initial_response(b"SCRAM-SHA-256", client.first())
    code, data = authentication(side.answer(body_of(initial)))
    assert code == codes.AUTHENTICATION_SASL_CONTINUE
    challenge = client.challenge(data)
    final = client.final(challenge, derive_keys(password, challenge.salt, challenge.iterations))
    return side.answer(body_of(messages.sasl_response(final))), client


def test_none_believes_everybody_and_takes_no_password() -> None:
    side = begin(exchange.NONE, "app", None, MOCK_KEY)
    assert side.challenge() == Done(OK)
    with pytest.raises(ProtocolViolation):
        side.answer(b"pencil\0")


@pytest.mark.parametrize("secret", [PLAIN, HASH, VERIFIER], ids=repr)
def test_clear_text_is_checked_against_every_kind_of_secret(secret: Secret) -> None:
    done = answer_clear(begin(exchange.CLEAR_TEXT, "app", secret, MOCK_KEY), b"pencil")
    assert done == Done(OK, password=b"pencil")
    assert "pencil" not in repr(done)
    with pytest.raises(AuthenticationFailed):
        answer_clear(begin(exchange.CLEAR_TEXT, "app", secret, MOCK_KEY), b"wrong")


@pytest.mark.parametrize("secret", [PLAIN, HASH], ids=repr)
def test_md5_is_checked_against_a_plain_and_an_md5_secret(secret: Secret) -> None:
    assert answer_md5(begin(exchange.MD5, "app", secret, MOCK_KEY), b"pencil") == Done(OK)
    with pytest.raises(AuthenticationFailed):
        answer_md5(begin(exchange.MD5, "app", secret, MOCK_KEY), b"wrong")


def test_md5_with_a_scram_verifier_does_scram() -> None:
    done, _ = answer_scram(begin(exchange.MD5, "app", VERIFIER, MOCK_KEY), b"pencil")
    assert isinstance(done, Done)


@pytest.mark.parametrize("secret", [PLAIN, VERIFIER], ids=repr)
def test_scram_proves_both_sides_and_yields_the_keys(secret: Secret) -> None:
    done, client = answer_scram(begin(exchange.SCRAM_SHA_256, "app", secret, MOCK_KEY), b"pencil")
    assert isinstance(done, Done)
    [(_, final), (_, ok)], rest = messages.split_messages(done.messages)
    code, data = messages.parse_authentication(final)
    assert code == codes.AUTHENTICATION_SASL_FINAL
    client.verify(data)
    assert messages.parse_authentication(ok) == (codes.AUTHENTICATION_OK, b"")
    assert rest == b""
    verifier = secret.verifier(derived_salt(MOCK_KEY, b"app"))
    assert verifier is not None
    assert done.keys == derive_keys(b"pencil", verifier.salt, verifier.iterations)
    with pytest.raises(AuthenticationFailed):
        answer_scram(begin(exchange.SCRAM_SHA_256, "app", secret, MOCK_KEY), b"wrong")


def test_scram_with_an_md5_secret_fails_like_a_wrong_password_and_the_log_says_why() -> None:
    with pytest.raises(AuthenticationFailed) as caught:
        answer_scram(begin(exchange.SCRAM_SHA_256, "app", HASH, MOCK_KEY), b"pencil")
    assert "MD5" in caught.value.cause


def test_an_unknown_user_looks_like_a_wrong_password() -> None:
    for method, answer in (
        (exchange.CLEAR_TEXT, answer_clear),
        (exchange.MD5, answer_md5),
        (exchange.SCRAM_SHA_256, answer_scram),
    ):
        fields = []
        for secret in (PLAIN, None):
            with pytest.raises(AuthenticationFailed) as caught:
                answer(begin(method, "app", secret, MOCK_KEY, unknown_cause="no such user"), b"wrong")
            fields.append(caught.value.fields())
            assert caught.value.cause == ("no such user" if secret is None else "wrong password")
        assert fields[0] == fields[1]


def test_the_scram_challenge_of_an_unknown_user_is_the_one_a_plain_secret_would_give() -> None:
    challenges = []
    for secret in (PLAIN, None, None):
        side = begin(exchange.SCRAM_SHA_256, "app", secret, MOCK_KEY)
        initial = messages.sasl_initial_response(b"SCRAM-SHA-256", b"n,,n=,r=abc")
        challenge = ScramClient(nonce=b"abc").challenge(authentication(side.answer(body_of(initial)))[1])
        challenges.append((challenge.salt, challenge.iterations))
    assert len(set(challenges)) == 1
    assert challenges[0][1] == DEFAULT_ITERATIONS


def test_the_salt_name_makes_users_of_one_rule_share_a_derivation() -> None:
    secret = Secret("pencil")
    for user in ("a", "b", "c"):
        side = begin(exchange.SCRAM_SHA_256, user, secret, MOCK_KEY, salt_name="default")
        assert isinstance(answer_scram(side, b"pencil")[0], Done)
    assert len(secret._verifiers) == 1


def test_a_client_may_wait_for_an_empty_sasl_challenge() -> None:
    side = begin(exchange.SCRAM_SHA_256, "app", PLAIN, MOCK_KEY)
    side.challenge()
    assert authentication(side.answer(b"SCRAM-SHA-256\0\xff\xff\xff\xff")) == (11, b"")
    assert authentication(side.answer(b"n,,n=,r=abc"))[1].startswith(b"r=abc")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"SCRAM-SHA-256",
        b"SCRAM-SHA-256\0",
        b"SCRAM-SHA-256\0\0\0\0\x05abc",
        b"SCRAM-SHA-256\0\0\0\0\x02abc",
        b"SCRAM-SHA-256\0\xff\xff\xff\xffabc",
        b"SCRAM-SHA-256\0\x80\0\0\0",
        b"SCRAM-SHA-256-PLUS\0\0\0\0\x0bn,,n=,r=abc",
        b"x" * 1025,
    ],
)
def test_malformed_sasl_initial_response_breaks_the_protocol(body: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        begin(exchange.SCRAM_SHA_256, "app", PLAIN, MOCK_KEY).answer(body)


@pytest.mark.parametrize("method", [exchange.CLEAR_TEXT, exchange.MD5])
@pytest.mark.parametrize("body", [b"", b"pencil", b"pen\0cil\0", b"pencil\0\0"])
def test_malformed_password_message_breaks_the_protocol(method: str, body: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        begin(method, "app", PLAIN, MOCK_KEY).answer(body)


@pytest.mark.parametrize("method", [exchange.CLEAR_TEXT, exchange.MD5])
def test_empty_password_never_matches(method: str) -> None:
    with pytest.raises(AuthenticationFailed) as caught:
        begin(method, "app", Secret(""), MOCK_KEY).answer(b"\0")
    assert caught.value.cause == "empty password"


@pytest.mark.parametrize("method", ["block", "cert", "external", "", "MD5"])
def test_other_methods_are_refused(method: str) -> None:
    with pytest.raises(ConfigurationError):
        begin(method, "app", PLAIN, MOCK_KEY)


SALT = b"0123456789abcdef"
OTHER = Verifier.build(b"brush", SALT)  # the salt of VERIFIER
SEVERAL = {
    "plain": Secret("pencil", ["brush"]),
    "hashes": Secret(md5.hash_password(b"pencil", b"app").decode(), ["brush"]),
    "verifiers": Secret(VERIFIER.verifiers(b"")[0].format(), [OTHER.format()]),
    "plain and verifier": Secret("pencil", [OTHER.format()]),
    "verifier and plain": Secret(Verifier.build(b"pencil", SALT, 5000).format(), ["brush"]),
}


@pytest.mark.parametrize("kind", SEVERAL)
@pytest.mark.parametrize("method", ["clear_text", "md5", "scram-sha-256"])
def test_each_of_several_passwords_lets_in_and_no_other(method: str, kind: str) -> None:
    secret = SEVERAL[kind]
    if (method, kind) == ("scram-sha-256", "hashes"):
        return  # refused when the configuration is read
    for password in (b"pencil", b"brush", b"other"):
        side = begin(method, "app", secret, MOCK_KEY)
        try:
            if method == "clear_text":
                done = answer_clear(side, password)
            elif method == "md5" and not secret.wants_scram:
                done = answer_md5(side, password)
            else:
                done, _ = answer_scram(side, password)
        except AuthenticationFailed:
            assert password == b"other"
        else:
            assert isinstance(done, Done)
            assert password != b"other"


def test_a_verifier_of_another_salt_cannot_be_tried_beside_the_first() -> None:
    secret = Secret(OTHER.format(), [Verifier.build(b"pencil", b"another salt").format()])
    assert isinstance(answer_scram(begin("scram-sha-256", "app", secret, MOCK_KEY), b"brush")[0], Done)
    with pytest.raises(AuthenticationFailed):
        answer_scram(begin("scram-sha-256", "app", secret, MOCK_KEY), b"pencil")


def test_the_keys_of_a_login_are_those_of_the_password_it_came_with() -> None:
    done, _ = answer_scram(begin("scram-sha-256", "app", SEVERAL["verifiers"], MOCK_KEY), b"brush")
    assert isinstance(done, Done)
    assert done.keys == derive_keys(b"brush", SALT, DEFAULT_ITERATIONS)


def test_somebody_else_decides_about_a_clear_text_password_in_place_of_the_secret() -> None:
    asked: list[bytes] = []

    def check(password: bytes) -> Done:
        asked.append(password)
        return Done(OK, password=password)

    side = begin(exchange.CLEAR_TEXT, "app", PLAIN, MOCK_KEY, check=check)
    later = answer_clear(side, b"not the secret")
    assert isinstance(later, Later)
    assert asked == []
    assert later.work() == Done(OK, password=b"not the secret")
    with pytest.raises(AuthenticationFailed):
        begin(exchange.CLEAR_TEXT, "app", None, MOCK_KEY, check=check).answer(b"\0")
    assert asked == [b"not the secret"]


def test_a_user_without_a_secret_costs_what_another_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bytes] = []
    monkeypatch.setattr(Verifier, "is_password", lambda self, password: not tried.append(password))
    for secret in (VERIFIER, None):
        side = begin(exchange.CLEAR_TEXT, "app", secret, MOCK_KEY, another=VERIFIER)
        with nullcontext() if secret else pytest.raises(AuthenticationFailed):
            answer_clear(side, b"pencil")
    assert tried == [b"pencil", b"pencil"]
