"""TLS with clients: modes, certificates, what goes over it, and what happens when it breaks."""

import base64
import hashlib
import re
import socket
import ssl
import struct
import subprocess
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import psycopg
import pytest

from tests.harness import PASSWORD, Gpooler, Postgres, RawClient, eventually, find_program
from tests.harness.certificates import Certificates
from tests.harness.client import (
    SSL_REQUEST,
    SYNC,
    TERMINATE,
    ServerError,
    bind,
    execute,
    parse,
    query,
    startup,
)
from tests.harness.records import DATA, HANDSHAKE, Direction

Factory = Callable[..., Gpooler]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def make(postgres: Postgres, gpooler_factory: Factory) -> Callable[..., Gpooler]:
    """A gpooler whose listener has these TLS options."""

    def start(options: dict[str, str], **others: object) -> Gpooler:
        return gpooler_factory(postgres, listener=options, **others)

    return start


@pytest.fixture(params=["gpooler", "openssl"])
def pool(make: Callable[..., Gpooler], files: Certificates, request: pytest.FixtureRequest) -> Gpooler:
    """With the records of TLS 1.3 in either's hands."""
    config = {"performance": {"tls_records": request.param}}
    return make(files.options("server", "prefer"), rule={"pool_size": 2}, config=config)


def dsn(gpooler: Gpooler, files: Certificates, mode: str, **options: str) -> str:
    merged = {"host": "localhost", "hostaddr": "127.0.0.1", "sslmode": mode, "sslrootcert": files.pem("ca")}
    return gpooler.dsn(**{**merged, **options})


# --- modes ------------------------------------------------------------------------------------------


def test_a_plain_startup_is_told_that_tls_is_required(
    make: Callable[..., Gpooler], files: Certificates
) -> None:
    gpooler = make(files.options("server", "require"))
    with gpooler.raw() as client, pytest.raises(ServerError, match="TLS connection is required") as caught:
        client.login()
    assert caught.value.sqlstate == "08P01"


def test_who_came_over_tls_before_opens_no_way_around_it(
    make: Callable[..., Gpooler], files: Certificates
) -> None:
    """The short way of a login that is known must not forget what the listener asks for."""
    gpooler = make(files.options("server", "require"))
    for _ in range(3):
        with gpooler.raw() as client:
            assert client.start_tls(files.client()).login().query("SELECT 1") == [["1"]]
        with gpooler.raw() as client, pytest.raises(ServerError, match="TLS connection is required"):
            client.login()


def test_a_cancel_request_needs_no_tls(
    make: Callable[..., Gpooler], files: Certificates, postgres: Postgres
) -> None:
    """libpq's PQcancel sends it in clear text, whatever the connection has."""
    gpooler = make(files.options("server", "require"))
    with gpooler.raw() as client:
        client.start_tls(files.client()).login()
        client.send(query("SELECT pg_sleep(30)"))
        eventually(lambda: any("pg_sleep(30)" in backend.query for backend in postgres.activity()))
        with gpooler.raw() as other:
            other.send(struct.pack("!iii", 12 + len(client.key), 80877102, client.pid) + client.key)
            other.read_to_end()
        with pytest.raises(ServerError) as caught:
            client.rows()
    assert caught.value.sqlstate == "57014"


def test_rules_tell_tls_apart(make: Callable[..., Gpooler], files: Certificates) -> None:
    gpooler = make(files.options("server", "prefer"), rule={"connection_type": "hostssl"})
    for _ in range(2):
        with gpooler.raw() as client:
            assert client.start_tls(files.client()).login().query("SELECT 1") == [["1"]]
        with gpooler.raw() as client, pytest.raises(ServerError, match="password authentication failed"):
            client.login()  # with the very startup packet that was let in over TLS
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(gpooler.dsn(sslmode="disable"))


# --- the handshake ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["server", "rsa", "chained"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_certificates_of_every_kind(
    make: Callable[..., Gpooler], files: Certificates, name: str, version: ssl.TLSVersion
) -> None:
    gpooler = make(files.options(name, "require"))
    context = files.client()
    context.minimum_version = context.maximum_version = version
    with gpooler.raw() as client:
        client.start_tls(context).login()
        assert client.query("SELECT 1") == [["1"]]
        assert isinstance(client.socket, ssl.SSLSocket)
        assert client.socket.version() == version.name.replace("_", ".")


