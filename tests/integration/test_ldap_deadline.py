"""A directory that stops talking, wherever it does: libldap comes back, so no thread is held."""

import importlib.util
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest

from gpooler.auth.ldap import LdapUnavailable, Question, check
from gpooler.config.model import LdapEndpoint
from gpooler.config.words import LdapScheme

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ldap") is None,
    reason="python-ldap is not installed (Debian: libldap2-dev libsasl2-dev, then scripts/setup)",
)

HOST = "127.0.0.1"
TIMEOUT_MS = 300
STARTTLS_DONE = bytes.fromhex("300c02010178070a010004000400")  # ExtendedResponse, success (RFC 4511, 4.12)
HALF_A_RECORD = b"\x16\x03\x03\x00\x7a\x02"

Listen = Callable[..., int]


@pytest.fixture
def listen() -> Iterator[Listen]:
    """Makes a server that answers what it is sent with one of ``answers`` after the other, then is silent."""
    with ExitStack() as stack:

        def start(*answers: bytes) -> int:
            listener = stack.enter_context(socket.create_server((HOST, 0)))
            thread = threading.Thread(target=serve, args=(listener, answers))
            thread.start()
            stack.callback(thread.join)
            stack.callback(listener.shutdown, socket.SHUT_RDWR)
            return int(listener.getsockname()[1])

        yield start


def serve(listener: socket.socket, answers: tuple[bytes, ...]) -> None:
    with suppress(OSError), listener.accept()[0] as connection:
        for answer in answers:
            connection.recv(4096)
            connection.sendall(answer)
        while connection.recv(4096):
            pass


def endpoint(port: int, scheme: str, servers: str = HOST) -> LdapEndpoint:
    is_starttls = scheme == "StartTLS"
    return LdapEndpoint(
        ldapserver=servers,
        ldapport=port,
        ldapscheme=LdapScheme.LDAP if is_starttls else LdapScheme(scheme),
        ldaptls=is_starttls,
        ldapprefix="uid=",
    )


@pytest.mark.parametrize(
    ("scheme", "answers"),
    [
        ("ldap", ()),
        ("ldaps", ()),
        ("StartTLS", ()),
        ("StartTLS", (STARTTLS_DONE,)),
        ("StartTLS", (STARTTLS_DONE, HALF_A_RECORD)),
    ],
    ids=["bind", "ldaps", "StartTLS", "handshake", "record"],
)
def test_a_silent_directory_gives_the_thread_back(
    listen: Listen, scheme: str, answers: tuple[bytes, ...]
) -> None:
    with pytest.raises(LdapUnavailable):
        check(endpoint(listen(*answers), scheme), Question("joe", b"x", None), TIMEOUT_MS)


@pytest.mark.parametrize("scheme", ["ldap", "ldaps", "StartTLS"])
def test_a_directory_that_refuses_connections_is_no_wait(scheme: str) -> None:
    with socket.create_server((HOST, 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(LdapUnavailable, match=r"Can't contact|cannot connect"):
        check(endpoint(port, scheme, f"{HOST} 127.0.0.77"), Question("joe", b"x", None), 20_000)
