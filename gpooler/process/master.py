"""The master of a run: what the command line calls. Imports here what its children share."""

from pathlib import Path

from gpooler.process.arbiter import EntryPoints
from gpooler.process.broker import run_broker
from gpooler.process.launch import launch
from gpooler.process.worker import run_worker


def run(config_path: Path) -> int:
    """Run gpooler until it ends; returns the exit status (``process/launch.py``)."""
    return launch(config_path, EntryPoints(run_worker, run_broker))
