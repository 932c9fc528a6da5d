"""Replication connections: each has a server of its own, opened as the client asked and closed with it."""

import os
import random
import re
import select
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

import psycopg2
import psycopg2.extras
import pytest

from gpooler.stats.registry import ProcessWord, RouteWord
from tests.harness import PASSWORD, Gpooler, Postgres, RawClient, Unavailable, eventually
from tests.harness.client import COPY_DONE, TERMINATE, ServerError, cancel_request, query, startup
from tests.harness.load import Pgbench

Factory = Callable[..., Gpooler]
Program = Callable[[str], str]

POOLS: Final = ("session", "transaction", "statement")
TRUE: Final = ("true", "TRUE", "t", "tr", "on", "yes", "y", "1", "database")
FALSE: Final = ("false", "f", "off", "of", "no", "n", "0")
BAD: Final = ("x", "", "o", "2", "Database", "databas", " true", "physical")
SLOT: Final = "made_by_a_test"
GAUGES: Final = (
    RouteWord.CLIENTS,
    RouteWord.CLIENTS_ACTIVE,
    RouteWord.CLIENTS_WAITING,
    RouteWord.SERVERS_ACTIVE,
    RouteWord.SERVERS_IDLE,
    RouteWord.SERVERS_LOGIN,
    RouteWord.SERVERS_CLOSING,
    RouteWord.CLIENTS_ADMITTED,
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Postgres]:
    """A PostgreSQL whose WAL can be decoded."""
    try:
        postgres = Postgres(15, wal_level="logical")
    except Unavailable as error:
        pytest.skip(str(error))
    with postgres:
        postgres.query("CREATE TABLE item (name text)", dbname="app")
        yield postgres


@pytest.fixture
def postgres(cluster: Postgres) -> Iterator[Postgres]:
    """The same for each test, which leaves no connection and no slot behind."""
    yield cluster
    eventually(lambda: not cluster.walsenders() and not cluster.activity())
    cluster.query("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")


def pooled(factory: Factory, postgres: Postgres, workers: int = 1, **rule: Any) -> Gpooler:
    """One rule for everybody, with a user on the server who may replicate."""
    return factory(
        postgres,
        rule={"storage_user": "replicator", **rule},
        config={"performance": {"workers": workers}, "logging": {"log_session": True}},
    )


def replicating(gpooler: Gpooler, kind: str = "database", **parameters: str) -> RawClient:
    """A hand-made client that is logged in."""
    return gpooler.raw().login("joe", "app", replication=kind, **parameters)


def refusal(port: int, **parameters: str) -> dict[str, str]:
    """The fields of the error that a startup packet is answered with."""
    with RawClient(port) as client, pytest.raises(ServerError) as error:
        client.login("replicator", "app", **parameters)
    return error.value.fields


def is_at_rest(gpooler: Gpooler) -> bool:
    """Whether no client and no server is counted any more, but for the parked ones of ordinary clients."""
    counted = {word.name: gpooler.route_count(word) for word in GAUGES if word != RouteWord.SERVERS_IDLE}
    return not any(counted.values()) and gpooler.process_count(ProcessWord.CLIENTS) == 0


def start_streaming(client: RawClient, kind: str) -> None:
    """Begin a stream from where the WAL ends; the client is in CopyBoth afterwards."""
    ((_, _, position, _),) = client.query("IDENTIFY_SYSTEM")
    if kind == "database":
        client.query(f"CREATE_REPLICATION_SLOT {SLOT} TEMPORARY LOGICAL test_decoding")
        client.send(query(f"START_REPLICATION SLOT {SLOT} LOGICAL {position}"))
    else:
        client.send(query(f"START_REPLICATION PHYSICAL {position}"))
    assert client.read().kind == b"W"


