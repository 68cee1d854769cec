"""Calibration and weights -> a quantised checkpoint, again a Hugging Face folder."""

from __future__ import annotations

from .run import QuantisationReport, check_recipe, quantize_checkpoint

__all__ = ["QuantisationReport", "check_recipe", "quantize_checkpoint"]
