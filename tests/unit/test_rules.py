"""The match of a client with a rule, compared with the plain reading of reference §7."""

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpooler.config.load import load_text
from gpooler.config.model import Config, ConnectionType, Rule
from gpooler.routing.rules import Hosts, Rules, rule_for_queries, score

HEAD = """
[logging]
log_format = "%m"
[[listen]]
host = "*"
[storage.s]
type = "remote"
host = "h"
"""
BODY = 'authentication = "none"\nstorage = "s"\npool = "session"\n'
HOSTNOSSL = ConnectionType.HOSTNOSSL

NAMES = ["default", "a", "b"]
NETWORKS = ["default", "10.0.0.0/8", "10.1.0.0/16", "2001:db8::/32", "::/0", "near.example.com"]
HOSTS = {"near.example.com": {ip_address("10.1.0.1"), ip_address("2001:db8::1")}}
KINDS = list(ConnectionType)
CLIENT_KINDS = [ConnectionType.HOSTSSL, ConnectionType.HOSTNOSSL, ConnectionType.LOCAL]
ADDRESSES = ["10.0.0.1", "10.1.0.1", "192.0.2.1", "2001:db8::1", "::1", "::ffff:10.1.0.1"]


def config(*rules: str, is_sequential: bool = False) -> Config:
    routing = f"[routing]\nsequential_routing = {str(is_sequential).lower()}\n"
    return load_text(HEAD + routing + "".join(f"{rule}\n{BODY}" for rule in rules)).config


def found(
    config: Config, database: str, user: str, address: str = "", kind: ConnectionType = HOSTNOSSL
) -> str:
    rule = Rules(config).match(database, user, ip_address(address) if address else None, kind)
    return rule.name if rule else ""


def test_the_most_specific_rule_wins_whatever_the_order() -> None:
    rules = [
        "[database.default.user.default]",
        "[database.default.user.u]",
        "[database.d.user.default]",
        "[database.d.user.u]",
    ]
    for order in (rules, rules[::-1]):
        made = config(*order)
        assert found(made, "d", "u") == "d.u"
        assert found(made, "d", "x") == "d.default"
        assert found(made, "x", "u") == "default.u"
        assert found(made, "x", "x") == "default.default"


def test_a_user_outweighs_an_address_and_a_database_outweighs_all() -> None:
    made = config(
        '[[database.default.user.u]]\naddress = "10.0.0.0/8"\nconnection_type = "host"',
        "[database.d.user.default]",
        '[[database.default.user.default]]\naddress = "10.0.0.0/8"',
    )
    assert found(made, "d", "u", "10.0.0.1") == "d.default"
    assert found(made, "x", "u", "10.0.0.1") == "default.u[0]"
    assert found(made, "x", "x", "10.0.0.1") == "default.default[0]"
    assert found(made, "x", "x", "192.0.2.1") == ""
    assert [score(rule) for rule in made.rules] == [111, 1000, 10]


def test_a_more_specific_rule_for_other_clients_leaves_the_less_specific_one() -> None:
    made = config(
        '[[database.d.user.u]]\naddress = "10.0.0.0/8"',
        '[[database.d.user.u]]\nconnection_type = "local"',
        "[database.default.user.default]",
    )
    assert found(made, "d", "u", "10.0.0.1") == "d.u[0]"
    assert found(made, "d", "u", "", ConnectionType.LOCAL) == "d.u[1]"
    assert found(made, "d", "u", "192.0.2.1") == "default.default"


def test_in_sequential_routing_the_first_rule_of_the_file_wins() -> None:
    rules = ["[database.default.user.default]", "[database.d.user.u]"]
    assert found(config(*rules, is_sequential=True), "d", "u") == "default.default"
    assert found(config(*rules[::-1], is_sequential=True), "d", "u") == "d.u"


def test_an_internal_rule_never_matches_a_client() -> None:
    made = config('[database.d.user.u]\npool_routing = "internal"', "[database.default.user.default]")
    assert found(made, "d", "u") == "default.default"


def test_a_host_rule_takes_tcp_with_and_without_tls_and_no_unix_socket() -> None:
    made = config('[database.d.user.u]\nconnection_type = "host"')
    assert found(made, "d", "u", "10.0.0.1", ConnectionType.HOSTSSL)
    assert found(made, "d", "u", "10.0.0.1", ConnectionType.HOSTNOSSL)
    assert not found(made, "d", "u", "", ConnectionType.LOCAL)


def test_an_ipv4_client_of_an_ipv6_listener_is_matched_as_ipv4() -> None:
    made = config('[database.d.user.u]\naddress = "10.0.0.0/8"')
    assert found(made, "d", "u", "::ffff:10.0.0.1")
    assert not found(made, "d", "u", "::ffff:11.0.0.1")
    assert not found(made, "d", "u", "", ConnectionType.LOCAL)


