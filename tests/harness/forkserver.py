"""Runs the command by a fork of a process that has imported everything: half of a start is imports.

What runs is the command's ``main`` with its arguments, environment and files, as the only thread of a
process of its own. Tests of the command itself, and those that set variables, start it as users do.
"""

import array
import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NoReturn

_MOST: Final = 1 << 17  # bytes of a message
_LOOK_S: Final = 0.01


class Forked:
    """A process that the server has made; what is needed of subprocess.Popen."""

    def __init__(self, server: "ForkServer", pid: int) -> None:
        self.pid = pid
        self._server = server

    def poll(self) -> int | None:
        """The exit status as of Popen, None while it lives."""
        return self._server.status(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("gpooler", timeout or 0)
            time.sleep(_LOOK_S)
        return status

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


class ForkServer:
    """One for a process that runs tests, and all of its threads; ends with it."""

    def __init__(self) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],  # nothing of the tests is imported
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._statuses: dict[int, int] = {}
        self._pid: int | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], directory: str, output: int
    ) -> Forked:
        """Run it, its output to that descriptor, in a session of its own."""
        message = json.dumps(
            {"command": command, "environment": dict(environment), "directory": directory}
        ).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [output]))]
        with self._lock:
            self._sock.sendmsg([message], rights)
            while self._pid is None:
                self._read(0)
            pid, self._pid = self._pid, None
        return Forked(self, pid)

    def status(self, pid: int) -> int | None:
        """How a process ended, None while it lives."""
        with self._lock, suppress(BlockingIOError):
            while True:
                self._read(socket.MSG_DONTWAIT)
        return self._statuses.get(pid)

    def close(self) -> None:
        """End it; what it has started lives on."""
        self._sock.close()
        self._process.wait()

    def _read(self, flags: int) -> None:
        data = self._sock.recv(_MOST, flags)
        if not data:
            raise RuntimeError("the fork server is dead")
        message: dict[str, int] = json.loads(data)
        if "status" in message:
            self._statuses[message["pid"]] = message["status"]
        else:
            self._pid = message["pid"]
            self._statuses.pop(self._pid, None)


_server: ForkServer | None = None


def fork_server() -> ForkServer:
    """The one of this process."""
    global _server
    if _server is None:
        _server = ForkServer()
    return _server


# --- in the server ------------------------------------------------------------------------------


def _serve(sock: socket.socket) -> None:
    """Until the tests are over."""
    import setproctitle

    import gpooler.process.master  # noqa: F401  # all that a run imports

    # finds out where titles are while the environment stands where the kernel put it
    setproctitle.setproctitle("gpooler: fork server of tests")

    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    while True:
        readable, _, _ = select.select([sock, reader], [], [])
        if reader in readable:
            os.read(reader, 4096)
            _reap(sock)
        if sock not in readable:
            continue
        data, fds, _, _ = socket.recv_fds(sock, _MOST, 1)
        if not data:
            return
        request: dict[str, Any] = json.loads(data)
        pid = os.fork()
        if pid == 0:
            sock.close()
            os.close(reader)
            os.close(writer)
            _run(request, fds[0])
        os.close(fds[0])
        sock.send(json.dumps({"pid": pid}).encode())


def _reap(sock: socket.socket) -> None:
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            code = os.waitstatus_to_exitcode(status)
            sock.send(json.dumps({"pid": pid, "status": code}).encode())


def _run(request: dict[str, Any], output: int) -> NoReturn:
    """In the child: what the interpreter does with the command."""
    from gpooler.cli import main

    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    command: list[str] = request["command"]
    sys.argv = command
    sys.orig_argv = [sys.executable, *command]
    status: Any = 70
    try:
        status = main()
    except SystemExit as error:
        status = error.code
    except BaseException:  # noqa: BLE001  # as the interpreter would
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
