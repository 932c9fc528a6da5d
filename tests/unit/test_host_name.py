"""What may stand for a host in a rule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpooler.auth.host_name import NAME_MOST, host_name

LONGEST = ".".join(["a" * 63] * 3 + ["b" * 61])


@pytest.mark.parametrize(
    "text",
    ["localhost", "db-1.example.com", "db.example.com.", "1.example.com", "my_app_1", "a",
     "xn--bcher-kva.example",
     "0xg", "3com", "all.example.com", "a" * 63, LONGEST, f"{LONGEST}."],
)  # fmt: skip
def test_names_are_taken_in_lower_case(text: str) -> None:
    assert host_name(text) == host_name(text.upper()) == text


@pytest.mark.parametrize(
    "text",
    ["", ".", "a..b", "a b", "a b.example.com", "-a.example.com", "a-.example.com", "a/b", "a:5432",
     "a,b", "*.example.com",
     "a%eth0", "b\u00fccher.example", "\u212aelvin.example", "a\n", "a\0b",
     "a" * 64, f"c{LONGEST}", "[::1]", "a;b", '"a"'],
)  # fmt: skip
def test_what_no_host_is_called_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"a host name has letters|suffixes"):
        host_name(text)


@pytest.mark.parametrize(
    "text", ["10.1", "10.0.0.300", "2130706433", "0x7f.1", "0x7f000001", "a.0x", "10.0.0.1."]
)
def test_what_the_resolver_would_read_as_an_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="does not end with a number"):
        host_name(text)


@pytest.mark.parametrize("text", ["default", "DEFAULT", "all", "samehost", "SameNet"])
def test_words_are_no_names(text: str) -> None:
    with pytest.raises(ValueError, match="is a word, and no host name"):
        host_name(text)


def test_a_suffix_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="name each host, or give their network"):
        host_name(".example.com")


@given(st.text(max_size=300))
def test_whatever_is_taken_is_a_name_that_is_taken_again(text: str) -> None:
    try:
        name = host_name(text)
    except ValueError:
        return
    assert name.isascii()
    assert len(name) <= NAME_MOST + 1
    assert host_name(name) == name
