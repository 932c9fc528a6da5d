"""Host names as addresses of rules: who comes in by them, and what becomes of them while names change."""

import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import gevent
import pytest

from gpooler.config.load import load_text
from gpooler.config.model import Config
from gpooler.log import Logger, compile_format
from gpooler.net import host_names
from gpooler.net.host_names import HostNames
from tests.harness import PASSWORD, Gpooler, Postgres, RawClient, eventually
from tests.harness.client import ServerError
from tests.harness.names import NAME, Names
from tests.integration.test_routing import rule, rule_of
from tests.unit.test_rules import BODY, HEAD

Factory = Callable[..., Gpooler]
NOBODY: Final = "nowhere.invalid"
UNKNOWN: Final = socket.gaierror(socket.EAI_NONAME, "Name or service not known")


class Answers:
    """A resolver of the system whose answers a test decides."""

    def __init__(self) -> None:
        self.answers: dict[str, list[str] | OSError] = {}
        self.hangs = threading.Event()
        self.hangs.set()  # it does not
        self.asked: list[str] = []

    def look_up(self, host: str, port: int) -> list[Any] | OSError:
        self.asked.append(host)
        self.hangs.wait(60)
        answer = self.answers.get(host, UNKNOWN)
        if isinstance(answer, OSError):
            return answer
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, 1, 6, "", (address, port))
            for address in answer
        ]


