"""What a running gpooler logs: who each line is about, in which form, where to, and what each option adds."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import toml

from gpooler.stats.registry import ProcessWord, RouteWord
from tests.harness import PASSWORD, FaultProxy, Gpooler, Postgres, RawClient, eventually, free_port
from tests.harness.client import (
    SYNC,
    ServerError,
    bind,
    cancel_request,
    execute,
    message,
    parse,
    query,
    startup,
)
from tests.harness.gpooler import basic_config

Factory = Callable[..., Gpooler]

ROOT: Final = Path(__file__).parents[2]
ID: Final = r"[0-9a-f]{12}"
JSON: Final = {"logging": {"log_format": "json"}}


def rule(**options: Any) -> dict[str, Any]:
    return {
        "user": {
            "default": {
                "authentication": "none",
                "storage": "postgres",
                "storage_db": "app",
                "storage_user": "trust_user",
                "pool": "transaction",
                "pool_size": 1,
                **options,
            }
        }
    }


def records(gpooler: Gpooler) -> list[dict[str, Any]]:
    """The log, whose format is json."""
    return [json.loads(line) for line in gpooler.log().splitlines()]


def wait_for(gpooler: Gpooler, *texts: str) -> None:
    """Until the log holds all of these."""
    eventually(lambda: all(text in gpooler.log() for text in texts))


def error_of(client: RawClient) -> dict[str, str]:
    """The fields of the next error."""
    while (answer := client.read()).kind != b"E":
        pass
    return answer.fields()


# --- who a line is about ----------------------------------------------------------------------


def test_every_line_about_a_client_or_a_server_has_its_id(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(
        postgres,
        config={
            "logging": {"log_format": "json", "log_query": "yes"},
            "database": {
                "app": rule(pool_size=2),
                "secret": rule(authentication="clear_text", password="right"),
            },
        },
    )
    with gpooler.raw() as one, gpooler.raw() as two, gpooler.raw() as three:
        one.login(database="app")
        two.login(database="app")
        one.query("LISTEN ear")
        two.query("SELECT 1")
        with pytest.raises(ServerError):
            three.login(database="secret", password="wrong")
        for client in (one, two):
            client.terminate()
        wait_for(gpooler, "login refused")
        eventually(lambda: gpooler.log().count("client disconnected") == 2)
        for backend in postgres.activity():
            postgres.terminate(backend.pid)
        eventually(lambda: gpooler.log().count("server disconnected") == 2)
    seen = records(gpooler)
    about_clients = [line for line in seen if line["context"] in ("startup", "main", "query")]
    about_servers = [line for line in seen if line["context"] == "server"]
    assert len(about_clients) == 7
    assert all(re.fullmatch("c" + ID, line["client"]["id"]) for line in about_clients)
    assert len({line["client"]["id"] for line in about_clients}) == 3
    assert all(line["client"]["ip"] == "127.0.0.1" and line["client"]["port"] for line in about_clients)
    assert {(line["client"]["user"], line["client"]["database"]) for line in about_clients} == {
        ("trust_user", "app"),
        ("trust_user", "secret"),
    }
    assert all(re.fullmatch("s" + ID, line["server"]["id"]) for line in about_servers)
    assert len({line["server"]["id"] for line in about_servers}) == 2
    (pinned,) = [line for line in about_servers if "pinned" in line["message"]]
    (asked,) = [line for line in seen if "LISTEN ear" in line["message"]]
    assert pinned["client"]["id"] == asked["client"]["id"]
    (refused,) = [line for line in seen if line["level"] == "error"]
    assert refused["message"].startswith("login refused: 28P01 ")


def wrong_password(gpooler: Gpooler) -> dict[str, str]:
    with gpooler.raw() as client, pytest.raises(ServerError) as caught:
        client.login(database="secret", password="wrong")
    return caught.value.fields


def refused_startup(database: str, **parameters: str) -> Callable[[Gpooler], dict[str, str]]:
    def refusal(gpooler: Gpooler) -> dict[str, str]:
        with gpooler.raw() as client, pytest.raises(ServerError) as caught:
            client.login(database=database, **parameters)
        return caught.value.fields

    return refusal


def garbage(gpooler: Gpooler) -> dict[str, str]:
    with gpooler.raw() as client:
        client.login(database="narrow")
        client.send(message(b"!", b"?"))
        return error_of(client)


def garbage_at_startup(gpooler: Gpooler) -> dict[str, str]:
    with gpooler.raw() as client:
        client.send(b"GET / HTTP/1.1\r\n\r\n")
        return error_of(client)


def unknown_protocol(gpooler: Gpooler) -> dict[str, str]:
    with gpooler.raw() as client:
        client.send(startup("trust_user", "narrow", version=4 << 16))
        return error_of(client)


def one_client_too_many(gpooler: Gpooler) -> dict[str, str]:
    with gpooler.raw() as first:
        first.login(database="one")
        return refused_startup("one")(gpooler)


def no_server_in_time(gpooler: Gpooler) -> dict[str, str]:
    with gpooler.raw() as first, gpooler.raw() as second:
        first.login(database="narrow")
        second.login(database="narrow")
        first.query("BEGIN")
        second.send(query("SELECT 1"))
        fields = error_of(second)
        first.query("COMMIT")
    return fields


def block_in_a_statement_pool(gpooler: Gpooler) -> dict[str, str]:
    with gpooler.raw() as client:
        client.login(database="statements")
        client.send(query("BEGIN"))
        return error_of(client)


def cancelled_while_waiting(gpooler: Gpooler) -> dict[str, str]:
    with gpooler.raw() as first, gpooler.raw() as second, gpooler.raw() as third:
        first.login(database="patient")
        second.login(database="patient")
        first.query("BEGIN")
        second.send(query("SELECT 1"))
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
        third.send(cancel_request(second.pid, second.key))
        fields = error_of(second)
        first.query("COMMIT")
    return fields


ERRORS: Final[Mapping[str, tuple[Callable[[Gpooler], dict[str, str]], str]]] = {
    "wrong password": (wrong_password, "28P01"),
    "blocked": (refused_startup("closed"), "28000"),
    "no rule": (refused_startup("nowhere"), "3D000"),
    "a parameter that no session may set": (refused_startup("narrow", server_version="9"), "55P02"),
    "no server at all": (refused_startup("nobody"), "08006"),
    "garbage": (garbage, "08P01"),
    "garbage at startup": (garbage_at_startup, "08P01"),
    "unknown protocol": (unknown_protocol, "0A000"),
    "one client too many": (one_client_too_many, "53300"),
    "no server in time": (no_server_in_time, "53300"),
    "block in a statement pool": (block_in_a_statement_pool, "0A000"),
    "cancelled while waiting": (cancelled_while_waiting, "57014"),
}
# a rule says whether the id is shown
WITHOUT_A_RULE: Final = ("no rule", "garbage at startup", "unknown protocol")


def erring(postgres: Postgres, gpooler_factory: Factory, **options: Any) -> Gpooler:
    """A gpooler with a rule for each of ERRORS."""
    return gpooler_factory(
        postgres,
        config={
            **JSON,
            "storage": {"nobody": {"type": "remote", "host": "127.0.0.1", "port": free_port()}},
            "database": {
                "default": None,
                "secret": rule(authentication="clear_text", password="right", **options),
                "closed": rule(authentication="block", **options),
                "one": rule(client_max=1, **options),
                "narrow": rule(pool_timeout=1000, **options),
                "statements": rule(pool="statement", **options),
                "patient": rule(**options),
                "nobody": rule(storage="nobody", **options),
            },
        },
    )


def test_every_error_of_ours_has_the_id_that_the_log_has(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = erring(postgres, gpooler_factory)
    ids = []
    for name, (provoke, sqlstate) in ERRORS.items():
        fields = provoke(gpooler)
        assert (name, fields["C"]) == (name, sqlstate)
        shown = re.match(rf"gpooler: (c{ID}): \S", fields["M"])
        assert shown, f"{name}: {fields['M']}"
        ids.append(shown[1])

        def lines(wanted: str = shown[1], state: str = sqlstate) -> list[dict[str, Any]]:
            return [
                line
                for line in records(gpooler)
                if line["client"]["id"] == wanted and line["level"] == "error" and state in line["message"]
            ]

        eventually(lambda lines=lines: len(lines()) == 1)  # type: ignore[misc]
    assert len(set(ids)) == len(ids)


def test_a_login_that_is_too_slow_is_told_with_its_id(postgres: Postgres, gpooler_factory: Factory) -> None:
    port = free_port()
    gpooler = gpooler_factory(
        postgres,
        port=port,
        rule={"authentication": "clear_text", "password": "right"},
        config={**JSON, "listen": [{"host": "127.0.0.1", "port": port, "client_login_timeout": 200}]},
    )
    with gpooler.raw() as client:
        client.send(startup("trust_user", "secret"))
        fields = error_of(client)
    shown = re.match(rf"gpooler: (c{ID}): \S", fields["M"])
    assert shown
    wait_for(gpooler, shown[1])


def test_a_server_that_breaks_off_is_told_with_the_ids_of_both(
    postgres: Postgres, gpooler_factory: Factory, fault_proxy: Callable[[int], FaultProxy]
) -> None:
    proxy = fault_proxy(postgres.port)
    gpooler = gpooler_factory(
        postgres, rule={"pool_size": 1}, config={**JSON, "storage": {"postgres": {"port": proxy.port}}}
    )
    with gpooler.raw() as client:
        client.login()
        client.send(query("SELECT pg_sleep(60)"))
        eventually(lambda: [row.state for row in postgres.activity()] == ["active"])
        proxy.reset()
        fields = error_of(client)
        for backend in postgres.activity():
            postgres.terminate(backend.pid)  # which does not look at its client while it sleeps
    shown = re.match(rf"gpooler: (c{ID}): \S", fields["M"])
    assert shown
    wait_for(gpooler, "server_lost")
    (told,) = [line for line in records(gpooler) if line["level"] == "error"]
    assert told["client"]["id"] == shown[1]


def test_without_client_show_id_errors_have_no_id(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = erring(postgres, gpooler_factory, client_show_id="no")
    for name, (provoke, sqlstate) in ERRORS.items():
        fields = provoke(gpooler)
        assert (name, fields["C"]) == (name, sqlstate)
        if name not in WITHOUT_A_RULE:
            assert not re.search(ID, fields["M"]), name


# --- the form of a line -----------------------------------------------------------------------


def test_log_format_with_every_flag(postgres: Postgres, gpooler_factory: Factory) -> None:
    flags = "nteTpisudclmMrhHx"
    template = "\t".join(f"{flag}=%{flag}" for flag in flags)
    gpooler = gpooler_factory(
        postgres,
        config={
            "logging": {"log_format": template + r"\t100%%\\", "log_query": True},
            "database": {"order app": rule()},
        },
    )
    before = int(time.time())
    with gpooler.raw() as client:
        client.login("trust_user", "order app")
        client.query("SELECT 'a=b',\n1")
        port = client.socket.getsockname()[1]
        client.terminate()
    wait_for(gpooler, "client disconnected")
    lines = [
        dict(part.split("=", 1) for part in line.removesuffix("\t100%\\").split("\t"))
        for line in gpooler.log().splitlines()
    ]
    assert all(list(line) == list(flags) for line in lines)
    assert len(lines) == gpooler.log().count("\t100%\\\n")
    (asked,) = [line for line in lines if line["c"] == "query"]
    assert asked["m"] == r"SELECT 'a=b',\n1"
    assert asked["M"] == r"SELECT 'a\=b',\n1"
    assert (asked["u"], asked["d"], asked["l"], asked["h"]) == (
        "trust_user",
        "order app",
        "info",
        "127.0.0.1",
    )
    assert asked["r"] == str(port)
    assert asked["x"] == "none"
    assert int(asked["p"]) in gpooler.worker_pids()
    assert asked["T"].isdigit()
    assert before <= int(asked["n"]) <= time.time()
    assert asked["t"] == time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(asked["n"])))
    assert re.fullmatch(r"\d{3}", asked["e"])
    assert re.fullmatch("c" + ID, asked["i"])
    (opened,) = [line for line in lines if "server connected" in line["m"]]
    assert re.fullmatch("s" + ID, opened["s"])
    assert opened["H"] == f"127.0.0.1:{postgres.port}"
    assert (opened["u"], opened["d"], opened["i"], opened["r"]) == ("trust_user", "app", "none", "none")


def test_no_client_can_forge_a_line(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(
        postgres, config={"logging": {"log_query": "yes", "log_debug": "yes", "log_format": "%l %u %d %m"}}
    )
    forged = "x\ninfo forged line\r\x1b[31m"
    with gpooler.raw() as client:
        client.login(forged, "app", application_name=forged)
        client.query(f"SELECT 1 /* {forged} */")
        client.terminate()
    wait_for(gpooler, "client disconnected")
    assert not re.search(r"^info forged", gpooler.log(), re.MULTILINE)
    assert "\x1b" not in gpooler.log()


# --- where lines go ---------------------------------------------------------------------------

SYSLOG_PROGRAM: Final = """
import sys
from gpooler.logs import sinks
sinks.SyslogSink.__init__.__defaults__ = (sys.argv[1],)
from gpooler.cli import main
sys.exit(main(["run", "-c", sys.argv[2]]))
"""


@contextmanager
def syslog_daemon(path: Path) -> Iterator[list[str]]:
    """Listens and reads as the system's daemon does; what came so far."""
    datagrams: list[str] = []

    def read() -> None:
        while (data := daemon.recv(65536)) != b"end":
            datagrams.append(data.decode())

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        daemon.bind(str(path))
        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield datagrams
        finally:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ender:
                ender.sendto(b"end", str(path))
            reader.join()


