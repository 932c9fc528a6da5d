"""Session parameters: each client has its own on a shared server, and a login that asks nonsense fails."""

from collections.abc import Callable

import pytest

from gpooler.stats.registry import RouteWord
from tests.harness import Gpooler, Postgres, RawClient, eventually
from tests.harness.client import SYNC, Message, ServerError, bind, execute, parse, query

Factory = Callable[..., Gpooler]

REPORTED = ["client_encoding", "DateStyle", "TimeZone", "standard_conforming_strings", "application_name"]


def settings(client: RawClient, *names: str) -> list[str | None]:
    return client.query("SELECT " + ", ".join(f"current_setting('{name}')" for name in names))[0]


def answers(client: RawClient, sql: str) -> list[Message]:
    client.send(query(sql))
    return client.read_until()


def test_clients_that_differ_share_one_server(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    wishes: list[dict[str, str]] = [
        {},
        {"client_encoding": "LATIN1", "application_name": "one"},
        {"DateStyle": "German, DMY", "application_name": 'two\'s \\ "name"'},
        {"TimeZone": "Asia/Tokyo", "search_path": "pg_catalog, public"},
        {"search_path": '"$user", "Odd Schema"', "statement_timeout": "12345"},
        {"options": "-c work_mem=7MB -c DateStyle=SQL --geqo=off"},
        {"options": r"-c search_path=a,b\ ,c", "IntervalStyle": "iso_8601"},
        {"standard_conforming_strings": "off"},
        {"my.custom": "value 'quoted'", "application_name": "ümläut"},
    ]
    names = [
        *REPORTED, "search_path", "statement_timeout", "work_mem", "geqo", "IntervalStyle",
    ]  # fmt: skip
    direct = []
    for wish in wishes:
        with RawClient(postgres.port) as client:
            client.login(**wish)
            direct.append((dict(client.parameters), settings(client, *names)))
            client.terminate()
    clients = [gpooler.raw().login(**wish) for wish in wishes]
    for _ in range(3):
        for client, (parameters, values) in zip(clients, direct, strict=True):
            assert settings(client, *names) == values
            assert client.parameters == parameters
    assert settings(clients[-1], "my.custom") == ["value 'quoted'"]
    assert clients[0].query("SELECT current_setting('my.custom', true)") in ([[None]], [[""]])
    eventually(lambda: len(postgres.activity()) == 1)  # the direct ones end in their own time
    for client in clients:
        client.terminate()


def test_a_login_repeats_what_the_last_one_like_it_was_told(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    seen = []
    for _ in range(3):
        with gpooler.raw() as client:
            client.login(TimeZone="Europe/Berlin", application_name="again")
            seen.append(client.parameters)
            client.terminate()
    assert seen[0] == seen[1] == seen[2]
    assert seen[0]["TimeZone"] == "Europe/Berlin"
    assert seen[0]["application_name"] == "again"
    assert "server_version" in seen[0]


def test_nothing_is_deployed_between_clients_that_agree(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    clients = [gpooler.raw().login(application_name="same", TimeZone="UTC") for _ in range(3)]
    clients[0].query("SELECT 1")
    before = gpooler.route_count(RouteWord.DEPLOYS)
    for turn in range(30):
        clients[turn % 3].query("SELECT 1")
    assert gpooler.route_count(RouteWord.DEPLOYS) == before
    for client in clients:
        client.terminate()


@pytest.mark.parametrize("pool", ["transaction", "session"])
def test_a_login_with_nonsense_fails_as_on_a_direct_connection(
    postgres: Postgres, gpooler_factory: Factory, pool: str
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1, "pool": pool})
    for wish in ({"TimeZone": "nonsense"}, {"DateStyle": "Klingon"}, {"client_encoding": "EBCDIC"}):
        with RawClient(postgres.port) as client, pytest.raises(ServerError) as direct:
            client.login(**wish)
        with gpooler.raw() as client, pytest.raises(ServerError) as pooled:
            client.login(**wish)
        assert pooled.value.text == direct.value.text
        assert pooled.value.sqlstate == direct.value.sqlstate
        assert pooled.value.fields["S"] == "FATAL"
    with gpooler.raw() as client:
        client.login()
        assert client.query("SHOW TimeZone") == [["UTC"]]
    assert len(postgres.activity()) == 1


def test_set_inside_a_transaction_follows_its_client(postgres: Postgres, gpooler_factory: Factory) -> None:
    """A reported parameter set by SQL: the client keeps it, the next one does not see it."""
    gpooler = gpooler_factory(postgres, rule={"pool_size": 2})
    with gpooler.raw() as one, gpooler.raw() as two:
        one.login()
        two.login()
        one.query("SET TimeZone = 'Asia/Tokyo'")
        for _ in range(3):
            assert one.query("SHOW TimeZone") == [["Asia/Tokyo"]]
            assert two.query("SHOW TimeZone") == [["UTC"]]
        one.terminate()
        for _ in range(3):
            assert two.query("SHOW TimeZone") == [["UTC"]]


def test_set_local_ends_with_its_transaction(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    with gpooler.raw() as one, gpooler.raw() as two:
        one.login()
        two.login()
        one.query("BEGIN")
        one.query("SET LOCAL TimeZone = 'Asia/Tokyo'")
        assert one.query("SHOW TimeZone") == [["Asia/Tokyo"]]
        one.query("COMMIT")
        assert two.query("SHOW TimeZone") == [["UTC"]]
        assert one.query("SHOW TimeZone") == [["UTC"]]
        assert gpooler.route_count(RouteWord.PINS) == 0


def test_parameters_are_deployed_ahead_of_any_first_message(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    with gpooler.raw() as one, gpooler.raw() as two:
        one.login(TimeZone="Asia/Tokyo")
        two.login(TimeZone="Europe/Berlin")
        for _ in range(3):
            one.send(parse("SHOW TimeZone"), bind(), execute(), SYNC)
            kinds = one.read_until()
            assert b"".join(answer.kind for answer in kinds) == b"12DCZ"
            assert kinds[2].values() == ["Asia/Tokyo"]
            two.send(query("SHOW TimeZone"), query("SHOW TimeZone"))
            assert two.rows() == [["Europe/Berlin"]]
            assert two.rows() == [["Europe/Berlin"]]


def test_rule_options_replace_what_the_client_asks_for(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(
        postgres, rule={"pool_size": 1, "options": {"TimeZone": "Asia/Tokyo", "work_mem": "9MB"}}
    )
    with gpooler.raw() as client:
        client.login(TimeZone="Europe/Berlin")
        assert settings(client, "TimeZone", "work_mem") == ["Asia/Tokyo", "9MB"]
        assert client.parameters["TimeZone"] == "Asia/Tokyo"


@pytest.mark.parametrize("pool", ["session", "transaction"])
def test_without_maintain_params_clients_get_what_the_server_has(
    postgres: Postgres, gpooler_factory: Factory, pool: str
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool": pool, "pool_size": 1, "maintain_params": "no"})
    wanted = {"TimeZone": "Asia/Tokyo", "work_mem": "9MB", "application_name": "shop", "nosuch": "1"}
    for _ in range(2):
        with gpooler.raw() as client:
            client.login(**wanted)
            assert client.parameters["TimeZone"] == "UTC"
            assert client.parameters["application_name"] == ""
            assert settings(client, "TimeZone", "work_mem", "application_name") == ["UTC", "4MB", ""]
            client.terminate()
    assert gpooler.route_count(RouteWord.DEPLOYS) == 0


def test_without_maintain_params_what_a_client_sets_is_its_own(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 2, "maintain_params": "no"})
    with postgres.connect("app") as admin:
        admin.execute(
            "CREATE OR REPLACE FUNCTION to_tokyo() RETURNS void LANGUAGE plpgsql AS "
            "$$BEGIN SET TimeZone = 'Asia/Tokyo'; END$$"
        )
    with gpooler.raw() as one, gpooler.raw() as two:
        one.login()
        two.login()
        for change in ("SET TimeZone = 'Asia/Tokyo'", "SELECT to_tokyo()"):
            one.query(change)
            assert two.query("SHOW TimeZone") == [["UTC"]]
            assert one.query("SHOW TimeZone") == [["Asia/Tokyo"]]
            one.terminate()
            eventually(lambda: gpooler.route_count(RouteWord.SERVERS_ACTIVE) == 0)
            assert [two.query("SHOW TimeZone") for _ in range(2)] == [[["UTC"]]] * 2
            one = gpooler.raw()
            one.login()
        one.terminate()
        assert gpooler.route_count(RouteWord.DEPLOYS) == 0


def test_backend_startup_options_reach_the_server(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(
        postgres, rule={"pool_size": 1, "backend_startup_options": {"work_mem": "11MB", "jit": "off"}}
    )
    with gpooler.raw() as client:
        client.login()
        assert settings(client, "work_mem", "jit") == ["11MB", "off"]
        client.query("SET work_mem = '1MB'")
        client.terminate()
    with gpooler.raw() as client:
        client.login()
        assert settings(client, "work_mem", "jit") == ["11MB", "off"]


def test_the_host_may_be_added_to_the_application_name(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1, "application_name_add_host": True})
    with gpooler.raw() as client:
        client.login(application_name="shop")
        (name,) = settings(client, "application_name")
        host, port = client.socket.getsockname()
        assert name == f"shop - {host}:{port}"


@pytest.fixture(params=["transaction", "session"])
def named_pool(
    any_postgres: Postgres, gpooler_factory: Factory, request: pytest.FixtureRequest
) -> tuple[Postgres, Gpooler]:
    """One server for transactions, or for a session; the host stands behind every application_name."""
    rule = {"pool": request.param, "pool_size": 1, "application_name_add_host": True}
    return any_postgres, gpooler_factory(any_postgres, rule=rule)


def suffix(client: RawClient) -> str:
    host, port = client.socket.getsockname()
    return f" - {host}:{port}"


def shown_name(client: RawClient) -> str | None:
    """The application_name as pg_stat_activity has it."""
    ((name,),) = client.query("SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()")
    return name


def told_name(client: RawClient, sql: str) -> str | None:
    """The last application_name that the client is told while it waits for the end of the answer."""
    names = [
        answer.body.split(b"\0")[1].decode()
        for answer in answers(client, sql)
        if answer.kind == b"S" and answer.body.startswith(b"application_name\0")
    ]
    return names[-1] if names else None


@pytest.mark.parametrize(
    "sql",
    [
        "SET application_name = 'till'",
        "SET SESSION application_name TO till",
        "SELECT set_config('application_name', 'till', false)",
        "BEGIN; SET application_name = 'till'; COMMIT",
        "DO $$BEGIN SET application_name = 'till'; END$$",
    ],
)
def test_the_host_is_added_to_a_name_given_later(named_pool: tuple[Postgres, Gpooler], sql: str) -> None:
    _, gpooler = named_pool
    with gpooler.raw() as client:
        client.login(application_name="shop")
        wanted = "till" + suffix(client)
        assert told_name(client, sql) == wanted
        assert shown_name(client) == wanted
        assert settings(client, "application_name") == [wanted]
        assert told_name(client, "SET application_name = 'till'") == wanted
        assert shown_name(client) == wanted


def test_the_host_is_added_at_the_end_of_a_transaction(named_pool: tuple[Postgres, Gpooler]) -> None:
    _, gpooler = named_pool
    with gpooler.raw() as client:
        client.login(application_name="shop")
        shop, till = "shop" + suffix(client), "till" + suffix(client)
        for begin, end, name in (
            ("SET application_name = 'till'", "COMMIT", till),
            ("RESET application_name", "COMMIT", shop),
            ("SET application_name = 'till'", "ROLLBACK", shop),
            ("SET LOCAL application_name = 'till'", "COMMIT", shop),
            ("SAVEPOINT s; SET application_name = 'till'", "ROLLBACK TO s; COMMIT", shop),
            ("SET application_name = 'till'", "SELECT 1/0", shop),
        ):
            client.query("BEGIN")
            client.query(begin)
            if not begin.startswith("RESET"):
                assert shown_name(client) == "till"
            answers(client, end)
            if "/" in end:
                client.query("ROLLBACK")
            assert shown_name(client) == name, (begin, end)
            assert settings(client, "application_name") == [name]
            client.query("SELECT 1")


@pytest.mark.parametrize("sql", ["RESET application_name", "RESET ALL", "DISCARD ALL"])
def test_a_reset_name_has_its_host(named_pool: tuple[Postgres, Gpooler], sql: str) -> None:
    _, gpooler = named_pool
    with gpooler.raw() as client:
        client.login(application_name="shop")
        client.query("SET application_name = 'till'")
        assert told_name(client, sql) == "shop" + suffix(client)
        assert shown_name(client) == "shop" + suffix(client)


def test_a_long_or_strange_name_is_cut_for_its_host(named_pool: tuple[Postgres, Gpooler]) -> None:
    _, gpooler = named_pool
    with gpooler.raw() as client:
        client.login()
        assert shown_name(client) == suffix(client)
        for name in ("x" * 100, "é" * 40, "a - b:1", "", "it's \\ " + '"'):
            client.query("SET application_name = '{}'".format(name.replace("'", "''")))
            shown = shown_name(client)
            assert shown is not None
            assert shown.endswith(suffix(client))
            assert len(shown) <= 63
            assert shown.isascii()
            if name.isascii():
                assert shown == name[: 63 - len(suffix(client))] + suffix(client)
            assert settings(client, "application_name") == [shown]


def test_each_client_has_its_own_host_on_a_common_server(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1, "application_name_add_host": True})
    with gpooler.raw() as one, gpooler.raw() as two:
        one.login(application_name="shop")
        two.login(application_name="shop")
        one.query("SET application_name = 'till'")
        two.query("SET application_name = 'till'")
        for _ in range(2):
            assert shown_name(one) == "till" + suffix(one)
            assert shown_name(two) == "till" + suffix(two)
        # who names itself with its host keeps that
        one.query(f"SET application_name = 'desk{suffix(one)}'")
        assert shown_name(one) == "desk" + suffix(one)
        # requests sent together
        two.send(query("SET application_name = 'a'"), query("SELECT 1"), query("SET application_name = 'b'"))
        for _ in range(3):
            two.read_until()
        assert shown_name(two) == "b" + suffix(two)


def test_a_changed_default_of_the_server_reaches_new_clients_with_the_next_server(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    """Until then all get what their login was told: a reload is not told from a SET inside a function."""
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    gpooler.may_be_dirty = "what was the server's default is a client's value after a reload"

    def shown() -> str | None:
        with gpooler.raw() as client:
            client.login()
            (value,) = settings(client, "DateStyle")
            assert client.parameters["DateStyle"] == value
            client.terminate()
        return value

    assert shown() == "ISO, MDY"
    try:
        postgres.query("ALTER SYSTEM SET DateStyle = 'German'")
        postgres.query("SELECT pg_reload_conf()")
        eventually(lambda: postgres.query("SHOW DateStyle") == [("German, DMY",)])
        with gpooler.raw() as client:
            client.login()  # PostgreSQL reloads when the server's next query comes, and says so
            assert "S" in [answer.kind.decode() for answer in answers(client, "SELECT 1")]
        for _ in range(3):
            assert shown() == "ISO, MDY"
        (row,) = postgres.activity()
        postgres.terminate(row.pid)
        eventually(lambda: gpooler.route_count(RouteWord.SERVERS_IDLE) == 0)
        with gpooler.raw() as client:
            client.login()
            assert settings(client, "DateStyle") == ["ISO, MDY"]
        assert shown() == "German, DMY"
    finally:
        postgres.query("ALTER SYSTEM RESET DateStyle")
        postgres.query("SELECT pg_reload_conf()")
