"""SCRAM the short way in and the long one: whatever a client says, both give the same answer.

A rule with ``log_debug`` keeps its clients on the long way; the others take the short one from the second
login on.
"""

import hashlib
import re
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from gpooler.auth import scram
from gpooler.auth.scram import MECHANISM, MECHANISM_PLUS, ScramClient, Verifier, derive_keys
from gpooler.stats.registry import ProcessWord
from gpooler.wire import messages
from scripts.benchmark.contenders import make_certificate
from tests.harness import PASSWORD, Gpooler, Postgres, RawClient
from tests.harness.client import Message, message, startup

OTHER: Final = "pässword"
SECRETS: Final[dict[str, Any]] = {
    "verifier": Verifier.build(PASSWORD.encode(), b"0123456789abcdef").format(),
    "clear": PASSWORD,
    "several": ["another", Verifier.build(OTHER.encode(), b"fedcba9876543210").format(), PASSWORD],
}
Change = Callable[[bytes], bytes]


def same(said: bytes) -> bytes:
    return said


def replaced(old: bytes, new: bytes) -> Change:
    def change(said: bytes) -> bytes:
        assert old in said
        return said.replace(old, new, 1)

    return change


# what is done to the client-first-message and to the client-final-message, and what comes of it
WRONG: Final[dict[str, tuple[Change, Change, str]]] = {
    "wrong nonce": (same, replaced(b",r=", b",r=x"), "08P01"),
    "other GS2 header": (same, lambda said: replaced(said[:6], b"c=bixh")(said), "08P01"),
    "cut proof": (same, lambda said: said[:-4], "08P01"),
    "proof that is no Base64": (same, lambda said: said[:-5] + b"*" + said[-4:], "08P01"),
    "proof without its end": (same, lambda said: said[:-1] + b"A", "08P01"),
    "no proof": (same, lambda said: said.rpartition(b",p=")[0], "08P01"),
    "nothing at the end": (same, lambda _: b"", "08P01"),
    "wrong proof": (same, lambda said: said[:-10] + b"AAAAAAAAA=", "28P01"),
    "extension at the end": (same, replaced(b",p=", b",x=1,p="), "28P01"),
    "attribute that is none": (same, replaced(b",p=", b",1=1,p="), "08P01"),
    "mandatory extension": (lambda said: said.replace(b",n=", b",m=x,n=", 1), same, "0A000"),
    "authorization identity": (lambda said: said.replace(b",,", b",a=joe,", 1), same, "0A000"),
    "no user name": (lambda said: said.replace(b",n=,", b",", 1), same, "08P01"),
    "empty nonce": (lambda said: said.partition(b"r=")[0] + b"r=", same, "08P01"),
    "nonce beyond ASCII": (lambda said: said + "ä".encode(), same, "08P01"),
    "nonce with NUL": (lambda said: said + b"\0", same, "08P01"),
    "no comma": (lambda said: said.replace(b",", b";"), same, "08P01"),
    "long": (lambda said: said + b"x" * scram.MAX_MESSAGE_LENGTH, same, "08P01"),
    "unknown flag": (lambda said: b"z" + said[1:], same, "08P01"),
    "nothing": (lambda _: b"", same, "08P01"),
}


@pytest.fixture(scope="module")
def gpooler(_postgres15: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gpooler]:
    directory: Path = tmp_path_factory.mktemp("scram")
    make_certificate(directory)
    databases: dict[str, Any] = {"default": None}
    for name, secret in SECRETS.items():
        for way in ("short", "long"):
            rule = {
                "authentication": "scram-sha-256",
                "password": secret,
                "storage": "postgres",
                "storage_db": "app",
                "storage_user": "trust_user",
                "pool": "transaction",
                "log_debug": way == "long",
            }
            databases[f"{name}_{way}"] = {"user": {"joe": rule}}
    listener = {
        "tls": "prefer",
        "tls_cert_file": f"{directory}/cert.pem",
        "tls_key_file": f"{directory}/key.pem",
    }
    with Gpooler(_postgres15, listener=listener, config={"database": databases}) as running:
        for database in databases.keys() - {"default"}:
            for has_tls in (False, True):
                for _ in range(2):  # the first may have to be set up on a server
                    assert login(running, database, has_tls)[-1].kind == b"Z"
        yield running


def login(
    gpooler: Gpooler,
    database: str,
    has_tls: bool = False,
    *,
    password: str = PASSWORD,
    mechanism: bytes | None = None,
    changes: tuple[Change, Change] = (same, same),
) -> list[Message]:
    """All that a client is told; what both sides draw by lot is not in it."""
    with gpooler.raw() as client:
        binding = b""
        if has_tls:
            client.start_tls(ssl._create_unverified_context())
            assert isinstance(client.socket, ssl.SSLSocket)
            certificate = client.socket.getpeercert(binary_form=True)
            assert certificate is not None
            binding = hashlib.sha256(certificate).digest()
        client.send(startup("joe", database))
        told = [client.read()]
        offers = told[0].body[4:].rstrip(b"\0").split(b"\0")
        side = ScramClient(nonce=b"fyko+d2lbbFgONRv9qkxdawL", binding=binding, offers=offers)
        first = changes[0](side.first())
        client.send(messages.sasl_initial_response(mechanism or side.mechanism, first))
        told.append(client.read())
        if told[-1].kind == b"R":
            challenge = side.challenge(told[-1].body[4:])
            keys = derive_keys(password.encode(), challenge.salt, challenge.iterations)
            client.send(messages.sasl_response(changes[1](side.final(challenge, keys))))
            told.append(client.read())
            if told[-1].kind == b"R":
                side.verify(told[-1].body[4:])
                told += client.read_until()
        if told[-1].kind != b"Z":
            told += client.read_to_end()
        return [without_lots(one) for one in told]


