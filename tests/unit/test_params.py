"""Interned parameter sets: identity, merge, and the memory they take."""

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest

from gpooler.relay.params import ParameterSet
from gpooler.relay.probe import parameter_counts

CONFORMING_ON = {b"standard_conforming_strings": b"on"}


def reported(parameters: dict[bytes, bytes], read_only: frozenset[bytes] = frozenset()) -> ParameterSet:
    return ParameterSet.of(parameters, True, read_only)


def asked(parameters: dict[bytes, bytes]) -> ParameterSet:
    return ParameterSet.of(parameters, False)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = parameter_counts()
    yield
    assert parameter_counts() == before


def test_equal_content_is_the_same_set_in_any_order() -> None:
    one = asked({b"a": b"1", b"b": b"2", b"c": b"3"})
    other = asked({b"c": b"3", b"a": b"1", b"b": b"2"})
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize(
    "other",
    [
        {},
        {b"a": b"1"},
        {b"a": b"1", b"b": b"3"},
        {b"a": b"1", b"b": b"2", b"c": b""},
        {b"a1": b"", b"b": b"2"},
    ],
)
def test_other_content_is_another_set(other: dict[bytes, bytes]) -> None:
    assert asked({b"a": b"1", b"b": b"2"}) != asked(other)


def test_reported_and_asked_for_are_not_equal_but_differ_in_nothing() -> None:
    server, client = reported({b"TimeZone": b"UTC"}), asked({b"TimeZone": b"UTC"})
    assert server != client
    assert server.deploy(client) == b""


def test_items_are_sorted_by_name_without_regard_to_case() -> None:
    names = [b"TimeZone", b"DateStyle", b"application_name", b"Zeta", b"datestyle_x", b"a", b"A_"]
    random.Random(1).shuffle(names)
    found = [name for name, _ in asked(dict.fromkeys(names, b"")).items()]
    assert found == sorted(names, key=bytes.lower)


def test_a_name_in_another_case_replaces_the_value() -> None:
    merged = reported({b"TimeZone": b"UTC"}).merged(asked({b"timezone": b"Asia/Tokyo"}))
    assert merged.items() == [(b"TimeZone", b"Asia/Tokyo")]
    assert asked({b"timezone": b"a", b"TIMEZONE": b"b"}).items() == [(b"TIMEZONE", b"b")]


def test_merge_keeps_what_is_read_only() -> None:
    base = reported({b"server_version": b"15", b"DateStyle": b"ISO"}, frozenset({b"server_version"}))
    merged = base.merged(asked({b"server_version": b"1", b"datestyle": b"German", b"extra": b"x"}))
    assert merged.items() == [(b"DateStyle", b"German"), (b"extra", b"x"), (b"server_version", b"15")]
    assert merged.items(is_reported=True) == [(b"DateStyle", b"German"), (b"server_version", b"15")]


def test_read_only_values_are_never_deployed() -> None:
    has = reported({b"server_version": b"15"}, frozenset({b"server_version"}))
    assert has.deploy(reported({b"server_version": b"14"})) == b""
    assert reported({b"server_version": b"14"}).deploy(has) == b""
    assert reported({}).deploy(has) == b""


def test_deploy_says_what_differs_and_no_more() -> None:
    has = reported({b"DateStyle": b"ISO, MDY", b"TimeZone": b"UTC"}).merged(asked({b"lock_timeout": b"1s"}))
    assert has.deploy(has) == b""
    wants = reported({b"DateStyle": b"ISO, MDY", b"TimeZone": b"Asia/Tokyo"}).merged(
        asked({b"geqo": b"off", b"work_mem": b"1MB"})
    )
    assert has.deploy(wants) == (
        b'SET "geqo"=E\'off\';RESET "lock_timeout";SET "TimeZone"=E\'Asia/Tokyo\';'
        b"SELECT pg_catalog.set_config(E'work_mem',E'1MB',false) IS NULL;"
    )
    # what the server reports cannot be unwanted
    assert has.deploy(asked({b"lock_timeout": b"1s"})) == b""


def test_deploy_is_plain_ascii_whatever_comes_in() -> None:
    nasty = {
        bytes([byte]) + b"'\\\";--": bytes([255 - byte]) + b"'; DROP TABLE t; --" for byte in range(1, 255)
    }
    for text in (reported({}).deploy(asked(nasty)), asked(nasty).deploy(reported({}))):
        assert all(0x20 <= byte <= 0x7E for byte in text)
        assert b"DROP" in text or b"NULL" in text


def test_too_many_parameters_are_refused() -> None:
    many = {b"a.b%d" % number: b"x" for number in range(400)}
    assert len(asked(many).items()) == 400
    with pytest.raises(ValueError, match="too many"):
        asked({**many, b"a.c": b"x"})
    with pytest.raises(ValueError, match="too many"):
        asked(many).merged(asked({b"a.c": b"x"}))


def test_a_difference_that_is_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="too large"):
        asked({}).deploy(asked({b"a.b": b"x" * 65536}))
    assert len(asked({}).deploy(asked({b"a.b": b"x" * 60000}))) > 60000


def test_a_value_of_a_full_set_can_still_be_replaced() -> None:
    many = {b"a.b%d" % number: b"x" for number in range(400)}
    merged = asked(many).merged(asked({b"A.B7": b"y"}))
    assert dict(merged.items())[b"a.b7"] == b"y"


def test_sets_and_parameters_are_released() -> None:
    params, sets = parameter_counts()
    held = [asked({b"p.n%d" % number: b"v", b"p.same": b"v"}) for number in range(50)]
    # the sets on the way to them are gone already
    assert parameter_counts() == (params + 51, sets + 50)
    held += [one.merged(other) for one, other in pairwise(held)]
    assert parameter_counts() == (params + 51, sets + 99)
    del held[25:]
    assert parameter_counts() == (params + 26, sets + 25)
    held.clear()
    assert parameter_counts() == (params, sets)
