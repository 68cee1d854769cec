"""Checkpoint -> bundle: ONNX graphs written directly, weights streamed; no torch, nothing traced."""

#TMP from .exporter import DTYPES, export_bundle

#TMP __all__ = ["DTYPES", "export_bundle"]
