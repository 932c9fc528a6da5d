"""The quantiles in SHOW POOLS_EXTENDED: which there are, and that they follow what clients do."""

import os
import signal
from collections.abc import Callable
from typing import Any, Final

from tests.harness import Gpooler, Postgres, eventually
from tests.harness.console import CONSOLE, Console, console
from tests.harness.gpooler import merge

Factory = Callable[..., Gpooler]

RULE: Final = {
    "authentication": "none",
    "storage": "postgres",
    "storage_db": "app",
    "storage_user": "trust_user",
    "pool": "transaction",
}


def pool_of(postgres: Postgres, gpooler_factory: Factory, quantiles: list[float]) -> Gpooler:
    """One whose database ``app`` is measured, and ``other`` is not."""
    config = merge(
        CONSOLE,
        {"logging": {"stats_interval": 1}, "database": {"other": {"user": {"default": RULE}}}},
    )
    return gpooler_factory(postgres, config=config, rule={"quantiles": quantiles})


def measured(control: Console, *, is_whole: bool = True) -> dict[str, dict[str, Any]]:
    """The columns of quantiles by database."""
    return {
        row["database"]: {
            name: value for name, value in row.items() if name.startswith(("query_", "transaction_"))
        }
        for row in control.show("POOLS_EXTENDED", is_whole=is_whole)
    }


def test_quantiles_follow_slow_queries_and_forget_them(postgres: Postgres, gpooler_factory: Factory) -> None:
    pool = pool_of(postgres, gpooler_factory, [0.5, 0.99])
    names = ["query_0.5", "transaction_0.5", "query_0.99", "transaction_0.99"]
    with pool.connect() as client, pool.connect(dbname="other") as other, console(pool) as control:
        other.execute("SELECT 1")

        def asked_while(text: str) -> dict[str, dict[str, Any]]:
            for each in (client, other):
                each.execute(text)
            found = measured(control)
            assert all(list(columns) == names for columns in found.values())
            assert set(found["other"].values()) == {0}
            return found

        # only quick ones, then slow ones as well: the greatest moves
        eventually(lambda: 0 < asked_while("SELECT 1")["app"]["query_0.99"], within=20)

        def is_slow() -> bool:
            found = asked_while("SELECT pg_sleep(0.2)")
            slow = found["app"]
            return (
                slow["query_0.99"] >= 131_072  # the bucket that 0.2 s lie in begins there
                and slow["transaction_0.99"] >= 131_072
                and found["aggregated"]["query_0.99"] == slow["query_0.99"]
            )

        eventually(is_slow, within=20)
        # nothing was asked for two intervals
        eventually(lambda: set(measured(control)["app"].values()) == {0}, within=20)


def test_a_reload_brings_other_columns(postgres: Postgres, gpooler_factory: Factory) -> None:
    pool = pool_of(postgres, gpooler_factory, [])
    with pool.connect() as client, console(pool) as control:
        client.execute("SELECT 1")
        assert measured(control)["app"] == {}
        pool.reload(rule={"quantiles": [0.95]})

        def is_measured() -> bool:
            client.execute("SELECT 1")
            found = measured(control)["app"]
            return list(found) == ["query_0.95", "transaction_0.95"] and all(found.values())

        eventually(is_measured, within=20)
        # by the extended protocol and in binary, and as conditions
        with control.connection.cursor(binary=True) as cursor:
            cursor.execute('SHOW POOLS_EXTENDED WHERE database = %s AND "query_0.95" >= 0', ["app"])
            assert len(cursor.fetchall()) == 1
        # what the console's own rule asks for is there, too
        pool.reload(config={"database": {"pgbouncer": {"user": {"admin": {"quantiles": [1]}}}}})
        assert list(measured(control)["app"])[-2:] == ["query_1", "transaction_1"]


def test_without_the_broker_they_are_0(postgres: Postgres, gpooler_factory: Factory) -> None:
    pool = pool_of(postgres, gpooler_factory, [0.5])
    with pool.connect() as client, console(pool) as control:
        client.execute("SELECT 1")
        broker = pool.broker_pid()
        os.kill(broker, signal.SIGSTOP)
        try:
            assert set(measured(control, is_whole=False)["app"].values()) == {0}
            assert control.notices == ["the broker did not answer: averages are 0"]
        finally:
            os.kill(broker, signal.SIGCONT)
