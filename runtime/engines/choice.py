"""Choose the engine that runs a bundle on a CPU."""

from __future__ import annotations

from internvl_edge.base import machine
from internvl_edge.base.errors import EngineError
from internvl_edge.bundle.bundle import Bundle

from . import Engine
from .onnxruntime import OnnxRuntimeEngine

ENGINES = ("auto", "onnxruntime", "openvino")
# Memory that the openvino engine needs for each byte of a bundle: 8.7 GB for the 1.9 GB of a random 1B float16 bundle.
_OPENVINO_BYTES = 5


def cpu_engine(
    opened: Bundle,
    name: str = "auto",
    *,
    dialect: str | None = None,
    capacity: int,
    rows: int = 1,
    threads: int | None = None,
) -> Engine:
    """Return the engine called `name`. "auto" takes OpenVINO for tiles and prompts where that is faster.

    It is faster where OpenVINO is installed and the CPU multiplies bfloat16, which ONNX Runtime does not use
    (docs/performance.md). "auto" does not take it for a float32 bundle, whose numbers must not be rounded, or where the
    memory that is available may not suffice: both libraries hold the decoder's weights.

    Raises:
        EngineError: the engine does not exist, is not installed, or cannot run this dialect.
    """
    if name not in ENGINES:
        raise EngineError(f"engine {name!r} is not one of {', '.join(ENGINES)}")
    if name == "openvino" and dialect == "standard":
        raise EngineError("the openvino engine runs the onnxruntime dialect alone; leave out one of the two options")
    from .openvino import OpenVinoEngine, is_available

    takes_openvino = name == "openvino" or (
        name == "auto" and dialect is None and _gains_from_bfloat16(opened) and is_available() and _has_room(opened)
    )
    if takes_openvino:
        return OpenVinoEngine(opened, capacity=capacity, rows=rows, threads=threads)
    return OnnxRuntimeEngine(opened, dialect=dialect, capacity=capacity, rows=rows, threads=threads)


def _gains_from_bfloat16(opened: Bundle) -> bool:
    return machine.multiplies_bfloat16() and opened.manifest.activations != "float32"


def _has_room(opened: Bundle) -> bool:
    available = machine.memory("MemAvailable")
    needed = _OPENVINO_BYTES * sum(entry.bytes for entry in opened.manifest.files.values())
    return available is None or needed < available
