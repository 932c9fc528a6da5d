"""PAM as it is: service files and a user of the system, made for a test and taken away again."""

import os
import secrets
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Final

from tests.harness.tools import Unavailable, eventually, find_program

SERVICES: Final = Path("/etc/pam.d")


class PamService:
    """A service file of a name of its own. Raises Unavailable where we may not write one."""

    def __init__(self, *lines: str) -> None:
        if os.geteuid() != 0:
            raise Unavailable("a PAM service can be made by root alone")
        self.name = f"gpooler-test-{secrets.token_hex(6)}"
        self._file = SERVICES / self.name
        self._file.write_text("".join(f"{line}\n" for line in lines))

    def close(self) -> None:
        """Take it away."""
        self._file.unlink()


class SystemUser:
    """A user of this machine with a password and no shell, home or rights; removed at the end."""

    def __init__(self, password: str) -> None:
        if os.geteuid() != 0:
            raise Unavailable("a user of the system can be made by root alone")
        self.name = f"gpt{secrets.token_hex(6)}"
        self.password = password
        self._userdel = find_program("userdel")
        hashed = subprocess.run(
            [find_program("openssl"), "passwd", "-6", "-stdin"],
            input=password, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        add = [find_program("useradd"), "-M", "-N", "-s", "/usr/sbin/nologin", "-p", hashed, self.name]
        # another test run may hold the lock of the passwd file
        eventually(lambda: self._run(add), within=20)

    def expire(self) -> None:
        """The account is over; the password stays right."""
        eventually(lambda: self._run([find_program("usermod"), "-e", "1970-01-02", self.name]), within=20)

    def close(self) -> None:
        """Take it away."""
        eventually(lambda: self._run([self._userdel, self.name]), within=20)

    def __enter__(self) -> "SystemUser":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    def _run(arguments: list[str]) -> bool:
        return subprocess.run(arguments, capture_output=True, check=False).returncode == 0
