"""Parse TOML text. Python 3.10 (JetPack 6) has no tomllib and uses tomli."""

from __future__ import annotations

import math
import sys
from typing import Any

from .errors import EdgeError
from .json_files import MAX_DIGITS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def parse(text: str, where: str, error: type[EdgeError] = EdgeError) -> dict[str, Any]:
    """Return the values of the text of a TOML file.

    Raises:
        EdgeError: `where` is not valid TOML, with the place of the mistake, or holds a number that no field can have:
            NaN, infinity, an integer beyond floats; or the kind of it that is `error`.
    """
    try:
        values = tomllib.loads(text.removeprefix("\ufeff"))  # which editors on Windows put first
    except ValueError as mistake:
        raise error(f"{where} is not valid TOML: {mistake}") from None
    except RecursionError:
        raise error(f"{where} is not valid TOML: too many tables and lists inside each other") from None
    _check_numbers(values, where, error)
    return values


def _check_numbers(values: dict[str, Any], where: str, error: type[EdgeError]) -> None:
    """Without recursion, so that what was parsed can be checked."""
    left: list[tuple[str, Any]] = list(values.items())
    while left:
        name, value = left.pop()
        if isinstance(value, dict):
            left += [(f"{name}.{key}", item) for key, item in value.items()]
        elif isinstance(value, list):
            left += [(name, item) for item in value]
        elif isinstance(value, float) and not math.isfinite(value):
            raise error(f"{where}: {name} is {value}, expected a finite number")
        elif isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
            raise error(f"{where}: {name} is an integer beyond all limits, expected a smaller number")