def test_protocols_are_those_of_the_configuration(make: Callable[..., Gpooler], files: Certificates) -> None:
    gpooler = make(files.options("server", "require", tls_protocols="tlsv1.3"))
    context = files.client()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with gpooler.raw() as client, pytest.raises(ssl.SSLError):
        client.start_tls(context)
    with gpooler.raw() as client:
        assert client.start_tls(files.client()).login().query("SELECT 1") == [["1"]]


@pytest.mark.parametrize(
    ("options", "suite"),
    [
        (
            {"tls_protocols": "tlsv1.2", "tls_ciphers": "ECDHE-ECDSA-AES256-GCM-SHA384"},
            "ECDHE-ECDSA-AES256-GCM-SHA384",
        ),
        *(
            ({"tls_ciphersuites": name}, name)
            for name in ("TLS_CHACHA20_POLY1305_SHA256", "TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384")
        ),
    ],
)
def test_cipher_suites_are_those_of_the_configuration(
    make: Callable[..., Gpooler], files: Certificates, options: dict[str, str], suite: str
) -> None:
    gpooler = make(files.options("server", "require", **options))
    with gpooler.raw() as client:
        client.start_tls(files.client()).login()
        assert isinstance(client.socket, ssl.SSLSocket)
        assert client.socket.cipher()[0] == suite  # type: ignore[index]


def test_direct_tls_needs_the_protocol_s_name(pool: Gpooler, files: Certificates) -> None:
    with pool.raw() as client:
        assert client.direct_tls(files.client(alpn="postgresql")).login().query("SELECT 1") == [["1"]]
    with pool.raw() as client:
        client.direct_tls(files.client())
        client.send(startup("trust_user", "app"))
        assert client.read_to_end() == []
    eventually(lambda: "direct TLS without" in pool.log())


def test_direct_tls_of_libpq(pool: Gpooler, files: Certificates) -> None:
    if psycopg.pq.version() < 170000:
        pytest.skip("libpq is older than 17")
    with psycopg.connect(dsn(pool, files, "verify-full", sslnegotiation="direct")) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.parametrize("sent", [b"\x16", b"\x16\x03\x01", b"\x16\x03\x01\x02\x00\x01"])
def test_direct_tls_where_there_is_none(postgres: Postgres, gpooler_factory: Factory, sent: bytes) -> None:
    gpooler = gpooler_factory(postgres)
    with gpooler.raw() as client:
        client.send(sent)
        client.half_close()
        answers = client.read_to_end()
        assert [answer.fields()["C"] for answer in answers] == (["08P01"] if len(sent) > 3 else [])


def test_bytes_behind_the_request_end_the_connection(pool: Gpooler) -> None:
    """What is in the clear must not be taken for something that came under TLS."""
    with pool.raw() as client:
        client.send(SSL_REQUEST, startup("trust_user", "app"))
        assert client.read_to_end()[-1].fields()["C"] == "08P01"


def test_a_second_request_is_refused(pool: Gpooler, files: Certificates) -> None:
    with pool.raw() as client:
        client.start_tls(files.client())
        client.send(SSL_REQUEST)
        assert client.read_to_end()[-1].fields()["C"] == "08P01"


@pytest.mark.parametrize(
    "rubbish",
    [b"\x16\x03\x01\x00\x05hello", b"\x15\x03\x01\x00\x02\x02\x28", b"GET / HTTP/1.0\r\n\r\n", bytes(600)],
)
def test_what_is_no_handshake_ends_the_connection_alone(
    pool: Gpooler, files: Certificates, rubbish: bytes
) -> None:
    with pool.raw() as other:
        other.start_tls(files.client()).login()
        with pool.raw() as client:
            client.send(SSL_REQUEST)
            assert client.receive(1) == b"S"
            client.send(rubbish)
            client.half_close()
            while client.socket.recv(4096):
                pass
        assert other.query("SELECT 1") == [["1"]]


