"""Writes the documents that come from the table of options: the reference, Odyssey's options, the example.

``python -m gpooler.config.document`` writes them below the current directory. A test fails when they are
stale.
"""

import textwrap
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from gpooler.config import odyssey
from gpooler.config.field import REMOVE_IT, UNSET, Status
from gpooler.config.odyssey import RULE
from gpooler.config.options import TABLE, Option, Table, options_of, tables
from gpooler.config.rule import GroupBody, LdapCredentials, RuleBody, Watchdog
from gpooler.config.toml_text import entry, value_text
from gpooler.config.values import ClientAddress, FileMode

REFERENCE: Final = Path("docs/configuration.md")
EXAMPLE: Final = Path("config.toml.example")
WIDTH: Final = 100

# The part of the example that is not commented out: what runs against a PostgreSQL on this machine.
ACTIVE: Final[Mapping[str, Mapping[str, Any]]] = {
    "logging": {"log_format": "%p %t %e %l [%i %s] (%c) %m\n"},
    "listen": {"host": "127.0.0.1", "port": 6432},
    "storage.NAME": {"type": "remote", "host": "127.0.0.1", "port": 5432},
    RULE: {
        "authentication": "none",
        "storage": "local_postgres",
        "pool": "transaction",
        "pool_size": 20,
    },
}
EXAMPLE_HEADERS: Final[Mapping[str, str]] = {
    "listen": "[[listen]]",
    "storage.NAME": "[storage.local_postgres]",
    "storage.NAME.balancing": "[storage.local_postgres.balancing]",
    "shared_pool.NAME": "[shared_pool.small]",
    "ldap_endpoint.NAME": "[ldap_endpoint.directory]",
    f"{RULE}.ldap_storage_credentials.NAME": "[database.sales.user.default.ldap_storage_credentials.ro]",
    RULE: "[database.default.user.default]",
}
OLD_NAME: Final = "service.online_restart_drop_options"
WITH_CLEAR_TEXT: Final = "Goes with clear_text and without password; see the last rules below."
DIRECT_BIND: Final = "Excludes ldapbasedn; see the last endpoint below."
# What the active part excludes: the last rules show it.
NOT_WITH_ACTIVE: Final[Mapping[str, str]] = {
    "shared_pool": "Excludes pool_size; see the last rules below.",
    "auth_pam_service": WITH_CLEAR_TEXT,
    "ldap_endpoint_name": WITH_CLEAR_TEXT,
    "ldap_storage_credentials_attr": "See the last rules below.",
    "role": "Goes with a local storage; see the console below.",
    "ldapprefix": DIRECT_BIND,
    "ldapsuffix": DIRECT_BIND,
}

EXAMPLE_HEAD: Final = """\
# gpooler: every option, at its default where it is commented out.
#
# Check a configuration with `gpooler check -c FILE`, run it with `gpooler run -c FILE`. The reference is
# docs/configuration.md. A line that begins with "#" and a name is an option: take the "#" away to set it.
# Numbers are in the option's unit; a text brings its own: "4s", "750MB". Passwords may also be
# { file = "…" } or { env = "…" }.

# Files that are read first; file names are relative to this file.
#include = []
"""
EXAMPLE_TAIL: Final = """\

# -- further examples ------------------------------------------------------------------------------------

# A listener at a Unix socket: it has no host, and needs unix_socket_dir and unix_socket_mode.
#[[listen]]
#port = 6432

# Rules for one database and user, told apart by where the client comes from. Both use one shared pool.
#[[database.reports.user.analyst]]
#address = "10.0.0.0/8"
#connection_type = "host"
#authentication = "scram-sha-256"
#password = "secret"
#storage = "local_postgres"
#pool = "session"
#shared_pool = "small"

#[[database.reports.user.analyst]]
#authentication = "block"
#storage = "local_postgres"
#pool = "session"
#shared_pool = "small"

# Passwords checked by LDAP; whom a user is at the server is said by the directory, too: by the word
# 127.0.0.1_sales_ro or 127.0.0.1_sales_rw in the attribute memberOf of the user's entry.
#[database.sales.user.default]
#authentication = "clear_text"
#ldap_endpoint_name = "directory"
#ldap_storage_credentials_attr = "memberOf"
#storage = "local_postgres"
#pool = "transaction"

#[database.sales.user.default.ldap_storage_credentials.rw]
#ldap_storage_username = "sales_rw"
#ldap_storage_password = "secret"

# A direct bind under StartTLS.
#[ldap_endpoint.other_directory]
#ldapserver = "ldap.example.com"
#ldaptls = true
#ldapprefix = "uid="
#ldapsuffix = ",ou=people,dc=example,dc=com"

# Passwords checked by PAM, as the file /etc/pam.d/postgresql says.
#[database.payroll.user.default]
#authentication = "clear_text"
#auth_pam_service = "postgresql"
#storage = "local_postgres"
#storage_user = "payroll"
#storage_password = "secret"
#pool = "transaction"

# The console: `psql -p 6432 -U admin pgbouncer`, then SHOW HELP (docs/console.md).
#[storage.console]
#type = "local"

#[database.pgbouncer.user.admin]
#authentication = "scram-sha-256"
#password = "secret"
#storage = "console"
#pool = "session"
#role = "admin"
"""

