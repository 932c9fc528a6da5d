"""Monkey-patching of the processes that have a hub."""

import os

from gevent import monkey


def patch() -> None:
    """``monkey.patch_all``, but ``os.close`` closes at once. The first thing a child does.

    gevent's own waits for the hub's next wake-up, in case something still watches the descriptor. An idle hub
    sleeps for seconds, and the descriptor may be of a server that was given away.
    """
    monkey.patch_all()
    os.close = monkey.get_original("os", "close")
