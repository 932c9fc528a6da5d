"""What a process uses, by /proc (proc(5))."""

import os
from pathlib import Path
from typing import Final

from gpooler.stats.snapshot import ProcessUse

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_UTIME: Final = 11  # fields of stat behind the name, which may have any character
_RSS: Final = 21


def use_of(pid: int) -> ProcessUse | None:
    """None when there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
    except OSError:
        return None
    cpu_ms = (int(fields[_UTIME]) + int(fields[_UTIME + 1])) * 1000 // _TICKS
    return ProcessUse(int(fields[_RSS]) * _PAGE, cpu_ms, _open_fds(pid))


def _open_fds(pid: int) -> int | None:
    """Since Linux 6.2 the size of the directory; before, its list, which not everybody may read."""
    directory = f"/proc/{pid}/fd"
    try:
        return os.stat(directory).st_size or len(os.listdir(directory))
    except OSError:
        return None
