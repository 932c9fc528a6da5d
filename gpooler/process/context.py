"""What the master hands to a child across the fork.

The life of a child, as ``process/arbiter.py`` runs it. The master forks, the child closes every
control descriptor that is not its own, resets signals, sets its title and calls its entry point,
``run_worker(context)`` or ``run_broker(context)``, whose return value is the exit status. No hub,
no thread and no OpenSSL or psycopg2 object exists before the entry point runs; a gevent process
patches as the first thing it does there.

A child obeys its control channel alone: SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 are ignored in
it, since a terminal or a service manager sends them to every process of the group. EOF on the control
channel means that the master is gone: end at once.

Over the control channel (``process/control.py``) the master sends, in any order and at any time:

- to a worker: the channel to the current broker; a channel and the counters of each other worker; that
  another worker is gone (reaped); drain; reopen the log; another configuration (``process/reload.py``).
- to the broker: a channel and the counters of each worker; that a worker is gone; reopen the log; the
  servers that an earlier broker had (``process/vault.py``); another configuration.

and a child sends *ready* once, when it serves, and answers about a configuration; the broker also sends
complaints, and copies of servers' sockets.
A child that cannot boot logs why and returns EXIT_BOOT. A drained worker returns EXIT_OK. Any other end is
a death, and a new incarnation is forked. When the last worker has drained, the broker sees EOF. A child
bumps its beats as ``process/heartbeat.py`` says, and opens its log with
``logs.queued.open_log(context.log, …)``.
"""

import socket
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from gpooler.auth.failures import FailureTable
from gpooler.log import LogSettings
from gpooler.net.listen import Listener
from gpooler.stats.shared import SharedCounters

if TYPE_CHECKING:
    from gpooler.config.model import Config

EXIT_OK: Final = 0
EXIT_NOW: Final = 1  # the last of max_sigterms_to_die signals
EXIT_BOOT: Final = 3  # could not boot: stop everything instead of forking it again and again
EXIT_DRAIN_TIMEOUT: Final = 124  # graceful_shutdown_timeout_ms passed


class Phase(IntEnum):
    """Where the life of the master stands; it only goes up. The others see it in ``ProcessWord.PHASE``."""

    BOOTING = 0  # not every child has said ready yet
    SERVING = 1
    LEAVING = 2  # told to end: health checks see it, for drain_delay_ms nothing else happens
    DRAINING = 3  # the workers finish what runs
    ENDING = 4  # no worker lives; the broker goes
    ENDED = 5


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What a worker is given. It owns the control socket and shares the rest with the master."""

    config: "Config"
    worker: int  # its number, 1 to workers; a successor has the same
    workers: int
    incarnation: int  # unique among all children of the master, growing
    control: socket.socket  # SOCK_SEQPACKET, blocking
    listeners: tuple[Listener, ...]  # listening, non-blocking, shared with the other workers
    counters: SharedCounters  # its own, all zero; the relay and the hub write them
    log: LogSettings
    is_debug: bool  # GPOOLER_DEBUG is set: fault points may be used
    failures: FailureTable  # failed logins, shared
    past: SharedCounters  # what dead workers counted; read only
    mock_key: bytes = field(repr=False)  # random, the same in all workers: salts of unknown users


@dataclass(frozen=True, slots=True)
class BrokerContext:
    """What the broker is given. It owns the control socket and shares the rest with the master."""

    config: "Config"
    workers: int
    incarnation: int
    control: socket.socket  # SOCK_SEQPACKET, blocking
    past: SharedCounters  # what dead workers counted; give it to stats.shared.Totals, read only
    counters: SharedCounters  # its own; process words only (HUB_BEAT, LOG_LINES_LOST)
    metrics_listeners: tuple[Listener, ...]  # of prometheus_port: kept by the master for the next broker
    log: LogSettings
    is_debug: bool
