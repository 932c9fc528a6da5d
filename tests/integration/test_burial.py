"""The end of a server whose worker is dead, with PostgreSQL's end of the connection in the test's hand."""

import socket
from collections.abc import Iterator

import gevent
import pytest

from gpooler.broker.acts import Bury
from gpooler.broker.burial import bury
from gpooler.broker.slots import SlotName
from gpooler.errors import ServerConnectFailed
from gpooler.log import Logger, compile_format

Canceled = tuple[str, int, bytes, int]


class Grave:
    """A burial under way in a greenlet, and what it did."""

    def __init__(self, pid: int = 77, timeout_us: int = 0, failure: Exception | None = None) -> None:
        self.server, self._ours = socket.socketpair()
        self.server.settimeout(5)
        self.canceled: list[Canceled] = []
        self.lines: list[str] = []
        self._failure = failure
        logger = Logger(
            compile_format("%m", pid=1), lambda _, line: self.lines.append(line), lambda: 0.0, is_debug=False
        )
        act = Bury(SlotName(1, 2), 3, "r", "127.0.0.1:5432", pid, "cafe", timeout_us)
        self._greenlet = gevent.spawn(bury, act, self._ours.fileno(), self._cancel, logger)

    def _cancel(self, _: str, endpoint: str, pid: int, secret: bytes, timeout_ms: int) -> None:
        self.canceled.append((endpoint, pid, secret, timeout_ms))
        if self._failure is not None:
            raise self._failure

    def is_over(self, within: float = 5) -> bool:
        """Whether the burial has ended by itself; an exception of it is raised."""
        self._greenlet.join(within)
        if not self._greenlet.ready():
            return False
        self._greenlet.get()
        assert self._ours.fileno() >= 0  # the descriptor stays the caller's
        return True

    def wait_for(self, what: list[object]) -> None:
        with gevent.Timeout(5):
            while not what:
                gevent.sleep(0.005)

    def close(self) -> None:
        self._greenlet.kill()
        self.server.close()
        self._ours.close()


@pytest.fixture
def grave() -> Iterator[type[Grave]]:
    dug: list[Grave] = []

    class Dug(Grave):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)
            dug.append(self)

    yield Dug
    for each in dug:
        each.close()


def test_an_idle_server_sees_the_end_and_needs_no_cancel(grave: type[Grave]) -> None:
    one = grave()
    one.server.close()
    assert one.is_over()
    assert one.canceled == []
    assert one.lines == []


def test_a_running_server_is_cancelled_by_its_key(grave: type[Grave]) -> None:
    one = grave(timeout_us=2_500_000)
    one.wait_for(one.canceled)
    assert one.canceled == [("127.0.0.1:5432", 77, b"\xca\xfe", 2500)]
    assert one.server.recv(1) == b""  # our half is closed: after its query PostgreSQL goes
    one.server.sendall(b"E\0\0\0\4Z\0\0\0\5I" * 10_000)  # what it still says is read and forgotten
    assert not one.is_over(0.01)
    one.server.close()
    assert one.is_over()
    assert one.lines == []


def test_a_server_in_login_is_only_waited_for(grave: type[Grave]) -> None:
    one = grave(pid=0)
    assert not one.is_over(0.1)
    one.server.close()
    assert one.is_over()
    assert one.canceled == []


def test_a_cancel_that_fails_is_logged_and_the_wait_goes_on(grave: type[Grave]) -> None:
    one = grave(failure=ServerConnectFailed(cause="refused"))
    one.wait_for(one.lines)
    assert one.lines == ["cancel at 127.0.0.1:5432 failed: could not connect to the server"]
    assert not one.is_over(0.01)
    one.server.close()
    assert one.is_over()


def test_a_server_that_stays_is_logged_once_and_waited_for(grave: type[Grave]) -> None:
    one = grave()
    one.wait_for(one.lines)
    text = "server process 77 at 127.0.0.1:5432 stays after its worker died; its slot stays taken"
    assert one.lines == [text]
    assert not one.is_over(0.1)
    one.server.close()
    assert one.is_over()
    assert one.lines == [text]


def test_a_connection_that_is_broken_already_is_over(grave: type[Grave]) -> None:
    one = grave()
    one._ours.shutdown(socket.SHUT_RDWR)
    assert one.is_over()
    assert one.canceled == []
