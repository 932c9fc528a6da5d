"""The command line: ``gpooler run``, ``check``, ``reload`` and ``restart``."""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from gpooler import __version__
from gpooler.config.affinity import parse_affinity
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
    if options.command == "reload":
        return ask_master(config_path, options.pid, {"do": "reload", "is_dry_run": options.dry_run})
    if options.command == "restart":
        return ask_master(config_path, options.pid, {"do": "restart"})
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
    if missing := parse_affinity(loaded.config.performance.cpu_affinity).missing(os.sched_getaffinity(0)):
        print(f"warning: {path}: performance.cpu_affinity: {missing}", file=sys.stderr)
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


def ask_master(path: Path, pid: int | None, request: dict[str, Any]) -> int:
    """Have the running gpooler do something, and print what it says; 1 when it refuses."""
    from gpooler.process.admin import AdminError, ask

    try:
        status, text = ask(_running_pid(path) if pid is None else pid, request)
    except (AdminError, ConfigError) as error:
        for problem in getattr(error, "problems", [error]):
            print(f"error: {problem}", file=sys.stderr)
        return EXIT_CONFIG
    print(text, file=sys.stderr if status else sys.stdout)
    return status


def _running_pid(path: Path) -> int:
    """The process id in the pid_file of the configuration. Raises AdminError, ConfigError."""
    from gpooler.process.admin import AdminError

    pid_file = load(path).config.service.pid_file
    if pid_file is None:
        raise AdminError(f"{path} has no service.pid_file: say which process with --pid")
    try:
        return int(Path(pid_file).read_text())
    except (OSError, ValueError) as error:
        raise AdminError(f'pid_file "{pid_file}" names no process: {error}') from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpooler", description="PostgreSQL connection pooler.")
    parser.add_argument("--version", action="version", version=f"gpooler {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run_parser = commands.add_parser("run", help="pool connections until told to stop")
    check_parser = commands.add_parser("check", help="say whether a configuration is good")
    reload_parser = commands.add_parser(
        "reload", help="have the running gpooler read its configuration again"
    )
    restart_parser = commands.add_parser(
        "restart", help="have a new gpooler take over from the running one, unnoticed by clients"
    )
    for command in (run_parser, check_parser, reload_parser, restart_parser):
        command.add_argument("-c", "--config", required=True, metavar="FILE", help="the configuration")
    check_parser.add_argument(
        "--effective", action="store_true", help="print the resulting configuration, without secrets"
    )
    reload_parser.add_argument(
        "--dry-run", action="store_true", help="only say what would change, and for whom"
    )
    for command in (reload_parser, restart_parser):
        command.add_argument("--pid", type=int, help="of the master; unset: as service.pid_file says")
    return parser
