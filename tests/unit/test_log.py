"""Log lines: the template's flags, JSON, escapes."""

import json
import os

import pytest

from gpooler.log import (
    MAX_MESSAGE,
    NOBODY,
    Level,
    LogContext,
    Logger,
    client_id,
    compile_format,
    escape,
    server_id,
)

NOW = 1785542400.0425  # 2026-08-01 00:00:00.042 UTC
WHO = LogContext(
    client="c00000000002a",
    server="s00000000002b",
    user="u",
    database="d",
    client_host="10.0.0.1",
    client_port=5555,
    server_host="10.0.0.2",
    external_id="x1",
)


def line(template: str, message: str = "hello", who: LogContext = WHO, level: Level = "info") -> str:
    return compile_format(template, pid=77)(NOW, level, "startup", message, who)


@pytest.mark.parametrize(
    ("flag", "shown"),
    [
        ("%n", "1785542400"),
        ("%t", "2026-08-01T00:00:00Z"),
        ("%e", "042"),
        ("%p", "77"),
        ("%i", "c00000000002a"),
        ("%s", "s00000000002b"),
        ("%u", "u"),
        ("%d", "d"),
        ("%c", "startup"),
        ("%l", "info"),
        ("%m", "hello"),
        ("%M", "hello"),
        ("%r", "5555"),
        ("%h", "10.0.0.1"),
        ("%H", "10.0.0.2"),
        ("%x", "x1"),
        ("%%", "%"),
        ("100%% %m", "100% hello"),
        (r"a\tb\\c\rd", "a\tb\\c\rd"),
        (r"%m\n", "hello"),
        (r"\q", r"\q"),
        ("{%m}", "{hello}"),
    ],
)
def test_flag_shows_its_value(flag: str, shown: str) -> None:
    assert line(flag) == shown


def test_thread_id_is_a_number() -> None:
    assert line("%T").isdigit()


def test_the_demo_format_gives_odysseys_line() -> None:
    shown = line(r"%p %t %e %l [%i %s] (%c) %m\n", who=LogContext(client="c1"))
    assert shown == "77 2026-08-01T00:00:00Z 042 info [c1 none] (startup) hello"


@pytest.mark.parametrize("flag", ["%i", "%s", "%u", "%d", "%r", "%h", "%H", "%x"])
def test_absent_value_prints_none(flag: str) -> None:
    assert line(flag, who=NOBODY) == "none"


@pytest.mark.parametrize("template", ["%q", "%m %", "%é"])
def test_unknown_flag_is_an_error(template: str) -> None:
    with pytest.raises(ValueError, match="unknown flag"):
        compile_format(template, pid=1)


def test_time_follows_the_record() -> None:
    formatter = compile_format("%t", pid=1)
    seconds = [formatter(now, "info", "", "", NOBODY)[-3:-1] for now in (0.0, 0.9, 1.0, 59.0, 0.0)]
    assert seconds == ["00", "00", "01", "59", "00"]


@pytest.mark.parametrize(
    "nasty", ["a\nb", "a\rb", "a\x1b[31m", "a\x00", "a\x85b", "a\u2028b", "a\u202eb", "a\udc80b", "a\x9b31m"]
)
def test_nobody_breaks_or_disguises_a_line(nasty: str) -> None:
    who = LogContext(
        user=nasty, database=nasty, external_id=nasty, client=nasty, server=nasty, client_host=nasty
    )
    for template in ("%m|%u|%d|%x|%i|%s|%h", "%M", "json"):
        shown = line(template, message=nasty, who=who)
        assert shown.isprintable()
        assert len(shown.splitlines()) == 1


def test_plain_text_of_any_language_stays_as_it_is() -> None:
    assert escape("Grüße, 世界") == "Grüße, 世界"


def test_tskv_message_escapes_what_would_end_a_field() -> None:
    assert line("m=%M", message="a=b\tc\\d\ne\r\0\x01") == r"m=a\=b\tc\\d\ne\r\0\x01"


def test_json_is_one_object_with_nulls_for_what_is_absent() -> None:
    assert json.loads(line("json", message='say "hi"\n')) == {
        "timestamp": "2026-08-01T00:00:00.042Z",
        "pid": 77,
        "level": "info",
        "context": "startup",
        "message": 'say "hi"\n',
        "client": {"id": "c00000000002a", "ip": "10.0.0.1", "port": 5555, "user": "u", "database": "d"},
        "server": {"id": "s00000000002b"},
    }
    absent = json.loads(line("json", who=NOBODY))
    assert set(absent["client"].values()) == {None}
    assert absent["server"] == {"id": None}


@pytest.mark.parametrize("template", ["%m", "%M", "json"])
def test_an_endless_message_is_cut(template: str) -> None:
    shown = line(template, message="x" * (MAX_MESSAGE + 5))
    assert len(shown) < MAX_MESSAGE + 500
    assert "(5 more characters)" in shown


def test_ids_are_a_letter_and_twelve_hex_digits() -> None:
    assert client_id(0xA1B2C3) == "c000000a1b2c3"
    assert server_id(2**48 - 1) == "sffffffffffff"


def make_logger(lines: list[tuple[str, str]], flushed: list[int], *, is_debug: bool) -> Logger:
    formatter = compile_format("%l %c %m", pid=os.getpid())
    return Logger(
        formatter,
        lambda level, text: lines.append((level, text)),
        lambda: NOW,
        is_debug=is_debug,
        flush=lambda: flushed.append(len(lines)),
    )


def test_logger_writes_each_level_and_debug_only_where_asked() -> None:
    for is_debug in (False, True):
        lines: list[tuple[str, str]] = []
        flushed: list[int] = []
        logger = make_logger(lines, flushed, is_debug=is_debug)
        for write in (logger.debug, logger.info, logger.error, logger.fatal):
            write("text", context="here", who=WHO)
        levels = ["debug", "info", "error", "fatal"][0 if is_debug else 1 :]
        assert lines == [(level, f"{level} here text") for level in levels]
        assert flushed == [len(lines)]
