"""``gpooler check`` and the rest of the command line."""

import subprocess
import sys
from pathlib import Path

import pytest

from gpooler import __version__
from gpooler.cli import main
from gpooler.config.load import load, load_text

DEMO = Path(__file__).parent / "data" / "demo.toml"


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """The demo as a file of our own: who may read a checked-out one is not for a test to say."""
    path = tmp_path / "demo.toml"
    path.write_text(DEMO.read_text())
    path.chmod(0o600)
    return path


def test_check_says_that_a_good_configuration_is_valid(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "-c", str(demo)]) == 0
    output, errors = capsys.readouterr()
    assert f"{demo}: the configuration is valid (1 rule)" in output
    assert "pool_discard: " in output
    assert errors == ""


def test_check_prints_every_error_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.toml"
    path.write_text(DEMO.read_text().replace("pool_size", "pool_sise").replace("4000", '"x"'))
    assert main(["check", "-c", str(path), "--effective"]) == 1
    output, errors = capsys.readouterr()
    assert output == ""
    assert (
        f"error: {path}:24: database.order_app.user.default.pool_sise: "
        'unknown key (did you mean "pool_size"?)\n' in errors
    )
    assert f"error: {path}:25: database.order_app.user.default.pool_timeout: must be a whole number" in errors
    assert f"{path}: 2 errors" in errors


def test_check_prints_warnings_and_succeeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.toml"
    path.write_text(DEMO.read_text() + "catchup_checks = 5\n")
    assert main(["check", "-c", str(path)]) == 0
    assert f"warning: {path}:26: " in capsys.readouterr().err


def test_check_prints_the_effective_configuration_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "-c", str(DEMO), "--effective"]) == 0
    printed = capsys.readouterr().out
    assert "secret" not in printed.replace("not shown", "")
    assert load_text(printed).config.limits == load(DEMO).config.limits


def test_a_file_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "-c", "no-such-file.toml"]) == 1
    assert "cannot read no-such-file.toml: No such file or directory" in capsys.readouterr().err


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"gpooler {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["check"], ["chekc", "-c", "x"], ["check", "-c", "x", "y"]])
def test_a_command_line_that_makes_no_sense_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: gpooler" in capsys.readouterr().err


def test_a_check_imports_no_machinery() -> None:
    code = (
        "import sys; from gpooler.cli import main; main(['check', '-c', sys.argv[1]]);"
        "sys.exit(bool({'gevent', 'ssl', 'gpooler.relay.relay'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(DEMO)], capture_output=True).returncode == 0


def test_a_reader_that_has_seen_enough_is_no_error(demo: Path) -> None:
    command = [sys.executable, "-m", "gpooler", "check", "--effective", "-c", str(demo)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
