"""What a route makes of the options of its rule that depend on each other."""

import pytest

from gpooler.config.load import load_text
from gpooler.routing.route import DISCARD_ALL, SMART_DISCARD, Route, endpoint_of, key_of
from tests.unit.test_rules import BODY, HEAD


def route(**options: str) -> Route:
    """The route of a rule with these options, as TOML."""
    lines = "".join(f"{name} = {value}\n" for name, value in {"pool": "'session'", **options}.items())
    body = BODY.replace('pool = "session"\n', "")
    config = load_text(f"{HEAD}[database.default.user.default]\n{body}{lines}").config
    (rule,) = config.rules
    key = key_of(rule, "app", "app", is_replication=False)
    return Route(0, key, rule, "app", "app", endpoint_of(config, rule), (), admission_id=0)


@pytest.mark.parametrize(
    ("discard", "alone", "beside"), [(None, None, None), ("true", True, True), ("false", False, None)]
)
def test_pool_discard_says_when_and_no_means_no_discard_all(
    discard: str | None, alone: bool | None, beside: bool | None
) -> None:
    options = {} if discard is None else {"pool_discard": discard}
    assert route(**options).is_discarded is alone
    assert route(**options).discard_query == DISCARD_ALL
    other = route(**options, pool_discard_query="'UNLISTEN *'")
    assert other.is_discarded is beside
    assert other.discard_query == "UNLISTEN *"


def test_smart_discard_is_discard_all_without_plans_and_statements() -> None:
    smart = route()
    smart.rule = smart.rule.model_copy(update={"pool_smart_discard": True})
    assert smart.discard_query == SMART_DISCARD
    assert not {"DEALLOCATE ALL", "DISCARD PLANS", "DISCARD ALL"} & set(SMART_DISCARD.split(";"))
    smart.rule = smart.rule.model_copy(update={"pool_discard_query": "UNLISTEN *"})
    assert smart.discard_query == "UNLISTEN *"


@pytest.mark.parametrize(
    ("pool", "any_pool", "session_pool", "limit", "is_the_pools"),
    [
        ("session", 0, 0, 0, False),
        ("session", 5, 0, 5, False),
        ("session", 0, 5, 5, True),
        ("session", 9, 5, 5, True),
        ("session", 5, 9, 5, False),
        ("transaction", 0, 5, 0, False),
        ("transaction", 9, 5, 9, False),
    ],
)
def test_the_shorter_idle_limit_counts(
    pool: str, any_pool: int, session_pool: int, limit: int, is_the_pools: bool
) -> None:
    found = route(
        pool=f"'{pool}'", client_idle_timeout=f"{any_pool}", pool_client_idle_timeout=f"{session_pool}"
    )
    assert (found.idle_timeout_s, found.is_idle_limit_the_pools) == (limit, is_the_pools)


def test_a_password_learned_again_keeps_what_was_derived_from_it() -> None:
    made = route()
    made.learn_password(b"one")
    first = made.password
    made.learn_password(b"one")
    assert made.password is first
    made.learn_password(b"two")
    assert made.password is not None
    assert made.password.plain == b"two"