def test_lines_go_to_stdout_a_file_and_syslog_at_once(postgres: Postgres, tmp_path: Path) -> None:
    port = free_port()
    config = basic_config(postgres, port, {})
    config["logging"] |= {
        "log_file": str(tmp_path / "log"),
        "log_syslog": "yes",
        "log_syslog_ident": "pooler",
        "log_syslog_facility": "local3",
        "log_format": "%p %l %c %m",
    }
    (tmp_path / "config.toml").write_text(toml.dumps(config))
    with (
        syslog_daemon(tmp_path / "syslog") as datagrams,
        subprocess.Popen(
            [sys.executable, "-c", SYSLOG_PROGRAM, str(tmp_path / "syslog"), str(tmp_path / "config.toml")],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        ) as process,
    ):
        try:
            log = tmp_path / "log"
            eventually(lambda: log.exists() and "ready:" in log.read_text(), within=20)
            with RawClient(port) as client:
                client.login()
                client.query("SELECT 1")
                client.terminate()
            eventually(lambda: "client disconnected" in log.read_text())
            process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=20)
        finally:
            process.kill()
        written = sorted(log.read_text().splitlines())
        eventually(lambda: len(datagrams) == len(written))
    assert sorted(out.splitlines()) == written
    levels = {"info": 6, "error": 3}
    said = []
    for datagram in datagrams:
        shown = re.fullmatch(r"<(\d+)>\w{3} [ \d]\d [\d:]{8} pooler\[(\d+)\]: (.*)", datagram)
        assert shown, datagram
        priority, pid, line = shown.groups()
        assert line.startswith(f"{pid} ")
        assert int(priority) == (19 << 3) + levels[line.split()[1]]
        said.append(line)
    assert sorted(said) == written
    assert any("server connected" in line for line in said)


