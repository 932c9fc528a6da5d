"""A gpooler with two workers, brought to a named moment in the life of a client, and looked over afterwards.

Worker 1 is the victim's. Worker 2 has the bystander: a client in a transaction that nothing but the end of
PostgreSQL concerns.
"""

import os
import re
import select
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import psutil

from gpooler.stats.registry import ProcessWord, RouteWord
from tests.harness import Gpooler, Postgres, RawClient, eventually
from tests.harness.client import COPY_DONE, ServerError, cancel_request, copy_data, query, startup
from tests.harness.faults import Faults, Process
from tests.harness.load import ServerWatch
from tests.harness.steering import clients_on

POOL_SIZE: Final = 4
QUERIES: Final = 1000
LINES: Final = 30_000  # of 1,000 bytes: more than all buffers on the way to a client take
LARGE: Final = f"SELECT repeat('x', 1000) FROM generate_series(1, {LINES})"
SMALL: Final = "SELECT 42"
STOP_S: Final = 5.0
PATIENCE_S: Final = 20.0


class Fault(StrEnum):
    """What goes wrong."""

    KILL_WORKER = "kill worker"
    KILL_BROKER = "kill broker"
    STOP_BROKER = "stop broker for 5 s"
    KILL_POSTGRES = "kill a PostgreSQL process"
    DROP_CLIENT = "drop client"
    STALL_CLIENT = "stall client"


class State(StrEnum):
    """Where the victim is when it does."""

    LOGIN = "login"
    WAITING = "waiting"
    GRANT = "grant in flight"
    DESCRIPTOR = "descriptor in flight"
    QUERY = "mid-query"
    COPY = "mid-COPY"
    RESETTING = "resetting"  # the server that the victim waits for
    CANCELLING = "cancelling"


ON_THE_BROKER: Final = (Fault.KILL_BROKER, Fault.STOP_BROKER)


