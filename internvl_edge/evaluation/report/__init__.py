"""What is known of a quantized model, as `report.json` for programs and a self-contained `report.html` for people.

Pure data in, files out: nothing here measures, loads a model or touches the network. The page needs the extra `report`.
"""

from __future__ import annotations

from internvl_edge.checkpoint.record import ActivationRange, LinearReport

from .content import Report
from .files import read_report, write_report

__all__ = ["ActivationRange", "LinearReport", "Report", "read_report", "write_report"]
