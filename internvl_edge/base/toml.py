"""Parse TOML text. Python 3.10 (JetPack 6) has no tomllib and uses tomli."""

from __future__ import annotations

import sys
from typing import Any

from .errors import EdgeError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def parse(text: str, where: str, error: type[EdgeError] = EdgeError) -> dict[str, Any]:
    """Return the values of the text of a TOML file.

    Raises:
        EdgeError: of the class `error`: the text is not valid TOML. The message names the file `where` and the place.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as mistake:
        raise error(f"{where} is not valid TOML: {mistake}") from None
