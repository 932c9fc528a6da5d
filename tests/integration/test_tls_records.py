"""What a TLS server may do beneath the protocol: new keys at any moment, records in pieces, a sudden end."""

import hashlib
from collections.abc import Callable
from contextlib import suppress

import psycopg
import pytest

from tests.harness import Gpooler, Postgres, RawClient, eventually
from tests.harness.certificates import Certificates
from tests.harness.client import ServerError, query
from tests.harness.tlsproxy import TlsProxy

Factory = Callable[..., Gpooler]
Start = Callable[[TlsProxy], Gpooler]

ROWS = "SELECT n, md5(n::text), repeat('x', n % 3000) FROM generate_series(1, 10000) n"
PID = "SELECT pg_backend_pid()"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def start(postgres: Postgres, gpooler_factory: Factory, files: Certificates) -> Start:
    """A gpooler with one server, which it reaches by TLS through the proxy."""

    def start(proxy: TlsProxy) -> Gpooler:
        storage = {
            "host": "localhost",
            "port": proxy.port,
            "tls": "verify_full",
            "tls_ca_file": files.pem("ca"),
        }
        return gpooler_factory(postgres, rule={"pool_size": 1}, config={"storage": {"postgres": storage}})

    return start


def proxy(postgres: Postgres, files: Certificates, **options: int) -> TlsProxy:
    return TlsProxy(postgres.port, files.pem("server"), files.key("server"), **options)


def digest(client: RawClient, sql: str) -> str:
    """Of all messages of the answer."""
    client.send(query(sql))
    found = hashlib.sha256()
    while (message := client.read()).kind != b"Z":
        found.update(message.kind + message.body)
    return found.hexdigest()


def direct(postgres: Postgres, sql: str) -> str:
    with RawClient(postgres.port) as client:
        return digest(client.login(), sql)


def test_new_keys_in_the_middle_of_results_and_of_copy(
    postgres: Postgres, start: Start, files: Certificates
) -> None:
    """Asked for behind each 100 kB, either way: gpooler answers with its own, and not a byte is another."""
    copy = f"COPY ({ROWS}) TO STDOUT"
    with proxy(postgres, files, every=100_000) as between:
        gpooler = start(between)
        with gpooler.raw() as client:
            client.login()
            pid = client.query(PID)
            for sql in (ROWS, copy):
                assert digest(client, sql) == direct(postgres, sql)
            assert between.updates > 100
            before = between.updates
            text = "y" * 5_000_000
            assert client.query(f"SELECT length('{text}'), md5('{text}')") == [
                [str(len(text)), hashlib.md5(text.encode()).hexdigest()]
            ]
            assert between.updates > before + 10
            assert client.query(PID) == pid
            eventually(lambda: between.answers == between.updates)


def test_new_keys_while_nothing_is_said(postgres: Postgres, start: Start, files: Certificates) -> None:
    """A parked server is not taken for one that spoke out of turn; the answer comes with the next query."""
    with proxy(postgres, files) as between:
        gpooler = start(between)
        with gpooler.raw() as client:
            pid = client.login().query(PID)
            for number in range(1, 7):
                if number == 4:
                    client.query("BEGIN")
                between.update_keys()
                eventually(lambda number=number: between.updates == number)
                assert client.query(PID) == pid
                eventually(lambda number=number: between.answers == number)
            client.query("COMMIT")


@pytest.mark.parametrize("cut", [1, 3, 1000])
def test_records_in_pieces(postgres: Postgres, start: Start, files: Certificates, cut: int) -> None:
    """From the handshake on, with new keys in between."""
    sql = ROWS.replace("10000", "20" if cut < 1000 else "3000")
    with proxy(postgres, files, every=2_000, cut=cut) as between:
        with start(between).raw() as client:
            client.login()
            for _ in range(2):
                assert digest(client, sql) == direct(postgres, sql)
        assert between.updates


@pytest.mark.parametrize("is_torn", [False, True], ids=["between records", "in a record"])
def test_a_server_that_breaks_off_without_close_notify(
    postgres: Postgres, start: Start, files: Certificates, is_torn: bool
) -> None:
    """Who waits for it is told, whoever comes next has another, and a parked one nobody misses."""
    with proxy(postgres, files) as between:
        gpooler = start(between)
        with gpooler.raw() as client:
            client.login().query("BEGIN")
            if is_torn:
                between.tear()
            else:
                between.drop()
            with pytest.raises((ServerError, EOFError)) as caught:
                client.query("SELECT 1")
            if isinstance(caught.value, ServerError):
                assert caught.value.sqlstate == "08006"
        between.mend()
        with gpooler.raw() as client:
            pid = client.login().query(PID)
            between.drop()
            eventually(lambda: not any(str(one.pid) == pid[0][0] for one in postgres.activity()))
            assert client.query(PID) != pid
        assert "server login failed" not in gpooler.log()


def test_a_handshake_that_breaks_off_is_a_failed_connection(
    postgres: Postgres, start: Start, files: Certificates
) -> None:
    with proxy(postgres, files) as between:
        gpooler = start(between)
        between.tear()
        with pytest.raises(psycopg.OperationalError), gpooler.connect() as connection:
            connection.execute("SELECT 1")
        eventually(lambda: "TLS" in gpooler.log())
        between.mend()
        with suppress(psycopg.OperationalError):  # the failure is remembered for a moment
            gpooler.connect().close()

        def works() -> bool:
            with suppress(psycopg.OperationalError), gpooler.connect() as connection:
                return connection.execute("SELECT 1").fetchone() == (1,)
            return False

        eventually(works, within=10)
