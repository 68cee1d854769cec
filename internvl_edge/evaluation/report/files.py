"""`report.json` and `report.html` in a folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.extras import missing_package
from internvl_edge.base.files import replace_text
from internvl_edge.base.jsonable import decode, dumps

from .content import FORMAT_VERSION, Report

JSON = "report.json"
HTML = "report.html"
# What the page is made with, of the extra `report`.
_PACKAGES = ("jinja2", "markupsafe", "matplotlib")


@dataclass(frozen=True)
class Written:
    """What was written; `hint` says in one line how to get the page where its packages are missing."""

    json: Path
    html: Path | None
    hint: str = ""


def write_report(report: Report, folder: Path) -> Written:
    """Write both files into a folder, which is made where it is missing; each is replaced in one step.

    Without the packages of the extra `report` there is no page, and an older one, with other figures, is removed.

    Raises:
        EdgeError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / JSON, dumps(report))
        try:
            from .page import render
        except ModuleNotFoundError as error:
            if error.name not in _PACKAGES:
                raise
            (folder / HTML).unlink(missing_ok=True)
            return Written(folder / JSON, None, missing_package(error, "report", HTML))
        replace_text(folder / HTML, render(report))
    except OSError as error:
        raise EdgeError(f"the report cannot be written to {folder} ({error.strerror}); choose another folder") from None
    return Written(folder / JSON, folder / HTML)


def require_own_report(folder: Path) -> None:
    """Raise EdgeError where a report would replace a file of somebody else: ours have figures with a format."""
    try:
        ours = "format_version" in json.loads((folder / JSON).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        ours = False
    for name in (JSON, HTML):
        if not ours and (folder / name).exists():
            raise EdgeError(
                f"{folder / name} is no report of ours, so it is kept; remove it or choose another --report"
            )


def read_report(folder: Path) -> Report | None:
    """The report in a folder; None where there is none that this version understands."""
    try:
        values = json.loads((folder / JSON).read_text(encoding="utf-8"))
        if values["format_version"] != FORMAT_VERSION:
            return None
        return decode(Report, values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
