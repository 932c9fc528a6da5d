"""Packages of npm, which brings them once, into build/."""

import fcntl
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from tests.harness.tools import Unavailable, find_program

BUILD: Final = Path(__file__).parents[2] / "build"
INSTALL_S: Final = 50


def node_modules(folder: Path) -> Path:
    """What the package.json and package-lock.json in ``folder`` ask for. Raises Unavailable."""
    npm = find_program("npm")
    files = [folder / name for name in ("package.json", "package-lock.json")]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    target = BUILD / f"{folder.name}-{digest}"
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / f".{folder.name}.lock", "w") as lock:  # other workers of the same run want it, too
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=BUILD))
            for file in files:
                shutil.copy(file, unfinished)
            command = [npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
            done = subprocess.run(
                command, cwd=unfinished, capture_output=True, timeout=INSTALL_S, check=False
            )
            if done.returncode:
                shutil.rmtree(unfinished)
                raise Unavailable(f"npm brings no {folder.name}: {done.stderr.decode()[-500:]}")
            unfinished.rename(target)
    return target / "node_modules"
