"""The kinds of value an option takes: how each is read from TOML, and how it is described.

A kind is put beside the type of a field (``Annotated[int, Number("ms")]``). Its ``parse`` raises
``ValueError`` whose text goes to the user as it stands; the text of a secret's kind never holds the value.
"""

import math
import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Annotated, Any, Final, Literal

from pydantic import GetCoreSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, core_schema

from gpooler.auth.host_name import host_name

INT_MAX: Final = 2**31 - 1  # every number ends in a C int somewhere
SIZE_MAX: Final = 2**53  # sizes are kept exact in JSON and in doubles

TIME_UNITS_US: Final = {
    "us": 1,
    "ms": 1_000,
    "s": 1_000_000,
    "min": 60_000_000,
    "h": 3_600_000_000,
    "d": 86_400_000_000,
}
SIZE_UNITS: Final = {
    "B": 1,
    "K": 1 << 10,
    "KB": 1 << 10,
    "M": 1 << 20,
    "MB": 1 << 20,
    "G": 1 << 30,
    "GB": 1 << 30,
}
QUANTITY: Final = re.compile(r"\s*(-?[0-9]{1,18})\s*([A-Za-z]+)\s*", re.ASCII)


class Secret:
    """A text that is never shown. Compared by value; ``source`` says where it was read from."""

    __slots__ = ("_value", "source")

    def __init__(self, value: str, source: tuple[str, str] | None = None) -> None:
        """``source`` is ``("file", path)`` or ``("env", name)``; None when it stands in the configuration."""
        self._value = value
        self.source = source

    def get_secret_value(self) -> str:
        """The text itself."""
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return "Secret('**********')"

    __str__ = __repr__


SecretReader = Callable[[str, str], Secret]  # (file or env, its name) -> the secret; raises ValueError


class Kind:
    """How one kind of value is read and described."""

    def parse(self, value: Any) -> Any:
        """The value as the model keeps it; raises ``ValueError`` with a text for the user."""
        raise NotImplementedError

    def describe(self) -> str:
        """A few words for the table of options."""
        raise NotImplementedError

    def short(self) -> str:
        """The same in a word or two, for tables."""
        return self.describe()

    def known_words(self) -> tuple[str, ...]:
        """The words a value may be, where it is one of a few."""
        return ()

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.parse)


@dataclass(frozen=True)
class Number(Kind):
    """A whole number in ``unit``; with a time unit also a text that brings its own, such as ``"4s"``."""

    unit: Literal["", "us", "ms", "s"] = ""
    least: int = 0
    most: int = INT_MAX

    def parse(self, value: Any) -> int:
        if isinstance(value, str) and self.unit:
            value = self._with_unit(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"must be {self.describe()}")
        if not self.least <= value <= self.most:
            bound = f"at least {self.least}" if value < self.least else f"at most {self.most}"
            raise ValueError(f"must be {bound}{self.unit and ' ' + self.unit}")
        return value

    def _with_unit(self, text: str) -> int:
        match = QUANTITY.fullmatch(text)
        unit = TIME_UNITS_US.get(match[2]) if match else None
        if match is None or unit is None:
            raise ValueError(f"must be {self.describe()}; units are {', '.join(TIME_UNITS_US)}")
        value, rest = divmod(int(match[1]) * unit, TIME_UNITS_US[self.unit])
        if rest:
            raise ValueError(f"must be a whole number of {self.unit}")
        return value

    def describe(self) -> str:
        if self.unit:
            return f'a whole number of {self.unit}, or a text with a unit such as "4s"'
        return "a whole number"

    def short(self) -> str:
        return self.unit or "number"


@dataclass(frozen=True)
class Size(Kind):
    """A number of bytes, or a text with a unit such as ``"750MB"``."""

    def parse(self, value: Any) -> int:
        if isinstance(value, str):
            match = QUANTITY.fullmatch(value)
            unit = SIZE_UNITS.get(match[2].upper()) if match else None
            value = int(match[1]) * unit if match and unit else None
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"must be {self.describe()}; units are {', '.join(SIZE_UNITS)}")
        if not 0 < value <= SIZE_MAX:
            raise ValueError(
                "must be more than nothing" if value <= 0 else f"must be at most {SIZE_MAX} bytes"
            )
        return value

    def describe(self) -> str:
        return 'a number of bytes, or a text with a unit such as "750MB"'

    def short(self) -> str:
        return "bytes"


