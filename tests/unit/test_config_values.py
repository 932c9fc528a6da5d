"""How values of options are read: units, booleans, sizes, lists, endpoints."""

import re
from ipaddress import IPv4Network, IPv6Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpooler.config.problems import key_text
from gpooler.config.storage import Endpoint, parse_endpoints
from gpooler.config.values import (
    INT_MAX,
    ClientAddress,
    FileMode,
    Kind,
    LogFormat,
    Networks,
    Number,
    Parameters,
    Quantiles,
    Secret,
    Size,
    Text,
    TextList,
    Workers,
    YesNo,
)

MS = Number("ms")
S = Number("s")


@pytest.mark.parametrize(
    ("kind", "value", "result"),
    [
        (MS, 4000, 4000),
        (MS, "4s", 4000),
        (MS, " 4 s ", 4000),
        (MS, "2000us", 2),
        (MS, "1min", 60_000),
        (MS, "1h", 3_600_000),
        (S, "1d", 86_400),
        (S, "3000ms", 3),
        (Number(least=-1), -1, -1),
        (Size(), 5, 5),
        (Size(), "64B", 64),
        (Size(), "2k", 2048),
        (Size(), "750MB", 750 << 20),
        (Size(), "2 GB", 2 << 30),
        (YesNo(), True, True),
        (YesNo(), "yes", True),
        (YesNo(), "no", False),
        (Workers(), "auto", "auto"),
        (Workers(), 4, 4),
        (FileMode(), "0644", 0o644),
        (FileMode(), "777", 0o777),
        (TextList(), "one", ("one",)),
        (TextList(), ["one", "two"], ("one", "two")),
        (Quantiles(), "0.99,0.95", (0.99, 0.95)),
        (Quantiles(), [0, 1], (0.0, 1.0)),
        (
            Parameters({}),
            {"a.b": 5, "c": True, "d": "x", "e": 0.5},
            {"a.b": "5", "c": "on", "d": "x", "e": "0.5"},
        ),
        (ClientAddress(), "default", None),
        (ClientAddress(), "10.1.2.3", IPv4Network("10.1.2.3/32")),
        (ClientAddress(), "10.1.2.3/255.0.0.0", IPv4Network("10.0.0.0/8")),
        (ClientAddress(), "2001:db8::1/32", IPv6Network("2001:db8::/32")),
        (ClientAddress(), "DB-1.Example.com", "db-1.example.com"),
        (LogFormat(), "100%% %m\\n", "100%% %m\\n"),
        (LogFormat(), "json", "json"),
    ],
)
def test_a_value_is_read_in_the_unit_of_its_option(kind: Kind, value: Any, result: Any) -> None:
    assert kind.parse(value) == result