class Stage:
    """One case. ``enter`` brings it to the moment, ``strike`` does the damage, the rest looks."""

    def __init__(
        self,
        postgres: Postgres,
        gpooler: Gpooler,
        faults: Faults,
        stack: ExitStack,
        state: State,
        fault: Fault,
    ) -> None:
        self._postgres, self._gpooler, self._faults, self._stack = postgres, gpooler, faults, stack
        self._state, self._fault = state, fault
        self._watch = stack.enter_context(ServerWatch(postgres))
        self._broker, self._worker = faults.process("broker"), faults.process("worker 1")
        faults.process("worker 2")
        self._halted: Process | None = None
        self._frozen = 0
        self._gate = stack.enter_context(ExitStack())  # what the victim's query waits for
        self._holders: list[RawClient] = []
        clients = clients_on(gpooler, {1: 5, 2: 5}, stack)
        self._here, self._there = clients[1], clients[2]
        hold_all(self._here)
        hold_all(self._there)
        self._descriptors = self._settled_descriptors()
        self._bystander = self._there.pop()
        self._bystander.query("BEGIN")
        self._victim = self._here.pop()
        self._target = self._pid_of(self._bystander)  # the process of PostgreSQL that is to be killed

    # --- to the moment

    def enter(self) -> None:
        """Bring the victim there."""
        match self._state:
            case State.LOGIN:
                self._enter_login()
            case State.WAITING:
                self._hold(self._there[:1] + self._here[:2])
                self._victim.send(query(self._request))
                self._wait_for_a_waiting_client()
            case State.GRANT:
                self._enter_grant()
            case State.DESCRIPTOR:
                self._enter_descriptor()
            case State.QUERY:
                self._run_query()
            case State.COPY:
                self._enter_copy()
            case State.RESETTING:
                self._enter_resetting()
            case State.CANCELLING:
                self._enter_cancelling()

    @property
    def _request(self) -> str:
        return LARGE if self._fault is Fault.STALL_CLIENT else SMALL

    def _enter_login(self) -> None:
        """Whoever of many is accepted by worker 1 is the victim."""
        self._victim.terminate()
        self._worker.arm("login_adopting")
        for _ in range(200):
            client = self._stack.enter_context(self._gpooler.raw(timeout=PATIENCE_S))
            client.send(startup("trust_user", "app"))
            readable, _, _ = select.select([client.socket, self._worker.sock], [], [], PATIENCE_S)
            if self._worker.sock in readable:
                self._worker.wait_at("login_adopting")
                if self._fault is Fault.STALL_CLIENT:
                    client.send(query(LARGE))  # who will not read is at its query already
                self._victim, self._halted = client, self._worker
                return
            self._here.append(client)
        raise AssertionError("worker 1 accepts nobody")

    def _enter_grant(self) -> None:
        self._bystander.query("COMMIT")
        for backend in self._postgres.activity():
            self._postgres.terminate(backend.pid)
        eventually(lambda: not self._postgres.activity() and not self._count(RouteWord.SERVERS_IDLE))
        self._bystander.query("BEGIN")
        self._target = self._pid_of(self._bystander)
        if self._fault in ON_THE_BROKER:
            self._halt(self._broker, "broker_sends", "GrantOpen")
        else:
            self._halt(self._worker, "grant_received")

    def _enter_descriptor(self) -> None:
        self._hold(self._there[:3])
        giver = self._holders.pop()
        self._target = self._pid_of(giver)
        if self._fault in ON_THE_BROKER:
            self._halt(self._broker, "broker_sends", "GrantServer", lambda: giver.query("COMMIT"))
        else:
            self._halt(self._worker, "descriptor_received", "", lambda: giver.query("COMMIT"))

    def _halt(
        self, process: Process, point: str, detail: str = "", then: Callable[[], Any] = lambda: None
    ) -> None:
        """The victim asks; after ``then`` the process comes to the point."""
        process.arm(f"{point}:{detail}" if detail else point)
        self._victim.send(query(self._request))
        then()
        process.wait_at(point)
        self._halted = process

    def _run_query(self) -> None:
        if self._fault is Fault.STALL_CLIENT:
            sql = LARGE
        elif self._fault in ON_THE_BROKER and self._state is State.QUERY:  # it ends when all is done
            self._gate.enter_context(self._postgres.locked())
            sql = "SELECT 42 FROM pg_advisory_xact_lock(1)"
        else:
            sql = "SELECT 42 FROM pg_sleep(100)"
        self._victim.send(query(sql))
        self._target = eventually(lambda: self._runs(sql))
        if self._fault is Fault.STALL_CLIENT:
            eventually(self._is_blocked, PATIENCE_S)

    def _enter_copy(self) -> None:
        # synchronous: it survives the crash that may follow
        self._postgres.query(
            "SET synchronous_commit = on; CREATE TABLE IF NOT EXISTS struck (number int); TRUNCATE struck",
            "app",
        )
        self._postgres.query("GRANT ALL ON struck TO PUBLIC", "app")
        self._victim.send(query("COPY struck FROM STDIN"))
        assert self._victim.read().kind == b"G"
        self._victim.send(copy_data(b"1\n"), copy_data(b"2\n")[:-1])  # not even a whole message
        self._target = eventually(lambda: self._runs("COPY struck FROM STDIN"))

    def _enter_resetting(self) -> None:
        """PostgreSQL does not answer the ROLLBACK; the victim waits for that server."""
        self._hold(self._there[:2])
        gone = self._here.pop()
        gone.query("BEGIN")
        self._target = self._frozen = self._pid_of(gone)
        self._postgres.freeze(self._frozen)
        self._stack.callback(self._thaw)
        gone.close()
        eventually(lambda: self._count(RouteWord.CLIENTS_ACTIVE) == 3)
        assert self._count(RouteWord.SERVERS_ACTIVE) == 4
        self._victim.send(query(self._request))
        self._wait_for_a_waiting_client()

    def _enter_cancelling(self) -> None:
        self._run_query()
        self._worker.arm("cancel_sending")
        canceller = self._stack.enter_context(self._gpooler.raw(timeout=PATIENCE_S))
        canceller.send(cancel_request(self._victim.pid, self._victim.key))
        self._worker.wait_at("cancel_sending")
        self._halted = self._worker

    # --- the fault

    def strike(self) -> None:
        """Do it, and let everything that was held for it go on."""
        match self._fault:
            case Fault.KILL_WORKER:
                os.kill(self._worker.pid, signal.SIGKILL)
            case Fault.KILL_BROKER:
                os.kill(self._broker.pid, signal.SIGKILL)
            case Fault.STOP_BROKER:
                self._stop_broker()
            case Fault.KILL_POSTGRES:
                self._postgres.kill(self._target)
                self._frozen = 0
            case Fault.DROP_CLIENT:
                self._victim.reset()
            case Fault.STALL_CLIENT:
                pass  # it does not read any more
        self._let_go()
        self._thaw()
        self._gate.close()
        for holder in self._holders:
            if self._fault is Fault.KILL_POSTGRES or (holder in self._here and self._is_worker_dead):
                holder.close()
            else:
                holder.query("COMMIT")

    def _stop_broker(self) -> None:
        os.kill(self._broker.pid, signal.SIGSTOP)
        try:
            if self._halted is not self._broker:
                self._let_go()
            end = time.monotonic() + STOP_S
            while time.monotonic() < end:  # whoever has a server does not notice
                assert self._bystander.query("SELECT 1 FROM pg_sleep(0.05)") == [["1"]]
        finally:
            os.kill(self._broker.pid, signal.SIGCONT)

    def _let_go(self) -> None:
        if self._halted is not None:
            with suppress(BrokenPipeError, ConnectionResetError):
                self._halted.go()
            self._halted = None

    def _thaw(self) -> None:
        if self._frozen:
            self._postgres.thaw(self._frozen)
            self._frozen = 0

    # --- afterwards

    def check_clients(self) -> None:
        """The victim has what is due to it, the bystander never noticed."""
        if self._fault is Fault.KILL_POSTGRES:
            assert_broken(self._bystander)
        else:
            assert self._bystander.query("SELECT 7") == [["7"]]
        if self._fault is Fault.KILL_WORKER:
            assert not [each for each in self._victim.read_to_end() if each.kind == b"D"]
        elif self._fault is Fault.STALL_CLIENT:
            self._check_stalled()
        elif self._fault is not Fault.DROP_CLIENT:
            self._check_victim()
        if self._fault is not Fault.KILL_POSTGRES:
            self._bystander.query("COMMIT")

    def _check_victim(self) -> None:
        victim = self._victim
        is_server_lost = self._fault is Fault.KILL_POSTGRES
        match self._state:
            case State.LOGIN:
                victim.read_until()
                assert victim.query(SMALL) == [["42"]]
            case State.WAITING | State.GRANT | State.DESCRIPTOR | State.RESETTING if is_server_lost:
                assert_right_or_told(victim)
            case State.WAITING | State.GRANT | State.DESCRIPTOR | State.RESETTING:
                assert victim.rows() == [["42"]]
            case _ if is_server_lost:
                assert_broken(victim)
            case State.QUERY:
                assert victim.rows() == [["42"]]
            case State.COPY:
                self._finish_copy()
            case State.CANCELLING:
                assert sqlstate_of(victim) == "57014"
                assert victim.query(SMALL) == [["42"]]

    def _check_stalled(self) -> None:
        """The others run in the meantime; then it goes on as if nothing had been."""
        if self._state not in (State.COPY, State.CANCELLING):
            eventually(self._is_blocked, PATIENCE_S)
        for client in [*self._here[:2], *self._there[:2]]:
            if client not in self._holders or client.pid:
                assert client.query("SELECT 8") == [["8"]]
        match self._state:
            case State.COPY:
                self._finish_copy()
            case State.CANCELLING:
                with suppress(ServerError):  # it had sent all before the request came to it
                    self._victim.rows()
            case State.LOGIN:
                self._victim.read_until()
                assert len(self._victim.rows()) == LINES
            case _:
                assert len(self._victim.rows()) == LINES
        if self._state is not State.LOGIN:
            assert self._victim.query(SMALL) == [["42"]]

    def _finish_copy(self) -> None:
        self._victim.send(copy_data(b"2\n")[-1:], copy_data(b"3\n"), COPY_DONE)
        messages = self._victim.read_until()
        assert [each.tag() for each in messages if each.kind == b"C"] == ["COPY 3"]

    def check_numbers(self) -> None:
        """Nothing is left of the case; every slot can be used by each worker; nothing has leaked."""
        for client in [self._victim, self._bystander, *self._here, *self._there]:
            client.close()
        eventually(self._is_idle, PATIENCE_S)
        if self._fault is Fault.KILL_WORKER:
            self._faults.process("worker 1", not_pid=self._worker.pid)
        if self._fault is Fault.KILL_BROKER:
            self._faults.process("broker", not_pid=self._broker.pid)
        if self._state is State.COPY:
            is_done = self._fault in (*ON_THE_BROKER, Fault.STALL_CLIENT)
            expected = [(1,), (2,), (3,)] if is_done else []
            assert self._postgres.query("SELECT number FROM struck ORDER BY 1", "app") == expected
        with ExitStack() as stack:
            clients = clients_on(self._gpooler, {1: POOL_SIZE, 2: POOL_SIZE}, stack)
            hold_all(clients[1])
            hold_all(clients[2])
            ask_many([*clients[1], *clients[2]])
        eventually(self._is_idle, PATIENCE_S)
        assert self._watch.most <= POOL_SIZE
        eventually(self._has_old_descriptors)

    # --- small parts

    @property
    def _is_worker_dead(self) -> bool:
        return self._fault is Fault.KILL_WORKER

    def _hold(self, clients: Sequence[RawClient]) -> None:
        for client in clients:
            client.query("BEGIN; SELECT 1")
        self._holders += clients

    def _pid_of(self, client: RawClient) -> int:
        """The process that serves a client in a transaction."""
        return int(client.query("SELECT pg_backend_pid()")[0][0] or 0)

    def _count(self, word: RouteWord) -> int:
        return self._gpooler.route_count(word)

    def _wait_for_a_waiting_client(self) -> None:
        eventually(lambda: self._count(RouteWord.CLIENTS_WAITING) == 1)

    def _runs(self, sql: str) -> int:
        found = [
            each.pid for each in self._postgres.activity() if each.query == sql and each.state == "active"
        ]
        return found[0] if found else 0

    def _is_blocked(self) -> bool:
        """PostgreSQL cannot send any more."""
        sql = (
            "SELECT 1 FROM pg_stat_activity WHERE query LIKE 'SELECT repeat%' AND wait_event = 'ClientWrite'"
        )
        return bool(self._postgres.query(sql))

    def _is_idle(self) -> bool:
        """No client anywhere, every server of PostgreSQL parked and known, none too many."""
        activity = self._postgres.activity()
        words = (
            RouteWord.CLIENTS, RouteWord.CLIENTS_ACTIVE, RouteWord.CLIENTS_WAITING, RouteWord.SERVERS_ACTIVE,
            RouteWord.SERVERS_LOGIN, RouteWord.SERVERS_CLOSING, RouteWord.CLIENTS_ADMITTED,
        )  # fmt: skip
        left = {word.name: self._count(word) for word in words}
        left["CLIENTS of processes"] = self._gpooler.process_count(
            ProcessWord.CLIENTS, ProcessWord.CLIENTS_LOGIN
        )
        assert not any(left.values()), left
        assert {each.state for each in activity} <= {"idle"}, activity
        idle = self._count(RouteWord.SERVERS_IDLE)
        assert len(activity) == idle <= POOL_SIZE, (idle, activity)
        return True

    def _settled_descriptors(self) -> dict[str, Counter[str]]:
        """What is there when nothing comes and goes any more."""
        while True:
            first = self._own_descriptors()
            time.sleep(0.1)
            if first == self._own_descriptors():
                return first

    def _own_descriptors(self) -> dict[str, Counter[str]]:
        """Descriptors of each process by kind, but for connections to clients and servers."""
        ports = {self._postgres.port, self._gpooler.port}
        result = {}
        for process in self._gpooler.processes():
            with suppress(psutil.NoSuchProcess, FileNotFoundError):
                kinds: Counter[str] = Counter()
                for link in Path(f"/proc/{process.pid}/fd").iterdir():
                    with suppress(FileNotFoundError):  # closed in the meantime
                        kinds[re.sub(r"\d+", "", os.readlink(link))] += 1
                kinds["socket:[]"] -= sum(
                    bool(each.raddr) and not ports.isdisjoint((each.raddr.port, each.laddr.port))
                    for each in process.net_connections(kind="tcp")
                )
                result[" ".join(process.cmdline()).strip()] = kinds
        return result

    def _has_old_descriptors(self) -> bool:
        grown = self._grown_descriptors()
        assert not grown, grown
        return True

    def _grown_descriptors(self) -> dict[str, dict[str, int]]:
        """What each process has more or less than at the beginning."""
        now = self._own_descriptors()
        assert now.keys() == self._descriptors.keys(), (now.keys(), self._descriptors.keys())
        grown = {}
        for who, before in self._descriptors.items():
            kinds = {kind: now[who][kind] - before[kind] for kind in now[who].keys() | before.keys()}
            grown[who] = {kind: count for kind, count in kinds.items() if count}
        return {who: kinds for who, kinds in grown.items() if kinds}


