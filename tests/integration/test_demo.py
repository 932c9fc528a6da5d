"""The first of the two commands of the README."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_demo_runs_real_queries_and_exits_with_0() -> None:
    done = subprocess.run(
        [ROOT / "scripts" / "demo", "--once"], capture_output=True, text=True, timeout=55, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PostgreSQL 18" in done.stdout
    assert re.search("100 clients at once ran 2000 transactions on [1-5] server connections", done.stdout)
