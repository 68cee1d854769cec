"""The license that a checkpoint's card (`README.md`) names in its front matter, as the hub writes it.

The front matter is YAML of unknown origin. Three plain entries are read from it, line by line; nothing else of YAML is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

CARD = "README.md"
_BYTES = 64 << 10
_ENTRY = re.compile(r"(?P<key>license|license_name|license_link):[ \t]+(?P<value>[^#]*?)[ \t]*(#.*)?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,79}")
_LINK = re.compile(r"(https?://[!-~]{1,300}|[A-Za-z0-9][A-Za-z0-9._-]{0,79})")


@dataclass(frozen=True)
class License:
    """A license in the words of the hub.

    Attributes:
        id: an identifier of the hub's list, such as "mit", or "other".
        name: of one that is not in the list; "" where nobody says.
        link: a web address, or the name of a file beside the card; "" where nobody says.
    """

    id: str
    name: str = ""
    link: str = ""


def read_license(folder: Path) -> License | None:
    """Return the license that the card in a folder names, or None where there is none, or none that can be read."""
    try:
        with (folder / CARD).open("rb") as file:
            lines = file.read(_BYTES).decode("utf-8-sig", "replace").splitlines()
    except OSError:
        return None
    if not lines or lines[0].rstrip() != "---" or "---" not in (ends := [line.rstrip() for line in lines[1:]]):
        return None
    found: dict[str, str] = {}
    for line in ends[: ends.index("---")]:
        if entry := _ENTRY.fullmatch(line):
            found[entry["key"]] = entry["value"].strip("\"'")
    if not _NAME.fullmatch(found.get("license", "")):
        return None
    name, link = found.get("license_name", ""), found.get("license_link", "")
    return License(found["license"], name if _NAME.fullmatch(name) else "", link if _LINK.fullmatch(link) else "")
