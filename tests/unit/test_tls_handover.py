"""Which handshakes of clients end in the relay's own records, which go on exactly where OpenSSL stopped."""

import socket
import subprocess

import pytest
from cryptography.hazmat.bindings.openssl.binding import Binding
from OpenSSL import SSL

from gpooler.config.words import TlsRecords
from gpooler.net import openssl
from gpooler.relay.tls import TlsSession
from tests.fuzz.secure import acceptor, peer_context
from tests.harness import find_program

EVERYTHING = 1 << 20

openssl.load()
ACCEPTORS = {records: acceptor(records) for records in TlsRecords}


def shake(
    context: SSL.Context,
    *,
    records: TlsRecords = TlsRecords.GPOOLER,
    behind: bytes = b"",
    ticket: object = None,
) -> tuple[TlsSession, SSL.Connection]:
    """Both ends of a session. ``behind``: what the client sends with its last words in the handshake."""
    server = ACCEPTORS[records].begin()
    client = SSL.Connection(context, None)
    client.set_connect_state()
    if ticket is not None:
        client.set_session(ticket)  # type: ignore[arg-type]
    while True:
        try:
            client.do_handshake()
            if behind:
                client.sendall(behind)
                behind = b""
        except SSL.WantReadError:
            pass
        server.feed(client.bio_read(EVERYTHING))
        is_over = server.step()
        if answer := server.take():
            client.bio_write(answer)
        if is_over:
            return server.session(), client


def exchange(session: TlsSession, client: SSL.Connection) -> None:
    """Something both ways, and again."""
    for number in range(3):
        text = b"%d" % number * 20_000
        session.write(text)
        client.bio_write(session.take())
        found = b""
        while len(found) < len(text):
            found += client.recv(EVERYTHING)
        assert found == text
        client.sendall(text)
        session.put(client.bio_read(EVERYTHING))
        found = b""
        while part := session.read():
            found += part
        assert found == text


@pytest.mark.parametrize("is_member", [True, False], ids=["with a certificate", "without"])
@pytest.mark.parametrize("is_1_3", [True, False], ids=["TLS 1.3", "TLS 1.2"])
@pytest.mark.parametrize("records", TlsRecords)
def test_those_of_tls_1_3(records: TlsRecords, is_1_3: bool, is_member: bool) -> None:
    session, client = shake(peer_context(is_1_3, is_member), records=records)
    assert session.has_records == (is_1_3 and records is TlsRecords.GPOOLER)
    assert session.facts.protocol == ("TLSv1.3" if is_1_3 else "TLSv1.2")
    assert bool(session.facts.common_names) == is_member
    exchange(session, client)


def test_what_came_with_the_last_words_is_not_lost() -> None:
    session, client = shake(peer_context(True, False), behind=b"at once")
    assert session.has_records
    assert session.read() == b"at once"
    exchange(session, client)


@pytest.mark.parametrize("is_member", [True, False], ids=["with a certificate", "without"])
def test_a_session_that_is_taken_up_again(is_member: bool) -> None:
    """By its ticket: with other secrets, and another number of tickets."""
    context = peer_context(True, is_member)
    session, client = shake(context)
    exchange(session, client)
    ticket = client.get_session()
    for _ in range(2):
        session, client = shake(context, ticket=ticket)
        assert session.has_records
        assert Binding().lib.SSL_session_reused(client._ssl)
        exchange(session, client)
        ticket = client.get_session()


def test_many_sessions_do_not_meet() -> None:
    """They share the contexts of a thread."""
    pairs = [shake(peer_context(True, False)) for _ in range(10)]
    for number, (session, client) in enumerate(pairs):
        session.write(b"to %d" % number)
        client.sendall(b"from %d" % number)
    for number, (session, client) in reversed(list(enumerate(pairs))):
        client.bio_write(session.take())
        assert client.recv(100) == b"to %d" % number
        session.put(client.bio_read(EVERYTHING))
        assert session.read() == b"from %d" % number


@pytest.mark.parametrize("cut", [1, 7, 10_000])
@pytest.mark.parametrize("is_limited", [True, False])
def test_who_asks_for_small_records_is_left_to_openssl(is_limited: bool, cut: int) -> None:
    """max_fragment_length (RFC 6066), which this OpenSSL grants and the relay's records do not know."""
    program = find_program("openssl")
    options = ("-maxfraglen", "512") if is_limited else ()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [
            program, "s_client", "-quiet", "-connect", f"127.0.0.1:{listener.getsockname()[1]}", *options,
        ]  # fmt: skip
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            sock, _ = listener.accept()
            with sock:
                handshake = ACCEPTORS[TlsRecords.GPOOLER].begin()
                is_over = False
                while not is_over:
                    data = sock.recv(EVERYTHING)
                    assert data
                    for at in range(0, len(data), cut):
                        handshake.feed(data[at : at + cut])
                        is_over = handshake.step()
                        sock.sendall(handshake.take())
                session = handshake.session()
                assert session.has_records is not is_limited
                text = bytes(range(65, 90)) * 4000
                session.write(text)
                sock.sendall(session.take())
                assert client.stdout.read(len(text)) == text
            client.stdin.close()
            client.wait(10)
