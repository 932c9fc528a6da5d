"""All processes under valgrind's memcheck while clients of every kind come and go: it has no complaint."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import pytest
import toml

from tests.full.actors import SCHEMA, TURNS, Left
from tests.harness import Postgres, RawClient, eventually, free_port
from tests.harness.client import cancel_request
from tests.harness.gpooler import basic_config

Program = Callable[[str], str]
SUPPRESSIONS: Final = Path(__file__).with_name("valgrind.supp")
START_S: Final = 240  # Python itself takes its time there
TURNS_EACH: Final = 8
ROUNDS: Final = 3


class Checked:
    """One gpooler under valgrind, with the reports of its processes."""

    def __init__(self, valgrind: str, postgres: Postgres, directory: Path) -> None:
        self.port = free_port()
        self._directory = directory
        rule = {"pool_size": 3, "server_lifetime": 3}
        config = basic_config(postgres, self.port, rule)
        config["logging"] |= {"log_session": True, "log_query": True}
        (directory / "config.toml").write_text(toml.dumps(config))
        with open(directory / "log", "wb") as log:
            self._process = subprocess.Popen(
                [
                    valgrind, "--tool=memcheck", "--xml=yes", f"--xml-file={directory}/report.%p",
                    f"--suppressions={SUPPRESSIONS}", "--leak-check=full", "--show-leak-kinds=definite",
                    "--num-callers=30", "--fair-sched=yes",
                    sys.executable, "-m", "gpooler", "run", "-c", str(directory / "config.toml"),
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, "PYTHONMALLOC": "malloc"},
            )  # fmt: skip

    def log(self) -> str:
        return (self._directory / "log").read_text()

    def wait_until_ready(self) -> None:
        eventually(lambda: self._process.poll() is not None or "ready: " in self.log(), within=START_S)
        assert self._process.poll() is None, self.log()

    def stop(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(START_S)

    def destroy(self) -> None:
        if self._process.poll() is None:
            self._process.kill()  # its children end with it
            self._process.wait()

    def findings(self) -> list[str]:
        """What memcheck has against code of ours, one text each."""
        found = []
        reports = sorted(self._directory.glob("report.*"))
        assert len(reports) == 3, reports  # master, broker, worker
        for report in reports:
            for error in ElementTree.parse(report).getroot().iter("error"):
                objects = [frame.findtext("obj", "") for frame in error.iter("frame")]
                if any("/gpooler/" in name and name.endswith(".so") for name in objects):
                    what = error.findtext("what") or error.findtext("xwhat/text")
                    frames = [
                        f"  {frame.findtext('fn')} {frame.findtext('file')}:{frame.findtext('line')}"
                        for frame in error.iter("frame")
                    ]
                    found.append("\n".join([f"{report.name}: {what}", *frames]))
        return found


@pytest.fixture
def checked(postgres: Postgres, program: Program, tmp_path: Path) -> Iterator[Checked]:
    valgrind = program("valgrind")
    postgres.query(f"{SCHEMA}; GRANT ALL ON soak TO PUBLIC", dbname="app")
    one = Checked(valgrind, postgres, tmp_path)
    yield one
    one.destroy()
    postgres.query("DROP TABLE soak", dbname="app")


@pytest.mark.full
@pytest.mark.timeout(900)
def test_memcheck_finds_nothing_in_our_code(postgres: Postgres, checked: Checked) -> None:
    checked.wait_until_ready()
    chance = random.Random(3)
    for _ in range(ROUNDS):
        for number, turn in enumerate(TURNS.values()):
            try:
                with RawClient(checked.port, timeout=60) as client:
                    client.login()
                    for _ in range(TURNS_EACH):
                        turn(client, chance, number)
                    client.terminate()
            except Left:
                pass
        # garbage, a wrong key, a server that ends while parked
        with RawClient(checked.port) as client:
            client.send(chance.randbytes(chance.randrange(4, 200)))
            client.half_close()
            client.read_to_end()
        with RawClient(checked.port) as client:
            client.send(cancel_request(1 << 30 | 1 << 22, b"1234"))
            client.read_to_end()
        for each in postgres.activity()[:1]:
            postgres.terminate(each.pid)
            eventually(lambda pid=each.pid: pid not in [one.pid for one in postgres.activity()])
    # some stay until the end
    with RawClient(checked.port).login() as idle, RawClient(checked.port).login() as busy:
        busy.query("BEGIN; SELECT 1")
        idle.query("SELECT 1")
        idle.query("SET work_mem = '1MB'")
        busy.query("COMMIT")
        assert checked.stop() == 0, checked.log()
    findings = checked.findings()
    assert not findings, "\n\n".join(findings[:5])
