"""Packaging, and the build of the compiled relay.

``GPOOLER_DEBUG=1`` builds with bounds checks, assertions (``relay/check.pxi``) and an end to whatever C
leaves undefined (``-fsanitize=undefined``). Changing it rebuilds everything; otherwise only what changed
is built.
"""

import os
import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
RELAY = "gpooler/relay"
IS_DEBUG = os.environ.get("GPOOLER_DEBUG", "0") not in ("", "0")
FLAVOUR = "debug" if IS_DEBUG else "release"
FLAVOUR_STAMP = ROOT / "build" / "flavour"


def version() -> str:
    """The version that the package itself declares."""
    text = (ROOT / "gpooler" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise SystemExit("setup.py: gpooler/__init__.py declares no __version__")
    return match.group(1)


def is_other_flavour() -> bool:
    """Whether what was last built was built with the other setting of GPOOLER_DEBUG."""
    return not FLAVOUR_STAMP.exists() or FLAVOUR_STAMP.read_text() != FLAVOUR


def extensions() -> list[Extension]:
    """One extension module for each ``.pyx``."""
    sources = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "gpooler").rglob("*.pyx"))
    if not sources:
        return []
    from Cython.Build import cythonize

    headers = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / RELAY).glob("*.h"))
    macros: list[tuple[str, str | None]] = [("CYTHON_WITHOUT_ASSERTIONS", "1")]
    options = ["-O2", "-g", "-pthread"]
    if IS_DEBUG:
        macros = [("GPOOLER_DEBUG", "1")]
        options += ["-fsanitize=undefined", "-fno-sanitize-recover=undefined", "-fstack-protector-strong"]
    modules = [
        Extension(
            source.removesuffix(".pyx").replace("/", "."),
            [source],
            depends=headers,
            define_macros=macros,
            extra_compile_args=options,
            extra_link_args=options,
        )
        for source in sources
    ]
    return cythonize(
        modules,
        force=is_other_flavour(),
        compiler_directives={
            "language_level": 3,
            "boundscheck": IS_DEBUG,
            "wraparound": False,
            "cdivision": not IS_DEBUG,
            "initializedcheck": IS_DEBUG,
        },
    )


setup(
    name="gpooler",
    version=version(),
    description="A PostgreSQL connection pooler and request router",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The gpooler authors",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["gpooler", "gpooler.*"]),
    package_data={
        "gpooler": ["py.typed"],
        "gpooler.relay": ["*.pxd", "*.pxi", "*.pyi"],
        "gpooler.auth": ["*.pxd", "*.pyi"],
        "gpooler.client": ["*.pxd", "*.pyi"],
    },
    ext_modules=extensions(),
    # requirements.txt pins the versions that are tested; these are the packages themselves
    install_requires=[
        "cryptography",
        "gevent",
        "prometheus-client",
        "psycogreen",
        "psycopg2-binary",
        "pydantic>=2",
        "pyOpenSSL",
        "setproctitle",
        "statsd",
        "toml",
    ],
    extras_require={"ldap": ["python-ldap"], "pam": ["pamela"]},
    entry_points={"console_scripts": ["gpooler = gpooler.cli:main"]},
    zip_safe=False,
)

# only now: a build that failed is to be made again as a whole
FLAVOUR_STAMP.parent.mkdir(exist_ok=True)
FLAVOUR_STAMP.write_text(FLAVOUR)
