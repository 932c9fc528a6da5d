"""TLS with servers: libpq's modes, certificates both ways, channel binding, cancels, and moving leases."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import psycopg
import pytest

from tests.harness import PASSWORD, Gpooler, Postgres, eventually
from tests.harness.certificates import Certificates
from tests.harness.client import ServerError, query

Factory = Callable[..., Gpooler]
HBA = """
local     all all         trust
host      all postgres    127.0.0.1/32 trust
host      all any_user    127.0.0.1/32 scram-sha-256
hostssl   all tls_user    127.0.0.1/32 scram-sha-256
hostssl   all cert_user   127.0.0.1/32 cert
"""
USERS = ("any_user", "tls_user", "cert_user")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def tls_postgres(files: Certificates) -> Iterator[Postgres]:
    """PostgreSQL with TLS: whom it takes with, without, either way, and by certificate."""
    cluster = Postgres(15, hba=HBA)
    cluster.settings |= {
        "ssl": "on",
        "ssl_cert_file": cluster.own(files.pem("server"), "server.pem"),
        "ssl_key_file": cluster.own(files.key("server"), "server.key"),
        "ssl_ca_file": cluster.own(files.pem("ca"), "ca.pem"),
    }
    with cluster:
        for user in USERS:
            cluster.query(f"CREATE ROLE {user} LOGIN PASSWORD '{PASSWORD}'")
        cluster.query("GRANT pg_read_all_stats TO any_user, tls_user")
        yield cluster


@pytest.fixture
def make(tls_postgres: Postgres, gpooler_factory: Factory) -> Callable[..., Gpooler]:
    def start(user: str, mode: str, rule: dict[str, object] | None = None, **options: object) -> Gpooler:
        storage = {"host": "localhost", "tls": mode, **options}
        config = {"storage": {"postgres": storage}}
        own = {"storage_user": user, "storage_password": PASSWORD, "pool_size": 1, **(rule or {})}
        return gpooler_factory(tls_postgres, rule=own, config=config)

    return start


def is_encrypted(gpooler: Gpooler) -> bool:
    """Whether its server connection is; raises ServerError when there can be none."""
    with gpooler.raw() as client:
        client.login()
        rows = client.query("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        return rows == [["t"]]


def test_a_query_of_gpooler_s_own_goes_over_tls(
    tls_postgres: Postgres, gpooler_factory: Factory, files: Certificates
) -> None:
    """With every TLS option of its storage; the secret it gives then opens a server over TLS."""
    tls_postgres.query(f"""
        CREATE TABLE secrets AS SELECT 'anna' AS name, '{PASSWORD}' AS secret;
        CREATE VIEW encrypted AS SELECT version = 'TLSv1.2' FROM pg_stat_ssl WHERE pid = pg_backend_pid();
        GRANT SELECT ON secrets, encrypted TO tls_user
    """)
    asker = {
        "authentication": "block",
        "storage": "postgres",
        "storage_user": "tls_user",
        "storage_password": PASSWORD,
        "pool": "session",
        "pool_routing": "internal",
    }
    rule = {
        "authentication": "scram-sha-256",
        "auth_query": "SELECT name, secret FROM secrets WHERE name = $1 AND (TABLE encrypted)",
        "auth_query_db": "postgres",
        "auth_query_user": "asker",
        "storage_user": "tls_user",
        "storage_password": PASSWORD,
    }
    options = {
        "tls_ca_file": files.pem("ca"),
        "tls_crl_file": files.pem("crl"),
        "tls_protocols": "tlsv1.2",
    }
    config = {
        "storage": {"postgres": {"host": "localhost", "tls": "verify_full", **options}},
        "database": {"postgres": {"user": {"asker": asker}}},
    }
    gpooler = gpooler_factory(tls_postgres, rule=rule, config=config)
    with gpooler.connect("anna") as connection:
        assert connection.execute("SELECT current_user").fetchone() == ("tls_user",)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        gpooler.connect("anna", password="wrong")


def test_a_server_without_tls_is_told_in_the_log(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, config={"storage": {"postgres": {"tls": "require"}}})
    with pytest.raises(ServerError):
        is_encrypted(gpooler)
    eventually(lambda: "the server does not do TLS" in gpooler.log())


def test_a_unix_socket_has_no_tls(postgres: Postgres, gpooler_factory: Factory) -> None:
    """Whatever the mode, as with libpq."""
    storage = {"host": f"unix://{postgres.socket_dir}", "tls": "require"}
    assert not is_encrypted(gpooler_factory(postgres, config={"storage": {"postgres": storage}}))


@pytest.mark.parametrize(
    ("mode", "host", "authority", "cause"),
    [
        ("verify_full", "127.0.0.1", "ca", None),
        ("verify_ca", "localhost", "stranger", "certificate verify failed"),
        ("require", "localhost", "stranger", "certificate verify failed"),
        ("verify_full", "localhost", "stranger", "certificate verify failed"),
    ],
)
def test_authorities_decide(
    make: Callable[..., Gpooler], files: Certificates, mode: str, host: str, authority: str, cause: str | None
) -> None:
    gpooler = make("any_user", mode, tls_ca_file=files.pem(authority), host=host)
    if cause is None:
        assert is_encrypted(gpooler)
    else:
        with pytest.raises(ServerError) as caught:
            is_encrypted(gpooler)
        assert caught.value.sqlstate == "08006"
        eventually(lambda: cause in gpooler.log())


@pytest.mark.parametrize(
    ("name", "mode", "is_taken"),
    [
        ("other_host", "verify_ca", True),
        ("other_host", "verify_full", False),
        ("expired", "require", True),
        ("expired", "verify_ca", False),
        ("revoked", "verify_ca", False),
        ("chained", "verify_full", True),
        ("rsa", "verify_full", True),
    ],
)
def test_certificates_of_the_server(
    files: Certificates, gpooler_factory: Factory, name: str, mode: str, is_taken: bool
) -> None:
    cluster = Postgres(15, hba=HBA)
    cluster.settings |= {
        "ssl": "on",
        "ssl_cert_file": cluster.own(files.pem(name), "server.pem"),
        "ssl_key_file": cluster.own(files.key(name), "server.key"),
    }
    options = {"tls_ca_file": files.pem("ca"), "tls_crl_file": files.pem("crl")} if "verify" in mode else {}
    if name == "chained":
        del options["tls_crl_file"]  # the authority in between has none
    with cluster:
        gpooler = gpooler_factory(
            cluster,
            rule={"storage_user": "postgres"},
            config={"storage": {"postgres": {"host": "localhost", "tls": mode, **options}}},
        )
        if is_taken:
            assert is_encrypted(gpooler)
        else:
            with pytest.raises(ServerError):
                is_encrypted(gpooler)
        gpooler.stop()


def test_who_has_no_certificate_opens_no_server_that_asks_for_one(make: Callable[..., Gpooler]) -> None:
    with pytest.raises(ServerError):
        is_encrypted(make("cert_user", "require"))


def test_bytes_behind_the_answer_close_the_connection(make: Callable[..., Gpooler]) -> None:
    """What somebody put behind the S was never encrypted."""

    def answer(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(8)
                    connection.sendall(b"SE\0\0\0\4")
                    while connection.recv(4096):
                        pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        gpooler = make("tls_user", "require", host="127.0.0.1", port=listener.getsockname()[1])
        with pytest.raises(ServerError):
            is_encrypted(gpooler)
        eventually(lambda: "sent bytes behind its answer" in gpooler.log())
        listener.shutdown(socket.SHUT_RDWR)


def test_queries_over_tls_are_cancelled(make: Callable[..., Gpooler], tls_postgres: Postgres) -> None:
    gpooler = make("tls_user", "require", {"pool_reset_timeout_ms": 9000})
    with gpooler.raw() as client:
        client.login()
        client.send(query("SELECT pg_sleep(30)"))
        eventually(lambda: any("pg_sleep(30)" in one.query for one in tls_postgres.activity()))
        connection = psycopg.connect(gpooler.dsn())
        connection.close()
    # its client is gone: the query is cancelled, and the server used again
    with gpooler.raw() as client:
        assert client.login().query("SELECT 1") == [["1"]]
    assert gpooler.log().count("server connected") == 1


def test_a_dead_worker_s_servers_are_cancelled_over_tls(
    tls_postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(
        tls_postgres,
        rule={"storage_user": "tls_user", "storage_password": PASSWORD, "pool_size": 1},
        config={"storage": {"postgres": {"host": "localhost", "tls": "require"}}},
    )
    with gpooler.raw() as client:
        client.login()
        client.send(query("SELECT pg_sleep(60)"))
        eventually(lambda: any("pg_sleep(60)" in one.query for one in tls_postgres.activity()))
        os.kill(gpooler.worker_pids()[0], signal.SIGKILL)
        client.read_to_end()
    eventually(lambda: not any("pg_sleep(60)" in one.query for one in tls_postgres.activity()))

    def works() -> bool:
        with psycopg.connect(gpooler.dsn()) as connection:
            return connection.execute("SELECT 1").fetchone() == (1,)

    def works_again() -> bool:
        try:
            return works()
        except psycopg.OperationalError:
            return False

    eventually(works_again, within=15)


def test_the_right_to_open_moves_between_workers(tls_postgres: Postgres, gpooler_factory: Factory) -> None:
    """A session cannot be passed on: the server is closed here and opened there, within the limit."""
    gpooler = gpooler_factory(
        tls_postgres,
        rule={"storage_user": "tls_user", "storage_password": PASSWORD, "pool_size": 1},
        config={
            "storage": {"postgres": {"host": "localhost", "tls": "require"}},
            "performance": {"workers": 2},
        },
    )
    clients = [gpooler.raw() for _ in range(6)]
    try:
        for client in clients:
            client.login()
        for _ in range(3):
            for client in clients:
                assert client.query("SELECT 1") == [["1"]]
            assert len([one for one in tls_postgres.activity() if one.usename == "tls_user"]) <= 1
    finally:
        for client in clients:
            client.close()


def test_large_results_and_slow_clients(make: Callable[..., Gpooler]) -> None:
    gpooler = make("tls_user", "require")
    with gpooler.raw() as client:
        client.login()
        client.send(query("SELECT n, repeat('x', 1000) FROM generate_series(1, 60000) n"))
        rows = 0
        while (message := client.read()).kind != b"Z":
            rows += message.kind == b"D"
        assert rows == 60_000
        text = "y" * 3_000_000
        assert client.query(f"SELECT length('{text}')") == [["3000000"]]


def test_a_server_that_dies_is_told_as_without_tls(
    make: Callable[..., Gpooler], tls_postgres: Postgres
) -> None:
    gpooler = make("tls_user", "require")
    with gpooler.raw() as client:
        client.login()
        pid = client.query("SELECT pg_backend_pid()")[0][0]
        eventually(lambda: len(tls_postgres.activity()) == 1)
        tls_postgres.query(f"SELECT pg_terminate_backend({pid})")
        eventually(lambda: not tls_postgres.activity())
        assert client.query("SELECT 1") == [["1"]]  # parked: nobody sees it
        client.query("BEGIN")
        pid = client.query("SELECT pg_backend_pid()")[0][0]
        tls_postgres.query(f"SELECT pg_terminate_backend({pid})")
        with pytest.raises((ServerError, EOFError)) as caught:
            client.query("SELECT 1")
        if isinstance(caught.value, ServerError):
            assert caught.value.sqlstate == "57P01"
