"""A fake GPU: CUDA's and TensorRT's calls over host memory. Every mistake of the caller is an error.

Work is queued on streams and done only when the caller waits for them, so that reading results or reusing inputs too
early has visible effects. Addresses, sizes, lifetimes and captures are checked at every call. "Engines" are special
headers that ONNX Runtime runs, so that positions and buffers matter. The fake does not tell what TensorRT computes.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime

Work = Callable[[], None]
# Input -> smallest, best and largest shape.
Ranges = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
NUMPY = {
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(float)": np.float32,
}


class cudaError_t:  # noqa: N801
    cudaSuccess, cudaErrorMemoryAllocation, cudaErrorUnknown = 0, 2, 999  # noqa: N815


class FakeCuda:
    """A fake `cuda.bindings.runtime`.

    `fail` names a call that fails: (function, number of calls that succeed before).
    """

    cudaError_t = cudaError_t  # noqa: N815
    cudaHostAllocDefault, cudaStreamNonBlocking = 0, 1  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815
    cudaStreamCaptureStatus = SimpleNamespace(cudaStreamCaptureStatusNone=0)  # noqa: N815
    cudaDeviceAttr = SimpleNamespace(  # noqa: N815
        cudaDevAttrComputeCapabilityMajor="major", cudaDevAttrComputeCapabilityMinor="minor"
    )

    def __init__(self, sm: int = 86, memory: int = 1 << 30, fail: tuple[str, int] | None = None) -> None:
        self.calls: Counter[str] = Counter()
        self.copied: Counter[str] = Counter()
        self.device: dict[int, np.ndarray[Any, Any]] = {}
        self.host: dict[int, Any] = {}
        self.streams: dict[int, list[Work]] = {}
        self.captures: dict[int, list[Work]] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.last_error = 0
        self._sm, self._left, self._fail = sm, memory, fail
        self._next = 1 << 20
        self._handle = 0

    def __getattribute__(self, name: str) -> Any:
        """Count every call, and let the chosen one fail."""
        value = super().__getattribute__(name)
        if not name.startswith("cuda") or not callable(value) or isinstance(value, type):
            return value

        def call(*arguments: Any) -> Any:
            self.calls[name] += 1
            if self._fail == (name, self.calls[name] - 1):
                self.last_error = cudaError_t.cudaErrorUnknown
                if name == "cudaStreamEndCapture":  # an invalid capture ends, without a graph
                    self.captures.pop(arguments[0])
                return (cudaError_t.cudaErrorUnknown, None)
            return value(*arguments)

        return call

    @property
    def leaks(self) -> dict[str, int]:
        held = {"device": self.device, "host": self.host, "streams": self.streams, "graphs": self.graphs}
        return {name: len(things) for name, things in held.items() if things}

    def cudaGetLastError(self) -> Any:  # noqa: N802
        noted, self.last_error = self.last_error, 0
        return (noted,)

    def cudaGetErrorString(self, status: int) -> Any:  # noqa: N802
        return 0, {2: b"out of memory", 999: b"unknown error"}[status]

    def cudaGetDeviceCount(self) -> Any:  # noqa: N802
        return 0, 1

    def cudaSetDevice(self, device: int) -> Any:  # noqa: N802
        return (0,)

    def cudaDeviceGetAttribute(self, attribute: str, device: int) -> Any:  # noqa: N802
        return 0, self._sm // 10 if attribute == "major" else self._sm % 10

    def cudaMemGetInfo(self) -> Any:  # noqa: N802
        return 0, self._left, 1 << 30

    def cudaMalloc(self, size: int) -> Any:  # noqa: N802
        assert size > 0
        assert not self.captures, "memory is taken while a graph is captured"
        if size > self._left:
            return cudaError_t.cudaErrorMemoryAllocation, None
        self._left -= size
        address, self._next = self._next, self._next + size // 4096 * 4096 + 8192
        self.device[address] = np.full(size, 0xFF, np.uint8)  # NaN in every float type
        return 0, address

    def cudaFree(self, address: int) -> Any:  # noqa: N802
        self._left += self.device.pop(address).nbytes
        return (0,)

    def cudaMemset(self, address: int, value: int, size: int) -> Any:  # noqa: N802
        self.at(address, size)[:] = value
        return (0,)

    def cudaHostAlloc(self, size: int, flags: int) -> Any:  # noqa: N802
        buffer = (ctypes.c_uint8 * size)()
        self.host[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    def cudaFreeHost(self, address: int) -> Any:  # noqa: N802
        del self.host[address]
        return (0,)

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:  # noqa: N802
        self._handle += 1
        self.streams[self._handle] = []
        return 0, self._handle

    def cudaStreamDestroy(self, stream: int) -> Any:  # noqa: N802
        del self.streams[stream]
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> Any:  # noqa: N802
        assert stream not in self.captures, "waiting while a graph is captured"
        work, self.streams[stream] = self.streams[stream], []
        for done in work:
            done()
        return (0,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> Any:  # noqa: N802
        if kind == 3:
            there, here = self.at(target, size), self.at(source, size)
            self.queue(stream, lambda: np.copyto(there, here))
            return (0,)
        to_device = kind == 1
        device, host = (
            self.at(target if to_device else source, size),
            self._pinned(source if to_device else target, size),
        )

        def copy() -> None:
            self.copied["to device" if to_device else "to host"] += size
            (device if to_device else host)[:] = host if to_device else device

        self.queue(stream, copy)
        return (0,)

    def cudaMemcpy2DAsync(  # noqa: N802
        self, target: int, pitch: int, source: int, source_pitch: int, width: int, rows: int, kind: int, stream: int
    ) -> Any:
        assert kind == 3
        assert width <= min(pitch, source_pitch)
        assert stream not in self.captures, "a captured copy would keep its place"
        for row in range(rows):
            there, here = self.at(target + row * pitch, width), self.at(source + row * source_pitch, width)
            self.queue(stream, partial(np.copyto, there, here))
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> Any:  # noqa: N802
        assert not self.streams[stream], "capture begins while work is pending"
        self.captures[stream] = []
        return (0,)

    def cudaStreamIsCapturing(self, stream: int) -> Any:  # noqa: N802
        return 0, 1 if stream in self.captures else 0

    def cudaStreamEndCapture(self, stream: int) -> Any:  # noqa: N802
        return 0, self.captures.pop(stream)

    def cudaGraphInstantiate(self, graph: list[Work], flags: int) -> Any:  # noqa: N802
        self._handle += 1
        self.graphs[self._handle] = graph
        return 0, self._handle

    def cudaGraphDestroy(self, graph: list[Work]) -> Any:  # noqa: N802
        return (0,)

    def cudaGraphExecDestroy(self, graph: int) -> Any:  # noqa: N802
        del self.graphs[graph]
        return (0,)

    def cudaGraphLaunch(self, graph: int, stream: int) -> Any:  # noqa: N802
        for work in self.graphs[graph]:
            self.queue(stream, work)
        return (0,)

    def queue(self, stream: int, work: Work) -> None:
        (self.captures[stream] if stream in self.captures else self.streams[stream]).append(work)

    def at(self, address: int, size: int) -> np.ndarray[Any, Any]:
        """Live device memory; anything else is the caller's mistake."""
        for start, memory in self.device.items():
            if start <= address and address + size <= start + memory.nbytes:
                return memory[address - start : address - start + size]
        raise AssertionError(f"{size} bytes at {address} are not device memory")

    def _pinned(self, address: int, size: int) -> np.ndarray[Any, Any]:
        for start, buffer in self.host.items():
            if start <= address and address + size <= start + len(buffer):
                return np.ctypeslib.as_array(buffer)[address - start : address - start + size]
        raise AssertionError(f"{size} bytes at {address} are not pinned memory")


