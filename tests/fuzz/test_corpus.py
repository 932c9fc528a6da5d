"""The fuzzer's targets on the inputs worth keeping, under AddressSanitizer; scripts/fuzz finds more."""

import hashlib
import subprocess
from pathlib import Path

import pytest

from tests.fuzz.build import HERE, TARGETS, build, environment, own_options
from tests.harness import Unavailable

CORPUS = HERE / "corpus"
BUILD_S = 300  # the first of these tests compiles


@pytest.fixture(scope="session")
def fuzzer() -> Path:
    try:
        return build()
    except Unavailable as error:
        pytest.skip(str(error))


def run(fuzzer: Path, target: str, *inputs: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [fuzzer, *own_options(target), *inputs],
        env=environment(target),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=BUILD_S,
    )


@pytest.mark.timeout(BUILD_S)
@pytest.mark.parametrize("target", TARGETS)
def test_target_finds_nothing_in_its_corpus(fuzzer: Path, tmp_path: Path, target: str) -> None:
    inputs = sorted((CORPUS / target).iterdir())
    assert inputs
    done = run(fuzzer, target, *inputs)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stderr.count("Executed ") == len(inputs)


@pytest.mark.timeout(BUILD_S)
def test_fuzzer_without_a_target_says_so(fuzzer: Path) -> None:
    done = run(fuzzer, "nothing")
    assert done.returncode == 2
    assert "GPOOLER_FUZZ_TARGET names no target" in done.stderr


def test_corpus_is_small_and_each_input_there_once() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == set(TARGETS)
    assert sum(path.stat().st_size for path in files) < 300_000
    for path in files:
        assert path.name == hashlib.sha256(path.read_bytes()).hexdigest()[:12]
