"""Measures gpooler beside PgBouncer and a direct connection, in turn, and prints medians and ratios.

PostgreSQL 15 runs with fsync off; every connection is TCP on this machine; pools are transaction pools of 20
servers; gpooler has one worker where the case does not say two. Each round measures every case on every
contender, starting with another contender each time.
"""

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Final

from scripts.benchmark import contenders, report
from scripts.benchmark.cases import CASES, Case, Effort, Unmeasured, prepare
from scripts.benchmark.measure import raise_descriptor_limit
from tests.harness import Postgres, Unavailable

FULL: Final = Effort(seconds=5, scale=20, copies=2)
QUICK: Final = Effort(seconds=1, scale=2, copies=1)
RESULTS: Final = Path("build/bench/results.jsonl")
QUIET_POSTGRES: Final = {
    "log_connections": "off",
    "log_disconnections": "off",
    "shared_buffers": "512MB",
    "max_wal_size": "4GB",
}


def arguments() -> argparse.Namespace:
    """What the command line says."""
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"all by default, or some of: {', '.join(names)}"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it works")
    parser.add_argument("--seconds", type=int, help=f"of each pgbench run (default {FULL.seconds:g})")
    parser.add_argument("--pgbouncer", metavar="PATH", help="its program (default: the one installed)")
    parser.add_argument("--without", metavar="NAME", action="append", choices=report.ORDER, default=[])
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help=f"JSON lines, appended (default {RESULTS})"
    )
    parser.add_argument("--chart", type=Path, metavar="SVG", help="draw the ratios into this file")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing, show the last run in the output file"
    )
    options = parser.parse_args()
    unknown = set(options.cases) - set(names)
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return options


def field(options: argparse.Namespace) -> dict[str, contenders.Contender]:
    """The contenders that are to be had here."""
    known: dict[str, contenders.Contender] = {"direct": contenders.direct, "gpooler": contenders.gpooler}
    binary = options.pgbouncer or shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if binary:
        known["pgbouncer"] = contenders.pgbouncer(str(Path(binary).resolve()))
    elif "pgbouncer" not in options.without:
        print("[bench] PgBouncer is not installed: no ratios", file=sys.stderr)
    return {name: known[name] for name in report.ORDER if name in known and name not in options.without}


def measure(postgres: Postgres, case: Case, contender: contenders.Contender, effort: Effort) -> report.Record:
    """One case on one contender: numbers, or why there are none."""
    try:
        with contender(postgres, case.setting) as target:
            numbers = case.run(target, effort)
    except (Unmeasured, RuntimeError, AssertionError, OSError) as error:
        return {"failed": str(error).splitlines()[0] if str(error) else type(error).__name__}
    return {"numbers": {name: None if math.isnan(value) else value for name, value in numbers.items()}}


def run(options: argparse.Namespace) -> None:
    """All rounds, each result written at once."""
    effort = QUICK if options.quick else FULL
    if options.seconds:
        effort = Effort(options.seconds, effort.scale, effort.copies)
    rounds = 1 if options.quick else options.rounds
    cases = [case for case in CASES if not options.cases or case.name in options.cases]
    entrants = list(field(options).items())
    raise_descriptor_limit(30_000)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with Postgres(15, **QUIET_POSTGRES) as postgres, options.output.open("a") as output:
        print("[bench] filling tables", file=sys.stderr)
        prepare(postgres, effort)
        for number in range(rounds):
            for case in cases:
                turn = number % len(entrants)
                for name, contender in entrants[turn:] + entrants[:turn]:
                    if name in case.without:
                        continue
                    print(
                        f"[bench] round {number + 1}/{rounds} {case.name} {name}", file=sys.stderr, flush=True
                    )
                    outcome = measure(postgres, case, contender, effort)
                    record = {
                        "run": started,
                        "round": number,
                        "case": case.name,
                        "contender": name,
                        **outcome,
                    }
                    output.write(json.dumps(record) + "\n")
                    output.flush()


def main() -> int:
    """Measure, then report; 1 when something needed is missing."""
    options = arguments()
    try:
        if not options.report:
            run(options)
    except Unavailable as error:
        print(f"[bench] {error}", file=sys.stderr)
        return 1
    records = report.read(options.output)
    print(report.table(records))
    if options.chart:
        options.chart.write_text(report.chart(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
