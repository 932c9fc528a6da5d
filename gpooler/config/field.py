"""What the table of options says about an option: it stands beside the field that the option is."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, cast

from pydantic import Field
from pydantic.fields import FieldInfo


class Status(StrEnum):
    """Whether gpooler does what the option says."""

    BUILT = "built"
    IGNORED = "ignored"  # accepted with a warning
    NOT_BUILT = "not built yet"  # refused unless it has its inert value


class Reload(StrEnum):
    """When a changed value takes effect."""

    RELOAD = "reload"
    LOGIN = "reload, for new logins"
    SESSION = "reload, for new clients"  # those that are connected keep their kind of pool
    SERVER = "reload, servers are replaced"
    RESTART = "restart"


UNSET: Final = object()
REMOVE_IT: Final = "remove it"


@dataclass(frozen=True, slots=True)
class About:
    """One row of the table, apart from what the field itself says (name, type, default)."""

    help: str
    status: Status
    advice: str  # why it is ignored, or what to do instead of what is not built
    odyssey: Any  # Odyssey's default where it differs from the one in effect, else UNSET
    departure: str  # why our default is another one on purpose; named by `check`
    reload: Reload
    example: Any  # a value to show where the default is "unset"
    placeholder: Any  # stands for a missing required value while the rest is checked


def option(
    default: Any,
    help: str,
    *,
    reload: Reload = Reload.RELOAD,
    odyssey: Any = UNSET,
    departure: str = "",
    example: Any = UNSET,
) -> Any:
    """An option that works. ``default`` is used as it stands."""
    return _field(default, About(help, Status.BUILT, "", odyssey, departure, reload, example, UNSET))


def required(help: str, *, placeholder: Any, reload: Reload = Reload.RELOAD, example: Any = UNSET) -> Any:
    """An option that works and has no default."""
    return _field(..., About(help, Status.BUILT, "", UNSET, "", reload, example, placeholder))


def ignored(default: Any, help: str, why: str) -> Any:
    """An option that is accepted with a warning that says why it does nothing."""
    return _field(default, About(help, Status.IGNORED, why, UNSET, "", Reload.RELOAD, UNSET, UNSET))


def not_built(inert: Any, help: str, advice: str = REMOVE_IT, *, reload: Reload = Reload.RELOAD) -> Any:
    """An option whose every value but ``inert`` is refused."""
    return _field(inert, About(help, Status.NOT_BUILT, advice, UNSET, "", reload, UNSET, UNSET))


def _field(default: Any, about: About) -> Any:
    return Field(default, json_schema_extra=cast(Any, {"about": about}))


def about(field: FieldInfo) -> About:
    """The row that belongs to a field made by this module."""
    extra = field.json_schema_extra
    if not isinstance(extra, dict) or not isinstance(found := cast(Any, extra.get("about")), About):
        raise TypeError("a field of the configuration without its row in the table")
    return found
