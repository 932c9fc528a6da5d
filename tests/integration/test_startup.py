"""From the first byte to ReadyForQuery: encryption requests, versions, keys, parameters.

What a direct login says is asked of PostgreSQL itself each time, so that nothing here is written by heart.
"""

import struct
from collections.abc import Callable, Mapping
from contextlib import closing

import psycopg
import pytest

from tests.harness import Gpooler, Postgres, RawClient, eventually
from tests.harness.client import (
    GSSENC_REQUEST,
    PROTOCOL_3_0,
    SSL_REQUEST,
    ServerError,
    cancel_request,
    query,
    startup,
)

Factory = Callable[..., Gpooler]

PROTOCOL_3_2 = PROTOCOL_3_0 | 2
POOLS = pytest.mark.parametrize("pool", ["session", "transaction"])

# What clients send at startup: habits of drivers, lists, units, values PostgreSQL rewrites, unknown names.
PARAMETERS: list[Mapping[str, str]] = [
    {},
    {"application_name": "shop"},
    {"application_name": "x" * 80},
    {"application_name": "caf\u00e9 \t bar"},
    {"client_encoding": "UTF8", "DateStyle": "ISO", "TimeZone": "Europe/Zurich", "extra_float_digits": "2"},
    {"client_encoding": "latin1"},
    {"datestyle": "German"},
    {"DateStyle": "SQL, DMY"},
    {"timezone": "+3"},
    {"intervalstyle": "iso_8601", "STANDARD_CONFORMING_STRINGS": "off"},
    {"search_path": 'app, "$user", public'},
    {"options": "-c search_path=one,two -c statement_timeout=5min --work-mem=8MB"},
    {"options": "-c TimeZone=America/New_York", "TimeZone": "Asia/Tokyo"},
    {"options": r"-c application_name=with\ space -c geqo=off"},
    {"work_mem": "64MB", "lock_timeout": "250", "my.setting": "it's \\ 'quoted'"},
    {"default_transaction_isolation": "serializable", "default_transaction_read_only": "on"},
    {"bytea_output": "escape", "role": "trust_user"},
]
SHOWN = (
    "application_name", "client_encoding", "DateStyle", "TimeZone", "IntervalStyle", "search_path",
    "work_mem", "standard_conforming_strings", "statement_timeout", "lock_timeout", "extra_float_digits",
    "geqo", "default_transaction_isolation", "default_transaction_read_only", "bytea_output", "role",
)  # fmt: skip

REFUSED_PARAMETERS: list[Mapping[str, str]] = [
    {"TimeZone": "nonsense"},
    {"client_encoding": "klingon"},
    {"nosuch": "1"},
    {"statement_timeout": "5 parsecs"},
    {"options": "-c work_mem=lots"},
    {"application_name": "shop", "DateStyle": "Klingon"},
]


def logged_in(port: int, **parameters: str) -> RawClient:
    client = RawClient(port)
    try:
        return client.login(**parameters)
    except BaseException:
        client.close()
        raise


def settings(client: RawClient) -> dict[str, str | None]:
    """What the session has, whether it is reported or not."""
    names = ", ".join(f"current_setting('{name}')" for name in SHOWN)
    mine = "nullif(current_setting('my.setting', true), '')"  # PostgreSQL keeps the name once it was set
    (row,) = client.query(f"SELECT {names}, {mine}")
    return dict(zip((*SHOWN, "my.setting"), row, strict=True))


def refusal(port: int, **parameters: str) -> dict[str, str]:
    with RawClient(port) as client, pytest.raises(ServerError) as caught:
        client.login(**parameters)
    return caught.value.fields


def test_encryption_requests_in_either_order_are_answered_no(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres)
    for requests in (
        [],
        [SSL_REQUEST],
        [GSSENC_REQUEST],
        [SSL_REQUEST, GSSENC_REQUEST],
        [GSSENC_REQUEST, SSL_REQUEST],
    ):
        with gpooler.raw() as client:
            for request in requests:
                client.send(request)
                assert client.receive(1) == b"N"
            assert client.login().query("SELECT 7") == [["7"]]


@pytest.mark.parametrize("request_", [SSL_REQUEST, GSSENC_REQUEST], ids=["ssl", "gssenc"])
def test_the_same_encryption_request_twice_breaks_the_protocol(
    postgres: Postgres, gpooler_factory: Factory, request_: bytes
) -> None:
    with gpooler_factory(postgres).raw() as client:
        client.send(request_)
        assert client.receive(1) == b"N"
        client.send(request_)
        (error,) = client.read_to_end()
        assert (error.fields()["S"], error.fields()["C"]) == ("FATAL", "08P01")


