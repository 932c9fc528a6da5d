"""One gpooler before the mirrored databases."""

from collections.abc import Callable

import pytest

from tests.differential.stage import POOLED, SERVERS, make_mirrors
from tests.harness import Gpooler, Postgres


@pytest.fixture
def pool(postgres: Postgres, gpooler_factory: Callable[..., Gpooler]) -> Gpooler:
    """A transaction pool of a few servers over two workers."""
    make_mirrors(postgres)
    return gpooler_factory(
        postgres,
        rule={"pool_size": SERVERS, "storage_db": POOLED},
        config={"performance": {"workers": 2}},
    )
