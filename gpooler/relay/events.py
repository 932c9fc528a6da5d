"""The relay's event bits as Python names; ``relay/engine.pxd: EventBit``, compared by a test.

Plain numbers: an ``IntFlag`` would cost a microsecond each time it is compared.
"""

from typing import Final


class ServerEvent:
    """Bits of a server's events."""

    CLOSED: Final = 1
    RELEASED: Final = 16
    CANCEL_WANTED: Final = 32
    PARAMS: Final = 64
    STUCK: Final = 128
    PINNED: Final = 256
    CLOSING: Final = 2048


class ClientEvent:
    """Bits of a client's events."""

    CLOSED: Final = 1
    TEXT_WANTED: Final = 2
    READY: Final = 4


class RouteEvent:
    """Bits of a route's events."""

    DEMAND: Final = 512
    CALM: Final = 1024