def test_bytes_behind_an_encryption_request_are_refused(postgres: Postgres, gpooler_factory: Factory) -> None:
    with gpooler_factory(postgres).raw() as client:
        client.send(SSL_REQUEST, startup("trust_user", "app"))
        (error,) = client.read_to_end()
        assert (error.fields()["S"], error.fields()["C"]) == ("FATAL", "08P01")


@POOLS
def test_each_minor_version_is_spoken_with_keys_of_its_length(
    postgres: Postgres, gpooler_factory: Factory, pool: str
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool": pool})
    for minor, length in ((0, 4), (1, 4), (2, 32)):
        with gpooler.raw() as client:
            client.send(startup("trust_user", "app", PROTOCOL_3_0 | minor))
            kinds = {message.kind: message.body for message in client.read_until()}
            assert b"v" not in kinds
            # a session pool hands out the server's own key, and we speak 3.0 to servers
            assert len(kinds[b"K"]) == 4 + (4 if pool == "session" else length)
            assert client.query("SELECT 1") == [["1"]]


def test_a_newer_minor_version_and_unknown_protocol_options_are_negotiated(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres)
    cases = (
        (PROTOCOL_3_0 | 9, {}, PROTOCOL_3_2, []),
        (PROTOCOL_3_0, {"_pq_.magic": "1"}, PROTOCOL_3_0, ["_pq_.magic"]),
        (PROTOCOL_3_0 | 9999, {"_pq_.a": "1", "_pq_.b": ""}, PROTOCOL_3_2, ["_pq_.a", "_pq_.b"]),
    )
    for version, parameters, spoken, names in cases:
        with gpooler.raw() as client:
            client.send(startup("trust_user", "app", version, **parameters))
            first, *rest = client.read_until()
            assert first.kind == b"v"
            assert struct.unpack_from("!ii", first.body) == (spoken, len(names))
            assert first.body[8:].split(b"\0")[:-1] == [name.encode() for name in names]
            (key,) = [message.body for message in rest if message.kind == b"K"]
            assert len(key) == 4 + (32 if spoken == PROTOCOL_3_2 else 4)


@pytest.mark.parametrize("version", [2 << 16, 4 << 16, 1234 << 16])
def test_another_major_version_is_not_spoken(
    postgres: Postgres, gpooler_factory: Factory, version: int
) -> None:
    with gpooler_factory(postgres).raw() as client:
        client.send(startup("trust_user", "app", version))
        (error,) = client.read_to_end()
        assert (error.fields()["S"], error.fields()["C"]) == ("FATAL", "0A000")


def test_libpq_18_speaks_3_2_and_cancels_with_its_long_key(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    if psycopg.pq.version() < 180000:
        pytest.skip(f"libpq is {psycopg.pq.version()}, older than 18")
    gpooler = gpooler_factory(postgres)
    with gpooler.connect(min_protocol_version="3.2", max_protocol_version="3.2") as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
        assert connection.pgconn.full_protocol_version == 30002
        connection.pgconn.send_query(b"SELECT pg_sleep(60)")
        eventually(lambda: [row for row in postgres.activity() if "pg_sleep" in row.query])
        connection.cancel_safe()
        result = connection.pgconn.get_result()
        assert result is not None
        assert result.error_field(psycopg.pq.DiagnosticField.SQLSTATE) == b"57014"
        while connection.pgconn.get_result() is not None:
            pass


def test_libpq_18_accepts_what_we_answer_to_the_version_it_greases_with(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    if psycopg.pq.version() < 180000:
        pytest.skip(f"libpq is {psycopg.pq.version()}, older than 18")
    with gpooler_factory(postgres).connect(max_protocol_version="latest") as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


@POOLS
def test_a_cancel_key_of_either_length_cancels_and_a_wrong_one_does_not(
    postgres: Postgres, gpooler_factory: Factory, pool: str
) -> None:
    # one server: another one would be opened while the first is brought back
    gpooler = gpooler_factory(postgres, rule={"pool": pool, "pool_size": 1})
    for version in (PROTOCOL_3_0, PROTOCOL_3_2):
        with gpooler.raw() as client:
            client.login(version=version)
            client.send(query("SELECT pg_sleep(60)"))
            eventually(lambda: [row for row in postgres.activity() if row.state == "active"])
            wrong = bytes(byte ^ 1 for byte in client.key)
            for pid, key in (
                (client.pid, wrong),
                (client.pid, client.key[:-1]),
                (client.pid, client.key + b"x"),
                (client.pid ^ 1, client.key),
            ):
                with gpooler.raw() as other:
                    other.send(cancel_request(pid, key))
                    other.read_to_end()
            assert [row.state for row in postgres.activity()] == ["active"]
            with gpooler.raw() as other:
                other.send(cancel_request(client.pid, client.key))
                assert other.read_to_end() == []
            with pytest.raises(ServerError) as caught:
                client.rows()
            assert caught.value.sqlstate == "57014"
            assert client.query("SELECT 1") == [["1"]]


@POOLS
def test_a_session_begins_as_on_a_direct_connection(
    any_postgres: Postgres, gpooler_factory: Factory, pool: str
) -> None:
    gpooler = gpooler_factory(any_postgres, rule={"pool": pool})
    for parameters in PARAMETERS:
        with closing(logged_in(any_postgres.port, **parameters)) as direct:
            expected = direct.parameters, settings(direct)
        for _ in range(2):  # the second time from what the first one left behind
            with closing(logged_in(gpooler.port, **parameters)) as client:
                assert client.parameters == expected[0], parameters
                assert settings(client) == expected[1], parameters


@POOLS
def test_a_parameter_postgres_refuses_fails_at_login_with_its_own_error(
    any_postgres: Postgres, gpooler_factory: Factory, pool: str
) -> None:
    gpooler = gpooler_factory(any_postgres, rule={"pool": pool, "pool_size": 1})
    for is_route_known in (False, True):
        for parameters in REFUSED_PARAMETERS:
            expected = refusal(any_postgres.port, **parameters)
            fields = refusal(gpooler.port, **parameters)
            assert {key: fields[key] for key in "SVCM"} == {key: expected[key] for key in "SVCM"}, (
                is_route_known,
                parameters,
            )
        with closing(logged_in(gpooler.port)) as client:
            assert client.query("SHOW TimeZone") == [["UTC"]]


def test_a_parameter_that_only_the_server_sets_is_refused_as_postgres_does(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres)
    for name in ("server_version", "IS_SUPERUSER", "integer_datetimes"):
        expected = refusal(postgres.port, **{name: "1"})
        fields = refusal(gpooler.port, **{name: "1"})
        assert {key: fields[key] for key in "SVC"} == {key: expected[key] for key in "SVC"}
        assert fields["M"].endswith(f": {expected['M']}")


def test_the_parameters_of_one_client_are_not_those_of_the_next(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    with (
        closing(logged_in(gpooler.port, TimeZone="Asia/Tokyo", work_mem="8MB", search_path="a, b")) as first,
        closing(logged_in(gpooler.port, application_name="second", DateStyle="German")) as second,
        closing(logged_in(postgres.port)) as plain,
        closing(logged_in(gpooler.port)) as third,
    ):
        for _ in range(2):
            mine = settings(first)
            assert (mine["TimeZone"], mine["work_mem"], mine["search_path"]) == ("Asia/Tokyo", "8MB", "a, b")
            other = settings(second)
            assert (other["TimeZone"], other["DateStyle"]) == ("UTC", "German, DMY")
            assert (other["application_name"], other["work_mem"]) == ("second", "4MB")
            assert settings(third) == settings(plain)


def test_text_is_converted_as_the_client_encoding_of_its_startup_says(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    with gpooler.connect(client_encoding="latin1") as latin, gpooler.connect() as utf:
        for _ in range(2):
            assert latin.execute("SELECT length('\u00e9'), '\u00e9'").fetchone() == (1, "\u00e9")
            assert utf.execute("SELECT length('\u20ac'), '\u20ac'").fetchone() == (1, "\u20ac")


def test_a_user_is_needed_and_the_database_is_called_like_the_user(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"storage_db": None, "storage_user": None})
    with gpooler.raw() as client:
        client.send(struct.pack("!iib", 9, PROTOCOL_3_0, 0))
        (error,) = client.read_to_end()
        assert (error.fields()["S"], error.fields()["C"]) == ("FATAL", "28000")
    with gpooler.raw() as client:
        client.send(startup("postgres", ""))
        client.read_until()
        assert client.query("SELECT current_database(), current_user") == [["postgres", "postgres"]]


def test_the_rules_options_win_over_the_clients(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"options": {"TimeZone": "Asia/Tokyo", "work_mem": "9MB"}})
    for parameters in ({}, {"timezone": "Europe/Zurich", "work_mem": "5MB", "lock_timeout": "3s"}):
        with closing(logged_in(gpooler.port, **parameters)) as client:
            assert client.parameters["TimeZone"] == "Asia/Tokyo"
            assert settings(client)["work_mem"] == "9MB"
            assert settings(client)["lock_timeout"] == parameters.get("lock_timeout", "0")


def test_backend_startup_options_go_into_the_servers_startup_packet(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(
        postgres, rule={"backend_startup_options": {"TimeZone": "Asia/Tokyo", "jit": "off"}}
    )
    with closing(logged_in(gpooler.port)) as client:
        assert client.parameters["TimeZone"] == "Asia/Tokyo"
        assert client.query("SELECT setting, source FROM pg_settings WHERE name = 'jit'") == [
            ["off", "client"]
        ]


def test_the_host_may_stand_behind_the_application_name(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"application_name_add_host": True})
    with closing(logged_in(gpooler.port, application_name="shop")) as client:
        host, port = client.socket.getsockname()
        assert client.parameters["application_name"] == f"shop - {host}:{port}"
        assert client.query("SHOW application_name") == [[f"shop - {host}:{port}"]]


def test_requests_sent_together_with_the_startup_packet_are_served(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres)
    for _ in range(2):  # with a setup, and without
        with gpooler.raw() as client:
            client.send(startup("trust_user", "app"), query("SELECT 1"), query("SELECT 2"))
            client.read_until()
            assert [client.rows(), client.rows()] == [[["1"]], [["2"]]]


def test_a_startup_packet_may_come_byte_by_byte(postgres: Postgres, gpooler_factory: Factory) -> None:
    with gpooler_factory(postgres).raw() as client:
        for byte in SSL_REQUEST:
            client.send(bytes([byte]))
        assert client.receive(1) == b"N"
        for byte in startup("trust_user", "app", application_name="slow"):
            client.send(bytes([byte]))
        client.read_until()
        assert client.query("SHOW application_name") == [["slow"]]


def test_a_session_pool_hands_out_the_servers_process_id(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool": "session", "pool_size": 2})
    with closing(logged_in(gpooler.port)) as first, closing(logged_in(gpooler.port)) as second:
        assert first.query("SELECT pg_backend_pid()") == [[str(first.pid)]]
        assert second.query("SELECT pg_backend_pid()") == [[str(second.pid)]]
        assert first.pid != second.pid
        assert {row.pid for row in postgres.activity()} == {first.pid, second.pid}


def test_other_pools_hand_out_ids_that_no_process_has(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, config={"performance": {"workers": 2}})
    with closing(logged_in(gpooler.port)) as first, closing(logged_in(gpooler.port)) as second:
        assert first.pid >= 1 << 30
        assert second.pid >= 1 << 30
        assert (first.pid, first.key) != (second.pid, second.key)


def test_a_changed_default_of_the_server_reaches_later_logins(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    """ParameterStatus at any time refreshes what logins of the route are told."""
    gpooler = gpooler_factory(postgres, config={"performance": {"workers": 2}})
    gpooler.may_be_dirty = "what was the server's default is a client's value after a reload"
    try:
        with closing(logged_in(gpooler.port)) as client:
            assert client.parameters["IntervalStyle"] == "postgres"
        postgres.query("ALTER SYSTEM SET intervalstyle = 'iso_8601'")
        postgres.query("SELECT pg_reload_conf()")

        def is_told() -> bool:
            with closing(logged_in(gpooler.port)) as client:
                assert client.query("SHOW intervalstyle") == [[client.parameters["IntervalStyle"]]]
                return client.parameters["IntervalStyle"] == "iso_8601"

        # each worker, one of them by way of the broker
        eventually(lambda: all(is_told() for _ in range(8)))
    finally:
        postgres.query("ALTER SYSTEM RESET intervalstyle")
        postgres.query("SELECT pg_reload_conf()")
        eventually(lambda: postgres.query("SHOW intervalstyle") == [("postgres",)])
