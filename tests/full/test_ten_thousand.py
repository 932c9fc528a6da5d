"""Ten thousand clients at once: all are served, none costs much, and nothing is left of them."""

import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Final

import pytest

from gpooler.stats.registry import RouteWord
from scripts.benchmark.measure import pss_bytes
from tests.harness import Gpooler, Postgres, RawClient, eventually
from tests.harness.client import ServerError, query
from tests.harness.console import CONSOLE, console
from tests.harness.load import ServerWatch

Factory = Callable[..., Gpooler]
MANY: Final = 10_000
SPARE_FILES: Final = 1_000
POOL_SIZE: Final = 20
MOST_BYTES: Final = 1_000  # of memory for a client that does nothing
CLIENTS_PER_ADDRESS: Final = 5_000  # a source address has some 28,000 ports
PATIENCE_S: Final = 60.0


@pytest.fixture
def many_files() -> Iterator[None]:
    """Lets this process and its children have so many connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY + SPARE_FILES
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"{wanted} open files are needed and {hard} are allowed (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def login(gpooler: Gpooler, number: int) -> RawClient:
    source = f"127.0.0.{2 + number // CLIENTS_PER_ADDRESS}"
    return gpooler.raw(source=source, timeout=PATIENCE_S).login()


@pytest.mark.full
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("many_files")
def test_ten_thousand_clients(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(
        postgres,
        rule={"pool_size": POOL_SIZE},
        config={**CONSOLE, "limits": {"client_max": MANY}},
    )
    with ServerWatch(postgres) as watch:
        with ExitStack() as stack:
            first = [stack.enter_context(login(gpooler, number)) for number in range(50)]
            for client in first:  # what is made at first use is not to count
                client.query("SELECT 1")
            pids = [process.pid for process in gpooler.processes()]
            before = pss_bytes(pids)
            clients = first + [stack.enter_context(login(gpooler, number)) for number in range(50, MANY)]
            eventually(lambda: gpooler.route_count(RouteWord.CLIENTS) == MANY)
            with gpooler.raw() as surplus, pytest.raises(ServerError, match="client_max is 10000"):
                surplus.login()
            each = (pss_bytes(pids) - before) / (MANY - len(first))
            assert each <= MOST_BYTES, f"{each:.0f} bytes a client"
            # all at once
            for number, client in enumerate(clients):
                client.send(query(f"SELECT {number}"))
            for number, client in enumerate(clients):
                assert client.rows() == [[str(number)]]
            # and the console shows each
            with console(gpooler) as control:
                shown = control.show("CLIENTS WHERE database = 'app'")
                assert {(row["addr"], row["port"]) for row in shown} == {
                    client.socket.getsockname() for client in clients
                }
                assert len({row["id"] for row in shown}) == MANY
            # and all go, some without a word, some while they wait
            for client in clients[::4]:
                client.send(query("SELECT pg_sleep(0.01)"))
            for number, client in enumerate(clients):
                (client.reset, client.close, client.terminate)[number % 3]()
            eventually(lambda: gpooler.route_count(RouteWord.CLIENTS) == 0, within=PATIENCE_S)
        eventually(lambda: gpooler.route_count(RouteWord.SERVERS_ACTIVE) == 0, within=PATIENCE_S)
        with ExitStack() as stack:
            for number in range(1000):
                client = stack.enter_context(login(gpooler, number))
                assert client.query(f"SELECT {number}") == [[str(number)]]
    assert watch.most <= POOL_SIZE
