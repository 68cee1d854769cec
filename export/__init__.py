"""Checkpoint -> bundle: ONNX graphs written directly, weights streamed; no torch, nothing traced."""

from .exporter import DTYPES, export_bundle

__all__ = ["DTYPES", "export_bundle"]
