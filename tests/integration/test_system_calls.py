"""What a transaction costs the relay in system calls, and the workers in messages to the broker."""

import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpooler.stats.registry import ProcessWord, RouteWord
from tests.harness import Gpooler, Postgres, RawClient, eventually
from tests.harness.client import SYNC, bind, describe, execute, parse, query
from tests.harness.load import Pgbench

Factory = Callable[..., Gpooler]
Program = Callable[[str], str]
TRANSACTIONS = 500
# Timers of the relay run meanwhile, and the first transaction may wake up late.
STRAY = 10

REQUESTS = {
    "simple": query("SELECT 1"),
    "extended": parse("SELECT $1::int") + bind("", (b"1",)) + describe("P") + execute() + SYNC,
}


class Trace:
    """The system calls of all threads of a process by name, once it is over."""

    def __init__(self) -> None:
        self.relay: Counter[str] = Counter()
        self.hub: Counter[str] = Counter()

    def take(self, text: str) -> None:
        """Sort strace's lines: the relay is the thread that receives from sockets."""
        threads: dict[str, Counter[str]] = {}
        for line in text.splitlines():
            # a call cut in two is counted where it begins
            if begun := re.match(r"(\d+) +(\w+)\(", line):
                threads.setdefault(begun[1], Counter())[begun[2]] += 1
        relay = max(threads, key=lambda thread: threads[thread]["recvfrom"])
        self.relay = threads.pop(relay)
        for others in threads.values():
            self.hub += others


@contextmanager
def traced(strace: str, pid: int) -> Iterator[Trace]:
    """Follow every thread of a process; the result is filled at the end. Skips where that is not allowed."""
    trace = Trace()
    with tempfile.TemporaryDirectory(prefix="gpooler-strace-") as directory:
        output = Path(directory) / "calls"
        command = [strace, "-f", "-e", "signal=none", "-o", str(output), "-p", str(pid)]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            first = process.stderr.readline()
            if "attached" not in first:
                pytest.skip(f"strace cannot attach: {first.strip()}")
            try:
                yield trace
            finally:
                process.send_signal(signal.SIGINT)
                process.communicate(timeout=20)
        trace.take(output.read_text())


def transact(client: RawClient, request: bytes) -> None:
    client.send(request)
    assert len(client.rows()) == 1


@pytest.mark.parametrize("protocol", sorted(REQUESTS))
def test_a_transaction_of_one_client_costs_two_receives_two_sends_and_at_most_two_waits(
    postgres: Postgres, gpooler_factory: Factory, program: Program, protocol: str
) -> None:
    strace = program("strace")
    gpooler = gpooler_factory(postgres)
    with gpooler.raw().login() as client:
        for _ in range(20):
            transact(client, REQUESTS[protocol])
        with traced(strace, gpooler.worker_pids()[0]) as trace:
            for _ in range(TRANSACTIONS):
                transact(client, REQUESTS[protocol])
    calls = trace.relay
    assert 2 * TRANSACTIONS <= calls.pop("recvfrom") <= 2 * TRANSACTIONS + STRAY
    assert 2 * TRANSACTIONS <= calls.pop("sendto") <= 2 * TRANSACTIONS + STRAY
    assert calls.pop("epoll_wait") <= 2 * TRANSACTIONS + STRAY
    # nothing else: no epoll_ctl, no write to an eventfd, no clock that is a system call
    assert calls["epoll_ctl"] == 0
    assert calls.total() <= STRAY, calls
    # and Python sleeps
    assert trace.hub["recvfrom"] == trace.hub["sendto"] == 0
    assert trace.hub["write"] <= STRAY, trace.hub


def test_fewer_clients_than_servers_need_the_broker_once_in_a_thousand_transactions(
    postgres: Postgres, gpooler_factory: Factory, program: Program
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 20}, config={"performance": {"workers": 2}})

    def transactions() -> int:
        return gpooler.route_count(RouteWord.TRANSACTIONS)

    def messages() -> int:
        return gpooler.process_count(ProcessWord.BROKER_SENT, ProcessWord.BROKER_RECEIVED)

    def is_quiet() -> bool:
        before = messages()
        time.sleep(0.5)
        return messages() == before

    with Pgbench(program("pgbench"), gpooler, "SELECT 1;", clients=16):
        eventually(lambda: transactions() > 4000 and is_quiet(), within=20)  # each has found what it needs
        first, said = transactions(), messages()
        eventually(lambda: transactions() > first + 20_000, within=30)
        said, first = messages() - said, transactions() - first
    assert said * 1000 <= first, f"{said} messages for {first} transactions"
