"""SASL exchanges: nobody gets in without the right proof, and who is unknown is told what others are.

An input chooses a secret and a channel, then the client's messages: built as they should be, or not quite, or
damaged. The same are sent to a user who does not exist: what differs must be a success.
"""

import base64
import hashlib
import hmac
import os

from gpooler.auth import exchange, md5, randomness
from gpooler.auth.exchange import Done, Exchange
from gpooler.auth.scram import Verifier
from gpooler.auth.secrets import Secret
from gpooler.errors import AuthenticationFailed, ClientFault
from gpooler.wire import codes, messages
from tests.fuzz.given import Given

USER = "app"
KEY = b"k" * 32
PASSWORDS = ("pencil", "pen", "cr\u00e8me")
VERIFIERS = [Verifier.build(password.encode(), b"0123456789abcdef", 2) for password in PASSWORDS]
HASH = md5.hash_password(b"pencil", USER.encode()).decode()
# a secret, and who may come in with it
SECRETS = (
    (Secret("pencil"), PASSWORDS[:1]),
    (Secret(VERIFIERS[0].format()), PASSWORDS[:1]),
    (Secret(VERIFIERS[2].format(), ["pen", HASH]), PASSWORDS[1:]),
    (Secret("pencil", ["pen"]), PASSWORDS[:2]),
    (Secret(HASH), ()),
    (None, ()),
)
REFUSALS = ("08P01", "0A000", "28000", "28P01")
MOST_MESSAGES = 4
BINDING = b"hash of a certificate"
os.urandom = bytes  # both are to be told the same
randomness.forget()
KEYS: dict[tuple[str, bytes, int], bytes] = {}  # salted passwords


class Client:
    """One client, by hand: what it has said, what it was told."""

    def __init__(self, side: Exchange, binding: bytes | None) -> None:
        self._side = side
        self._binding = binding
        self._header = b"n,,"
        self._bare = b""
        self._first = b""  # the server's
        self._final = b""
        self.has_salt_of_its_own = False
        self.is_done = False
        self.error: ClientFault | None = None

    def challenged(self) -> bytes:
        said = self._side.challenge()
        assert isinstance(said, bytes)
        return said

    def send(self, given: Given) -> bytes:
        """The next message; what comes of it."""
        kind = given.byte() % 8
        if kind < 3:
            body = self._initial(given)
        elif kind < 6:
            body = self._last(given)
        elif kind == 6:
            body = self._opening(given)
        else:
            body = given.some(given.byte())
        return self._tell(given.damaged(body))

    def _initial(self, given: Given) -> bytes:
        mechanism = given.choice((b"SCRAM-SHA-256", b"SCRAM-SHA-256-PLUS", b"SCRAM-SHA-1", b""))
        opening = self._opening(given)
        how = given.byte()
        if how >= 252:
            return mechanism + b"\0\xff\xff\xff\xff"
        return mechanism + b"\0" + (len(opening) + (how >= 248)).to_bytes(4, "big") + opening

    def _opening(self, given: Given) -> bytes:
        header = given.choice((b"n,,", b"p=tls-server-end-point,,", b"y,,", b"p=tls-unique,,", b"n,a=x,"))
        bare = given.choice((b"n=,r=abc", b"n=app,r=abc", b"n=,r=", b"m=x,n=,r=abc", b"n=,r=abc,x=y"))
        return header + bare

    def _last(self, given: Given) -> bytes:
        flags = given.byte()
        bound = self._header + (self._binding or b"" if self._header[:1] == b"p" else b"")
        nonce = self._first[2:].split(b",")[0]
        text = b"c=" + base64.b64encode(bound if flags & 1 == 0 else bound[:-1])
        text += b",r=" + (nonce if flags & 2 == 0 else nonce[:-1] + b"x") + (b",x=y" if flags & 4 else b"")
        return text + b",p=" + base64.b64encode(self._proof(text, given.choice(PASSWORDS)))

    def _auth(self, without_proof: bytes) -> bytes:
        return b",".join((self._bare, self._first, without_proof))

    def _proof(self, without_proof: bytes, password: str) -> bytes:
        client_key, stored_key = self._keys(password)
        signature = hmac.digest(stored_key, self._auth(without_proof), "sha256")
        return bytes(a ^ b for a, b in zip(client_key, signature, strict=True))

    def _keys(self, password: str) -> tuple[bytes, bytes]:
        attributes = dict(part.split(b"=", 1) for part in self._first.split(b",") if b"=" in part)
        key = password, base64.b64decode(attributes.get(b"s", b"")), int(attributes.get(b"i", b"1"))
        if key not in KEYS:
            KEYS[key] = hashlib.pbkdf2_hmac("sha256", password.encode(), *key[1:])
        client_key = hmac.digest(KEYS[key], b"Client Key", "sha256")
        return client_key, hashlib.sha256(client_key).digest()

    def _tell(self, body: bytes) -> bytes:
        try:
            said = self._side.answer(body)
        except ClientFault as error:
            self.error = error
            assert error.sqlstate in REFUSALS
            return repr(error.fields()).encode()
        if isinstance(said, Done):
            self.is_done = True
            self._final = body
            return b"done"
        assert isinstance(said, bytes)
        assert said[:1] == codes.AUTHENTICATION
        code, data = messages.parse_authentication(said[5:])
        assert code == codes.AUTHENTICATION_SASL_CONTINUE
        if data:
            opening = body if body[:1] in (b"n", b"y", b"p") else body[body.index(b"\0") + 5 :]
            gs2, authorization, self._bare = opening.split(b",", 2)
            assert not authorization
            self._header = gs2 + b",,"
            self._first = data
            self.has_salt_of_its_own = b",i=4096" not in data
        return said

    def check(self, passwords: tuple[str, ...], offers_plus: bool) -> None:
        """It got in: its last message proves a password that is good, and what it is bound to."""
        without_proof, _, proof = self._final.rpartition(b",p=")
        bound = self._header + (self._binding or b"" if self._header[:1] == b"p" else b"")
        assert without_proof.split(b",")[0] == b"c=" + base64.b64encode(bound)
        assert without_proof.split(b",")[1] == b"r=" + self._first[2:].split(b",")[0]
        assert self._header[:1] != b"y" or not offers_plus, "somebody took the offer away"
        assert base64.b64decode(proof) in [self._proof(without_proof, one) for one in passwords]


def run(data: bytes) -> None:
    given = Given(data)
    secret, passwords = given.choice(SECRETS)
    flags = given.byte()
    binding = BINDING if flags & 1 else None
    method = exchange.MD5 if flags & 2 and secret and secret.wants_scram else exchange.SCRAM_SHA_256
    client = Client(exchange.begin(method, USER, secret, KEY, binding=binding), binding)
    nobody = Client(exchange.begin(exchange.SCRAM_SHA_256, USER, None, KEY, binding=binding), binding)
    assert client.challenged() == nobody.challenged()
    acts = given.rest()
    one, other = Given(acts), Given(acts)
    for _ in range(MOST_MESSAGES):
        if not one:
            return
        told = client.send(one)
        told_nobody = nobody.send(other)
        assert not nobody.is_done, "nobody got in"
        if client.is_done:
            client.check(passwords, binding is not None)
            assert isinstance(nobody.error, AuthenticationFailed)
        elif client.error is not None or not client.has_salt_of_its_own:
            assert told == told_nobody, "who is unknown can be told apart"
        if client.is_done or client.error is not None:
            return
