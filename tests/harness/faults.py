"""The test's end of gpooler's fault points (``gpooler/faults.py``)."""

import json
import select
import socket
import tempfile
import time
from pathlib import Path
from typing import Any, Final

PATIENCE_S: Final = 10.0


class Process:
    """One process of gpooler, as it has introduced itself."""

    def __init__(self, sock: socket.socket, who: str, pid: int) -> None:
        self.sock = sock
        self.who = who
        self.pid = pid
        self.reached: list[tuple[str, str]] = []  # points it has come to, with their details
        self._answers: list[Any] = []

    def arm(self, *points: str) -> None:
        """Halt the process when it next comes to one of these; returns when it knows."""
        for point in points:
            self.ask({"arm": point})

    def go(self) -> None:
        """Let it go on from where it stands."""
        self.reached.clear()
        self._send({"go": True})

    def ask(self, command: dict[str, Any], within: float = PATIENCE_S) -> Any:
        """Send a command and return the answer; a process whose hub runs comes by every faults.BEAT_S."""
        self._send(command)
        return self.answer(within)

    def answer(self, within: float = PATIENCE_S) -> Any:
        """The next answer."""
        deadline = time.monotonic() + within
        while not self._answers:
            assert self.hear(deadline - time.monotonic()), f"{self.who} does not answer"
        return self._answers.pop(0)

    def wait_at(self, point: str, within: float = PATIENCE_S) -> str:
        """Return the detail when the process stands at ``point``."""
        deadline = time.monotonic() + within
        while True:
            for name, detail in self.reached:
                if name == point:
                    return detail
            assert self.hear(deadline - time.monotonic()), f"{self.who} has not come to {point}"

    def hear(self, within: float) -> bool:
        """Take in one message; False when none comes or the process is gone."""
        if not select.select([self.sock], [], [], max(0.0, within))[0]:
            return False
        try:
            data = self.sock.recv(4096)
        except OSError:
            return False
        if not data:
            return False
        message = json.loads(data)
        if "reached" in message:
            self.reached.append((message["reached"], message["detail"]))
        else:
            self._answers.append(message["answer"])
        return True

    def _send(self, command: dict[str, Any]) -> None:
        self.sock.send(json.dumps(command).encode())


class Faults:
    """Listens for the processes of one gpooler, which is given ``environment``. A context manager."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="gpooler-faults-")
        self.path = str(Path(self._directory.name) / "control")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.path)
        self._listener.listen(64)
        self._processes: dict[str, Process] = {}

    @property
    def environment(self) -> dict[str, str]:
        """What gpooler must find in its environment."""
        return {"GPOOLER_DEBUG": self.path}

    def __enter__(self) -> "Faults":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.sock.close()  # whoever stands at a point goes on
        self._listener.close()
        self._directory.cleanup()

    def process(self, who: str, not_pid: int = 0, within: float = PATIENCE_S) -> Process:
        """``broker`` or ``worker N``, the newest; with ``not_pid`` the successor of that one."""
        deadline = time.monotonic() + within
        while True:
            patience = 0.0 if self._is_known(who, not_pid) else deadline - time.monotonic()
            if select.select([self._listener], [], [], max(0.0, patience))[0]:
                self._accept()
            elif self._is_known(who, not_pid):
                return self._processes[who]
            else:
                raise AssertionError(f"no {who} has come")

    def workers(self, count: int) -> list[Process]:
        """The workers 1 to ``count``."""
        return [self.process(f"worker {number}") for number in range(1, count + 1)]

    def _is_known(self, who: str, not_pid: int) -> bool:
        return who in self._processes and self._processes[who].pid != not_pid

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        hello = json.loads(sock.recv(4096))
        old = self._processes.get(hello["who"])
        if old is not None:
            old.sock.close()
        self._processes[hello["who"]] = Process(sock, hello["who"], hello["pid"])
