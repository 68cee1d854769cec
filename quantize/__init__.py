"""Calibration and weights -> a quantised checkpoint, again a Hugging Face folder."""

from __future__ import annotations

from .plan import check_recipe
from .run import QuantisationReport, quantize_checkpoint
from .vision import VisionReport

__all__ = ["QuantisationReport", "VisionReport", "check_recipe", "quantize_checkpoint"]
