"""What a child does to the standard library."""

import subprocess
import sys

SCRIPT = """
from gpooler.process.patch import patch
patch()
import os, socket, threading
import gevent
gevent.sleep(0)  # there is a hub
mine, other = socket.socketpair()
fd = mine.detach()
os.close(fd)
try:
    os.fstat(fd)
except OSError:
    print("closed", threading.current_thread() is threading.main_thread(), other.recv(1))
"""


def test_a_descriptor_is_closed_at_once() -> None:
    """Not when the hub wakes next: that may be much later."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.stdout == "closed True b''\n", done.stderr
