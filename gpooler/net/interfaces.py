"""The addresses of this machine and the networks it is in, as getifaddrs(3) tells them."""

import ctypes
import socket
from ctypes import POINTER, Structure, c_char_p, c_int, c_uint, c_uint16, c_void_p
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, Final

from gpooler.auth.hba import Interfaces

_SIZES: Final[dict[int, tuple[int, int]]] = {
    socket.AF_INET: (4, 4),
    socket.AF_INET6: (8, 16),
}  # offset and length in a sockaddr


class _Entry(Structure):
    pass


_Entry._fields_ = [
    ("next", POINTER(_Entry)),
    ("name", c_char_p),
    ("flags", c_uint),
    ("address", c_void_p),
    ("mask", c_void_p),
    ("other", c_void_p),
    ("data", c_void_p),
]


def interfaces() -> Interfaces:
    """As they are now. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.getifaddrs.argtypes = [POINTER(POINTER(_Entry))]
    libc.getifaddrs.restype = c_int
    libc.freeifaddrs.argtypes = [POINTER(_Entry)]
    libc.freeifaddrs.restype = None
    first = POINTER(_Entry)()
    if libc.getifaddrs(ctypes.byref(first)) != 0:
        error = ctypes.get_errno()
        raise OSError(error, "getifaddrs")
    addresses, networks = set(), []
    try:
        entry: Any = first
        while entry:
            address, mask = _address(entry.contents.address), _address(entry.contents.mask)
            if address is not None:
                addresses.add(address)
                if mask is not None:
                    prefix = int(mask).bit_count()
                    networks.append(ip_network(f"{address}/{prefix}", strict=False))
            entry = entry.contents.next
    finally:
        libc.freeifaddrs(first)
    return Interfaces(tuple(dict.fromkeys(networks)), frozenset(addresses))


def _address(pointer: Any) -> IPv4Address | IPv6Address | None:
    """The IP address of a sockaddr; None for another family, or none."""
    if not pointer:
        return None
    size = _SIZES.get(c_uint16.from_address(pointer).value)
    if size is None:
        return None
    offset, length = size
    return ip_address(ctypes.string_at(pointer + offset, length))