def test_no_log_at_all_is_possible(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, config={"logging": {"log_to_stdout": "no"}})
    with gpooler.raw() as client:
        client.login()
        assert client.query("SELECT 1") == [["1"]]
    assert gpooler.log() == ""


# --- what each option adds --------------------------------------------------------------------


@pytest.mark.parametrize("is_on", [True, False])
def test_log_session_tells_who_comes_and_goes(
    postgres: Postgres, gpooler_factory: Factory, is_on: bool
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1}, config={"logging": {"log_session": is_on}})
    with gpooler.raw() as client:
        client.login()
        client.query("SELECT 1")
        client.terminate()
    eventually(lambda: gpooler.route_count(RouteWord.CLIENTS) == 0)
    (backend,) = postgres.activity()
    postgres.terminate(backend.pid)
    eventually(lambda: gpooler.route_count(RouteWord.SERVERS_IDLE) == 0)
    wanted = [
        r"client connected",
        r"client disconnected: client_terminated, after \d+\.\d{3} s",
        rf"server connected, pid {backend.pid}",
        r"server disconnected: server_lost",
    ]
    if is_on:
        eventually(lambda: all(re.search(text, gpooler.log()) for text in wanted))
    assert gpooler.stop() == 0
    assert [bool(re.search(text, gpooler.log())) for text in wanted] == [is_on] * 4


