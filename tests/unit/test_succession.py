"""What comes into force behind another configuration, without a restart."""

from gpooler.config.load import load_text
from gpooler.config.model import Config, Rule
from gpooler.config.succession import base_name, renew_servers, succeed

HEAD = """
[logging]
log_format = "%m"
[[listen]]
host = "127.0.0.1"
port = {port}
client_login_timeout = {timeout}
[storage.one]
type = "remote"
host = "{host}"
[performance]
workers = {workers}
[service]
max_sigterms_to_die = {terms}
[routing]
virtual_transaction = {virtual}
"""
RULE = '[database.app.user.{user}]\nauthentication = "none"\nstorage = "one"\npool = "{pool}"\n{more}\n'


def config(*users: str, pool: str = "transaction", more: str = "", **head: object) -> Config:
    values = {
        "port": 6432, "timeout": 1000, "host": "h", "workers": 1, "terms": 3, "virtual": "false", **head
    }  # fmt: skip
    rules = (RULE.format(user=user, pool=pool, more=more) for user in users or ("joe",))
    return load_text(HEAD.format(**values) + "".join(rules)).config


def only(config: Config) -> Rule:
    (rule,) = config.rules
    return rule


def test_nothing_new_is_nothing_new() -> None:
    before = config("joe", "jim")
    assert succeed(before, config("joe", "jim")) == before


def test_what_needs_a_restart_stays() -> None:
    now = succeed(config(), config(workers=7, terms=9, port=6433, timeout=5))
    assert now.performance.workers == 1
    assert now.service.max_sigterms_to_die == 9


def test_listeners_keep_their_numbers_and_no_number_is_used_again() -> None:
    (listen,) = succeed(config(), config(timeout=5)).listen
    assert (listen.number, listen.client_login_timeout) == (0, 5)
    other = succeed(config(), config(port=6433))
    assert [listen.number for listen in other.listen] == [1]
    assert [listen.number for listen in succeed(other, config()).listen] == [2]


def test_a_limit_changes_the_rule_and_nothing_else() -> None:
    rule = only(succeed(config(), config(more="pool_size = 7")))
    assert (rule.name, rule.pool_size, rule.epoch) == ("app.joe", 7, 0)


def test_servers_of_another_place_or_user_have_another_epoch() -> None:
    before = config()
    for after in (
        config(host="other"),
        config(more='storage_user = "x"'),
        config(more='storage_password = "x"'),
        config(more='password = "x"'),
    ):
        assert only(succeed(before, after)).epoch == 1
    once = succeed(before, config(host="other"))
    assert only(succeed(once, config(host="other"))).epoch == 1
    assert only(succeed(once, config())).epoch == 2


def test_another_kind_of_pool_is_another_rule_beside_the_old_one() -> None:
    first = config()
    second = succeed(first, config(pool="session", more="pool_size = 7"))
    assert only(second).name == "app.joe#2"
    assert base_name(only(second)) == "app.joe"
    (retired,) = second.retired
    assert (retired.name, retired.pool, retired.pool_size) == ("app.joe", "transaction", 7)
    third = succeed(second, config(pool="statement", more='storage_user = "x"'))
    assert only(third).name == "app.joe#3"
    assert {rule.name: (rule.pool, rule.epoch) for rule in third.retired} == {
        "app.joe": ("transaction", 1),
        "app.joe#2": ("session", 1),
    }
    back = succeed(third, config())
    assert only(back).name == "app.joe"
    assert {rule.name for rule in back.retired} == {"app.joe#2", "app.joe#3"}


def test_what_all_sessions_rest_on_makes_every_rule_another() -> None:
    now = succeed(config("joe", "jim"), config("joe", "jim", virtual="true"))
    assert [rule.name for rule in now.rules] == ["app.joe#2", "app.jim#2"]
    assert [rule.name for rule in now.retired] == ["app.joe", "app.jim"]


def test_a_removed_rule_is_remembered_with_its_storage_until_it_comes_again() -> None:
    before = succeed(config("joe", "jim"), config("joe", "jim", pool="session"))
    after = succeed(before, config("jim", pool="session"))
    assert [rule.name for rule in after.removed] == ["app.joe#2", "app.joe"]
    assert "one" in after.storage
    again = succeed(after, config("joe", "jim", pool="session"))
    assert [rule.name for rule in again.rules] == ["app.joe#2", "app.jim#2"]
    assert again.removed == ()


def test_servers_are_renewed_by_name() -> None:
    before = succeed(config("joe", "jim"), config("joe", "jim", pool="session"))
    now = renew_servers(before, lambda rule: rule.user == "joe")
    assert [rule.epoch for rule in now.rules] == [1, 0]
    assert [rule.epoch for rule in now.retired] == [1, 0]
