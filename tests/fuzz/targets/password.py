"""Password messages: framed however they come, and believed when they are right and only then.

The first byte of an input chooses what the password is compared with. Then it is put together, perhaps
damaged, and cut.
"""

from gpooler.auth import exchange, md5
from gpooler.auth.exchange import Done
from gpooler.auth.saslprep import saslprep
from gpooler.auth.scram import Verifier
from gpooler.auth.secrets import Secret
from gpooler.errors import AuthenticationFailed, ClientFault, ProtocolViolation
from gpooler.wire import messages
from tests.fuzz.given import Given

USER = "app"
PASSWORDS = (b"pencil", "cr\u00e8me".encode())
SALT = b"salt"
KEY = bytes(32)
MOST = 65535
VERIFIER = Verifier.build(PASSWORDS[0], b"0123456789abcdef", 1).format()
HASH = md5.hash_password(PASSWORDS[0], USER.encode()).decode()
OTHER = PASSWORDS[1].decode()
# a secret, and which of the passwords are good for it
SECRETS = (
    (Secret("pencil"), PASSWORDS[:1]),
    (Secret(HASH), PASSWORDS[:1]),
    (Secret(VERIFIER), PASSWORDS[:1]),
    (Secret(OTHER, ["pencil"]), PASSWORDS),
    (Secret(VERIFIER, [HASH, OTHER]), PASSWORDS),
    (None, ()),
)


def run(data: bytes) -> None:
    given = Given(data)
    is_md5 = given.byte() % 2 == 1
    secret, good = given.choice(SECRETS)
    if is_md5 and secret is not None and secret.wants_scram:
        return  # that is SCRAM's
    body = framed(given, text(given))
    if body is None:
        return
    side = exchange.begin(exchange.MD5 if is_md5 else exchange.CLEAR_TEXT, USER, secret, KEY, md5_salt=SALT)
    side.challenge()
    if is_md5:
        is_good = body in [response(password) + b"\0" for password in good]
    else:
        is_good = is_password(body, secret, good)
    try:
        said = side.answer(body)
    except ClientFault as error:
        assert not is_good, f"{body!r} is refused"
        check_refusal(error, body)
    else:
        assert isinstance(said, Done)
        assert is_good, f"{body!r} is believed"
        assert said.messages == b"R\0\0\0\x08\0\0\0\0"
        assert said.password == (None if is_md5 else body[:-1])


def text(given: Given) -> bytes:
    """What is to be a password."""
    made = b""
    for _ in range(given.byte() % 4):
        kind = given.byte()
        if kind < 128:
            made += (*PASSWORDS, *map(response, PASSWORDS), b"\0")[kind % 5]
        else:
            made += given.some(kind - 128)
    return given.damaged(made)


def response(password: bytes) -> bytes:
    return md5.response(md5.hash_password(password, USER.encode()), SALT)


def is_password(body: bytes, secret: Secret | None, good: tuple[bytes, ...]) -> bool:
    password = body[:-1]
    if not password or body.find(0) != len(password):
        return False
    if password in good:
        return True
    # SCRAM has many spellings of a password
    return secret is not None and secret.wants_scram and saslprep(password) == PASSWORDS[0]


def framed(given: Given, body: bytes) -> bytes | None:
    """``body`` out of a stream in which it is a message, however that is cut; None where there is none."""
    whole = given.damaged(messages.password_message(body)[:-1]) + given.damaged(b"\0Q\0\0\0\4")
    try:
        found = messages.split_password_message(whole)
    except ProtocolViolation:
        found = None
        length = int.from_bytes(whole[1:5], "big")
        assert whole[:1] != b"p" or not 4 <= length <= MOST
        raised = True
    else:
        raised = False
    held = b""
    at = 0
    while at < len(whole):
        piece = whole[at : at + 1 + given.byte()]
        at += len(piece)
        held += piece
        try:
            part = messages.split_password_message(held)
        except ProtocolViolation:
            assert raised
            return None
        if part is not None:
            assert found is not None
            assert part[0] == found[0]
            assert part[1] + whole[at:] == found[1]
            return part[0]
    assert found is None
    assert not raised
    return None


def check_refusal(error: ClientFault, body: bytes) -> None:
    """One text whatever the cause, but for bytes that are no password message."""
    if isinstance(error, ProtocolViolation):
        assert body.find(0) != len(body) - 1 or not body
        assert error.fields()["M"] == "invalid password packet size"
    else:
        assert isinstance(error, AuthenticationFailed)
        assert error.fields() == AuthenticationFailed(USER, cause="").fields()