def without_lots(told: Message) -> Message:
    body = re.sub(rb"\bc[0-9a-f]{12}\b", b"ID", told.body)
    body = re.sub(rb"(r=fyko.d2lbbFgONRv9qkxdawL)[^,]+", rb"\1", body)
    if told.kind == b"K" or body[:4] == b"\0\0\0\x0c":
        body = b""  # BackendKeyData, the signature of the exchange
    return Message(told.kind, body)


def both_ways(gpooler: Gpooler, name: str, *details: Any, **options: Any) -> list[Message]:
    short, long = (login(gpooler, f"{name}_{way}", *details, **options) for way in ("short", "long"))
    assert short == long
    return short


@pytest.mark.parametrize("has_tls", [False, True])
@pytest.mark.parametrize("name", SECRETS)
def test_right_and_wrong_passwords(gpooler: Gpooler, name: str, has_tls: bool) -> None:
    for password in (PASSWORD, OTHER):
        told = both_ways(gpooler, name, has_tls, password=password)
        assert (told[-1].kind == b"Z") == (password == PASSWORD or name == "several")
        if told[-1].kind != b"Z":
            assert told[-1].fields()["C"] == "28P01"


@pytest.mark.parametrize("has_tls", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_messages_that_do_not_fit(gpooler: Gpooler, case: str, has_tls: bool) -> None:
    *changes, sqlstate = WRONG[case]
    before = gpooler.process_count(ProcessWord.LOGIN_ERRORS)
    told = both_ways(gpooler, "verifier", has_tls, changes=tuple(changes))
    if has_tls and case == "other GS2 header":
        sqlstate = "28000"
    assert told[-1].fields()["C"] == sqlstate
    assert gpooler.process_count(ProcessWord.LOGIN_ERRORS) == before + 2


@pytest.mark.parametrize(
    ("has_tls", "mechanism", "change", "sqlstate"),
    [
        (False, MECHANISM, replaced(b"n,", b"y,"), None),
        (False, MECHANISM_PLUS, same, "08P01"),
        (False, MECHANISM, replaced(b"n,", b"p=tls-server-end-point,"), "08P01"),
        (False, b"SCRAM-SHA-1", same, "08P01"),
        (True, MECHANISM, replaced(b"p=tls-server-end-point,", b"n,"), "08P01"),
        (True, MECHANISM, replaced(b"p=tls-server-end-point,", b"y,"), "28000"),
        (True, MECHANISM_PLUS, replaced(b"p=tls-server-end-point,", b"n,"), "08P01"),
        (True, MECHANISM_PLUS, replaced(b"tls-server-end-point", b"tls-unique"), "08P01"),
    ],
)
def test_channel_binding(
    gpooler: Gpooler, has_tls: bool, mechanism: bytes, change: Change, sqlstate: str | None
) -> None:
    def final(said: bytes) -> bytes:
        return b"c=eSws" + said[6:] if sqlstate is None else said

    told = both_ways(gpooler, "verifier", has_tls, mechanism=mechanism, changes=(change, final))
    # what was bound is part of what is proved: a header that only looks right proves nothing
    assert told[-1].fields()["C"] == (sqlstate or "28P01")


@pytest.mark.parametrize("body", [b"", b"\0", MECHANISM, MECHANISM + b"\0\0\0", MECHANISM + b"\0\0\0\0\1"])
def test_initial_responses_that_are_none(gpooler: Gpooler, body: bytes) -> None:
    answers = []
    for way in ("short", "long"):
        with gpooler.raw() as client:
            client.send(startup("joe", f"verifier_{way}"))
            client.read()
            client.send(message(b"p", body))
            answers.append([without_lots(one) for one in client.read_to_end()])
    assert answers[0] == answers[1]
    assert answers[0][-1].fields()["C"] == "08P01"


def test_a_client_that_waits_for_an_empty_challenge(gpooler: Gpooler) -> None:
    for way in ("short", "long"):
        with gpooler.raw() as client:
            assert waits(client, f"verifier_{way}").kind == b"R"


def waits(client: RawClient, database: str) -> Message:
    """Choose the mechanism alone, then send the client-first-message; returns the answer to that."""
    client.send(startup("joe", database))
    client.read()
    client.send(message(b"p", MECHANISM + b"\0\xff\xff\xff\xff"))
    assert client.read() == Message(b"R", b"\0\0\0\x0b")
    client.send(messages.sasl_response(ScramClient().first()))
    return client.read()
