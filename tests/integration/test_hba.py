"""Host-based rules of a file: who is let to the rule, who is refused, and by which method."""

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from gpooler.stats.registry import ProcessWord
from tests.harness import PASSWORD, Gpooler, Postgres, eventually
from tests.harness.client import RawClient, ServerError, startup
from tests.harness.gpooler import check
from tests.harness.tools import free_port

Factory = Callable[..., Gpooler]


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gpooler-hba-") as name:
        yield Path(name)


def config(directory: Path, text: str, **more: Any) -> dict[str, Any]:
    """A configuration with these host-based rules."""
    (directory / "hba.conf").write_text(text)
    return {"routing": {"hba_file": str(directory / "hba.conf")}, **more}


def refusal(client: RawClient, user: str, database: str = "app", **options: str) -> tuple[str, str, str]:
    """Severity, code and text of a refused login, without what differs from client to client."""
    with client, pytest.raises(ServerError) as caught:
        client.login(user, database, **options)
    fields = caught.value.fields
    return fields["S"], fields["C"], re.sub(r"\bc[0-9a-f]{12}\b", "ID", fields["M"])


def test_the_first_line_that_takes_a_client_decides(
    postgres: Postgres, gpooler_factory: Factory, directory: Path
) -> None:
    text = """
        host app deny    all           reject
        host app asked   all           md5
        host app clear   all           password
        host app here    127.0.0.2/32  allow
        host app anna    all           trust
    """
    rule = {"authentication": "none", "password": PASSWORD}
    gpooler = gpooler_factory(postgres, rule=rule, config=config(directory, text))
    for user, method in (("asked", "md5"), ("clear", "password"), ("anna", "none")):
        with gpooler.connect(user, require_auth=method) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
    with gpooler.raw(source="127.0.0.2") as client:
        assert client.login("here").query("SELECT 1") == [["1"]]
    for user in ("deny", "here", "nobody"):
        with pytest.raises(psycopg.OperationalError, match=f'authentication failed for user "{user}"'):
            gpooler.connect(user)
    log = f"login refused: 28P01 .*\\(({directory}/hba.conf:2 says reject)\\)"
    eventually(lambda: re.search(log, gpooler.log()))
    eventually(lambda: gpooler.log().count("no line of hba_file takes it") == 2)
    eventually(lambda: gpooler.process_count(ProcessWord.CLIENTS) == 0)


@pytest.mark.parametrize("method", ["md5", "scram-sha-256"])
def test_who_is_refused_cannot_tell_that_from_a_wrong_password(
    postgres: Postgres, gpooler_factory: Factory, directory: Path, method: str
) -> None:
    rule = {"authentication": method, "password": PASSWORD}
    text = "host app u 127.0.0.1/32 allow\nhost app u 127.0.0.2/32 reject\n"
    gpooler = gpooler_factory(postgres, rule=rule, config=config(directory, text))
    gpooler.connect("u").close()

    with gpooler.raw(source="127.0.0.2") as refused, gpooler.raw(source="127.0.0.1") as known:
        for client in (refused, known):
            client.send(startup("u", "app"))
        first, other = refused.read(), known.read()
        assert (first.kind, first.body[:4], len(first.body)) == (other.kind, other.body[:4], len(other.body))
    if method == "md5":
        code = refusal(gpooler.raw(source="127.0.0.2"), "u")
        assert code == refusal(gpooler.raw(source="127.0.0.1"), "u", password="wrong")


def test_who_is_refused_over_tcp_is_not_asked_for_a_clear_password(
    postgres: Postgres, gpooler_factory: Factory, directory: Path
) -> None:
    rule = {"authentication": "clear_text", "password": PASSWORD}
    gpooler = gpooler_factory(postgres, rule=rule, config=config(directory, "host app u all reject"))
    with gpooler.raw() as client:
        client.send(startup("u", "app"))
        assert client.read().body[:4] == b"\0\0\0\x0a"


@pytest.mark.parametrize("own", ["none", "md5", "scram-sha-256", "clear_text"])
@pytest.mark.parametrize("named", ["password", "md5", "scram-sha-256"])
def test_a_named_method_holds_for_every_login_whatever_the_rules_is(
    postgres: Postgres, gpooler_factory: Factory, directory: Path, own: str, named: str
) -> None:
    rule = {"authentication": own, "password": PASSWORD}
    gpooler = gpooler_factory(postgres, rule=rule, config=config(directory, f"host all all all {named}"))
    for _ in range(5):
        gpooler.connect("u", require_auth=named).close()
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            gpooler.connect("u", password="wrong")


def test_a_blocked_user_stays_blocked(postgres: Postgres, gpooler_factory: Factory, directory: Path) -> None:
    rule = {"authentication": "block", "password": PASSWORD}
    gpooler = gpooler_factory(postgres, rule=rule, config=config(directory, "host all all all md5"))
    assert refusal(gpooler.raw(), "u")[:2] == ("FATAL", "28000")


def test_lines_tell_unix_sockets_from_tcp_and_this_machine_from_others(
    postgres: Postgres, gpooler_factory: Factory, directory: Path
) -> None:
    port = free_port()
    more = {
        "listen": [{"host": "127.0.0.1", "port": port}, {"port": port}],
        "service": {"unix_socket_dir": str(directory), "unix_socket_mode": "0666"},
    }
    text = "local app unix allow\nhost app tcp samehost allow\nhost app net samenet allow"
    gpooler_factory(postgres, config=config(directory, text, **more), port=port)
    for place, user, others in ((str(directory), "unix", ("tcp", "net")), ("127.0.0.1", "tcp", ("unix",))):
        with RawClient(port, place) as client:
            assert client.login(user).query("SELECT 1") == [["1"]]
        for other in others:
            with RawClient(port, place) as client:
                client.send(startup(other, "app"))
                assert client.read().body[:4] == b"\0\0\0\x0a"
    with RawClient(port) as client:
        assert client.login("net").query("SELECT 1") == [["1"]]


def test_all_does_not_take_physical_replication(
    postgres: Postgres, gpooler_factory: Factory, directory: Path
) -> None:
    rule = {"storage_user": "trust_user"}
    gpooler = gpooler_factory(postgres, rule=rule, config=config(directory, "host all all all allow"))
    with gpooler.raw() as client:
        client.send(startup("u", "app", replication="true"))
        assert client.read().body[:4] == b"\0\0\0\x0a"
    gpooler.connect("u").close()


def test_check_tells_every_mistake_with_its_file_and_line(directory: Path) -> None:
    included = directory / "more"
    included.write_text("host app joe .example.com md5\n")
    (directory / "hba.conf").write_text("hosst all all all md5\ninclude more\nlocal all all gss\n")
    text = f"""
        [logging]
        log_format = "%m"
        [routing]
        hba_file = "{directory}/hba.conf"
        [[listen]]
        host = "127.0.0.1"
        [storage.pg]
        type = "remote"
        host = "127.0.0.1"
        [database.default.user.default]
        authentication = "none"
        storage = "pg"
        pool = "sesion"
    """
    result = check(text)
    assert result.returncode == 1
    for place in ("hba.conf:1: ", "more:1: ", "hba.conf:3: "):
        assert f"{directory}/{place}" in result.stderr
    assert "pool: must be one of" in result.stderr
    result = check(text.replace("hba.conf", "none").replace("sesion", "session"))
    assert result.returncode == 1
    assert "routing.hba_file: cannot read" in result.stderr