@pytest.mark.parametrize(
    ("kind", "value", "part"),
    [
        (MS, True, "must be a whole number of ms"),
        (MS, 1.0, "must be a whole number of ms"),
        (MS, "4000", 'a text with a unit such as "4s"; units are us, ms'),
        (MS, "4x", "units are"),
        (MS, "١s", "units are"),
        (MS, -1, "at least 0 ms"),
        (MS, INT_MAX + 1, f"at most {INT_MAX} ms"),
        (MS, "9999999999d", f"at most {INT_MAX} ms"),
        (MS, "9" * 5000 + "d", "units are"),
        (S, "1500ms", "whole number of s"),
        (Number(), "5s", "must be a whole number"),
        (Size(), "5", "units are"),
        (Size(), "0KB", "more than nothing"),
        (Size(), True, "number of bytes"),
        (YesNo(), "true", 'true or false (or "yes", "no")'),
        (YesNo(), 1, "true or false"),
        (YesNo(), [], "true or false"),
        (Workers(), "Auto", '"auto"'),
        (Workers(), 10**6, "1 to 1024"),
        (FileMode(), 644, "octal"),
        (FileMode(), "0899", "octal"),
        (FileMode(), "0644\n", "octal"),
        (Text(), "", "not be empty"),
        (Text(), "a\0b", "zero byte"),
        (Text(), ["a"], "must be a text"),
        (Text(3), "abcd", "at most 3"),
        (TextList(), ["a", 5], "must be a text"),
        (TextList(), {"a": 1}, "list of texts"),
        (Quantiles(), "0.5,x", "numbers from 0 to 1"),
        (Quantiles(), [float("nan")], "from 0 to 1"),
        (Quantiles(), [True], "numbers"),
        (Parameters({}), {"a": []}, 'look at "a"'),
        (Parameters({}), [], "table of server parameters"),
        (Parameters({"user": "no"}), {"USER": "x"}, 'must not hold "USER": no'),
        (ClientAddress(), "10.0.0.0/33", "an address such as"),
        (ClientAddress(), "10.0.0.300", "does not end with a number"),
        (ClientAddress(), ".example.com", "suffixes of host names are not supported: name each host"),
        (ClientAddress(), "Default", '"default" is a word'),
        (ClientAddress(), 5, "an address such as"),
        (Networks(), "db.example.com", "a list of addresses or networks"),
        (Networks(), ["10.0.0.0/8", "default"], "a list of addresses or networks"),
        (LogFormat(), "%q", 'unknown flag "%q"'),
        (LogFormat(), "100%", 'unknown flag "%"'),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_what_it_must_be(kind: Kind, value: Any, part: str) -> None:
    with pytest.raises(ValueError, match=re.escape(part)):
        kind.parse(value)


@pytest.mark.parametrize(
    ("text", "endpoints"),
    [
        ("db", [Endpoint("db", 5432)]),
        ("tcp://db:1", [Endpoint("db", 1)]),
        ("10.0.0.1:5433:vla", [Endpoint("10.0.0.1", 5433, None, "vla")]),
        ("[db]:vla:5433", [Endpoint("db", 5433, None, "vla")]),
        ("[::1]", [Endpoint("::1", 5432)]),
        ("[fe80::1%eth0]:1", [Endpoint("fe80::1%eth0", 1)]),
        ("a:vla, b:2", [Endpoint("a", 5432, None, "vla"), Endpoint("b", 2)]),
        ("unix:///run/pg", [Endpoint(None, 5432, "/run/pg/.s.PGSQL.5432")]),
        ("unix:///run/pg/:7", [Endpoint(None, 7, "/run/pg/.s.PGSQL.7")]),
        ("/run/pg", [Endpoint(None, 5432, "/run/pg/.s.PGSQL.5432")]),
        ("unix:///run/pg/.s.PGSQL.7", [Endpoint(None, 7, "/run/pg/.s.PGSQL.7")]),
        (None, [Endpoint(None, 5432, "/sock/.s.PGSQL.5432")]),
    ],
)
def test_endpoints_are_read_with_port_and_zone_in_either_order(
    text: str | None, endpoints: list[Endpoint]
) -> None:
    assert list(parse_endpoints(text, 5432, "/sock")) == endpoints


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,",
        ":1",
        "a:0",
        "a:65536",
        "a:1:2",
        "a:x:y",
        "a:1:x:y",
        "::1",
        "[::1",
        "[::1]5",
        "[]:1",
        "http://a",
        "unix://a",
        "a:",
        "a:sixteen-letters!",
        "unix:///" + "d" * 120,
        ",".join("a" * 129),
        "a:99999999999999999999",
    ],
)
def test_endpoints_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_endpoints(text, 5432, None)


@given(st.text(alphabet="[]:,/.ab1%", max_size=20))
def test_any_host_is_read_or_refused(text: str) -> None:
    try:
        for endpoint in parse_endpoints(text, 5432, None):
            assert 1 <= endpoint.port <= 65_535
            assert str(endpoint)
            assert (endpoint.host is None) != (endpoint.unix_path is None)
    except ValueError as error:
        assert str(error)  # noqa: PT017


def test_a_secret_shows_itself_to_nobody_who_does_not_ask() -> None:
    secret = Secret("x")
    assert "x" not in f"{secret} {secret!r}".replace("Secret", "")
    assert secret == Secret("x", ("env", "A"))
    assert secret != Secret("y")
    assert secret != "x"
    assert len({secret, Secret("x")}) == 1


def test_a_key_path_is_written_as_toml_writes_it() -> None:
    assert key_text(("database", "a.b", "user", "x-1", 0, "pool")) == 'database."a.b".user.x-1[0].pool'
    assert key_text(("", 'a"\n')) == '""."a\\"\\U0000000A"'
