"""search_path is a list of names: each reaches every server as it is, however the client gave the list."""

from collections.abc import Callable, Iterator

import pytest

from tests.harness import Gpooler, Postgres, RawClient
from tests.harness.client import ServerError

Factory = Callable[..., Gpooler]

SCHEMAS = ["trust_user", "a", "b c", 'd"e', "UPPER", "x y", "x,y", "schön", "it's"]
# As startup packets, rules and roles have them: names between commas, in double quotes where they need them.
LISTS = [
    '"$user", public',
    '"$user",public',
    'a,"b c"',
    'public , "d""e"',
    '"UPPER", upper, A',
    '"x,y", "x y"',
    '"schön", "it\'s"',
    "a, pg_catalog",
    "nowhere, a",
    '""',
    "",
]
# No list: refused.
WRONG = ["'x y'", "a b", "a,,b", '"a']
# Behind SET search_path =
VALUES = [
    *LISTS[:7],
    "nowhere, a",
    "'x y'",
    "'x y', a",
    "'a, \"b c\"'",
    "''",
    "'\"$user\"', 'public'",
    "DEFAULT",
]
SHOWN = "SELECT pg_backend_pid(), current_setting('search_path'), current_schemas(true)"


@pytest.fixture
def schemas(any_postgres: Postgres) -> Iterator[Postgres]:
    quoted = ['"{}"'.format(name.replace('"', '""')) for name in SCHEMAS]
    any_postgres.query(
        "".join(f"CREATE SCHEMA {name}; GRANT ALL ON SCHEMA {name} TO PUBLIC;" for name in quoted), "app"
    )
    try:
        yield any_postgres
    finally:
        any_postgres.query(f"DROP SCHEMA {', '.join(quoted)}", "app")


@pytest.fixture(params=[False, True], ids=["", "enquoting"])
def config(request: pytest.FixtureRequest) -> dict[str, dict[str, bool]]:
    return {"routing": {"smart_search_path_enquoting": request.param}}


def escaped(value: str) -> str:
    """For the startup parameter ``options``."""
    return "".join(f"\\{char}" if char in " \\" else char for char in value)


def seen(client: RawClient) -> list[str | None]:
    return client.query(SHOWN)[0][1:]


def seen_on_two(gpooler: Gpooler, client: RawClient) -> list[list[str | None]]:
    """What the client sees on each of two servers, while others have the other one."""
    with gpooler.raw() as first, gpooler.raw() as second:
        for holder in (first, second):
            holder.login()
        [[taken]] = first.query("BEGIN; SELECT pg_backend_pid()")
        other, *before = client.query(SHOWN)[0]
        assert second.query("BEGIN; SELECT pg_backend_pid()") == [[other]]
        first.query("COMMIT")
        pid, *behind = client.query(SHOWN)[0]
        assert pid == taken != other
        second.query("COMMIT")
        for holder in (first, second):
            holder.terminate()
    return [before, behind]


def refusal(client: RawClient, **parameters: str) -> str:
    with client, pytest.raises(ServerError) as caught:
        client.login(**parameters)
    return caught.value.sqlstate


def test_a_list_given_at_login(
    schemas: Postgres, gpooler_factory: Factory, config: dict[str, object]
) -> None:
    gpooler = gpooler_factory(schemas, rule={"pool_size": 2}, config=config)
    for value in LISTS:
        for given in ({"options": f"-c search_path={escaped(value)}"}, {"search_path": value}):
            with RawClient(schemas.port) as direct, gpooler.raw() as client:
                wanted = seen(direct.login(**given))
                client.login(**given)
                assert seen_on_two(gpooler, client) == [wanted, wanted], given
                client.query("SET search_path = nowhere; RESET search_path")
                assert seen_on_two(gpooler, client) == [wanted, wanted], given
                direct.terminate()
                client.terminate()
    for value in WRONG:
        given = {"search_path": value}
        assert refusal(gpooler.raw(), **given) == refusal(RawClient(schemas.port), **given) == "22023"


@pytest.mark.parametrize("value", ['"$user", public', 'a,"b c"', '"x y", "it\'s"', '"schön"'])
def test_a_list_given_by_a_rule(
    schemas: Postgres, gpooler_factory: Factory, config: dict[str, object], value: str
) -> None:
    rule = {"pool_size": 2, "options": {"search_path": value}}
    gpooler = gpooler_factory(schemas, rule=rule, config=config)
    with RawClient(schemas.port) as direct, gpooler.raw() as client:
        wanted = seen(direct.login(search_path=value))
        client.login(search_path="nowhere")
        assert seen_on_two(gpooler, client) == [wanted, wanted]
        direct.terminate()
        client.terminate()


def test_a_list_that_is_set(schemas: Postgres, gpooler_factory: Factory, config: dict[str, object]) -> None:
    gpooler = gpooler_factory(schemas, rule={"pool_size": 2}, config=config)
    with RawClient(schemas.port) as direct, gpooler.raw() as client:
        direct.login()
        client.login()
        for value in VALUES:
            for sql in (f"SET search_path = {value}", f"SET search_path TO {value}"):
                direct.query(sql)
                client.query("SET search_path = nowhere")
                client.query(sql)
                wanted = seen(direct)
                assert seen_on_two(gpooler, client) == [wanted, wanted], sql
        for value in LISTS:
            sql = "SELECT set_config('search_path', '{}', false)".format(value.replace("'", "''"))
            direct.query(sql)
            client.query(sql)
            wanted = seen(direct)
            assert seen_on_two(gpooler, client) == [wanted, wanted], sql
        direct.terminate()
        client.terminate()


@pytest.mark.parametrize("value", ['"$user", public', 'a,"b c"', "'x y'", "'x y', \"it's\""])
def test_a_list_of_a_role(
    schemas: Postgres, gpooler_factory: Factory, config: dict[str, object], value: str
) -> None:
    schemas.query(f"ALTER ROLE trust_user SET search_path = {value}")
    try:
        gpooler = gpooler_factory(schemas, rule={"pool_size": 2}, config=config)
        with RawClient(schemas.port) as direct, gpooler.raw() as client, gpooler.raw() as other:
            wanted = seen(direct.login())
            other.login(search_path="nowhere")
            client.login()
            assert seen_on_two(gpooler, client) == [wanted, wanted]
            for sql in ("SET search_path = a", "RESET search_path"):
                direct.query(sql)
                client.query(sql)
                assert seen_on_two(gpooler, client) == [seen(direct)] * 2
                other.query("SELECT 1")
            for each in (direct, client, other):
                each.terminate()
    finally:
        schemas.query("ALTER ROLE trust_user RESET search_path")