class FakeTensorRT:
    """A fake of either flavour's module. Engine files are headers; their data are in `folder`.

    `ranges` are the optimization profiles that `build` gives each graph; a shape outside of them is an error.
    """

    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole graph")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(LAZY="lazy", EAGER="eager")

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

    def __init__(
        self,
        cuda: FakeCuda,
        folder: Path,
        version: str = "10.16.1",
        profiles: int = 1,
        ranges: dict[str, tuple[Ranges, ...]] | None = None,
    ) -> None:
        self.__version__ = version
        self.cuda, self.folder, self.num_profiles = cuda, folder, profiles
        self.ranges = ranges or {}
        self.refused: str | None = None
        self.contexts: list[FakeContext] = []
        self.loaded_caches: list[bytes] = []
        self.kernels = b"kernels"

    def Runtime(self, log: Any) -> Any:  # noqa: N802
        return SimpleNamespace(deserialize_cuda_engine=lambda data: FakeEngine(self, bytes(data), log))


def _without_hints(header: bytes) -> bytes:
    """Drop the attributes that only TensorRT's importer reads, and that ONNX Runtime refuses."""
    model = onnx.load_from_string(header)
    for node in model.graph.node:
        kept = [attribute for attribute in node.attribute if not attribute.name.startswith("TRT_")]
        del node.attribute[:]
        node.attribute.extend(kept)
    return model.SerializeToString()


