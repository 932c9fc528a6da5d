"""From a configuration file to a running arbiter: load, log, bind, pid file, limits."""

import os
import resource
import sys
from pathlib import Path
from typing import Final

import setproctitle

from gpooler import __version__
from gpooler.auth.failures import FailureTable
from gpooler.client.password_checks import load_libraries
from gpooler.config.effective import effective
from gpooler.config.load import ConfigError, Loaded, load
from gpooler.config.model import Config
from gpooler.errors import ConfigurationError
from gpooler.log import Logger, LogSettings
from gpooler.logs.direct import DirectLog, open_direct
from gpooler.net.listen import Listener, ListenSpec, bind_listeners
from gpooler.net.tcp import tcp_settings
from gpooler.process.arbiter import Arbiter, EntryPoints
from gpooler.process.context import EXIT_BOOT
from gpooler.process.pidfile import PidFile
from gpooler.process.privileges import drop

EXIT_CONFIG: Final = 1  # as `gpooler check`
OWN_DESCRIPTORS: Final = 64  # listeners, channels, logs
DEBUG_VARIABLE: Final = "GPOOLER_DEBUG"


def launch(config_path: Path, entries: EntryPoints) -> int:
    """Run gpooler with the configuration in ``config_path`` until it ends; returns the exit status.

    EXIT_CONFIG with every problem on standard error, EXIT_BOOT when something cannot be bound or locked.
    """
    try:
        loaded = load(config_path)
    except ConfigError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return EXIT_CONFIG
    setproctitle.setproctitle("gpooler: master")
    settings = log_settings(loaded.config)
    log = open_direct(settings)
    try:
        return _launch(loaded, settings, log, entries)
    finally:
        log.close()


def log_settings(config: Config) -> LogSettings:
    """What ``[logging]`` says about lines and where they go."""
    logging = config.logging
    return LogSettings(
        format=logging.log_format,
        file=logging.log_file,
        is_stdout=logging.log_to_stdout,
        is_syslog=logging.log_syslog,
        syslog_ident=logging.log_syslog_ident,
        syslog_facility=logging.log_syslog_facility,
        is_async=logging.log_async,
        queue_depth=logging.log_queue_depth,
        is_debug=logging.log_debug,
    )


def _launch(loaded: Loaded, settings: LogSettings, log: DirectLog, entries: EntryPoints) -> int:
    config = loaded.config
    logger = log.logger
    logger.info(f"gpooler {__version__} starts", context="master")
    for warning in loaded.warnings:
        logger.info(f"warning: {warning}", context="config")
    if config.logging.log_config:
        for line in effective(config).splitlines():
            logger.info(line, context="config")
    _raise_descriptor_limit(config, logger)
    listeners: list[Listener] = []
    pid_file: PidFile | None = None
    try:
        load_libraries(config)
        listeners = _bind(config)
        pid_file = PidFile(config.service.pid_file) if config.service.pid_file else None
        _drop_privileges(config, listeners)
        workers = config.performance.worker_count(len(os.sched_getaffinity(0)))
        status = Arbiter(
            config,
            workers=workers,
            listeners=listeners,
            log=log,
            log_settings=settings,
            entries=entries,
            pid_file=pid_file,
            is_debug=bool(os.environ.get(DEBUG_VARIABLE)),
            failures=FailureTable(workers) if config.limits.auth_failure_max else None,
        ).run()
    except ConfigurationError as error:
        logger.fatal(error.log_text(), context="master")
        if not settings.is_stdout:
            print(f"gpooler: {error.log_text()}", file=sys.stderr)  # whoever starts it looks here
        return EXIT_BOOT
    finally:
        for listener in listeners:
            listener.close()
        if pid_file is not None:
            pid_file.release()
    logger.info(f"gpooler ends with status {status}", context="master")
    return status


def _drop_privileges(config: Config, listeners: list[Listener]) -> None:
    """What was made for us as root becomes the user's. Raises ConfigurationError."""
    if config.service.user is not None:
        files = [path for path in (config.service.pid_file, config.logging.log_file) if path is not None]
        files += [listener.host for listener in listeners if listener.is_unix]
        drop(config.service.user, files)


def _bind(config: Config) -> list[Listener]:
    """The listeners of the configuration. Raises ConfigurationError."""
    service = config.service
    return bind_listeners(
        [
            ListenSpec(index, listen.host, listen.port, listen.backlog)
            for index, listen in enumerate(config.listen)
        ],
        unix_socket_dir=service.unix_socket_dir,
        unix_socket_mode=service.unix_socket_mode,
        is_reuseport=service.bindwith_reuseport,
        options=tcp_settings(config.performance).options(),
    )


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