def test_a_handshake_cut_anywhere_is_put_together(pool: Gpooler, files: Certificates) -> None:
    """Byte by byte, and so is the login under it."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = files.client().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pool.raw() as client:
        client.send(SSL_REQUEST)
        assert client.receive(1) == b"S"

        def flush() -> None:
            for byte in outgoing.read():
                client.send(bytes([byte]))

        def shake_hands() -> bool:
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                flush()
                incoming.write(client.socket.recv(65536))
                return False
            return True

        while not shake_hands():
            pass
        tls.write(startup("trust_user", "app"))
        tls.write(query("SELECT 'whole'"))
        flush()
        answer = b""
        while b"whole" not in answer:
            try:
                answer += tls.read(65536)
            except ssl.SSLWantReadError:
                incoming.write(client.socket.recv(65536))


def test_the_whole_login_in_one_flight(pool: Gpooler, files: Certificates) -> None:
    """Startup packet, queries and goodbye right behind the handshake: bytes have no edge to come by."""
    with pool.raw() as client:
        client.start_tls(files.client())
        requests = [query(f"SELECT {number}") for number in range(50)]
        client.send(startup("trust_user", "app"), *requests, TERMINATE)
        answers = [message.values() for message in client.read_to_end() if message.kind == b"D"]
    assert answers == [[str(number)] for number in range(50)]


def test_login_timeout_covers_the_handshake(
    postgres: Postgres, gpooler_factory: Factory, files: Certificates
) -> None:
    gpooler = gpooler_factory(
        postgres, listener={**files.options("server", "require"), "client_login_timeout": 1000}
    )
    with gpooler.raw() as client:
        client.send(SSL_REQUEST)
        assert client.receive(1) == b"S"
        assert client.read_to_end() == []


# --- certificates of clients ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["verify_ca", "verify_full"])
@pytest.mark.parametrize("name", ["foreign_user", "revoked"])
def test_clients_without_a_good_certificate_stay_out(
    make: Callable[..., Gpooler], files: Certificates, mode: str, name: str
) -> None:
    authorities = {"tls_ca_file": files.pem("ca"), "tls_crl_file": files.pem("crl")}
    gpooler = make(files.options("server", mode, **authorities))
    with gpooler.raw() as client, pytest.raises((ssl.SSLError, EOFError, ConnectionError)):
        client.start_tls(files.client(name)).login()
    with gpooler.raw() as client:
        assert client.start_tls(files.client("cert_user")).login().query("SELECT 1") == [["1"]]


@pytest.mark.parametrize(
    ("user", "name", "accepted", "sqlstate"),
    [
        ("cert_user", "cert_user", None, None),
        ("cert_user", "other_user", None, "28P01"),
        ("cert_user", None, None, "28P01"),
        ("trust_user", "cert_user", ["cert_user"], None),
        ("trust_user", "other_user", ["cert_user", "default"], "28P01"),
        ("other_user", "other_user", ["cert_user", "default"], None),
    ],
)
def test_authentication_by_certificate(
    make: Callable[..., Gpooler],
    files: Certificates,
    user: str,
    name: str | None,
    accepted: list[str] | None,
    sqlstate: str | None,
) -> None:
    rule = {"authentication": "cert", "storage_user": "trust_user"}
    gpooler = make(
        files.options("server", "prefer", tls_ca_file=files.pem("ca")),
        rule=rule if accepted is None else {**rule, "auth_common_name": accepted},
    )
    with gpooler.raw() as client:
        client.start_tls(files.client(name))
        if sqlstate is None:
            assert client.login(user).query("SELECT 1") == [["1"]]
        else:
            with pytest.raises(ServerError) as caught:
                client.login(user)
            assert caught.value.sqlstate == sqlstate
    with gpooler.raw() as client, pytest.raises(ServerError) as caught:
        client.login(user)
    assert caught.value.sqlstate == "28000"


# --- SCRAM with channel binding ---------------------------------------------------------------------


def test_scram_plus_with_an_rsa_certificate(make: Callable[..., Gpooler], files: Certificates) -> None:
    gpooler = make(
        files.options("rsa", "prefer"),
        rule={"authentication": "scram-sha-256", "password": PASSWORD, "storage_user": "trust_user"},
    )
    with psycopg.connect(dsn(gpooler, files, "verify-full", channel_binding="require")) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


SHADOW = "SELECT usename, passwd FROM pg_shadow WHERE usename = $1"


@pytest.mark.parametrize("source", ["several passwords", "verifier", "auth_query"])
def test_scram_plus_whatever_the_secret_comes_from(
    make: Callable[..., Gpooler], files: Certificates, postgres: Postgres, source: str
) -> None:
    """Where gpooler has a verifier alone, the keys of the client's exchange open its server."""
    ((verifier,),) = postgres.query("SELECT passwd FROM pg_shadow WHERE usename = 'scram_user'")
    rule: dict[str, object] = {"authentication": "scram-sha-256", "storage_user": "scram_user"}
    config: dict[str, object] = {}
    if source == "several passwords":
        rule |= {"password": ["another", PASSWORD], "storage_password": PASSWORD}
    elif source == "verifier":
        rule |= {"password": verifier}
    else:
        rule |= {"auth_query": SHADOW, "auth_query_db": "postgres", "auth_query_user": "asker"}
        asker = {
            "authentication": "block",
            "storage": "postgres",
            "storage_user": "postgres",
            "pool": "session",
            "pool_routing": "internal",
        }
        config["database"] = {"postgres": {"user": {"asker": asker}}}
    gpooler = make(files.options("server", "prefer"), rule=rule, config=config)

    def connect(binding: str, password: str) -> None:
        options = {"user": "scram_user", "password": password, "channel_binding": binding}
        with psycopg.connect(dsn(gpooler, files, "verify-full", **options)) as connection:
            assert connection.execute("SELECT current_user").fetchone() == ("scram_user",)

    for binding in ("require", "disable"):
        connect(binding, PASSWORD)
        if source == "several passwords":
            connect(binding, "another")
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            connect(binding, "wrong")