class FakeEngine:
    device_memory_size_v2 = 1000

    def __init__(self, api: FakeTensorRT, header: bytes, log: Any) -> None:
        path = api.folder / f"fake-{len(header)}.onnx"
        path.write_bytes(_without_hints(header))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.api, self.log = api, log
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self.names)
        self.num_optimization_profiles = api.num_profiles

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.inputs else "output"

    def get_tensor_dtype(self, name: str) -> Any:
        value = self.inputs.get(name) or self.outputs[name]
        return SimpleNamespace(itemsize=np.dtype(NUMPY[value.type]).itemsize)

    def get_tensor_shape(self, name: str) -> list[int]:
        value = self.inputs.get(name) or self.outputs[name]
        return [dim if isinstance(dim, int) else -1 for dim in value.shape]

    def create_runtime_config(self) -> Any:
        def cache() -> Any:
            return SimpleNamespace(deserialize=self.api.loaded_caches.append, serialize=lambda: self.api.kernels)

        return SimpleNamespace(
            create_runtime_cache=cache,
            set_execution_context_allocation_strategy=lambda strategy: None,
            set_runtime_cache=lambda cache: None,
            cuda_graph_strategy=None,
        )

    def create_execution_context(self, config: Any) -> FakeContext:
        strategy = getattr(config, "dynamic_shapes_kernel_specialization_strategy", None)
        context = FakeContext(self, getattr(config, "cuda_graph_strategy", None), strategy)
        self.api.contexts.append(context)
        return context


class FakeContext:
    """A fake execution context. It does not run until memory, addresses and shapes are all set.

    It writes outputs when the stream gets to it.
    """

    def __init__(self, engine: FakeEngine, strategy: Any, specialization: Any = None) -> None:
        self.engine, self.strategy, self.specialization = engine, strategy, specialization
        self.profile = 0
        self.runs = 0
        self.windows: list[int] = []
        self.shapes: set[tuple[tuple[str, tuple[int, ...]], ...]] = set()
        self._memory = 0
        self._addresses: dict[str, int] = {}
        self._shapes = {name: shape for name in engine.inputs if -1 not in (shape := engine.get_tensor_shape(name))}

    def set_device_memory(self, address: int, size: int) -> None:
        self.engine.api.cuda.at(address, size)
        assert size >= self.engine.device_memory_size_v2
        self._memory = address

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return profile < self.engine.num_optimization_profiles

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0, f"{name} is not aligned"
        self._addresses[name] = address
        return name in self.engine.names and self.engine.api.refused != name

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        declared = self.engine.get_tensor_shape(name)
        self._shapes[name] = list(shape)
        return len(shape) == len(declared) and all(d in (-1, s) for d, s in zip(declared, shape, strict=True))

    def execute_async_v3(self, stream: int) -> bool:
        engine, cuda = self.engine, self.engine.api.cuda
        assert not cuda.last_error, "the library finds an error of an earlier call"
        if engine.api.refused == "run":
            engine.log.log(engine.api.ILogger.ERROR, "the fake was told\nto refuse")
            return False
        assert self._memory in cuda.device
        assert self._addresses.keys() == set(engine.names)
        assert self._shapes.keys() == engine.inputs.keys()
        for name in engine.outputs:
            if name.startswith("present"):
                assert self._addresses[name] == self._addresses[name.replace("present", "past_key_values")]
        shapes = {name: tuple(shape) for name, shape in self._shapes.items()}
        inputs = {name: self._array(name, value, shapes[name]) for name, value in engine.inputs.items()}
        for name, (smallest, _, largest) in self._ranges().items():
            within = zip(smallest, shapes[name], largest, strict=True)
            assert all(low <= size <= high for low, size, high in within), f"{name} {shapes[name]} is in no profile"
        self.runs += 1
        self.shapes.add(tuple(shapes.items()))

        def work() -> None:
            if "slots" in shapes:
                self.windows.append(shapes["slots"][0])
                assert (inputs["past_length"] + shapes["inputs_embeds"][1] <= shapes["slots"][0]).all()
            results = engine.session.run(list(engine.outputs), {name: array.copy() for name, array in inputs.items()})
            for (name, value), result in zip(engine.outputs.items(), results, strict=True):
                self._array(name, value, result.shape)[...] = result

        cuda.queue(stream, work)
        return True

    def _ranges(self) -> Ranges:
        ranges = self.engine.api.ranges.get("vision" if "pixels" in self.engine.inputs else "decoder")
        return ranges[self.profile] if ranges else {}

    def _array(self, name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        dtype = np.dtype(NUMPY[value.type])
        size = int(np.prod(shape)) * dtype.itemsize
        return self.engine.api.cuda.at(self._addresses[name], size).view(dtype).reshape(shape)
