"""The relay's numbers are those of Python."""

import re
from pathlib import Path

import gpooler.relay
from gpooler.console.tables import BUFFER_LIMITS
from gpooler.reasons import Reason
from gpooler.relay.events import ClientEvent, RouteEvent, ServerEvent

RELAY = Path(gpooler.relay.__path__[0])


def constants(file: str, prefix: str) -> dict[str, int]:
    """The C constants of a file whose names begin with a prefix, without it."""
    text = (RELAY / file).read_text(encoding="utf-8")
    return {name: int(value) for name, value in re.findall(rf"^ +{prefix}(\w+) = (\d+)", text, re.MULTILINE)}


def test_reasons_of_the_relay_are_those_of_python() -> None:
    numbers = constants("reason.pxd", "REASON_")
    assert numbers
    assert numbers == {name: Reason[name].value for name in numbers}


def test_event_bits_of_the_relay_are_those_of_python() -> None:
    numbers = constants("engine.pxd", "EVENT_")
    for events in (ClientEvent, ServerEvent, RouteEvent):
        bits = {name: bit for name, bit in vars(events).items() if name.isupper()}
        assert bits
        assert bits == {name: numbers[name] for name in bits}


def test_limits_that_the_console_shows_are_those_of_the_relay() -> None:
    sizes = constants("io.pxd", "")
    assert BUFFER_LIMITS["client_bytes_held_max"] == sizes["CHUNK"]
    assert BUFFER_LIMITS["client_bytes_queued_max"] == sizes["READ_SIZE"] + 2 * sizes["CHUNK"]
    states = constants("engine.pxd", "CLIENT_")
    assert constants("../console/client_rows.pyx", "")["WAITING"] == states["WAITING"]
    assert states == {"IDLE": 1, "WAITING": 2, "ACTIVE": 3, "LEAVING": 4, "CLOSED": 5}
