"""SHA-256 and HMAC in C against the standard library's, and the bytes taken from the system."""

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpooler.auth.randomness import random_bytes
from gpooler.auth.sha256 import hmac_sha256, sha256


@pytest.mark.parametrize("size", [*range(200), 1000, 65_536])
def test_every_length(size: int) -> None:
    data = bytes(index % 251 for index in range(size))
    assert sha256(data) == hashlib.sha256(data).digest()
    assert hmac_sha256(data[:64], data) == hmac.digest(data[:64], data, "sha256")


@given(st.lists(st.binary(max_size=200)), st.binary(max_size=64))
def test_any_data_in_any_parts(parts: list[bytes], key: bytes) -> None:
    data = b"".join(parts)
    assert sha256(*parts) == hashlib.sha256(data).digest()
    assert hmac_sha256(key, data) == hmac.digest(key, data, "sha256")


def test_a_key_longer_than_a_block_is_none() -> None:
    with pytest.raises(ValueError, match="too long"):
        hmac_sha256(bytes(65), b"")


def test_random_bytes_are_never_given_out_twice() -> None:
    parts = [random_bytes(18) for _ in range(1000)]
    assert len(set(parts)) == 1000
    assert {len(part) for part in parts} == {18}
    assert random_bytes(0) == b""
    with pytest.raises(ValueError, match="too many"):
        random_bytes(4097)
