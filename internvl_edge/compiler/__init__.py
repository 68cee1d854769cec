"""Build TensorRT engines from a bundle: on the target device, or with TensorRT for RTX on any machine.

Nothing in this package runs an engine.
"""

from .bundle_engines import build_engines

__all__ = ["build_engines"]
