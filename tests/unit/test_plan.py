"""What a startup packet leads to, found once for all that send the same."""

from dataclasses import dataclass
from ipaddress import ip_address
from typing import cast

import pytest

from gpooler.client.entrance import Guest
from gpooler.client.plan import MAX_PACKET, MAX_PLANS, Plan, Plans
from gpooler.config.load import load_text
from gpooler.config.model import Config
from gpooler.wire.startup import Startup, parse_startup
from tests.harness.client import PROTOCOL_3_0, startup
from tests.unit.test_rules import BODY, HEAD

HERE = "192.0.2.1"


@dataclass
class Place:
    """As much of a guest as a plan looks at; an empty host is a Unix socket."""

    host: str = HERE
    port: int = 5000
    tls: None = None

    @property
    def address(self) -> bytes:
        return ip_address(self.host).packed if self.host else b""

    @property
    def family(self) -> int:
        return ip_address(self.host).version if self.host else 0


def config(*rules: str) -> Config:
    return load_text(HEAD + "".join(f"{rule}\n{BODY}" for rule in rules)).config


def packet(**parameters: str) -> bytes:
    return startup("joe", "app", PROTOCOL_3_0, **parameters)[4:]


def made(plans: Plans, data: bytes, place: Place | None = None) -> Plan:
    guest = cast(Guest, place or Place())
    said = parse_startup(data)
    assert isinstance(said, Startup)
    return plans.find(guest, data) or plans.make(guest, data, said)


def test_the_same_packet_has_the_same_plan_wherever_it_comes_from() -> None:
    plans = Plans(config("[database.app.user.joe]"), is_debug=False)
    plan = made(plans, packet())
    assert made(plans, packet(), Place("198.51.100.7")) is plan
    assert made(plans, packet(TimeZone="UTC")) is not plan


def test_rules_that_look_at_addresses_make_a_plan_for_each() -> None:
    rules = '[[database.app.user.joe]]\naddress = "192.0.2.0/24"', "[[database.app.user.joe]]"
    plans = Plans(config(*rules), is_debug=False)
    near, far, local = (made(plans, packet(), Place(host)).rule for host in (HERE, "198.51.100.7", ""))
    assert near is not None
    assert far is not None
    assert far is local
    assert near is not far
    assert str(near.address) == "192.0.2.0/24"


def test_rules_that_look_at_the_kind_of_connection_tell_sockets_apart() -> None:
    rule = '[[database.app.user.joe]]\nconnection_type = "local"'
    plans = Plans(config(rule), is_debug=False)
    assert made(plans, packet(), Place("")).rule is not None
    assert made(plans, packet(), Place(HERE)).rule is None


def test_invented_packets_do_not_fill_the_memory() -> None:
    plans = Plans(config("[database.app.user.joe]"), is_debug=False)
    large = packet(application_name="x" * MAX_PACKET)
    assert made(plans, large) is not made(plans, large)
    for number in range(3 * MAX_PLANS):
        made(plans, packet(application_name=str(number)))
        assert len(plans) <= MAX_PLANS
    assert len(plans) > 0


def test_what_cannot_be_changed_is_found_whoever_asks_for_it() -> None:
    plans = Plans(config('[database.app.user.joe]\noptions = { Server_Version = "9" }'), is_debug=False)
    assert made(plans, packet()).fixed == "Server_Version"


@pytest.mark.parametrize("option", ["", "application_name_add_host = true"])
def test_the_application_name_is_the_client_s_or_also_its_host_s(option: str) -> None:
    plan = made(
        Plans(config(f"[database.app.user.joe]\n{option}"), is_debug=False), packet(Application_Name="a")
    )
    expected = f"a - {HERE}:5000" if option else "a"
    assert plan.application_name(cast(Guest, Place())) == expected
    assert plan.named_parameters(cast(Guest, Place())) == {
        "application_name": expected,
        "Application_Name": expected,
    }


def test_without_maintained_parameters_there_are_none() -> None:
    plan = made(
        Plans(config("[database.app.user.joe]\nmaintain_params = false"), is_debug=False),
        packet(application_name="a"),
    )
    assert plan.parameters == plan.named_parameters(cast(Guest, Place())) == {}
