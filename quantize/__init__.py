"""Calibration and weights -> a quantized checkpoint, again a Hugging Face folder."""

from __future__ import annotations

from .plan import check_recipe
from .run import QuantizationReport, quantize_checkpoint
from .vision import VisionReport

__all__ = ["QuantizationReport", "VisionReport", "check_recipe", "quantize_checkpoint"]
