"""Another configuration while everything runs: what takes effect when, for whom, and what never breaks."""

import os
import signal
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from gpooler.process.admin import address_of
from gpooler.stats.registry import RouteWord
from tests.harness import PASSWORD, Gpooler, Postgres, eventually, free_port
from tests.harness.certificates import Certificates
from tests.harness.client import RawClient, message, startup, text

Factory = Callable[..., Gpooler]
PID = "SELECT pg_backend_pid()"


def pid_of(connection: psycopg.Connection) -> int:
    row = connection.execute(PID).fetchone()
    assert row is not None
    return int(row[0])


def last_words(client: RawClient) -> str:
    """The SQLSTATE of what a client is told before it is sent away."""
    return client.read_to_end()[-1].fields()["C"]


# --- what is said -----------------------------------------------------------------------------


def test_the_answer_says_what_changed_and_whom_it_touches(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres)
    assert gpooler.reload() == "nothing has changed\n"
    answer = gpooler.reload(
        rule={"pool_size": 5, "pool": "session", "storage_password": "other", "password": "new"},
        config={"performance": {"workers": 2}, "limits": {"client_max": 100}},
    )
    assert answer.splitlines() == [
        "performance.workers: 1 → 2: needs a restart; the old value stays until then",
        "limits.client_max: unset → 100: now",
        "database.default.default.password: changed: for new logins; who is connected goes on; "
        "its servers are replaced as they become free",
        "database.default.default.storage_password: changed: its servers are replaced as they become free",
        'database.default.default.pool: "transaction" → "session": '
        "for new clients; who is connected keeps the old",
        "database.default.default.pool_size: 20 → 5: now; servers beyond it are closed as they become free",
    ]
    assert "other" not in gpooler.log()
    assert "limits.client_max: unset → 100: now" in gpooler.log()


def test_a_dry_run_says_the_same_and_changes_nothing(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    answer = gpooler.reload("--dry-run", rule={"pool_size": 2})
    assert answer == "database.default.default.pool_size: 1 → 2: now\n"
    assert gpooler.reload("--dry-run") == answer
    assert gpooler.reload() == answer
    assert gpooler.reload("--dry-run") == "nothing would change\n"


def test_a_broken_configuration_changes_nothing_and_every_mistake_is_told(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres)
    with gpooler.connect() as connection:
        before = pid_of(connection)
        answer = gpooler.reload(rule={"pool_sise": 3, "pool": "sometimes"}, is_refused=True)
        assert "pool_sise" in answer
        assert "pool: must be one of" in answer
        assert answer.count("error: ") == 2
        assert "all stays as it was" in gpooler.log()
        assert pid_of(connection) == before


def test_what_a_worker_cannot_use_changes_nothing_anywhere(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    change = {"authentication": "clear_text", "auth_module": "no_such_module:check", "pool_size": 7}
    answer = gpooler.reload(rule=change, is_refused=True)
    assert 'auth_module "no_such_module:check" cannot be loaded' in answer
    with gpooler.connect() as connection:
        assert pid_of(connection)
    assert "pool_size: 1 → 7" in gpooler.reload(rule={"authentication": "none", "auth_module": None})


def test_sighup_reloads_and_many_do_no_harm(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, config={"performance": {"workers": 2}})
    for _ in range(20):
        gpooler.signal(signal.SIGHUP)
    gpooler.reload(rule={"pool_size": 3})
    eventually(lambda: "pool_size: 20 → 3: now" in gpooler.log())
    with gpooler.connect() as connection:
        assert pid_of(connection)


def test_only_root_and_the_owner_are_heard(postgres: Postgres, gpooler_factory: Factory) -> None:
    """The socket is abstract: anybody could connect."""
    gpooler = gpooler_factory(postgres)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(address_of(gpooler.pid))
        sock.send(b"nonsense")
        assert sock.recv(100) == b""
    assert gpooler.reload() == "nothing has changed\n"


# --- limits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_larger_pool_serves_who_waits_and_a_smaller_one_shrinks_as_servers_become_free(
    postgres: Postgres, gpooler_factory: Factory, workers: int
) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 2}, config={"performance": {"workers": workers}})
    connections = [gpooler.connect() for _ in range(4)]
    for connection in connections[:2]:
        connection.execute("BEGIN")
    done: list[int] = []
    waiting = [
        threading.Thread(target=lambda c=connection: done.append(c.execute("BEGIN") is not None))
        for connection in connections[2:]
    ]
    for thread in waiting:
        thread.start()
    eventually(lambda: gpooler.route_count(RouteWord.CLIENTS_WAITING) == 2)
    gpooler.reload(rule={"pool_size": 4})
    for thread in waiting:
        thread.join(10)
    assert len(done) == 2
    connections[3].execute("COMMIT")
    gpooler.reload(rule={"pool_size": 1})
    eventually(lambda: len(postgres.activity()) == 3)  # the parked one is closed, three are in use
    for connection in connections[:3]:
        assert connection.execute("SELECT 1").fetchone() == (1,)
        connection.execute("COMMIT")
    eventually(lambda: len(postgres.activity()) == 1)
    for connection in connections:
        assert pid_of(connection) == postgres.activity()[0].pid
        connection.close()


