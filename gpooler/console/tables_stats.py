"""Tables of counters: STATS and its kin, POOLS, ERRORS, LISTS, USERS, DATABASES. Pure.

Where PgBouncer has a table of the name, columns, order and types are its own (1.25.2 and what follows it).
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from gpooler.config.model import DEFAULT, Config, Rule
from gpooler.config.words import StorageType
from gpooler.console.facts import AVERAGED, NOTHING, Block, RouteView, View, quantile_text
from gpooler.console.spec import Need, Spec, seconds_and_rest
from gpooler.console.table import Cell, Columns, Row, columns
from gpooler.reasons import Reason
from gpooler.stats.catalogue import NORMAL_ENDS
from gpooler.stats.quantiles import MEASURED, asked_for
from gpooler.stats.registry import ERROR_BASE, ProcessWord, RouteWord

_TIMES: Final = {  # the word that each time is the mean of
    RouteWord.TRANSACTION_US: RouteWord.TRANSACTIONS,
    RouteWord.QUERY_US: RouteWord.QUERIES,
    RouteWord.WAIT_US: RouteWord.ASSIGNMENTS,
}
_ROUTES: Final = frozenset({Need.ROUTES})
_MEASURED: Final = tuple(time.name.lower() for time in MEASURED)
_INT4_MOST: Final = 2**31 - 1


class Sums(NamedTuple):
    """``AVERAGED`` of several routes: all that was counted, and what a second of the last interval had."""

    totals: tuple[int, ...]
    averages: tuple[int, ...]


def sums(view: View, routes: Iterable[RouteView]) -> Sums:
    """Rates are a second's, times the mean of one transaction, query or assignment in microseconds."""
    totals = [0] * len(AVERAGED)
    rates = [0.0] * len(AVERAGED)
    growths = [0] * len(AVERAGED)
    for route in routes:
        seconds = (view.now_us - route.fact.at_us) / 1e6 if route.fact.at_us else 0
        for place, word in enumerate(AVERAGED):
            value = route.block[word]
            totals[place] += value
            if seconds > 0:
                growth = max(0, value - route.fact.older[place])
                growths[place] += growth
                rates[place] += growth / seconds
    averages = []
    for place, word in enumerate(AVERAGED):
        if word in _TIMES:
            count = growths[AVERAGED.index(_TIMES[word])]
            averages.append(growths[place] // count if count else 0)
        else:
            averages.append(int(rates[place]))
    return Sums(tuple(totals), tuple(averages))


def _by_database(view: View) -> dict[str, list[RouteView]]:
    """The routes of each database that has any; the console's own has none."""
    found: dict[str, list[RouteView]] = {name: [] for name in console_databases(view)[:1]}
    for route in view.routes:
        found.setdefault(route.database, []).append(route)
    return found


def console_databases(view: View) -> list[str]:
    """Names of the databases whose rules lead to the console."""
    local = {name for name, storage in view.config.storage.items() if storage.type is StorageType.LOCAL}
    return list(dict.fromkeys(rule.database for rule in view.config.rules if rule.storage in local))


def _stats(view: View) -> Iterator[Row]:
    for database, routes in _by_database(view).items():
        found = sums(view, routes)
        row: Row = (database, *found.totals, *found.averages)
        yield (*row, found.totals[AVERAGED.index(RouteWord.QUERIES)]) if view.has_legacy_columns else row


def _stats_totals(view: View) -> Iterator[Row]:
    for database, routes in _by_database(view).items():
        yield database, *sums(view, routes).totals


def _stats_averages(view: View) -> Iterator[Row]:
    for database, routes in _by_database(view).items():
        yield database, *sums(view, routes).averages


_TOTALS_NAMES: Final = (
    "server_assignment_count", "xact_count", "query_count", "client_bytes", "server_bytes", "xact_time",
    "query_time", "wait_time", "ps_client_parse_count", "ps_server_parse_count", "ps_bind_count",
    "client_login_count",
)  # fmt: skip


def _totals(view: View) -> Iterator[Row]:
    found = sums(view, view.routes)
    for prefix, values in (("total", found.totals), ("avg", found.averages)):
        for name, value in zip(_TOTALS_NAMES, values, strict=True):
            yield f"{prefix}_{name}", value


# --- pools ----------------------------------------------------------------------------------------


class Pool(NamedTuple):
    """The routes of one database and user."""

    database: str
    user: str
    rule: Rule
    block: Block
    wait_us: int  # of the oldest that waits


def pools(view: View) -> list[Pool]:
    """In the order in which their routes came to be."""
    found: dict[tuple[str, str], Pool] = {}
    for route in view.routes:
        key = route.database, route.user
        since_us = route.block[RouteWord.OLDEST_WAIT_US]
        wait_us = max(0, view.now_us - since_us) if since_us else 0
        before = found.get(key)
        if before is None:
            found[key] = Pool(*key, route.rule, route.block, wait_us)
        else:
            total = [one + other for one, other in zip(before.block, route.block, strict=True)]
            found[key] = before._replace(block=total, wait_us=max(before.wait_us, wait_us))
    return list(found.values())


def _pools(view: View) -> Iterator[Row]:
    for name in console_databases(view)[:1]:
        yield name, name, view.consoles, *[0] * 12, "statement", None
    for pool in pools(view):
        block = pool.block
        resetting = block[RouteWord.SERVERS_RESETTING]
        yield (
            pool.database,
            pool.user,
            block[RouteWord.CLIENTS] - block[RouteWord.CLIENTS_WAITING],
            block[RouteWord.CLIENTS_WAITING],
            block[RouteWord.CANCELS_ACTIVE],
            block[RouteWord.CANCELS_WAITING],
            block[RouteWord.SERVERS_ACTIVE] - resetting,
            block[RouteWord.CANCELS_ACTIVE],
            block[RouteWord.SERVERS_CANCELLED],
            block[RouteWord.SERVERS_IDLE],
            0,
            resetting,
            block[RouteWord.SERVERS_LOGIN],
            *seconds_and_rest(pool.wait_us),
            pool.rule.pool.value,
            None,
        )


def _pools_extended(view: View) -> Iterator[Row]:
    total = list(NOTHING)
    wait_us = 0
    quantiles = {(fact.database, fact.user, fact.time, fact.q): fact.us for fact in view.quantiles}
    asked = [(time, quantile_text(q)) for q in asked_for(view.config.rules) for time in _MEASURED]

    def measured(database: str | None, user: str | None) -> Row:
        return tuple(min(quantiles.get((database, user, *column), 0), _INT4_MOST) for column in asked)

    for pool in pools(view):
        yield (pool.database, pool.user, *_extended(pool.block, pool.wait_us, pool.rule.pool.value),
               *measured(pool.database, pool.user),
               pool.rule.name, _size_of(view, pool.rule), *_beyond(pool.block))  # fmt: skip
        total = [one + other for one, other in zip(total, pool.block, strict=True)]
        wait_us = max(wait_us, pool.wait_us)
    aggregated = "aggregated"
    yield (aggregated, aggregated, *_extended(total, wait_us, aggregated), *measured(None, None),
           None, None, *_beyond(total))  # fmt: skip


def _quantile_columns(config: Config) -> Columns:
    """Those of all rules: a pool whose rule asks for one has them all."""
    names = [f"{time}_{quantile_text(q)}" for q in asked_for(config.rules) for time in _MEASURED]
    return columns(f"i: {' '.join(names)}")


def _extended(block: Block, wait_us: int, mode: str) -> Row:
    resetting = block[RouteWord.SERVERS_RESETTING]
    return (
        block[RouteWord.CLIENTS_ACTIVE],
        block[RouteWord.CLIENTS_WAITING],
        block[RouteWord.SERVERS_ACTIVE] - resetting,
        block[RouteWord.SERVERS_IDLE],
        0,
        resetting,
        block[RouteWord.SERVERS_LOGIN],
        *seconds_and_rest(wait_us),
        mode,
        block[RouteWord.BYTES_IN],
        block[RouteWord.BYTES_OUT],
        block[RouteWord.SERVERS_OPENED],
    )


_BEYOND: Final = {
    "clients": RouteWord.CLIENTS,
    "sv_closing": RouteWord.SERVERS_CLOSING,
    "deploys": RouteWord.DEPLOYS,
    "resets": RouteWord.RESETS,
    "pins": RouteWord.PINS,
    "cancels": RouteWord.CANCELS,
}


def _beyond(block: Block) -> Row:
    return tuple(block[word] for word in _BEYOND.values())


def _size_of(view: View, rule: Rule) -> int:
    """Of the pool, or of the one it shares; 0 is without limit."""
    return rule.pool_size if rule.shared_pool is None else view.config.shared_pool[rule.shared_pool].pool_size


# --- databases and users -----------------------------------------------------------------------------


def _connections(pool: Pool) -> int:
    words = (RouteWord.SERVERS_ACTIVE, RouteWord.SERVERS_IDLE, RouteWord.SERVERS_LOGIN)
    return sum(pool.block[word] for word in words)


def _databases(view: View) -> Iterator[Row]:
    """A row a database: of its rules the one for all users, else the first, tells of host and sizes."""
    local = set(console_databases(view))
    rules: dict[str, Rule] = {}
    for rule in view.config.rules:
        if rule.database != DEFAULT and (rule.database not in rules or rule.is_default_user):
            rules[rule.database] = rule
    servers: Counter[str] = Counter()
    clients: Counter[str] = Counter()
    for pool in pools(view):
        rules.setdefault(pool.database, pool.rule)
        servers[pool.database] += _connections(pool)
        clients[pool.database] += pool.block[RouteWord.CLIENTS]
    for name, rule in rules.items():
        is_local = name in local
        endpoints = view.config.storage[rule.storage].endpoints
        row: Row = (
            name,
            str(endpoints[0].host or endpoints[0].unix_path) if endpoints else None,
            endpoints[0].port if endpoints else view.config.listen[0].port,
            rule.storage_db or name,
            name if is_local else rule.storage_user,
            0 if is_local else _size_of(view, rule),
            0 if is_local else rule.min_pool_size,
            0,
            rule.server_lifetime,
            "statement" if is_local else rule.pool.value,
            None,
            0,
            servers[name],
            rule.client_max or 0,
            view.consoles if is_local else clients[name],
            int(not is_local and not {name, ""}.isdisjoint(view.config.pauses)),
            int(name in view.config.disabled),
        )
        yield (*row, 0) if view.has_legacy_columns else row


def _users(view: View) -> Iterator[Row]:
    named = [rule.user for rule in view.config.rules if rule.group is None and not rule.is_default_user]
    servers: Counter[str] = Counter()
    clients: Counter[str] = Counter()
    rules = {rule.user: rule for rule in reversed(view.config.rules)}
    for pool in pools(view):
        servers[pool.user] += _connections(pool)
        clients[pool.user] += pool.block[RouteWord.CLIENTS]
        named.append(pool.user)
    for user in dict.fromkeys(named):
        rule = rules.get(user)
        yield (
            user,
            str(_size_of(view, rule)) if rule else None,
            None,
            rule.pool.value if rule else None,
            0,
            servers[user],
            rule.client_max or 0 if rule else 0,
            clients[user],
        )


# --- lists and errors --------------------------------------------------------------------------------


def _lists(view: View) -> Iterator[Row]:
    memory = {fact.name: [0, 0] for fact in view.memory}
    for fact in view.memory:
        memory[fact.name][0] += fact.free
        memory[fact.name][1] += fact.used
    free_clients, used_clients = memory.get("client", (0, 0))
    free_servers, used_servers = memory.get("server", (0, 0))
    items: dict[str, Cell] = {
        "databases": len(list(_databases(view))),
        "users": len(list(_users(view))),
        "peers": 0,
        "pools": len(list(_pools(view))),
        "peer_pools": 0,
        "free_clients": free_clients,
        "used_clients": used_clients + view.consoles,
        "login_clients": view.process[ProcessWord.CLIENTS_LOGIN],
        "free_servers": free_servers,
        "used_servers": used_servers,
        "dns_names": len({fact.name for fact in view.hosts}),
        "dns_zones": 0,
        "dns_queries": 0,
        "dns_pending": 0,
    }
    yield from items.items()


_ERRORS: Final = tuple(reason for reason in Reason if reason not in NORMAL_ENDS and reason is not Reason.NONE)


def _errors(view: View) -> Iterator[Row]:
    yield "login_refused", view.process[ProcessWord.LOGIN_ERRORS]
    for reason in _ERRORS:
        yield reason.label, sum(route.block[ERROR_BASE + reason] for route in view.routes)


def _errors_per_route(view: View) -> Iterator[Row]:
    found = pools(view)
    for reason in _ERRORS:
        for pool in found:
            if count := pool.block[ERROR_BASE + reason]:
                yield reason.label, pool.user, pool.database, count


_COUNTS: Final = (
    "server_assignment_count xact_count query_count bytes_received bytes_sent xact_time query_time wait_time "
)

TABLES: Final = {
    "stats": Spec(
        columns(
            "s: database N: total_server_assignment_count total_xact_count total_query_count total_received "
            "total_sent total_xact_time total_query_time total_wait_time total_client_parse_count "
            "total_server_parse_count total_bind_count total_client_login_count avg_server_assignment_count "
            "avg_xact_count avg_query_count avg_recv avg_sent avg_xact_time avg_query_time avg_wait_time "
            "avg_client_parse_count avg_server_parse_count avg_bind_count avg_client_login_count"
        ),
        _stats,
        _ROUTES,
        columns("N: total_requests"),
    ),
    "stats_totals": Spec(
        columns(
            f"s: database N: {_COUNTS} client_parse_count server_parse_count bind_count client_login_count"
        ),
        _stats_totals,
        _ROUTES,
    ),
    "stats_averages": Spec(
        columns(
            f"s: database N: {_COUNTS} avg_client_parse_count avg_server_parse_count avg_bind_count "
            "avg_client_login_count"
        ),
        _stats_averages,
        _ROUTES,
    ),
    "totals": Spec(columns("s: name N: value"), _totals, _ROUTES),
    "pools": Spec(
        columns(
            "s: database user i: cl_active cl_waiting cl_active_cancel_req cl_waiting_cancel_req sv_active "
            "sv_active_cancel sv_being_canceled sv_idle sv_used sv_tested sv_login maxwait maxwait_us "
            "s: pool_mode load_balance_hosts"
        ),
        _pools,
        _ROUTES,
    ),
    "pools_extended": Spec(
        columns(
            "s: database user i: cl_active cl_waiting sv_active sv_idle sv_used sv_tested sv_login maxwait "
            "maxwait_us s: pool_mode q: bytes_received bytes_sent tcp_conn_count"
        ),
        _pools_extended,
        _ROUTES | {Need.QUANTILES},
        varying=_quantile_columns,
        behind=columns(f"s: rule i: pool_size q: {' '.join(_BEYOND)}"),
    ),
    "databases": Spec(
        columns(
            "s: name host i: port s: database force_user i: pool_size min_pool_size reserve_pool_size "
            "server_lifetime s: pool_mode load_balance_hosts i: max_connections current_connections "
            "max_client_connections current_client_connections paused disabled"
        ),
        _databases,
        _ROUTES,
        columns("i: reserve_pool"),
    ),
    "users": Spec(
        columns(
            "s: name pool_size reserve_pool_size pool_mode i: max_user_connections current_connections "
            "max_user_client_connections current_client_connections"
        ),
        _users,
        _ROUTES,
    ),
    "lists": Spec(columns("s: list i: items"), _lists, _ROUTES | {Need.MEMORY, Need.HOSTS}),
    "errors": Spec(columns("s: error_type q: count"), _errors, _ROUTES),
    "errors_per_route": Spec(columns("s: error_type user database q: count"), _errors_per_route, _ROUTES),
}
