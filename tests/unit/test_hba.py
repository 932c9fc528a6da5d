"""Host-based rules: what each line takes, and every mistake with its place."""

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpooler.auth.hba import HOSTNOSSL, HOSTSSL, LOCAL, Entry, Hba, Interfaces
from gpooler.auth.hba_file import INCLUDE_DEPTH_MOST, HbaProblem, parse


class Texts:
    """Files of a test, by path."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.texts = texts

    def read(self, path: str) -> str:
        if path not in self.texts:
            raise FileNotFoundError(path)
        return self.texts[path]

    def names(self, path: str) -> Sequence[str]:
        found = sorted(name for name in self.texts if posixpath.dirname(name) == path)
        if not found:
            raise ValueError(f"cannot read {path}: no such directory")
        return found

    def join(self, file: str, name: str) -> str:
        return posixpath.join(posixpath.dirname(file), name)


def parsed(text: str, **others: str) -> Hba:
    hba, problems = parse("hba", Texts({"hba": text, **others}))
    assert problems == ()
    return hba


def problems(text: str, others: Mapping[str, str] | None = None) -> list[HbaProblem]:
    return list(parse("hba", Texts({"hba": text, **(others or {})}))[1])


def found(hba: Hba, kind: str = HOSTNOSSL, **client: Any) -> Entry | None:
    client = {"database": "app", "user": "joe", "address": "192.0.2.7", **client}
    address = ip_address(client.pop("address")) if kind != LOCAL else client.pop("address") and None
    return hba.match(kind, client.pop("database"), client.pop("user"), address, **client)


def line(hba: Hba, kind: str = HOSTNOSSL, **client: Any) -> int | None:
    entry = found(hba, kind, **client)
    return entry and entry.line


def test_the_first_line_that_takes_a_client_decides() -> None:
    hba = parsed(
        """
        # comment
        local   all       all                    allow
        host    app       joe   192.0.2.0/24     md5     # comment
        host    app,shop  all   192.0.2.0/24     reject
        host    all       all   all              scram-sha-256
        """
    )
    assert line(hba, LOCAL) == 3
    assert line(hba) == 4
    assert line(hba, user="ann") == 5
    assert line(hba, database="shop") == 5
    assert line(hba, address="2001:db8::1") == 6
    entry = found(hba)
    assert entry is not None
    assert (entry.place, entry.method.authentication) == ("hba:4", "md5")


def test_nobody_is_taken_where_no_line_says_so() -> None:
    assert found(parsed("host app joe 192.0.2.7/32 md5"), address="192.0.2.8") is None
    assert found(parsed("host app joe all md5"), LOCAL) is None


@pytest.mark.parametrize(
    ("kind", "takes"),
    [
        ("local", {LOCAL}),
        ("host", {HOSTSSL, HOSTNOSSL}),
        ("hostssl", {HOSTSSL}),
        ("hostnossl", {HOSTNOSSL}),
        ("hostgssenc", set()),
        ("hostnogssenc", {HOSTSSL, HOSTNOSSL}),
    ],
)
def test_a_line_takes_its_kind_of_connection(kind: str, takes: set[str]) -> None:
    hba = parsed(f"{kind} all all {'' if kind == 'local' else 'all '}allow")
    assert {known for known in (LOCAL, HOSTSSL, HOSTNOSSL) if found(hba, known)} == takes


def test_allow_and_trust_leave_it_to_the_rule_and_names_do_not() -> None:
    hba = parsed("".join(f"host {m} all all {m}\n" for m in ("allow", "trust", "password", "deny", "reject")))

    def method(name: str) -> tuple[str | None, bool]:
        entry = found(hba, database=name)
        assert entry is not None
        return entry.method.authentication, entry.method.is_refusal

    assert method("allow") == method("trust") == (None, False)
    assert method("password") == ("clear_text", False)
    assert method("deny") == method("reject") == (None, True)


@pytest.mark.parametrize(
    ("address", "inside", "outside"),
    [
        ("192.0.2.0/24", "192.0.2.7", "192.0.3.7"),
        ("192.0.2.77/24", "192.0.2.7", "192.0.3.7"),
        ("192.0.2.0 255.255.255.0", "192.0.2.7", "192.0.3.7"),
        ("192.0.2.0/24", "::ffff:192.0.2.7", "::ffff:192.0.3.7"),
        ("2001:db8::/32", "2001:db8::1", "2001:db9::1"),
        ("2001:db8:: ffff:ffff::", "2001:db8::1", "2001:db9::1"),
        ("0.0.0.0/0", "192.0.2.7", "2001:db8::1"),
        ("::/0", "2001:db8::1", "192.0.2.7"),
        ("samehost", "198.51.100.1", "198.51.100.2"),
        ("samenet", "198.51.100.2", "192.0.2.7"),
    ],
)
def test_an_address_is_a_network_a_mask_or_this_machine(address: str, inside: str, outside: str) -> None:
    hba = parsed(f"host all all {address} allow")
    here = Interfaces((ip_network("198.51.100.0/24"),), frozenset({ip_address("198.51.100.1")}))
    hba = replace(hba, interfaces=here)
    assert hba.has_addresses
    assert hba.wants_interfaces is address.startswith("same")
    assert found(hba, address=inside) is not None
    assert found(hba, address=outside) is None
    assert found(hba, LOCAL) is None


def test_addresses_matter_only_where_a_line_looks_at_them() -> None:
    assert not parsed("local all all allow\nhost all all all allow").has_addresses


def test_quotes_take_the_meaning_of_words_away() -> None:
    hba = parsed('host "all" joe all allow\nhost app "all" all deny\nhost "a b" """q" all md5\n')
    assert line(hba, database="all") == 1
    assert found(hba) is None
    assert line(hba, user="all") == 2
    assert line(hba, database="a b", user='"q') == 3


