"""The one place that knows how to reach a libcrypto whose ciphers can be called from C.

The OpenSSL inside ``cryptography`` gives none of its ciphers away. psycopg2 brings another, or uses the
system's: the dynamic linker finds it behind psycopg2's own library.
"""

import ctypes
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Final

from gpooler.errors import ConfigurationError
from gpooler.relay import records

_INSTEAD: Final = 'set performance.tls_records = "openssl"'


@cache
def load() -> None:
    """Give the relay the addresses. Raises ConfigurationError when there is no such libcrypto."""
    package = find_spec("psycopg2")
    found = package and PathFinder.find_spec("_psycopg", package.submodule_search_locations)
    if not found or found.origin is None:
        raise ConfigurationError(f"TLS: no library of psycopg2 is found; {_INSTEAD}")
    try:
        library = ctypes.CDLL(found.origin)
        records.load({name: _address(library, name) for name in records.NAMES})
        if not records.suite_names():
            raise ValueError("no cipher of TLS 1.3")
    except (OSError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"TLS: psycopg2 comes without the libcrypto of OpenSSL 3 ({error}); {_INSTEAD}"
        ) from error


def _address(library: ctypes.CDLL, name: str) -> int:
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    if address is None:
        raise ValueError(name)
    return address
