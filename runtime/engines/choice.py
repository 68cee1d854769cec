"""Choose the engine that runs a bundle on a CPU."""

from __future__ import annotations

from internvl_edge.base import machine
from internvl_edge.base.errors import EngineError
from internvl_edge.bundle.bundle import Bundle

from . import Engine
from .onnxruntime import OnnxRuntimeEngine

ENGINES = ("auto", "onnxruntime", "openvino")


def cpu_engine(
    opened: Bundle, name: str = "auto", *, dialect: str | None = None, capacity: int, threads: int | None = None
) -> Engine:
    """Return the engine called `name`. "auto" takes OpenVINO for tiles and prompts where that is faster.

    It is faster where OpenVINO is installed and the CPU multiplies bfloat16, which ONNX Runtime does not use
    (docs/performance.md). It also needs more memory, because both libraries hold the decoder's weights.

    Raises:
        EngineError: the engine does not exist, is not installed, or cannot run this dialect.
    """
    if name not in ENGINES:
        raise EngineError(f"engine {name!r} is not one of {', '.join(ENGINES)}")
    if name == "openvino" and dialect == "standard":
        raise EngineError("the openvino engine runs the onnxruntime dialect alone; leave out one of the two options")
    from .openvino import OpenVinoEngine, is_available

    if name == "openvino" or (name == "auto" and dialect is None and machine.multiplies_bfloat16() and is_available()):
        return OpenVinoEngine(opened, capacity=capacity, threads=threads)
    return OnnxRuntimeEngine(opened, dialect=dialect, capacity=capacity, threads=threads)
