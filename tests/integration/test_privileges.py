"""[service] user: root is given up once the listeners are bound, in every process."""

import os
import pwd
import shutil
import signal
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import psycopg
import pytest

from tests.harness import Gpooler, Postgres, eventually
from tests.harness.tools import is_reachable, unprivileged_account

Factory = Callable[..., Gpooler]

SKIPPED: Final = shutil.ignore_patterns("test", "tests", "site-packages", "idlelib", "tkinter", "ensurepip")


def readable_python(directory: Path) -> dict[str, str]:
    """The environment in which an unprivileged user may read Python's library, a copy if need be."""
    library = Path(sysconfig.get_path("stdlib"))
    if is_reachable(library / "os.py", unprivileged_account()):
        return {}
    shutil.copytree(library, directory / "lib" / library.name, ignore=SKIPPED)
    return {"PYTHONHOME": str(directory)}


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give root up")


@needs_root
def test_every_process_is_the_user_and_serves(postgres: Postgres, gpooler_factory: Factory) -> None:
    account = unprivileged_account()
    assert account is not None
    with tempfile.TemporaryDirectory(prefix="gpooler-user-") as made:
        directory = Path(made)
        directory.chmod(0o755)  # root's: the user may not write there
        pid_file, log_file = directory / "pid", directory / "log"
        socket = directory / ".s.PGSQL.6432"
        config = {
            "service": {
                "user": account.name,
                "pid_file": str(pid_file),
                "unix_socket_dir": made,
                "unix_socket_mode": "0600",
            },
            "logging": {"log_file": str(log_file)},
            "performance": {"workers": 2},
        }
        gpooler = Gpooler(postgres, config=config, environment=readable_python(directory / "python"))
        text = gpooler.config_file.read_text() + "\n[[listen]]\nport = 6432\n"
        gpooler.config_file.write_text(text)
        with gpooler:
            assert len(gpooler.processes()) == 4
            for process in gpooler.processes():
                assert set(process.uids()) == {account.uid}
                assert set(process.gids()) == {account.gid}
                status = Path(f"/proc/{process.pid}/status").read_text()
                (groups,) = [line.split()[1:] for line in status.splitlines() if line.startswith("Groups:")]
                assert {int(group) for group in groups} == set(os.getgrouplist(account.name, account.gid))
            assert pid_file.read_text() == f"{gpooler.pid}\n"
            assert {path.stat().st_uid for path in (pid_file, log_file, socket)} == {account.uid}
            for dsn in (gpooler.dsn(), gpooler.dsn(host=made, port=6432)):
                with psycopg.connect(dsn) as connection:
                    assert connection.execute("SELECT 1").fetchone() == (1,)
            (first, _) = gpooler.worker_pids()
            os.kill(first, signal.SIGKILL)  # a successor is the user, too
            eventually(
                lambda: len(gpooler.worker_pids()) == 2 and first not in gpooler.worker_pids(), within=20
            )
            gpooler.signal(signal.SIGUSR1)
            eventually(lambda: "log reopened" in log_file.read_text())
            assert gpooler.stop() == 0
            assert "Traceback" not in gpooler.log()
        assert pid_file.read_text() == ""  # it could not be removed, and names nobody


@needs_root
def test_a_user_that_cannot_read_the_program_ends_the_start(postgres: Postgres) -> None:
    account = unprivileged_account()
    assert account is not None
    gpooler = Gpooler(postgres, config={"service": {"user": account.name}}, environment={})
    copy = gpooler.directory / "python"  # which only its owner may enter
    library = Path(sysconfig.get_path("stdlib"))
    shutil.copytree(library, copy / "lib" / library.name, ignore=SKIPPED)
    copy.chmod(0o700)
    gpooler._environment["PYTHONHOME"] = str(copy)
    try:
        with pytest.raises(RuntimeError, match=f'user "{account.name}" may not read {copy}'):
            gpooler.start()
    finally:
        gpooler.destroy()


@needs_root
def test_a_user_that_is_not_there_ends_the_start(postgres: Postgres) -> None:
    gpooler = Gpooler(postgres, config={"service": {"user": "nobody-of-that-name"}})
    try:
        with pytest.raises(RuntimeError, match='there is no user "nobody-of-that-name"'):
            gpooler.start()
    finally:
        gpooler.destroy()


def test_the_user_that_runs_it_may_be_named(postgres: Postgres, gpooler_factory: Factory) -> None:
    name = pwd.getpwuid(os.geteuid()).pw_name
    gpooler = gpooler_factory(postgres, config={"service": {"user": name}})
    gpooler.connect().close()
