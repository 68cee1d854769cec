"""TOML text -> values; Python 3.10, which JetPack 6 has, reads it with tomli."""

from __future__ import annotations

import sys
from typing import Any

from .errors import EdgeError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def parse(text: str, where: str, error: type[EdgeError] = EdgeError) -> dict[str, Any]:
    """The values of a file's text.

    Raises:
        EdgeError: `where` is not valid TOML, with the place of the mistake; or the kind of it that is `error`.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as mistake:
        raise error(f"{where} is not valid TOML: {mistake}") from None
