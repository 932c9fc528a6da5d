"""Where log lines go: real files, a real standard output, a real thread."""

import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from gpooler.log import Level, LogSettings
from gpooler.logs.direct import DirectLog, open_direct
from gpooler.logs.queued import QueuedLog, open_log
from gpooler.logs.sinks import FileSink, Line, SyslogSink


class GateSink:
    """Holds up the writer thread until the gate opens."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.lines: list[str] = []
        self.lost = 0

    def write(self, lines: Sequence[Line]) -> int:
        self.entered.set()
        self.gate.wait()
        self.lines += [line for _, line in lines]
        return self.lost

    def reopen(self) -> None:
        self.lines.append("-- reopened")

    def close(self) -> None:
        self.lines.append("-- closed")


def listening(path: str) -> socket.socket:
    """A syslog daemon, as far as it listens."""
    daemon = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    daemon.bind(path)
    daemon.settimeout(10)
    return daemon


@pytest.fixture
def sink() -> Iterator[GateSink]:
    made = GateSink()
    yield made
    made.gate.set()


def test_lines_are_appended_to_the_file_and_reopen_follows_a_rotation(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    log = open_direct(LogSettings("%l %m", file=str(path), is_stdout=False))
    log.logger.info("one")
    path.rename(tmp_path / "log.1")
    log.logger.error("two")
    log.reopen()
    log.logger.info("three\udc80")
    log.close()
    assert (tmp_path / "log.1").read_text() == "before\ninfo one\nerror two\n"
    assert path.read_text() == "info three\\udc80\n"


def test_a_path_that_cannot_be_opened_is_told_on_stdout_and_its_lines_are_counted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lost: list[int] = []
    path = tmp_path / "missing" / "log"
    log = open_direct(LogSettings("%m", file=str(path)), lost.append)
    log.logger.info("one")
    shown = capfd.readouterr().out
    assert f"could not open log file '{path}'" in shown
    assert "\none\n" in shown
    assert lost == [1]
    path.parent.mkdir()
    log.reopen()
    log.logger.info("two")
    log.close()
    assert path.read_text() == "two\n"
    assert lost == [1]


def test_reopen_that_fails_keeps_the_old_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "d"
    directory.mkdir()
    sink = FileSink(str(directory / "log"))
    directory.rename(tmp_path / "moved")
    sink.reopen()
    assert sink.write([("info", "still here")]) == 0
    sink.close()
    assert (tmp_path / "moved" / "log").read_text() == "still here\n"
    assert "could not open" in capfd.readouterr().out


def test_syslog_takes_any_text(tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    sink = SyslogSink("gpooler-test", "local7", path)
    with listening(path) as daemon:
        assert sink.write([("info", "50% \udc80 %s %n"), ("fatal", "x")]) == 0
        head = rf"<190>\w{{3}} [ \d]\d \d\d:\d\d:\d\d gpooler-test\[{os.getpid()}\]: "
        assert re.fullmatch(head + r"50% \\udc80 %s %n", daemon.recv(1000).decode())
        assert re.fullmatch(head.replace("<190>", "<186>") + "x", daemon.recv(1000).decode())
    sink.close()
    with pytest.raises(KeyError):
        SyslogSink("gpooler-test", "mail2")


@pytest.mark.parametrize(("level", "priority"), [("debug", 31), ("info", 30), ("error", 27), ("fatal", 26)])
def test_the_level_is_the_priority_in_syslog(tmp_path: Path, level: Level, priority: int) -> None:
    path = str(tmp_path / "log")
    sink = SyslogSink("x", "daemon", path)
    with listening(path) as daemon:
        assert sink.write([(level, "text")]) == 0
        assert daemon.recv(1000).startswith(f"<{priority}>".encode())
    sink.close()


def test_a_syslog_daemon_that_is_away_costs_lines_and_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    sink = SyslogSink("x", "user", str(path))
    assert sink.write([("info", "one"), ("info", "two")]) == 2
    for _ in range(2):
        with listening(str(path)) as daemon:
            assert sink.write([("info", "here")]) == 0
            assert daemon.recv(1000).endswith(b": here")
        path.unlink()
    assert sink.write([("info", "gone")]) == 1
    sink.close()


def test_a_syslog_daemon_that_is_stuck_costs_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpooler.logs.sinks._SYSLOG_WAIT_S", 0.01)
    path = str(tmp_path / "log")
    sink = SyslogSink("x", "user", path)
    with listening(path) as daemon:
        sent = 0
        while not sink.write([("info", str(sent))]):  # until its queue is full
            sent += 1
        for number in range(sent):
            assert daemon.recv(1000).endswith(f": {number}".encode())
        assert sink.write([("info", "again")]) == 0
        assert daemon.recv(1000).endswith(b": again")
    sink.close()


def test_queued_lines_come_out_in_order_with_the_reopen_between(sink: GateSink) -> None:
    sink.gate.set()
    log = QueuedLog(LogSettings("%m"), [sink])
    for number in range(1500):
        log.logger.info(str(number))
    log.reopen()
    log.logger.fatal("last")
    assert sink.lines == [*map(str, range(1500)), "-- reopened", "last"]
    log.close()
    assert sink.lines[-1] == "-- closed"


def test_lines_beyond_the_depth_are_dropped_and_counted_while_the_sink_is_stuck(sink: GateSink) -> None:
    told: list[int] = []
    log = QueuedLog(LogSettings("%m", queue_depth=3), [sink], told.append)
    log.logger.info("in the sink")
    assert sink.entered.wait(10)
    for number in range(5):
        log.logger.info(str(number))
    sink.gate.set()
    log.flush()
    log.logger.info("after")
    log.close()
    assert sink.lines == ["in the sink", "0", "1", "2", "after", "-- closed"]
    assert told == [1, 2]


def test_lines_a_sink_lost_are_counted_at_the_next_line(sink: GateSink) -> None:
    told: list[int] = []
    sink.gate.set()
    sink.lost = 1
    log = QueuedLog(LogSettings("%m"), [sink], told.append)
    log.logger.info("one")
    log.flush()
    log.logger.info("two")
    log.close()
    assert told == [1]


def test_log_async_decides_which_log_is_opened(tmp_path: Path) -> None:
    for is_async, kind in ((True, QueuedLog), (False, DirectLog)):
        path = tmp_path / kind.__name__
        log = open_log(LogSettings("%m", file=str(path), is_stdout=False, is_async=is_async))
        assert isinstance(log, kind)
        log.logger.info("x")
        log.close()
        assert path.read_text() == "x\n"


def test_the_hub_runs_while_a_reader_of_stdout_is_stuck() -> None:
    program = textwrap.dedent("""
        from gpooler.logs.queued import open_log
        from gpooler.log import Level, LogSettings
        import gevent.monkey; gevent.monkey.patch_all()
        import os, gevent
        os.set_blocking(1, False)
        log = open_log(LogSettings("%m"))
        for number in range(5000):
            log.logger.info(f"{number:040d}")
        gevent.sleep(0.05)
        os.write(2, b"hub runs\\n")
        os.read(0, 1)
        log.close()
    """)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "hub runs\n"
        out, errors = process.communicate("x", timeout=20)
    assert errors == ""
    assert out.split() == [f"{number:040d}" for number in range(5000)]


def test_a_reader_of_standard_output_that_stopped_costs_lines_and_nothing_else() -> None:
    script = """
import sys
from gpooler.log import LogSettings
from gpooler.logs.direct import open_direct
log = open_direct(LogSettings("%m"), lambda total: print(total, file=sys.stderr))
for _ in range(100):
    log.logger.info("x" * 3000)
log.close()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        lost = int(process.stderr.read().split()[-1])  # it has ended, and nobody has read its lines
        lines = process.stdout.read().splitlines()
    assert 0 < lost < 100
    assert lines == ["x" * 3000] * (100 - lost)
