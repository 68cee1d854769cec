"""The CUDA calls that an engine needs, each with an error check: memory, copies, streams and graphs.

`Cuda.close` releases everything that this `Cuda` allocated, in reverse order, also after an error. This module does not
know TensorRT.
"""

from __future__ import annotations

import ctypes
import importlib
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import EngineError
from internvl_edge.base.extras import install

_INSTALL = f"{install('rtx')} (or [jetson])"


class Cuda:
    """The present GPU through `cuda.bindings.runtime`. Pointers are integers; streams and graphs are handles.

    Args:
        runtime: the module to call; the default is the installed one.

    Raises:
        EngineError: from any method, when a call fails. The message has the function's name and CUDA's description.
    """

    def __init__(self, runtime: Any = None) -> None:
        self._runtime = runtime or _import_runtime()
        self._success = self._runtime.cudaError_t.cudaSuccess
        kinds = self._runtime.cudaMemcpyKind
        self._to_device, self._to_host = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        self._owned = ExitStack()
        count = self.call("cudaGetDeviceCount")
        if not count:
            raise EngineError("CUDA finds no GPU here")
        self.call("cudaSetDevice", 0)

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function by name, and return its result without the status (None if there is no result)."""
        results = getattr(self._runtime, function)(*arguments)
        if results[0] != self._success:
            raise EngineError(f"CUDA: {function} failed: {self._description(results[0])}")
        return results[1] if len(results) > 1 else None

    def compute_capability(self) -> int:
        """Return the compute capability as one number: 87 for 8.7."""
        attributes = self._runtime.cudaDeviceAttr
        major = self.call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, 0)
        return int(10 * major + self.call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, 0))

    def device_memory(self, size: int, purpose: str) -> int:
        """Allocate `size` zero bytes on the device, and return the address. An error message names `purpose`."""
        try:
            pointer = int(self.call("cudaMalloc", size))
        except EngineError as error:
            raise EngineError(f"{self._free()}{size / 1e6:.0f} MB are needed for {purpose} ({error})") from None
        self._owned.callback(self._release, "cudaFree", pointer)
        self.call("cudaMemset", pointer, 0, size)
        return pointer

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Allocate `size` bytes of pinned host memory, and return them as an array.

        Copies from and to pinned memory are asynchronous. The array must not be used after `close`.
        """
        pointer = int(self.call("cudaHostAlloc", size, self._runtime.cudaHostAllocDefault))
        self._owned.callback(self._release, "cudaFreeHost", pointer)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))

    def stream(self) -> Any:
        """Create a stream."""
        stream = self.call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)
        self._owned.callback(self._release, "cudaStreamDestroy", stream)
        return stream

    def to_device(self, target: int, source: int, size: int, stream: Any) -> None:
        """Start a copy of `size` bytes of pinned memory to the device."""
        self.call("cudaMemcpyAsync", target, source, size, self._to_device, stream)

    def to_host(self, target: int, source: int, size: int, stream: Any) -> None:
        """Start a copy of `size` bytes from the device to pinned memory."""
        self.call("cudaMemcpyAsync", target, source, size, self._to_host, stream)

    def within_device_rows(
        self, target: int, pitch: int, source: int, source_pitch: int, size: int, rows: int, stream: Any
    ) -> None:
        """Start a copy of `rows` rows of `size` bytes within the device; a pitch is the bytes from row to row."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.call("cudaMemcpy2DAsync", target, pitch, source, source_pitch, size, rows, kind, stream)

    def synchronize(self, stream: Any) -> None:
        """Wait until all work on a stream is done. Errors of earlier work are raised here."""
        self.call("cudaStreamSynchronize", stream)

    def begin_capture(self, stream: Any) -> None:
        """Record the following work on the stream instead of running it."""
        self.call(
            "cudaStreamBeginCapture", stream, self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        )

    def end_capture(self, stream: Any) -> Any:
        """Return the recorded work as an executable graph, which `destroy_graph` releases."""
        graph = self.call("cudaStreamEndCapture", stream)
        try:
            return self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self._release("cudaGraphDestroy", graph)

    def abandon_capture(self, stream: Any) -> None:
        """Leave a capture that failed, whatever its state, and forget the error that CUDA has noted for it."""
        none = self._runtime.cudaStreamCaptureStatus.cudaStreamCaptureStatusNone
        state = self._runtime.cudaStreamIsCapturing(stream)
        if state[0] == self._success and state[1] != none:
            ended = self._runtime.cudaStreamEndCapture(stream)
            if ended[0] == self._success:
                self._release("cudaGraphDestroy", ended[1])
        self._runtime.cudaGetLastError()

    def launch(self, graph: Any, stream: Any) -> None:
        """Run the recorded work."""
        self.call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        """Release a graph that `end_capture` returned."""
        self._release("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        """Release everything. Further calls do nothing."""
        self._owned.close()

    def _release(self, function: str, handle: Any) -> None:
        """Release a handle and ignore failures: the context is gone, or another call has raised the error already."""
        getattr(self._runtime, function)(handle)

    def _description(self, status: Any) -> str:
        _, text = self._runtime.cudaGetErrorString(status)
        return text.decode() if isinstance(text, bytes) else str(text)

    def _free(self) -> str:
        status, free, total = self._runtime.cudaMemGetInfo()
        if status != self._runtime.cudaError_t.cudaSuccess:
            return ""
        return f"the GPU has {free / 1e6:.0f} of {total / 1e6:.0f} MB free; "


def _import_runtime() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise EngineError(f"cuda-bindings cannot be imported ({error}): {_INSTALL}") from None
