"""Messages between processes as datagrams: frozen dataclasses to JSON arrays and back, strictly checked.

A datagram is ``[tag, field, …]`` in the order of the dataclass' fields; the tag is the class name. A
field is an int, bool, str, ``dict[str, str]``, ``str | int | None``, an IntEnum, another dataclass (a nested
array), a ``tuple[X, ...]`` or ``X | None``.
Strings may hold lone surrogates (``surrogateescape``): they survive.
A class says in ``DESCRIPTORS`` how many file descriptors travel with it; the transport checks that.
"""

import json
import types
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from enum import IntEnum
from typing import Any, ClassVar, Final, Protocol, Union, get_args, get_origin, get_type_hints

from gpooler.errors import InternalError

MAX_DATAGRAM: Final = 131_072  # bytes; Linux' default send buffer (212,992) takes one of this size
_INT_LIMIT: Final = 1 << 63

_Pack = Callable[[Any], Any]
_Unpack = Callable[[Any], Any]


class ChannelProtocolError(InternalError):
    """Another process of ours said what it must not say: a bug, or versions mixed up."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause=cause)

    def __str__(self) -> str:
        return self.cause


class Message(Protocol):
    """What the codec takes: a frozen dataclass with its number of descriptors."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    DESCRIPTORS: ClassVar[int]


class Codec:
    """Encodes and decodes a closed set of message classes."""

    def __init__(self, messages: Iterable[type[Message]]) -> None:
        self._by_tag: dict[str, tuple[type[Message], _Unpack]] = {}
        self._pack: dict[type[Message], _Pack] = {}
        for message in messages:
            pack, unpack = _dataclass_codec(message)
            self._by_tag[message.__name__] = (message, unpack)
            self._pack[message] = pack

    def encode(self, message: Message) -> bytes:
        """The datagram of ``message``. Raises ChannelProtocolError: unknown class or over MAX_DATAGRAM."""
        pack = self._pack.get(type(message))
        if pack is None:
            raise ChannelProtocolError(f"{type(message).__name__} is not a message of this channel")
        text = json.dumps([type(message).__name__, *pack(message)], separators=(",", ":"))
        if len(text) > MAX_DATAGRAM:
            raise ChannelProtocolError(f"{type(message).__name__} of {len(text)} bytes is too long")
        return text.encode("ascii")

    def decode(self, datagram: bytes) -> Message:
        """The message in ``datagram``. Raises ChannelProtocolError for anything but a valid message."""
        try:
            values = json.loads(datagram)
        except (ValueError, RecursionError) as error:
            raise ChannelProtocolError(f"datagram of {len(datagram)} bytes is not JSON: {error}") from error
        if not isinstance(values, list) or not values or not isinstance(values[0], str):
            raise ChannelProtocolError("datagram is not an array that begins with a tag")
        entry = self._by_tag.get(values[0])
        if entry is None:
            raise ChannelProtocolError(f"unknown message {values[0][:40]!r}")
        try:
            message: Message = entry[1](values[1:])
        except _Mismatch as error:
            raise ChannelProtocolError(f"{values[0]}: {error}") from error
        return message


class _Mismatch(ValueError):
    """A value that is not of the declared type."""


def _same(value: Any) -> Any:
    return value


def _unpack_int(value: Any) -> int:
    if type(value) is not int or not -_INT_LIMIT <= value < _INT_LIMIT:
        raise _Mismatch(f"{value!r:.40} is not a 64-bit integer")
    return value


def _unpack_bool(value: Any) -> bool:
    if type(value) is not bool:
        raise _Mismatch(f"{value!r:.40} is not a boolean")
    return value


def _unpack_str(value: Any) -> str:
    if type(value) is not str:
        raise _Mismatch(f"{value!r:.40} is not a string")
    return value


def _unpack_cell(value: Any) -> str | int | None:
    if value is not None and type(value) is not str:
        return _unpack_int(value)
    return value


def _unpack_dict(value: Any) -> dict[str, str]:
    if type(value) is not dict or not all(type(item) is str for item in value.values()):
        raise _Mismatch("not an object of strings")
    return value


def _codec_of(kind: Any) -> tuple[_Pack, _Unpack]:
    """How a field of type ``kind`` is packed and unpacked. Raises TypeError for types not provided for."""
    simple: dict[Any, _Unpack] = {
        int: _unpack_int,
        bool: _unpack_bool,
        str: _unpack_str,
        dict[str, str]: _unpack_dict,
        str | int | None: _unpack_cell,
    }
    if kind in simple:
        return _same, simple[kind]
    if isinstance(kind, type) and issubclass(kind, IntEnum):
        return int, _enum_unpack(kind)
    if get_origin(kind) is tuple and get_args(kind)[1:] == (Ellipsis,):
        return _tuple_codec(*_codec_of(get_args(kind)[0]))
    if get_origin(kind) in (Union, types.UnionType) and get_args(kind)[1:] == (types.NoneType,):
        return _optional_codec(*_codec_of(get_args(kind)[0]))
    if is_dataclass(kind) and isinstance(kind, type):
        return _dataclass_codec(kind)
    raise TypeError(f"messages cannot carry {kind}")


def _enum_unpack(kind: type[IntEnum]) -> _Unpack:
    def unpack(value: Any) -> IntEnum:
        try:
            return kind(_unpack_int(value))
        except ValueError as error:
            raise _Mismatch(f"{value!r:.40} is not a {kind.__name__}") from error

    return unpack


def _tuple_codec(pack: _Pack, unpack: _Unpack) -> tuple[_Pack, _Unpack]:
    def unpack_all(value: Any) -> tuple[Any, ...]:
        if type(value) is not list:
            raise _Mismatch("not an array")
        return tuple(unpack(item) for item in value)

    return (lambda value: [pack(item) for item in value]), unpack_all


def _optional_codec(pack: _Pack, unpack: _Unpack) -> tuple[_Pack, _Unpack]:
    return (
        lambda value: None if value is None else pack(value),
        lambda value: None if value is None else unpack(value),
    )


def _dataclass_codec(kind: type[Any]) -> tuple[_Pack, _Unpack]:
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]
    codecs = [_codec_of(hints[name]) for name in names]

    def pack(value: Any) -> list[Any]:
        return [codec[0](getattr(value, name)) for name, codec in zip(names, codecs, strict=True)]

    def unpack(value: Any) -> Any:
        if type(value) is not list or len(value) != len(names):
            raise _Mismatch(f"not an array of {len(names)} fields")
        return kind(*(codec[1](item) for item, codec in zip(value, codecs, strict=True)))

    return pack, unpack
