"""Collect what `report.json` stores and `report.html` shows: what evaluation and quantization returned, as it is.

Sections that are not known are None. Shares are from 0 to 1, sizes in bytes, times in seconds, divergences in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from internvl_edge.bundle.bundle import read_quantization
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.bundle.quality import Quality
from internvl_edge.checkpoint.record import REPORTS, QuantizationRecord
from internvl_edge.model.components import Component
from internvl_edge.model.description import describe
from internvl_edge.runtime.bench import BenchResult

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
        bytes: all files together, without reports.
        components: sizes of its parts.
        quality: of a bundle: its figures and its gate.
        quantization: how it was quantized.
        comparison, suite: what evaluation found.
        speed: what `bench` measured.
        commands: what repeats the runs, as typed in a shell, by the section that each made: "comparison", "suite",
            "speed", "quantization".
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
    speed: BenchResult | None = None
    commands: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def files(self) -> str:
        """Return the fingerprint of the bundle's files, "" for a checkpoint."""
        return self.quality.files if self.quality else ""

    def completed_by(self, older: Report | None) -> Report:
        """Take the older report's sections where this one has none, if both are about the same files."""
        if older is None or not self.files or older.files != self.files:
            return self
        missing = [name for name in _SECTIONS if getattr(self, name) is None]
        sections = {name: getattr(older, name) for name in missing}
        kept = {name: older.commands[name] for name in missing if name in older.commands}
        return replace(self, **sections, commands={**kept, **self.commands})


# Sections of a bundle's report that are measured apart.
_SECTIONS = ("comparison", "suite", "speed")


def bundle_report(
    folder: Path,
    quality: Quality,
    comparison: Comparison | None = None,
    suite: SuiteResult | None = None,
    speed: BenchResult | None = None,
    command: str = "",
) -> Report:
    """Collect everything that is known of a bundle.

    Args:
        folder: the bundle.
        quality: its figures and its gate, the newest included.
        comparison, suite, speed: what was just measured.
        command: what measures it again, for people.

    Raises:
        BundleError: the folder is no bundle.
    """
    manifest = Manifest.read(folder)
    measured = {"comparison": comparison, "suite": suite, "speed": speed}
    return Report(
        kind="bundle",
        name=folder.resolve().name,
        source=manifest.source,
        architecture=describe(manifest.model, manifest.kv_cache or manifest.activations),
        quantized=manifest.is_quantized,
        bytes=sum(entry.bytes for entry in manifest.files.values()),
        components=manifest.components,
        quality=quality,
        quantization=read_quantization(folder, manifest),
        comparison=comparison,
        suite=suite,
        speed=speed,
        commands={name: command for name, found in measured.items() if found is not None and command},
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
        bytes=sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and _is_of_checkpoint(path.name)),
        components=record.components,
        quantization=record,
        commands={"quantization": command} if command else {},
    )


def _is_of_checkpoint(name: str) -> bool:
    """Whether a file belongs to the checkpoint itself: no report, and nothing that a killed process was writing."""
    return name not in REPORTS and not name.startswith(".")