REFERENCE_HEAD: Final = """\
# Configuration

<!-- Written by `python -m gpooler.config.document` from the table of options. Do not edit. -->

gpooler reads one TOML file, and what it includes: `gpooler run -c config.toml`. The options have Odyssey's
names and units. `gpooler check -c config.toml` says whether a configuration is good and reports every
problem at once, each with its file, line and key; `--effective` prints what results, defaults included,
without secrets. [`config.toml.example`](../config.toml.example) holds every option with its default, and
[options.md](options.md) every option of Odyssey's with what became of it.

## Values

- A number is in the option's unit. A text brings its own: `"500ms"`, `"4s"`, `"2min"`, `"1h"`, `"1d"`, and
  for sizes `"64KB"`, `"750MB"`, `"2GB"`. What does not come out whole is an error.
- Booleans are TOML's `true` and `false`; Odyssey's `"yes"` and `"no"` do as well.
- A secret is a text, or `{ file = "path" }` (relative to the file it stands in; one line end at its end does
  not count), or `{ env = "NAME" }`. No message ever shows a secret.
- `include = ["more.toml"]` stands at the top. Included files are read first, in order, each relative to the
  one that includes it, at most 16 deep. A section such as `[logging]` may be spread over files; a storage
  or a rule may not. `[[listen]]` tables of all files add up.

## Rules

`[database.NAME.user.NAME]` is a rule: whom it takes, how they log in, and which servers they get. The word
`default` in place of a name stands for any. Several rules for one pair are an array of tables,
`[[database.NAME.user.NAME]]`, told apart by `address` (a network or a
[host name](authentication.md#host-names)) and `connection_type`.

Of the rules that match a client the most specific is taken: a database counts 1000, a user 100, an address
10, a connection type 1, `default` nothing; of equals the first in the file. With `sequential_routing` the
first in the file is taken in any case. A client that no rule matches gets 3D000.

A *route* is a rule for one database and user on the server. `pool_size` holds for each route, over all
workers.
"""
LOG_FORMAT: Final = """\
## `log_format`

`%n` unix time, `%t` time in ISO 8601 (UTC), `%e` milliseconds, `%p` process id, `%T` thread id, `%i`
client id, `%s` server id, `%u` user, `%d` database, `%c` context, `%l` level (debug, info, error,
fatal), `%m` message, `%M` message escaped for TSKV, `%r` client port, `%h` client host, `%H` server
host, `%x` id from an authentication agent, `%%` a percent sign; `\\n \\t \\r \\\\` are escapes. What is
absent prints `none`. A newline is always added. The word `json` in place of a template gives one JSON
object a line.
"""
RELOAD: Final = """\
## When a change takes effect

The tables below say it of each option, and [reload.md](reload.md) what the words mean.
"""


def example() -> str:
    """The text of ``config.toml.example``."""
    blocks = [EXAMPLE_HEAD]
    for table in _written():
        if table.section == OLD_NAME:
            blocks.append(_prose(f"[{table.section}] is the old name of conn_drop_options."))
        elif table.about is not None and table.about.status is Status.NOT_BUILT:
            blocks.append(_not_built_example(table))
        else:
            blocks.append(_section_example(table))
    return "\n".join(blocks) + EXAMPLE_TAIL


def _section_example(table: Table) -> str:
    active = ACTIVE.get(table.section, {})
    header = EXAMPLE_HEADERS.get(table.section, f"[{table.section}]")
    is_open = bool(active) or _is_plain(table)
    text = _heading(table) + ("" if is_open else "#") + header + "\n"
    own = list(options_of(table))
    if issubclass(table.model, GroupBody):
        text += "# all options of a rule, and:\n"
        own = [item for item in own if item.is_required or item.name not in RuleBody.model_fields]
    for item in own:
        text += "\n" + _prose(_explanation(item))
        value = active.get(item.name, _shown_value(item))
        if value is not UNSET and item.name not in NOT_WITH_ACTIVE:
            text += ("" if item.name in active else "#") + entry(item.name, value)
    return text


def _is_plain(table: Table) -> bool:
    """Whether an empty table of this section is harmless: one without a name, at the top, complete."""
    is_lacking = any(item.is_required for item in options_of(table))
    return "." not in table.section and not table.is_array and not is_lacking


def _not_built_example(table: Table) -> str:
    row = table.about
    advice = f": {row.advice}" if row and row.advice != REMOVE_IT else ""
    text = _heading(table) + f"# [{table.section}] is not built yet{advice}. Its options:\n"
    own = {item.name: item for item in options_of(table)}
    if issubclass(table.model, GroupBody | Watchdog):
        text += "#   all of a rule\n"
        own = {name: item for name, item in own.items() if name not in RuleBody.model_fields}
    for item in own.values():
        text += textwrap.fill(
            f"{item.name}: {item.about.help}", WIDTH, initial_indent="#   ", subsequent_indent="#     "
        )
        text += "\n"
    return text


