"""The slow-request log's line: times, text, and the trace that a comment names."""

import pytest

from gpooler.client.slow import SHOWN, Slow, describe, traceparent

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def slow(size: int = 0, head: int | None = None, *, is_answered: bool = True) -> Slow:
    return Slow(1_500, 2_000_250, 30, 0xABC, 4711, is_answered, size, size if head is None else head)


@pytest.mark.parametrize(
    "text",
    [
        f"SELECT 1 /*traceparent='{TRACE}'*/",
        f"SELECT 1 /*action='x%20y',traceparent='{TRACE}',tracestate='a%3D1'*/",
        f"SELECT 1 /* application='x', traceparent = '{TRACE}' */",
        f"SELECT 1 /*traceparent='{TRACE.replace('-', '%2D')}'*/;",
        f"/*traceparent='{TRACE}'*/ SELECT 1",
        f"SELECT 1 /*traceparent='{TRACE.replace('4bf9', '4bfa')}'*/ /*traceparent='{TRACE}'*/",
    ],
)
def test_a_trace_is_found(text: str) -> None:
    assert traceparent(text) == TRACE


@pytest.mark.parametrize(
    "value",
    [
        "", "x", TRACE[:-1], TRACE + "0", TRACE.upper(), TRACE.replace("-", "_"), f"ff{TRACE[2:]}",
        f"00-{'0' * 32}-00f067aa0ba902b7-01", f"00-4bf92f3577b34da6a3ce929d0e0e4736-{'0' * 16}-01",
        f"{TRACE}%0Afatal", "x" * 300,
    ],
)  # fmt: skip
def test_what_is_no_trace_is_not_taken_for_one(value: str) -> None:
    assert traceparent(f"SELECT 1 /*traceparent='{value}'*/") is None


@pytest.mark.parametrize(
    "text", [f"SELECT traceparent='{TRACE}'", f"/*nottraceparent='{TRACE}'*/", f"/*traceparent={TRACE}*/"]
)
def test_a_trace_elsewhere_is_none(text: str) -> None:
    assert traceparent(text) is None


def test_a_line_has_the_parts_of_the_time_in_milliseconds() -> None:
    message, facts = describe(slow(8), b"SELECT 1", "app.joe")
    assert message == ("[app.joe] 2001.780 ms: wait 1.500, server 2000.250, send 0.030; pid 4711: SELECT 1")
    assert facts == {
        "route": "app.joe", "duration_ms": 2001.78, "wait_ms": 1.5, "server_ms": 2000.25, "send_ms": 0.03,
        "server_pid": 4711, "answered": True, "traceparent": None, "query": "SELECT 1",
    }  # fmt: skip


def test_a_text_that_is_not_known_is_left_out() -> None:
    message, facts = describe(slow(is_answered=False), b"", "app.joe")
    assert message == (
        "[app.joe] 2001.780 ms, not answered: wait 1.500, server 2000.250, send 0.030; pid 4711"
    )
    assert facts["query"] is None


def test_of_a_long_text_only_the_beginning_is_shown_and_the_end_is_read() -> None:
    head, tail = b"SELECT '" + b"x" * SHOWN, f"' /*traceparent='{TRACE}'*/".encode()
    message, facts = describe(slow(9000, len(head)), head + tail, "app.joe")
    assert facts["query"] == head[:SHOWN].decode() + "..."
    assert facts["traceparent"] == TRACE
    assert f", traceparent {TRACE}: SELECT '" in message


def test_what_is_left_out_between_two_parts_is_no_trace() -> None:
    comment = f"/*traceparent='{TRACE}'*/".encode()
    _, facts = describe(slow(9000, 30), comment, "app.joe")
    assert facts["traceparent"] is None
    _, facts = describe(slow(len(comment), 30), comment, "app.joe")
    assert facts["traceparent"] == TRACE


def test_bytes_that_are_no_text_are_shown_escaped() -> None:
    _, facts = describe(slow(10), b"SELECT '\xff", "app.joe")
    assert facts["query"] == "SELECT '\\xff"
