"""Builds gpooler with known errors, one at a time, and says whether the tests catch each.

The build has a tree of its own, build/mutants, and is made anew only where files differ. First the unchanged
one has to pass. The exit status is 0 when each error was caught, 1 when one survived, 2 when something else
is wrong: a mutant that is stale or does not compile, or a test that fails without any.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from scripts.mutation.mutants import DIFFERENTIAL, MUTANTS, Mutant, Stale

ROOT: Final = Path.cwd()
TREE: Final = ROOT / "build" / "mutants"
SOURCES: Final = (".py", ".pyi", ".pyx", ".pxd", ".pxi", ".h")
BUILT: Final = (".c", ".so")
FAILED: Final = 1  # pytest: tests ran, and some failed


class Trouble(Exception):
    """The question whether a test catches an error could not be asked."""


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        prog="scripts/mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words", nargs="*", metavar="WORD", help="only errors with one of these in their names"
    )
    parser.add_argument("--list", action="store_true", help="name them and end")
    parser.add_argument("--sessions", type=int, default=1000, help="of the differential test (default 1000)")
    parser.add_argument("--seed", default="1", help="of the differential test (default 1)")
    return parser.parse_args()


def main() -> int:
    """Ask for each error; the exit status."""
    options = arguments()
    chosen = [
        mutant
        for mutant in MUTANTS
        if not options.words or any(word.lower() in mutant.name.lower() for word in options.words)
    ]
    if options.list:
        print("\n".join(f"{mutant.name}: {mutant.file}" for mutant in chosen))
        return 0
    environment = {
        **os.environ,
        "PYTHONPATH": str(TREE),
        "GPOOLER_DIFFERENTIAL": str(options.sessions),
        "GPOOLER_DIFFERENTIAL_SEED": options.seed,
        "GPOOLER_DIFFERENTIAL_SHRINK": "0",
    }
    try:
        for mutant in chosen:
            mutant.applied(ROOT)  # a stale one is known before anything is built
        prepare()
        tests = sorted({mutant.test for mutant in chosen} | {DIFFERENTIAL})
        build("unchanged", environment)
        if seen := failure(tests, environment):
            raise Trouble(f"without any error the tests fail already:\n{seen}")
        say("unchanged: passes")
        survivors = [mutant.name for mutant in chosen if not is_caught(mutant, environment)]
    except (Trouble, Stale) as trouble:
        say(str(trouble))
        return 2
    say(f"{len(chosen) - len(survivors)} of {len(chosen)} errors were caught")
    if survivors:
        say("survived: " + "; ".join(survivors))
    return 1 if survivors else 0


def say(text: str) -> None:
    """A line for the reader."""
    print(f"[mutants] {text}", file=sys.stderr, flush=True)


def prepare() -> None:
    """Bring the tree up to date; what is unchanged keeps its time, and so what was built from it."""
    wanted = {path.relative_to(ROOT) for path in (ROOT / "gpooler").rglob("*") if path.suffix in SOURCES}
    wanted |= {Path("setup.py"), Path("README.md")}
    for path in sorted(wanted):
        refresh(path)
    for old in (TREE / "gpooler").rglob("*"):
        if old.suffix in SOURCES and old.relative_to(TREE) not in wanted:
            old.unlink()
    flavour = TREE / "build" / "flavour"
    if flavour.exists():
        return
    # the first time: begin with what the checkout has built
    for path in (ROOT / "gpooler").rglob("*"):
        if path.suffix in BUILT:
            shutil.copy2(path, TREE / path.relative_to(ROOT))
    flavour.parent.mkdir()
    shutil.copy2(ROOT / "build" / "flavour", flavour)


def refresh(path: Path) -> None:
    """One file of the tree as it is in the checkout."""
    source, target = ROOT / path, TREE / path
    if target.exists() and target.read_bytes() == source.read_bytes():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        shutil.copyfile(source, target)  # newer than what was built from what it was
    else:
        shutil.copy2(source, target)


def build(name: str, environment: dict[str, str]) -> None:
    """Compile what changed."""
    began = time.monotonic()
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--parallel", "2"]
    done = subprocess.run(
        command,
        cwd=TREE,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Trouble(f"{name}: does not compile\n{done.stdout}{done.stderr}")
    say(f"{name}: compiled in {time.monotonic() - began:.0f} s")


def failure(tests: Sequence[str], environment: dict[str, str]) -> str:
    """The end of what the tests say when one fails, nothing when all pass."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-n0",
        "--no-header",
        "-o",
        f"pythonpath='{TREE}' .",
    ]
    done = subprocess.run(
        [*command, *tests],
        cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode not in (0, FAILED):
        raise Trouble(f"pytest ended with {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout[-3000:] if done.returncode else ""


def is_caught(mutant: Mutant, environment: dict[str, str]) -> bool:
    """Whether its test fails with the error in the relay; the tree is as before afterwards."""
    target = TREE / mutant.file
    target.write_text(mutant.applied(ROOT), encoding="utf-8")
    try:
        build(mutant.name, environment)
        began = time.monotonic()
        seen = failure([mutant.test], environment)
    finally:
        refresh(Path(mutant.file))
    say(f"{mutant.name}: {'caught' if seen else 'SURVIVED'} after {time.monotonic() - began:.0f} s")
    return bool(seen)


if __name__ == "__main__":
    sys.exit(main())