def test_log_query_holds_in_general_or_for_one_rule(postgres: Postgres, gpooler_factory: Factory) -> None:
    for general in (False, True):
        gpooler = gpooler_factory(
            postgres,
            config={
                **JSON,
                "logging": {"log_format": "json", "log_query": general},
                "database": {"told": rule(log_query="yes"), "untold": rule()},
            },
        )
        for database in ("told", "untold"):
            with gpooler.raw() as client:
                client.login(database=database)
                client.query(f"SELECT 'simple {database}'; SELECT 2")
                client.send(parse(f"SELECT 'extended {database}'"), bind(), execute(), SYNC)
                client.read_until()
                client.send(parse(f"SELECT 'named {database}'", name="st"), SYNC)
                client.read_until()
                client.query("SELECT '" + "x" * 20_000 + "'")
                client.terminate()
        eventually(lambda gpooler=gpooler: gpooler.log().count("client disconnected") == 2)  # type: ignore[misc]
        found = [line for line in records(gpooler) if line["context"] == "query"]
        told = ["told", "untold"] if general else ["told"]
        texts = [line["message"] for line in found if "xxx" not in line["message"]]
        assert texts == [
            text
            for database in told
            for text in (
                f"SELECT 'simple {database}'; SELECT 2",
                f"SELECT 'extended {database}'",
                f"st SELECT 'named {database}'",
            )
        ]
        long = [line["message"] for line in found if "xxx" in line["message"]]
        assert len(long) == len(told)
        assert all(len(text) < 20_000 for text in long)
        assert gpooler.stop() == 0