def test_host_based_rules_see_tls_and_certificates(
    make: Callable[..., Gpooler], files: Certificates, tmp_path: Path
) -> None:
    (tmp_path / "hba.conf").write_text("""
        hostssl   app cert_user  all  cert
        hostnossl app plain_user all  allow
        hostssl   app tls_user   all  scram-sha-256
        hostssl   app bare_user  all  password
    """)
    gpooler = make(
        files.options("server", "prefer", tls_ca_file=files.pem("ca")),
        rule={"authentication": "md5", "password": PASSWORD},
        config={"routing": {"hba_file": str(tmp_path / "hba.conf")}},
    )
    # user, its certificate, over TLS, lets in
    for user, name, has_tls, is_let_in in (
        ("cert_user", "cert_user", True, True),
        ("cert_user", "other_user", True, False),
        ("cert_user", None, True, False),
        ("cert_user", None, False, False),
        ("plain_user", None, False, True),
        ("plain_user", None, True, False),
        ("tls_user", None, True, True),
        ("tls_user", None, False, False),
        ("bare_user", None, True, True),
        ("bare_user", None, False, False),
    ):
        own = {} if name is None else {"sslcert": files.pem(name), "sslkey": files.key(name)}
        options = {**own, "user": user, "sslmode": "verify-full" if has_tls else "disable"}
        for _ in range(2):  # the second may take the short way
            if is_let_in:
                with psycopg.connect(dsn(gpooler, files, "", **options)) as connection:
                    assert connection.execute("SELECT 1").fetchone() == (1,)
            else:
                with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
                    psycopg.connect(dsn(gpooler, files, "", **options))


def sasl(client: RawClient, mechanism: bytes, first: bytes) -> dict[str, str]:
    """Begin an exchange; the fields of the error it ends in."""
    client.send(startup("trust_user", "app"))
    offered = client.read()
    assert offered.kind == b"R"
    body = mechanism + b"\0" + struct.pack("!i", len(first)) + first
    client.send(b"p" + struct.pack("!i", len(body) + 4) + body)
    return client.read_to_end()[-1].fields()


