"""Write and read `report.json` and `report.html`, and write `overview.json` and `overview.html`, in a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.extras import missing_package
from internvl_edge.base.files import replace_text
from internvl_edge.base.json_files import read_object
from internvl_edge.base.jsonable import decode, dumps

from .report import FORMAT_VERSION, Report

if TYPE_CHECKING:
    from .overview import Overview

JSON = "report.json"
_LIMIT = 64 << 20  # bytes; it holds pictures of answers
HTML = "report.html"
OVERVIEW_JSON = "overview.json"
OVERVIEW_HTML = "overview.html"
# What the page is made with, of the extra `report`.
_PACKAGES = ("jinja2", "markupsafe", "matplotlib")


@dataclass(frozen=True)
class Written:
    """The files that were written; `hint` says in one line how to get the page where its packages are missing."""

    json: Path
    html: Path | None
    hint: str = ""


def report_folder(bundle: Path) -> Path:
    """Name the folder of a bundle's report: BUNDLE.report, beside the bundle, whose own files are verified.

    The report of a hub id, OWNER/NAME, is NAME.report in the present folder.
    """
    named = bundle if bundle.name else bundle.resolve()
    if not bundle.exists():
        named = Path(named.name)
    return named.with_name(f"{named.name}.report")


def write_report(report: Report, folder: Path) -> Written:
    """Write both files into a folder, which is made where it is missing; each is replaced in one step.

    Without the packages of the extra `report` there is no new page; an older one stays, and the hint says so.

    Raises:
        EdgeError: the folder cannot be written.
    """

    def render() -> str:
        from .page import render

        return render(report)

    return _write(folder, JSON, HTML, dumps(report), render)


def write_overview(found: Overview, reports: Sequence[Report], folder: Path) -> Written:
    """Write `overview.json` and `overview.html` into a folder, as `write_report` does.

    Raises:
        EdgeError: the folder cannot be written.
    """

    from .overview import overview_values

    def render() -> str:
        from .page import render_overview

        return render_overview(found, reports)

    return _write(folder, OVERVIEW_JSON, OVERVIEW_HTML, dumps(overview_values(reports, found)), render)


def _write(folder: Path, json: str, html: str, values: str, render: Callable[[], str]) -> Written:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / json, values)
        try:
            page = render()
        except ModuleNotFoundError as error:
            if error.name not in _PACKAGES:
                raise
            older = f"; {folder / html} is of an earlier run" if (folder / html).exists() else ""
            return Written(folder / json, None, missing_package(error, "report", html) + older)
        replace_text(folder / html, page)
    except OSError as error:
        raise EdgeError(f"the report cannot be written to {folder} ({error.strerror}); choose another folder") from None
    return Written(folder / json, folder / html)


def require_own_report(folder: Path) -> None:
    """Raise EdgeError where a report would replace a file of somebody else: ours have figures with a format."""
    try:
        ours = "format_version" in read_object(folder / JSON, EdgeError, "evaluate again", limit=_LIMIT)
    except EdgeError:
        ours = False
    for name in (JSON, HTML):
        if not ours and (folder / name).exists():
            raise EdgeError(
                f"{folder / name} is no report of ours, so it is kept; remove it or choose another --report"
            )


def read_report(folder: Path) -> Report | None:
    """Read the report in a folder; None where there is none that this version understands."""
    try:
        values = read_object(folder / JSON, EdgeError, "evaluate again", limit=_LIMIT)
        if values.get("format_version") != FORMAT_VERSION:
            return None
        return decode(Report, values)
    except (EdgeError, ValueError):
        return None
