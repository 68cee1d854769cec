"""Which engine runs a bundle on a CPU."""

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
    """The engine called `name`; "auto" takes OpenVINO for tiles and prompts where it is the faster one.

    That is where it is installed and the CPU multiplies bfloat16, which ONNX Runtime does not (docs/performance.md). It
    costs memory: both hold the decoder's weights.

    Raises:
        EngineError: no such engine, it is not installed, or it cannot run this dialect.
    """
    if name not in ENGINES:
        raise EngineError(f"engine {name!r} is not one of {', '.join(ENGINES)}")
    if name == "openvino" and dialect == "standard":
        raise EngineError("the openvino engine runs the onnxruntime dialect alone; leave out one of the two options")
    from .openvino import OpenVinoEngine, is_available

    if name == "openvino" or (name == "auto" and dialect is None and machine.multiplies_bfloat16() and is_available()):
        return OpenVinoEngine(opened, capacity=capacity, threads=threads)
    return OnnxRuntimeEngine(opened, dialect=dialect, capacity=capacity, threads=threads)
