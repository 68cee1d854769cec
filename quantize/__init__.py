"""Quantize a checkpoint: float weights and calibration data become a new, smaller Hugging Face folder."""

from __future__ import annotations

from .pipeline import QuantizationReport, quantize_checkpoint
from .plan import plan_decoder
from .vision import VisionReport

__all__ = ["QuantizationReport", "VisionReport", "plan_decoder", "quantize_checkpoint"]
