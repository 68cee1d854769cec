"""Choose the engine that runs a bundle on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

from internvl_edge.base import machine
from internvl_edge.base.errors import EngineError
from internvl_edge.base.units import size
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.manifest import Manifest

from . import Engine
from .onnxruntime import OnnxRuntimeEngine

ENGINES = ("auto", "onnxruntime", "openvino")
# Memory that the openvino engine needs for each byte of a bundle: 8.7 GB for the 1.9 GB of a random 1B float16 bundle.
_OPENVINO_BYTES = 5


@dataclass(frozen=True)
class Choice:
    """What the engine "auto" means for one bundle on this machine now: the engine's name, and why, in a few words."""

    engine: str
    reason: str

    def __str__(self) -> str:
        return f"{self.engine} ({self.reason})"


def choose(manifest: Manifest, dialect: str | None = None, exact: bool = False) -> Choice:
    """Choose what "auto" means: OpenVINO for tiles and prompts where that is faster, otherwise ONNX Runtime alone.

    OpenVINO is faster where it is installed and the CPU multiplies bfloat16, which ONNX Runtime does not use
    (docs/performance.md). It is not chosen for a float32 bundle, whose numbers must not be rounded, or where the memory
    that is available may not suffice: both libraries hold the decoder's weights.
    """
    from .openvino import is_available

    needed = _OPENVINO_BYTES * sum(entry.bytes for entry in manifest.files.values())
    available = machine.memory("MemAvailable")
    if exact:
        reason = "exact numbers"
    elif dialect is not None:
        reason = f"the dialect {dialect} was asked for"
    elif manifest.activations == "float32":
        reason = "the bundle computes in float32, which OpenVINO would not make faster"
    elif not machine.multiplies_bfloat16():
        reason = "this CPU does not multiply bfloat16"
    elif not is_available():
        reason = "OpenVINO is not installed"
    elif available is not None and needed >= available:
        reason = f"OpenVINO may need {size(needed)} of memory, {size(available)} are available"
    else:
        return Choice("openvino", "faster images and prompts, in bfloat16; --exact avoids the rounding")
    return Choice("onnxruntime", reason)


def cpu_engine(
    opened: Bundle,
    name: str = "auto",
    *,
    dialect: str | None = None,
    capacity: int,
    rows: int = 1,
    threads: int | None = None,
    exact: bool = False,
) -> Engine:
    """Return the engine called `name`; for "auto", see `choose`. `exact` keeps OpenVINO from rounding to bfloat16.

    Raises:
        EngineError: the engine does not exist, is not installed, or cannot run this dialect.
    """
    if name not in ENGINES:
        raise EngineError(f"engine {name!r} is not one of {', '.join(ENGINES)}")
    if name == "openvino" and dialect == "standard":
        raise EngineError("the openvino engine runs the onnxruntime dialect alone; leave out one of the two options")
    if name == "auto":
        name = choose(opened.manifest, dialect, exact).engine
    if name == "openvino":
        from .openvino import OpenVinoEngine

        return OpenVinoEngine(opened, capacity=capacity, rows=rows, threads=threads, exact=exact)
    return OnnxRuntimeEngine(opened, dialect=dialect, capacity=capacity, rows=rows, threads=threads, exact=exact)
