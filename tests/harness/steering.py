"""Clients on chosen workers: the process id a pooled client is given names the worker that owns it."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import count

from tests.harness.client import RawClient
from tests.harness.gpooler import Gpooler

SYNTHETIC_PID = 1 << 30
PATIENCE_S = 20.0
BURST = 10  # logins in a row; a worker looks now and then whether it is its turn to accept
MOST_SPARE = 300


def worker_of(client: RawClient) -> int:
    """The number of the worker that owns a client of a transaction or statement pool."""
    assert client.pid & SYNTHETIC_PID, f"process id {client.pid} is a server's own"
    return (client.pid >> 22) & 0xFF


def clients_on(
    gpooler: Gpooler, wanted: Mapping[int, int], stack: ExitStack, **login: str
) -> dict[int, list[RawClient]]:
    """Logged-in clients by worker number, as many as ``wanted`` says; closed with ``stack``.

    Others are held until all are there, because workers with few clients accept first.
    """
    found: dict[int, list[RawClient]] = {number: [] for number in wanted}
    with ExitStack() as spare:
        deadline = time.monotonic() + PATIENCE_S
        for tries in count(1):
            if all(len(found[number]) == most for number, most in wanted.items()):
                return found
            client = gpooler.raw(timeout=30)
            try:
                client.login(**login)
                mine = found.get(worker_of(client))
            except BaseException:
                client.close()
                raise
            if mine is not None and len(mine) < wanted[worker_of(client)]:
                mine.append(stack.enter_context(client))
            else:
                spare.callback(client.terminate)
            if tries % BURST == 0:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.03)
            if tries % MOST_SPARE == 0:
                spare.close()
    raise AssertionError(f"no way to get {wanted}: { ({n: len(c) for n, c in found.items()}) }")
