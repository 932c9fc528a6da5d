"""From a configuration file to a running arbiter: load, log, bind, pid file, limits."""

import os
import resource
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Final

import setproctitle

from gpooler import __version__
from gpooler.client.password_checks import load_libraries
from gpooler.config.effective import effective
from gpooler.config.load import ConfigError, Loaded, load
from gpooler.config.model import Config
from gpooler.config.problems import Problem
from gpooler.config.succession import succeed
from gpooler.errors import ConfigurationError
from gpooler.log import Logger, LogSettings
from gpooler.logs.direct import DirectLog, open_direct
from gpooler.net.listen import Listener
from gpooler.process.affinity import Cores
from gpooler.process.arbiter import Arbiter, EntryPoints
from gpooler.process.context import EXIT_BOOT, BrokerContext, WorkerContext
from gpooler.process.daemon import Starter, detach, manager_variable
from gpooler.process.listeners import bind, bind_metrics
from gpooler.process.old_master import OldMaster, old_master
from gpooler.process.pidfile import PidFile
from gpooler.process.privileges import drop
from gpooler.process.settings import log_settings
from gpooler.process.systemd import given_sockets

EXIT_CONFIG: Final = 1  # as `gpooler check`
OWN_DESCRIPTORS: Final = 64  # listeners, channels, logs
DEBUG_VARIABLE: Final = "GPOOLER_DEBUG"


def launch(config_path: Path, entries: EntryPoints) -> int:
    """Run gpooler with the configuration in ``config_path`` until it ends; returns the exit status.

    EXIT_CONFIG with every problem on standard error, EXIT_BOOT when something cannot be bound or locked.
    """
    try:
        old = old_master()
    except ConfigurationError as error:
        print(f"gpooler: {error.log_text()}", file=sys.stderr)
        return EXIT_BOOT
    try:
        loaded = load(config_path)
    except ConfigError as error:
        problems = [f"error: {problem}" for problem in error.problems]
        print("\n".join(problems), file=sys.stderr)
        if old is not None:
            old.fail("\n".join(problems))
        return EXIT_CONFIG
    starter: Starter | None = None
    if old is not None:
        why = "stays as it is in an online restart"
        loaded = _with_daemonize(config_path, loaded, old.config.service.daemonize, why)
    elif loaded.config.service.daemonize:
        if variable := manager_variable():
            why = f"is ignored: a service manager watches this process ({variable} is set)"
            loaded = _with_daemonize(config_path, loaded, False, why)
        elif isinstance(found := detach(), int):
            return found
        else:
            starter = found
    setproctitle.setproctitle("gpooler: master")
    settings = log_settings(loaded.config)
    log = open_direct(settings)
    try:
        return _launch(config_path, loaded, settings, log, entries, old, starter)
    except Exception:
        if starter is not None:  # who would see it otherwise?
            log.logger.fatal(f"uncaught exception: {traceback.format_exc()}", context="master")
        raise
    finally:
        log.close()


def _with_daemonize(config_path: Path, loaded: Loaded, daemonize: bool, why: str) -> Loaded:
    """The same with the option as it is to be, and a warning if it was not."""
    config = loaded.config
    if config.service.daemonize == daemonize:
        return loaded
    warning = Problem(str(config_path), None, "service.daemonize", why)
    service = config.service.model_copy(update={"daemonize": daemonize})
    return replace(
        loaded,
        config=config.model_copy(update={"service": service}),
        warnings=(*loaded.warnings, warning),
    )


