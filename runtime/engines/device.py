"""Choose the device for "auto", check that CUDA can run a bundle before anything is loaded, and load a device's engine.

`choose_device` prefers TensorRT engines that `build` made for the present GPU, then CUDA, then the CPU, and says why.
Nothing of a library is imported before the bundle has something that the library could run.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from internvl_edge.base import machine
from internvl_edge.base.errors import EngineError
from internvl_edge.base.extras import install, missing_package
from internvl_edge.base.progress import Progress
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.model.context import checked_context
from internvl_edge.planning.devices import FLAVOURS
from internvl_edge.planning.programs import MOST_ROWS

from . import Engine
from .choice import cpu_engine
from .onnxruntime import PROVIDERS, OnnxRuntimeEngine

if TYPE_CHECKING:
    from .tensorrt.record import EngineRecord

DEVICES = ("auto", "cpu", "cuda", "tensorrt")
# The types for which CUDA has a kernel of GroupQueryAttention (onnxruntime, docs/OperatorKernels.md), among those that
# ONNX Runtime can compute the rest in. Attention in float32 would run on the CPU, and the whole KV cache would be moved
# to the host and back for every token.
_CUDA_ACTIVATIONS = ("float16",)
_NOT_INSTALLED = "ONNX Runtime is not installed"
# An ONNX model of one Identity node, serialized. A session of it shows whether a provider starts.
IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x02\x10\r"
)
# Severities of ONNX Runtime's messages: what it prints by default, and almost nothing.
_WARNINGS, _FATAL = 2, 4


@dataclass(frozen=True)
class DeviceChoice:
    """What the device "auto" means for one bundle on this machine now: "tensorrt", "cuda" or "cpu", and why."""

    device: str
    reason: str

    def __str__(self) -> str:
        return f"{self.device} ({self.reason})"


def choose_device(
    opened: Bundle,
    *,
    engine: str = "auto",
    dialect: str | None = None,
    context: int | None = None,
    threads: int | None = None,
    exact: bool = False,
    rows: int = 1,
) -> DeviceChoice:
    """Choose what "auto" means for a bundle and the further arguments of `InternVL.load`.

    An engine or a number of threads means the CPU. A context, rows or a dialect that the TensorRT engines do not have,
    or exact numbers, mean another device. CUDA has one row.

    Raises:
        EngineError: there is neither a usable TensorRT nor ONNX Runtime.
    """
    if engine != "auto":
        return DeviceChoice("cpu", f"the engine {engine} was asked for")
    if threads is not None:
        return DeviceChoice("cpu", "a number of threads was asked for")
    try:
        return DeviceChoice("tensorrt", _tensorrt_engines(opened, dialect, context, exact, rows))
    except EngineError as error:
        without_tensorrt = str(error)
    obstacle = _cuda_obstacle(opened)
    if obstacle is None and rows > 1:
        return DeviceChoice("cpu", f"{without_tensorrt}; CUDA has one row, asked for are {rows}")
    if obstacle is None:
        return DeviceChoice("cuda", without_tensorrt)
    if obstacle.found == _NOT_INSTALLED:
        raise EngineError(f"no device can run this bundle: {without_tensorrt}; {obstacle.found}: {install('cpu')}")
    return DeviceChoice("cpu", f"{without_tensorrt}; {obstacle.found}")


def has_tensorrt() -> bool:
    """Return whether a TensorRT is installed, without loading it."""
    return any(find_spec(name) is not None for name in FLAVOURS)


def check_loading(device: str, context: int | None, rows: int, threads: int | None) -> None:
    """Raise EngineError for an argument of `InternVL.load` that no device can take."""
    if device not in DEVICES:
        raise EngineError(f"device {device!r} is not one of {', '.join(DEVICES)}")
    if context is not None and context < 2:
        raise EngineError(f"a context of {context} tokens has no room for a question and an answer; give more")
    if not 1 <= rows <= MOST_ROWS:
        raise EngineError(f"rows is {rows}, expected 1 to {MOST_ROWS}")
    most = max(64, 4 * machine.cores())
    if threads is not None and not 1 <= threads <= most:
        raise EngineError(f"threads is {threads}, expected 1 to {most}; this machine has {machine.cores()} cores")


def most_rows(opened: Bundle, device: str) -> int:
    """Return the most rows that a device has for a bundle: on TensorRT, those that the engines were built for.

    Raises:
        EngineError: there are no TensorRT engines for the present GPU.
    """
    if device == "tensorrt":
        return _present_engines(opened)[0].options.rows
    return MOST_ROWS if device == "cpu" else 1


def require_cuda(opened: Bundle) -> None:
    """Raise EngineError where CUDA cannot run this bundle, or does not work here.

    ONNX Runtime itself falls back to the CPU without an error, for one operator or for a whole session.
    """
    if obstacle := _cuda_obstacle(opened):
        raise EngineError(f"{obstacle.found}{obstacle.advice}")


def require_unused(device: str, engine: str, **options: object) -> None:
    """Raise EngineError for an option that this device does not use, rather than ignore it.

    The engine "auto" and None are unused.
    """
    for name, value in {"engine": None if engine == "auto" else engine, **options}.items():
        if value is not None:
            raise EngineError(f"{name} {value} has no effect on device {device}; leave it out, or choose device cpu")


def load_engine(
    opened: Bundle,
    device: str,
    engine: str,
    dialect: str | None,
    context: int | None,
    rows: int,
    *,
    threads: int | None,
    exact: bool,
    progress: Progress,
) -> Engine:
    """Load the engine of a device. The arguments are those of `InternVL.load`, and none is ignored.

    Raises:
        EngineError: as `InternVL.load`.
    """
    if device == "cuda" and rows > 1:
        raise EngineError(f"device {device} has one row, {rows} were asked for; leave out rows, or choose device cpu")
    if device == "tensorrt":
        if exact:
            raise EngineError("TensorRT engines compute in 16 bits; leave out --exact, or choose another --device")
        require_unused(device, engine, dialect=None if dialect == "standard" else dialect, threads=threads)
        from .tensorrt.engine import TensorRTEngine

        return TensorRTEngine(opened, capacity=context, rows=rows, progress=progress)
    capacity = checked_context(opened.manifest.model.decoder, context)
    if device == "cuda":
        require_unused(device, engine)
        require_cuda(opened)
        return OnnxRuntimeEngine(opened, device=device, dialect=dialect, capacity=capacity, threads=threads)
    return cpu_engine(opened, engine, dialect=dialect, capacity=capacity, rows=rows, threads=threads, exact=exact)


@dataclass(frozen=True)
class _Obstacle:
    """Why CUDA is not used, and what to do."""

    found: str
    advice: str


def _cuda_obstacle(opened: Bundle) -> _Obstacle | None:
    try:
        import onnxruntime
    except ImportError as error:
        return _Obstacle(_NOT_INSTALLED, f": {missing_package(error, 'gpu', 'cuda')}")
    runtime: Any = onnxruntime
    providers: list[str] = getattr(runtime, "get_available_providers", list)()
    if PROVIDERS["cuda"] not in providers:
        there = f"(providers: {', '.join(providers) or 'none'})"
        return _Obstacle("this ONNX Runtime has no CUDA", f" {there}; for device cuda: {install('gpu')}")
    found = opened.manifest.activations
    if found not in _CUDA_ACTIVATIONS:
        return _Obstacle(
            f"the bundle computes in {found}, but CUDA's attention takes float16",
            "; export it again with --activations float16, or choose another --device",
        )
    reason = obstacle_to_session(runtime, PROVIDERS["cuda"])
    if reason is not None:
        advice = "; it needs an NVIDIA driver, CUDA and cuDNN: pip install 'onnxruntime-gpu[cuda,cudnn]'"
        said = f" ({reason})" if reason else ""
        return _Obstacle(f"CUDA does not start in ONNX Runtime {runtime.__version__}", said + advice)
    return None


def obstacle_to_session(runtime: Any, provider: str) -> str | None:
    """Start a session of a provider. Return None if that works; if not, the reason that the library gives, or ""."""
    # CUDA's libraries from Python packages are found only after this call, which prints what it does not find.
    if provider == PROVIDERS["cuda"] and (preload := getattr(runtime, "preload_dlls", None)):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            preload()
    options = runtime.SessionOptions()
    options.log_severity_level = _FATAL
    runtime.set_default_logger_severity(_FATAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            session = runtime.InferenceSession(IDENTITY, options, providers=[provider])
        return None if provider in session.get_providers() else ""
    except Exception as error:  # onnxruntime raises its own kinds, all derived from Exception
        return next(iter(str(error).splitlines()), "")
    finally:
        runtime.set_default_logger_severity(_WARNINGS)


def _tensorrt_engines(opened: Bundle, dialect: str | None, context: int | None, exact: bool, rows: int) -> str:
    """Return which engines of the bundle the present GPU can run; raise EngineError where there are none."""
    from .tensorrt.flavour import load_flavour
    from .tensorrt.record import engine_names, rows_text

    if not engine_names(opened):
        raise EngineError("the bundle has no TensorRT engines")
    if dialect not in (None, "standard"):
        raise EngineError(f"TensorRT engines do not run the dialect {dialect}")
    if exact:
        raise EngineError("TensorRT engines compute in 16 bits, and exact numbers were asked for")
    record, found = _present_engines(opened)
    installed = load_flavour(record.flavour).version
    if installed != record.version:
        raise EngineError(f"the engines {record.target} are of {record.flavour} {record.version}, not {installed}")
    if context is not None and context > record.options.capacity:
        raise EngineError(f"the engines {record.target} hold {record.options.capacity} tokens, asked for are {context}")
    if rows > record.options.rows:
        there = rows_text(record.options.rows)
        raise EngineError(f"the engines {record.target} hold {there}, asked for are {rows}")
    return f"engines {record.target} for compute capability {found / 10:.1f}"


def _present_engines(opened: Bundle) -> tuple[EngineRecord, int]:
    """Return the record of the engines that the present GPU can run, and its compute capability."""
    from .tensorrt.cuda import Cuda
    from .tensorrt.record import find_engines

    cuda = Cuda()
    try:
        found = cuda.compute_capability()
    finally:
        cuda.close()
    return find_engines(opened, found), found