class House:
    """Host names, and what is told of them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.changes = 0
        self.names = HostNames(Logger(compile_format("%l %m", pid=1), self._put, lambda: 0.0, is_debug=False))
        self.names.on_change = self._on_change

    def _put(self, _: str, line: str) -> None:
        self.lines.append(line.rstrip())

    def _on_change(self) -> None:
        self.changes += 1

    def go_on(self, *names: str, ttl_ms: int = 1) -> None:
        """Rules have these names from now on."""
        config = configured(*names, ttl_ms=ttl_ms)
        self.names.prepare(config)
        self.names.configure(config)

    def addresses(self, name: str) -> set[str]:
        return set(map(str, self.names.addresses[name]))


def configured(*names: str, ttl_ms: int) -> Config:
    rules = "".join(f'[[database.d.user.u]]\naddress = "{name}"\n{BODY}' for name in names)
    general = f"[performance]\ndns_cache_ttl = {ttl_ms}\n[[database.d.user.u]]\n{BODY}"
    return load_text(HEAD + general + rules).config


def until(check: Callable[[], object]) -> None:
    """While the hub runs."""
    with gevent.Timeout(20):
        while not check():
            gevent.sleep(0.005)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answers]:
    made = Answers()
    monkeypatch.setattr(host_names, "look_up", made.look_up)
    monkeypatch.setattr(host_names, "INTERVAL_LEAST_S", 0.005)
    yield made
    made.hangs.set()


@pytest.fixture
def house() -> Iterator[House]:
    made = House()
    yield made
    made.go_on()
    gevent.sleep(0)  # its greenlets end


def test_names_have_their_addresses_before_they_are_in_force(answers: Answers, house: House) -> None:
    answers.answers = {"a.test": ["192.0.2.1", "2001:db8::1"], "b.test": ["::ffff:192.0.2.2", "fe80::1%eth0"]}
    house.go_on("a.test", "b.test", ttl_ms=60_000)
    assert house.addresses("a.test") == {"192.0.2.1", "2001:db8::1"}
    assert house.addresses("b.test") == {"192.0.2.2", "fe80::1"}  # as a client's is compared
    assert sorted(house.lines) == [
        "info the address a.test of rules is 192.0.2.1, 2001:db8::1",
        "info the address b.test of rules is 192.0.2.2, fe80::1",
    ]
    assert {name: addresses for name, _, addresses in house.names.known()}[
        "a.test"
    ] == "192.0.2.1, 2001:db8::1"
    # with another rule only the new name is asked for
    house.go_on("a.test", "c.test", ttl_ms=60_000)
    assert sorted(answers.asked) == ["a.test", "b.test", "c.test"]
    assert house.names.addresses.keys() == {"a.test", "c.test"}


def test_a_name_is_asked_for_again_and_only_a_change_is_told(answers: Answers, house: House) -> None:
    answers.answers = {"a.test": ["192.0.2.1"]}
    house.go_on("a.test")
    until(lambda: len(answers.asked) > 5)
    assert (house.changes, len(house.lines)) == (1, 1)
    answers.answers = {"a.test": ["192.0.2.2", "192.0.2.1"]}
    until(lambda: house.addresses("a.test") == {"192.0.2.1", "192.0.2.2"})
    assert house.changes == 2


def test_a_name_that_cannot_be_resolved_keeps_what_it_had(answers: Answers, house: House) -> None:
    answers.answers = {"a.test": ["192.0.2.1"]}
    house.go_on("a.test")
    for problem in (UNKNOWN, []):
        answers.answers = {"a.test": problem}
        until(lambda: "cannot resolve" in house.lines[-1])
        seen = len(answers.asked)
        until(lambda seen=seen: len(answers.asked) > seen + 5)
        assert house.addresses("a.test") == {"192.0.2.1"}
        answers.answers = {"a.test": ["192.0.2.1"]}
        until(lambda: "info" in house.lines[-1])
    assert house.changes == 1
    assert house.lines[1:] == [
        "error cannot resolve the address a.test of rules ([Errno -2] Name or service not known): "
        "still taken for 192.0.2.1",
        "info the address a.test of rules is 192.0.2.1",
        "error cannot resolve the address a.test of rules (it has no address): still taken for 192.0.2.1",
        "info the address a.test of rules is 192.0.2.1",
    ]


def test_a_resolver_that_hangs_holds_nobody_up_for_long(
    answers: Answers, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_names, "FIRST_ANSWERS_S", 0.01)
    answers.answers = {f"{number}.test": ["192.0.2.1"] for number in range(9)}
    answers.hangs.clear()
    house.go_on(*answers.answers)
    assert not any(house.names.addresses.values())
    assert len(house.lines) == 9
    assert all("(no answer yet): its rules match nobody until then" in line for line in house.lines)
    assert len(answers.asked) <= host_names.THREADS
    answers.hangs.set()
    until(lambda: all(house.names.addresses.values()))
    assert house.changes == 9


def test_a_shorter_time_to_live_holds_at_once(answers: Answers, house: House) -> None:
    answers.answers = {"a.test": ["192.0.2.1"]}
    house.go_on("a.test", ttl_ms=86_400_000)
    assert len(answers.asked) == 1
    house.go_on("a.test", ttl_ms=1)
    until(lambda: len(answers.asked) > 3)


# --- a gpooler that runs ----------------------------------------------------------------------


@pytest.fixture
def names(tmp_path: Path, program: Callable[[str], str]) -> Names:
    return Names(tmp_path, program("cc"))


def near(*addresses: str, ttl_ms: int = 30_000, workers: int = 1) -> dict[str, Any]:
    """A rule for each address, and one for everywhere else."""
    rules = [*(rule(f"at {address}", address=address) for address in addresses), rule("elsewhere")]
    return {
        "database": {"default": None, "app": {"user": {"anna": rules}}},
        "performance": {"dns_cache_ttl": ttl_ms, "workers": workers},
    }


def rule_at(gpooler: Gpooler, address: str) -> str | None:
    return rule_of(RawClient(gpooler.port, gpooler.host, source=address), "anna", "app")


def test_a_client_is_taken_by_the_name_of_its_host(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, config=near("LocalHost", workers=2))
    for _ in range(6):  # from the first login on; later ones go the short way
        assert rule_at(gpooler, "127.0.0.1") == "at LocalHost"
        assert rule_at(gpooler, "127.0.0.2") == "elsewhere"
    eventually(lambda: gpooler.log().count("the address localhost of rules is ") == 2)


def test_of_a_name_and_a_network_the_first_in_the_file_is_taken(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, config=near("localhost", "127.0.0.0/8"))
    assert rule_at(gpooler, "127.0.0.1") == "at localhost"
    assert rule_at(gpooler, "127.0.0.2") == "at 127.0.0.0/8"
    gpooler.reload(config=near("127.0.0.0/8", "localhost"))
    assert rule_at(gpooler, "127.0.0.1") == "at 127.0.0.0/8"


def test_a_name_that_nobody_knows_takes_nobody_and_the_log_says_so(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, config=near(NOBODY, ttl_ms=1))
    assert rule_at(gpooler, "127.0.0.1") == "elsewhere"
    said = re.compile(
        f"cannot resolve the address {NOBODY} of rules \\(.*\\): its rules match nobody until then"
    )
    eventually(lambda: said.search(gpooler.log()))
    gpooler.reload(config={"database": {"app": {"user": {"anna": [rule("alone", address=NOBODY)]}}}})
    assert rule_at(gpooler, "127.0.0.1") is None
    assert len(said.findall(gpooler.log())) == 1


def test_a_reload_that_brings_a_name_takes_effect_for_the_next_login(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, config=near())
    assert rule_at(gpooler, "127.0.0.1") == "elsewhere"
    gpooler.reload(config=near("localhost"))
    assert rule_at(gpooler, "127.0.0.1") == "at localhost"
    answer = gpooler.reload(config=near("127.0.0.1"))
    assert 'anna[0].address: "localhost" → "127.0.0.1/32": for new logins' in answer
    assert rule_at(gpooler, "127.0.0.1") == "at 127.0.0.1"


def test_clients_that_log_in_find_what_a_name_means_now(
    postgres: Postgres, gpooler_factory: Factory, names: Names
) -> None:
    names.set("127.0.0.1", "127.0.0.3")
    gpooler = gpooler_factory(postgres, config=near(NAME, ttl_ms=1), environment=names.environment)
    for _ in range(3):
        assert rule_at(gpooler, "127.0.0.1") == rule_at(gpooler, "127.0.0.3") == f"at {NAME}"
        assert rule_at(gpooler, "127.0.0.2") == "elsewhere"
    names.set("127.0.0.2", "127.0.0.3")
    eventually(lambda: rule_at(gpooler, "127.0.0.2") == f"at {NAME}")
    assert rule_at(gpooler, "127.0.0.1") == "elsewhere"
    assert rule_at(gpooler, "127.0.0.3") == f"at {NAME}"
    names.set()  # nobody answers
    eventually(lambda: f"cannot resolve the address {NAME} of rules" in gpooler.log())
    assert rule_at(gpooler, "127.0.0.2") == f"at {NAME}"


def test_a_line_of_the_hba_file_may_name_a_host(
    postgres: Postgres, gpooler_factory: Factory, names: Names, tmp_path: Path
) -> None:
    lines = tmp_path / "hba.conf"
    lines.write_text(f"host app all {NAME} reject\nhost app all all allow\n")
    config: Mapping[str, Any] = {
        "routing": {"hba_file": str(lines)}, "performance": {"dns_cache_ttl": 1}
    }  # fmt: skip
    options = {"authentication": "md5", "password": PASSWORD}
    gpooler = gpooler_factory(postgres, rule=options, config=config, environment=names.environment)

    def is_refused(address: str) -> bool:
        with gpooler.raw(source=address) as client:
            try:
                client.login()
            except ServerError as error:
                return error.sqlstate == "28P01"
        return False

    for _ in range(3):
        assert not is_refused("127.0.0.1")
    names.set("127.0.0.1")
    eventually(lambda: is_refused("127.0.0.1"))
    assert not is_refused("127.0.0.2")
    eventually(lambda: f"{lines}:1 says reject" in gpooler.log())