def test_min_pool_size_follows(postgres: Postgres, gpooler_factory: Factory) -> None:
    rule = {"storage": "postgres", "authentication": "none", "storage_user": "trust_user", "pool_ttl": 1}
    app = {"app": {"user": {"trust_user": {**rule, "pool": "transaction", "min_pool_size": 0}}}}
    gpooler = gpooler_factory(postgres, config={"database": app})
    for size in (2, 0):
        app["app"]["user"]["trust_user"]["min_pool_size"] = size
        gpooler.reload(config={"database": app})
        eventually(lambda size=size: len(postgres.activity()) == size)


def test_timeouts_act_on_who_is_connected(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres)
    with gpooler.raw() as client:
        client.login()
        client.query("SELECT 1")
        gpooler.reload(rule={"client_idle_timeout": 1})
        assert last_words(client) == "57P05"


# --- servers ----------------------------------------------------------------------------------


def test_servers_of_another_user_are_opened_and_the_old_ones_finish(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, config={"performance": {"workers": 2}})
    with gpooler.connect() as busy, gpooler.connect() as idle:
        assert idle.execute("SELECT current_user").fetchone() == ("trust_user",)
        busy.execute("BEGIN")
        gpooler.reload(rule={"storage_user": "scram_user", "storage_password": PASSWORD})
        assert idle.execute("SELECT current_user").fetchone() == ("scram_user",)
        assert busy.execute("SELECT current_user").fetchone() == ("trust_user",)
        busy.execute("COMMIT")
        assert busy.execute("SELECT current_user").fetchone() == ("scram_user",)
        with gpooler.connect() as new:
            assert new.execute("SELECT current_user").fetchone() == ("scram_user",)
        eventually(lambda: {row.usename for row in postgres.activity()} == {"scram_user"})


def test_a_pool_is_one_over_old_and_new_clients(postgres: Postgres, gpooler_factory: Factory) -> None:
    """Who came before and who came after the change of the user share the limit."""
    gpooler = gpooler_factory(postgres, rule={"pool_size": 1})
    with gpooler.connect() as old:
        old.execute("SELECT 1")
        gpooler.reload(rule={"storage_user": "scram_user", "storage_password": PASSWORD})
        with gpooler.connect() as new:
            new.execute("BEGIN")
            gpooler.reload(rule={"pool_timeout": 500})
            with pytest.raises(psycopg.Error) as told:
                old.execute("SELECT 1")
            assert told.value.sqlstate == "53300"


def test_clients_go_to_another_storage(postgres: Postgres, gpooler_factory: Factory) -> None:
    """The first one is not even there."""
    gpooler = gpooler_factory(postgres, config={"storage": {"postgres": {"port": 1}}})
    with pytest.raises(psycopg.OperationalError):
        gpooler.connect()
    gpooler.reload(config={"storage": {"postgres": {"port": postgres.port}}})
    with gpooler.connect() as connection:
        assert pid_of(connection)


# --- kinds of pools -----------------------------------------------------------------------------


