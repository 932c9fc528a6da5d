"""What workers say to each other: cancel requests, so that they work while the broker is away."""

from dataclasses import dataclass
from typing import ClassVar, Final

from gpooler.broker.codec import Codec


@dataclass(frozen=True, slots=True)
class Cancel:
    """A cancel request came in for a client that may be yours."""

    DESCRIPTORS: ClassVar[int] = 0
    token: int
    pid: int
    secret_hex: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The request with this token is dealt with."""

    DESCRIPTORS: ClassVar[int] = 0
    token: int
    is_found: bool


CODEC: Final = Codec((Cancel, Cancelled))
