"""Build the record of a quantization (`quantization.json`) while the new checkpoint is put together."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

from internvl_edge.base.hub import hub_source
from internvl_edge.base.run_record import run_record
from internvl_edge.calibration.dataset import CalibrationSet
from internvl_edge.checkpoint.license import CARD
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.checkpoint.record import LinearReport, QuantizationRecord, TowerReport, weight_files
from internvl_edge.model.components import bits_per_weight
from internvl_edge.recipe.recipe import Recipe

from .vision import VisionReport


def quantization_record(
    made: Checkpoint,
    source: Path,
    recipe: Recipe,
    calibration: CalibrationSet | None,
    decoder: tuple[LinearReport, ...],
    vision: VisionReport | None,
    average_bits: float,
    predicted_kl: float | None,
    seconds: float,
) -> QuantizationRecord:
    """Return the record of how a checkpoint was quantized.

    Args:
        made: the new checkpoint.
        source: the folder of the original checkpoint.
        recipe: the recipe that was used.
        calibration: the calibration data, or None where none was used.
        decoder: one report per decoder linear that was quantized or was considered and left float.
        vision: the report on the vision tower, or None where the tower stays float.
        average_bits: bits per weight of the decoder's layers.
        predicted_kl: predicted KL divergence in nats, or None where precision was not chosen by sensitivity.
        seconds: the duration of the quantization.
    """
    hub = hub_source(source)
    return QuantizationRecord(
        checkpoint=hub.repository if hub else source.resolve().name,
        recipe=asdict(recipe),
        samples=len(calibration.names) if calibration else 0,
        tokens=calibration.total if calibration else 0,
        image_tokens=int(calibration.is_image.sum()) if calibration else 0,
        broken=tuple(calibration.broken) if calibration else (),
        weights=weight_files(made.folder),
        components=made.components(),
        linears=(*(_tower_linears(vision, made) if vision else ()), *decoder),
        tower=TowerReport(vision.tiles, vision.cosine, vision.lowest_cosine, vision.predicted_cosine)
        if vision
        else None,
        bits_per_weight=average_bits,
        predicted_kl=predicted_kl,
        run=run_record(seconds),
        files=tuple(sorted({CARD, *(path.name for path in made.folder.iterdir() if path.suffix != ".safetensors")})),
        hub=hub,
    )


def _tower_linears(vision: VisionReport, made: Checkpoint) -> list[LinearReport]:
    dtype, float_bits = made.float_type()
    linears = []
    for name, layer in vision.layers.items():
        scheme, inputs = made.schemes.get(name), made.shapes[f"{name}.weight"][-1]
        error: float = layer["error"]
        linears.append(
            LinearReport(
                name=name,
                dtype=dtype,
                scheme=scheme,
                bits_per_weight=round(bits_per_weight(scheme, inputs, float_bits), 3) if scheme else float_bits,
                error=error,
                sqnr_db=-20 * math.log10(error) if error else None,
                part=layer["part"],
                reason=layer.get("reason", ""),
                inputs=layer["inputs"],
            )
        )
    return linears
