"""What a client is told at the end of its login, and with which parameters its session begins.

Parameters of a startup packet that were never tried on a server of the route are tried once (the client is
*set up* there); their values as the server reports them are kept, so that the next client with the same
startup packet needs no server. ``application_name`` differs from client to client and can be made right
without a server.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from gpooler.errors import TooManyParameters
from gpooler.relay.params import ParameterSet
from gpooler.routing.route import Route
from gpooler.server.servers import READ_ONLY
from gpooler.wire import messages
from gpooler.wire.text import encode

APPLICATION_NAME: Final = "application_name"
MAX_NAME: Final = 63  # NAMEDATALEN - 1
# Distinct startup packets remembered for a route; application names come and go.
MAX_KNOWN: Final = 512

Key = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Greeting:
    """``parameters`` for the relay, ``statuses``: the ParameterStatus messages they make."""

    parameters: ParameterSet
    statuses: bytes


def is_plain(name: str) -> bool:
    """Whether PostgreSQL keeps an application_name as it is, up to its length: printable ASCII."""
    return name.isascii() and name.isprintable()


def application_name(value: str, host: str | None) -> str:
    """Cut to 63 bytes as PostgreSQL does. With ``host`` behind it all is made printable ASCII (others: ?)."""
    if host is None:
        return value[:MAX_NAME]
    suffix = f" - {host}"
    raw = encode(value)[: MAX_NAME - len(suffix)]
    return bytes(byte if 0x20 <= byte < 0x7F else 0x3F for byte in raw).decode("ascii") + suffix


def startup_key(parameters: dict[str, str]) -> Key:
    """What of a startup packet has to be tried on a server.

    Versions of PostgreSQL differ in what they make of an application_name that is not plain.
    """
    return tuple(
        sorted(
            (name.lower(), value)
            for name, value in parameters.items()
            if name.lower() != APPLICATION_NAME or not is_plain(value)
        )
    )


def overrides(parameters: dict[str, str]) -> ParameterSet:
    """A startup packet's parameters as a relay set, on top of what a server reports.

    Raises TooManyParameters.
    """
    try:
        return ParameterSet.of({encode(name): encode(value) for name, value in parameters.items()}, False)
    except ValueError as error:
        raise TooManyParameters from error


class Greetings:
    """Known startup packets of one route."""

    def __init__(self) -> None:
        self._version = -1
        self._tried: OrderedDict[Key, dict[bytes, bytes]] = OrderedDict()
        self._ready: OrderedDict[tuple[Key, str], Greeting] = OrderedDict()

    def find(self, route: Route, key: Key, name: str) -> Greeting | None:
        """The greeting of a client with this startup packet; None when it must be set up first.

        Raises TooManyParameters.
        """
        if route.parameters is None:
            return None
        if self._version != route.version:
            # what was tried stays right: the values of parameters the clients chose themselves
            self._ready.clear()
            self._version = route.version
        ready = self._ready.get((key, name))
        if ready is not None:
            return ready
        chosen = self._tried.get(key) if key else {}
        if chosen is None:
            return None
        reported = {encode(item): encode(value) for item, value in route.parameters.items()}
        parameters = ParameterSet.of(reported, True, READ_ONLY)
        over = dict(chosen)
        if name:
            over[APPLICATION_NAME.encode()] = name.encode()
        if over:
            try:
                parameters = parameters.merged(ParameterSet.of(over, False))
            except ValueError as error:
                raise TooManyParameters from error
        ready = Greeting(parameters, statuses(parameters))
        self._ready[key, name] = ready
        if len(self._ready) > MAX_KNOWN:
            self._ready.popitem(last=False)
        return ready

    def learn(self, key: Key, parameters: ParameterSet) -> None:
        """A client with this startup packet was set up, with this result."""
        if not key:
            return
        names = {name for name, _ in key}
        self._tried[key] = {
            name: value
            for name, value in parameters.items()
            if name.decode("utf-8", "replace").lower() in names
        }
        if len(self._tried) > MAX_KNOWN:
            self._tried.popitem(last=False)


def statuses(parameters: ParameterSet) -> bytes:
    """ParameterStatus for every reported parameter."""
    return b"".join(
        messages.message(b"S", name + b"\0" + value + b"\0")
        for name, value in parameters.items(is_reported=True)
    )
