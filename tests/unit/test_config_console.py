"""Rules and storages of the console."""

import pytest

from gpooler.config.load import ConfigError, load_text
from gpooler.config.model import Role

HEAD = """
[logging]
log_format = "%m"
[[listen]]
host = "127.0.0.1"
[storage.db]
type = "remote"
host = "db.example"
[storage.console]
type = "local"
[database.app.user.default]
authentication = "none"
storage = "db"
pool = "transaction"
[database.pgbouncer.user.admin]
authentication = "none"
storage = "console"
pool = "session"
"""


def test_a_rule_of_the_console_has_a_role_and_no_servers() -> None:
    loaded = load_text(HEAD + 'role = "admin"\n')
    assert loaded.warnings == ()
    assert loaded.config.storage["console"].endpoints == ()
    assert loaded.config.rules[1].role is Role.ADMIN


def test_a_rule_without_a_role_is_warned_about() -> None:
    (warning,) = load_text(HEAD).warnings
    assert warning.key == "database.pgbouncer.user.admin.role"
    assert "its clients may SHOW and nothing else" in warning.text


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ("pool_size = 3", "pool_size: has no place where the storage is local"),
        ('storage_user = "x"', "storage_user: has no place where the storage is local"),
        ("client_max = 3", "client_max: does not count clients of the console"),
        ('pool_routing = "internal"', 'pool_routing: "internal" has no place where the storage is local'),
        ('role = "client"', "role: "),
        ('[storage.other]\ntype = "local"\nport = 1', 'port: has no place where type is "local"'),
        (
            '[database.x.user.x]\nauthentication = "md5"\nstorage = "db"\npool = "session"\n'
            'auth_query = "SELECT 1, 2"\nauth_query_db = "pgbouncer"\nauth_query_user = "admin"',
            'auth_query_db: there is no rule for database "pgbouncer" and user "admin"',
        ),
    ],
)
def test_what_the_console_cannot_have_is_refused(lines: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(f"{HEAD}{lines}\n")
    assert any(text in str(problem) for problem in caught.value.problems), caught.value.problems
