"""Limits of clients that are counted over all workers."""

from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from gpooler.client.admission import Admission
from gpooler.stats.registry import ProcessWord, RouteWord
from gpooler.stats.shared import SharedCounters

ROUTE, OTHER = 3, 4


@pytest.fixture
def workers() -> Iterator[list[Admission]]:
    """Three workers that see each other's cells."""
    with ExitStack() as stack:
        cells = [stack.enter_context(closing(SharedCounters.create())) for _ in range(3)]
        past = stack.enter_context(closing(SharedCounters.create()))
        admissions = []
        for cell in cells:
            admission = Admission(cell, past)
            admission.peers = {number: peer for number, peer in enumerate(cells) if peer is not cell}
            admissions.append(admission)
        yield admissions


def clients(admission: Admission) -> int:
    return admission._own.process(ProcessWord.CLIENTS)


def listen(admission: Admission, is_listening: bool = True) -> None:
    admission._own.set_process(ProcessWord.LISTENING, int(is_listening))


def test_the_limit_holds_over_all_workers(workers: list[Admission]) -> None:
    assert [workers[number % 3].enter(5) for number in range(7)] == [True] * 5 + [False] * 2
    assert [clients(worker) for worker in workers] == [2, 2, 1]
    workers[0].leave()
    assert workers[2].enter(5)
    assert not workers[1].enter(5)


def test_who_is_refused_is_not_counted(workers: list[Admission]) -> None:
    assert not workers[0].enter(0)
    assert clients(workers[0]) == 0
    assert not workers[0].enter_route(ROUTE, 0)
    assert workers[1].total(ROUTE, RouteWord.CLIENTS_ADMITTED) == 0


def test_without_a_limit_everybody_is_counted_and_nobody_refused(workers: list[Admission]) -> None:
    assert all(workers[0].enter(None) and workers[0].enter_route(ROUTE, None) for _ in range(10))
    assert clients(workers[0]) == 10
    assert not workers[1].enter(10)
    assert workers[1].total(ROUTE, RouteWord.CLIENTS_ADMITTED) == 10


def test_the_limit_of_a_route_counts_its_own_clients(workers: list[Admission]) -> None:
    assert workers[0].enter_route(ROUTE, 2)
    assert workers[1].enter_route(ROUTE, 2)
    assert not workers[2].enter_route(ROUTE, 2)
    assert workers[2].enter_route(OTHER, 2)
    workers[1].leave_route(ROUTE)
    assert workers[2].enter_route(ROUTE, 2)


def test_a_dead_worker_is_not_counted_when_it_is_no_peer_any_more(workers: list[Admission]) -> None:
    assert all(workers[1].enter(None) for _ in range(5))
    assert not workers[0].enter(5)
    del workers[0].peers[1]
    assert workers[0].enter(5)


def test_sums_are_over_all_workers_and_words(workers: list[Admission]) -> None:
    for number, worker in enumerate(workers):
        worker._own.set_route(ROUTE, RouteWord.SERVERS_IDLE, number + 1)
        worker._own.set_route(ROUTE, RouteWord.CLIENTS_WAITING, 10 * (number + 1))
    assert workers[0].total(ROUTE, RouteWord.SERVERS_IDLE, RouteWord.CLIENTS_WAITING) == 66
    assert workers[0].waiting_elsewhere(ROUTE) == 50


@pytest.mark.parametrize(
    ("mine", "others", "is_too_many"),
    [
        (9, 0, False),  # mean 3: few clients may lie as they fall
        (12, 0, False),
        (13, 0, True),  # more than 8 over the mean of 4.3
        (108, 100, False),
        (113, 100, True),
        (1040, 1000, False),  # within 5 % of the mean of 1013
        (1100, 1000, True),
    ],
)
def test_a_worker_over_the_mean_lets_others_accept(
    workers: list[Admission], mine: int, others: int, is_too_many: bool
) -> None:
    listen(workers[1])
    for worker, count in zip(workers, (mine, others, others), strict=True):
        worker._own.set_process(ProcessWord.CLIENTS, count)
    assert workers[0].has_too_many() == is_too_many
    assert not workers[1].has_too_many()


def test_a_worker_accepts_whatever_it_has_when_nobody_else_does(workers: list[Admission]) -> None:
    workers[0]._own.set_process(ProcessWord.CLIENTS, 1000)
    listen(workers[0])
    assert not workers[0].has_too_many()
    listen(workers[2])
    assert workers[0].has_too_many()
    listen(workers[2], False)
    assert not workers[0].has_too_many()
