"""The relay's event bits as Python names; ``relay/engine.pxd: EventBit``, compared by a test."""

from enum import IntFlag


class ServerEvent(IntFlag):
    """Bits of a server's events."""

    CLOSED = 1
    RELEASED = 16
    CANCEL_WANTED = 32
    PARAMS = 64
    STUCK = 128
    PINNED = 256
    CLOSING = 2048


class ClientEvent(IntFlag):
    """Bits of a client's events."""

    CLOSED = 1
    TEXT_WANTED = 2
    READY = 4


class RouteEvent(IntFlag):
    """Bits of a route's events."""

    DEMAND = 512
    CALM = 1024
