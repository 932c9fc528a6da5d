"""Which rule a client gets, over which listener it comes, and which storage it reaches."""

import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.harness import PASSWORD, Gpooler, Postgres, RawClient, eventually, free_port
from tests.harness.client import ServerError, startup

Factory = Callable[..., Gpooler]

NO_RULE = ("3D000", "28P01")  # an unknown database; an unknown user looks like a wrong password


@pytest.fixture
def socket_dir() -> Iterator[Path]:
    """A directory with a short path for Unix sockets."""
    directory = Path(tempfile.mkdtemp(prefix="gp-"))
    yield directory
    shutil.rmtree(directory)


def rule(name: str, **options: Any) -> dict[str, Any]:
    """A rule whose clients see its name as ``gpooler.rule``."""
    return {
        "authentication": "none",
        "storage": "postgres",
        "storage_db": "app",
        "storage_user": "trust_user",
        "pool": "transaction",
        "pool_size": 2,
        "backend_startup_options": {"gpooler.rule": name},
        **options,
    }


def databases(is_sequential: bool = False, **users: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with these databases, in this order, each with these users."""
    tables: dict[str, Any] = {name: {"user": user} for name, user in users.items()}
    if "default" not in tables:
        tables["default"] = None
    return {"database": tables, "routing": {"sequential_routing": is_sequential}}


def rule_of(client: RawClient, user: str, database: str) -> str | None:
    """The name of the rule that a login gets; None when there is none."""
    with client:
        try:
            client.login(user, database)
        except ServerError as error:
            if error.sqlstate in NO_RULE:
                return None
            raise
        (row,) = client.query("SELECT current_setting('gpooler.rule')")
        return row[0]


PAIRS = databases(
    default={"default": rule("d/d"), "anna": rule("d/anna")},
    shop={"default": rule("shop/d"), "anna": rule("shop/anna")},
)


def test_the_most_specific_names_win(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, config=PAIRS)
    for user, database, expected in (
        ("anna", "shop", "shop/anna"),
        ("bert", "shop", "shop/d"),
        ("anna", "other", "d/anna"),
        ("bert", "other", "d/d"),
        ("default", "default", "d/d"),
        ("ANNA", "shop", "shop/d"),
        ("anna", "Shop", "d/anna"),
    ):
        assert rule_of(gpooler.raw(), user, database) == expected


@pytest.mark.parametrize("is_sequential", [True, False])
def test_the_order_of_the_file_counts_only_with_sequential_routing(
    postgres: Postgres, gpooler_factory: Factory, is_sequential: bool
) -> None:
    config = databases(
        is_sequential,
        shop={"default": rule("shop/d"), "anna": rule("shop/anna")},
        other={"anna": rule("other/anna"), "default": rule("other/d")},
    )
    gpooler = gpooler_factory(postgres, config=config)
    assert rule_of(gpooler.raw(), "anna", "shop") == ("shop/d" if is_sequential else "shop/anna")
    assert rule_of(gpooler.raw(), "anna", "other") == "other/anna"
    assert rule_of(gpooler.raw(), "bert", "other") == "other/d"


def test_with_sequential_routing_a_default_at_the_top_takes_everybody(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    config = databases(True, default={"default": rule("d/d")}, shop={"anna": rule("shop/anna")})
    gpooler = gpooler_factory(postgres, config=config)
    assert rule_of(gpooler.raw(), "anna", "shop") == "d/d"


@pytest.mark.parametrize("is_sequential", [True, False])
def test_the_rules_of_an_array_are_told_apart_by_address_and_kind_of_connection(
    postgres: Postgres, gpooler_factory: Factory, socket_dir: Path, is_sequential: bool
) -> None:
    port = free_port()
    several = [
        rule("local", connection_type="local"),
        rule("tls", connection_type="hostssl"),
        rule("two", address="127.0.0.2/32"),
        rule("three-plain", address="127.0.0.3/32", connection_type="hostnossl"),
        rule("three", address="127.0.0.3/32"),
        rule("six", address="::1/128"),
        rule("rest", connection_type="host"),
    ]
    few = [rule("two", address="127.0.0.2/31"), rule("tls", connection_type="hostssl")]
    for each in several + few:
        each |= {"authentication": "clear_text", "password": PASSWORD}
    config = {
        **databases(is_sequential, shop={"anna": several, "bert": few}),
        "listen": [{"host": "*", "port": port}, {"port": port}],
        "service": {"unix_socket_dir": str(socket_dir), "unix_socket_mode": "0666"},
    }
    gpooler_factory(postgres, config=config, port=port)
    for client, expected, other in (
        (RawClient(port, str(socket_dir)), "local", None),
        (RawClient(port, source="127.0.0.1"), "rest", None),
        (RawClient(port, source="127.0.0.2"), "two", "two"),
        (RawClient(port, source="127.0.0.3"), "three-plain", "two"),
        (RawClient(port, source="127.0.0.4"), "rest", None),
        (RawClient(port, "::1"), "six", None),
    ):
        source = client.socket.getsockname()
        assert rule_of(client, "anna", "shop") == expected, source
        if client.socket.family is socket.AF_UNIX:
            again = RawClient(port, str(socket_dir))
        else:
            again = RawClient(port, "::1" if ":" in source[0] else "127.0.0.1", source=source[0])
        assert rule_of(again, "bert", "shop") == other, source


def test_a_rule_for_our_own_queries_is_never_a_clients(postgres: Postgres, gpooler_factory: Factory) -> None:
    config = databases(shop={"anna": rule("internal", pool_routing="internal"), "default": rule("shop/d")})
    gpooler = gpooler_factory(postgres, config=config)
    assert rule_of(gpooler.raw(), "anna", "shop") == "shop/d"


def test_database_and_user_of_the_storage_replace_the_clients(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    kept = rule("kept", authentication="clear_text", password=PASSWORD)
    del kept["storage_db"], kept["storage_user"]
    config = databases(
        app={
            "md5_user": kept,
            "mapped": rule("mapped", storage_user="password_user", storage_password=PASSWORD),
        },
        elsewhere={"default": rule("elsewhere", storage_db="postgres")},
    )
    gpooler = gpooler_factory(postgres, config=config)
    for user, database, expected in (
        ("md5_user", "app", ["app", "md5_user"]),
        ("mapped", "app", ["app", "password_user"]),
        ("anybody", "elsewhere", ["postgres", "trust_user"]),
    ):
        with gpooler.raw() as client:
            client.login(user, database)
            assert client.query("SELECT current_database(), current_user") == [expected]


def test_clients_with_one_name_at_the_server_share_a_pool(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, config=databases(default={"default": rule("all", pool_size=1)}))
    pids = set()
    for user, database in (("anna", "shop"), ("bert", "shop"), ("anna", "other")):
        with gpooler.raw() as client:
            client.login(user, database)
            pids.add(client.query("SELECT pg_backend_pid()")[0][0])
    assert len(pids) == 1


def test_clients_with_names_of_their_own_at_the_server_have_a_pool_each(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    own = rule("own", pool_size=1)
    gpooler = gpooler_factory(
        postgres, config=databases(default={"default": {**own, "storage_db": None, "storage_user": None}})
    )
    with gpooler.raw() as first, gpooler.raw() as second, gpooler.raw() as third:
        first.login("trust_user", "app")
        second.login("trust_user", "postgres")
        third.login("postgres", "app")
        for client in (first, second, third):
            client.query("BEGIN")
        assert sorted((row.usename, row.datname) for row in postgres.activity()) == [
            ("postgres", "app"),
            ("trust_user", "app"),
            ("trust_user", "postgres"),
        ]
        for client in (first, second, third):
            client.query("COMMIT")


def test_several_listeners_are_open_at_once(
    postgres: Postgres, gpooler_factory: Factory, socket_dir: Path
) -> None:
    ports = [free_port() for _ in range(3)]
    config = {
        "listen": [
            {"host": "127.0.0.1", "port": ports[0]},
            {"host": "::1", "port": ports[1]},
            {"host": "localhost", "port": ports[2]},
            {"port": ports[1]},
        ],
        "service": {"unix_socket_dir": str(socket_dir), "unix_socket_mode": "0660"},
        "performance": {"workers": 2},
    }
    gpooler = gpooler_factory(postgres, config=config, port=ports[0])
    path = socket_dir / f".s.PGSQL.{ports[1]}"
    assert path.stat().st_mode & 0o777 == 0o660
    for host, port in (
        ("127.0.0.1", ports[0]),
        ("::1", ports[1]),
        ("127.0.0.1", ports[2]),
        (str(socket_dir), ports[1]),
    ):
        with psycopg.connect(gpooler.dsn(host=host, port=port)) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
    for host, port in (("127.0.0.1", ports[1]), ("::1", ports[0])):
        with pytest.raises(OSError, match="refused"):
            RawClient(port, host)
    gpooler.stop()
    assert list(socket_dir.iterdir()) == []


def test_a_storage_is_reached_over_every_transport(postgres: Postgres, gpooler_factory: Factory) -> None:
    directory = str(postgres.socket_dir)
    port = postgres.port
    storages: dict[str, dict[str, Any]] = {
        "v4": {"host": "127.0.0.1", "port": port},
        "v6": {"host": "[::1]", "port": port},
        "with_port": {"host": f"127.0.0.1:{port}", "port": 1},
        "v6_with_port": {"host": f"[::1]:{port}", "port": 1},
        "scheme": {"host": f"tcp://127.0.0.1:{port}"},
        "name": {"host": "localhost", "port": port},
        "unix": {"host": f"unix://{directory}", "port": port},
        "unix_with_port": {"host": f"unix://{directory}:{port}"},
        "path": {"host": directory, "port": port},
        "none": {"port": port},
    }
    config = {
        "storage": {name: {"type": "remote", **storage} for name, storage in storages.items()},
        "service": {"unix_socket_dir": directory, "unix_socket_mode": "0666"},
        **databases(**{name: {"default": rule(name, storage=name)} for name in storages}),
    }
    gpooler = gpooler_factory(postgres, config=config)
    for name in storages:
        with gpooler.raw() as client:
            client.login("anna", name)
            ((address,),) = client.query("SELECT host(inet_server_addr())")
            if name.startswith(("unix", "path", "none")):
                assert address is None, name
            else:
                assert address in ("::1", "127.0.0.1"), name
                assert ("v6" in name) == (address == "::1") or name == "name"
        # a cancel request finds its way by the same transport
        with gpooler.connect("anna", name) as connection:
            connection.pgconn.send_query(b"SELECT pg_sleep(60)")
            eventually(lambda: [row for row in postgres.activity() if row.state == "active"])
            connection.cancel_safe()
            result = connection.pgconn.get_result()
            assert result is not None
            assert result.error_field(psycopg.pq.DiagnosticField.SQLSTATE) == b"57014"
            while connection.pgconn.get_result() is not None:
                pass


def test_an_address_that_resolves_to_nothing_is_an_error_of_that_route_alone(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    config = {
        "storage": {"lost": {"type": "remote", "host": "no-such-host.invalid", "port": 5432}},
        **databases(lost={"default": rule("lost", storage="lost")}, shop={"default": rule("shop")}),
    }
    gpooler = gpooler_factory(postgres, config=config)
    with gpooler.raw() as client:
        client.send(startup("anna", "lost"))
        error = client.read_to_end()[-1].fields()
        assert (error["S"], error["C"]) == ("FATAL", "08006")
    eventually(lambda: "cannot resolve no-such-host.invalid" in gpooler.log())
    assert rule_of(gpooler.raw(), "anna", "shop") == "shop"