def asked(gpooler: Gpooler, client: RawClient, text: str) -> bool:
    """Whether a query of this client is logged; one of another client is, and comes behind it."""
    client.query(text)
    with gpooler.raw() as other:
        other.login(database="told")
        other.query(f"SELECT 'behind {text}'")
    wait_for(gpooler, f"behind {text}")
    return any(line["message"] == text for line in records(gpooler))


@pytest.mark.parametrize("where", ["in general", "for the rule"])
def test_a_reload_of_log_query_reaches_clients_that_are_connected(
    postgres: Postgres, gpooler_factory: Factory, where: str
) -> None:
    gpooler = gpooler_factory(
        postgres, config={**JSON, "database": {"told": rule(log_query="yes"), "untold": rule()}}
    )

    def set_to(value: bool) -> None:
        change = {"log_query": value}
        if where == "in general":  # the rules stay as they are
            gpooler.reload(config={"logging": change})
        else:
            gpooler.reload(config={"database": {"untold": {"user": {"default": change}}}})

    with gpooler.raw() as client:
        client.login(database="untold")
        assert not asked(gpooler, client, "SELECT 1")
        set_to(True)
        assert asked(gpooler, client, "SELECT 2")
        set_to(False)
        assert not asked(gpooler, client, "SELECT 3")


