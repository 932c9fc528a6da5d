"""What processes take from the configuration before anything else."""

from gpooler.config.model import Config
from gpooler.log import LogSettings


def log_settings(config: Config) -> LogSettings:
    """What ``[logging]`` says about lines and where they go."""
    logging = config.logging
    return LogSettings(
        format=logging.log_format,
        file=logging.log_file,
        is_stdout=logging.log_to_stdout and not config.service.daemonize,
        is_syslog=logging.log_syslog,
        syslog_ident=logging.log_syslog_ident,
        syslog_facility=logging.log_syslog_facility,
        is_async=logging.log_async,
        queue_depth=logging.log_queue_depth,
        is_debug=logging.log_debug,
    )
