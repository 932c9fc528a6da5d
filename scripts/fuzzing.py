"""Fuzzes the relay's leaves and all that comes before a login: libFuzzer makes inputs up, sanitizers and the
targets' own checks judge them.

The targets are in tests/fuzz/targets. What is found on the way is kept in build/fuzz/found and used the next
time; --keep puts the smallest part of it that reaches as much into tests/fuzz/corpus, which the tests replay.
The exit status is 0 when nothing was found, 1 when an input broke something, 2 when there is no fuzzer.
"""

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from tests.fuzz.build import HERE, ROOT, TARGETS, TREE, build, environment, own_options
from tests.harness import Unavailable

CORPUS: Final = HERE / "corpus"
FOUND: Final = TREE / "found"
BROKEN: Final = TREE / "broken"
DICTIONARY: Final = HERE / "sql.dict"
TEXTS: Final = ("scanner", "sql")  # their inputs are SQL; those of the others are acts
MOST_BYTES: Final = {"scanner": 256, "sql": 256, "queue": 64, "startup": 400}
MOST_BYTES_ELSE: Final = 160
MOST_INPUTS: Final = 80  # kept of a target, where more would only pass the same edges more often
HANGS_S: Final = 10
PROGRESS_S: Final = 10
STATUS: Final = re.compile(rb"^#(\d+)\t.*cov: (\d+)", re.MULTILINE)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "targets",
        nargs="*",
        metavar="TARGET",
        help=f"one of {', '.join(TARGETS)} (default: one after another)",
    )
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default 60)")
    parser.add_argument(
        "--keep", action="store_true", help="then make its corpus anew from all that was found"
    )
    options = parser.parse_args()
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    return options


def say(text: str) -> None:
    """A line of progress."""
    print(f"[fuzz] {text}", file=sys.stderr, flush=True)


def command(fuzzer: Path, target: str, *more: str | Path) -> list[str]:
    """The fuzzer with a target's options."""
    options = [f"-max_len={MOST_BYTES.get(target, MOST_BYTES_ELSE)}", f"-timeout={HANGS_S}"]
    options += own_options(target)
    options += [f"-dict={DICTIONARY}"] if target in TEXTS else ["-len_control=0"]
    return [str(fuzzer), *options, *map(str, more)]


def last_status(log: Path) -> str:
    """How far a run has come, from its log."""
    found = STATUS.findall(log.read_bytes())
    return f"{int(found[-1][0]):,} executions, {int(found[-1][1])} edges" if found else "starting"


def fuzz(fuzzer: Path, target: str, seconds: int) -> bool:
    """Look for an input that breaks something; whether there was none."""
    found, corpus, log = FOUND / target, CORPUS / target, TREE / f"{target}.log"
    for directory in (found, corpus, BROKEN):
        directory.mkdir(parents=True, exist_ok=True)
    options = (f"-max_total_time={seconds}", f"-artifact_prefix={BROKEN}/{target}-", found, corpus)
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command(fuzzer, target, *options),
            cwd=ROOT, stdout=output, stderr=output, env=environment(target),
        )  # fmt: skip
        began = time.monotonic()
        try:
            while process.poll() is None:
                try:
                    process.wait(PROGRESS_S)
                except subprocess.TimeoutExpired:
                    say(f"{target}: {time.monotonic() - began:.0f} s, {last_status(log)}")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode == 0:
        say(f"{target}: nothing found in {last_status(log)}")
        return True
    text = log.read_text(errors="replace")
    reasons = [line for line in text.splitlines() if re.match(r"fuzz: |SUMMARY: |.*runtime error: ", line)]
    written = re.findall(r"Test unit written to (\S+)", text)
    say(f"{target}: {'; '.join(reasons) or f'exit status {process.returncode}'}; all of it in {log}")
    for path in written:
        say(f"once more: GPOOLER_FUZZ_TARGET={target} {fuzzer} {path}")
    return False


def keep(fuzzer: Path, target: str) -> None:
    """Make the corpus of a target anew: what reaches every edge, then what passes them more often."""
    corpus, fresh = CORPUS / target, TREE / "merged" / target
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    chosen: list[Path] = []
    for is_counted in (0, 1):
        options = ("-set_cover_merge=1", f"-use_counters={is_counted}", fresh, FOUND / target, corpus)
        subprocess.run(
            command(fuzzer, target, *options),
            cwd=ROOT, check=True, capture_output=True, env=environment(target),
        )  # fmt: skip
        more = sorted(set(fresh.iterdir()) - set(chosen), key=lambda path: -path.stat().st_size)
        chosen += more[: MOST_INPUTS - len(chosen)]
    contents = [path.read_bytes() for path in chosen]
    shutil.rmtree(corpus)
    corpus.mkdir()
    for data in contents:
        (corpus / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)
    say(f"{target}: {len(contents)} inputs kept")


def main() -> int:
    """Fuzz what was asked for; the exit status."""
    options = arguments()
    say("building (half a minute, once)")
    try:
        fuzzer = build()
    except Unavailable as error:
        say(str(error))
        return 2
    results = []
    for target in options.targets or TARGETS:
        results.append(fuzz(fuzzer, target, options.seconds))
        if options.keep and results[-1]:
            keep(fuzzer, target)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
