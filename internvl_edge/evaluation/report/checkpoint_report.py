"""The report of a quantized checkpoint, from its files."""

from __future__ import annotations

from pathlib import Path

from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.checkpoint.record import QuantizationRecord
from internvl_edge.model.description import architecture

from .content import Report
from .files import Written, write_report


def report_checkpoint(folder: Path, record: QuantizationRecord) -> Written:
    """Write `report.json` and `report.html` into the folder of a quantized checkpoint.

    Raises:
        EdgeError: the folder cannot be written.
    """
    content = Report(
        kind="checkpoint",
        name=folder.resolve().name,
        source=record.checkpoint,
        architecture=architecture(Checkpoint(folder).config),
        quantized=True,
        bytes=sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        components=record.components,
        quantization=record,
    )
    return write_report(content, folder)
