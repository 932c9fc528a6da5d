"""Who decides about a clear-text password or token in place of the configuration: an agent, a function."""

from typing import Final

from gpooler.auth.exchange import Check, Done
from gpooler.auth.external import Agent, AgentError
from gpooler.auth.module import AuthModule
from gpooler.auth.offload import OffloadError
from gpooler.client.entrance import Guest
from gpooler.client.plan import Plan
from gpooler.config.model import Authentication, Config, Rule
from gpooler.errors import AuthenticationFailed, AuthenticationUndecided
from gpooler.log import Logger
from gpooler.wire import messages
from gpooler.wire.text import encode

ID_MOST: Final = 255  # characters of an agent's id that the log shows


class Agents:
    """Those of one worker; made in its hub."""

    def __init__(self, config: Config, logger: Logger, before: "Agents | None" = None) -> None:
        """``before``: those of the configuration before, whose threads go on. Raises ConfigurationError."""
        self._logger = logger
        self._external = Agent(config.routing.external_auth_socket_path)
        self._iamproxies = {
            rule.mdb_iamproxy_socket_path: Agent(rule.mdb_iamproxy_socket_path)
            for rule in config.served
            if rule.enable_mdb_iamproxy_auth
        }
        known: dict[str, AuthModule] = {} if before is None else before._modules
        self._modules: dict[str, AuthModule] = {
            name: known.get(name) or AuthModule(name)
            for name in {rule.auth_module for rule in config.served}
            if name is not None
        }

    def of(self, guest: Guest, plan: Plan, rule: Rule) -> Check | None:
        """What decides about the client's password; None where the configuration does."""
        if plan.method is Authentication.EXTERNAL:
            return lambda token: self._ask_agent(self._external, guest, plan, token)
        if rule.enable_mdb_iamproxy_auth:
            agent = self._iamproxies[rule.mdb_iamproxy_socket_path]
            return lambda token: self._ask_agent(agent, guest, plan, token)
        if rule.auth_module is not None:
            module = self._modules[rule.auth_module]
            return lambda password: self._ask_module(module, guest, plan, password)
        return None

    def _ask_agent(self, agent: Agent, guest: Guest, plan: Plan, token: bytes) -> Done:
        """Yields. Raises AuthenticationFailed."""
        user = plan.packet.user
        try:
            verdict = agent.ask(encode(user), token)
        except AgentError as error:
            raise AuthenticationUndecided(user, cause=f"the agent at {error}") from None
        if not verdict.is_accepted:
            raise AuthenticationFailed(user, cause="the agent refused the token")
        guest.who.external_id = verdict.external_id[:ID_MOST]
        return Done(messages.authentication_ok(), password=token)

    def _ask_module(self, module: AuthModule, guest: Guest, plan: Plan, password: bytes) -> Done:
        """Yields. Raises AuthenticationFailed."""
        user = plan.packet.user
        address = guest.host if guest.family else ""
        try:
            is_right = module.is_right(user, plan.packet.database, address, password)
        except OffloadError as error:
            raise AuthenticationUndecided(user, cause=str(error)) from None
        except Exception as error:  # noqa: BLE001  # not our code; its text may hold the password
            cause = f"auth_module raised {type(error).__name__}"
            raise AuthenticationUndecided(user, cause=cause) from None
        if not is_right:
            raise AuthenticationFailed(user, cause="auth_module refused the password")
        return Done(messages.authentication_ok(), password=password)