def _launch(
    config_path: Path,
    loaded: Loaded,
    settings: LogSettings,
    log: DirectLog,
    entries: EntryPoints,
    old: OldMaster | None,
    starter: Starter | None,
) -> int:
    config = loaded.config if old is None else succeed(old.config, loaded.config, is_restart=True)
    logger = log.logger
    logger.info(f"gpooler {__version__} starts", context="master")
    for warning in loaded.warnings:
        logger.info(f"warning: {warning}", context="config")
    if config.logging.log_config:
        for line in effective(config).splitlines():
            logger.info(line, context="config")
    _raise_descriptor_limit(config, logger)
    listeners: list[Listener] = []
    metrics_listeners: list[Listener] = []
    pid_file: PidFile | None = None
    try:
        load_libraries(config)
        listeners, metrics_listeners = _listen(config, old)
        path = config.service.pid_file
        pid_file = PidFile(path, None if old is None else old.lock(path)) if path else None
        if old is not None:
            old.close_spare()
        _set_priority(config.service.priority)
        cores = Cores(config.performance.cpu_affinity)
        cores.take_master()
        _drop_privileges(config, listeners)
        workers = config.performance.worker_count(len(cores.allowed))
        if starter is not None:
            starter.leave_terminal()
        status = Arbiter(
            config,
            config_path=config_path.absolute(),
            workers=workers,
            listeners=listeners,
            log=log,
            log_settings=settings,
            entries=_prepared(entries, cores, 1 if old is None else old.first_worker(workers), starter),
            pid_file=pid_file,
            is_debug=bool(os.environ.get(DEBUG_VARIABLE)),
            metrics_listeners=metrics_listeners,
            on_serving=starter.serving if starter is not None else lambda: None,
            old=old,
        ).run()
    except ConfigurationError as error:
        logger.fatal(error.log_text(), context="master")
        if old is not None:
            old.fail(error.log_text())
        if not settings.is_stdout:
            print(f"gpooler: {error.log_text()}", file=sys.stderr)  # whoever starts it looks here
        return EXIT_BOOT
    finally:
        for listener in listeners + metrics_listeners:  # where it did not come to a run, which owns those
            listener.close()
        if pid_file is not None:
            pid_file.release()
    logger.info(f"gpooler ends with status {status}", context="master")
    return status


def _set_priority(priority: int) -> None:
    """Of this process, so of all that it forks. Raises ConfigurationError."""
    try:
        if priority:
            os.setpriority(os.PRIO_PROCESS, 0, priority)
    except OSError as error:
        raise ConfigurationError(f"could not set priority {priority}: {error.strerror}") from error


def _prepared(entries: EntryPoints, cores: Cores, first: int, starter: Starter | None) -> EntryPoints:
    """The same, each on its cores, and without what is the master's alone; ``first``: number of a worker."""

    def prepare(worker: int | None, settings: LogSettings) -> None:
        if starter is not None:
            starter.forget()
        cores.take_child(worker, settings)

    def run_worker(context: WorkerContext) -> int:
        prepare(context.worker - first + 1, context.log)
        return entries.run_worker(context)

    def run_broker(context: BrokerContext) -> int:
        prepare(None, context.log)
        return entries.run_broker(context)

    return EntryPoints(run_worker, run_broker)


def _listen(config: Config, old: OldMaster | None) -> tuple[list[Listener], list[Listener]]:
    """For clients and for metrics; with the sockets that we are given. Raises ConfigurationError."""
    if old is None:
        given = given_sockets()
        listeners = bind(config, config.listen, given)
        if given:
            for listener in listeners:
                listener.close()
            raise ConfigurationError(
                f"the service manager hands over a socket at {given[0].getsockname()}, where no [[listen]] is"
            )
        return listeners, bind_metrics(config)
    listeners = bind(config, config.listen, old.sockets)
    for listener in listeners:
        if listener.is_unix:
            old.keep_listener(listener.host)
    return listeners, bind_metrics(config, old.metrics_sockets)


def _drop_privileges(config: Config, listeners: list[Listener]) -> None:
    """What was made for us as root becomes the user's. Raises ConfigurationError."""
    if config.service.user is not None:
        files = [path for path in (config.service.pid_file, config.logging.log_file) if path is not None]
        files += [listener.host for listener in listeners if listener.lock_fd >= 0]
        drop(config.service.user, files)


def _raise_descriptor_limit(config: Config, logger: Logger) -> None:
    """A pooler needs a descriptor for every client and server: take all that the system allows."""
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        limit = hard
    except (OSError, ValueError) as error:
        logger.error(f"could not raise the limit of open files above {limit}: {error}", context="master")
    needed = descriptors_needed(config)
    if limit != resource.RLIM_INFINITY and limit < needed:
        logger.error(
            f"a process may open {limit} files, but this configuration may need {needed} in one "
            "(client_max and the pools' sizes): raise the limit (ulimit -n, LimitNOFILE=)",
            context="config",
        )


def descriptors_needed(config: Config) -> int:
    """Of one process at least, when all the limits that the configuration sets are reached."""
    clients = config.limits.client_max or 0
    pools = [rule.pool_size for rule in config.rules if rule.shared_pool is None]
    pools += [pool.pool_size for pool in config.shared_pool.values()]
    return clients + sum(pools) + OWN_DESCRIPTORS