@pytest.mark.parametrize(
    ("mechanism", "first", "sqlstate"),
    [
        (b"SCRAM-SHA-256", b"y,,n=,r=abc", "28000"),  # somebody took our offer away
        (b"SCRAM-SHA-256-PLUS", b"n,,n=,r=abc", "08P01"),
        (b"SCRAM-SHA-256-PLUS", b"p=tls-unique,,n=,r=abc", "08P01"),
        (b"SCRAM-SHA-256", b"p=tls-server-end-point,,n=,r=abc", "08P01"),
        (b"SCRAM-SHA-512", b"n,,n=,r=abc", "08P01"),
    ],
)
def test_scram_that_does_not_fit_its_channel_is_refused(
    make: Callable[..., Gpooler], files: Certificates, mechanism: bytes, first: bytes, sqlstate: str
) -> None:
    gpooler = make(
        files.options("server", "prefer"), rule={"authentication": "scram-sha-256", "password": PASSWORD}
    )
    with gpooler.raw() as client:
        assert sasl(client.start_tls(files.client()), mechanism, first)["C"] == sqlstate


# --- what goes over it ------------------------------------------------------------------------------


def test_large_results_and_requests_are_the_same_bytes(pool: Gpooler, files: Certificates) -> None:
    sql = "SELECT n, md5(n::text), repeat('x', n % 3000) FROM generate_series(1, 60000) n"
    with pool.raw() as client, pool.raw() as plain:
        client.start_tls(files.client()).login()
        plain.login()
        client.send(query(sql))
        plain.send(query(sql))
        digests = []
        for one in (client, plain):
            digest = hashlib.md5()
            while (message := one.read()).kind != b"Z":
                digest.update(message.kind + message.body)
            digests.append(digest.hexdigest())
        assert digests[0] == digests[1]
        text = base64.b64encode(hashlib.sha512(b"seed").digest() * 60_000).decode()
        assert client.query(f"SELECT md5('{text}')") == [[hashlib.md5(text.encode()).hexdigest()]]


def test_copy_both_ways(pool: Gpooler, files: Certificates, postgres: Postgres) -> None:
    postgres.query("DROP TABLE IF EXISTS tls_lines; CREATE TABLE tls_lines (n int, data text)", "app")
    postgres.query("GRANT ALL ON tls_lines TO PUBLIC", "app")
    with psycopg.connect(dsn(pool, files, "require"), autocommit=True) as connection:
        cursor = connection.cursor()
        line = "y" * 990
        with cursor.copy("COPY tls_lines FROM STDIN") as copy:
            for number in range(50_000):
                copy.write(f"{number}\t{line}\n")
        digest = hashlib.md5()
        with cursor.copy("COPY (SELECT * FROM tls_lines ORDER BY n) TO STDOUT") as copy:
            for data in copy:
                digest.update(data)
    expected = hashlib.md5()
    for number in range(50_000):
        expected.update(f"{number}\t{line}\n".encode())
    assert digest.hexdigest() == expected.hexdigest()


def test_a_slow_reader_gets_everything(pool: Gpooler, files: Certificates) -> None:
    with pool.raw() as client, pool.raw() as other:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.start_tls(files.client()).login()
        other.start_tls(files.client()).login()
        client.send(query("SELECT n, repeat('z', 100000) FROM generate_series(1, 300) n"))
        for number in range(1, 301):
            if number % 100 == 1:
                assert other.query("SELECT 2") == [["2"]]  # who does not read holds nobody up
            assert client.read_until(b"D")[-1].body[6:].startswith(str(number).encode())
        client.read_until()


def test_pipelines_and_prepared_statements(pool: Gpooler, files: Certificates) -> None:
    with pool.raw() as client:
        client.start_tls(files.client()).login()
        group = bind("s") + execute()
        client.send(parse("SELECT 7", "s"), *([group] * 200), SYNC)
        answers = client.read_until()
    assert [message.values() for message in answers if message.kind == b"D"] == [["7"]] * 200


