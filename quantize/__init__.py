"""Quantize a checkpoint: float weights and calibration data become a new, smaller Hugging Face folder."""

from __future__ import annotations

from .pipeline import QuantizationReport, quantize_checkpoint
from .plan import check_recipe
from .vision import VisionReport

__all__ = ["QuantizationReport", "VisionReport", "check_recipe", "quantize_checkpoint"]
