"""Collect what `report.json` stores and `report.html` shows: what evaluation and quantization returned, as it is.

Sections that are not known are None. Shares are from 0 to 1, sizes in bytes, times in seconds, divergences in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from internvl_edge.base.errors import BundleError
from internvl_edge.base.json_files import read
from internvl_edge.base.jsonable import decode
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.bundle.names import QUANTIZATION
from internvl_edge.bundle.quality import Quality
from internvl_edge.checkpoint.record import QuantizationRecord
from internvl_edge.model.components import Component
from internvl_edge.model.description import describe

from ..compare import Comparison
from ..suite import SuiteResult

FORMAT_VERSION = 3


@dataclass(frozen=True)
class Report:
    """Everything that is known of a quantized checkpoint or of a bundle.

    Attributes:
        kind: "checkpoint" or "bundle".
        name: of its folder.
        source: name of what it was made from.
        architecture: what the model is, (label, text) rows.
        quantized: whether it has fewer bits than floats anywhere.
        bytes: all files together.
        components: sizes of its parts.
        quality: of a bundle: its figures and its gate.
        quantization: how it was quantized.
        comparison, suite: what evaluation found.
        commands: what repeats the runs, as typed in a shell.
    """

    kind: str
    name: str
    source: str
    architecture: tuple[tuple[str, str], ...]
    quantized: bool
    bytes: int
    components: tuple[Component, ...]
    quality: Quality | None = None
    quantization: QuantizationRecord | None = None
    comparison: Comparison | None = None
    suite: SuiteResult | None = None
    commands: tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def files(self) -> str:
        """Return the fingerprint of the bundle's files, "" for a checkpoint."""
        return self.quality.files if self.quality else ""

    def completed_by(self, older: Report | None) -> Report:
        """Take the older report's sections where this one has none, if both are about the same files."""
        if older is None or not self.files or older.files != self.files:
            return self
        if (self.comparison or not older.comparison) and (self.suite or not older.suite):
            return self
        commands = tuple(dict.fromkeys((*self.commands, *older.commands)))
        comparison, suite = self.comparison or older.comparison, self.suite or older.suite
        return replace(self, comparison=comparison, suite=suite, commands=commands)


def bundle_report(
    folder: Path,
    quality: Quality,
    comparison: Comparison | None = None,
    suite: SuiteResult | None = None,
    command: str = "",
) -> Report:
    """Collect everything that is known of a bundle.

    Args:
        folder: the bundle.
        quality: its figures and its gate, the newest included.
        comparison, suite: what was just measured.
        command: what measures it again, for people.

    Raises:
        BundleError: the folder is no bundle.
    """
    manifest = Manifest.read(folder)
    return Report(
        kind="bundle",
        name=folder.resolve().name,
        source=manifest.source,
        architecture=describe(manifest.model, manifest.kv_cache or manifest.activations),
        quantized=manifest.is_quantized,
        bytes=sum(entry.bytes for entry in manifest.files.values()),
        components=manifest.components,
        quality=quality,
        quantization=_quantization(folder, manifest),
        comparison=comparison,
        suite=suite,
        commands=(command,) if command else (),
    )


def checkpoint_report(folder: Path, record: QuantizationRecord, command: str = "") -> Report:
    """Collect everything that is known of a quantized checkpoint: its files, how it was made, and what repeats it.

    Raises:
        CheckpointError: the folder is no checkpoint.
    """
    from internvl_edge.checkpoint.reader import Checkpoint  # needs an extra that devices with bundles lack

    made = Checkpoint(folder)
    return Report(
        kind="checkpoint",
        name=folder.resolve().name,
        source=record.checkpoint,
        architecture=describe(made.config, "int8" if made.kv_scales else made.float_type()[0]),
        quantized=True,
        bytes=sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        components=record.components,
        quantization=record,
        commands=(command,) if command else (),
    )


def _quantization(folder: Path, manifest: Manifest) -> QuantizationRecord | None:
    if QUANTIZATION not in manifest.files:
        return None
    try:
        return decode(QuantizationRecord, read(folder / QUANTIZATION, BundleError, "export the bundle again"))
    except (BundleError, ValueError):  # that of another version
        return None
