"""Export a checkpoint to a bundle.

ONNX graphs are written directly, without torch or tracing. Weights are streamed.
"""

from .exporter import DTYPES, export_bundle

__all__ = ["DTYPES", "export_bundle"]
