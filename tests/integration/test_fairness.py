"""Servers reach the workers whose clients want them, and logins reach all workers."""

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise

from gpooler.stats.registry import RouteWord
from tests.harness import Gpooler, Postgres, RawClient, eventually
from tests.harness.client import query
from tests.harness.load import ServerWatch
from tests.harness.steering import clients_on, worker_of

Factory = Callable[..., Gpooler]
WORKERS = 4


def open_transactions(clients: list[RawClient]) -> set[str | None]:
    """The servers of transactions that are all open at the same time."""
    for client in clients:
        client.send(query("BEGIN; SELECT pg_backend_pid()"))
    return {client.rows()[0][0] for client in clients}


def commit(clients: list[RawClient]) -> None:
    for client in clients:
        client.query("COMMIT")


def test_one_loaded_worker_of_four_reaches_all_servers(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 20}, config={"performance": {"workers": WORKERS}})
    with ExitStack() as stack, ServerWatch(postgres) as watch:
        clients = clients_on(gpooler, {1: 5, 2: 5, 3: 20, 4: 5}, stack)
        # first each has its part
        everybody = [client for number in range(1, 5) for client in clients[number][:5]]
        first = open_transactions(everybody)
        assert len(first) == 20
        commit(everybody)
        # then one has all, the very same ones: they were handed over, not opened anew
        assert open_transactions(clients[3]) == first
        commit(clients[3])
        # and another gets some back
        assert open_transactions(clients[1]) <= first
        commit(clients[1])
    assert watch.most <= 20


def test_no_worker_with_waiters_is_left_out(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 2}, config={"performance": {"workers": WORKERS}})
    rounds = 15
    served: list[int] = []

    def work(number: int, client: RawClient) -> None:
        for _ in range(rounds):
            client.query("SELECT pg_sleep(0.05)")
            served.append(number)

    with ExitStack() as stack, ServerWatch(postgres) as watch:
        clients = clients_on(gpooler, dict.fromkeys(range(1, WORKERS + 1), 3), stack)
        threads = [
            threading.Thread(target=work, args=(number, client))
            for number, mine in clients.items()
            for client in mine
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(served) == WORKERS * 3 * rounds
    assert watch.most <= 2
    # While all have waiters, nobody is passed over again and again.
    half = served[: len(served) // 2]
    assert min(Counter(half).values()) >= len(half) / WORKERS / 3, Counter(half)
    for number in range(1, WORKERS + 1):
        places = [place for place, each in enumerate(half) if each == number]
        gaps = [later - earlier for earlier, later in pairwise(places)]
        assert max(gaps) <= 40, (number, gaps)


def test_waiters_of_a_worker_without_servers_are_served_while_others_are_busy(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 2}, config={"performance": {"workers": 2}})
    stop = threading.Event()

    def keep_busy(client: RawClient) -> None:
        while not stop.is_set():
            client.query("SELECT 1")

    with ExitStack() as stack:
        clients = clients_on(gpooler, {1: 6, 2: 1}, stack)
        threads = [threading.Thread(target=keep_busy, args=(client,)) for client in clients[1]]
        for thread in threads:
            thread.start()
        try:
            for number in range(20):
                assert clients[2][0].query(f"SELECT {number}") == [[str(number)]]
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_1000_logins_are_spread_within_15_percent(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, config={"performance": {"workers": WORKERS}})
    found: Counter[int] = Counter()
    with ExitStack() as stack:
        for _ in range(1000):
            found[worker_of(stack.enter_context(gpooler.raw()).login())] += 1
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS) == 1000)
    assert sorted(found) == [1, 2, 3, 4]
    assert all(0.85 * 250 <= count <= 1.15 * 250 for count in found.values()), found
