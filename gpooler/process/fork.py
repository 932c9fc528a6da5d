"""Forks a child so that nothing of the master lives on in it."""

import ctypes
import gc
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

import setproctitle

EXIT_CRASH: Final = 70  # EX_SOFTWARE of sysexits.h: an exception nobody caught
MASTER_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG: Final = 1  # prctl(2)
_libc = ctypes.CDLL(None, use_errno=True)


def assert_can_fork() -> None:
    """Raise RuntimeError when there is a second thread or a hub: a fork would copy half of it."""
    tasks = len(list(Path("/proc/self/task").iterdir()))
    if threading.active_count() != 1 or tasks != 1:
        raise RuntimeError(f"fork with {tasks} threads: {threading.enumerate()}")
    hub_local = sys.modules.get("gevent._hub_local")
    if hub_local is not None and hub_local.get_hub_if_exists() is not None:
        raise RuntimeError("fork with a gevent hub")


def fork(title: str, body: Callable[[], int], on_crash: Callable[[str], None]) -> int:
    """Fork a child that exits with what ``body`` returns; returns its pid, in the master only.

    In the child: signals as ``process/context.py`` says, killed when the master dies, ``title`` the process'
    name, ``on_crash`` told the traceback of an exception. Raises RuntimeError, OSError.
    """
    assert_can_fork()
    sys.stdout.flush()
    sys.stderr.flush()
    gc.collect()
    gc.freeze()  # the child's collections leave the shared pages alone
    master = os.getpid()
    # A signal between the fork and the child's own settings would land in the master's wake-up pipe.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*MASTER_SIGNALS, signal.SIGCHLD))
    try:
        pid = os.fork()
        if pid == 0:
            _child(title, body, on_crash, master, before)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def _child(
    title: str,
    body: Callable[[], int],
    on_crash: Callable[[str], None],
    master: int,
    mask: set[signal.Signals | int],
) -> NoReturn:
    status = EXIT_CRASH
    try:
        signal.set_wakeup_fd(-1)
        for number in MASTER_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == master:  # else it died before the call
            setproctitle.setproctitle(title)
            status = body()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else EXIT_CRASH
    except BaseException:  # noqa: BLE001  # the top of a process: logged, then the end
        try:
            on_crash(traceback.format_exc())
        finally:
            os._exit(EXIT_CRASH)
    # Not the interpreter's own end: that would run what the master had registered for its exit.
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)