@contextmanager
def tool(path: str, gpooler: Gpooler, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A program of PostgreSQL that runs against gpooler; killed at the end, if it has not ended."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
    process = subprocess.Popen(
        [path, "-h", gpooler.host, "-p", str(gpooler.port), "-U", "joe", "-w", *arguments],
        env={**environment, "PGPASSWORD": PASSWORD},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def run(path: str, gpooler: Gpooler, *arguments: str) -> str:
    """What a program says that ends well."""
    with tool(path, gpooler, *arguments) as process:
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said
    return said


# --- what the startup packet says ---------------------------------------------------------------------


def outcome(port: int, value: str) -> str:
    """What becomes of a client that says ``replication=value`` and asks what only a walsender answers."""
    with RawClient(port) as client:
        try:
            client.login("replicator", "app", replication=value)
            found = str(client.query("IDENTIFY_SYSTEM")[0][0])
        except ServerError as error:
            fields = error.fields
            message = re.sub(r"^gpooler: \w+: ", "", fields["M"])
            found = f"{fields['S']} {fields['C']} {message} {fields.get('H')}"
        client.send(TERMINATE)
        client.read_to_end()
        return found


def test_each_spelling_means_what_it_means_to_postgres(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = pooled(gpooler_factory, postgres)
    for value in (*TRUE, *FALSE, *BAD):
        direct = outcome(postgres.port, value)
        assert outcome(gpooler.port, value) == direct, value
        code = {"ERROR": "42601", "FATAL": "22023"}.get(direct.split()[0], "")
        assert code == ("" if value in TRUE else "42601" if value in FALSE else "22023"), (value, direct)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("value", ["true", "database"])
def test_psql_identifies_the_system_in_every_pool(
    postgres: Postgres, gpooler_factory: Factory, program: Program, pool: str, value: str
) -> None:
    gpooler = pooled(gpooler_factory, postgres, pool=pool)
    dsn = f"dbname=app replication={value}"
    said = run(program("psql"), gpooler, "-XAtc", "IDENTIFY_SYSTEM", dsn)
    ((system,),) = postgres.query("SELECT system_identifier FROM pg_control_system()")
    identifier, timeline, _, database = said.strip().split("|")
    assert (identifier, timeline) == (str(system), "1")
    assert database == ("app" if value == "database" else "")
    eventually(lambda: is_at_rest(gpooler))


def test_sql_runs_on_a_logical_connection_and_not_on_a_physical_one(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = pooled(gpooler_factory, postgres)
    with replicating(gpooler) as client:
        assert client.query("SELECT current_user, current_database()") == [["replicator", "app"]]
        client.query("BEGIN")
        client.query("CREATE TEMPORARY TABLE kept (n int)")
        client.query("COMMIT")
        assert client.query("SELECT count(*) FROM kept") == [["0"]]
        with pytest.raises(ServerError, match="22012"):
            client.query("SELECT 1/0")
        assert client.query("SHOW wal_level") == [["logical"]]
        client.terminate()
    with replicating(gpooler, "true") as client:
        with pytest.raises(ServerError) as error:
            client.query("SELECT 1")
        assert error.value.fields["C"] == "0A000"
        assert client.query("SHOW wal_level") == [["logical"]]
        client.terminate()


def test_the_server_is_opened_with_the_clients_parameters_and_the_rules(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = pooled(
        gpooler_factory,
        postgres,
        options={"lock_timeout": "7s"},
        backend_startup_options={"statement_timeout": "9s", "TimeZone": "Asia/Tokyo"},
        maintain_params=False,
    )
    parameters = {"application_name": "standby7", "options": "-c work_mem=5MB", "timezone": "Europe/Berlin"}
    with replicating(gpooler, lock_timeout="3s", **parameters) as client:
        assert client.parameters["application_name"] == "standby7"
        assert client.parameters["TimeZone"] == "Europe/Berlin"
        assert client.query("SHOW work_mem") == [["5MB"]]
        assert client.query("SHOW lock_timeout") == [["7s"]]
        assert client.query("SHOW statement_timeout") == [["9s"]]
    with replicating(gpooler) as client:
        assert client.parameters["application_name"] == ""
        assert client.parameters["TimeZone"] == "Asia/Tokyo"


@pytest.mark.parametrize(
    "parameters", [{"TimeZone": "nonsense"}, {"no_such_thing": "1"}, {"block_size": "1"}], ids=str
)
def test_what_postgres_says_to_the_clients_parameters_is_passed_on(
    postgres: Postgres, gpooler_factory: Factory, parameters: dict[str, str]
) -> None:
    gpooler = pooled(gpooler_factory, postgres)
    through, direct = (
        refusal(port, replication="database", **parameters) for port in (gpooler.port, postgres.port)
    )
    assert (through["S"], through["C"], through["M"]) == (direct["S"], direct["C"], direct["M"])
    eventually(lambda: is_at_rest(gpooler))


def test_what_postgres_says_to_our_login_is_told_to_the_log(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = pooled(gpooler_factory, postgres, storage_user="trust_user")
    fields = refusal(gpooler.port, replication="database")
    assert (fields["S"], fields["C"]) == ("FATAL", "08006")
    eventually(lambda: "must be superuser or replication role to start walsender" in gpooler.log())
    with gpooler.raw().login("joe") as client:  # the rule's other clients have nothing to do with that
        assert client.query("SELECT 1") == [["1"]]


def test_a_wrong_password_and_a_blocked_user_are_refused_as_everywhere(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    rule = {
        "storage": "postgres",
        "storage_db": "app",
        "storage_user": "replicator",
        "pool": "transaction",
        "pool_size": 2,
    }
    users = {
        "anna": {**rule, "authentication": "md5", "password": PASSWORD},
        "bert": {**rule, "authentication": "block"},
    }
    gpooler = gpooler_factory(postgres, config={"database": {"app": {"user": users}}})
    for kind in ("true", "database"):
        with gpooler.raw() as client, pytest.raises(ServerError) as error:
            client.login("anna", password="wrong", replication=kind)
        assert error.value.sqlstate == "28P01"
        with gpooler.raw() as client, pytest.raises(ServerError) as error:
            client.login("bert", replication=kind)
        assert error.value.sqlstate == "28000"
        with gpooler.raw().login("anna", replication=kind) as client:
            assert len(client.query("IDENTIFY_SYSTEM")) == 1
    eventually(lambda: is_at_rest(gpooler))


# --- PostgreSQL's own programs ------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
def test_a_base_backup_with_its_wal_is_complete(
    postgres: Postgres, gpooler_factory: Factory, program: Program, tmp_path: Path, pool: str
) -> None:
    gpooler = pooled(gpooler_factory, postgres, pool=pool, pool_size=2)
    backup = tmp_path / "backup"
    run(program("pg_basebackup"), gpooler, "-D", str(backup), "-X", "stream", "-c", "fast", "--no-sync")
    done = subprocess.run(
        [program("pg_verifybackup"), str(backup)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    eventually(lambda: is_at_rest(gpooler))


def test_a_segment_of_wal_is_received_through_a_slot(
    postgres: Postgres, gpooler_factory: Factory, program: Program, tmp_path: Path
) -> None:
    gpooler = pooled(gpooler_factory, postgres)
    receivewal, options = program("pg_receivewal"), ("-D", str(tmp_path), "--slot", SLOT)
    run(receivewal, gpooler, *options, "--create-slot")
    with tool(receivewal, gpooler, *options, "--no-sync") as process:
        eventually(lambda: len(postgres.walsenders()) == 1, within=20)
        postgres.query("INSERT INTO item SELECT 'x' FROM generate_series(1, 1000)", dbname="app")
        eventually(lambda: list(tmp_path.glob("*.partial")), within=20)
        segment = postgres.query("SELECT pg_walfile_name(pg_current_wal_insert_lsn())")[0][0]
        postgres.query("SELECT pg_switch_wal()")
        eventually(lambda: (tmp_path / segment).exists(), within=20)
        assert (tmp_path / segment).read_bytes() == (postgres.data / "pg_wal" / segment).read_bytes()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    eventually(lambda: is_at_rest(gpooler) and not postgres.walsenders())


def test_changes_are_decoded(
    postgres: Postgres, gpooler_factory: Factory, program: Program, tmp_path: Path
) -> None:
    gpooler = pooled(gpooler_factory, postgres)
    recvlogical, options = program("pg_recvlogical"), ("-d", "app", "--slot", SLOT)
    run(recvlogical, gpooler, *options, "--create-slot", "-P", "test_decoding")
    changes = tmp_path / "changes"
    with tool(recvlogical, gpooler, *options, "--start", "-f", str(changes), "-F", "0") as process:
        eventually(lambda: len(postgres.walsenders()) == 1)
        postgres.query("INSERT INTO item VALUES ('first'), ('second')", dbname="app")
        eventually(lambda: "name[text]:'second'" in changes.read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    run(recvlogical, gpooler, *options, "--drop-slot")
    eventually(lambda: is_at_rest(gpooler))


def test_psycopg2_starts_replication_and_confirms_what_it_got(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = pooled(gpooler_factory, postgres)
    factory = psycopg2.extras.LogicalReplicationConnection
    with closing(psycopg2.connect(gpooler.dsn("joe"), connection_factory=factory)) as connection:
        cursor = connection.cursor()
        cursor.create_replication_slot(SLOT, output_plugin="test_decoding")
        cursor.start_replication(slot_name=SLOT, decode=True)
        postgres.query("INSERT INTO item VALUES ('psycopg2')", dbname="app")
        got: list[str] = []
        while "COMMIT" not in "".join(got):
            message = cursor.read_message()
            if message is None:
                assert select.select([cursor], [], [], 10)[0]
                continue
            got.append(message.payload)
            cursor.send_feedback(flush_lsn=message.data_start, force=True)
        assert any("psycopg2" in text for text in got)
        confirmed = "SELECT confirmed_flush_lsn = %s FROM pg_replication_slots"
        with postgres.connect() as observer:
            position = f"{cursor.wal_end >> 32:X}/{cursor.wal_end & 0xFFFFFFFF:X}"
            cursor.send_feedback(flush_lsn=cursor.wal_end, force=True)
            eventually(lambda: observer.execute(confirmed, (position,)).fetchone() == (True,))
    eventually(lambda: is_at_rest(gpooler) and not postgres.walsenders())


# --- how it ends --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["true", "database"])
def test_a_stream_is_ended_and_the_connection_goes_on(
    postgres: Postgres, gpooler_factory: Factory, kind: str
) -> None:
    gpooler = pooled(gpooler_factory, postgres)
    with replicating(gpooler, kind) as client:
        start_streaming(client, kind)
        client.send(COPY_DONE)
        kinds = [message.kind for message in client.read_until()]
        assert b"c" in kinds
        assert b"E" not in kinds
        assert len(client.query("IDENTIFY_SYSTEM")) == 1
        client.terminate()
    eventually(lambda: is_at_rest(gpooler))


@pytest.mark.parametrize("sql", ["SELECT 1", "RESET ALL"])
def test_a_query_in_a_stream_is_refused_by_postgres(
    postgres: Postgres, gpooler_factory: Factory, sql: str
) -> None:
    """It waits for no ReadyForQuery, which comes at the end of the stream alone."""
    gpooler = pooled(gpooler_factory, postgres)
    with replicating(gpooler) as client:
        start_streaming(client, "database")
        client.send(query(sql))
        fields = client.read_to_end()[-1].fields()
        assert (fields["S"], fields["C"]) == ("FATAL", "08P01")
    eventually(lambda: is_at_rest(gpooler))


@pytest.mark.parametrize("end", ["terminate", "close", "reset", "half_close"])
@pytest.mark.parametrize("kind", ["true", "database"])
def test_the_end_of_a_client_in_a_stream_ends_its_server(
    postgres: Postgres, gpooler_factory: Factory, kind: str, end: str
) -> None:
    gpooler = pooled(gpooler_factory, postgres)
    with replicating(gpooler, kind) as client:
        start_streaming(client, kind)
        assert postgres.walsenders() == [client.pid]
        getattr(client, end)()
        eventually(lambda: not postgres.walsenders() and is_at_rest(gpooler))


@pytest.mark.parametrize("end", ["terminate", "close", "reset"])
def test_the_end_of_an_idle_client_ends_its_server(
    postgres: Postgres, gpooler_factory: Factory, end: str
) -> None:
    gpooler = pooled(gpooler_factory, postgres)
    with replicating(gpooler) as client:
        client.query("BEGIN")
        client.query("SELECT 1")
        getattr(client, end)()
        eventually(lambda: not postgres.walsenders() and is_at_rest(gpooler))


@pytest.mark.parametrize(
    "command",
    ["BASE_BACKUP (CHECKPOINT 'fast')", "SELECT repeat('x', 100000) FROM generate_series(1, 1000000)"],
)
def test_a_client_that_goes_without_reading_leaves_no_server(
    postgres: Postgres, gpooler_factory: Factory, command: str
) -> None:
    gpooler = pooled(gpooler_factory, postgres)
    with replicating(gpooler) as client:
        client.send(query(command))
        client.read()
        client.close()
        eventually(lambda: not postgres.walsenders() and is_at_rest(gpooler))


def test_a_killed_program_leaves_no_server(
    postgres: Postgres, gpooler_factory: Factory, program: Program, tmp_path: Path
) -> None:
    gpooler = pooled(gpooler_factory, postgres, workers=2)
    recvlogical, options = program("pg_recvlogical"), ("-d", "app", "--slot", SLOT)
    run(recvlogical, gpooler, *options, "--create-slot", "-P", "test_decoding")
    with tool(recvlogical, gpooler, *options, "--start", "-f", str(tmp_path / "changes")) as process:
        eventually(lambda: len(postgres.walsenders()) == 1)
        process.kill()
    eventually(lambda: not postgres.walsenders() and is_at_rest(gpooler))


@pytest.mark.parametrize("is_streaming", [False, True])
def test_a_client_is_told_that_its_server_is_lost(
    postgres: Postgres, gpooler_factory: Factory, is_streaming: bool
) -> None:
    gpooler = pooled(gpooler_factory, postgres)
    with replicating(gpooler, "true") as client:
        if is_streaming:
            start_streaming(client, "true")
        postgres.kill(client.pid)
        fields = client.read_to_end()[-1].fields()
        assert (fields["S"], fields["C"]) == ("FATAL", "08006")
    eventually(lambda: is_at_rest(gpooler))


@pytest.mark.parametrize("is_streaming", [False, True])
def test_what_postgres_says_at_the_end_reaches_the_client(
    postgres: Postgres, gpooler_factory: Factory, is_streaming: bool
) -> None:
    gpooler = pooled(gpooler_factory, postgres)
    with replicating(gpooler) as client:
        if is_streaming:
            start_streaming(client, "database")
        postgres.terminate(client.pid)
        errors = [message.fields() for message in client.read_to_end() if message.kind == b"E"]
        assert [(fields["S"], fields["C"]) for fields in errors] == [("FATAL", "57P01")]
        assert "gpooler" not in errors[0]["M"]
    eventually(lambda: is_at_rest(gpooler))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_query_on_a_logical_connection_is_cancelled(
    postgres: Postgres, gpooler_factory: Factory, workers: int
) -> None:
    gpooler = pooled(gpooler_factory, postgres, workers)
    with replicating(gpooler) as client:
        client.send(query("SELECT pg_sleep(60)"))
        sleeping = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        eventually(lambda: postgres.query(sleeping) == [(client.pid,)])
        for _ in range(4):  # to whichever worker takes it
            with gpooler.raw() as other:
                other.send(cancel_request(client.pid, client.key))
                assert other.read_to_end() == []
        with pytest.raises(ServerError, match="57014"):
            client.rows()
        assert len(client.query("IDENTIFY_SYSTEM")) == 1


# --- limits -------------------------------------------------------------------------------------------


def test_a_server_is_never_used_again(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = pooled(gpooler_factory, postgres, pool_size=2, pool="session", pool_reset_timeout_ms=9000)
    pids = set()
    for _ in range(5):
        with replicating(gpooler) as client:
            client.query("SELECT 1")
            pids.add(client.pid)
            client.terminate()
        eventually(lambda: is_at_rest(gpooler))  # or the next one's server takes the place of theirs
        with gpooler.raw().login("joe") as client:
            pids.add(-client.pid)  # the ordinary ones share one
            client.terminate()
    assert len([pid for pid in pids if pid > 0]) == 5
    assert len([pid for pid in pids if pid < 0]) == 1
    eventually(lambda: not postgres.walsenders())
    eventually(lambda: gpooler.log().count("server disconnected: server_client_left") == 5)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("workers", [1, 2])
def test_pool_size_counts_replication_and_other_servers_together(
    postgres: Postgres, gpooler_factory: Factory, pool: str, workers: int
) -> None:
    gpooler = pooled(gpooler_factory, postgres, workers, pool=pool, pool_size=1)
    with gpooler.raw().login("joe") as ordinary:
        assert ordinary.query("SELECT 1") == [["1"]]
        ordinary.terminate()
    with replicating(gpooler, "true") as client:  # for which the parked server had to go
        assert postgres.walsenders() == [client.pid]
        assert not postgres.activity()
        gpooler.reload(rule={"pool_timeout": 500})
        for parameters in ({"replication": "database"}, {"replication": "true"}):
            assert refusal(gpooler.port, **parameters)["C"] == "53300"
        gpooler.reload(rule={"pool_timeout": 0})
        with gpooler.raw() as ordinary:
            ordinary.send(startup("joe", "app"), query("SELECT 2"))
            eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
            assert len(client.query("IDENTIFY_SYSTEM")) == 1
            client.terminate()
            ordinary.read_until()
            assert ordinary.rows() == [["2"]]
    eventually(lambda: is_at_rest(gpooler))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_replication_client_gets_its_slot_from_a_pool_that_never_rests(
    postgres: Postgres, gpooler_factory: Factory, program: Program, workers: int
) -> None:
    gpooler = pooled(gpooler_factory, postgres, workers, pool_size=3, pool_timeout=10_000)
    with Pgbench(program("pgbench"), gpooler, "SELECT 1;", 12, 4) as load:
        eventually(lambda: gpooler.route_count(RouteWord.SERVERS_ACTIVE) == 3)
        with replicating(gpooler, "true") as first, replicating(gpooler, "database") as second:
            assert len(postgres.walsenders()) == 2
            assert len(postgres.activity()) <= 1
            for client in (first, second):
                assert len(client.query("IDENTIFY_SYSTEM")) == 1
                client.terminate()
        assert load.wait() == 0, load.output()
    eventually(lambda: is_at_rest(gpooler))


def test_client_max_counts_replication_and_other_clients_together(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = pooled(gpooler_factory, postgres, workers=2, client_max=2)
    with gpooler.raw().login("joe") as ordinary, replicating(gpooler) as client:
        for parameters in ({"replication": "true"}, {}):
            assert refusal(gpooler.port, **parameters)["C"] == "53300"
        client.terminate()
        eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_ADMITTED) == 1)
        with gpooler.raw().login("joe") as other:
            assert other.query("SELECT 1") == [["1"]]
        ordinary.terminate()
    eventually(lambda: is_at_rest(gpooler))


def test_a_shared_pool_counts_the_replication_servers_of_its_rules(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    rule = {
        "authentication": "none",
        "storage": "postgres",
        "storage_db": "app",
        "storage_user": "replicator",
        "pool": "transaction",
        "shared_pool": "small",
    }
    gpooler = gpooler_factory(
        postgres,
        config={
            "shared_pool": {"small": {"pool_size": 1}},
            "database": {"app": {"user": {"anna": rule, "bert": rule}}},
        },
    )

    def waits_of_anna(pool_timeout: int) -> dict[str, Any]:
        return {"database": {"app": {"user": {"anna": {"pool_timeout": pool_timeout}}}}}

    with gpooler.raw().login("anna") as ordinary:
        assert ordinary.query("SELECT 1") == [["1"]]
        with gpooler.raw().login("bert", replication="database") as client:
            with gpooler.raw().login("anna") as waiter:
                gpooler.reload(config=waits_of_anna(500))
                waiter.send(query("SELECT 2"))
                assert waiter.read_to_end()[-1].fields()["C"] == "53300"
            gpooler.reload(config=waits_of_anna(0))
            client.terminate()
        assert ordinary.query("SELECT 3") == [["3"]]
        ordinary.terminate()
    eventually(lambda: is_at_rest(gpooler))


def test_a_storm_of_clients_never_has_more_servers_than_the_pool(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    size = 4
    gpooler = pooled(gpooler_factory, postgres, workers=2, pool_size=size)

    def come_and_go(number: int) -> int:
        dice = random.Random(number)
        for _ in range(8):
            kind = dice.choice(["true", "database", "false"])
            with replicating(gpooler, kind) as client:
                if kind == "true" and dice.random() < 0.5:
                    start_streaming(client, kind)
                elif kind != "true":
                    client.query("SELECT 1")
                getattr(client, dice.choice(["terminate", "close", "reset"]))()
        return number

    counted = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'replicator'"
    with ThreadPoolExecutor(12) as threads, postgres.connect() as observer:
        clients = [threads.submit(come_and_go, number) for number in range(12)]
        most = 0
        while not all(client.done() for client in clients):
            most = max(most, *observer.execute(counted).fetchone() or (0,))
        assert sorted(client.result() for client in clients) == list(range(12))
    assert 0 < most <= size
    eventually(lambda: is_at_rest(gpooler))


def test_a_client_that_leaves_the_queue_takes_nothing(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = pooled(gpooler_factory, postgres, pool_size=1)
    with replicating(gpooler) as holder:
        for _ in range(3):
            with gpooler.raw() as waiter:
                waiter.send(startup("joe", "app", replication="true"))
                eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 1)
                waiter.close()
            eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 0)
        holder.terminate()
    with replicating(gpooler, "true") as client:
        assert len(client.query("IDENTIFY_SYSTEM")) == 1
    eventually(lambda: is_at_rest(gpooler))


# --- processes ----------------------------------------------------------------------------------------


def test_a_drain_ends_an_idle_client_and_lets_a_stream_come_to_its_end(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = pooled(gpooler_factory, postgres)
    with replicating(gpooler) as idle, replicating(gpooler, "true") as streaming:
        start_streaming(streaming, "true")
        gpooler.signal(signal.SIGTERM)
        fields = idle.read_to_end()[-1].fields()
        assert (fields["S"], fields["C"]) == ("FATAL", "57P01")
        eventually(lambda: postgres.walsenders() == [streaming.pid])
        streaming.send(COPY_DONE)
        streaming.read_until()
        assert streaming.read_to_end()[-1].fields()["C"] == "57P01"
        assert gpooler.stop() == 0


def test_a_stream_that_does_not_end_ends_with_the_process(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(
        postgres,
        rule={"storage_user": "replicator"},
        config={"service": {"graceful_shutdown_timeout_ms": 500}},
    )
    with replicating(gpooler, "true") as streaming:
        start_streaming(streaming, "true")
        assert gpooler.stop() == 124
        eventually(lambda: not postgres.walsenders())


def test_a_dead_workers_replication_servers_are_ended(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = pooled(gpooler_factory, postgres, pool_size=1)
    with replicating(gpooler, "true") as client:
        start_streaming(client, "true")
        (worker,) = gpooler.worker_pids()
        os.kill(worker, signal.SIGKILL)
        eventually(lambda: not postgres.walsenders())
    eventually(lambda: gpooler.worker_pids() not in ([], [worker]))
    eventually(lambda: gpooler.process_count(ProcessWord.LISTENING) == 1)
    with replicating(gpooler) as client:
        assert len(client.query("IDENTIFY_SYSTEM")) == 1


def test_a_new_broker_knows_of_replication_servers(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = pooled(gpooler_factory, postgres, pool_size=1, pool_timeout=2500)
    with replicating(gpooler, "true") as client:
        start_streaming(client, "true")
        broker = gpooler.broker_pid()
        os.kill(broker, signal.SIGKILL)
        eventually(lambda: gpooler.broker_pid() != broker)
        assert refusal(gpooler.port)["C"] == "53300"
        assert refusal(gpooler.port, replication="true")["C"] == "53300"
        client.send(COPY_DONE)
        client.read_until()
        client.terminate()
    with gpooler.raw().login("joe") as ordinary:
        assert ordinary.query("SELECT 1") == [["1"]]


def test_a_replication_server_whose_worker_and_broker_died_is_ended(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = pooled(gpooler_factory, postgres, pool_size=1)
    with replicating(gpooler) as client:
        client.send(query("SELECT pg_sleep(600)"))
        eventually(lambda: postgres.query("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"))
        (worker,), broker = gpooler.worker_pids(), gpooler.broker_pid()
        for pid in (worker, broker):
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not postgres.walsenders())
    eventually(lambda: gpooler.worker_pids() not in ([], [worker]))
    eventually(lambda: gpooler.process_count(ProcessWord.LISTENING) == 1)
    with replicating(gpooler) as client:
        assert len(client.query("IDENTIFY_SYSTEM")) == 1