def test_log_stats_tells_what_each_route_did(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(
        postgres, config={"logging": {"log_format": "%c %u %d %m", "stats_interval": 1}}
    )
    with gpooler.raw() as client:
        client.login()
        eventually(
            lambda: (
                client.query("SELECT 1")
                and re.search(
                    r"^stats trust_user app \[app\.trust_user\] clients 1 active [01] waiting 0, "
                    r"servers active [01] idle [01], [1-9]\d* transactions/s [1-9]\d* us, "
                    r"[1-9]\d* queries/s [1-9]\d* us, wait \d+ us, in [1-9]\d* bytes/s, out \d+ bytes/s$",
                    gpooler.log(),
                    re.MULTILINE,
                )
            ),
            within=10,
        )


def test_without_log_stats_there_are_no_such_lines(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(
        postgres,
        config={
            "logging": {"log_stats": "no", "stats_interval": 1},
            "metrics": {"statsd_host": "127.0.0.1", "statsd_port": 9},
        },
    )
    with gpooler.raw() as client, socket.socket(socket.AF_INET, socket.SOCK_DGRAM):
        client.login()
        client.query("SELECT 1")
    assert gpooler.stop() == 0
    assert "(stats)" not in gpooler.log()


def test_log_debug_tells_the_steps_of_clients_and_servers(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(
        postgres,
        rule={"authentication": "clear_text", "password": PASSWORD, "pool_size": 1},
        config={"logging": {"log_format": "json", "log_debug": True}},
    )
    with gpooler.raw() as client:
        client.login(TimeZone="Asia/Tokyo")
        client.terminate()
    wait_for(gpooler, "client disconnected")
    told = [line for line in records(gpooler) if line["level"] == "debug"]
    assert "SSLRequest: answered N" in [line["message"] for line in told]  # the harness knocks with one
    about_client = [line["message"] for line in told if line["client"]["ip"] and line["client"]["user"]]
    assert about_client == [
        "startup packet: protocol 3.0, rule default.default, authentication clear_text, "
        "parameters: TimeZone=Asia/Tokyo",
        "authentication: the client is asked",
        "authenticated, on route 0: it is set up on a server",
        "set up and logged in",
    ]
    about_server = [line["message"] for line in told if line["server"]["id"]]
    assert about_server == ["may be opened: slot 1, generation 1", "connected, logs in"]
    assert PASSWORD not in gpooler.log()


def test_log_debug_of_a_rule_tells_of_its_clients_and_servers_alone(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(
        postgres, config={**JSON, "database": {"told": rule(log_debug="yes"), "untold": rule()}}
    )
    for database in ("untold", "told"):
        with gpooler.raw() as client:
            client.login(database=database)
            client.terminate()
    eventually(lambda: gpooler.log().count("client disconnected") == 2)
    seen = records(gpooler)
    (client_id,) = {line["client"]["id"] for line in seen if line["client"]["database"] == "told"}
    told = [line for line in seen if line["level"] == "debug"]
    assert {line["client"]["id"] for line in told} == {client_id, None}
    assert len({line["server"]["id"] for line in told} - {None}) == 1
    assert len([line for line in told if line["client"]["id"]]) == 3


def test_a_reload_turns_log_debug_of_a_rule_on_and_off(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, config={**JSON, "database": {"one": rule(), "other": rule()}})

    def told() -> set[str]:
        """The databases whose clients' steps are logged now."""
        before = len(records(gpooler))
        for database in ("one", "other"):
            with gpooler.raw() as client:
                client.login(database=database)
                client.terminate()
        eventually(
            lambda: (
                [line["message"][:19] for line in records(gpooler)[before:]].count("client disconnected") == 2
            )
        )
        seen = [line for line in records(gpooler)[before:] if line["level"] == "debug"]
        return {line["client"]["database"] for line in seen} - {None}

    assert told() == set()
    gpooler.reload(config={"database": {"one": {"user": {"default": {"log_debug": True}}}}})
    assert told() == {"one"}
    gpooler.reload(
        config={
            "database": {
                name: {"user": {"default": {"log_debug": name == "other"}}} for name in ("one", "other")
            }
        }
    )
    assert told() == {"other"}
    gpooler.reload(config={"database": {"other": {"user": {"default": {"log_debug": False}}}}})
    assert told() == set()


def test_log_debug_of_a_rule_tells_of_its_refused_logins(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    secret = {"authentication": "clear_text", "password": "right"}
    gpooler = gpooler_factory(
        postgres,
        config={**JSON, "database": {"told": rule(**secret, log_debug="yes"), "untold": rule(**secret)}},
    )
    for database in ("untold", "told"):
        with gpooler.raw() as client, pytest.raises(ServerError):
            client.login(database=database, password="wrong")
    eventually(lambda: gpooler.log().count("login refused") == 2)
    told = [line for line in records(gpooler) if line["level"] == "debug"]
    assert {line["client"]["database"] for line in told} == {"told"}
    assert told[-1]["message"] == "authentication: the client is asked"


def test_log_debug_of_a_rule_tells_of_cancel_requests_for_its_servers(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(
        postgres, config={**JSON, "database": {"told": rule(log_debug="yes"), "untold": rule()}}
    )
    for database in ("untold", "told"):
        with gpooler.raw() as client:
            client.login(database=database)
            client.send(query("SELECT pg_sleep(60)"))
            eventually(lambda: "active" in [row.state for row in postgres.activity()])
            with gpooler.raw() as canceller:
                canceller.send(cancel_request(client.pid, client.key))
                canceller.read_to_end()
            assert error_of(client)["C"] == "57014"
            client.read_until()
            client.terminate()
    eventually(lambda: gpooler.log().count("client disconnected") == 2)
    (line,) = [line for line in records(gpooler) if line["context"] == "cancel"]
    assert (line["level"], line["message"]) == ("debug", "cancel request delivered")
    assert line["server"]["id"]


def test_log_config_shows_the_configuration_in_force_without_secrets(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(
        postgres,
        rule={"password": "do-not-tell-1", "storage_password": "do-not-tell-2"},
        config={"logging": {"log_config": "yes", "log_format": "%c|%m"}},
    )
    shown = "\n".join(
        line.removeprefix("config|") for line in gpooler.log().splitlines() if line.startswith("config|")
    )
    in_force = toml.loads(shown)
    assert in_force["limits"]["backend_connect_timeout_ms"] == 30_000
    assert in_force["database"]["default"]["user"]["default"]["pool_size"] == 20
    assert in_force["database"]["default"]["user"]["default"]["password"] == "********"
    assert "do-not-tell" not in gpooler.log()


@pytest.mark.parametrize("is_async", [True, False])
def test_log_async_changes_nothing_that_is_written(
    postgres: Postgres, gpooler_factory: Factory, is_async: bool
) -> None:
    gpooler = gpooler_factory(
        postgres, config={"logging": {"log_async": is_async, "log_query": "yes", "log_format": "%m"}}
    )
    with gpooler.raw() as client:
        client.login()
        for number in range(100):
            client.query(f"SELECT {number}")
        client.terminate()
    wait_for(gpooler, "client disconnected")
    assert [line for line in gpooler.log().splitlines() if line.startswith("SELECT")] == [
        f"SELECT {number}" for number in range(100)
    ]
    assert gpooler.process_count(ProcessWord.LOG_LINES_LOST) == 0


def test_lines_beyond_log_queue_depth_are_lost_and_counted(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, config={"logging": {"log_queue_depth": 1, "log_query": "yes"}})
    with gpooler.raw() as client:
        client.login()
        client.send(*[query(f"SELECT {number}") for number in range(200)])
        for _ in range(200):
            client.read_until()
    eventually(lambda: gpooler.process_count(ProcessWord.LOG_LINES_LOST) > 0)
