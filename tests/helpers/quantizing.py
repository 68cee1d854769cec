"""Quantize a tiny checkpoint by a recipe, with calibration data that are written beside it."""

from __future__ import annotations

from pathlib import Path

from helpers.calibration_data import FLOAT32, write_data
from internvl_edge.calibration import DataOptions
from internvl_edge.quantize import QuantizationReport, quantize_checkpoint
from internvl_edge.recipe.recipe import Recipe


def quantize(checkpoint: Path, out: Path, recipe: Recipe) -> QuantizationReport:
    options = DataOptions(write_data(checkpoint.parent / "data"), max_tiles=2)
    needed = recipe.needs_data or recipe.vision == "int8"
    return quantize_checkpoint(checkpoint, out, recipe, data=options if needed else None, compute=FLOAT32)
