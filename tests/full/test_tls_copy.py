"""COPY of a gigabyte, TLS on both sides: the bytes of a direct connection, out and in."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from tests.harness import Gpooler, Postgres, RawClient
from tests.harness.certificates import Certificates
from tests.harness.client import COPY_DONE, copy_data, query

pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]

Factory = Callable[..., Gpooler]
WIDTH: Final = 100_000  # bytes of a row, more or less: they are not to end where records do
ROWS: Final = 10_750
GIGABYTE: Final = 1 << 30
READY: Final = b"Z\0\0\0\x05I"
CHUNK: Final = 1 << 20
PATIENCE_S: Final = 120
OUT: Final = f"""COPY (
    SELECT n, md5(n::text), repeat(chr(65 + n % 26), {WIDTH} + n % 1000) FROM generate_series(1, {ROWS}) n
) TO STDOUT"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def tls_postgres(files: Certificates) -> Iterator[Postgres]:
    cluster = Postgres(15)
    cluster.settings |= {
        "ssl": "on",
        "ssl_cert_file": cluster.own(files.pem("server"), "server.pem"),
        "ssl_key_file": cluster.own(files.key("server"), "server.key"),
    }
    with cluster:
        yield cluster


@pytest.fixture
def client(tls_postgres: Postgres, gpooler_factory: Factory, files: Certificates) -> Iterator[RawClient]:
    storage = {"host": "localhost", "tls": "verify_full", "tls_ca_file": files.pem("ca")}
    gpooler = gpooler_factory(
        tls_postgres, listener=files.options("server", "require"), config={"storage": {"postgres": storage}}
    )
    with gpooler.raw(timeout=PATIENCE_S) as made:
        made.start_tls(files.client()).login()
        assert made.query("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()") == [["t"]]
        yield made


@pytest.fixture
def direct(tls_postgres: Postgres) -> Iterator[RawClient]:
    with RawClient(tls_postgres.port, timeout=PATIENCE_S) as made:
        yield made.login()


def answer(client: RawClient, sql: str) -> tuple[int, str]:
    """Length and digest of all bytes of the answer."""
    client.send(query(sql))
    length, digest, tail = 0, hashlib.sha256(), b""
    while tail != READY:
        data = client.socket.recv(CHUNK)
        assert data, f"closed after {length} bytes"
        length += len(data)
        digest.update(data)
        tail = (tail + data)[-len(READY) :]
    return length, digest.hexdigest()


def test_copy_out(client: RawClient, direct: RawClient) -> None:
    length, digest = answer(client, OUT)
    assert length > GIGABYTE
    assert (length, digest) == answer(direct, OUT)
    assert client.query("SELECT 1") == [["1"]]


def test_copy_in(client: RawClient, direct: RawClient) -> None:
    """What a direct connection finds in the table is what was sent."""
    direct.query("CREATE UNLOGGED TABLE gigabyte (n int, data text); GRANT ALL ON gigabyte TO PUBLIC")
    sent, length, rest = hashlib.sha256(), 0, b""
    client.send(query("COPY gigabyte FROM STDIN"))
    client.read_until(b"G")
    for number in range(ROWS):
        row = b"%d\t%s\n" % (number, hashlib.sha256(b"%d" % number).hexdigest().encode() * (WIDTH // 64 + 1))
        sent.update(row)
        length += len(row)
        rest += row
        cut = len(rest) - number % 7  # rows and messages do not end together
        client.send(copy_data(rest[:cut]))
        rest = rest[cut:]
    assert length > GIGABYTE
    client.send(copy_data(rest), COPY_DONE)
    assert [message.kind for message in client.read_until()] == [b"C", b"Z"]

    found = hashlib.sha256()
    direct.send(query("COPY gigabyte TO STDOUT"))
    while (message := direct.read()).kind != b"Z":
        if message.kind == b"d":
            found.update(message.body)
    assert found.hexdigest() == sent.hexdigest()
