"""The pid file: says who runs, and keeps a second gpooler with the same file from starting."""

import fcntl
import os
from pathlib import Path
from typing import Final

from gpooler.errors import ConfigurationError

_MODE: Final = 0o644


class PidFile:
    """A locked file with the process id. ``release`` removes it."""

    def __init__(self, path: str, lock_fd: int | None = None) -> None:
        """Create or take over ``path``. Raises ConfigurationError: held by a living process, or I/O.

        ``lock_fd``: locked already, and another process' until ``claim``.
        """
        self.path = path
        self._is_ours = lock_fd is None
        if lock_fd is not None:
            self.fd = lock_fd
            return
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE)
        except OSError as error:
            raise ConfigurationError(f'could not open pid_file "{path}": {error.strerror}') from error
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.claim()
        except BlockingIOError as error:
            holder = os.pread(self.fd, 32, 0).decode(errors="replace").strip()
            os.close(self.fd)
            raise ConfigurationError(
                f'pid_file "{path}" is held by another gpooler (pid {holder or "unknown"})'
            ) from error
        except OSError as error:
            os.close(self.fd)
            raise ConfigurationError(f'could not write pid_file "{path}": {error.strerror}') from error

    def claim(self) -> None:
        """Say that it is this process who runs. Raises OSError."""
        self._is_ours = True
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, b"%d\n" % os.getpid(), 0)

    def abandon(self) -> None:
        """Another process goes on with file and lock."""
        self._is_ours = False

    def release(self) -> None:
        """Remove the file if it is ours, then the lock; who may not remove it empties it."""
        if self._is_ours:
            try:
                Path(self.path).unlink(missing_ok=True)
            except PermissionError:  # made as root, who we are no more
                os.ftruncate(self.fd, 0)
        os.close(self.fd)
