"""What is known of a quantized model, as `report.json` for programs and a self-contained `report.html` for people.

Pure data in, files out: nothing here measures, loads a model or touches the network. The page needs the extra `report`.
"""

from __future__ import annotations

from .files import read_report, report_folder, require_own_report, write_overview, write_report
from .overview import Overview, find_report, overview
from .report import Report, bundle_report, checkpoint_report

__all__ = [
    "Overview",
    "Report",
    "bundle_report",
    "checkpoint_report",
    "find_report",
    "overview",
    "read_report",
    "report_folder",
    "require_own_report",
    "write_overview",
    "write_report",
]
