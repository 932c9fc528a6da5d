"""Channel binding at work: somebody between two ends of TLS whose certificate is as good as theirs."""

from collections.abc import Callable, Iterator

import psycopg
import pytest

from tests.harness import PASSWORD, Gpooler, Postgres, eventually
from tests.harness.certificates import Certificates
from tests.harness.client import ServerError
from tests.harness.middleman import Middleman

Factory = Callable[..., Gpooler]
HBA = """
local   all all        trust
host    all postgres   127.0.0.1/32 trust
hostssl all trust_user 127.0.0.1/32 trust
hostssl all scram_user 127.0.0.1/32 scram-sha-256
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def between(files: Certificates) -> Callable[[int], Middleman]:
    """Stands before a port."""
    return lambda port: Middleman(port, files.pem("rsa"), files.key("rsa"))


@pytest.fixture(scope="module")
def tls_postgres(files: Certificates) -> Iterator[Postgres]:
    cluster = Postgres(15, hba=HBA)
    cluster.settings |= {
        "ssl": "on",
        "ssl_cert_file": cluster.own(files.pem("server"), "server.pem"),
        "ssl_key_file": cluster.own(files.key("server"), "server.key"),
    }
    with cluster:
        yield cluster


def test_a_client_finds_out_who_stands_before_gpooler(
    postgres: Postgres, gpooler_factory: Factory, files: Certificates, between: Callable[[int], Middleman]
) -> None:
    rule = {"authentication": "scram-sha-256", "password": PASSWORD}
    gpooler = gpooler_factory(postgres, listener=files.options("server", "require"), rule=rule)
    options = {"host": "localhost", "hostaddr": "127.0.0.1", "sslmode": "verify-full"}
    with between(gpooler.port) as middleman:
        options |= {"port": str(middleman.port), "sslrootcert": files.pem("ca")}
        with psycopg.connect(gpooler.dsn(**options, channel_binding="disable")) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        for wanted in ("prefer", "require"):
            with pytest.raises(psycopg.OperationalError, match="SCRAM channel binding check failed"):
                psycopg.connect(gpooler.dsn(**options, channel_binding=wanted))
    eventually(lambda: gpooler.log().count("login refused: 28000 SCRAM channel binding check failed") == 2)


@pytest.mark.parametrize("user", ["trust_user", "scram_user"])
def test_gpooler_finds_out_who_stands_before_the_server(
    tls_postgres: Postgres,
    gpooler_factory: Factory,
    files: Certificates,
    between: Callable[[int], Middleman],
    user: str,
) -> None:
    with between(tls_postgres.port) as middleman:
        storage = {"port": middleman.port, "tls": "verify_full", "tls_ca_file": files.pem("ca")}
        gpooler = gpooler_factory(
            tls_postgres,
            rule={"storage_user": user, "storage_password": PASSWORD},
            config={"storage": {"postgres": storage}},
        )
        with gpooler.raw() as client:
            if user == "trust_user":  # nothing is bound to the channel
                assert client.login().query("SELECT current_user") == [[user]]
            else:
                with pytest.raises(ServerError) as caught:
                    client.login()
                assert caught.value.sqlstate == "08006"
                eventually(lambda: "SCRAM channel binding check failed" in gpooler.log())
        gpooler.stop()
