"""What all tests share: the options of the run, skips that CI does not accept, and the real parts."""

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.harness import FaultProxy, Gpooler, Postgres, Unavailable, eventually, find_program

# How fast a machine makes examples up is no property of gpooler.
settings.register_profile("gpooler", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gpooler")

REQUIRE_ALL = os.environ.get("GPOOLER_REQUIRE_ALL", "0") not in ("", "0")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the long tests too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    long = [item for item in items if item.get_closest_marker("full")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, and GPOOLER_REQUIRE_ALL is set: {call.excinfo and call.excinfo.value}"
    return report


def _cluster(version: int) -> Iterator[Postgres]:
    try:
        cluster = Postgres(version)
    except Unavailable as error:
        pytest.skip(str(error))
    with cluster:
        yield cluster


@pytest.fixture(scope="session")
def _postgres15() -> Iterator[Postgres]:
    yield from _cluster(15)


@pytest.fixture(scope="session")
def _postgres18() -> Iterator[Postgres]:
    yield from _cluster(18)


def _left_clean(cluster: Postgres) -> Iterator[Postgres]:
    yield cluster
    if cluster.is_running:
        eventually(lambda: not cluster.activity())
    else:
        cluster.start()


@pytest.fixture
def postgres(_postgres15: Postgres) -> Iterator[Postgres]:
    """PostgreSQL 15, shared by the tests of the session, which leave no connection behind."""
    yield from _left_clean(_postgres15)


@pytest.fixture
def postgres18(_postgres18: Postgres) -> Iterator[Postgres]:
    """PostgreSQL 18, likewise."""
    yield from _left_clean(_postgres18)


@pytest.fixture(params=[15, 18], ids=["pg15", "pg18"])
def any_postgres(request: pytest.FixtureRequest) -> Postgres:
    """Each version in turn."""
    cluster: Postgres = request.getfixturevalue("postgres" if request.param == 15 else "postgres18")
    return cluster


@pytest.fixture
def gpooler_factory(request: pytest.FixtureRequest) -> Iterator[Callable[..., Gpooler]]:
    """Makes running gpoolers: ``gpooler_factory(postgres, rule={...}, config={...})``.

    At the end of the test each that still runs must have no client, no growth of descriptors and no traceback
    in its log, its servers must be as new (see Gpooler.dirt), it must stop cleanly and leave no process.
    """
    running: list[Gpooler] = []
    with ExitStack() as stack:

        def make(*arguments: Any, **options: Any) -> Gpooler:
            gpooler = Gpooler(*arguments, **options)
            stack.callback(gpooler.destroy)
            running.append(gpooler.start())
            return gpooler

        yield make
        problems = []
        for gpooler in running:
            if gpooler.is_running:
                found = gpooler.leaks() + gpooler.dirt()
                problems += [f"{problem}\n{gpooler.tail()}" for problem in found]
                gpooler.stop()
        assert not problems, "\n".join(problems)


@pytest.fixture
def fault_proxy() -> Iterator[Callable[[int], FaultProxy]]:
    """Makes proxies in front of a port of this machine: ``fault_proxy(postgres.port)``."""
    with ExitStack() as stack:
        yield lambda port: stack.enter_context(FaultProxy(port))


@pytest.fixture
def program() -> Callable[[str], str]:
    """Finds a program of the machine, or skips the test."""

    def find(name: str) -> str:
        try:
            return find_program(name)
        except Unavailable as error:
            pytest.skip(str(error))

    return find