def test_sameuser_and_replication_are_words_of_the_database_column() -> None:
    hba = parsed("host sameuser all all allow\nhost replication all all deny\nhost all all all md5")
    assert line(hba, database="joe") == 1
    assert line(hba, database="replication") == 3
    assert line(hba, database="joe", is_physical=True) == 2
    assert found(parsed("host all all all md5"), is_physical=True) is None


def test_a_host_name_takes_its_addresses_and_nobody_while_it_has_none() -> None:
    hba = parsed("host all all DB.example.com md5\nhost all all all deny")
    assert hba.host_names == {"db.example.com"}
    assert hba.has_addresses
    hosts = {"db.example.com": {ip_address("192.0.2.7"), ip_address("2001:db8::1")}}
    for address in ("192.0.2.7", "::ffff:192.0.2.7", "2001:db8::1"):
        assert line(hba, address=address, hosts=hosts) == 1
        assert line(hba, address=address) == 2
    assert line(hba, address="192.0.2.8", hosts=hosts) == 2
    assert line(hba, LOCAL, address=None, hosts=hosts) is None


def test_lines_go_on_behind_a_backslash_and_lists_stand_in_files() -> None:
    hba = parsed(
        'host \\\n app \\\n @names,"@file" all \\\n allow\r\nhost @more joe all deny',
        names='joe, ann # comment\n"all"\n@inner',
        inner="eve",
        more="x\ny z",
    )
    for user in ("joe", "ann", "all", "eve", "@file"):
        assert line(hba, user=user) == 1
    assert found(hba, user="bob") is None
    assert line(hba, database="z") == 5


def test_files_are_included_where_they_are_named() -> None:
    texts = {
        "hba": "include a\ninclude_if_exists none\ninclude_dir d\nhost all all all deny",
        "a": "host app joe all md5",
        "d/1.conf": "host app ann all md5",
        "d/2.conf": "include ../a2\n",
        "d/../a2": "host app bob all md5",
    }
    hba, wrong = parse("hba", Texts(texts))
    assert wrong == ()
    assert [entry.place for entry in hba.entries] == ["a:1", "d/1.conf:1", "d/../a2:1", "hba:4"]


WRONG = [
    ("hosst all all all md5", "no connection type"),
    ("host all all md5", "ends before the method"),
    ("local all all", "ends before the method"),
    ("host", "ends before the databases"),
    ("host all all all md6", '"md6" is no method'),
    ("host all all all gss", 'method "gss" is not supported'),
    ("host all all all cert", "has a place in hostssl lines only"),
    ("host all all all md5 map=x", "options of a method are not supported"),
    ("host samerole all all md5", '"samerole" is not supported'),
    ("host all +staff all md5", '"+staff" is not supported'),
    ("host all /^a all md5", "regular expressions are not supported"),
    ("host all all 192.0.2.0/33 md5", "is no network"),
    ("host all all 192.0.2.0/255.255.255.0 md5", "is no network"),
    ("host all all 192.0.2.0 255.0.255.0 md5", "has a gap"),
    ("host all all 192.0.2.0 0.0.0.255 md5", "has a gap"),
    ("host all all 192.0.2.0 ffff:: md5", "do not fit"),
    ("host all all 192.0.2.0 md5", 'write "192.0.2.0/32"'),
    ("host all all db_.example.c%m md5", "no address and no host name: a host name has letters"),
    ("host all all 192.0.2.300 md5", "does not end with a number"),
    ("host all all .example.com md5", "suffixes of host names are not supported"),
    ('host all "joe all md5', "a quote is not closed"),
    ("host,local all all all md5", "more than one type"),
    ("host all all all md5,deny", "more than one method"),
    ("host all @none all md5", "cannot read none"),
    ("include none", "cannot read none"),
    ("include", "needs one name"),
    ("include hba", "includes itself"),
    ("include_dir nowhere", "cannot read nowhere"),
]


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_a_mistake_is_told_with_its_line(text: str, said: str) -> None:
    (problem,) = problems(f"local all all allow\n\n{text}\n")
    assert (problem.file, problem.line) == ("hba", 3)
    assert said in problem.text


def test_every_mistake_is_found_at_once() -> None:
    text = "\n".join(text for text, _ in WRONG)
    assert [problem.line for problem in problems(text)] == list(range(1, len(WRONG) + 1))


def test_a_mistake_in_an_included_file_is_told_where_it_stands() -> None:
    (problem,) = problems("host all all all md5\ninclude a", {"a": "\nhost x"})
    assert (problem.file, problem.line) == ("a", 2)


def test_a_file_without_a_line_is_a_mistake() -> None:
    (problem,) = problems("# nothing")
    assert problem.line is None


def test_includes_have_an_end() -> None:
    chain = {f"f{n}": f"include f{n + 1}" for n in range(INCLUDE_DEPTH_MOST + 2)}
    (problem,) = problems("include f0", chain)
    assert "nested deeper" in problem.text


@given(st.text(max_size=80), st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text: str, names: str) -> None:
    hba, wrong = parse("hba", Texts({"hba": text, "names": names}))
    assert hba.entries or wrong


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4))
def test_quoted_names_are_read_back_whatever_is_in_them(names: list[str]) -> None:
    names = [name.replace("\n", "").replace("\\", "").replace("\r", "") for name in names]
    quoted = ",".join('"' + name.replace('"', '""') + '"' for name in names)
    hba = parsed(f"host {quoted} all all allow")
    assert [token.text for token in hba.entries[0].databases] == names