@dataclass(frozen=True)
class YesNo(Kind):
    """A boolean: TOML's, or Odyssey's ``"yes"`` and ``"no"``."""

    def parse(self, value: Any) -> bool:
        if isinstance(value, bool):
            return value
        if value in ("yes", "no"):
            return bool(value == "yes")
        raise ValueError(f"must be {self.describe()}")

    def describe(self) -> str:
        return 'true or false (or "yes", "no")'

    def short(self) -> str:
        return "boolean"


def plain_text(value: Any, what: str = "a text") -> str:
    """``value`` as a text that can travel as a C string; raises ``ValueError`` for anything else."""
    if not isinstance(value, str):
        raise ValueError(f"must be {what}")
    if "\0" in value:
        raise ValueError("must not hold a zero byte")
    return value


@dataclass(frozen=True)
class Text(Kind):
    """A text, not empty."""

    most: int = 65_535  # characters; nothing an option means is longer

    def parse(self, value: Any) -> str:
        text = plain_text(value)
        if not text:
            raise ValueError("must not be empty")
        if len(text) > self.most:
            raise ValueError(f"must be at most {self.most} characters")
        return text

    def describe(self) -> str:
        return "text"


@dataclass(frozen=True)
class EntryPoint(Kind):
    """The name of a Python function."""

    def parse(self, value: Any) -> str:
        text = plain_text(value)
        name = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
        if not re.fullmatch(f"{name}:{name}", text):
            raise ValueError(f"must be {self.describe()}")
        return text

    def describe(self) -> str:
        return "the name of a Python function, package.module:function"

    def short(self) -> str:
        return "function"


@dataclass(frozen=True)
class PlainSql(Kind):
    """SQL that is sent whatever a session's ``client_encoding`` is: ASCII, and not empty."""

    def parse(self, value: Any) -> str:
        text: str = Text().parse(value)
        if not text.isascii():
            raise ValueError("must be ASCII, which means the same in every client_encoding")
        if not text.strip(" \t\r\n;"):
            raise ValueError("must not be empty")
        return text

    def describe(self) -> str:
        return "text in ASCII"

    def short(self) -> str:
        return "text"


@dataclass(frozen=True)
class FreeText(Kind):
    """A text that may be empty."""

    most: int = 65_535

    def parse(self, value: Any) -> str:
        text = plain_text(value)
        if len(text) > self.most:
            raise ValueError(f"must be at most {self.most} characters")
        return text

    def describe(self) -> str:
        return "text"


@dataclass(frozen=True)
class SecretText(Kind):
    """A text that is never shown; also ``{ file = "…" }`` or ``{ env = "…" }``."""

    def parse_in(self, value: Any, info: ValidationInfo) -> Any:
        """As ``parse``; the context of the validation holds the ``SecretReader``."""
        if isinstance(value, Secret):
            return value
        if isinstance(value, str):
            secret = Secret(value)
        elif isinstance(value, dict) and len(value) == 1 and isinstance(info.context, dict):
            ((kind, name),) = value.items()
            if kind not in ("file", "env") or not isinstance(name, str):
                raise ValueError(f"must be {self.describe()}")
            reader: SecretReader = info.context["read_secret"]
            secret = reader(kind, name)
        else:
            raise ValueError(f"must be {self.describe()}")
        if not secret.get_secret_value():
            raise ValueError("must not be empty")
        if "\0" in secret.get_secret_value():
            raise ValueError("must not hold a zero byte")
        return secret

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(self.parse_in)

    def describe(self) -> str:
        return 'text, { file = "…" } or { env = "…" }'

    def short(self) -> str:
        return "secret"


