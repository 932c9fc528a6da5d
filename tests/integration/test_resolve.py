"""Names of storages: looked up in a thread, kept for dns_cache_ttl, an old answer better than none."""

import socket
from collections.abc import Callable
from typing import Any

import pytest

from gpooler.config.storage import Endpoint
from gpooler.errors import ServerConnectFailed
from gpooler.net import resolve
from gpooler.net.resolve import Address, Resolver
from tests.harness import Gpooler, Postgres

Factory = Callable[..., Gpooler]

DB = Endpoint("db.example.com", 5432)


class Names:
    """A resolver of the system whose answers a test decides, with a clock."""

    def __init__(self) -> None:
        self.now_us = 1_000_000
        self.asked: list[tuple[str, int]] = []
        self.answer: list[str] | OSError = ["192.0.2.1"]

    def getaddrinfo(self, host: str, port: int, **_: Any) -> list[Any]:
        self.asked.append((host, port))
        if isinstance(self.answer, OSError):
            raise self.answer
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, 1, 6, "", (address, port))
            for address in self.answer
        ]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    made = Names()
    monkeypatch.setattr(resolve, "_getaddrinfo", made.getaddrinfo)
    monkeypatch.setattr(resolve, "monotonic_us", lambda: made.now_us)
    return made


def texts(addresses: tuple[Address, ...]) -> list[str]:
    return [address.text for address in addresses]


def test_an_answer_is_kept_for_the_ttl_and_asked_for_again_after_it(names: Names) -> None:
    resolver = Resolver(ttl_ms=30_000)
    assert texts(resolver.addresses(DB)) == ["192.0.2.1:5432"]
    names.answer = ["192.0.2.2", "2001:db8::1", "192.0.2.2"]
    names.now_us += 29_999_999
    assert texts(resolver.addresses(DB)) == ["192.0.2.1:5432"]
    assert len(names.asked) == 1
    names.now_us += 1
    assert texts(resolver.addresses(DB)) == ["192.0.2.2:5432", "[2001:db8::1]:5432"]
    assert len(names.asked) == 2


def test_without_a_ttl_each_connect_asks(names: Names) -> None:
    resolver = Resolver(ttl_ms=0)
    for _ in range(3):
        resolver.addresses(DB)
    assert len(names.asked) == 3


def test_an_old_answer_is_better_than_none(names: Names) -> None:
    resolver = Resolver(ttl_ms=1)
    resolver.addresses(DB)
    names.now_us += 10_000_000
    names.answer = socket.gaierror(socket.EAI_AGAIN, "try again")
    assert texts(resolver.addresses(DB)) == ["192.0.2.1:5432"]
    names.answer = ["192.0.2.9"]
    assert texts(resolver.addresses(DB)) == ["192.0.2.9:5432"]


def test_a_name_nobody_knows_is_a_failed_connect_that_names_it(names: Names) -> None:
    names.answer = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    with pytest.raises(ServerConnectFailed) as caught:
        Resolver(ttl_ms=30_000).addresses(DB)
    assert "cannot resolve db.example.com: " in caught.value.log_text()
    names.answer = []
    with pytest.raises(ServerConnectFailed) as caught:
        Resolver(ttl_ms=30_000).addresses(DB)
    assert "db.example.com has no address" in caught.value.log_text()


def test_a_unix_socket_needs_no_name(names: Names) -> None:
    (address,) = Resolver(ttl_ms=1).addresses(Endpoint(None, 5432, "/run/.s.PGSQL.5432"))
    assert (address.family, address.text) == (socket.AF_UNIX, "/run/.s.PGSQL.5432")
    assert names.asked == []


@pytest.mark.parametrize("text", ["192.0.2.1:5432", "[2001:db8::1]:5432", "/run/.s.PGSQL.5432"])
def test_an_address_reads_back_from_its_text(text: str) -> None:
    assert Address.parse(text).text == text


def test_the_addresses_of_a_name_are_tried_in_turn(postgres: Postgres, gpooler_factory: Factory) -> None:
    """localhost is ::1 and 127.0.0.1 on most machines; wherever PostgreSQL listens it is found."""
    gpooler = gpooler_factory(
        postgres, config={"storage": {"postgres": {"host": "localhost"}}, "performance": {"dns_cache_ttl": 0}}
    )
    with gpooler.raw() as client:
        client.login()
        assert client.query("SELECT 1") == [["1"]]
