"""What workers say to each other, so that it works without the broker: cancels, rows for the console."""

from dataclasses import dataclass, field
from typing import ClassVar, Final

from gpooler.broker.codec import Codec
from gpooler.broker.messages import Ask, Rows


@dataclass(frozen=True, slots=True)
class Cancel:
    """A cancel request came in for a client that may be yours."""

    DESCRIPTORS: ClassVar[int] = 0
    token: int
    pid: int
    secret_hex: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The request with this token is dealt with."""

    DESCRIPTORS: ClassVar[int] = 0
    token: int
    is_found: bool


CODEC: Final = Codec((Cancel, Cancelled, Ask, Rows))
