"""What clients are told at the end of a login, and which startup packets need a server for it."""

from types import SimpleNamespace
from typing import cast

import pytest

from gpooler.client.greeting import (
    MAX_KNOWN,
    Greetings,
    application_name,
    overrides,
    startup_key,
    statuses,
)
from gpooler.errors import TooManyParameters
from gpooler.relay.params import ParameterSet
from gpooler.routing.route import Route

REPORTED = {"TimeZone": "UTC", "DateStyle": "ISO, MDY", "server_version": "15.1", "application_name": ""}


def route(parameters: dict[str, str] | None) -> Route:
    """As much of a route as a greeting looks at."""
    return cast(Route, SimpleNamespace(parameters=parameters, version=0))


def as_set(parameters: dict[str, str]) -> ParameterSet:
    return ParameterSet.of({name.encode(): value.encode() for name, value in parameters.items()}, True)


def told(greetings: Greetings, of: Route, packet: dict[str, str], name: str = "") -> dict[bytes, bytes]:
    found = greetings.find(of, startup_key(packet), name)
    assert found is not None
    return dict(found.parameters.items(is_reported=True))


def test_nobody_is_greeted_before_a_server_was_reached() -> None:
    assert Greetings().find(route(None), (), "") is None


def test_a_client_without_wishes_gets_what_servers_report() -> None:
    found = Greetings().find(route(REPORTED), (), "")
    assert found is not None
    for name, value in REPORTED.items():
        assert f"{name}\0{value}\0".encode() in found.statuses


def test_an_application_name_needs_no_server() -> None:
    greetings, one = Greetings(), route(REPORTED)
    assert startup_key({"application_name": "psql"}) == ()
    assert told(greetings, one, {"application_name": "psql"}, "psql")[b"application_name"] == b"psql"
    assert told(greetings, one, {"application_name": "other"}, "other")[b"application_name"] == b"other"


@pytest.mark.parametrize("name", ["é", "tab\t", "\x7f"])
def test_an_application_name_that_is_not_plain_is_tried_on_a_server(name: str) -> None:
    assert startup_key({"Application_Name": name}) == (("application_name", name),)


def test_other_parameters_are_tried_on_a_server_once() -> None:
    greetings, one, packet = Greetings(), route(REPORTED), {"timezone": "europe/berlin"}
    assert greetings.find(one, startup_key(packet), "") is None
    greetings.learn(startup_key(packet), as_set({**REPORTED, "TimeZone": "Europe/Berlin"}))
    assert told(greetings, one, packet)[b"TimeZone"] == b"Europe/Berlin"
    # only what this packet chose is remembered
    assert greetings.find(one, startup_key({"TimeZone": "nonsense"}), "") is None
    assert told(greetings, one, {})[b"TimeZone"] == b"UTC"


def test_the_case_and_order_of_names_make_no_difference() -> None:
    one = startup_key({"TimeZone": "UTC", "DateStyle": "ISO"})
    assert one == startup_key({"datestyle": "ISO", "timezone": "UTC"})
    assert one != startup_key({"TimeZone": "utc", "DateStyle": "ISO"})


def test_what_servers_report_anew_is_told_from_then_on_and_what_was_chosen_stays() -> None:
    greetings, one, packet = Greetings(), route(REPORTED), {"timezone": "Europe/Berlin"}
    greetings.learn(startup_key(packet), as_set({**REPORTED, "TimeZone": "Europe/Berlin"}))
    assert told(greetings, one, packet)[b"DateStyle"] == b"ISO, MDY"
    one.parameters = {**REPORTED, "DateStyle": "German, DMY", "TimeZone": "Asia/Tokyo"}
    one.version += 1
    assert told(greetings, one, packet)[b"DateStyle"] == b"German, DMY"
    assert told(greetings, one, packet)[b"TimeZone"] == b"Europe/Berlin"
    assert told(greetings, one, {})[b"TimeZone"] == b"Asia/Tokyo"


def test_what_is_remembered_has_a_limit() -> None:
    greetings, one = Greetings(), route(REPORTED)
    for number in range(MAX_KNOWN + 1):
        greetings.learn(startup_key({"search_path": f"s{number}"}), as_set(REPORTED))
        told(greetings, one, {}, f"name {number}")
    assert greetings.find(one, startup_key({"search_path": "s0"}), "") is None
    assert greetings.find(one, startup_key({"search_path": "s1"}), "") is not None
    assert len(greetings._ready) <= MAX_KNOWN


def test_more_parameters_than_a_session_can_have_are_refused() -> None:
    many = {f"x.{number}": "" for number in range(401)}
    with pytest.raises(TooManyParameters, match="too many startup parameters"):
        overrides(many)
    greetings, key = Greetings(), startup_key(many)
    greetings.learn(key, as_set({f"x.{number}": "" for number in range(400)}))
    with pytest.raises(TooManyParameters):
        greetings.find(route(REPORTED), key, "")


@pytest.mark.parametrize(
    ("name", "host", "result"),
    [
        ("psql", None, "psql"),
        ("x" * 70, None, "x" * 63),
        ("psql", "10.0.0.1:5000", "psql - 10.0.0.1:5000"),
        ("", "local", " - local"),
        ("x" * 70, "local", "x" * 55 + " - local"),
        ("é", "local", "?? - local"),
    ],
)
def test_application_name_is_cut_as_postgresql_does(name: str, host: str | None, result: str) -> None:
    assert application_name(name, host) == result


def test_statuses_are_messages_of_what_is_reported_only() -> None:
    parameters = as_set({"TimeZone": "UTC"}).merged(overrides({"search_path": "s"}))
    assert statuses(parameters) == b"S\0\0\0\x11TimeZone\0UTC\0"
