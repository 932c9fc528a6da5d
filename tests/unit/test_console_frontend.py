"""What a client of the console sends, taken apart."""

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpooler.console.frontend import (
    MAX_MESSAGE,
    Bind,
    Execute,
    Framer,
    Target,
    parameter_texts,
    read_bind,
    read_execute,
    read_parse,
    read_query,
    read_target,
)
from gpooler.errors import BindMismatch, ProtocolViolation
from tests.harness import client

READERS: list[Callable[[bytes], object]] = [read_query, read_parse, read_bind, read_target, read_execute]


@given(st.binary(max_size=60), st.sampled_from(READERS))
def test_any_body_is_read_or_refused(body: bytes, read: Callable[[bytes], object]) -> None:
    try:
        read(body)
    except ProtocolViolation:
        pass


def test_a_stream_is_cut_wherever_it_comes_apart() -> None:
    stream = client.query("SHOW VERSION") + client.SYNC + client.parse("SHOW LISTS", "a", (23, 0))
    for at in range(len(stream)):
        framer = Framer(stream[:at])
        found = list(framer.messages())
        framer.feed(stream[at:])
        found += framer.messages()
        assert [kind for kind, _ in found] == [b"Q", b"S", b"P"]
        assert read_query(found[0][1]) == "SHOW VERSION"
        assert read_parse(found[2][1]).types == (23, 0)


@pytest.mark.parametrize("length", [0, 3, MAX_MESSAGE + 1, 2**32 - 1])
def test_a_length_that_cannot_be_is_refused_before_the_body_comes(length: int) -> None:
    with pytest.raises(ProtocolViolation, match="invalid message length"):
        list(Framer(b"Q" + struct.pack("!I", length)).messages())


def test_bind_describe_and_execute() -> None:
    wanted = Bind("p", "s", (), (b"1", None), ())
    assert read_bind(client.bind("s", (b"1", None), "p")[5:]) == wanted
    assert read_target(client.describe("S", "s")[5:]) == Target(True, "s")
    assert read_execute(client.execute("p", 3)[5:]) == Execute("p", 3)


def test_values_in_binary_are_read_where_their_type_is_known() -> None:
    bind = Bind("", "", (1,), (b"text", b"\0\0\0\x07", b"\xff\xff\xff\xff\xff\xff\xff\xff", None), ())
    assert parameter_texts(bind, (25, 23, 20, 25)) == ("text", "7", "-1", None)
    for types in ((25, 700, 20), (20, 23, 20)):
        with pytest.raises(BindMismatch, match="cannot read"):
            parameter_texts(bind, types)
    with pytest.raises(BindMismatch, match="2 parameter formats but 4 parameters"):
        parameter_texts(Bind("", "", (0, 1), bind.values, ()), ())