def hold_all(clients: Sequence[RawClient]) -> None:
    """Every slot can be used: so many transactions are open at the same time."""
    clients = clients[:POOL_SIZE]
    for client in clients:
        client.send(query("BEGIN; SELECT pg_backend_pid()"))
    assert len({client.rows()[0][0] for client in clients}) == POOL_SIZE
    for client in clients:
        client.query("COMMIT")


def ask_many(clients: Sequence[RawClient]) -> None:
    """The next QUERIES queries are right."""
    for first in range(0, QUERIES, len(clients)):
        for number, client in enumerate(clients, first):
            client.send(query(f"SELECT {number}"))
        for number, client in enumerate(clients, first):
            assert client.rows() == [[str(number)]]


def assert_broken(client: RawClient) -> None:
    """The client's connection ends, or it is told of an error; it gets no result."""
    try:
        client.send(query("SELECT 1"))
        messages = client.read_until()
    except (EOFError, OSError):
        return
    assert [each for each in messages if each.kind == b"E"], messages


def assert_right_or_told(client: RawClient) -> None:
    """PostgreSQL may let somebody in just before it throws all out: that is an error, not silence."""
    messages = []
    with suppress(EOFError):
        while not messages or messages[-1].kind != b"Z":
            messages.append(client.read())
    rows = [each.values() for each in messages if each.kind == b"D"]
    codes = [each.fields()["C"] for each in messages if each.kind == b"E"]
    assert rows == [["42"]] or set(codes) & {"08006", "57P02"}, messages


def sqlstate_of(client: RawClient) -> str:
    """Of the error that is the answer."""
    try:
        rows = client.rows()
    except ServerError as error:
        return error.sqlstate
    raise AssertionError(f"no error but {rows}")
