"""What a directory is asked with: nothing a stranger types changes what is meant."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpooler.auth.ldap_names import (
    bind_name,
    chosen_group,
    escape_dn,
    escape_filter,
    fault_of,
    search_filter,
    uri,
)


@pytest.mark.parametrize(
    "user", ["*", "a*", "(x", "x)", "a\\b", "a/b", "a\0b", "a\nb", "a\udcffb", "\u202ex"]
)
def test_names_that_mean_something_to_a_directory_are_refused(user: str) -> None:
    assert fault_of(user)


@pytest.mark.parametrize("user", ["joe", "joe.blow@example.org", "Zoë", "smith, j", "o'brien", "a b", "#1"])
def test_common_names_are_not_refused(user: str) -> None:
    assert fault_of(user) == ""


# RFC 4514, section 4, and RFC 4515, section 4
@pytest.mark.parametrize(
    ("value", "escaped"),
    [
        ('James "Jim" Smith, III', 'James \\"Jim\\" Smith\\, III'),
        ("Before\rAfter", "Before\rAfter"),
        ("#hash", "\\#hash"),
        (" space ", "\\ space\\ "),
        (" ", "\\ "),
        ("a+b;c<d>e=f", "a\\+b\\;c\\<d\\>e\\=f"),
        ("back\\slash", "back\\\\slash"),
        ("zero\0", "zero\\00"),
        ("Lučić", "Lučić"),
        ("", ""),
    ],
)
def test_a_value_in_a_dn_is_escaped(value: str, escaped: str) -> None:
    assert escape_dn(value) == escaped


@pytest.mark.parametrize(
    ("value", "escaped"),
    [
        (
            "Parens R Us (for all your parenthetical needs)",
            r"Parens R Us \28for all your parenthetical needs\29",
        ),
        ("*", r"\2a"),
        ("C:\\MyFile", r"C:\5cMyFile"),
        ("\0", r"\00"),
    ],
)
def test_a_value_in_a_filter_is_escaped(value: str, escaped: str) -> None:
    assert escape_filter(value) == escaped


@given(st.text(st.characters(blacklist_categories=["Cs"])))
def test_an_escaped_value_is_one_value(value: str) -> None:
    in_filter = escape_filter(value)
    assert not set(in_filter) & set("*()\0")
    assert re.sub(r"\\([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), in_filter) == value
    in_dn = escape_dn(value)
    assert re.fullmatch(r'(?:\\.|[^\\,+"<>;=])*', in_dn, re.DOTALL)
    assert re.sub(r"\\(00|.)", lambda m: "\0" if m[1] == "00" else m[1], in_dn, flags=re.DOTALL) == value


def test_what_is_asked_is_put_together() -> None:
    assert bind_name("uid=", "smith, j", ",ou=people") == "uid=smith\\, j,ou=people"
    assert bind_name(None, "joe", "@example.org") == "joe@example.org"
    assert search_filter("uid", "joe", None) == "(uid=joe)"
    assert search_filter("cn", "a b", "(x=1)") == "(&(cn=a b)(x=1))"
    assert search_filter("uid", "joe", "x=1") == "(&(uid=joe)(x=1))"
    assert uri("ldap", "one  two", 3890) == "ldap://one:3890 ldap://two:3890"
    assert uri("ldaps", "2001:db8::1 [2001:db8::2]", None) == "ldaps://[2001:db8::1] ldaps://[2001:db8::2]"


@pytest.mark.parametrize(
    ("value", "database", "group"),
    [
        ("db1_sales_ro", "sales", "ro"),
        ("cn=db1_sales_ro,ou=groups,dc=example", "sales", "ro"),
        ("cn=db1_sales_rw,ou=groups,dc=example", "sales", "rw"),
        ("x=db1_sales_rw+y=db1_sales_ro", "sales", "ro"),  # the first in the order of the rule
        ("db1_sales_rollout", "sales", None),
        ("db1_sales_ro-2", "sales", None),
        ("other.db1_sales_ro", "sales", None),
        ("xdb1_sales_ro", "sales", None),
        ("db1_sales_ro", "stock", None),
        ("db1_SALES_ro", "sales", None),
        ("", "sales", None),
        # a database that would reach into the rest of a DN
        ("cn=db1_sales,ou=x_ro", "sales,ou=x", None),
        ("cn=db1_a b_ro", "a b", None),
    ],
)
def test_a_group_is_chosen_by_its_whole_name(value: str, database: str, group: str | None) -> None:
    assert chosen_group(["unrelated", value], "db1", database, ["ro", "rw"]) == group
