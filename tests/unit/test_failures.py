"""Failed logins, counted over all workers: who is banned, until when, and what does not fit."""

from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpooler.auth import failures as module
from gpooler.auth.failures import BUCKETS, WAYS, Failures, FailureTable
from gpooler.config.load import load_text
from tests.unit.test_rules import BODY, HEAD

BAN_US = 1000


def add(table: FailureTable, worker: int, now_us: int, key: int = 7, most: int = 3) -> bool:
    return table.add(worker, key, now_us, most=most, ban_us=BAN_US)


def test_failures_of_all_workers_add_up_to_a_ban() -> None:
    table = FailureTable(3)
    assert [add(table, worker, 10_000 + worker) for worker in (1, 2, 3)] == [False, False, True]
    assert table.is_banned(7, 10_004)
    assert table.is_banned(7, 11_002)
    assert not table.is_banned(7, 11_003)
    assert not table.is_banned(8, 10_004)


def test_a_success_in_any_worker_begins_a_new_row() -> None:
    table = FailureTable(2)
    add(table, 1, 10_000)
    add(table, 2, 10_001)
    table.clear(2, 7, 10_002)
    assert [add(table, 1, 10_003), add(table, 1, 10_004), add(table, 2, 10_005)] == [False, False, True]


def test_failures_long_ago_count_no_more() -> None:
    table = FailureTable(2)
    add(table, 1, 10_000)
    add(table, 2, 10_500)
    assert not add(table, 2, 11_200)  # the first is too old
    assert add(table, 1, 11_300)


def test_after_a_ban_the_row_begins_anew() -> None:
    table = FailureTable(2)
    for worker in (1, 1, 2):
        add(table, worker, 10_000)
    assert not table.is_banned(7, 11_000)
    assert [add(table, 2, 11_001), add(table, 1, 11_002), add(table, 2, 11_003)] == [False, False, True]


def test_a_success_without_a_failure_takes_no_room() -> None:
    table = FailureTable(1)
    table.clear(1, 7, 10_000)
    assert not any(table._words)


def test_strangers_who_invent_users_do_not_push_a_ban_out() -> None:
    table = FailureTable(1)
    for _ in range(3):
        add(table, 1, 10_000)
    assert not any(add(table, 1, 10_001 + n, key=7 + BUCKETS * n) for n in range(1, 5 * WAYS))
    assert table.is_banned(7, 10_500)


@given(st.lists(st.tuples(st.integers(1, 2), st.integers(1, 5), st.booleans()), max_size=60))
def test_with_room_enough_it_counts_as_a_plain_list_does(steps: list[tuple[int, int, bool]]) -> None:
    table = FailureTable(2)
    rows: dict[int, list[int]] = {}
    banned: dict[int, int] = {}
    for n, (worker, key, is_success) in enumerate(steps):
        now_us = 10_000 + n * 10
        assert table.is_banned(key, now_us) == (banned.get(key, 0) > now_us)
        if banned.get(key, 0) > now_us:
            continue
        if is_success:
            rows[key] = []
            table.clear(worker, key, now_us)
            continue
        rows.setdefault(key, []).append(now_us)
        is_last = len(rows[key]) >= 3
        assert add(table, worker, now_us, key) == is_last
        if is_last:
            banned[key] = now_us + BAN_US
            rows[key] = []


def failures(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Failures:
    lines = "".join(f"{name} = {value}\n" for name, value in options.items())
    text = f"{HEAD}[database.app.user.joe]\n{BODY}[limits]\nauth_failure_max = 2\n{lines}"
    limits = load_text(text).config.limits
    monkeypatch.setattr(module, "monotonic_us", lambda: 5_000_000)
    return Failures(limits, FailureTable(1), 1, b"k" * 32)


def packed(address: str) -> bytes:
    return ip_address(address).packed


def test_another_address_or_user_is_not_banned(monkeypatch: pytest.MonkeyPatch) -> None:
    them = failures(monkeypatch)
    assert [them.add(packed("192.0.2.1"), b"joe") for _ in range(2)] == [False, True]
    assert not them.add(packed("192.0.2.1"), b"joe")  # it is banned already
    assert them.is_banned(packed("192.0.2.1"), b"joe")
    assert them.is_banned(packed("::ffff:192.0.2.1"), b"joe")
    assert not them.is_banned(packed("192.0.2.2"), b"joe")
    assert not them.is_banned(packed("192.0.2.1"), b"jim")
    assert not them.is_banned(b"", b"joe")


def test_a_network_of_ipv6_counts_as_one_address(monkeypatch: pytest.MonkeyPatch) -> None:
    them = failures(monkeypatch)
    them.add(packed("2001:db8::1"), b"joe")
    them.add(packed("2001:db8::2"), b"joe")
    assert them.is_banned(packed("2001:db8::3"), b"joe")
    assert not them.is_banned(packed("2001:db8:0:1::1"), b"joe")


def test_trusted_networks_and_unix_sockets_are_neither_counted_nor_delayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trusted = '["192.0.2.0/24", "2001:db8::/32"]'
    them = failures(monkeypatch, auth_failure_delay_ms=250, auth_failure_trusted=trusted)
    for address in (packed("192.0.2.1"), packed("2001:db8::1"), packed("::ffff:192.0.2.1"), b""):
        assert not any(them.add(address, b"joe") for _ in range(5))
        assert not them.is_banned(address, b"joe")
        assert them.delay_s(address) == 0
    assert them.delay_s(packed("198.51.100.1")) == 0.25


def test_a_ban_is_told_with_the_failures_of_all_workers() -> None:
    table = FailureTable(2)
    assert not table.add(1, 7, 1000, most=2, ban_us=500)
    assert table.add(2, 7, 1001, most=2, ban_us=500)
    assert (table.bans(1, 1002), table.bans(2, 1002)) == ([], [(7, 2, 1501)])