def test_who_is_connected_keeps_its_kind_of_pool(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool": "session", "pool_size": 5})
    with gpooler.connect() as old:
        server = pid_of(old)
        old.execute("SET work_mem = '5MB'")
        gpooler.reload(rule={"pool": "transaction"})
        with gpooler.connect() as one, gpooler.connect() as other:
            assert pid_of(one) == pid_of(other) != server
            assert pid_of(old) == server
            assert old.execute("SHOW work_mem").fetchone() == ("5MB",)
            gpooler.reload(rule={"pool": "session"})
            assert pid_of(one) == pid_of(other)
        with gpooler.connect() as new:
            new.execute("SELECT 1")
            canceller = threading.Timer(0.2, new.cancel)
            canceller.start()
            with pytest.raises(psycopg.errors.QueryCanceled):
                new.execute("SELECT pg_sleep(30)")
            canceller.join()
            assert pid_of(old) == server


# --- rules ------------------------------------------------------------------------------------


def test_clients_of_a_removed_rule_are_sent_away_between_transactions(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    rule = {"authentication": "none", "storage": "postgres", "pool": "transaction"}
    config = {"database": {"app": {"user": {"trust_user": rule}}}}
    gpooler = gpooler_factory(postgres, config=config)
    with gpooler.raw() as idle, gpooler.raw() as busy, gpooler.raw() as other:
        idle.login()
        busy.login().query("BEGIN")
        other.login("scram_user")
        answer = gpooler.reload(config={"database": {"app": None}})
        assert "database.app.trust_user: removed: its clients get 57P01 between transactions" in answer
        assert last_words(idle) == "57P01"
        assert busy.query("SELECT 1") == [["1"]]
        busy.query("COMMIT")
        assert last_words(busy) == "57P01"
        assert other.query("SELECT 1") == [["1"]]
    with gpooler.connect() as again:  # another rule takes it now
        assert pid_of(again)
    gpooler.reload(config=config)
    with gpooler.connect() as again:
        assert pid_of(again)


def test_a_new_password_is_for_new_logins(postgres: Postgres, gpooler_factory: Factory) -> None:
    rule = {"authentication": "scram-sha-256", "password": "old", "storage_password": PASSWORD}
    gpooler = gpooler_factory(postgres, rule=rule)
    with gpooler.connect(password="old") as connection:
        gpooler.reload(rule={"password": "new"})
        assert pid_of(connection)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        gpooler.connect(password="old")
    gpooler.connect(password="new").close()
    gpooler.reload(rule={"authentication": "block"})
    with pytest.raises(psycopg.OperationalError):
        gpooler.connect(password="new")


def test_a_login_under_way_goes_by_the_rule_that_is_in_force_at_its_end(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    rule = {"authentication": "clear_text", "password": PASSWORD, "storage_user": "trust_user"}
    config = {"database": {"app": {"user": {"anna": {**rule, "storage": "postgres", "pool": "session"}}}}}
    gpooler = gpooler_factory(postgres, config=config)
    with gpooler.raw() as kept, gpooler.raw() as sent_away:
        for client in (kept, sent_away):
            client.send(startup("anna", "app"))
            client.read_until(b"R")
        config["database"]["app"]["user"]["anna"]["storage_user"] = "scram_user"
        config["database"]["app"]["user"]["anna"]["storage_password"] = PASSWORD
        gpooler.reload(config=config)
        kept.send(message(b"p", text(PASSWORD)))
        kept.read_until(b"Z")
        assert kept.query("SELECT current_user") == [["scram_user"]]
        gpooler.reload(config={"database": {"app": None}})
        sent_away.send(message(b"p", text(PASSWORD)))
        assert last_words(sent_away) == "57P01"


def test_other_host_based_rules(postgres: Postgres, gpooler_factory: Factory, tmp_path: Path) -> None:
    hba = tmp_path / "hba.conf"
    hba.write_text("host all all all trust\n")
    gpooler = gpooler_factory(postgres, config={"routing": {"hba_file": str(hba)}})
    with gpooler.connect() as connection:
        hba.write_text("host all all all reject\n")
        assert "its lines changed" in gpooler.reload()
        assert pid_of(connection)
    with pytest.raises(psycopg.OperationalError):
        gpooler.connect()


# --- the rest ---------------------------------------------------------------------------------


def test_the_log_goes_elsewhere(postgres: Postgres, gpooler_factory: Factory, tmp_path: Path) -> None:
    file = tmp_path / "log"
    gpooler = gpooler_factory(postgres)
    gpooler.reload(config={"logging": {"log_file": str(file), "log_to_stdout": False, "log_debug": True}})
    gpooler.connect().close()
    eventually(lambda: "client disconnected" in file.read_text())
    assert "startup packet" in file.read_text()
    assert "client disconnected" not in gpooler.log()


def test_certificates_are_read_again_also_under_other_paths(
    postgres: Postgres, gpooler_factory: Factory, tmp_path: Path
) -> None:
    first, second = (Certificates(make_directory(tmp_path / name)) for name in ("first", "second"))
    gpooler = gpooler_factory(postgres, listener=first.options("server", "require"))

    def shown() -> bytes:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with gpooler.raw() as client:
            client.start_tls(context)
            client.login()
            assert isinstance(client.socket, ssl.SSLSocket)
            return client.socket.getpeercert(binary_form=True) or b""

    with gpooler.connect(sslmode="require") as connection:
        before = shown()
        gpooler.reload(listener=second.options("server", "require"))
        other_path = shown()
        for suffix in ("pem", "key"):
            (tmp_path / f"second/server.{suffix}").write_bytes(
                (tmp_path / f"second/rsa.{suffix}").read_bytes()
            )
        gpooler.reload()
        same_path = shown()
        assert len({before, other_path, same_path}) == 3
        (tmp_path / "second/server.key").write_text("nonsense")
        assert "tls_key_file" in gpooler.reload(is_refused=True)
        assert shown() == same_path
        assert pid_of(connection)


def test_listeners_come_and_go(postgres: Postgres, gpooler_factory: Factory, tmp_path: Path) -> None:
    directory = {"service": {"unix_socket_dir": str(tmp_path), "unix_socket_mode": "0777"}}
    gpooler = gpooler_factory(postgres, config={"performance": {"workers": 2}, **directory})
    first, other = {"host": "127.0.0.1", "port": gpooler.port}, {"host": "127.0.0.1", "port": free_port()}
    with gpooler.connect() as connection:
        answer = gpooler.reload(config={"listen": [first, other, {"port": 6432}]})
        assert f"listen 127.0.0.1:{other['port']}: added: now" in answer
        gpooler.connect(port=other["port"]).close()
        gpooler.connect(host=str(tmp_path), port=6432).close()
        gpooler.reload(config={"listen": [other]})
        assert not list(tmp_path.iterdir())
        with pytest.raises(psycopg.OperationalError, match="refused"):
            gpooler.connect()
        assert pid_of(connection)
        for pid in gpooler.worker_pids():
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: len(gpooler.worker_pids()) == 2)
        gpooler.connect(port=other["port"]).close()
        with socket.create_server(("127.0.0.1", free_port())) as taken:
            stranger = {"host": "127.0.0.1", "port": taken.getsockname()[1]}
            answer = gpooler.reload(config={"listen": [other, stranger]}, is_refused=True)
            assert "could not listen on" in answer
        gpooler.reload(config={"listen": [first, other]})
    gpooler.connect().close()


def make_directory(path: Path) -> Path:
    path.mkdir()
    return path


def test_whoever_is_forked_later_begins_with_the_new_one(
    postgres: Postgres, gpooler_factory: Factory
) -> None:
    gpooler = gpooler_factory(postgres, config={"performance": {"workers": 2}})
    gpooler.reload(rule={"storage_user": "scram_user", "storage_password": PASSWORD, "pool_size": 1})
    for pid in [*gpooler.worker_pids(), gpooler.broker_pid()]:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: len(gpooler.worker_pids()) == 2)

    def user() -> str:
        with gpooler.connect() as connection:
            row = connection.execute("SELECT current_user").fetchone()
            return str(row and row[0])

    eventually(lambda: user() == "scram_user", within=20)


def test_reloads_under_load_harm_nobody(postgres: Postgres, gpooler_factory: Factory) -> None:
    gpooler = gpooler_factory(postgres, rule={"pool_size": 4}, config={"performance": {"workers": 2}})
    stop = threading.Event()
    faults: list[BaseException] = []
    counts: list[int] = []

    def work() -> None:
        count = 0
        try:
            with gpooler.connect() as connection:
                while not stop.is_set():
                    with connection.transaction():
                        connection.execute("SELECT 1")
                    count += 1
        except BaseException as error:  # noqa: BLE001
            faults.append(error)
        counts.append(count)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(20):
            user = "scram_user" if turn % 2 else "trust_user"
            gpooler.reload(
                rule={"pool_size": 1 + turn % 4, "storage_user": user, "storage_password": PASSWORD}
            )
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not faults
    assert min(counts) > 0
