"""gpooler before the mirrored databases."""

from collections.abc import Callable

import pytest

from tests.differential.stage import POOLED, SERVERS, make_mirrors
from tests.harness import Gpooler, Postgres

MakePool = Callable[[int, int], Gpooler]


@pytest.fixture
def make_pool(postgres: Postgres, gpooler_factory: Callable[..., Gpooler]) -> MakePool:
    """Makes transaction pools of so many servers over so many workers."""
    make_mirrors(postgres)

    def make(servers: int, workers: int) -> Gpooler:
        rule = {"pool_size": servers, "storage_db": POOLED}
        config = {"performance": {"workers": workers}, "routing": {"virtual_transaction": True}}
        gpooler = gpooler_factory(postgres, rule=rule, config=config)
        gpooler.used_database = POOLED
        return gpooler

    return make


@pytest.fixture
def pool(make_pool: MakePool) -> Gpooler:
    """A pool of a few servers over two workers."""
    return make_pool(SERVERS, 2)
