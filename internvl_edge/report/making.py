"""The report of a checkpoint that was just quantised, from what the quantiser returns and the files it made."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_edge.checkpoint import Checkpoint
from internvl_edge.components import Component, bits_per_weight, components

from .architecture import architecture
from .content import Making, Report, TowerFacts
from .files import Written, weight_files, write_report
from .linears import ActivationRange, LinearFacts
from .run import run_of

if TYPE_CHECKING:
    from internvl_edge.quantize import QuantisationReport

# Stored type -> its name and bits.
_FLOATS = {"F32": ("float32", 32), "F16": ("float16", 16), "BF16": ("bfloat16", 16)}


def report_quantisation(report: QuantisationReport, source: Path, seconds: float) -> Written:
    """Write `report.json` and `report.html` into the folder of a new checkpoint.

    Args:
        report: what `quantize_checkpoint` returned.
        source: the folder it was made from.
        seconds: that the quantisation took.

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
        run=run_of(seconds),
    )
    content = Report(
        kind="checkpoint",
        name=report.folder.resolve().name,
        source=making.checkpoint,
        architecture=architecture(made.config),
        quantised=True,
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


def _linears(report: QuantisationReport, made: Checkpoint) -> tuple[LinearFacts, ...]:
    tower: dict[str, dict[str, Any]] = report.vision.layers if report.vision else {}
    floats, float_bits = _floats(made)
    facts = []
    for name in dict.fromkeys([*tower, *made.schemes]):
        scheme, layer = made.schemes.get(name), tower.get(name, {})
        error = layer.get("error", report.errors.get(name))
        inputs = made.shapes[f"{name}.weight"][-1]
        facts.append(
            LinearFacts(
                name=name,
                scheme=str(scheme) if scheme else floats,
                bits_per_weight=round(bits_per_weight(scheme, inputs, float_bits), 3) if scheme else float_bits,
                error=error,
                sqnr_db=-20 * math.log10(error) if error else None,
                part=layer.get("part"),
                reason=layer.get("reason", ""),
                fallback=layer.get("stored") == "float",
                inputs=_range(layer),
            )
        )
    return tuple(facts)


def _range(layer: dict[str, Any]) -> ActivationRange | None:
    return ActivationRange(clipped_at=layer["range"]) if "range" in layer else None


def _tower(report: QuantisationReport) -> TowerFacts | None:
    vision = report.vision
    if vision is None:
        return None
    return TowerFacts(vision.tiles, vision.cosine, vision.lowest_cosine, vision.predicted_cosine)
