"""How a login that fails ends: what the log and the client are told, and when."""

import gevent

from gpooler.auth.failures import Failures
from gpooler.client.admission import Admission
from gpooler.client.entrance import ClientGone, Guest
from gpooler.config.model import Limits
from gpooler.errors import AuthenticationFailed, AuthenticationUndecided, GpoolerError, LoginTimeout
from gpooler.log import Logger, client_id
from gpooler.stats.registry import ProcessWord
from gpooler.stats.shared import SharedCounters
from gpooler.wire import messages
from gpooler.wire.text import encode


class Refusals:
    """Those of one worker."""

    def __init__(
        self,
        limits: Limits,
        counters: SharedCounters,
        admission: Admission,
        failures: Failures,
        logger: Logger,
    ) -> None:
        self._limits = limits
        self._counters = counters
        self._admission = admission
        self._failures = failures
        self._logger = logger
        self._kept_back: dict[Guest, GpoolerError] = {}  # refused, and not told so yet

    def configure(self, limits: Limits) -> None:
        """From now on."""
        self._limits = limits

    def end(self, guest: Guest, error: GpoolerError | ClientGone) -> None:
        """A login failed: tell the log, and the client if it is there; nothing of it is left."""
        if guest.is_counted:
            guest.is_counted = False
            self._admission.leave()
        if isinstance(error, GpoolerError):
            self._counters.add_process(ProcessWord.LOGIN_ERRORS)
            self._logger.error(
                f"login refused: {error.sqlstate} {error.log_text()}", context="startup", who=guest.who
            )
            if isinstance(error, AuthenticationFailed) and (delay_s := self.note_failure(guest, error)):
                self._kept_back[guest] = error
                gevent.spawn_later(delay_s, self._let_go, guest)
                return
            _tell(guest, error)
        elif guest.who.user:
            self._logger.info(f"client gone during login: {error}", context="startup", who=guest.who)
        guest.close()

    def expire(self, guest: Guest) -> None:
        """Its client_login_timeout is over."""
        if guest in self._kept_back:
            self._let_go(guest)
        else:
            self.end(guest, LoginTimeout(guest.timeout_ms))

    def refuse_banned(self, guest: Guest) -> None:
        """Who is banned fails where a wrong password would. Raises AuthenticationFailed."""
        assert guest.plan is not None
        user = guest.plan.packet.user
        if self._failures.is_banned(guest.address, encode(user)):
            raise AuthenticationFailed(user, cause="banned after too many failed logins")

    def forgive(self, guest: Guest) -> None:
        """It has proved who it is: its failures are forgotten."""
        assert guest.plan is not None
        self._failures.clear(guest.address, encode(guest.plan.packet.user))

    def note_failure(self, guest: Guest, error: AuthenticationFailed) -> float:
        """Count a failed login; returns for how many seconds its answer is to be kept back."""
        assert guest.plan is not None
        is_guess = not isinstance(error, AuthenticationUndecided)
        if is_guess and self._failures.add(guest.address, encode(guest.plan.packet.user)):
            limits = self._limits
            self._logger.error(
                f"banned for {limits.auth_failure_ban_ms} ms after {limits.auth_failure_max} failed logins",
                context="startup",
                who=guest.who,
            )
        return self._failures.delay_s(guest.address)

    def _let_go(self, guest: Guest) -> None:
        """Tell a client what was kept back."""
        error = self._kept_back.pop(guest, None)
        if error is not None:
            _tell(guest, error)
            guest.close()


def _tell(guest: Guest, error: GpoolerError) -> None:
    rule = None if guest.plan is None else guest.plan.rule
    is_id_shown = rule is None or rule.client_show_id
    if guest.handshake is not None:
        return  # an alert was all that could be said
    try:
        guest.send(messages.error_response(error, client_id(guest.number) if is_id_shown else None))
    except ClientGone:
        return  # or does not read: either way it is not told
