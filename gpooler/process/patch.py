"""Monkey-patching of the processes that have a hub."""

import os

from gevent import monkey
from psycogreen.gevent import patch_psycopg


def patch() -> None:
    """``monkey.patch_all``, but ``os.close`` closes at once; and psycopg2. The first thing a child does.

    gevent's own waits for the hub's next wake-up, in case something still watches the descriptor. An idle hub
    sleeps for seconds, and the descriptor may be of a server that was given away.
    """
    monkey.patch_all()
    patch_psycopg()
    os.close = monkey.get_original("os", "close")
