from collections.abc import Callable
from typing import Any

def data_row(cells: tuple[Any, ...], how: list[Callable[[Any], bytes] | None]) -> bytes: ...
