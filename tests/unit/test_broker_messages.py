"""The messages between processes: what goes in comes out, and nothing else gets through."""

import json
from dataclasses import MISSING, fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpooler.broker import messages as broker_messages
from gpooler.broker.codec import MAX_DATAGRAM, ChannelProtocolError, Codec
from gpooler.broker.messages import (
    CODEC,
    Hello,
    Opened,
    ReportServer,
    RouteOpened,
    RouteParameters,
    ServerState,
    SlotPhase,
    Want,
    decode,
    encode,
)
from gpooler.process import control

STATE = ServerState(
    server_id="s1a2b3c4d5e6f",
    pid=4711,
    secret_hex="00ff00ff",
    endpoint="127.0.0.1:5432",
    parameters={"TimeZone": "Europe/Zürich"},
    initial_parameters={"TimeZone": "UTC"},
    opened_at_us=1,
    expires_at_us=0,
    uses=3,
)
st.register_type_strategy(int, st.integers(-(2**63), 2**63 - 1))
BROKER_CLASSES = sorted(CODEC._pack, key=lambda kind: kind.__name__)
CONTROL_CLASSES = sorted(control.CODEC._pack, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", [*BROKER_CLASSES, *CONTROL_CLASSES], ids=lambda kind: kind.__name__)
@settings(max_examples=20)
@given(data=st.data())
def test_every_message_survives_the_journey(kind, data):
    codec = CODEC if kind in CODEC._pack else control.CODEC
    message = data.draw(st.builds(kind))
    assert codec.decode(codec.encode(message)) == message


@pytest.mark.parametrize("kind", [*BROKER_CLASSES, *CONTROL_CLASSES], ids=lambda kind: kind.__name__)
def test_every_message_is_a_frozen_slotted_value_without_defaults(kind):
    assert "__slots__" in vars(kind)
    assert kind.__dataclass_params__.frozen
    assert all(field.default is MISSING for field in fields(kind))
    assert kind.DESCRIPTORS in (0, 1, 2)


def test_bytes_that_are_no_text_survive_in_strings():
    value = b"caf\xe9".decode("utf-8", "surrogateescape")
    message = RouteParameters(1, {"application_name": value})
    assert decode(encode(message)) == message


def test_a_server_in_login_is_reported_without_its_state():
    message = ReportServer(1, 2, 3, SlotPhase.OPENING, None)
    received = decode(encode(message))
    assert received == message
    assert isinstance(received.phase, SlotPhase)


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        b"\xff",
        b"{}",
        b"[]",
        b"[1]",
        b'["Nonsense"]',
        b'["Want"]',
        b'["Want",1]',
        b'["Want",1,2,3]',
        b'["Want",1,true]',
        b'["Want",1,1.0]',
        b'["Want",1,"1"]',
        b'["Want",1,null]',
        b'["Want",1,99999999999999999999]',
        b'["Want",1,NaN]',
        b'["RouteParameters",1,{"a":1}]',
        b'["RouteParameters",1,[]]',
        b'["RouteOpened",0,1,"r","d","u",{"a":null}]',
        b'["ReportServer",1,2,3,9,null]',
        b'["Opened",1,2,3,null]',
        b'["Opened",1,2,3,["id"]]',
        b"[" * 50000,
    ],
)
def test_what_is_no_message_is_refused(datagram):
    with pytest.raises(ChannelProtocolError):
        decode(datagram)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_and_nothing_else_happens(datagram):
    with pytest.raises(ChannelProtocolError):
        decode(datagram)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=20,
    ),
    st.sampled_from([kind.__name__ for kind in BROKER_CLASSES]),
)
def test_a_known_tag_with_random_fields_gives_a_message_or_a_refusal(values, tag):
    items = values if isinstance(values, list) else [values]
    try:
        message = decode(json.dumps([tag, *items]).encode())
    except ChannelProtocolError:
        return
    assert decode(encode(message)) == message


def test_a_message_of_another_channel_is_refused():
    with pytest.raises(ChannelProtocolError, match="not a message of this channel"):
        encode(control.Serve(is_settled=True))
    with pytest.raises(ChannelProtocolError, match="unknown message"):
        decode(control.encode(control.Serve(is_settled=True)))


def test_a_message_over_the_limit_is_refused_by_the_sender():
    with pytest.raises(ChannelProtocolError, match="too long"):
        encode(RouteParameters(1, {"search_path": "x" * MAX_DATAGRAM}))


def test_a_type_that_no_message_can_carry_is_found_when_the_codec_is_made():
    from dataclasses import dataclass
    from typing import ClassVar

    @dataclass(frozen=True, slots=True)
    class Odd:
        DESCRIPTORS: ClassVar[int] = 0
        value: float

    with pytest.raises(TypeError, match="cannot carry"):
        Codec([Odd])


def test_the_tag_is_the_class_name_and_the_fields_follow():
    assert encode(Want(7, 3)) == b'["Want",7,3]'
    assert json.loads(encode(Opened(1, 2, 3, STATE)))[:4] == ["Opened", 1, 2, 3]
    message = RouteOpened(5, 1, "r", "d", "u", False, None)
    assert decode(b'["RouteOpened",5,1,"r","d","u",false,null]') == message
    assert broker_messages.PROTOCOL_VERSION == Hello(1, 1, 1, 1).version
