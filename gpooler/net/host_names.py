"""The addresses of the host names in rules: looked up in threads, again and again, never by a login."""

from collections.abc import Callable, Iterator
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address
from socket import AF_INET, AF_INET6
from typing import Final

import gevent
from gevent.event import Event

from gpooler.auth.offload import Offload, OffloadError
from gpooler.clock import monotonic_us
from gpooler.config.model import Config
from gpooler.log import Logger
from gpooler.net.resolve import look_up

Address = IPv4Address | IPv6Address
Answer = frozenset[Address] | str  # a text: why there is none

FIRST_ANSWERS_S: Final = 2.0  # a start or a reload waits so long for names that are new
INTERVAL_LEAST_S: Final = 1.0
RETRY_S: Final = 5.0  # while a name has no address; a machine may boot before its resolver answers
THREADS: Final = 4
TIMEOUT_MS: Final = 60_000  # beyond what a resolver takes to give up


class HostNames:
    """Those of one worker. A name whose look-up fails keeps the addresses it had."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        # threads of their own: a resolver that hangs takes none from servers and TLS
        self._threads = Offload("host names", threads=THREADS, queue_limit=2**31, timeout_ms=TIMEOUT_MS)
        self._askers: dict[str, gevent.Greenlet] = {}
        self._first: dict[str, gevent.Greenlet] = {}  # look-ups of names that may come into force
        self._failing: set[str] = set()
        self._good_until_us: dict[str, int] = {}
        self._interval_s = 0.0
        self._is_over = Event()  # the interval that is waited for
        self.addresses: dict[str, frozenset[Address]] = {}  # of every name in force; never another object
        self.on_change: Callable[[], None] = lambda: None

    def prepare(self, config: Config) -> None:
        """Ask for the names that ``config`` brings; waits for the answers, but not for long. Yields."""
        self._first = {name: self._ask(name) for name in names_of(config) - self.addresses.keys()}
        gevent.joinall(list(self._first.values()), timeout=FIRST_ANSWERS_S)

    def configure(self, config: Config) -> None:
        """From now on; what ``prepare`` was given before."""
        names = names_of(config)
        for name in self._askers.keys() - names:
            self._askers.pop(name).kill(block=False)
            del self.addresses[name]
            self._good_until_us.pop(name, None)
            self._failing.discard(name)
        interval_s = max(INTERVAL_LEAST_S, config.performance.dns_cache_ttl / 1000)
        if interval_s != self._interval_s:
            self._interval_s = interval_s
            self._is_over.set()
            self._is_over = Event()
        for name in names - self._askers.keys():
            self.addresses[name] = frozenset()
            first = self._first[name] if name in self._first else self._ask(name)
            is_answered = first.ready()
            self._take(name, first.value if is_answered else "no answer yet")
            self._askers[name] = gevent.spawn(self._run, name, None if is_answered else first)
        self._first = {}

    def known(self) -> Iterator[tuple[str, int, str]]:
        """Names that have addresses: until when they are good (monotonic, us), and which they are."""
        for name, until_us in self._good_until_us.items():
            yield name, until_us, _text(self.addresses[name])

    def _ask(self, name: str) -> gevent.Greenlet:
        return gevent.spawn(self._look_up, name)

    def _look_up(self, name: str) -> Answer:
        try:
            found = self._threads.run(partial(look_up, name, 0))
        except OffloadError as error:
            return str(error)
        if isinstance(found, OSError):
            return str(found)
        texts = [sockaddr[0] for family, _, _, _, sockaddr in found if family in (AF_INET, AF_INET6)]
        return frozenset(_plain(text) for text in texts) or "it has no address"

    def _run(self, name: str, first: gevent.Greenlet | None) -> None:
        if first is not None:
            self._take(name, first.get())
        while True:
            self._is_over.wait(
                self._interval_s if self.addresses.get(name) else min(self._interval_s, RETRY_S)
            )
            self._take(name, self._look_up(name))

    def _take(self, name: str, answer: Answer) -> None:
        """An answer counts from now on. Tells the log where it is news."""
        before = self.addresses.get(name)
        if before is None:
            return  # not in force any more
        if isinstance(answer, str):
            if name not in self._failing:
                self._failing.add(name)
                now = f"still taken for {_text(before)}" if before else "its rules match nobody until then"
                self._logger.error(
                    f"cannot resolve the address {name} of rules ({answer}): {now}", context="dns"
                )
            return
        self._good_until_us[name] = monotonic_us() + round(self._interval_s * 1e6)
        if answer != before or name in self._failing:
            self._failing.discard(name)
            self._logger.info(f"the address {name} of rules is {_text(answer)}", context="dns")
        if answer != before:
            self.addresses[name] = answer
            self.on_change()


def names_of(config: Config) -> frozenset[str]:
    """The host names by which clients are told apart."""
    names = {rule.address for rule in config.rules if isinstance(rule.address, str)}
    return frozenset(names if config.hba is None else names | config.hba.host_names)


def _plain(text: str) -> Address:
    """As a client's address is compared: without a zone, and an IPv4 address as such."""
    address = ip_address(text.partition("%")[0])
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address


def _text(addresses: frozenset[Address]) -> str:
    return ", ".join(map(str, sorted(addresses, key=lambda each: (each.version, int(each)))))
