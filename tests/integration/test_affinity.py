"""Cores and nice values of the processes, as the kernel shows them."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from gpooler.config.affinity import cores_text
from tests.harness import Gpooler, Postgres, eventually
from tests.harness.gpooler import command
from tests.harness.tools import find_program

Factory = Callable[..., Gpooler]
ALLOWED: Final = sorted(os.sched_getaffinity(0))
needs_two_cores = pytest.mark.skipif(len(ALLOWED) < 2, reason="needs two cores")


def cores_by_title(gpooler: Gpooler) -> dict[str, set[str]]:
    """What the kernel lists for each process, over all its threads."""
    found: dict[str, set[str]] = {}
    for process in gpooler.processes():
        texts = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/status")]
        title = "".join(process.cmdline()[:1]).strip()  # of one that has just ended nothing is left
        found[title] = {text.split("Cpus_allowed_list:")[1].split()[0] for text in texts}
    return found


@needs_two_cores
def test_each_process_and_its_threads_run_on_the_cores_of_its_rule(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    first, second, everywhere = str(ALLOWED[0]), str(ALLOWED[1]), cores_text(set(ALLOWED))
    rules = f"worker:{second};worker[2]:{first};master:{first}"
    gpooler = gpooler_factory(postgres, config={"performance": {"workers": 3, "cpu_affinity": rules}})
    expected = {
        "gpooler: master": {first},
        "gpooler: broker": {everywhere},
        "gpooler: worker 1": {second},
        "gpooler: worker 2": {first},
        "gpooler: worker 3": {second},
    }
    assert cores_by_title(gpooler) == expected
    for process in gpooler.processes():
        if "worker" in process.cmdline()[0]:
            assert process.num_threads() > 1  # the relay's, at least
    (before,) = [each for each in gpooler.processes() if each.cmdline()[0].strip() == "gpooler: worker 2"]
    before.send_signal(signal.SIGKILL)
    eventually(lambda: len(gpooler.worker_pids()) == 3 and before.pid not in gpooler.worker_pids(), within=20)
    eventually(lambda: cores_by_title(gpooler) == expected, within=20)


@needs_two_cores
def test_auto_gives_workers_the_cores_in_turn(postgres: Postgres, gpooler_factory: Factory) -> None:
    workers = len(ALLOWED) + 1
    config = {"performance": {"workers": workers, "cpu_affinity": "auto"}}
    found = cores_by_title(gpooler_factory(postgres, config=config))
    for number in range(1, workers + 1):
        assert found[f"gpooler: worker {number}"] == {str(ALLOWED[(number - 1) % len(ALLOWED)])}
    assert found["gpooler: broker"] == {cores_text(set(ALLOWED))}


def test_a_core_that_is_not_there_is_warned_of_and_ends_the_start(postgres: Postgres) -> None:
    missing = max(ALLOWED) + 1
    gpooler = Gpooler(postgres, config={"performance": {"cpu_affinity": f"worker:{missing}"}})
    told = f"core {missing} cannot be used here"
    checked, started = (
        subprocess.run(
            [*command(), word, "-c", str(gpooler.config_file)], timeout=60, capture_output=True, text=True,
            check=False,
        )
        for word in ("check", "run")
    )  # fmt: skip
    gpooler.destroy()
    assert (checked.returncode, started.returncode) == (0, 3)
    assert f"performance.cpu_affinity: {told}" in checked.stderr
    assert told in started.stdout


def test_a_changed_affinity_waits_for_a_restart(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres)
    before = cores_by_title(gpooler)
    answer = gpooler.reload(config={"performance": {"cpu_affinity": "auto"}, "service": {"priority": 3}})
    assert 'cpu_affinity: "off" → "auto": needs a restart' in answer
    assert "priority: 0 → 3: needs a restart" in answer
    assert cores_by_title(gpooler) == before


def test_all_processes_and_their_threads_have_the_priority(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, config={"service": {"priority": 7}})
    for process in gpooler.processes():
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            assert os.getpriority(os.PRIO_PROCESS, int(task.name)) == 7


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a capability up")
def test_a_priority_that_the_system_refuses_ends_the_start(postgres: Postgres) -> None:
    gpooler = Gpooler(postgres, config={"service": {"priority": -7}})
    done = subprocess.run(
        [
            find_program("setpriv"), "--bounding-set=-sys_nice", "--inh-caps=-sys_nice",
            *command(), "run", "-c", str(gpooler.config_file),
        ],
        timeout=60, capture_output=True, text=True, check=False,
    )  # fmt: skip
    gpooler.destroy()
    assert done.returncode == 3
    assert "could not set priority -7: Permission denied" in done.stdout


@needs_two_cores
def test_after_an_online_restart_it_is_the_first_and_the_second_worker_that_count(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    first, second, everywhere = str(ALLOWED[0]), str(ALLOWED[1]), cores_text(set(ALLOWED))
    rules = f"worker[1]:{first};worker[2]:{second};master:{first}"
    gpooler = gpooler_factory(postgres, config={"performance": {"workers": 2, "cpu_affinity": rules}})
    gpooler.restart()
    assert cores_by_title(gpooler) == {
        "gpooler: master": {first},
        "gpooler: broker": {everywhere},
        "gpooler: worker 3": {first},
        "gpooler: worker 4": {second},
    }
    assert "needs a restart" in gpooler.reload(config={"performance": {"cpu_affinity": "off"}})
    gpooler.restart()
    assert set(map(frozenset, cores_by_title(gpooler).values())) == {frozenset({everywhere})}
