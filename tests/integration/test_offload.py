"""Blocking calls in native threads: what hangs costs its own threads and nothing else."""

import threading
from collections.abc import Callable, Iterator

import gevent
import pytest

from gpooler.auth.offload import Offload, OffloadFull, OffloadTimeout

Hang = Callable[[], str]
LONG_MS = 30_000


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """What the calls that hang wait for."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def hang(release: threading.Event) -> Hang:
    def hang() -> str:
        release.wait(60)
        return "late"

    return hang


def settle(offload: Offload) -> None:
    """Until every call has ended."""
    with gevent.Timeout(20):
        while offload.unfinished:
            gevent.sleep(0.005)


def test_a_call_runs_in_another_thread_and_gives_what_it_returns() -> None:
    offload = Offload("x", threads=1, queue_limit=0, timeout_ms=LONG_MS)
    assert offload.run(threading.get_ident) != threading.get_ident()
    assert offload.run(lambda: "said") == "said"
    settle(offload)


def test_what_a_call_raises_is_raised_where_it_is_waited_for(capfd: pytest.CaptureFixture[str]) -> None:
    offload = Offload("x", threads=1, queue_limit=0, timeout_ms=LONG_MS)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            offload.run(lambda: 1 // 0)
        settle(offload)
    assert capfd.readouterr().err == ""


def test_a_call_that_hangs_is_given_up_and_the_hub_goes_on(hang: Hang, release: threading.Event) -> None:
    offload = Offload("the directory", threads=1, queue_limit=5, timeout_ms=50)
    ticks = []
    ticker = gevent.spawn(lambda: [ticks.append(gevent.sleep(0)) for _ in range(100)])
    with pytest.raises(OffloadTimeout, match="the directory: no answer within 50 ms"):
        offload.run(hang)
    ticker.join()
    assert len(ticks) == 100
    assert offload.unfinished == 1  # its thread is not free
    with pytest.raises(OffloadTimeout):  # nobody was free to begin with this one
        offload.run(lambda: pytest.fail("begun although nobody waits any more"))
    assert offload.unfinished == 1
    release.set()
    settle(offload)
    assert offload.run(lambda: "again") == "again"


def test_one_that_hangs_does_not_slow_another(hang: Hang) -> None:
    dead = Offload("dead", threads=2, queue_limit=10, timeout_ms=LONG_MS)
    alive = Offload("alive", threads=2, queue_limit=10, timeout_ms=LONG_MS)
    waiting = [gevent.spawn(dead.run, hang) for _ in range(12)]
    gevent.idle()
    assert [alive.run(lambda: "here") for _ in range(20)] == ["here"] * 20
    assert not any(greenlet.ready() for greenlet in waiting)
    gevent.killall(waiting)


def test_a_full_queue_refuses_at_once(hang: Hang, release: threading.Event) -> None:
    offload = Offload("x", threads=2, queue_limit=3, timeout_ms=LONG_MS)
    waiting = [gevent.spawn(offload.run, hang) for _ in range(5)]
    gevent.idle()
    with pytest.raises(OffloadFull, match="x: 5 logins wait for it already"):
        offload.run(hang)
    release.set()
    gevent.joinall(waiting, timeout=20)
    assert [greenlet.value for greenlet in waiting] == ["late"] * 5
    settle(offload)


def test_who_is_killed_while_it_waits_leaves_no_place_taken(hang: Hang, release: threading.Event) -> None:
    offload = Offload("x", threads=1, queue_limit=1, timeout_ms=LONG_MS)
    waiting = [gevent.spawn(offload.run, hang) for _ in range(2)]
    gevent.idle()
    gevent.killall(waiting)
    assert offload.unfinished == 1  # the one that runs
    release.set()
    settle(offload)
    assert offload.run(lambda: "free") == "free"


def test_more_threads_than_one_work_at_once() -> None:
    offload = Offload("x", threads=3, queue_limit=0, timeout_ms=LONG_MS)
    together = threading.Barrier(3, timeout=20)
    waiting = [gevent.spawn(offload.run, together.wait) for _ in range(3)]
    gevent.joinall(waiting, timeout=20)
    assert sorted(greenlet.value for greenlet in waiting) == [0, 1, 2]
    settle(offload)


def test_another_timeout_that_meets_the_wait_is_not_taken_for_ours(hang: Hang) -> None:
    offload = Offload("x", threads=1, queue_limit=1, timeout_ms=LONG_MS)
    with pytest.raises(gevent.Timeout), gevent.Timeout(0.05):
        offload.run(hang)
