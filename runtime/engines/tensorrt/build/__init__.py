"""Bundle -> TensorRT engines, on the device or (TensorRT for RTX) on any machine. Nothing here runs an engine."""

from .bundle_engines import build_engines

__all__ = ["build_engines"]
