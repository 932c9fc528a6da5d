"""Gives up root for ``[service] user``, once what needs root is done and before anything is forked."""

import os
import pwd
import stat
from collections.abc import Iterable

from gpooler.errors import ConfigurationError


def drop(user: str, files: Iterable[str]) -> None:
    """Become ``user`` for good, its groups included; ``files`` that we made become that user's.

    Nothing is to be done by a process that is this user already. Raises ConfigurationError.
    """
    try:
        account = pwd.getpwnam(user)
    except KeyError as error:
        raise ConfigurationError(f'there is no user "{user}"') from error
    if os.geteuid() == account.pw_uid == os.getuid():
        return
    if os.geteuid() != 0:
        raise ConfigurationError(f'only root can become user "{user}"')
    try:
        for path in files:
            _give(path, account)
        os.initgroups(user, account.pw_gid)
        os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
        os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)
    except OSError as error:
        raise ConfigurationError(f'could not become user "{user}": {error.strerror}') from error
    for path in (os.__file__, __file__):  # modules are still to be read, in the children too
        if not os.access(path, os.R_OK):
            raise ConfigurationError(f'user "{user}" may not read {path}, which gpooler is run with')


def _give(path: str, account: pwd.struct_passwd) -> None:
    """A plain file or a socket: no link leads us to a file of root. Raises OSError."""
    found = os.lstat(path)
    if (stat.S_ISREG(found.st_mode) and found.st_nlink == 1) or stat.S_ISSOCK(found.st_mode):
        os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)