@pytest.mark.parametrize("records", ["gpooler", "openssl"])
@pytest.mark.parametrize(
    ("options", "suites"),
    [
        ((), {}),
        (("-no_ticket",), {}),
        (("-groups", "ffdhe8192:X25519"), {}),  # the first is not had: the hello comes twice
        # a suite that is left to OpenSSL in any case
        (("-ciphersuites", "TLS_AES_128_CCM_SHA256"), {"tls_ciphersuites": "TLS_AES_128_CCM_SHA256"}),
    ],
    ids=["plain", "no ticket", "retry", "CCM"],
)
def test_key_update_of_the_client(
    make: Callable[..., Gpooler],
    files: Certificates,
    options: tuple[str, ...],
    suites: dict[str, str],
    records: str,
) -> None:
    """The K of openssl s_client asks for new keys of both sides."""
    pool = make(files.options("server", "prefer", **suites), config={"performance": {"tls_records": records}})
    program = find_program("openssl")
    command = [
        program, "s_client", "-starttls", "postgres", "-connect", f"127.0.0.1:{pool.port}",
        "-CAfile", files.pem("ca"), "-verify_return_error", *options,
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(startup("trust_user", "app"))
        process.stdin.flush()
        _read_until(process.stdout, b"Z\0\0\0\5I")
        for number in range(3):
            process.stdin.write(b"K\n")
            process.stdin.flush()
            _read_until(process.stdout, b"KEYUPDATE")
            # (what begins with a Q would end s_client)
            process.stdin.write(parse(f"SELECT 'after update {number}'") + bind() + execute() + SYNC)
            process.stdin.flush()
            output = _read_until(process.stdout, b"Z\0\0\0\5I")
            assert f"after update {number}".encode() in output
        process.stdin.write(TERMINATE)
        process.stdin.close()
        process.wait(10)


class Behind:
    """Seals records of a client behind the back of Python's ssl, which then has to write no more itself."""

    def __init__(self, client: RawClient, files: Certificates, directory: Path) -> None:
        """Logs the client in."""
        context = files.client()
        context.keylog_filename = str(directory / "keys")
        client.start_tls(context).login()
        assert isinstance(client.socket, ssl.SSLSocket)
        suite = client.socket.cipher()[0].encode()  # type: ignore[index]
        lines = (line.split() for line in Path(context.keylog_filename).read_text().splitlines())
        secrets = {words[0]: bytes.fromhex(words[2]) for words in lines if len(words) == 3}
        self._keys = Direction(suite, secrets["CLIENT_TRAFFIC_SECRET_0"])
        self._keys.number = 1  # the startup packet went out
        self._socket = socket.socket(fileno=socket.dup(client.socket.fileno()))

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def data(self, data: bytes) -> bytes:
        """A record."""
        return self._keys.seal(DATA, data)

    def ask_for_new_keys(self) -> bytes:
        """A KeyUpdate that asks for another; what is sealed next is so with new keys."""
        record = self._keys.seal(HANDSHAKE, b"\x18\0\0\1\1")
        self._keys.renew()
        return record

    def send(self, *records: bytes) -> None:
        """In one piece."""
        self._socket.sendall(b"".join(records))


def test_who_does_not_read_is_answered_when_it_does(
    pool: Gpooler, files: Certificates, tmp_path: Path
) -> None:
    """A request for new keys while a large result is stuck."""
    with pool.raw() as client, Behind(client, files, tmp_path) as behind:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        behind.send(behind.data(query("SELECT n, repeat('z', 100000) FROM generate_series(1, 200) n")))
        client.read_until(b"D")
        for _ in range(3):
            behind.send(behind.ask_for_new_keys())
        for number in range(2, 201):
            assert client.read_until(b"D")[-1].body[6:].startswith(str(number).encode())
        client.read_until()
        behind.send(behind.ask_for_new_keys(), behind.data(query("SELECT 'new'")))
        assert client.rows() == [["new"]]


def test_new_keys_without_end_hold_nobody_up(
    make: Callable[..., Gpooler], files: Certificates, tmp_path: Path
) -> None:
    gpooler = make(files.options("server", "prefer"), config={"performance": {"workers": 1}})
    with gpooler.raw() as client, gpooler.raw() as other, Behind(client, files, tmp_path) as behind:
        other.login()
        behind.send(*(behind.ask_for_new_keys() for _ in range(1000)))
        assert other.query("SELECT 1") == [["1"]]
        eventually(lambda: gpooler.client_connections() == 1)


def _read_until(stream: object, mark: bytes) -> bytes:
    found = b""
    while mark not in found:
        data = stream.read1(4096)  # type: ignore[attr-defined]
        assert data, found[-500:]
        found += data
    return found


# --- the end ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_clean", [True, False])
def test_a_client_that_goes_in_a_transaction_is_rolled_back(
    pool: Gpooler, files: Certificates, postgres: Postgres, is_clean: bool
) -> None:
    """With close_notify or without."""
    with pool.raw() as client:
        client.start_tls(files.client()).login()
        client.query("BEGIN; SELECT pg_advisory_xact_lock(4711)")
        assert isinstance(client.socket, ssl.SSLSocket)
        if is_clean:
            client.socket.setblocking(False)
            with suppress(ssl.SSLWantReadError):  # unless the answer is there already
                client.socket.unwrap()
            eventually(lambda: not postgres.query("SELECT 1 FROM pg_locks WHERE locktype = 'advisory'"))
    eventually(lambda: not postgres.query("SELECT 1 FROM pg_locks WHERE locktype = 'advisory'"))
    eventually(lambda: pool.client_connections() == 0)


def test_a_broken_record_ends_its_client_alone(pool: Gpooler, files: Certificates) -> None:
    with pool.raw() as client, pool.raw() as other:
        client.start_tls(files.client()).login()
        other.start_tls(files.client()).login()
        raw = socket.socket(fileno=socket.dup(client.socket.fileno()))
        with raw:
            raw.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
            eventually(lambda: pool.client_connections() == 1)
        assert other.query("SELECT 1") == [["1"]]


def test_terminate_is_answered_by_a_close_notify(pool: Gpooler, files: Certificates) -> None:
    with pool.raw() as client:
        client.start_tls(files.client()).login()
        client.send(TERMINATE)
        assert client.socket.recv(1) == b""  # Python's ssl raises when the end is a bare FIN


def test_the_error_of_a_refused_login_comes_under_tls(
    make: Callable[..., Gpooler], files: Certificates
) -> None:
    gpooler = make(files.options("server", "require"), rule={"authentication": "block"})
    with gpooler.raw() as client:
        client.start_tls(files.client())
        with pytest.raises(ServerError) as caught:
            client.login()
        assert caught.value.sqlstate == "28000"
        assert client.socket.recv(1) == b""


# --- memory -----------------------------------------------------------------------------------------


def test_an_idle_client_keeps_no_session_of_openssl(
    make: Callable[..., Gpooler], files: Certificates
) -> None:
    """23 kB, without; the least of two growths, as what else a worker does meanwhile is in it, too."""
    grown = {}
    for records in ("gpooler", "openssl"):
        gpooler = make(
            files.options("server", "prefer"),
            config={"performance": {"tls_records": records, "workers": 1}},
        )
        (pid,) = gpooler.worker_pids()
        growths = []
        with ExitStack() as stack:
            for count in (50, 200, 200):  # those of the first come into memory that is there
                before = private_memory(pid)
                for _ in range(count):
                    client = stack.enter_context(gpooler.raw())
                    client.start_tls(files.client()).login()
                growths.append((private_memory(pid) - before) / count)
        grown[records] = min(growths[1:])
    assert grown["gpooler"] < 5_000 < grown["openssl"]


def private_memory(pid: int) -> int:
    """Bytes that are a process' alone."""
    found = re.search(r"^Private_Dirty:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


# --- the configuration ------------------------------------------------------------------------------


def test_every_mistake_with_files_is_told(
    files: Certificates, tmp_path: Path, check: Callable[[str], str]
) -> None:
    """Once each, with the key that is wrong; see tests/unit/test_certificates.py for the kinds."""
    text = check(
        f"""
        [[listen]]
        host = "127.0.0.1"
        tls = "require"
        tls_cert_file = "{files.pem("expired")}"
        tls_key_file = "{files.key("server")}"
        tls_ca_file = "{tmp_path}/none.pem"
        tls_protocols = "tlsv1.1, tlsv1.3"
        """
    )
    for part in (
        "has expired on",
        "does not fit the certificate",
        "cannot be read: No such file",
        "has a gap",
    ):
        assert part in text


@pytest.fixture
def check() -> Callable[[str], str]:
    from gpooler.config.load import ConfigError, load_text

    def run(listener: str) -> str:
        rest = """
        [storage.s]
        type = "remote"
        [database.default.user.default]
        authentication = "none"
        storage = "s"
        pool = "transaction"
        """
        with pytest.raises(ConfigError) as caught:
            load_text(listener + rest)
        return "\n".join(str(problem) for problem in caught.value.problems)

    return run
