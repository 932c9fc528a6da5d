"""The text of cpu_affinity."""

import pytest

from gpooler.config.affinity import cores_text, parse_affinity, parse_cores
from gpooler.config.load import ConfigError, load_text
from tests.unit.test_config_audit import DEMO

ALLOWED = {2, 3, 5}


def with_affinity(text: str, workers: str = '"auto"') -> str:
    return f'{DEMO}\n[performance]\nworkers = {workers}\ncpu_affinity = "{text}"\n'


def test_what_is_said_of_one_worker_goes_before_what_is_said_of_all() -> None:
    affinity = parse_affinity("worker:0-3,8; worker[2]:1 ;broker:5,6-7;master: 0")
    assert affinity.cores_of("worker", 1, ALLOWED) == {0, 1, 2, 3, 8}
    assert affinity.cores_of("worker", 2, ALLOWED) == {1}
    assert affinity.cores_of("broker", None, ALLOWED) == {5, 6, 7}
    assert affinity.cores_of("master", None, ALLOWED) == {0}
    assert affinity.last_worker == 2


def test_of_whom_nothing_is_said_may_run_wherever_gpooler_may() -> None:
    affinity = parse_affinity("worker[2]:1")
    assert affinity.cores_of("worker", 1, ALLOWED) == ALLOWED
    assert affinity.cores_of("broker", None, ALLOWED) == ALLOWED
    assert parse_affinity("off").cores_of("worker", 1, ALLOWED) == ALLOWED


def test_auto_gives_each_worker_one_core_in_turn() -> None:
    affinity = parse_affinity("auto")
    assert [affinity.cores_of("worker", number, ALLOWED) for number in (1, 2, 3, 4)] == [{2}, {3}, {5}, {2}]
    assert affinity.cores_of("broker", None, ALLOWED) == ALLOWED


@pytest.mark.parametrize("text", ["0", "0-3", "0-3,8", "1,3,5", "2-3,7-9"])
def test_cores_are_written_as_they_are_read(text: str) -> None:
    assert cores_text(parse_cores(text)) == text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "must be"),
        ("on", "must be"),
        ("0x3", "must be"),
        ("worker", "must be"),
        ("worker:", "must be"),
        ("worker:0;", "must be"),
        ("worker[x]:0", "must be"),
        ("Worker:0", "must be"),
        ("worker:0,", "is no core"),
        ("worker:-1", "is no core"),
        ("worker:1-2-3", "is no core"),
        ("worker:3-1", "is no range"),
        ("worker:9999", "is no range"),
        ("workers:0", 'no process "workers"'),
        ("worker[0]:0", "counted from 1"),
        ("broker[1]:0", "there is one broker"),
        ("worker:0;worker:1", "said twice"),
        ("worker[1]:0;worker[ 1 ]:1", "said twice"),
    ],
)
def test_what_is_no_such_text_is_refused(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(with_affinity(text))
    (problem,) = caught.value.problems
    assert problem.key == "performance.cpu_affinity"
    assert told in problem.text


def test_threads_that_only_odyssey_has_are_warned_about_by_name() -> None:
    (warning,) = load_text(with_affinity("worker:0-3,8;handshake[1]:2;resolver:1")).warnings
    assert "no handshake, resolver" in warning.text
    assert parse_affinity("worker:1;handshake:99").missing({0, 1}) == ""


def test_a_worker_that_will_not_be_is_warned_about() -> None:
    (warning,) = load_text(with_affinity("worker[3]:0", "2")).warnings
    assert warning.text == "there is no worker 3: workers is 2"


def test_cores_that_are_not_there_are_named() -> None:
    assert (
        parse_affinity("worker:1-3;broker:9").missing({0, 1}) == "cores 2-3,9 cannot be used here, only 0-1"
    )
    assert parse_affinity("auto").missing({0, 1}) == ""
