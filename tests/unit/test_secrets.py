"""What each kind of secret can serve, and that nothing is derived twice."""

import pytest

from gpooler.auth import md5, scram, secrets
from gpooler.auth.scram import Verifier
from gpooler.auth.secrets import Secret, SecretKind

SALT = b"0123456789abcdef"
HASH = md5.hash_password(b"pencil", b"app").decode()
VERIFIER = Verifier.build(b"pencil", SALT)

PLAIN_SECRET = Secret("pencil")
MD5_SECRET = Secret(HASH)
SCRAM_SECRET = Secret(VERIFIER.format())


def test_kinds_are_told_apart_as_postgresql_does() -> None:
    assert PLAIN_SECRET.kind is SecretKind.PLAIN
    assert MD5_SECRET.kind is SecretKind.MD5
    assert SCRAM_SECRET.kind is SecretKind.SCRAM
    assert Secret("md5 is not enough").kind is SecretKind.PLAIN
    assert Secret("SCRAM-SHA-256$nonsense").kind is SecretKind.PLAIN


def test_what_a_client_typed_is_a_password_whatever_it_looks_like() -> None:
    for text in ("pencil", HASH, VERIFIER.format()):
        secret = Secret.of_password(text.encode())
        assert secret.plain == text.encode()
        assert secret.is_password(b"app", text.encode())
        assert text not in repr(secret)


def test_each_kind_serves_what_it_can() -> None:
    assert PLAIN_SECRET.plain == b"pencil"
    assert MD5_SECRET.plain is None
    assert SCRAM_SECRET.plain is None
    assert PLAIN_SECRET.md5_hash(b"app") == MD5_SECRET.md5_hash(b"app") == HASH.encode()
    assert SCRAM_SECRET.md5_hash(b"app") is None
    assert PLAIN_SECRET.verifier(SALT) == SCRAM_SECRET.verifier(b"other") == VERIFIER
    assert MD5_SECRET.verifier(SALT) is None
    assert PLAIN_SECRET.keys(SALT, 4096) == scram.derive_keys(b"pencil", SALT, 4096)
    assert MD5_SECRET.keys(SALT, 4096) is None
    assert SCRAM_SECRET.keys(SALT, 4096) is None


@pytest.mark.parametrize("secret", [PLAIN_SECRET, MD5_SECRET, SCRAM_SECRET], ids=repr)
def test_every_kind_checks_a_clear_text_password(secret: Secret) -> None:
    assert secret.is_password(b"app", b"pencil")
    assert not secret.is_password(b"app", b"Pencil")
    assert not secret.is_password(b"app", b"")


def test_the_md5_of_another_user_is_another_password() -> None:
    assert not MD5_SECRET.is_password(b"bpp", b"pencil")


def test_derivations_are_remembered() -> None:
    secret = Secret("pencil")
    assert secret.verifier(SALT) is secret.verifier(SALT)
    assert secret.keys(SALT, 4096) is secret.keys(SALT, 4096)


def test_changing_salts_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "MAX_CACHED", 2)
    secret = Secret("pencil")
    for number in range(5):
        salt = number.to_bytes(16, "big")
        assert secret.verifier(salt) == Verifier.build(b"pencil", salt)
        assert secret.keys(salt, 1) == scram.derive_keys(b"pencil", salt, 1)
    assert len(secret._verifiers) <= 2
    assert len(secret._keys) <= 2


def test_the_text_never_shows_in_a_repr() -> None:
    assert repr(PLAIN_SECRET) == "<Secret plain>"
    assert "pencil" not in repr(PLAIN_SECRET)
