"""Builds the fuzzer in build/fuzz: the relay's leaves and the targets with sanitizers and libFuzzer.

Leaves and targets are extension modules, as in gpooler itself; the driver loads them into its own Python.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from tests.harness import Unavailable

ROOT: Final = Path(__file__).resolve().parents[2]
HERE: Final = ROOT / "tests" / "fuzz"
TREE: Final = ROOT / "build" / "fuzz"
BINARY: Final = TREE / "fuzzer"
MODULES: Final = TREE / "modules"
LEAVES: Final = ("scanner", "sql", "session", "prepared", "params", "io")
TARGETS: Final = tuple(sorted(path.stem for path in (HERE / "targets").glob("*.pyx")))
CYTHON: Final = ("-3", "-X", "boundscheck=True,wraparound=False,cdivision=False,initializedcheck=True")
# Calls through Cython's pointers of a more general type are no fault of ours.
SANITIZERS: Final = (
    "-fsanitize=address,undefined", "-fno-sanitize=function", "-fno-sanitize-recover=undefined",
)  # fmt: skip
OPTIONS: Final = ("-O1", "-g", "-fno-omit-frame-pointer", "-DGPOOLER_DEBUG=1", *SANITIZERS)


def build() -> Path:
    """The fuzzer, built anew if a source has changed; Unavailable says what is missing."""
    clang = shutil.which("clang")
    if clang is None:
        raise Unavailable("clang is not installed (Debian: clang and libclang-rt-14-dev)")
    TREE.mkdir(parents=True, exist_ok=True)
    with open(TREE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = TREE / "built"
        wanted = _digest(clang)
        if not (stamp.exists() and stamp.read_text() == wanted):
            stamp.unlink(missing_ok=True)
            _driver(clang)
            _modules(clang)
            stamp.write_text(wanted)
    return BINARY


def _digest(clang: str) -> str:
    """What the fuzzer is made from."""
    relay = ROOT / "gpooler" / "relay"
    files = [*relay.glob("*.p[yx][xd]"), *HERE.rglob("*.p[yx][xd]"), HERE / "driver.c", Path(__file__)]
    digest = hashlib.sha256((sys.version + subprocess.getoutput(f"{clang} --version")).encode())
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")


def _driver(clang: str) -> None:
    """The program, first: it shows whether the sanitizers' libraries and Python's are there."""
    config = sysconfig.get_config_vars()
    try:
        _run(
            clang, *OPTIONS, "-fsanitize=fuzzer", "-rdynamic", f"-I{sysconfig.get_path('include')}",
            f'-DPYTHON="{getattr(sys, "_base_executable", sys.executable)}"', f'-DMODULES="{MODULES}"',
            HERE / "driver.c", "-o", BINARY,
            f"-L{config['LIBDIR']}", f"-Wl,-rpath,{config['LIBDIR']}", f"-lpython{config['LDVERSION']}",
            *config["LIBS"].split(), *config["SYSLIBS"].split(),
        )  # fmt: skip
    except Unavailable as error:
        raise Unavailable(
            "no program with libFuzzer and an embedded Python can be linked"
            f" (Debian: libclang-rt-14-dev, libpython3-dev)\n{error}"
        ) from error


def _modules(clang: str) -> None:
    """The extension modules: the leaves under their own names, the targets in a package of theirs."""
    shutil.rmtree(MODULES, ignore_errors=True)
    sources = {f"gpooler.relay.{leaf}": ROOT / "gpooler" / "relay" / f"{leaf}.pyx" for leaf in LEAVES}
    sources |= {f"targets.{target}": HERE / "targets" / f"{target}.pyx" for target in TARGETS}
    for package in ("gpooler", "gpooler/relay", "targets"):
        (MODULES / package).mkdir(parents=True)
        (MODULES / package / "__init__.py").touch()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda item: _module(clang, *item), sources.items()))


def _module(clang: str, name: str, source: Path) -> None:
    made = TREE / f"{name}.c"
    _run(sys.executable, "-m", "cython", *CYTHON, "--module-name", name, "-I", ROOT, "-o", made, source)
    _run(
        clang, *OPTIONS, "-fsanitize=fuzzer-no-link", "-shared", "-fPIC", "-w",
        f"-I{sysconfig.get_path('include')}", made, "-o", MODULES / f"{name.replace('.', '/')}.so",
    )  # fmt: skip
