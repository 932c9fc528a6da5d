"""Builds the fuzzer in build/fuzz: what is fuzzed and the targets with sanitizers and libFuzzer.

Compiled modules are extension modules, as in gpooler itself; the driver loads them into its own Python.
Python code needs no build: it is that of this tree.
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
FUZZED: Final = (
    "client/entrance", "client/express", "relay/io", "relay/params", "relay/prepared", "relay/records",
    "relay/scanner", "relay/session", "relay/sql", "relay/tls",
)  # fmt: skip
COMPILED: Final = tuple(sorted(path.stem for path in (HERE / "targets").glob("*.pyx")))
IN_PYTHON: Final = tuple(sorted(path.stem for path in (HERE / "targets").glob("*.py")))
TARGETS: Final = (*COMPILED, *IN_PYTHON)
CYTHON: Final = ("-3", "-X", "boundscheck=True,wraparound=False,cdivision=False,initializedcheck=True")
# Calls through Cython's pointers of a more general type are no fault of ours, nor is its sum of NULL and 0.
SANITIZERS: Final = (
    "-fsanitize=address,undefined", "-fno-sanitize=function", "-fno-sanitize-recover=undefined",
)  # fmt: skip
OPTIONS: Final = ("-O1", "-g", "-fno-omit-frame-pointer", "-DGPOOLER_DEBUG=1", "-DCYTHON_VECTORCALL_TPNEW=0",
           *SANITIZERS)  # fmt: skip


def own_options(target: str) -> tuple[str, ...]:
    """What the fuzzer is told of a target: Python keeps what libFuzzer would take for leaks, and much."""
    return ("-detect_leaks=0", "-rss_limit_mb=8192") if target in IN_PYTHON else ()


def environment(target: str) -> dict[str, str]:
    """The fuzzer's environment: which target, and the sanitizers' options.

    libFuzzer's own option leaves the search for leaks at the end of the process, which was seen to die of
    reading at a bad address: probably what stands before a thread-local block that begins a page was taken
    for the block's address. Targets in Python need no search, the others none of such blocks.
    """
    options = "detect_leaks=0" if target in IN_PYTHON else "intercept_tls_get_addr=0"
    given = os.environ.get("ASAN_OPTIONS")
    return {
        **os.environ,
        "GPOOLER_FUZZ_TARGET": target,
        "ASAN_OPTIONS": f"{options}:{given}" if given else options,
    }


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
    sources = (ROOT / "gpooler").rglob("*.p[yx][xd]")
    files = [*sources, *HERE.rglob("*.p[yx][xd]"), HERE / "driver.c", Path(__file__)]
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
            f'-DPYTHON="{getattr(sys, "_base_executable", sys.executable)}"', f'-DROOT="{ROOT}"',
            f'-DSITE="{sysconfig.get_path("purelib")}"',
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
    """The extension modules, under their own names; ``instrumented`` finds them."""
    shutil.rmtree(MODULES, ignore_errors=True)
    MODULES.mkdir()
    sources = [ROOT / "gpooler" / f"{name}.pyx" for name in FUZZED]
    sources += [HERE / "targets" / f"{name}.pyx" for name in COMPILED]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: _module(clang, source), sources))


def _module(clang: str, source: Path) -> None:
    name = ".".join(source.relative_to(ROOT).with_suffix("").parts)
    made = TREE / f"{name}.c"
    _run(sys.executable, "-m", "cython", *CYTHON, "--module-name", name, "-I", ROOT, "-o", made, source)
    _run(
        clang, *OPTIONS, "-fsanitize=fuzzer-no-link", "-shared", "-fPIC", "-w",
        f"-I{sysconfig.get_path('include')}", made, "-o", MODULES / f"{name}.so",
    )  # fmt: skip
