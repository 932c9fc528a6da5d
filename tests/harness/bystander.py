"""A well-behaved client beside others that are not: it must notice nothing of them."""

import threading
from itertools import count
from types import TracebackType

from tests.harness.client import SYNC, RawClient, bind, execute, parse
from tests.harness.gpooler import Gpooler

TURNS_A_LOGIN = 8
PAUSE_S = 0.002  # leaves the machine to the others


class Bystander:
    """Logs in and asks, again and again, in a thread; leaving the context raises what it met.

    What it sets for its session (``application_name``, ``IntervalStyle``) and each answer must be its own,
    whatever the others did to the servers it shares with them.
    """

    def __init__(self, gpooler: Gpooler, user: str = "trust_user") -> None:
        self._gpooler = gpooler
        self._user = user
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.turns = 0
        self.failure: BaseException | None = None

    def __enter__(self) -> "Bystander":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if kind is None:
            if self.failure is not None:
                raise AssertionError(f"the bystander's turn {self.turns} failed") from self.failure
            assert self.turns, "the bystander was never served"

    def _run(self) -> None:
        try:
            for number in count():
                if self._stop.is_set() and number:
                    return
                with self._gpooler.raw(timeout=30) as client:
                    name = f"bystander {number}"
                    client.login(self._user, application_name=name, IntervalStyle="iso_8601")
                    for _ in range(TURNS_A_LOGIN):
                        self._turn(client, name)
                    client.terminate()
        except BaseException as failure:  # noqa: BLE001  # raised where the context ends
            self.failure = failure

    def _turn(self, client: RawClient, name: str) -> None:
        number = self.turns
        expected = [[str(number), name, "P1D"]]
        sql = "current_setting('application_name'), interval '1 day'"
        assert client.query(f"SELECT {number}, {sql}") == expected
        client.send(parse(f"SELECT $1::int, {sql}"), bind(values=(b"%d" % number,)), execute(), SYNC)
        assert client.rows() == expected
        self.turns += 1
        self._stop.wait(PAUSE_S)
