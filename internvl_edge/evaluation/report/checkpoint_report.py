"""The report of a checkpoint that was just quantized, from what the quantizer returns and the files it made."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_edge.base.run import run_of
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.checkpoint.record import LinearFacts
from internvl_edge.model.components import Component, bits_per_weight, components
from internvl_edge.model.description import architecture

from .content import Making, Report, TowerFacts
from .files import Written, weight_files, write_report

if TYPE_CHECKING:
    from internvl_edge.quantize import QuantizationReport

# Stored type -> its name and bits.
_FLOATS = {"F32": ("float32", 32), "F16": ("float16", 16), "BF16": ("bfloat16", 16)}


def report_quantization(report: QuantizationReport, source: Path, seconds: float) -> Written:
    """Write `report.json` and `report.html` into the folder of a new checkpoint.

    Args:
        report: what `quantize_checkpoint` returned.
        source: the folder it was made from.
        seconds: that the quantization took.

    Raises:
        EdgeError: the folder cannot be written.
    """
    made = Checkpoint(report.folder)
    sizes = checkpoint_components(made)
    making = Making(
        checkpoint=source.resolve().name,
        recipe=report.recipe.to_dict(),
        samples=report.samples,
        tokens=report.tokens,
        image_tokens=report.image_tokens,
        broken=report.broken,
        weights=weight_files(report.folder),
        components=sizes,
        linears=_linears(report, made),
        tower=_tower(report),
        bits_per_weight=report.bits_per_weight,
        predicted_kl=report.predicted_kl,
        run=run_of(seconds),
    )
    content = Report(
        kind="checkpoint",
        name=report.folder.resolve().name,
        source=making.checkpoint,
        architecture=architecture(made.config),
        quantized=True,
        bytes=sum(path.stat().st_size for path in report.folder.iterdir() if path.is_file()),
        components=sizes,
        making=making,
    )
    return write_report(content, report.folder)


def checkpoint_components(checkpoint: Checkpoint) -> tuple[Component, ...]:
    """Sizes of the parts of a checkpoint as it lies on disk."""
    name, bits = _floats(checkpoint)
    tied = checkpoint.config.decoder.tie_word_embeddings
    return tuple(components(checkpoint.shapes, checkpoint.schemes, name, bits, bits, tied=tied))


def _floats(checkpoint: Checkpoint) -> tuple[str, int]:
    """The most frequent float type of a checkpoint, and its bits."""
    return next(_FLOATS[name] for name in checkpoint.stored_dtypes() if name in _FLOATS)


def _linears(report: QuantizationReport, made: Checkpoint) -> tuple[LinearFacts, ...]:
    """Those of the tower, then those of the decoder."""
    if report.vision is None:
        return report.linears
    floats, float_bits = _floats(made)
    tower = []
    for name, layer in report.vision.layers.items():
        scheme, inputs = made.schemes.get(name), made.shapes[f"{name}.weight"][-1]
        error: float = layer["error"]
        tower.append(
            LinearFacts(
                name=name,
                scheme=str(scheme) if scheme else floats,
                bits_per_weight=round(bits_per_weight(scheme, inputs, float_bits), 3) if scheme else float_bits,
                error=error,
                sqnr_db=-20 * math.log10(error) if error else None,
                part=layer["part"],
                reason=layer.get("reason", ""),
                inputs=layer["inputs"],
            )
        )
    return (*tower, *report.linears)


def _tower(report: QuantizationReport) -> TowerFacts | None:
    vision = report.vision
    if vision is None:
        return None
    return TowerFacts(vision.tiles, vision.cosine, vision.lowest_cosine, vision.predicted_cosine)
