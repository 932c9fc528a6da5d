"""The command line: ``gpooler run`` and ``gpooler check``."""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from gpooler import __version__
from gpooler.config.effective import effective
from gpooler.config.load import ConfigError, load

EXIT_OK: Final = 0
EXIT_CONFIG: Final = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that ``arguments`` (the process's own when None) name; returns the exit status."""
    options = _parser().parse_args(arguments)
    config_path = Path(options.config)
    if options.command == "check":
        try:
            status = check(config_path, is_effective=options.effective)
            sys.stdout.flush()
        except BrokenPipeError:  # `gpooler check | head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushed once more at the end
            return EXIT_OK
        return status
    # The master and all below it are built for a run alone; a check needs no compiled module.
    from gpooler.process.master import run

    return run(config_path)


def check(path: Path, *, is_effective: bool) -> int:
    """Say whether the configuration is good: all problems to stderr and 1, or 0."""
    try:
        loaded = load(path)
    except ConfigError as error:
        count = len(error.problems)
        # Whoever reads may have seen enough; it is an error all the same.
        with contextlib.suppress(BrokenPipeError):
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr)
            print(f"{path}: {count} {'error' if count == 1 else 'errors'}", file=sys.stderr)
        return EXIT_CONFIG
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if is_effective:
        print(effective(loaded.config), end="")
        return EXIT_OK
    rules = len(loaded.config.rules)
    print(f"{path}: the configuration is valid ({rules} {'rule' if rules == 1 else 'rules'})")
    if loaded.departures:
        print("defaults in use that differ from Odyssey's (docs/configuration.md):")
        for departure in loaded.departures:
            print(f"  {departure}")
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpooler", description="PostgreSQL connection pooler.")
    parser.add_argument("--version", action="version", version=f"gpooler {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run_parser = commands.add_parser("run", help="pool connections until told to stop")
    check_parser = commands.add_parser("check", help="say whether a configuration is good")
    for command in (run_parser, check_parser):
        command.add_argument("-c", "--config", required=True, metavar="FILE", help="the configuration")
    check_parser.add_argument(
        "--effective", action="store_true", help="print the resulting configuration, without secrets"
    )
    return parser
