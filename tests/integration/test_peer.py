"""Clients of a Unix socket who are whom the system says they are."""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Gpooler, Postgres, eventually
from tests.harness.client import RawClient, ServerError, startup
from tests.harness.tools import free_port

Factory = Callable[..., Gpooler]
ME = pwd.getpwuid(os.geteuid()).pw_name


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gpooler-peer-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def config(directory: Path, port: int, **more: Any) -> dict[str, Any]:
    return {
        "listen": [{"host": "127.0.0.1", "port": port}, {"port": port}],
        "service": {"unix_socket_dir": str(directory), "unix_socket_mode": "0666"},
        **more,
    }


@pytest.mark.parametrize("is_by_hba", [False, True])
def test_a_client_is_who_the_system_says_it_is(
    postgres: Postgres, gpooler_factory: Factory, directory: Path, is_by_hba: bool
) -> None:
    port = free_port()
    rule = {"authentication": "scram-sha-256" if is_by_hba else "peer", "password": "secret"}
    more: dict[str, Any] = {}
    if is_by_hba:
        (directory / "hba").write_text("local all all peer\nhost all all all reject")
        more = {"routing": {"hba_file": str(directory / "hba")}}
    gpooler = gpooler_factory(postgres, rule=rule, config=config(directory, port, **more), port=port)
    for _ in range(3):
        with RawClient(port, str(directory)) as client:
            assert client.login(ME).query("SELECT current_user") == [["trust_user"]]
    with RawClient(port, str(directory)) as client, pytest.raises(ServerError) as caught:
        client.login("somebody")
    assert caught.value.sqlstate == "28P01"
    assert caught.value.text.endswith('password authentication failed for user "somebody"')
    eventually(lambda: f'(peer is "{ME}")' in gpooler.log())
    with RawClient(port) as client:  # over TCP nothing is known of anybody
        client.send(startup(ME, "app"))
        assert client.read().body[:4] == b"\0\0\0\x0a"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_of_the_system_is_somebody_else(
    postgres: Postgres, gpooler_factory: Factory, directory: Path
) -> None:
    port = free_port()
    gpooler_factory(postgres, rule={"authentication": "peer"}, config=config(directory, port), port=port)
    python = shutil.which("python3", path="/usr/bin:/bin") or sys.executable
    script = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(bytes.fromhex(sys.argv[2]))\n"
        "sys.stdout.buffer.write(s.recv(9))\n"
    )

    def said(user: str) -> bytes:
        path = f"{directory}/.s.PGSQL.{port}"
        command = [python, "-c", script, path, startup(user, "app").hex()]
        return subprocess.run(command, user="nobody", capture_output=True, check=True, timeout=20).stdout

    assert said("nobody") == b"R\0\0\0\x08\0\0\0\0"
    assert said(ME)[:1] == b"E"
