"""The pid file: says who runs, and keeps a second gpooler with the same file from starting."""

import fcntl
import os
from pathlib import Path
from typing import Final

from gpooler.errors import ConfigurationError

_MODE: Final = 0o644


class PidFile:
    """A locked file with the process id. ``release`` removes it."""

    def __init__(self, path: str) -> None:
        """Create or take over ``path``. Raises ConfigurationError: held by a living process, or I/O."""
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE)
        except OSError as error:
            raise ConfigurationError(f'could not open pid_file "{path}": {error.strerror}') from error
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self.fd, 0)
            os.pwrite(self.fd, b"%d\n" % os.getpid(), 0)
        except BlockingIOError as error:
            holder = os.pread(self.fd, 32, 0).decode(errors="replace").strip()
            os.close(self.fd)
            raise ConfigurationError(
                f'pid_file "{path}" is held by another gpooler (pid {holder or "unknown"})'
            ) from error
        except OSError as error:
            os.close(self.fd)
            raise ConfigurationError(f'could not write pid_file "{path}": {error.strerror}') from error

    def release(self) -> None:
        """Remove the file, then the lock; who may not remove it empties it."""
        try:
            Path(self.path).unlink(missing_ok=True)
        except PermissionError:  # made as root, who we are no more
            os.ftruncate(self.fd, 0)
        os.close(self.fd)