@dataclass(frozen=True)
class SecretTexts(SecretText):
    """One such text or a list of them, kept as a tuple."""

    most: int = 8  # each is tried at every login

    def parse_in(self, value: Any, info: ValidationInfo) -> Any:
        """As ``SecretText``."""
        if not isinstance(value, list | tuple):
            return (super().parse_in(value, info),)
        if not 0 < len(value) <= self.most:
            raise ValueError(f"must be a list of 1 to {self.most}")
        return tuple(super(SecretTexts, self).parse_in(item, info) for item in value)

    def describe(self) -> str:
        return f"{super().describe()}, or a list of these"

    def short(self) -> str:
        return "secrets"


@dataclass(frozen=True)
class OneOf(Kind):
    """One word of an enum."""

    words: type[StrEnum]

    def parse(self, value: Any) -> StrEnum:
        try:
            return self.words(value)
        except ValueError:
            raise ValueError(f"must be {self.describe()}") from None

    def known_words(self) -> tuple[str, ...]:
        return tuple(self.words)

    def describe(self) -> str:
        return "one of " + ", ".join(f'"{word}"' for word in self.words)

    def short(self) -> str:
        return ", ".join(self.words)


@dataclass(frozen=True)
class TextList(Kind):
    """A list of texts, kept as a tuple; one text stands for a list of one."""

    def parse(self, value: Any) -> tuple[str, ...]:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ValueError(f"must be {self.describe()}")
        return tuple(Text().parse(item) for item in items)

    def describe(self) -> str:
        return "text or a list of texts"

    def short(self) -> str:
        return "texts"


@dataclass(frozen=True)
class Quantiles(Kind):
    """Numbers from 0 to 1, as a list or as Odyssey's text ``"0.99,0.95"``."""

    def parse(self, value: Any) -> tuple[float, ...]:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or any(isinstance(item, bool) for item in items):
            raise ValueError(f"must be {self.describe()}")
        try:
            numbers = tuple(float(item) for item in items)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"must be {self.describe()}") from None
        if not all(math.isfinite(number) and 0 <= number <= 1 for number in numbers):
            raise ValueError("must be numbers from 0 to 1")
        return numbers

    def describe(self) -> str:
        return 'a list of numbers from 0 to 1, or a text such as "0.99,0.95"'

    def short(self) -> str:
        return "numbers from 0 to 1"


@dataclass(frozen=True)
class Parameters(Kind):
    """A table of server parameters, name to value; numbers and booleans become their PostgreSQL texts."""

    forbidden: Mapping[str, str]  # lower-case name -> what to do instead

    def parse(self, value: Any) -> Mapping[str, str]:
        if not isinstance(value, dict):
            raise ValueError(f"must be {self.describe()}")
        result: dict[str, str] = {}
        seen: set[str] = set()
        for name, item in value.items():
            Text(63).parse(name)
            if name.lower() in self.forbidden:
                raise ValueError(f'must not hold "{name}": {self.forbidden[name.lower()]}')
            if name.lower() in seen:
                raise ValueError(f'holds "{name}" twice, in different case')
            seen.add(name.lower())
            if isinstance(item, bool):
                item = "on" if item else "off"
            elif isinstance(item, int | float):
                item = str(item)
            result[name] = plain_text(item, f'{self.describe()}; look at "{name}"')
        return result

    def describe(self) -> str:
        return "a table of server parameters"

    def short(self) -> str:
        return "parameters"

    def __hash__(self) -> int:
        return hash(tuple(self.forbidden))


@dataclass(frozen=True)
class Workers(Kind):
    """A number of processes, or ``"auto"``."""

    most: int = 1024  # far above any machine's cores; a typing mistake must not fork for ever

    def parse(self, value: Any) -> int | str:
        if value == "auto":
            return "auto"
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= self.most:
            raise ValueError(f"must be {self.describe()}")
        return value

    def describe(self) -> str:
        return f'"auto" or a whole number from 1 to {self.most}'


