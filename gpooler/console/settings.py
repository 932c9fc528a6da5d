"""The session parameters of a client of the console: what drivers expect to be told, and may set. Pure."""

from collections.abc import Mapping
from typing import Final

# Numbers of PostgreSQL decide in drivers what they send; the console speaks as that version does.
SERVER_VERSION: Final = "15.0 (gpooler {})"
LEGACY_COLUMNS: Final = "gpooler.legacy_columns"

_REPORTED: Final = {  # by their names in lower case, with the values that stay as they are
    "server_encoding": ("server_encoding", "UTF8"),
    "client_encoding": ("client_encoding", "UTF8"),
    "datestyle": ("DateStyle", "ISO, MDY"),
    "timezone": ("TimeZone", "UTC"),
    "intervalstyle": ("IntervalStyle", "postgres"),
    "integer_datetimes": ("integer_datetimes", "on"),
    "standard_conforming_strings": ("standard_conforming_strings", "on"),
    "in_hot_standby": ("in_hot_standby", "off"),
}
_OTHERS: Final = {
    "transaction_isolation": "read committed",
    "default_transaction_isolation": "read committed",
    "transaction_read_only": "off",
    "default_transaction_read_only": "off",
    "search_path": "public",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "max_identifier_length": "63",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    LEGACY_COLUMNS: "off",
}
_TRUE: Final = frozenset({"on", "true", "yes", "1", "t", "y"})
NAMES_MOST: Final = 100  # that a client may set; it makes up their names


class Settings:
    """Those of one session."""

    def __init__(self, version: str, is_admin: bool, user: str, startup: Mapping[str, str]) -> None:
        """``startup``: what the client asked for, or its rule."""
        self.reported = {
            "server_version": SERVER_VERSION.format(version),
            **dict(_REPORTED.values()),
            "is_superuser": "on" if is_admin else "off",
            "session_authorization": user,
        }
        self._fixed = {name.lower(): value for name, value in self.reported.items()}
        self._values = dict(_OTHERS)
        self._initial: dict[str, str] = {}
        for name, value in startup.items():
            self.set(name, value)
        self.reported["application_name"] = self._values.get("application_name", "")
        self._initial = dict(self._values)

    def get(self, name: str) -> str | None:
        """The value of a parameter; None when nobody knows it."""
        key = name.lower()
        return self._fixed.get(key, self._values.get(key))

    def set(self, name: str, value: str | None) -> None:
        """Set a parameter, or reset it. What PostgreSQL reports stays as it is: it says how we speak."""
        key = name.lower()
        if key in self._fixed:
            return
        if value is None:
            value = self._initial.get(key)
        if value is None:
            self._values.pop(key, None)
        elif key in self._values or len(self._values) < NAMES_MOST:
            self._values[key] = value

    @property
    def application_name(self) -> str:
        """As the client calls itself."""
        return self._values.get("application_name", "")

    @property
    def has_legacy_columns(self) -> bool:
        """Whether tables have columns that PgBouncer and Odyssey once had."""
        return self._values[LEGACY_COLUMNS].lower() in _TRUE
