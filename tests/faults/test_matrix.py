"""Every fault at every moment: afterwards nothing is lost, nothing is left, and all goes on."""

from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.faults.stage import POOL_SIZE, Fault, Stage, State
from tests.harness import Gpooler, Postgres
from tests.harness.faults import Faults


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("state", State)
def test_all_is_as_before_after(
    state: State, fault: Fault, postgres: Postgres, gpooler_factory: Callable[..., Gpooler]
) -> None:
    with Faults() as faults, ExitStack() as stack:
        gpooler = gpooler_factory(
            postgres,
            rule={"pool_size": POOL_SIZE, "pool_timeout": 30_000, "pool_reset_timeout_ms": 30_000},
            config={"performance": {"workers": 2}, "limits": {"cancel_timeout_ms": 20_000}},
            environment=faults.environment,
        )
        stage = Stage(postgres, gpooler, faults, stack, state, fault)
        try:
            stage.enter()
            stage.strike()
            stage.check_clients()
            stage.check_numbers()
        except BaseException:
            print(gpooler.tail())
            raise