def takes(rule: Rule, database: str, user: str, address: str | None, kind: ConnectionType) -> bool:
    """The plain reading: every part of the rule is default or the client's."""
    if rule.database not in ("default", database) or rule.user not in ("default", user):
        return False
    if rule.connection_type is ConnectionType.HOST:
        is_kind = kind is not ConnectionType.LOCAL
    else:
        is_kind = rule.connection_type in (ConnectionType.DEFAULT, kind)
    if rule.address is None or not is_kind:
        return is_kind
    client: IPv4Address | IPv6Address | None = ip_address(address) if address else None
    is_mapped = isinstance(client, IPv6Address) and client.ipv4_mapped
    if isinstance(rule.address, str):
        return (is_mapped or client) in HOSTS[rule.address]
    if is_mapped and rule.address.version == 4:
        client = is_mapped
    return client is not None and client in rule.address


@given(
    st.lists(
        st.tuples(*map(st.sampled_from, (NAMES, NAMES, NETWORKS, KINDS))), min_size=1, max_size=8, unique=True
    ),
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from(ADDRESSES),
    st.sampled_from(CLIENT_KINDS),
    st.booleans(),
)
def test_the_index_finds_what_a_search_through_all_rules_finds(
    rules: list[tuple[str, str, str, str]],
    database: str,
    user: str,
    address: str,
    kind: ConnectionType,
    is_sequential: bool,
) -> None:
    made = config(
        *(
            f'[[database.{rule[0]}.user.{rule[1]}]]\naddress = "{rule[2]}"\nconnection_type = "{rule[3]}"'
            for rule in rules
        ),
        is_sequential=is_sequential,
    )
    client = None if kind is ConnectionType.LOCAL else address
    matching = [rule for rule in made.rules if takes(rule, database, user, client, kind)]
    if is_sequential:
        expected = matching[0] if matching else None
    else:
        expected = max(matching, key=score, default=None)  # max keeps the first of equals
    parsed = ip_address(client) if client else None
    assert Rules(made).match(database, user, parsed, kind, hosts=HOSTS) is expected


@pytest.mark.parametrize("name", ["d", "default"])
def test_a_client_that_no_rule_takes_finds_none(name: str) -> None:
    assert found(config("[database.x.user.default]"), name, "u") == ""


def test_a_host_counts_as_an_address_and_of_equals_the_first_is_taken() -> None:
    near, network = (f'[[database.d.user.u]]\naddress = "{it}"' for it in ("near.example.com", "10.1.0.0/16"))
    anywhere = "[[database.d.user.u]]"
    for order, first in (((near, network, anywhere), "d.u[0]"), ((anywhere, network, near), "d.u[1]")):
        rules = Rules(config(*order))
        assert rules.has_addresses

        def name(address: str, rules: Rules = rules, hosts: Hosts = HOSTS) -> str:
            rule = rules.match("d", "u", ip_address(address) if address else None, HOSTNOSSL, hosts=hosts)
            return "" if rule is None else str(rule.address)

        taken = rules.match("d", "u", ip_address("10.1.0.1"), HOSTNOSSL, hosts=HOSTS)
        assert taken is not None
        assert taken.name == first
        assert name("2001:db8::1") == "near.example.com"
        assert name("10.1.0.2") == "10.1.0.0/16"
        # not resolved: nobody is there
        for hosts in ({}, {"near.example.com": frozenset[IPv4Address]()}):
            assert name("10.1.0.1", hosts=hosts) == "10.1.0.0/16"
            assert name("2001:db8::1", hosts=hosts) == name("", hosts=hosts) == "None"


GROUP_QUERY = 'group_query = "SELECT 1"\ngroup_query_db = "d"\ngroup_query_user = "asker"\n'


@pytest.mark.parametrize("is_sequential", [False, True])
def test_a_group_takes_its_members_behind_their_own_rules(is_sequential: bool) -> None:
    made = config(
        "[database.d.user.anna]",
        f"[[database.d.group.near]]\naddress = '10.0.0.0/8'\n{GROUP_QUERY}",
        f"[database.d.group.staff]\n{GROUP_QUERY}",
        "[database.d.user.default]",
        f"[database.default.group.all]\n{GROUP_QUERY}",
        is_sequential=is_sequential,
    )
    members = {
        "d.group.near[0]": {"anna", "bert"},
        "d.group.staff": {"anna", "bert", "carl"},
        "default.group.all": {"anna"},
    }
    rules = Rules(made)

    def name(database: str, user: str, address: str = "10.0.0.1") -> str:
        rule = rules.match(database, user, ip_address(address), HOSTNOSSL, members)
        return rule.name if rule else ""

    assert name("d", "anna") == "d.anna"
    assert name("d", "bert") == "d.group.near[0]"
    assert name("d", "bert", "192.0.2.1") == name("d", "carl") == "d.group.staff"
    assert name("d", "default") == name("d", "staff") == "d.default"
    assert name("x", "anna") == "default.group.all"
    assert name("x", "bert") == ""
    members["d.group.staff"].discard("carl")
    assert name("d", "carl") == "d.default"


def test_a_group_is_never_the_place_of_our_own_queries() -> None:
    made = config(
        f"[database.d.group.staff]\n{GROUP_QUERY}",
        '[database.d.user.asker]\npool_routing = "internal"',
        "[database.default.user.default]",
    )
    own = rule_for_queries(made.rules, "d", "asker")
    assert own is not None
    assert own.name == "d.asker"
    other = rule_for_queries(made.rules, "d", "staff")
    assert other is not None
    assert other.name == "default.default"
