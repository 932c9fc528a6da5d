"""MD5 passwords, against the formula of the documentation."""

import hashlib

from gpooler.auth import md5


def test_hash_is_the_one_postgresql_stores() -> None:
    # SELECT 'md5' || md5('secret' || 'app')
    expected = b"md5" + hashlib.md5(b"secretapp").hexdigest().encode()
    assert md5.hash_password(b"secret", b"app") == expected
    assert md5.is_hash(expected)


def test_response_follows_the_formula_of_the_documentation() -> None:
    inner = hashlib.md5(b"secretapp").hexdigest()
    expected = "md5" + hashlib.md5(inner.encode() + b"\x01\x02\x03\x04").hexdigest()
    stored = md5.hash_password(b"secret", b"app")
    assert md5.response(stored, b"\x01\x02\x03\x04") == expected.encode()
    assert md5.is_response_right(expected.encode(), stored, b"\x01\x02\x03\x04")


def test_response_to_another_salt_or_by_another_user_is_wrong() -> None:
    stored = md5.hash_password(b"secret", b"app")
    answer = md5.response(stored, b"abcd")
    assert not md5.is_response_right(answer, stored, b"abce")
    assert not md5.is_response_right(answer, md5.hash_password(b"secret", b"bpp"), b"abcd")
    assert not md5.is_response_right(b"", stored, b"abcd")


def test_only_md5_and_32_lower_case_hex_digits_is_a_hash() -> None:
    assert md5.is_hash(b"md5" + b"0" * 32)
    for text in (b"", b"md5", b"md5" + b"0" * 31, b"md5" + b"0" * 33, b"md5" + b"g" * 32, b"md5" + b"A" * 32):
        assert not md5.is_hash(text)