def _written() -> Iterator[Table]:
    """The sections to write: those with options, and a rule's inner ones once."""
    for table in tables():
        is_repeated = table.model is LdapCredentials and not table.section.startswith(RULE + ".")
        if any(options_of(table)) and not is_repeated:
            yield table


def _heading(table: Table) -> str:
    help_text = table.about.help if table.about else ""
    return f"\n# -- {table.section} {'-' * max(3, WIDTH - len(table.section))}\n" + _prose(help_text) + "\n"


def _prose(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent="# ", subsequent_indent="# ") + "\n"


def _explanation(item: Option) -> str:
    row = item.about
    text = f"{item.name} ({item.kind.short()}): {row.help}{_status(item, '', '')}"
    if item.is_required:
        text += " Required."
    elif row.status is Status.BUILT and item.default is None and not isinstance(item.kind, ClientAddress):
        text += " Default: unset."
    if item.name in NOT_WITH_ACTIVE:
        text += f" {NOT_WITH_ACTIVE[item.name]}"
    return text


def _shown_value(item: Option) -> Any:
    """The value of the commented line; UNSET when there is none that could be taken as it is."""
    if item.about.example is not UNSET and (item.default in (None, {}, "") or item.is_required):
        return item.about.example
    if item.is_required or item.default is None:
        return UNSET
    return _plain(item, item.default)


def _plain(item: Option, value: Any) -> Any:
    if isinstance(item.kind, FileMode) and isinstance(value, int):
        return f"{value:04o}"
    if isinstance(value, StrEnum):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def reference() -> str:
    """The text of ``docs/configuration.md``."""
    parts = [REFERENCE_HEAD, _departures(), RELOAD, LOG_FORMAT]
    parts += [_section_reference(table) for table in _written()]
    return "\n".join(parts)


def _departures() -> str:
    lines = [
        "## Where the defaults are not Odyssey's\n\nOn purpose; `gpooler check` names those in use.\n",
        *(
            f"- {_both_defaults(item)}: {item.about.departure}."
            for item in _unique(TABLE)
            if item.about.departure
        ),
    ]
    return "\n".join(lines) + "\n"


def _unique(options: tuple[Option, ...]) -> Iterator[Option]:
    """Each option of a rule once, though groups and watchdogs have it too."""
    return (item for item in options if "group" not in item.section and "watchdog" not in item.section)


def _section_reference(table: Table) -> str:
    header = f"[[{table.section}]]" if table.section == "listen" else f"[{table.section}]"
    row = table.about
    text = f"## `{header}`\n\n{row.help if row else ''}\n"
    if row is not None and row.status is Status.NOT_BUILT:
        text += "\n**Not built yet**" + ("" if row.advice == REMOVE_IT else f": {row.advice}") + ".\n"
    own = [] if table.section == OLD_NAME else list(options_of(table))
    if issubclass(table.model, GroupBody | Watchdog):
        text += "\nAll options of a rule, and:\n"
        own = [item for item in own if item.name not in RuleBody.model_fields]
    if own:
        text += "\n| option | takes | default | takes effect | what |\n|---|---|---|---|---|\n"
    return text + "".join(_row(item) for item in own)


def _status(item: Option, strong: str, weak: str) -> str:
    """What a reader must know beyond the help, between the given marks of emphasis."""
    row = item.about
    if row.status is Status.NOT_BUILT:
        advice = "" if row.advice == REMOVE_IT else f": {row.advice}"
        return f" {strong}Not built yet{strong}{advice}."
    return f" {weak}Ignored{weak}: {row.advice}." if row.status is Status.IGNORED else ""


def _row(item: Option) -> str:
    what = item.about.help + _status(item, "**", "*")
    cells = (
        f"`{item.name}`",
        item.kind.short(),
        _default_text(item),
        str(item.about.reload) if item.about.status is Status.BUILT else "",
        what,
    )
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |\n"


def _default_text(item: Option) -> str:
    if item.is_required:
        return "required"
    if item.default is None:
        return '`"default"`' if isinstance(item.kind, ClientAddress) else "unset"
    return f"`{value_text(_plain(item, item.default))}`" if item.default not in ((), {}) else "none"


def _both_defaults(item: Option) -> str:
    return f"`{item.name}`: {_default_text(item)} (Odyssey: `{value_text(item.about.odyssey)}`)"


def main() -> None:
    """Write the files below the current directory."""
    REFERENCE.write_text(reference(), encoding="utf-8")
    EXAMPLE.write_text(example(), encoding="utf-8")
    odyssey.OPTIONS.write_text(odyssey.text(), encoding="utf-8")


if __name__ == "__main__":
    main()
