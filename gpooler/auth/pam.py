"""A password checked by PAM, as ``pam_authenticate`` and ``pam_acct_mgmt`` decide.

It blocks: to be called in a thread of ``auth/offload``. It needs the package pamela (libpam through ctypes),
which looks for the library with a program of the system: the master loads it before it forks.
"""

import ctypes
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

from gpooler.errors import ConfigurationError

PAM_SUCCESS: Final = 0
PAM_SILENT: Final = 0x8000
PAM_DISALLOW_NULL_AUTHTOK: Final = 0x0001
PAM_FAIL_DELAY: Final = 10
# What says "no" to this user and password; anything else says that PAM could not decide.
# PAM_PERM_DENIED, AUTH_ERR, CRED_INSUFFICIENT, USER_UNKNOWN, MAXTRIES, NEW_AUTHTOK_REQD, ACCT_EXPIRED,
# CRED_EXPIRED, AUTHTOK_EXPIRED (security/_pam_types.h)
DECIDED: Final = frozenset((6, 7, 8, 10, 11, 12, 13, 16, 27))
DELAY_FUNCTION: Final = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
MOST_DELAY_S: Final = 10.0  # whatever a module asks for: a login has its own limit


@dataclass(frozen=True, slots=True)
class PamAnswer:
    """What PAM says. ``cause`` is empty when the user may come in."""

    cause: str
    is_decided: bool  # False: something is wrong with PAM, not with the password
    delay_s: float  # how long a refusal is to be kept back (pam_fail_delay(3))


def load() -> ModuleType:
    """The package pamela. Raises ConfigurationError when it, or libpam, is not there."""
    try:
        import pamela
    except (ImportError, OSError, TypeError) as error:  # TypeError: ctypes.CDLL of a library not found
        raise ConfigurationError(
            "auth_pam_service needs the Python package pamela and libpam",
            hint="Install it with: pip install 'gpooler[pam]'.",
            cause=str(error),
        ) from error
    module: ModuleType = pamela
    return module


def check(service: str, user: bytes, password: bytes, host: str) -> PamAnswer:
    """Ask the PAM service; ``host`` is PAM_RHOST, empty for a client of a Unix socket.

    No credentials are established and no session is opened: the password is all that is wanted. Modules
    ask libpam to sleep after a failure; that would hold a thread, so the time is handed back instead.
    """
    pamela: Any = load()
    delays: list[int] = []

    def keep(result: int, usec: int, data: object) -> None:
        delays.append(usec)

    keep_delay = DELAY_FUNCTION(keep)
    conversation = pamela.new_simple_password_conv((password,), "utf-8")
    handle = pamela.pam_start(service, user, conv_func=conversation)
    code = PAM_SUCCESS
    try:
        pamela.PAM_SET_ITEM(handle, PAM_FAIL_DELAY, ctypes.cast(keep_delay, ctypes.c_char_p))
        if host:
            handle.set_item(pamela.PAM_RHOST, host)
        step = "pam_authenticate"
        code = pamela.PAM_AUTHENTICATE(handle, PAM_SILENT | PAM_DISALLOW_NULL_AUTHTOK)
        if code == PAM_SUCCESS:
            step = "pam_acct_mgmt"
            code = pamela.PAM_ACCT_MGMT(handle, PAM_SILENT | PAM_DISALLOW_NULL_AUTHTOK)
        if code == PAM_SUCCESS:
            return PamAnswer("", True, 0.0)
        text = f"{step}: {pamela.pam_strerror(handle, code)}"
        return PamAnswer(text, code in DECIDED, min(max(delays, default=0) / 1e6, MOST_DELAY_S))
    finally:
        pamela.PAM_END(handle, code)