@dataclass(frozen=True)
class SignalName(Kind):
    """A signal by name, with or without SIG; kept with it."""

    def parse(self, value: Any) -> str:
        name = plain_text(value).upper().removeprefix("SIG")
        try:
            return signal.Signals[f"SIG{name}"].name
        except KeyError:
            raise ValueError(f"must be {self.describe()}") from None

    def describe(self) -> str:
        return 'the name of a signal, such as "SIGTERM" or "TERM"'

    def short(self) -> str:
        return "signal"


@dataclass(frozen=True)
class FileMode(Kind):
    """Permission bits in octal, as text."""

    def parse(self, value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"0?[0-7]{3}", value, re.ASCII):
            return int(value, 8)
        raise ValueError(f"must be {self.describe()}")

    def describe(self) -> str:
        return 'an octal text such as "0644"'


@dataclass(frozen=True)
class ClientAddress(Kind):
    """An IP network or a host name; ``"default"`` is any address, Unix sockets included, and kept as None."""

    def parse(self, value: Any) -> IPv4Network | IPv6Network | str | None:
        if value is None or value == "default":
            return None
        if not isinstance(value, str):
            raise ValueError(f"must be {self.describe()}")
        try:
            return ip_network(value, strict=False)
        except ValueError:
            pass
        try:
            return host_name(value)
        except ValueError as error:
            raise ValueError(f"must be {self.describe()}; {error}") from None

    def describe(self) -> str:
        return 'an address such as "10.0.0.0/8" or "2001:db8::1", a host name, or "default"'

    def short(self) -> str:
        return "network or host name"


@dataclass(frozen=True)
class Networks(Kind):
    """A list of IP networks, kept as a tuple; one stands for a list of one."""

    def parse(self, value: Any) -> tuple[IPv4Network | IPv6Network, ...]:
        items = value if isinstance(value, list | tuple) else [value]
        try:
            return tuple(ip_network(plain_text(item), strict=False) for item in items)
        except ValueError:
            raise ValueError(f"must be {self.describe()}") from None

    def describe(self) -> str:
        return 'a list of addresses or networks such as "10.0.0.0/8"'

    def short(self) -> str:
        return "networks"


@dataclass(frozen=True)
class LogFormat(Kind):
    """A template with the flags of Odyssey's ``log_format``, or the word ``json``."""

    flags: str = "nteTpisudclmMrhHx%"

    def parse(self, value: Any) -> str:
        text: str = Text().parse(value)
        unknown = [
            flag for flag in re.findall(r"%(.?)", text, re.DOTALL) if flag not in self.flags or not flag
        ]
        if unknown:
            known = " ".join(f"%{flag}" for flag in self.flags)
            raise ValueError(f'has the unknown flag "%{unknown[0]}"; known are {known}')
        return text

    def describe(self) -> str:
        return 'a template or "json"'


@dataclass(frozen=True)
class Anything(Kind):
    """Any text, number or boolean: for options that do nothing."""

    def parse(self, value: Any) -> Any:
        if isinstance(value, str | int | float):
            return value
        raise ValueError(f"must be {self.describe()}")

    def describe(self) -> str:
        return "anything"


Ms = Annotated[int, Number("ms")]
OptionalMs = Annotated[int | None, Number("ms")]
Seconds = Annotated[int, Number("s")]
Count = Annotated[int, Number()]
Positive = Annotated[int, Number(least=1)]
OptionalPositive = Annotated[int | None, Number(least=1)]
Port = Annotated[int, Number(least=1, most=65_535)]
OptionalPort = Annotated[int | None, Number(least=1, most=65_535)]
Bool = Annotated[bool, YesNo()]
OptionalBool = Annotated[bool | None, YesNo()]
Str = Annotated[str, Text()]
OptionalStr = Annotated[str | None, Text()]
OptionalInt = Annotated[int | None, Number(least=-INT_MAX)]
Ignored = Annotated[Any, Anything()]
OptionalSecret = Annotated[Secret | None, SecretText()]
SocketPath = Annotated[str, Text(107)]  # sun_path of sockaddr_un, less the closing zero
OptionalSecrets = Annotated[tuple[Secret, ...] | None, SecretTexts()]
OptionalTexts = Annotated[tuple[str, ...], TextList()]
